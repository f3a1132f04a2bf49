"""Keep what was read for a block, as it lies in the files, until the block's shards are written.

A shard needs all dates at once, and the blocks of the files that lie under it lie under its
neighbours too. So the assets are read for many shards together, whose parts wait here: in memory
as far as they may, else in a scratch file, which is written and read in pieces and never mapped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import OutputError
from ..grid import Window
from .pixels import Pixels
from .scratch import scratch_folder

__all__ = ["Stage"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """Where a part lies in the file."""

    offset: int
    shape: tuple[int, int]
    empty: Pixels
    """The part without its values."""


class Stage(contextlib.AbstractContextManager["Stage"]):
    """Parts of assets, by scene, asset and shard; may be used by several threads.

    Parameters
    ----------
    shards
        Counted from the block's first pixel.
    scratch
        Where to make a folder for what memory may not hold; None = that for temporary files.
    memory
        Bytes that may be kept in memory.
    """

    def __init__(self, shards: Sequence[Window], scratch: Path | None, *, memory: int) -> None:
        """Prepare; a file is made when it is needed."""
        self.shards = tuple(shards)
        self._scratch, self._memory = scratch, memory
        self._parts: dict[tuple[int, str, int], Pixels | _Kept] = {}
        self._lock = threading.Lock()
        self._ends = contextlib.ExitStack()
        self._file = -1
        self._end = 0

    def __exit__(self, *_: object) -> None:
        self._parts.clear()
        self._ends.close()

    def put(self, scene: int, key: str, pixels: Pixels, *, padding: int = 0) -> None:
        """Keep an asset's pixels for each of the shards.

        Parameters
        ----------
        scene
            Number of the scene.
        key
            Of the asset.
        padding
            Pixels around the shards that are needed, too.

        Raises
        ------
        OutputError
            If there is no room for them.
        """
        for number, shard in enumerate(self.shards):
            part = pixels.part(shard.expand(padding))
            size = part.values.nbytes
            with self._lock:
                fits = size <= self._memory
                if fits:
                    self._memory -= size
                    self._parts[scene, key, number] = part
                    continue
                if self._file < 0:
                    self._file = self._open()
                offset, self._end = self._end, self._end + size
            kept = self._written(part, offset)
            with self._lock:
                self._parts[scene, key, number] = kept

    def take(self, scene: int, key: str, number: int) -> Pixels:
        """Return what is kept of an asset for a shard; from memory, it is gone after that."""
        with self._lock:
            kept = self._parts.pop((scene, key, number))
        if isinstance(kept, Pixels):
            return kept
        values = np.empty(kept.shape, dtype=kept.empty.values.dtype)
        view = memoryview(values.reshape(-1).view(np.uint8).data)
        done = 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], kept.offset + done)
            if not count:
                raise OutputError(
                    "Cannot read back pixels that were kept in scratch: their file was cut. Run "
                    "the same command again."
                )
            done += count
        return dataclasses.replace(kept.empty, values=values)

    def _open(self) -> int:
        """Make the scratch file; the folder goes when the stage is left, or with the process."""
        folder = self._ends.enter_context(scratch_folder(self._scratch))
        file = os.open(folder / "pixels", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        self._ends.callback(os.close, file)
        return file

    def _written(self, part: Pixels, offset: int) -> _Kept:
        values = part.values
        view = memoryview(values.reshape(-1).view(np.uint8).data)
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file, view[done:], offset + done)
        except OSError as error:
            where = self._scratch or tempfile.gettempdir()
            raise OutputError(
                f"Cannot keep pixels in {where} for a while: {error.strerror or error}, after "
                f"{offset / 1e9:.3g} GB of one block. Choose a folder with more room with "
                "--scratch, or give more --memory."
            ) from error
        height, width = values.shape
        empty = dataclasses.replace(part, values=np.empty((0, 0), dtype=values.dtype))
        return _Kept(offset, (height, width), empty)
