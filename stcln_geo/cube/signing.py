"""Short-lived tokens: fetched when an asset is read, kept while they are good, never written."""

from __future__ import annotations

import datetime
import threading
import time
from urllib.parse import urlsplit

from ..catalog import Access
from ..web import guard_redirects, host_of, is_private, matches_host

__all__ = ["Tokens"]

_MARGIN_SECONDS = 120.0
"""No read begins with a token this close to its end, or in the last half of a shorter life."""

_TIMEOUT_SECONDS = (10, 30)


class Tokens:
    """Fetches and keeps the tokens of one catalog; may be used by several threads."""

    def __init__(self, access: Access) -> None:
        """Prepare; nothing is fetched yet."""
        self._access = access
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[str, float]] = {}

    def sign(self, href: str) -> str:
        """Return the address with a token that is valid for some time, if its host takes one."""
        url = self._token_url(href)
        if url is None:
            return href
        with self._lock:
            token, best_before = self._kept.get(url, ("", 0.0))
            if time.time() >= best_before:
                token, best_before = _fetch(url, self._access)
                self._kept[url] = (token, best_before)
        return f"{href}?{token}"

    def forget(self, href: str) -> bool:
        """Drop the token of an address, after it was refused; return True if it had one."""
        url = self._token_url(href)
        if url is None:
            return False
        with self._lock:
            self._kept.pop(url, None)
        return True

    def _token_url(self, href: str) -> str | None:
        if self._access.kind != "sas" or self._access.token_url is None:
            return None
        parts, host = urlsplit(href), host_of(href)
        # A token must not travel in the open, except within this machine.
        safe = parts.scheme == "https" or (parts.scheme == "http" and is_private(host))
        if not safe or parts.query or not matches_host(host, self._access.sign_hosts):
            return None
        container = parts.path.lstrip("/").split("/")[0]
        return self._access.token_url.format(account=host.split(".")[0], container=container)


def _fetch(url: str, access: Access) -> tuple[str, float]:
    """Return a token and the time (seconds since 1970) until which it serves for new reads."""
    import requests

    with requests.Session() as session:
        guard_redirects(session, (host_of(url), *access.allow_hosts), what="a token")
        answer = session.get(url, timeout=_TIMEOUT_SECONDS)
        answer.raise_for_status()
        content = answer.json()
    expiry = datetime.datetime.fromisoformat(content["msft:expiry"].replace("Z", "+00:00"))
    left = expiry.timestamp() - time.time()
    return str(content["token"]), expiry.timestamp() - min(_MARGIN_SECONDS, left / 2)
