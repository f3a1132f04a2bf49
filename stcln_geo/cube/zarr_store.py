"""Zarr groups at a location: a local path as it is, a prefix of a bucket through obstore."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zarr.storage import ObjectStore

from ..bucket import object_store
from ..storage import Location, S3Path, clear_errors

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

__all__ = ["zarr_store"]


def zarr_store(folder: Location) -> Path | ObjectStore[Any]:
    """Return what ``zarr`` and ``xarray`` open as the group in a folder."""
    if isinstance(folder, Path):
        return folder
    return _ClearStore(object_store(folder.bucket, folder.key))


class _ClearStore(ObjectStore[Any]):
    """An object store whose refusals are the errors of this package."""

    @property
    def _where(self) -> S3Path:
        return S3Path(str(self.store.config["bucket"]), str(self.store.prefix or ""))

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        with clear_errors(self._where):
            return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        with clear_errors(self._where):
            return await super().get_partial_values(prototype, key_ranges)

    async def exists(self, key: str) -> bool:
        with clear_errors(self._where):
            return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        with clear_errors(self._where):
            await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        with clear_errors(self._where):
            await super().set_if_not_exists(key, value)

    async def delete(self, key: str) -> None:
        with clear_errors(self._where):
            await super().delete(key)

    async def delete_dir(self, prefix: str) -> None:
        with clear_errors(self._where):
            await super().delete_dir(prefix)

    def list_prefix(self, prefix: str) -> AsyncGenerator[str, None]:
        return self._clear(super().list_prefix(prefix))

    def list_dir(self, prefix: str) -> AsyncGenerator[str, None]:
        return self._clear(super().list_dir(prefix))

    async def _clear(self, names: AsyncIterator[str]) -> AsyncGenerator[str, None]:
        with clear_errors(self._where):
            async for name in names:
                yield name
