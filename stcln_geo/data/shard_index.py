"""Where the chunks of shards lie in their files, kept within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

__all__ = ["OVERHEAD", "IndexCache", "ShardIndex"]

OVERHEAD = 512
"""What the objects around an index take (bytes); most indices have a kilobyte."""


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where the chunks of a shard lie in its file."""

    size: int
    """Of the file (bytes)."""
    table: np.ndarray
    """(..., 2) uint64: offset and length of each chunk."""


class IndexCache:
    """The indices that were asked for last, of all readers of the process together.

    Parameters
    ----------
    most
        Bytes that they may take.
    """

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self._kept: OrderedDict[tuple[int, tuple[int, ...]], ShardIndex | None] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, tuple[int, ...]]) -> tuple[bool, ShardIndex | None]:
        """Return whether an index is kept, and the index: None where a shard has no file."""
        with self._lock:
            if key not in self._kept:
                return False, None
            self._kept.move_to_end(key)
            return True, self._kept[key]

    def put(self, key: tuple[int, tuple[int, ...]], index: ShardIndex | None) -> None:
        """Keep an index, in place of those that were not asked for of late."""
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = index
            self.held += self._bytes(index)
            while self.held > self.most:
                self.held -= self._bytes(self._kept.popitem(last=False)[1])

    def forget(self) -> None:
        """Begin anew in a forked process, where the lock may be held for ever."""
        self.__init__(self.most)  # type: ignore[misc]

    @staticmethod
    def _bytes(index: ShardIndex | None) -> int:
        return OVERHEAD + (0 if index is None else index.table.nbytes)
