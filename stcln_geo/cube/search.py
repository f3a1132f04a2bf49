"""Search a STAC API or a static catalog, and keep what was found as a snapshot.

The snapshot is all a build knows of the catalog: the same snapshot, region and spec give the
same cube. Whatever the server answers is checked again here (time, place, collection, assets),
because filters are ignored by some servers and pages repeated by others.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urljoin, urlparse

import numpy as np

from ..catalog import Catalog, CollectionProfile, read_json
from ..errors import InputError, MissingFileError, NothingFoundError, SearchError
from ..region import Region
from ..storage import Location, location, write_file
from .addresses import asset_access, check_address, redact, without_secrets
from .granules import Dropped, Granule, band_assets, describe_item, drop_duplicates
from .selection import Selection
from .stac_api import search_api

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = [
    "ItemSnapshot",
    "TimeRange",
    "parse_time_range",
    "read_items",
    "read_queries",
    "search_items",
    "select_items",
    "walk_items",
    "write_items",
]

DEFAULT_MARGIN = 2000.0
"""Items this far from the region (metres) count too: cubes are padded to whole windows."""

_METRES_PER_DEGREE = 111_000.0
_READERS = 8
_QUERIES = b"stcln_geo:queries"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRange:
    """From ``start`` to ``end``, both included, UTC; None is open."""

    start: np.datetime64 | None = None
    end: np.datetime64 | None = None

    def holds(self, time: np.datetime64) -> bool:
        """Return True where the time lies in the range."""
        second = time.astype("datetime64[s]")
        after = self.start is None or bool(second >= self.start)
        return after and (self.end is None or bool(second <= self.end))

    def to_stac(self) -> str | None:
        """Return the range as a STAC API writes it, or None if it is open on both sides."""
        if self.start is None and self.end is None:
            return None
        start = ".." if self.start is None else f"{self.start}Z"
        # The last second is included whole.
        end = ".." if self.end is None else f"{self.end}.999999Z"
        return f"{start}/{end}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemSnapshot:
    """The items of one search, and what became of the others."""

    catalog: Catalog
    collection: str | None
    items: tuple[dict[str, Any], ...]
    """STAC items, oldest first, with absolute addresses; one per scene."""
    granules: tuple[Granule, ...]
    """What each item is, in the same order."""
    seen: int
    """Items the catalog answered with."""
    dropped: tuple[Dropped, ...]
    time_range: TimeRange
    query: Mapping[str, Any] = field(default_factory=dict)
    """What was asked: ``catalog``, ``url`` and ``body`` of the search that was sent (no body where
    a static catalog was read instead), and ``selection``, which was checked here as well."""

    @property
    def profile(self) -> CollectionProfile:
        """The description of the collection."""
        return self.catalog.profile(self.collection)

    def __len__(self) -> int:
        """Return the number of items kept."""
        return len(self.items)


def parse_time_range(text: str | None) -> TimeRange:
    """Read ``START/END``: dates or UTC times, both included; ``..`` or nothing is open.

    An end without a time of day includes the whole day; a single date is that day.
    """
    if text is None:
        return TimeRange()
    parts = text.split("/")
    if len(parts) == 1:
        parts = [text, text]
    try:
        if len(parts) != 2:
            raise ValueError(text)
        start = _moment(parts[0], last=False)
        end = _moment(parts[1], last=True)
    except ValueError as error:
        raise InputError(
            f"Cannot read the time range {text!r}: it must be START/END with dates as YYYY-MM-DD, "
            "as in --time 2018-09-01/2019-08-31."
        ) from error
    if start is not None and end is not None and start > end:
        raise InputError(
            f"Cannot use the time range {text!r}: it ends before it starts. "
            "Give the earlier date first."
        )
    return TimeRange(start=start, end=end)


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
                datetime=times.to_stac(),
                server_filter=chosen.server_filter(catalog, profile),
            )
        )
        url, body = search.url, dict(search.body)
    else:
        found = _walk_static(catalog)
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


def walk_items(catalog: Catalog) -> list[dict[str, Any]]:
    """Return all items of a static catalog, unchecked, with absolute addresses."""
    return list(_walk_static(catalog))


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


def write_items(
    path: str | Location,
    items: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write items as STAC GeoParquet, with the searches that found them in the file's metadata."""
    import pyarrow.parquet
    from stac_geoparquet.arrow import parse_stac_items_to_arrow, to_parquet

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = parse_stac_items_to_arrow([dict(item) for item in items])
        file = Path(folder) / "items.parquet"  # the library writes to local paths only
        to_parquet(table, file)
        if queries:
            written = pyarrow.parquet.read_table(file)
            told = {_QUERIES: json.dumps([dict(query) for query in queries]).encode()}
            metadata = {**(written.schema.metadata or {}), **told}
            pyarrow.parquet.write_table(written.replace_schema_metadata(metadata), file)
        write_file(location(path), file.read_bytes())


