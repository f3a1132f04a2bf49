"""Descriptions of STAC providers: where they are, how they name bands, what their numbers mean.

A provider is a YAML file (the shipped ones lie in `stcln_geo.catalogs`; users write their own in
the same form), or a static STAC catalog, whose description is found out from its items.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from pydantic import ValidationError

from .catalog_description import (
    Access,
    BandAsset,
    BaselineRule,
    Catalog,
    CollectionProfile,
    ItemProperties,
    OffsetRule,
)
from .documents import read_json, read_text
from .errors import CatalogError
from .web import host_of, redact

__all__ = [
    "Access",
    "BandAsset",
    "BaselineRule",
    "Catalog",
    "CollectionProfile",
    "ItemProperties",
    "OffsetRule",
    "load_catalog",
    "shipped_catalogs",
]


def shipped_catalogs() -> dict[str, Catalog]:
    """Return the catalogs that come with the package, by name."""
    folder = resources.files("stcln_geo.catalogs")
    found = {}
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            found[file.name.removesuffix(".yaml")] = _parse_yaml(
                file.read_text(encoding="utf-8"), file.name
            )
    return found


def load_catalog(source: str | Path, *, allow_hosts: Sequence[str] = ()) -> Catalog:
    """Return the catalog that a name, a file, a folder or an address stands for.

    Parameters
    ----------
    source
        A shipped name (`shipped_catalogs`), a YAML file, a static ``catalog.json``, a folder
        that holds one, or the address of a static catalog or of a STAC API.
    allow_hosts
        Private hosts that the catalog may lead to, and its assets may be on.

    Raises
    ------
    CatalogError
        If there is no such catalog, or its description is wrong.
    UnsafeAddressError
        If its address redirects to a private host that is not allowed.
    """
    return _load(str(source), allow_hosts).allowing(allow_hosts)


def _load(text: str, allow_hosts: Sequence[str]) -> Catalog:
    if text.startswith(("http://", "https://")):
        return _from_address(text, allow_hosts)
    path = Path(text).expanduser()
    shipped = shipped_catalogs()
    if text in shipped and not path.is_dir():
        return _shipped(shipped[text])
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise CatalogError(
            f"Cannot find the catalog {redact(text)!r}: it is neither a file or folder nor one of "
            f"{', '.join(shipped)}. Give one of these names, a YAML file, a folder with "
            "catalog.json, or an address that starts with https://."
        )
    if path.suffix.lower() in {".yaml", ".yml"}:
        return _with_place(_parse_yaml(read_text(path), str(path)), path)
    return _static(str(path.resolve()), read_json(str(path)))


def _shipped(catalog: Catalog) -> Catalog:
    if catalog.kind == "static" and not catalog.endpoint:
        raise CatalogError(
            f"Cannot search the catalog '{catalog.name}' by its name alone: it stands for any "
            "folder with a catalog.json. Give that folder instead, as in --catalog my_scenes/."
        )
    return catalog


def _with_place(catalog: Catalog, described: Path) -> Catalog:
    """Return the catalog of a YAML file, of which a local path counts from the file's folder."""
    if catalog.kind != "static" or "://" in (catalog.endpoint or ""):
        return catalog
    if not catalog.endpoint:
        raise CatalogError(
            f"Cannot use the catalog {described}: it is of kind static and names no endpoint, the "
            "path or address of its catalog.json. Add it."
        )
    place = described.resolve().parent / Path(catalog.endpoint).expanduser()
    if place.is_dir():
        place = _document_of(place)
    return catalog.model_copy(update={"endpoint": str(place)})


def _from_folder(folder: Path) -> Catalog:
    path = str(_document_of(folder))
    return _static(path, read_json(path))


def _document_of(folder: Path) -> Path:
    for name in ("catalog.json", "collection.json"):
        if (folder / name).is_file():
            return (folder / name).resolve()
    raise CatalogError(
        f"Cannot use the folder {folder} as a catalog: it holds no catalog.json. Give a folder "
        "with a static STAC catalog, or the file itself."
    )


def _from_address(address: str, allow_hosts: Sequence[str]) -> Catalog:
    document = read_json(address, allow_hosts=(host_of(address), *allow_hosts))
    if "conformsTo" not in document:
        return _static(address, document)
    static = shipped_catalogs()["static"]
    return _validated(
        {
            "name": str(document.get("id", urlparse(address).hostname)),
            "title": str(document.get("title", "")),
            "kind": "api",
            "endpoint": address,
            "filters": _filters_of(document),
            "defaults": static.defaults.model_dump(),
        },
        address,
    )


def _filters_of(landing: Mapping[str, Any]) -> str | None:
    """Return the filter language that a STAC API says it speaks."""
    classes = [str(entry) for entry in landing.get("conformsTo") or ()]
    if any(re.search(r"item-search#filter$", one) for one in classes) and any(
        one.endswith("/cql2-json") for one in classes
    ):
        return "cql2-json"
    return "query" if any(one.endswith("item-search#query") for one in classes) else None


def _static(location: str, document: Mapping[str, Any]) -> Catalog:
    if document.get("type") not in {"Catalog", "Collection"}:
        raise CatalogError(
            f"Cannot use {redact(location)} as a catalog: its type is {document.get('type')!r}, "
            "but a static STAC catalog is a Catalog or a Collection. Give the catalog.json above "
            "it."
        )
    template = shipped_catalogs()["static"]
    return template.model_copy(
        update={
            "name": str(document.get("id", "static")),
            "title": str(document.get("title") or document.get("description", "")),
            "endpoint": location,
        }
    )


def _parse_yaml(text: str, source: str) -> Catalog:
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise CatalogError(
            f"Cannot read the catalog {source} as YAML: {error}. Correct the file."
        ) from error
    if not isinstance(content, dict):
        raise CatalogError(
            f"Cannot use the catalog {source}: it must be a mapping with name, kind, endpoint and "
            "collections. 'stcln-geo catalogs show earth-search' prints an example."
        )
    return _validated(content, source)


def _validated(content: Mapping[str, Any], source: str) -> Catalog:
    try:
        return Catalog.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in entry['loc']) or 'catalog'}: {entry['msg']}"
            for entry in error.errors()
        )
        raise CatalogError(
            f"Cannot use the catalog {redact(source)}: {problems}. Correct these entries; "
            "'stcln-geo catalogs show earth-search' prints an example."
        ) from error
