"""Descriptions of STAC providers: where they are, how they name bands, what their numbers mean.

A provider is a YAML file (the shipped ones lie in `stcln_geo.catalogs`; users write their own in
the same form), or a static STAC catalog, whose description is found out from its items.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

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

_REFUSED = {
    "catalogue.dataspace.copernicus.eu": (
        "its search stops at 10 000 items and repeats some. Use --catalog cdse"
    ),
}
"""Hosts whose search is known to be wrong, with the reason and the remedy."""


_SECRET_OPTION = re.compile(
    r"SECRET|TOKEN|PASSW|USERPWD|CREDENTIALS|HEADERS|ACCESS_KEY|PRIVATE_KEY|SWIFT_KEY|SAS|BEARER"
    r"|COOKIE$|CONNECTION_STRING",
    re.IGNORECASE,
)
_PASSWORD = re.compile(r"(^|//)[^/\s:]*:[^/\s]+@")
"""User and password before a host, as a proxy's address may have them."""


_POLARISATIONS = {"hh", "hv", "vh", "vv"}


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BandAsset(_Model):
    """Which asset of an item holds a band."""

    asset: str
    resolution: float = Field(gt=0)
    """Pixel size (metres)."""


class BaselineRule(_Model):
    """An offset that pixels carry from a processing baseline on."""

    since: str = Field(pattern=r"^\d{2}\.\d{2}$")
    offset: float
    """Reflectance to add."""


class OffsetRule(_Model):
    """How to know the offset (reflectance to add) of an item's pixels."""

    applied_property: str | None = None
    """Item property that is true where the pixels already have the offset removed."""
    declared: bool = False
    """True where the offset that reflectance assets declare (raster extension) is right."""
    baseline: BaselineRule | None = None
    """Used where nothing is declared."""


class ItemProperties(_Model):
    """Names of item properties, in order of preference."""

    baseline: tuple[str, ...] = ()
    tile: tuple[str, ...] = ()
    orbit: tuple[str, ...] = ()
    product: tuple[str, ...] = ()
    datatake: tuple[str, ...] = ()
    datastrip: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()


class Access(_Model):
    """What reading pixels needs."""

    kind: Literal["open", "sas", "s3"] = "open"
    token_url: str | None = None
    """Where a token is fetched, with {account} and {container} (kind sas)."""
    max_connections: int | None = Field(default=None, ge=1)
    """Most simultaneous reads of one process from one host."""
    gdal: dict[str, str] = Field(default_factory=dict)
    """GDAL options set while reading; no secrets, as they are kept in the cube's plan."""
    sign_hosts: tuple[str, ...] = ("*.blob.core.windows.net",)
    """Hosts that tokens are sent to, and no others (kind sas)."""
    direct_hosts: tuple[str, ...] = ()
    """Hosts known not to redirect; others are asked where an asset leads before it is read."""
    allow_hosts: tuple[str, ...] = ()
    """Private hosts (this machine, its network) that assets may be on, beside the catalog's own."""
    local_files: bool = False
    """True where assets may be local paths: a static catalog on disk sets it."""

    @field_validator("gdal")
    @classmethod
    def _no_secrets(cls, options: dict[str, str]) -> dict[str, str]:
        secret = [
            name
            for name, value in options.items()
            if _SECRET_OPTION.search(name) or _PASSWORD.search(value) or redact(value) != value
        ]
        if secret:
            raise ValueError(
                f"{', '.join(secret)} is a secret and would be stored with every cube; "
                "set it as an environment variable"
            )
        return options

    @field_validator("token_url")
    @classmethod
    def _tells_no_secret(cls, address: str | None) -> str | None:
        if address is not None and redact(address) != address:
            raise ValueError(
                f"{redact(address)} holds a secret and would be stored with every cube; give the "
                "address without it"
            )
        return address

    @model_validator(mode="after")
    def _needs_token_url(self) -> Access:
        if self.kind == "sas" and not self.token_url:
            raise ValueError("access of kind 'sas' needs token_url")
        return self


