"""Read rectangles of Zarr arrays: by Zarr, or faster where chunks lie in shards as we write them.

`BlockReader` is the seam. Zarr reads the index of a shard again for each small read and takes
every chunk through its event loop, which costs more than decoding it. `ShardReader` keeps the
indices, asks the file or the bucket for the bytes of the chunk, and decodes them in the thread
that asks, without the interpreter's lock. It reads what this package writes (Zarr v3 shards of
blosc chunks, on disk or in a bucket); `open_reader` falls back to Zarr for all else.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import zarr
from numcodecs import blosc

from ..errors import ChunkError, StorageError
from ..storage import Location, S3Path, clear_errors
from .shard_index import IndexCache, ShardIndex

__all__ = ["BlockReader", "ShardReader", "ZarrReader", "open_reader"]

_ABSENT = np.uint64(2**64 - 1)
_INDEX_BYTES = 256_000_000
"""Memory for the indices of shards, of all arrays together: an archive has very many."""

_RUN_BYTES = 4_000_000
"""Most bytes that are read at once for several chunks, such as those of labels, which are small."""

_GAP_BYTES = 32_000
"""Bytes between two chunks that are read for nothing sooner than the file is asked twice."""


class BlockReader(Protocol):
    """Reads rectangles of one array; safe to call from several threads."""

    def read(self, selection: tuple[slice, ...]) -> np.ndarray:
        """Return the values of a rectangle; ``selection`` has a slice with a step of 1 per axis.

        Raises
        ------
        ChunkError
            If stored bytes are damaged.
        """


def open_reader(array: Any, place: Location) -> BlockReader:
    """Return the fastest reader for an opened Zarr array.

    Parameters
    ----------
    place
        Folder or prefix of the array itself.
    """
    return ShardReader.open(array, place) or ZarrReader(array, place)


class ZarrReader:
    """Reads through Zarr, whatever the layout and the store."""

    def __init__(self, array: Any, place: Location) -> None:
        self._array, self._place = array, place

    def read(self, selection: tuple[slice, ...]) -> np.ndarray:
        """Return the values of a rectangle."""
        try:
            values: np.ndarray = np.asarray(self._array[selection])
        except (StorageError, OSError):
            raise
        except Exception as error:
            # What codecs raise at damaged bytes is of many kinds.
            chunk = tuple(
                (part.start or 0) // side
                for part, side in zip(selection, self._array.chunks, strict=True)
            )
            raise _damaged(self._place, chunk, f"{type(error).__name__}: {error}") from error
        return values


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How an array is cut into files and these into chunks."""

    shape: tuple[int, ...]
    shard: tuple[int, ...]
    """Extent of a file."""
    chunk: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any

    @property
    def per_shard(self) -> tuple[int, ...]:
        """Chunks of a shard along each axis."""
        return tuple(whole // part for whole, part in zip(self.shard, self.chunk, strict=True))

    @property
    def index_bytes(self) -> int:
        """Length of a shard's index: offset and length of each chunk, then a checksum."""
        return math.prod(self.per_shard) * 16 + 4

    @property
    def chunk_bytes(self) -> int:
        """Decoded bytes of a chunk."""
        return math.prod(self.chunk) * int(self.dtype.itemsize)


_indices = IndexCache(_INDEX_BYTES)
_readers = itertools.count()
os.register_at_fork(after_in_child=_indices.forget)


class ShardReader:
    """Reads chunks of a sharded array by the shards' indices, which are kept.

    Chunks that lie together in a file are read together.

    Parameters
    ----------
    place
        Folder or prefix of the array.
    """

    def __init__(self, form: _Form, place: Location) -> None:
        self._form, self._place = form, place
        self._number = next(_readers)

    @classmethod
    def open(cls, array: Any, place: Location) -> ShardReader | None:
        """Return a reader, or None where the array is not laid out as it must be."""
        form = _form_of(array)
        return None if form is None else cls(form, place)

    def __getstate__(self) -> dict[str, Any]:
        return {"form": self._form, "place": self._place}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["form"], state["place"])  # type: ignore[misc]

    def read(self, selection: tuple[slice, ...]) -> np.ndarray:
        """Return the values of a rectangle; each chunk that it touches is decoded once."""
        form = self._form
        bounds = [part.indices(size)[:2] for part, size in zip(selection, form.shape, strict=True)]
        touched = [
            range(low // side, -(-high // side)) if high > low else range(0)
            for (low, high), side in zip(bounds, form.chunk, strict=True)
        ]
        if math.prod(len(chunks) for chunks in touched) == 1:
            alone = next(self._decoded(touched), None)
            if alone is not None:
                within = tuple(
                    slice(low - at * side, high - at * side)
                    for (low, high), at, side in zip(bounds, alone[0], form.chunk, strict=True)
                )
                return alone[1][within]
        out = np.full([max(high - low, 0) for low, high in bounds], form.fill, dtype=form.dtype)
        for chunk, decoded in self._decoded(touched):
            target, source = [], []
            for (low, high), at, side in zip(bounds, chunk, form.chunk, strict=True):
                begin, end = max(low, at * side), min(high, (at + 1) * side)
                target.append(slice(begin - low, end - low))
                source.append(slice(begin - at * side, end - at * side))
            out[tuple(target)] = decoded[tuple(source)]
        return out

    def _decoded(self, touched: Sequence[range]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield the chunks of a rectangle that were ever written, shard by shard."""
        for shard, chunks in _by_shard(touched, self._form.per_shard):
            index = self._index(shard, chunks[0])
            if index is None:
                continue
            for chunk, stored in self._stored(shard, index, chunks):
                yield chunk, self._decode(chunk, stored)

    def _stored(
        self, shard: tuple[int, ...], index: ShardIndex, chunks: Iterable[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], memoryview]]:
        """Yield the bytes of some chunks of a shard; those that lie together are read at once."""
        form = self._form
        places = []
        for chunk in chunks:
            place = index.table[
                tuple(at % per for at, per in zip(chunk, form.per_shard, strict=True))
            ]
            if (place == _ABSENT).all():
                continue
            offset, length = int(place[0]), int(place[1])
            if length == 0 or offset + length > index.size - form.index_bytes:
                raise _damaged(self._place, chunk, "its place lies outside of its file")
            places.append((offset, length, chunk))
        for run in _runs(sorted(places)):
            begin = run[0][0]
            end = max(offset + length for offset, length, _ in run)
            stored = memoryview(_read_range(self._file(shard), begin, end - begin))
            for offset, length, chunk in run:
                part = stored[offset - begin : offset - begin + length]
                if len(part) != length:
                    raise _damaged(self._place, chunk, "its file is cut short")
                yield chunk, part

    def _decode(self, chunk: tuple[int, ...], stored: memoryview) -> np.ndarray:
        """Return a whole chunk from its bytes."""
        form = self._form
        decoded = np.empty(form.chunk, dtype=form.dtype)
        try:
            # The header tells the size: a damaged one must not write beyond the array.
            if int.from_bytes(stored[4:8], "little") != form.chunk_bytes:
                raise ValueError("the header tells another size")
            blosc.decompress(stored, decoded)
        except (RuntimeError, ValueError) as error:
            raise _damaged(self._place, chunk, str(error)) from error
        return decoded

    def _index(self, shard: tuple[int, ...], chunk: tuple[int, ...]) -> ShardIndex | None:
        """Return a shard's index, or None where there is no file."""
        key = (self._number, shard)
        kept, found = _indices.get(key)
        if not kept:
            found = self._read_index(shard, chunk)
            _indices.put(key, found)
        return found

    def _read_index(self, shard: tuple[int, ...], chunk: tuple[int, ...]) -> ShardIndex | None:
        from google_crc32c import value as crc32c

        form = self._form
        found = _read_end(self._file(shard), form.index_bytes)
        if found is None:
            return None
        size, end = found
        if len(end) != form.index_bytes or crc32c(end[:-4]) != int.from_bytes(end[-4:], "little"):
            raise _damaged(self._place, chunk, "the index of its file does not fit its checksum")
        table = np.frombuffer(end[:-4], dtype="<u8").reshape(*form.per_shard, 2)
        return ShardIndex(size, table)

    def _file(self, shard: tuple[int, ...]) -> Location:
        return self._place / "/".join(["c", *map(str, shard)])


def _by_shard(
    touched: Sequence[range], per_shard: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], list[tuple[int, ...]]]]:
    """Yield each shard that some chunks along the axes lie in, and its chunks of them."""
    axes = [
        [
            (shard, range(max(chunks.start, shard * per), min(chunks.stop, (shard + 1) * per)))
            for shard in range(chunks.start // per, -(-chunks.stop // per))
        ]
        for chunks, per in zip(touched, per_shard, strict=True)
    ]
    for parts in itertools.product(*axes):
        chunks = list(itertools.product(*(part for _, part in parts)))
        if chunks:
            yield tuple(shard for shard, _ in parts), chunks


def _runs(
    places: Sequence[tuple[int, int, tuple[int, ...]]],
) -> Iterator[list[tuple[int, int, tuple[int, ...]]]]:
    """Yield chunks, (offset, length, chunk) by their offset, that are read at once."""
    run: list[tuple[int, int, tuple[int, ...]]] = []
    for place in places:
        if run and (
            place[0] - (run[-1][0] + run[-1][1]) > _GAP_BYTES
            or place[0] + place[1] - run[0][0] > _RUN_BYTES
        ):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _form_of(array: Any) -> _Form | None:
    """Return how an array is laid out, or None where `ShardReader` cannot read it."""
    if not isinstance(array, zarr.Array):
        return None
    told: Any = array.metadata.to_dict()
    if told.get("zarr_format") != 3 or told.get("storage_transformers"):
        return None
    keys = told.get("chunk_key_encoding", {})
    if keys.get("name") != "default" or (keys.get("configuration") or {}).get("separator") != "/":
        return None
    codecs = told["codecs"]
    if array.shards is None or len(codecs) != 1 or codecs[0]["name"] != "sharding_indexed":
        return None
    inner = codecs[0]["configuration"]
    names = [codec["name"] for codec in inner["codecs"]]
    if (
        names != ["bytes", "blosc"]
        or (inner["codecs"][0].get("configuration") or {}).get("endian", "little") != "little"
        or [codec["name"] for codec in inner["index_codecs"]] != ["bytes", "crc32c"]
        or str(getattr(inner.get("index_location"), "value", inner.get("index_location"))) != "end"
    ):
        return None
    dtype = np.dtype(array.dtype)
    if dtype.kind not in "biuf" or dtype.newbyteorder("<") != dtype:
        return None
    return _Form(
        shape=tuple(array.shape),
        shard=tuple(array.shards),
        chunk=tuple(array.chunks),
        dtype=dtype,
        fill=array.fill_value,
    )


def _read_range(file: Location, offset: int, length: int) -> bytes:
    if isinstance(file, S3Path):
        from ..bucket import object_store

        with clear_errors(file):
            return bytes(object_store(file.bucket).get_range(file.key, start=offset, length=length))
    handle = os.open(file, os.O_RDONLY)
    try:
        return b"".join(_pieces(handle, offset, length))
    finally:
        os.close(handle)


def _pieces(handle: int, offset: int, length: int) -> Iterator[bytes]:
    """Yield what lies there: one call may bring less than asked for."""
    while length > 0:
        piece = os.pread(handle, length, offset)
        if not piece:
            return
        yield piece
        offset, length = offset + len(piece), length - len(piece)


def _read_end(file: Location, length: int) -> tuple[int, bytes] | None:
    """Return the size of a file and its last bytes, or None where there is none."""
    if isinstance(file, S3Path):
        import obstore

        from ..bucket import object_store

        try:
            with clear_errors(file):
                answer = obstore.get(
                    object_store(file.bucket), file.key, options={"range": {"suffix": length}}
                )
                return int(answer.meta["size"]), bytes(answer.bytes())
        except FileNotFoundError:
            return None
    try:
        size = os.stat(file).st_size
    except FileNotFoundError:
        return None
    return size, _read_range(file, max(size - length, 0), min(length, size))


def _damaged(place: Location, chunk: Sequence[int], reason: str) -> ChunkError:
    """Return the error that names a chunk: cube, season, array, place."""
    season = place.parent
    others = "build the cube again, or leave such chunks out with --bad-chunks skip"
    if place.name in {"labels", "parcels"}:
        others = "or burn the labels again"
    return ChunkError(
        f"Cannot read chunk {'.'.join(map(str, chunk))} of {place.name} in {season.parent}, season "
        f"{season.name}: {reason}. The stored bytes are damaged. Restore the file from a copy, "
        f"{others}."
    )
