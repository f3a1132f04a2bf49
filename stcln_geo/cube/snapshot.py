"""Item snapshots: what a search found, in memory and as STAC GeoParquet."""

from __future__ import annotations

import datetime
import io
import json
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..catalog import Catalog, CollectionProfile
from ..errors import MissingFileError
from ..storage import Location, location, write_file
from .granules import Dropped, Granule
from .time_range import TimeRange

__all__ = ["ItemSnapshot", "read_items", "read_queries", "write_items"]

_QUERIES = b"stcln_geo:queries"


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


def write_items(
    path: str | Location,
    items: Sequence[Mapping[str, Any]],
    queries: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write items as STAC GeoParquet, with the searches that found them in the file's metadata.

    A column has one type: what differs in type from item to item, or fits no column, is written as
    JSON text, and a moment that is none is left out.
    """
    import pyarrow.parquet
    from stac_geoparquet.arrow import parse_stac_items_to_arrow, to_parquet

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            table = parse_stac_items_to_arrow([dict(item) for item in items])
        # Arrow, the library and their conversions fail here, each in a way of its own.
        except (ValueError, TypeError, ArithmeticError, LookupError, AttributeError):
            table = parse_stac_items_to_arrow(_of_one_type(items))
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


_MOMENTS = ("created", "updated", "start_datetime", "end_datetime", "published", "expires")
"""Properties that the format keeps as moments."""


def _of_one_type(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of items whose every field can be a column."""
    from shapely.geometry import shape

    plain: list[dict[str, Any]] = [
        {
            **item,
            "properties": dict(item["properties"]),
            "assets": {key: dict(asset) for key, asset in item["assets"].items()},
        }
        for item in items
    ]
    for item in plain:
        # What servers tell here may be anything; the footprint was looked at when it was found.
        item["bbox"] = list(shape(item["geometry"]).bounds)
        for name in _MOMENTS:
            if name in item["properties"] and not _is_moment(item["properties"][name]):
                del item["properties"][name]
    _level([item["properties"] for item in plain])
    for key in {key for item in plain for key in item["assets"]}:
        _level([item["assets"][key] for item in plain if key in item["assets"]])
    rest = [{name: item.pop(name) for name in set(item) - _FIXED} for item in plain]
    _level(rest)
    if not _is_column([item.get("links") for item in plain]):
        plain = [{**item, "links": []} for item in plain]
    return [{**item, **more} for item, more in zip(plain, rest, strict=True)]


_FIXED = {
    "type", "stac_version", "stac_extensions", "id", "geometry", "bbox", "properties", "assets",
    "links", "collection",
}  # fmt: skip


def _level(records: Sequence[dict[str, Any]]) -> None:
    """Turn fields that no column can hold into JSON text, in place."""
    for name in {name for record in records for name in record}:
        if _is_column([record.get(name) for record in records]):
            continue
        for record in records:
            if name in record and not isinstance(record[name], str | None):
                record[name] = json.dumps(record[name])
            elif name in record and not _is_column([record[name]]):
                record[name] = json.dumps(record[name])[1:-1]


def _is_column(values: Sequence[Any]) -> bool:
    import pyarrow

    try:
        pyarrow.array(values)
    except (ValueError, TypeError, ArithmeticError, pyarrow.ArrowException):
        return False
    return True


def _is_moment(text: Any) -> bool:
    try:
        return datetime.datetime.fromisoformat(str(text)).tzinfo is not None
    except ValueError:
        return False
