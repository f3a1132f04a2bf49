"""Search a STAC API or a static catalog, and keep what was found as a snapshot.

The snapshot is all a build knows of the catalog: the same snapshot, region and spec give the
same cube. Whatever the server answers is checked again here (time, place, collection, assets),
because filters are ignored by some servers and pages repeated by others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..catalog import Catalog, CollectionProfile
from ..errors import InputError, NothingFoundError, SearchError
from ..region import Region
from .addresses import redact, without_secrets
from .granules import (
    LONGEST_DATATAKE,
    Dropped,
    Granule,
    band_assets,
    describe_item,
    drop_duplicates,
)
from .item_checks import check_declared, check_item, check_place
from .selection import Selection
from .snapshot import ItemSnapshot
from .stac_api import search_api
from .static_catalog import walk_static
from .time_range import TimeRange, parse_time_range

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["DEFAULT_MARGIN", "search_items", "select_items"]

DEFAULT_MARGIN = 2000.0
"""Items this far from the region (metres) count too: cubes are padded to whole windows."""

_METRES_PER_DEGREE = 111_000.0


def search_items(
    catalog: Catalog,
    collection: str | None = None,
    region: Region | None = None,
    time_range: TimeRange | str | None = None,
    *,
    selection: Selection | None = None,
    margin: float = DEFAULT_MARGIN,
) -> ItemSnapshot:
    """Return the items of a catalog that meet a region and a time range, one per scene.

    Parameters
    ----------
    collection
        Default: the catalog's only collection whose items have band assets.
    region
        None takes all places (static catalogs only).
    selection
        Tiles, orbits and cloud cover to take; None takes all.
    margin
        Items this far from the region (metres) count too, because a cube is padded to whole
        windows around it.

    Raises
    ------
    SearchError
        If nothing usable is found; the message says what was seen and why it was left out.
    """
    times = time_range if isinstance(time_range, TimeRange) else parse_time_range(time_range)
    if collection is None:
        collection = catalog.default_collection()
    profile = catalog.profile(collection)
    if profile.measures == "backscatter":
        raise InputError(
            f"Cannot make a cube of the collection '{collection}': it holds radar backscatter, and "
            "cubes hold optical reflectance so far. Choose an optical collection with --collection "
            "(stcln-geo catalogs list names them), and read the radar scenes with another tool, "
            "such as odc-stac."
        )
    if catalog.kind == "api" and region is None:
        raise SearchError(
            f"Cannot search '{catalog.name}' without a region: it covers the whole Earth. "
            "Give --bbox or --region."
        )
    area = _surroundings(region, margin) if region is not None else None
    chosen = selection or Selection()
    if catalog.kind == "api" and area is not None:
        found: Iterable[dict[str, Any]] = (
            search := search_api(
                catalog,
                collection=collection,
                area=area,
                # A pass that began in time counts whole.
                datetime=times.to_stac(later=LONGEST_DATATAKE),
                server_filter=chosen.server_filter(catalog, profile),
            )
        )
        url, body = search.url, dict(search.body)
    else:
        found = walk_static(catalog)
        url, body = str(catalog.endpoint), None
    query = {
        "catalog": catalog.name,
        "url": redact(url),
        "body": body,
        "selection": chosen.to_json(),
    }

    return _snapshot(found, catalog, collection, region, (area, times, chosen), query)


def select_items(
    items: Iterable[dict[str, Any]],
    catalog: Catalog,
    collection: str | None = None,
    region: Region | None = None,
    time_range: TimeRange | None = None,
    *,
    selection: Selection | None = None,
    margin: float = DEFAULT_MARGIN,
) -> ItemSnapshot:
    """Return the snapshot of items at hand, as ``search_items`` makes it of a catalog's answer.

    Raises
    ------
    SearchError
        If none of them is usable.
    """
    area = _surroundings(region, margin) if region is not None else None
    conditions = (area, time_range or TimeRange(), selection or Selection())
    return _snapshot(items, catalog, collection, region, conditions)


def _snapshot(
    found: Iterable[dict[str, Any]],
    catalog: Catalog,
    collection: str | None,
    region: Region | None,
    conditions: _Conditions,
    query: Mapping[str, Any] | None = None,
) -> ItemSnapshot:
    times = conditions[1]
    items, dropped, seen = _check_items(found, catalog, collection, conditions)
    collection = _only_collection(catalog, items, collection)
    by_id = {granule.item: item for item, granule in items.values()}
    granules, older = drop_duplicates(granule for _, granule in items.values())
    dropped.extend(older)
    if not granules:
        raise NothingFoundError(_nothing_found(catalog, collection, region, times, seen, dropped))
    return ItemSnapshot(
        catalog=catalog,
        collection=collection,
        items=tuple(by_id[granule.item] for granule in granules),
        granules=tuple(granules),
        seen=seen,
        dropped=tuple(dropped),
        time_range=times,
        query=query or {},
    )


_Conditions = tuple["BaseGeometry | None", TimeRange, Selection]
"""Where, when, and which scenes."""


def _check_items(
    found: Iterable[dict[str, Any]],
    catalog: Catalog,
    collection: str | None,
    conditions: _Conditions,
) -> tuple[dict[tuple[str, str], tuple[dict[str, Any], Granule]], list[Dropped], int]:
    """Return the items that count, by collection and id; the others with the reason; all seen."""
    profile = catalog.profile(collection)
    items: dict[tuple[str, str], tuple[dict[str, Any], Granule]] = {}
    refused: set[tuple[str, str]] = set()
    dropped: list[Dropped] = []
    for item in found:
        if not isinstance(item, Mapping):
            refused.add(("", repr(item)))
            dropped.append(Dropped(item="", reason=_malformed("it is no JSON object")))
            continue
        key = (str(item.get("collection")), str(item.get("id")))
        if key in items or key in refused:
            continue
        checked = _granule_or_reason(item, profile, collection, conditions)
        if isinstance(checked, str):
            refused.add(key)
            dropped.append(Dropped(item=key[1], reason=checked))
        else:
            plain = without_secrets(item, catalog.access_of(collection))
            items[key] = _with_right_addresses(plain, profile), checked
    return items, dropped, len(items) + len(refused)


def _with_right_addresses(item: dict[str, Any], profile: CollectionProfile) -> dict[str, Any]:
    """Return the item with the beginnings of addresses replaced that are known to be wrong."""
    for asset in (item.get("assets") or {}).values() if profile.replace_href else ():
        for wrong, right in profile.replace_href.items():
            if str(asset.get("href", "")).startswith(wrong):
                asset["href"] = right + str(asset["href"]).removeprefix(wrong)
                break
    return item


def _granule_or_reason(
    item: Mapping[str, Any],
    profile: CollectionProfile,
    collection: str | None,
    conditions: _Conditions,
) -> Granule | str:
    """Return what an item is, or why it does not count; what is malformed counts for nothing."""
    from pyproj.exceptions import CRSError
    from shapely.errors import ShapelyError

    try:
        check_item(item)
        return _judge(item, profile, collection, conditions)
    except SearchError:
        return _malformed("its datetime is no ISO time")
    except (ShapelyError, CRSError):
        return _malformed("its geometry or CRS")
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        return _malformed(str(error))


def _malformed(why: str) -> str:
    return f"is malformed ({redact(why)[:100]})"


def _judge(
    item: Mapping[str, Any],
    profile: CollectionProfile,
    collection: str | None,
    conditions: _Conditions,
) -> Granule | str:
    area, times, selection = conditions
    if collection is not None and item.get("collection") not in {None, collection}:
        return f"is of collection {item.get('collection')}"
    if not set(band_assets(item, profile)) - {"scl"}:
        return "has no asset of a Sentinel-2 band"
    granule = describe_item(item, profile)
    check_place(granule)
    check_declared(item, profile)
    if not times.holds(granule.time):
        return "lies outside the time range"
    footprint = granule.geometry
    if area is not None and footprint is not None and not footprint.intersects(area):
        return "lies outside the region"
    return selection.reason_to_drop(item, granule) or granule


def _only_collection(
    catalog: Catalog, items: Mapping[tuple[str, str], Any], collection: str | None
) -> str | None:
    found = sorted({name for name, _ in items})
    if collection is not None or not found:
        return collection
    if len(found) > 1:
        raise SearchError(
            f"Cannot choose a collection of '{catalog.name}': {', '.join(found)} all have usable "
            "items. Give one with --collection."
        )
    return found[0]


def _nothing_found(
    catalog: Catalog,
    collection: str | None,
    region: Region | None,
    times: TimeRange,
    seen: int,
    dropped: Sequence[Dropped],
) -> str:
    where = region.source if region is not None else "any place"
    reasons = Counter(entry.reason for entry in dropped)
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(6))
    return (
        f"Cannot build from '{catalog.name}'"
        f"{f', collection {collection}' if collection else ''}: no usable item for {where}, time "
        f"{times.to_stac() or 'any'}. {seen} items were seen{f' ({why})' if why else ''}. "
        "Check the region (W,S,E,N in degrees), the time range and --collection."
    )


def _surroundings(region: Region, margin: float) -> BaseGeometry:
    """Return the region in lon/lat, simplified and grown by at least a margin in metres."""
    from shapely import affinity, box, intersection, union_all

    _, south, _, north = region.geometry.bounds
    squeeze = max(float(np.cos(np.radians(max(abs(south), abs(north))))), 0.05)
    degrees = margin / _METRES_PER_DEGREE
    # Grow in a plane where a degree is equally long in both directions.
    plane = affinity.scale(region.geometry, xfact=squeeze, origin=(0, 0))
    grown = plane.buffer(degrees * 1.1, join_style="mitre").simplify(degrees / 10)
    grown = affinity.scale(grown, xfact=1 / squeeze, origin=(0, 0))
    # What grows over the antimeridian goes on at the other side.
    copies = [affinity.translate(grown, xoff=turn) for turn in (0, 360, -360)]
    area: BaseGeometry = union_all(intersection(copies, box(-180, -90, 180, 90)))
    return area
