"""Be polite to the hosts that pixels come from, whatever the number of threads and readers.

Every host has one gate per process: it lets so many reads pass at a time, and none before the
moment that the host itself named in ``Retry-After``.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import threading
import time
from collections.abc import Iterator

from .addresses import host_of

__all__ = ["asked_pause", "hold_back", "host_gate"]

DEFAULT_CONNECTIONS = 64
LONGEST_PAUSE_SECONDS = 120.0
"""A host that asks for more is asked again after this all the same."""

_PROBE_TIMEOUT_SECONDS = (5, 10)


class _Gate:
    """The reads of one host: how many run, how many may, and since when again."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._open_again = 0.0

    def enter(self, limit: int) -> None:
        with self._changed:
            while True:
                pause = self._open_again - time.monotonic()
                if pause <= 0 and self._running < limit:
                    self._running += 1
                    return
                self._changed.wait(pause if pause > 0 else None)

    def leave(self) -> None:
        with self._changed:
            self._running -= 1
            self._changed.notify_all()

    def close_for(self, seconds: float) -> None:
        with self._changed:
            self._open_again = max(self._open_again, time.monotonic() + seconds)


_gates: dict[str, _Gate] = {}
_lock = threading.Lock()


def _gate_of(href: str) -> _Gate:
    with _lock:
        return _gates.setdefault(host_of(href), _Gate())


@contextlib.contextmanager
def host_gate(href: str, limit: int | None) -> Iterator[None]:
    """Hold one of the places at an address's host; files of this machine need none.

    Parameters
    ----------
    limit
        Places of that host in this process, over all threads and readers.
    """
    if "://" not in href:
        yield
        return
    gate = _gate_of(href)
    gate.enter(limit or DEFAULT_CONNECTIONS)
    try:
        yield
    finally:
        gate.leave()


def hold_back(href: str, seconds: float) -> None:
    """Let no read of that host begin for some seconds."""
    _gate_of(href).close_for(min(seconds, LONGEST_PAUSE_SECONDS))


def asked_pause(href: str) -> float | None:
    """Ask a busy http host how long it wants to be left alone (seconds), if it says so.

    GDAL tells that it was refused but not what the answer said, so one byte is asked for again.
    """
    import requests

    if not href.startswith(("http://", "https://")):
        return None
    try:
        with requests.get(
            href,
            headers={"Range": "bytes=0-0"},
            allow_redirects=False,
            timeout=_PROBE_TIMEOUT_SECONDS,
            stream=True,
        ) as answer:
            if answer.status_code not in {429, 503}:
                return None
            return _seconds(answer.headers.get("Retry-After"))
    except requests.RequestException:
        return None


def _seconds(text: str | None) -> float | None:
    """Read ``Retry-After``: a number of seconds, or a date."""
    if text is None:
        return None
    if text.strip().isdigit():
        return float(text)
    try:
        moment = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    return max((moment - datetime.datetime.now(datetime.UTC)).total_seconds(), 0.0)
