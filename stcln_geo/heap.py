"""What the C library does with freed memory: give it back to the system, or keep it for the next.

Only glibc, the C library of most Linux systems, is told anything; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["give_back_memory", "keep_memory"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
"""Parameters of ``mallopt``, by glibc's numbers."""

_KEPT = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1}
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
"""What glibc's own rule comes to in a process that has freed large arrays."""


@functools.cache
def _glibc(name: str) -> Callable[..., int] | None:
    """Return a function of glibc; None where there is no such."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):
        return None
    return function


def give_back_memory() -> None:
    """Give freed memory back to the system, so that one task's leavings are not in the next's way.

    Arrays below 32 MB otherwise stay in the heaps of the threads that made them.
    """
    if (trim := _glibc("malloc_trim")) is not None:
        trim(0)


@contextmanager
def keep_memory() -> Iterator[None]:
    """Keep freed memory in the process for what comes next, and give it back at the end.

    For work that makes the same large arrays over and over, as training does: the system otherwise
    takes each of them back when it is freed, and hands out the next page by page, emptied. Costs
    gaps: the peak of the process is higher. Holds for all threads; not to be nested.
    """
    _set(_KEPT)
    try:
        yield
    finally:
        _set(_USUAL)
        give_back_memory()


def _set(parameters: dict[int, int]) -> None:
    if (mallopt := _glibc("mallopt")) is None:
        return
    for parameter, value in parameters.items():
        mallopt(parameter, value)