def read_items(path: str | Location) -> list[dict[str, Any]]:
    """Read items from STAC GeoParquet."""
    import pyarrow.parquet
    from stac_geoparquet.arrow import stac_table_to_items

    path = location(path)
    if not path.is_file():
        raise MissingFileError(
            f"Cannot read the item snapshot {path}: there is no such file. "
            "It is written by 'stcln-geo cube build'."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(stac_table_to_items(pyarrow.parquet.read_table(io.BytesIO(path.read_bytes()))))


def read_queries(path: str | Location) -> list[dict[str, Any]]:
    """Return the searches that an item snapshot came from; none if it does not say."""
    import pyarrow.parquet

    content = io.BytesIO(location(path).read_bytes())
    told = (pyarrow.parquet.read_schema(content).metadata or {}).get(_QUERIES)
    return list(json.loads(told)) if told else []


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
    """Return what an item is, or why it does not count."""
    area, times, selection = conditions
    if collection is not None and item.get("collection") not in {None, collection}:
        return f"is of collection {item.get('collection')}"
    if not set(band_assets(item, profile)) - {"scl"}:
        return "has no asset of a Sentinel-2 band"
    granule = describe_item(item, profile)
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


def _walk_static(catalog: Catalog) -> Iterator[dict[str, Any]]:
    """Yield the items below a catalog, collections in the order of their links."""
    location = str(catalog.endpoint)
    access = asset_access(catalog)
    read = functools.partial(read_json, allow_hosts=access.allow_hosts)

    def linked(base: str, link: Mapping[str, Any]) -> str:
        address = _join(base, str(link["href"]))
        check_address(address, access, what=f"a link of {redact(base)}")
        return address

    waiting: list[tuple[str, str | None]] = [(location, None)]
    visited: set[str] = set()
    with contextlib.ExitStack() as stack:
        # Threads help where the catalog is far away; on disk they would only take turns.
        fetch: Callable[..., Iterator[dict[str, Any]]] = map
        if "://" in location:
            fetch = stack.enter_context(ThreadPoolExecutor(_READERS)).map
        while waiting:
            here, collection = waiting.pop(0)
            if here in visited:
                continue
            visited.add(here)
            document = read(here)
            if document.get("type") == "Collection":
                collection = str(document.get("id"))
            children: list[str] = []
            for link in document.get("links", []):
                if link.get("rel") == "child":
                    waiting.append((linked(here, link), collection))
                elif link.get("rel") == "item":
                    children.append(linked(here, link))
            for address, item in zip(children, fetch(read, children), strict=True):
                yield _absolute(item, address, collection)


def _absolute(item: dict[str, Any], address: str, collection: str | None) -> dict[str, Any]:
    """Return the item with absolute addresses and without links that only the catalog needs."""
    assets = {
        key: {**asset, "href": _join(address, str(asset.get("href", "")))}
        for key, asset in (item.get("assets") or {}).items()
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


def _moment(text: str, *, last: bool) -> np.datetime64 | None:
    text = text.strip()
    if text in {"", ".."}:
        return None
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        day = np.datetime64(text, "s")
        return day + np.timedelta64(86399, "s") if last else day
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?Z?", text):
        return np.datetime64(text.removesuffix("Z"), "s")
    raise ValueError(text)
