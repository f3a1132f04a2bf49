"""Walk a static STAC catalog, on disk or on the web."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import unquote, urljoin, urlparse

from ..catalog import Catalog
from ..documents import read_json
from ..errors import CatalogError
from .addresses import asset_access, check_reachable, redact

__all__ = ["walk_static"]

_READERS = 8
_DEPTH = 24
"""Catalogs below one another; deeper ones are links that go round."""


def walk_static(catalog: Catalog) -> Iterator[dict[str, Any]]:
    """Yield the items below a catalog, collections in the order of their links.

    Raises
    ------
    CatalogError
        If a document cannot be read, or catalogs lie below catalogs without end.
    UnsafeAddressError
        If a link leads where the catalog may not lead.
    """
    location = str(catalog.endpoint)
    access = asset_access(catalog)
    read = functools.partial(read_json, allow_hosts=access.allow_hosts)

    def linked(base: str, link: Mapping[str, Any]) -> str:
        address = _join(base, str(link["href"]))
        check_reachable(address, access, what=f"a link of {redact(base)}")
        return address

    waiting: list[tuple[str, str | None, int]] = [(location, None, 0)]
    visited: set[str] = set()
    with contextlib.ExitStack() as stack:
        # Threads help where the catalog is far away; on disk they would only take turns.
        fetch: Callable[..., Iterator[dict[str, Any]]] = map
        if "://" in location:
            fetch = stack.enter_context(ThreadPoolExecutor(_READERS)).map
        while waiting:
            here, collection, depth = waiting.pop(0)
            if here in visited:
                continue
            visited.add(here)
            if depth > _DEPTH:
                raise CatalogError(
                    f"Cannot read catalog '{catalog.name}': {redact(here)} lies more than {_DEPTH} "
                    "catalogs below its root, so its links may have no end. Give the address of "
                    "the catalog or collection that you need."
                )
            document = read(here)
            if document.get("type") == "Collection":
                collection = str(document.get("id"))
            children: list[str] = []
            for link in _links(document):
                if link.get("rel") == "child":
                    waiting.append((linked(here, link), collection, depth + 1))
                elif link.get("rel") == "item":
                    children.append(linked(here, link))
            for address, item in zip(children, fetch(read, children), strict=True):
                yield _absolute(item, address, collection)


def _links(document: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield what is a link; a page of somebody's may hold anything."""
    links = document.get("links")
    for link in links if isinstance(links, list) else ():
        if isinstance(link, Mapping) and isinstance(link.get("href"), str):
            yield link


def _absolute(item: dict[str, Any], address: str, collection: str | None) -> dict[str, Any]:
    """Return the item with absolute addresses and without links that only the catalog needs."""
    assets = item.get("assets") or {}
    if isinstance(assets, Mapping):
        assets = {
            key: {**asset, "href": _join(address, str(asset.get("href", "")))}
            if isinstance(asset, Mapping)
            else asset
            for key, asset in assets.items()
        }
    links = [{"rel": "self", "href": address, "type": "application/geo+json"}]
    return {
        **item,
        "collection": item.get("collection") or collection,
        "assets": assets,
        "links": links,
    }


def _join(base: str, href: str) -> str:
    if href.startswith("file://"):
        return unquote(urlparse(href).path)
    if re.match(r"[a-z][a-z0-9+.-]*://", href) or href.startswith("/vsi"):
        return href
    if "://" in base:
        return urljoin(base, href)
    return os.path.normpath(os.path.join(os.path.dirname(base), href))
