"""Fetch STAC documents, which are JSON objects, from files and from the web."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import CatalogError
from .web import guard_redirects, redact

if TYPE_CHECKING:
    from requests import Response

__all__ = ["read_json", "read_text"]

_MOST_BYTES = 512 * 2**20
"""Of a document from the web; the largest that providers serve have some tens of megabytes."""


def read_json(location: str, *, allow_hosts: Sequence[str] = ()) -> dict[str, Any]:
    """Return the JSON object at a path or an http address.

    Parameters
    ----------
    allow_hosts
        Private hosts that an address may redirect to.

    Raises
    ------
    CatalogError
        If it cannot be fetched, is larger than 512 MiB or is not a JSON object.
    UnsafeAddressError
        If it redirects to another private host.
    """
    if location.startswith(("http://", "https://")):
        text = _fetch(location, allow_hosts)
    elif "://" in location:
        raise CatalogError(
            f"Cannot read {redact(location)}: catalogs are read from files and from http(s) "
            "addresses. Copy it to a folder, or give its https address."
        )
    else:
        text = read_text(Path(location))
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CatalogError(
            f"Cannot read {redact(location)} as JSON: {error}. A STAC document is a JSON object. "
            "Check that the file is complete."
        ) from error
    if not isinstance(content, dict):
        raise CatalogError(
            f"Cannot use {redact(location)}: it holds a {type(content).__name__}, but a STAC "
            "document is a JSON object. Give the path of a catalog.json."
        )
    return content


def read_text(path: Path) -> str:
    """Return the text of a file of a catalog; raises ``CatalogError`` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(
            f"Cannot read {path}: {error}. Check the path and that you may read it."
        ) from error


def _fetch(address: str, allow_hosts: Sequence[str]) -> str:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util.retry import Retry

    statuses = (429, 500, 502, 503, 504)
    retry = Retry(total=4, connect=1, backoff_factor=0.5, status_forcelist=statuses)
    with requests.Session() as session:
        guard_redirects(session, allow_hosts, what=redact(address))
        session.mount("http://", HTTPAdapter(max_retries=retry))
        session.mount("https://", HTTPAdapter(max_retries=retry))
        try:
            with session.get(address, timeout=(10, 60), stream=True) as answer:
                answer.raise_for_status()
                return _text_of(answer, address)
        except requests.RequestException as error:
            raise CatalogError(
                f"Cannot fetch {redact(address)}: {redact(str(error))}. Check the address and the "
                "connection."
            ) from error


def _text_of(answer: Response, address: str) -> str:
    """Read an answer, which memory must hold; a server may send without end."""
    content = bytearray()
    for piece in answer.iter_content(2**16):
        content += piece
        if len(content) > _MOST_BYTES:
            raise CatalogError(
                f"Cannot read {redact(address)}: it has more than {_MOST_BYTES // 2**20} MiB, and "
                "no STAC document is so large. Check the address."
            )
    return content.decode("utf-8-sig", errors="replace")
