"""One writer per cube."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ..errors import CubeError
from ..lock import LockHolder, hold_lock, lock_path
from ..storage import Location

__all__ = ["LockHolder", "cube_lock", "lock_path"]


def cube_lock(cube: str | Location) -> AbstractContextManager[None]:
    """Hold the lock of a cube, ``NAME.zarr.lock`` beside it.

    Raises
    ------
    CubeError
        If another process, or another thread of this one, is writing the cube.
    """

    def refusal(holder: LockHolder, lock: Location) -> CubeError:
        return CubeError(
            f"Cannot write the cube {cube}: process {holder.pid} on {holder.host} has been writing "
            f"it since {holder.time}. A cube has one writer at a time. Wait until that build has "
            f"ended or stop it; if it runs no longer, remove {lock}."
        )

    return hold_lock(cube, refusal=refusal)
