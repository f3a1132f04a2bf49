"""Compare a live STAC provider with its description: one item, and one read of its pixels."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..catalog import BandAsset, Catalog, CollectionProfile
from ..errors import SearchError, StclnGeoError
from ..grid import Window, bounds_window, geobox_from_window
from ..region import Region
from .addresses import asset_access, check_asset, without_secrets
from .granules import SCL, Granule, band_assets, describe_item
from .radiometry import declared_radiometry, resolve_offset
from .read import AssetReader, AssetReadError
from .search import search_items
from .stac_api import search_api
from .time_range import TimeRange

__all__ = ["Finding", "probe_catalog"]

_WINDOW = 64
_ITEMS = 20
"""Items that are looked through for one with pixels."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was compared."""

    collection: str
    what: str
    described: str
    found: str
    agrees: bool


def probe_catalog(
    catalog: Catalog,
    collection: str | None = None,
    region: Region | None = None,
    time_range: TimeRange | None = None,
) -> list[Finding]:
    """Compare a catalog's description with one of its items per collection.

    Parameters
    ----------
    collection
        None takes every collection that is described.
    region, time_range
        Where and when to look for the item; by default anywhere, at any time.

    Returns
    -------
    What was compared; nothing after a search that failed or found nothing.
    """
    names: list[str | None] = [collection]
    if collection is None and catalog.collections:
        names = list(catalog.collections)
    findings: list[Finding] = []
    for name in names:
        findings += _probe_collection(catalog, name, region, time_range or TimeRange())
    return findings


def _probe_collection(
    catalog: Catalog, collection: str | None, region: Region | None, times: TimeRange
) -> list[Finding]:
    profile = catalog.profile(collection)
    try:
        item = _one_item(catalog, collection, region, times)
    except StclnGeoError as error:
        return [_finding(collection, "search", "an item", str(error), agrees=False)]
    if item is None:
        return [_finding(collection, "search", "an item", "none", agrees=False)]
    findings = [_finding(collection, "search", "an item", str(item.get("id")), agrees=True)]
    if collection is not None:
        told = str(item.get("collection"))
        findings.append(
            _finding(collection, "collection", collection, told, agrees=told == collection)
        )
    findings += _properties(collection, item, profile)
    wanted = {**profile.bands, **({SCL: profile.scl} if profile.scl is not None else {})}
    for band, described in wanted.items():
        findings += _asset(collection, item, profile, band, described)
    findings.append(_read(catalog, collection, item, profile))
    return findings


def _one_item(
    catalog: Catalog, collection: str | None, region: Region | None, times: TimeRange
) -> dict[str, Any] | None:
    """Return an item, if possible one with assets of bands."""
    if catalog.kind == "static":
        return search_items(catalog, collection, region, times).items[0]
    found = search_api(
        catalog,
        collection=collection,
        area=region.geometry if region is not None else None,
        datetime=times.to_stac(),
        limit=1,
    )
    first = None
    for item in itertools.islice(found, _ITEMS):
        first = first or item
        if set(band_assets(item, catalog.profile(collection))) - {SCL}:
            first = item
            break
    return without_secrets(first, catalog.access_of(collection)) if first is not None else None


def _properties(
    collection: str | None, item: Mapping[str, Any], profile: CollectionProfile
) -> list[Finding]:
    properties = item.get("properties") or {}
    findings = []
    for what, names in profile.properties.model_dump().items():
        present = [name for name in names if properties.get(name) is not None]
        # A static catalog's names are those of all providers; one item has only its own.
        if names and (profile.bands or present):
            found = ", ".join(present) or "missing"
            findings.append(
                _finding(collection, what, " or ".join(names), found, agrees=bool(present))
            )
    flag = profile.offset.applied_property
    if flag is not None and profile.bands:
        found = str(properties.get(flag, "missing"))
        findings.append(_finding(collection, "offset flag", flag, found, agrees=flag in properties))
    return findings


