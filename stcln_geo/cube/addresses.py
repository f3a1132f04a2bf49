"""Which addresses may be read, and which must never be written down.

Items come from servers that are not ours. An item could name a file of this machine, a service
that only this machine reaches, or a server that leads there; and an address could carry a
signature that has no place in a plan or a log. This module says no.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from ..catalog import Access, Catalog
from ..errors import UnsafeAddressError
from ..web import (
    WEB,
    host_of,
    is_private,
    is_secret,
    matches_host,
    private_host,
    redact,
    resolves_private,
)

__all__ = [
    "asset_access",
    "check_address",
    "check_asset",
    "check_reachable",
    "follow_redirects",
    "host_of",
    "is_private",
    "matches_host",
    "redact",
    "without_secrets",
]

_REMOTE = re.compile(r"(https?|s3|gs|az|abfs|abfss)://[^/?#\s]+")
_MAX_REDIRECTS = 5
_TIMEOUT_SECONDS = (10, 30)


def asset_access(catalog: Catalog, collection: str | None = None) -> Access:
    """Return what a collection's assets may reach: the catalog's host, or files if it is one."""
    access, endpoint = catalog.access_of(collection), catalog.endpoint or ""
    if "://" in endpoint:
        own = host_of(endpoint)
        hosts = tuple(dict.fromkeys((*access.allow_hosts, own)))
        return access.model_copy(update={"allow_hosts": hosts})
    return access.model_copy(update={"local_files": access.local_files or bool(endpoint)})


def check_address(href: str, access: Access, *, what: str) -> None:
    """Raise unless an address may be read, as far as its text tells.

    Parameters
    ----------
    what
        What has the address, for the message: "asset red of item S2A_1".

    Raises
    ------
    UnsafeAddressError
        If it is a local path or a form that GDAL alone understands, and the catalog is no file;
        or if it is on a private host that was not allowed.
    """
    if not _REMOTE.match(href):
        if access.local_files:
            return
        raise UnsafeAddressError(
            f"Cannot use {what}: its address {redact(href)!r} is no http(s), s3, gs or az address. "
            "Local paths, file:, /vsi and vrt:// are read only for catalogs that are files "
            "themselves, because another's server must not choose files of this machine. "
            "Download the catalog and give its folder, or ask its owner to correct the item."
        )
    host = host_of(href)
    if href.startswith(WEB) and is_private(host) and not matches_host(host, access.allow_hosts):
        raise private_host(host, what)


def check_reachable(href: str, access: Access, *, what: str) -> None:
    """Raise as ``check_address``, also where the host's name leads to a private number.

    For an address that is asked now: the name is looked up.
    """
    check_address(href, access, what=what)
    host = host_of(href)
    allowed = matches_host(host, access.allow_hosts)
    if href.startswith(WEB) and not allowed and resolves_private(host):
        raise private_host(host, what)


def follow_redirects(href: str, access: Access) -> str:
    """Ask where an address leads, check every step, and return the last one.

    GDAL cannot be told not to follow redirects, so they are followed here first. A host that
    the catalog's description calls direct is not asked. This stops servers that lead elsewhere; it
    cannot stop one that answers GDAL otherwise than it answers us.

    Raises
    ------
    UnsafeAddressError
        If a step, or the address its name resolves to, is private and not allowed.
    requests.RequestException
        If the server cannot be asked.
    """
    import requests

    if not href.startswith(WEB):
        return href
    for _ in range(_MAX_REDIRECTS):
        host = host_of(href)
        what = f"an asset on {host}"
        check_reachable(href, access, what=what)
        if matches_host(host, access.direct_hosts):
            return href
        with requests.get(
            href,
            headers={"Range": "bytes=0-0"},
            allow_redirects=False,
            timeout=_TIMEOUT_SECONDS,
            stream=True,
        ) as answer:
            if not answer.is_redirect:
                return href
            target = urljoin(href, answer.headers["Location"])
        if not target.startswith(WEB):
            raise UnsafeAddressError(
                f"Cannot read {what}: it redirects to {redact(target)!r}, and only http(s) "
                "addresses are followed. Ask the owner of the catalog to correct it."
            )
        href = target
    raise UnsafeAddressError(
        f"Cannot read an asset on {host_of(href)}: it redirects more than {_MAX_REDIRECTS} times. "
        "Ask the owner of the catalog to correct it."
    )


def without_secrets(item: Mapping[str, Any], access: Access) -> dict[str, Any]:
    """Return the item with no password, token or signature in any address.

    Where reading adds fresh signatures an old one is simply left out. Elsewhere the asset is marked
    with ``signed_by``, the name of what was taken away, so that it is refused when it is needed:
    what a build reads is written into its plan, and a signature there would be told to everyone.
    """
    plain: dict[str, Any] = _redacted(dict(item))
    for key, asset in (item.get("assets") or {}).items():
        href = str(asset.get("href", ""))
        secret = _secret_in(href)
        if secret and access.kind == "sas" and matches_host(host_of(href), access.sign_hosts):
            parts = urlsplit(href)
            host = parts.netloc.rpartition("@")[2]
            bare = parts._replace(netloc=host, query="", fragment="")
            plain["assets"][key]["href"] = urlunsplit(bare)
        elif secret:
            plain["assets"][key]["signed_by"] = secret
    return plain


def check_asset(asset: Mapping[str, Any], access: Access, *, what: str) -> str:
    """Return the address of an asset of `without_secrets`, if it may be read and kept.

    Raises
    ------
    UnsafeAddressError
        As `check_address`, or if its signature was taken away.
    """
    href = str(asset["href"])
    check_address(href, access, what=what)
    if asset.get("signed_by"):
        raise UnsafeAddressError(
            f"Cannot use {what}: its address carries a secret ({asset['signed_by']}), and a build "
            "writes addresses into its plan. Give an address without it: describe the catalog with "
            "'access: kind: sas' and a token_url, or put credentials into the environment as GDAL "
            "reads them."
        )
    return href


def _redacted(value: Any) -> Any:
    # JSON values: thousands of items have a million of them, so no slower test than their type.
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _redacted(entry) for key, entry in value.items()}
    return [_redacted(entry) for entry in value] if isinstance(value, list | tuple) else value


def _secret_in(href: str) -> str | None:
    """Return the name of the first secret in an address."""
    if not any(sign in href for sign in "@?#;&"):
        return None
    try:
        parts = urlsplit(href)
        if parts.password or parts.username:
            return "password"
    except ValueError:  # no address at all; it will not be read
        pass
    names = re.findall(r"[?&;#]([^=&;#]+)=", href)
    return next((unquote(name) for name in names if is_secret(name)), None)