class CollectionProfile(_Model):
    """A collection: its bands, their radiometry, and where items say what."""

    title: str = ""
    measures: Literal["reflectance", "backscatter"] = "reflectance"
    """Backscatter is a radar's: described and probed, but no cube holds it yet."""
    level: Literal["surface", "top-of-atmosphere"] = "surface"
    """Whether reflectance is that of the ground, or still holds the atmosphere's."""
    bands: dict[str, BandAsset] = Field(default_factory=dict)
    """Common band name (or polarisation) -> asset; empty: found out from the items."""
    scl: BandAsset | None = None
    nodata: int = 0
    scale: float = Field(default=1e-4, gt=0)
    """Reflectance per source number, where an asset does not declare it."""
    offset: OffsetRule = OffsetRule()
    properties: ItemProperties = ItemProperties()
    access: Access | None = None
    """In place of the catalog's, where this collection is read otherwise."""
    replace_href: dict[str, str] = Field(default_factory=dict)
    """Beginnings of addresses that some items have wrong -> the right ones."""

    @field_validator("replace_href")
    @classmethod
    def _tell_no_secret(cls, addresses: dict[str, str]) -> dict[str, str]:
        secret = [redact(right) for right in addresses.values() if redact(right) != right]
        if secret:
            raise ValueError(
                f"{', '.join(secret)} holds a secret and would be stored with every cube; give "
                "the address without it"
            )
        return addresses

    @model_validator(mode="after")
    def _bands_fit_what_is_measured(self) -> CollectionProfile:
        radar = set(self.bands) & _POLARISATIONS
        if self.measures == "reflectance" and radar:
            raise ValueError(
                f"bands {', '.join(sorted(radar))} are a radar's; such a collection needs "
                "'measures: backscatter'"
            )
        if self.measures == "backscatter" and set(self.bands) - _POLARISATIONS:
            raise ValueError(
                f"bands {', '.join(sorted(set(self.bands) - _POLARISATIONS))} are no polarisation; "
                f"backscatter has {', '.join(sorted(_POLARISATIONS))}"
            )
        if self.measures == "backscatter" and self.scl is not None:
            raise ValueError("scl is for optical scenes; leave it out of backscatter")
        return self


class Catalog(_Model):
    """A STAC provider."""

    name: str
    title: str = ""
    kind: Literal["api", "static"]
    endpoint: str | None = None
    """Address of the STAC API, or path or address of the static catalog."""
    page_limit: int = Field(default=100, ge=1)
    """Items asked for per page."""
    filters: Literal["query", "cql2-json"] | None = None
    """The filter language that the server is known to honour; None: the client selects alone."""
    access: Access = Access()
    collections: dict[str, CollectionProfile] = Field(default_factory=dict)
    """By id; empty: `defaults` serve for every collection."""
    defaults: CollectionProfile = CollectionProfile()
    preferred: str | None = None
    """Collection to use where none is named."""

    @field_validator("endpoint")
    @classmethod
    def _not_refused(cls, endpoint: str | None) -> str | None:
        host = urlparse(endpoint or "").hostname
        if host in _REFUSED:
            raise ValueError(f"{redact(endpoint or '')} cannot be used: {_REFUSED[host]}")
        return endpoint

    @model_validator(mode="after")
    def _needs_endpoint(self) -> Catalog:
        if self.kind == "api" and not self.endpoint:
            raise ValueError("a catalog of kind 'api' needs an endpoint")
        return self

    @model_validator(mode="after")
    def _prefers_its_own(self) -> Catalog:
        if self.preferred is not None and self.preferred not in self.collections:
            raise ValueError(
                f"preferred is {self.preferred!r}, but the collections are "
                f"{', '.join(self.collections) or 'not listed'}"
            )
        return self

    def profile(self, collection: str | None) -> CollectionProfile:
        """Return the description of a collection.

        Raises
        ------
        CatalogError
            If this catalog lists its collections and the one asked for is not among them.
        """
        if not self.collections:
            return self.defaults
        if collection not in self.collections:
            raise CatalogError(
                f"Cannot use the collection {collection!r} of catalog '{self.name}': it describes "
                f"{', '.join(self.collections)}. Give one of them with --collection, or describe "
                "the collection in a YAML file of your own (stcln-geo catalogs show "
                f"{self.name} prints one to start from)."
            )
        return self.collections[collection]

    def allowing(self, hosts: Sequence[str]) -> Catalog:
        """Return the catalog with more private hosts that its assets may be on."""
        if not hosts:
            return self

        def more(access: Access) -> Access:
            allowed = dict.fromkeys((*access.allow_hosts, *(host.lower() for host in hosts)))
            return access.model_copy(update={"allow_hosts": tuple(allowed)})

        collections = {
            name: profile.model_copy(update={"access": more(profile.access)})
            if profile.access is not None
            else profile
            for name, profile in self.collections.items()
        }
        return self.model_copy(update={"access": more(self.access), "collections": collections})

    def access_of(self, collection: str | None) -> Access:
        """Return what reading a collection's pixels needs; of no one in particular for None."""
        profile = self.collections.get(collection or "", self.defaults)
        return profile.access or self.access

    def default_collection(self) -> str | None:
        """Return the collection to use where none is named, or None where the items decide.

        Raises
        ------
        CatalogError
            If there are several.
        """
        if self.preferred is not None:
            return self.preferred
        if len(self.collections) > 1:
            raise CatalogError(
                f"Cannot choose a collection of catalog '{self.name}': it has "
                f"{', '.join(self.collections)}. Give one with --collection."
            )
        return next(iter(self.collections), None)


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
