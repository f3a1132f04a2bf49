"""Addresses on the web: private hosts, secrets in texts, and redirects that lead elsewhere."""

from __future__ import annotations

import functools
import ipaddress
import re
import socket
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlsplit

from .errors import UnsafeAddressError

if TYPE_CHECKING:
    from requests import Session

__all__ = [
    "WEB",
    "guard_redirects",
    "host_of",
    "is_private",
    "is_secret",
    "matches_host",
    "private_host",
    "redact",
    "resolves_private",
]

WEB = ("http://", "https://")
_PRIVATE_NAMES = re.compile(r"(.*\.)?(localhost|local|internal|intranet|lan|home\.arpa)\.?")
SECRET_PARAMETER = re.compile(
    r"sig|se|sp|sv|st|skoid|sktid|ske|sks|sas|key|pwd|jwt|hmac|expires|policy|key-pair-id"
    r"|x-(amz|goog|oss|cos|obs)-.*|q-(ak|sign.*)|hdn(ts|ea)"
    r"|.*(token|secret|signature|passw|credential|bearer|googleaccessid).*"
    r"|.*(api|access|subscription|account|private)[-_.]?key.*|(.*[-_.])?auth(orization|[-_.]?key)?",
    re.IGNORECASE,
)
"""Names of parameters in addresses that must not be written down."""


def guard_redirects(session: Session, allowed: Sequence[str], *, what: str) -> None:
    """Let a session follow no redirect to a private host that is not among the allowed ones.

    Parameters
    ----------
    allowed
        Hosts that may be private; ``*`` stands for anything.
    what
        What is fetched, for the message: "a page of catalog 'x'".

    Raises
    ------
    UnsafeAddressError
        Later, by the session, at such a redirect.
    """
    inherited = session.get_redirect_target

    def checked(response: Any) -> str | None:
        target: str | None = inherited(response)
        if target is None:
            return None
        address = urljoin(str(response.url), target)
        if not address.startswith(WEB):
            raise UnsafeAddressError(
                f"Cannot read {what}: it redirects to {redact(address)!r}, and only http(s) "
                "addresses are followed. Ask the owner of the catalog to correct it."
            )
        host = host_of(address)
        private = is_private(host) or resolves_private(host)
        if private and not matches_host(host, tuple(allowed)):
            raise UnsafeAddressError(
                f"Cannot read {what}: it redirects to the private host {host!r}. A catalog may "
                "lead to this machine or its own network only where it is on that host itself. "
                f"If you trust the catalog, allow it with --allow-host {host}."
            )
        return target

    session.get_redirect_target = checked  # type: ignore[method-assign,assignment]


def redact(text: str) -> str:
    """Return a text with passwords, tokens and signatures in addresses replaced by dots."""
    if "@" in text:
        # A password may itself hold an @, unquoted.
        text = re.sub(r"(\w://)[^/?#\s]+@", r"\1...@", text)
    if "=" not in text:
        return text
    return re.sub(
        r"([?&;#])([\w.~%+-]+)=([^&;#\s'\")]+)",
        lambda match: f"{match[1]}{match[2]}=..." if is_secret(match[2]) else match[0],
        text,
    )


def is_secret(parameter: str) -> bool:
    """Return True for the name of a query parameter, quoted or not, that holds a secret."""
    return SECRET_PARAMETER.fullmatch(unquote(parameter)) is not None


def host_of(href: str) -> str:
    """Return the host of an address, in lower case and without port, or an empty text."""
    try:
        return (urlsplit(href).hostname or "").rstrip(".").lower()
    except ValueError:
        return ""


def matches_host(host: str, patterns: tuple[str, ...]) -> bool:
    """Return True where a host is one of the patterns (``*`` stands for anything)."""
    return any(fnmatchcase(host, pattern.lower()) for pattern in patterns)


@functools.lru_cache(maxsize=1024)
def is_private(host: str) -> bool:
    """Return True where a host's name or number says that it is not on the public internet."""
    try:
        return _is_private_number(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    # Old spellings of IPv4 (0x7f.1, 2130706433, 127.1) that resolvers still take.
    if re.fullmatch(r"(0x[0-9a-f]*|\d+)(\.(0x[0-9a-f]*|\d+)){0,3}", host):
        try:
            return _is_private_number(ipaddress.ip_address(socket.inet_aton(host)))
        except OSError:
            return True
    return "." not in host or _PRIVATE_NAMES.fullmatch(host) is not None


def _is_private_number(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        # A dual-stack system reaches ::ffff:127.0.0.1 as 127.0.0.1.
        inner = address.ipv4_mapped or address.sixtofour
        if inner is not None:
            return _is_private_number(inner)
    return not address.is_global or address.is_multicast


@functools.lru_cache(maxsize=256)
def resolves_private(host: str) -> bool:
    """Return True where a name leads to a private number; False where it cannot be resolved."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        return False
    return any(is_private(str(entry[4][0]).split("%")[0]) for entry in found)


def private_host(host: str, what: str) -> UnsafeAddressError:
    """Return the error for an asset on a private host."""
    return UnsafeAddressError(
        f"Cannot use {what}: it is on the private host {host!r}. An asset may reach this machine "
        "or its own network only where the catalog itself is on that host. If you trust the "
        f"catalog, allow it with --allow-host {host}."
    )
