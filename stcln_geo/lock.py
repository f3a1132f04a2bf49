"""One writer per folder: a lock file beside a cube or a run that says who is writing it.

The file ``NAME.lock`` names host, process and time. A lock whose process has died on this host is
taken over, and so is one of an earlier life of the same SLURM job, whichever host that ran on. A
holder touches its file every half minute, so that one of another host which has been still for ten
minutes is taken over too: its host has failed, or its container is gone. The times are those of the
file system, which hosts that share it agree on.

In object storage the lock is an object, written on condition that there is none yet
(``If-None-Match: *``); one is taken over on condition that it still is the dead holder's
(``If-Match``). Of a cube it shows no sign of life: of another host, the error says which object to
remove. Of a run it is written anew every twenty seconds, and who finds one of another host watches
it: a lock that stays as it is for two minutes is taken over. Where a server ignores conditions,
only writers that begin within the same moment would not see one another.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError, StclnGeoError, StclnGeoWarning, StorageError
from .storage import (
    Location,
    S3Path,
    create_file,
    location,
    read_version,
    replace_version,
    writing,
)

__all__ = ["LockHolder", "hold_lock", "lock_path"]

_BEAT_SECONDS = 30.0
_STILL_BEATS = 20
"""A holder that gave no sign of life for so many beats exists no longer."""

_OBJECT_BEAT_SECONDS = 20.0
_SILENT_BEATS = 6
"""The same of an object. A request that is repeated for a minute is no silence."""

_UNWRITTEN_SECONDS = 2.0
"""A lock file still empty after this long was left by a process that died creating it."""

_PROCESSES = 2**31
"""Numbers of processes are below this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LockHolder:
    """The process that is writing."""

    host: str
    pid: int
    born: str
    """When the process began, as its system tells, so that a reused number is recognised."""
    time: str
    """When it took the lock, UTC."""
    job: str = ""
    """Cluster and number of the SLURM job; empty outside of one."""
    restart: int = 0
    """How often that job had been requeued."""
    beat: float = 0.0
    """Seconds between its signs of life; 0: it gives none."""
    sign: int = 0
    """How many of them an object has shown."""

    @property
    def is_dead(self) -> bool:
        """True where the process surely exists no longer."""
        job, restart = _slurm_job()
        if job and job == self.job and restart > self.restart:
            # A job is requeued when nothing of it runs any more.
            return True
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        state, born = _process(self.pid)
        # A zombie has ended; nobody has asked how, as in containers without an init.
        return state in ("Z", "X") or (bool(self.born) and born != self.born)


_TOLD = tuple(field.name for field in fields(LockHolder))


def lock_path(folder: str | Location) -> Location:
    """Return the lock file of a folder: beside it, since it may be replaced or not exist."""
    resolved = location(folder).resolve()
    return resolved.with_name(f"{resolved.name}.lock")


@contextlib.contextmanager
def hold_lock(
    folder: str | Location,
    *,
    refusal: Callable[[LockHolder, Location], Exception],
    watched: bool = False,
) -> Iterator[None]:
    """Hold the lock of a folder.

    Parameters
    ----------
    refusal
        Makes the error to raise, from who holds the lock and the lock file, where another
        process, or another thread of this one, is writing the folder.
    watched
        True shows signs of life in object storage too, and waits to see whether a holder of
        another host shows any. For writers who notice that another has taken their place.
    """
    lock = lock_path(folder)
    beat = _BEAT_SECONDS
    if isinstance(lock, S3Path):
        beat = _OBJECT_BEAT_SECONDS if watched else 0.0
    job, restart = _slurm_job()
    me = LockHolder(
        host=socket.gethostname(),
        pid=os.getpid(),
        born=_process(os.getpid())[1],
        time=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        job=job,
        restart=restart,
        beat=beat,
    )
    with writing(lock):
        if isinstance(lock, S3Path):
            holder = _take_object(lock, me)
        else:
            lock.parent.mkdir(parents=True, exist_ok=True)
            holder = _take(lock, me)
    if holder is not None:
        raise refusal(holder, lock)
    try:
        with _signs_of_life(lock, me):
            yield
    finally:
        # One that is left where the server cannot be reached falls silent, if it is watched.
        with contextlib.suppress(*((StorageError,) if watched else ())):
            if _is_of(_read(lock), me):
                lock.unlink(missing_ok=True)


@contextlib.contextmanager
def _signs_of_life(lock: Location, me: LockHolder) -> Iterator[None]:
    """Touch the lock, or write it anew, again and again while it is held."""
    over = threading.Event()

    def show() -> None:
        while not over.wait(me.beat):
            with contextlib.suppress(OSError):
                os.utime(str(lock))

    def show_object() -> None:
        sign = 0
        while isinstance(lock, S3Path) and not over.wait(me.beat):
            sign += 1
            with contextlib.suppress(OSError, StclnGeoError):
                found = read_version(lock)
                if found is None or not _is_of(_parse(found[0]), me):
                    return  # another has taken our place
                replace_version(lock, _text(replace(me, sign=sign)), found[1])

    target = show_object if isinstance(lock, S3Path) else show
    thread = threading.Thread(target=target, name="lock", daemon=True)
    if me.beat:
        thread.start()
    try:
        yield
    finally:
        over.set()
        if me.beat:
            thread.join()


