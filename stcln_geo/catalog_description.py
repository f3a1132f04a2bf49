"""What the description of a STAC provider says: places, bands, offsets, access, secrets refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Literal
from urllib.parse import urlparse

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import CatalogError
from .web import redact

__all__ = [
    "Access",
    "BandAsset",
    "BaselineRule",
    "Catalog",
    "CollectionProfile",
    "ItemProperties",
    "OffsetRule",
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
_READING_OPTION = re.compile(
    r"(AWS|AZURE|GS|OSS|SWIFT|GDAL_HTTPS?|CPL_VSIL|VSI|GTIFF|OPJ|JP2[A-Z0-9]*)_\w+"
    r"|GDAL_(CACHEMAX|DISABLE_READDIR_ON_OPEN|INGESTED_BYTES_AT_OPEN|NUM_THREADS)",
    re.IGNORECASE,
)
"""How files are reached and read. GDAL has other options that run code (GDAL_VRT_ENABLE_PYTHON),
load libraries or write files, and descriptions of catalogs come with the cubes of others."""
_FILE_OPTION = re.compile(r"COOKIEJAR|HEADER_FILE|CONFIG_FILE", re.IGNORECASE)
"""Of these, those that write a file, send one, or name a program to run."""
_PASSWORD = re.compile(r"(^|//)[^/\s:]*:[^/\s]+@")
"""User and password before a host, as a proxy's address may have them."""


_POLARISATIONS = {"hh", "hv", "vh", "vv"}


def _refuse_secrets(addresses: Iterable[str]) -> None:
    secret = [redact(address) for address in addresses if redact(address) != address]
    if secret:
        raise ValueError(
            f"{', '.join(secret)} holds a secret and would be stored with every cube; give the "
            "address without it"
        )


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
    """GDAL options set while reading: of reaching and reading files alone, as they are obeyed
    wherever the cube goes; no secrets, as they are kept in its plan."""
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
        other = [
            name
            for name in options
            if not _READING_OPTION.fullmatch(name) or _FILE_OPTION.search(name)
        ]
        if other:
            raise ValueError(
                f"{', '.join(other)} cannot be set by a catalog: its options may say how files are "
                "reached and read, and not run code or write files; set it as an environment "
                "variable if you need it"
            )
        return options

    @field_validator("token_url")
    @classmethod
    def _tells_no_secret(cls, address: str | None) -> str | None:
        if address is not None:
            _refuse_secrets([address])
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
        _refuse_secrets(addresses.values())
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