def _asset(
    collection: str | None,
    item: Mapping[str, Any],
    profile: CollectionProfile,
    band: str,
    described: BandAsset,
) -> list[Finding]:
    """Compare one band: key, pixel size, scale, nodata and offset."""
    asset = (item.get("assets") or {}).get(described.asset)
    if asset is None:
        near = [key for key in item.get("assets") or {} if band in key.lower()]
        found = f"missing{f' (has {near[0]})' if near else ''}"
        return [_finding(collection, band, f"asset {described.asset}", found, agrees=False)]
    told = declared_radiometry(asset)
    size = asset.get("gsd") or asset.get("proj:transform", [None])[0]
    pairs: list[tuple[str, Any, Any]] = [("m", described.resolution, size)]
    pairs.append(("nodata", profile.nodata, told.get("nodata")))
    if band != SCL:
        pairs.append(("scale", profile.scale, told.get("scale")))
    expected, found_parts, agrees = [f"asset {described.asset}"], [described.asset], True
    for name, ours, theirs in pairs:
        expected.append(f"{name} {ours:g}")
        found_parts.append(f"{name} {theirs:g}" if theirs is not None else f"{name} not declared")
        # What is not declared is what the description says.
        agrees = agrees and (theirs is None or abs(float(theirs) - float(ours)) < 1e-9)
    if band != SCL and profile.measures == "reflectance":
        rule, ok = _offset(item, profile, described.asset, told)
        expected.append(rule)
        found_parts.append(
            f"offset {told['offset']:g}" if "offset" in told else "offset not declared"
        )
        agrees = agrees and ok
    return [_finding(collection, band, ", ".join(expected), ", ".join(found_parts), agrees=agrees)]


def _offset(
    item: Mapping[str, Any], profile: CollectionProfile, key: str, told: Mapping[str, float]
) -> tuple[str, bool]:
    """Return the rule's outcome as text, and whether the item does not contradict it."""
    baseline = describe_item(item, profile).baseline
    found = resolve_offset(item, key, profile, baseline=baseline)
    rule = profile.offset
    if rule.declared:
        ok = "offset" in told or rule.baseline is not None or found.source == "already applied"
    else:
        # A provider that begins to declare offsets must not declare another one.
        ok = round(told.get("offset", found.offset * 1e-4) * 1e4) == found.offset
    return f"offset {found.offset * 1e-4:g} ({found.source})", ok


def _read(
    catalog: Catalog, collection: str | None, item: Mapping[str, Any], profile: CollectionProfile
) -> Finding:
    """Read a small window of one band, through all that a build does."""
    keys = {band: key for band, key in band_assets(item, profile).items() if band != SCL}
    band = "red" if "red" in keys else next(iter(keys), None)
    if band is None:
        return _finding(collection, "read", "a band", "no asset of a band", agrees=False)
    granule = describe_item(item, profile)
    what = f"asset {keys[band]} of item {granule.item}"
    expected = f"{_WINDOW} x {_WINDOW} px of {keys[band]}"
    try:
        access = asset_access(catalog, collection)
        href = check_asset(item["assets"][keys[band]], access, what=what)
        grid = _middle(granule, item["assets"][keys[band]])
        pixels = AssetReader(access).read(href, grid, nodata=profile.nodata)
    except (StclnGeoError, AssetReadError) as error:
        text = re.sub(r"\s+", " ", str(error))
        return _finding(collection, "read", expected, text, agrees=False)
    kinds = "f" if profile.measures == "backscatter" else "ui"
    found = f"{pixels.shape[0]} x {pixels.shape[1]} px, {pixels.dtype}, {pixels.max()} at most"
    return _finding(collection, "read", expected, found, agrees=pixels.dtype.kind in kinds)


def _middle(granule: Granule, asset: Mapping[str, Any]) -> Any:
    """Return a small grid in the middle of a scene, at the asset's own pixels."""
    if granule.bounds is None or granule.crs is None:
        raise SearchError(
            f"Cannot place item {granule.item}: it has no proj:transform, proj:shape and "
            "proj:code or proj:epsg. Items without them are placed when they are read."
        )
    size = float((asset.get("proj:transform") or [asset.get("gsd") or 10])[0])
    left, bottom, right, top = granule.bounds
    x, y = (left + right) / 2, (bottom + top) / 2
    corner = bounds_window((x, y - size, x + size, y), resolution=size)
    window = Window(corner.row - _WINDOW // 2, corner.col - _WINDOW // 2, _WINDOW, _WINDOW)
    return geobox_from_window(window, crs=granule.crs, resolution=size)


def _finding(
    collection: str | None, what: str, described: str, found: str, *, agrees: bool
) -> Finding:
    return Finding(
        collection=collection or "any", what=what, described=described, found=found, agrees=agrees
    )