def _is_still(lock: Path, holder: LockHolder) -> bool:
    """Return True for a holder of another host whose signs of life have ended long ago."""
    if not holder.beat or holder.host == socket.gethostname():
        return False
    now = lock.with_name(f".{lock.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        now.touch()
        still = now.stat().st_mtime - lock.stat().st_mtime
    finally:
        now.unlink(missing_ok=True)
    return still > holder.beat * _STILL_BEATS


def _take(lock: Path, me: LockHolder) -> LockHolder | None:
    """Take the lock; return who holds it instead, or None where it is ours now."""
    while True:
        try:
            descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            holder = _take_over(lock, me)
            if holder is not None:
                return None if holder is me else holder
            continue
        try:
            os.write(descriptor, _text(me))
        finally:
            os.close(descriptor)
        return None


def _take_object(lock: S3Path, me: LockHolder) -> LockHolder | None:
    """Take a lock in object storage; return who holds it instead, or None where it is ours."""
    while True:
        found = read_version(lock)
        if found is None:
            create_file(lock, _text(me))
            # A request that was answered too late is sent twice: what lies there decides.
            found = read_version(lock)
            if found is None:
                continue
        content, version = found
        holder = _parse(content)
        if _is_of(holder, me):
            return None
        if holder is not None and not holder.is_dead:
            if not me.beat or not holder.beat or holder.host == me.host:
                return holder
            now = _watch(lock, holder, version)
            if now is None or now[1] != version:
                if now is not None and _is_of(_parse(now[0]), holder):
                    return holder
                continue
        replace_version(lock, _text(me), version)


def _watch(lock: S3Path, holder: LockHolder, version: str) -> tuple[bytes, str] | None:
    """Wait until a lock in object storage changes, or has been still for too long; return it."""
    patience = holder.beat * _SILENT_BEATS
    warnings.warn(
        f"{lock} is of process {holder.pid} on {holder.host}: waiting up to {patience:.0f} s to "
        "see whether it still writes there.",
        StclnGeoWarning,
        stacklevel=2,
    )
    deadline = time.monotonic() + patience
    while True:
        found = read_version(lock)
        if found is None or found[1] != version or time.monotonic() > deadline:
            return found
        time.sleep(holder.beat / 4)


def _take_over(lock: Path, me: LockHolder) -> LockHolder | None:
    """Return the holder where it lives, `me` where we took its place, None where it is gone."""
    import fcntl

    with contextlib.suppress(FileNotFoundError), _open_plain(lock) as file:
        # Two processes may find the same dead holder: one at a time looks and writes.
        fcntl.flock(file, fcntl.LOCK_EX)
        deadline = time.monotonic() + _UNWRITTEN_SECONDS
        while not (written := _parse(lock.read_bytes())) and time.monotonic() < deadline:
            time.sleep(0.02)
        if written is not None and not written.is_dead and not _is_still(lock, written):
            return written
        if os.fstat(file.fileno()).st_ino == lock.stat().st_ino:
            file.seek(0)
            file.truncate()
            file.write(_text(me))
            return me
    return None


def _is_of(found: LockHolder | None, holder: LockHolder) -> bool:
    """Return True where a lock is of a holder, whatever signs of life it has shown."""
    return found is not None and replace(found, sign=0) == replace(holder, sign=0)


def _open_plain(lock: Path) -> BinaryIO:
    """Open a lock to write it; raises OutputError where its name is a link to another file."""
    try:
        return os.fdopen(os.open(lock, os.O_RDWR | os.O_NOFOLLOW), "r+b")
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise OutputError(
            f"Cannot take the lock {lock}: it is a link to another file, which would be written "
            "over. A lock is a file of its own. Find out who made the link, and remove it."
        ) from error


def _text(holder: LockHolder) -> bytes:
    return json.dumps(asdict(holder)).encode()


def _read(lock: Location) -> LockHolder | None:
    try:
        return _parse(lock.read_bytes())
    except OSError:
        return None


def _parse(content: bytes) -> LockHolder | None:
    """Return the holder, or None where no writer wrote this: a part of a lock, or other values."""
    try:
        told = json.loads(content)
        # A later version may tell more, and its lock must not be taken for a part of one.
        holder = LockHolder(**{name: told[name] for name in _TOLD if name in told})
    except (ValueError, TypeError, RecursionError):
        return None
    words = (holder.host, holder.born, holder.time, holder.job)
    numbers = (holder.pid, holder.restart, holder.sign)
    plain = (
        all(type(word) is str for word in words)
        and all(type(number) is int for number in numbers)
        and type(holder.beat) in (int, float)
    )
    return holder if plain and 0 < holder.pid < _PROCESSES else None


def _process(pid: int) -> tuple[str, str]:
    """Return state and beginning of a process, in its system's words; empty where it tells none."""
    try:
        line = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return "", ""
    # The name, in parentheses, may hold blanks; the state follows it, the start 19 words later.
    words = line.rpartition(")")[2].split()
    return words[0], words[19]


def _slurm_job() -> tuple[str, int]:
    """Return the SLURM job that this process belongs to, and how often it was requeued."""
    number = os.environ.get("SLURM_JOB_ID")
    if not number:
        return "", 0
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    return f"{cluster}/{number}", int(os.environ.get("SLURM_RESTART_COUNT", "0"))
