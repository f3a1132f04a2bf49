"""Folders for pixels that are needed for a moment: removed when done, also after a kill.

Each folder has a lock file beside it that its process holds as long as it lives: the system lets
go of it even after ``kill -9``. Whoever looks next finds the lock free, and removes both.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from ..errors import OutputError

__all__ = ["check_scratch", "scratch_folder", "sweep_scratch"]

_LOCK = ".lock"


def scratch_folder(root: Path | None) -> contextlib.AbstractContextManager[Path]:
    """Return a context with a new folder, which is removed with all that is in it.

    Parameters
    ----------
    root
        Where to make it, on a local disk; None = the folder for temporary files.

    Raises
    ------
    OutputError
        If it cannot be made.
    """
    return _held(_root(root))


@contextlib.contextmanager
def _held(root: Path) -> Iterator[Path]:
    with _clear(root):
        lock, descriptor = _lock_new(root)
    folder = lock.with_suffix("")
    try:
        with _clear(root):
            folder.mkdir(mode=0o700)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def _lock_new(root: Path) -> tuple[Path, int]:
    """Create a lock file of our own and hold it."""
    root.mkdir(parents=True, exist_ok=True)
    while True:
        lock = root / f"{_prefix()}{uuid.uuid4().hex[:12]}{_LOCK}"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Somebody who sweeps may have taken it for a dead one's in between.
        if os.fstat(descriptor).st_nlink:
            return lock, descriptor
        os.close(descriptor)


def sweep_scratch(root: Path | None) -> int:
    """Remove what processes of this machine, now dead, have left; return how many folders."""
    where = _root(root)
    removed = 0
    for lock in where.glob(f"{_prefix()}*{_LOCK}"):
        with contextlib.suppress(OSError):
            descriptor = os.open(lock, os.O_RDWR)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
                removed += 1
            finally:
                os.close(descriptor)
    return removed


def check_scratch(root: Path | None) -> None:
    """Sweep, and raise OutputError where no folder can be made."""
    sweep_scratch(root)
    with scratch_folder(root):
        pass


def _root(root: Path | None) -> Path:
    return Path(tempfile.gettempdir()) if root is None else root


def _prefix() -> str:
    """Return how the names of this machine begin: locks are only seen on one."""
    return f"stcln-geo-scratch-{re.sub(r'[^A-Za-z0-9]+', '-', socket.gethostname())}-"


@contextlib.contextmanager
def _clear(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"Cannot keep pixels in {root} for a while: {error.strerror or error}. It must be a "
            "folder on a local disk that is writable and has room. Choose another --scratch."
        ) from error
