"""Describe an export as a small static STAC collection with one item per date.

STAC 1.1 with the projection, raster, electro-optical and classification extensions; hrefs are
relative, so the folder can be moved, served or opened as it is.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cube.contract import FILL, SCALE, SCENE_CLASSES, SCENE_COLORS
from ..cube.store import write_json
from ..legend import UNLABELLED, plain_names
from ..region import Region
from .plan import COLLECTION_FILE

if TYPE_CHECKING:
    from .plan import ExportPlan

__all__ = ["COLLECTION_FILE", "write_stac"]

_EXTENSIONS = [
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v2.0.0/schema.json",
    "https://stac-extensions.github.io/eo/v2.0.0/schema.json",
    "https://stac-extensions.github.io/classification/v2.0.0/schema.json",
]
_COMMON_NAMES = {"rededge1": "rededge071", "rededge2": "rededge075", "rededge3": "rededge078"}
"""Names of the electro-optical extension 2.0 where they are not the cube's own."""

_TITLES = {
    "reflectance": "Surface reflectance",
    "valid": "Usable pixels: 1 = clear and measured",
    "scl": "Scene classes of Sentinel-2",
    "labels": "Crop labels",
}
_DTYPES = {"reflectance": "int16", "valid": "uint8", "scl": "uint8", "labels": "uint8"}


def write_stac(plan: ExportPlan, files: Mapping[str, Mapping[str, Any]]) -> Path:
    """Write the items and the collection of all files of an export.

    Parameters
    ----------
    files
        Name of each file in the folder, with ``what``, ``date`` (position in the season, or None),
        and for reflectance ``bands``.

    Returns
    -------
    Path
        The collection.
    """
    import pystac

    by_item: dict[int | None, dict[str, Mapping[str, Any]]] = {}
    for name, entry in sorted(files.items()):
        by_item.setdefault(entry["date"], {})[name] = entry
    items = [
        _item(plan, date, by_item[date])
        for date in sorted(by_item, key=lambda date: -1 if date is None else date)
    ]
    first, last = (_moment(plan.season.time[index]) for index in (0, -1))
    collection = pystac.Collection(
        id=f"{plan.season.cube.stem}-{plan.season.name}",
        title=f"{plan.season.cube.stem}, season {plan.season.name}",
        description=(
            f"The season from {plan.season.name} of the cube {plan.season.cube.name}, one "
            "cloud-optimized GeoTIFF per date, written by stcln-geo."
        ),
        extent=pystac.Extent(
            pystac.SpatialExtent([items[0].bbox or []]),
            pystac.TemporalExtent([[first, last]]),
        ),
        license="other",
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )
    collection.set_self_href(str((plan.out / COLLECTION_FILE).resolve()))
    collection.add_items(items, strategy=_Flat())
    for item in items:
        write_json(plan.out / f"{item.id}.json", item.to_dict(include_self_link=False))
    path = plan.out / COLLECTION_FILE
    write_json(path, collection.to_dict(include_self_link=False))
    return path


def _Flat() -> Any:
    """Return the layout with all items beside the collection."""
    from pystac.layout import CustomLayoutStrategy

    return CustomLayoutStrategy(
        item_func=lambda item, folder: str(Path(folder) / f"{item.id}.json")
    )


def _item(plan: ExportPlan, date: int | None, files: Mapping[str, Mapping[str, Any]]) -> Any:
    import pystac
    from shapely.geometry import box

    season = plan.season
    bounds = season.geobox.boundingbox
    crs: Any = season.geobox.crs
    outline = box(*bounds.bbox).segmentize(max(bounds.span_x, bounds.span_y) / 8)
    region = Region.from_projected(outline, str(crs), source="the cube")
    code = {"proj:code": f"EPSG:{crs.epsg}"} if crs.epsg else {"proj:wkt2": crs.to_wkt()}
    properties: dict[str, Any] = {
        "gsd": season.resolution,
        **code,
        "proj:shape": list(season.shape_yx),
        "proj:transform": [float(value) for value in tuple(season.geobox.affine)[:6]],
        "proj:bbox": [float(value) for value in bounds.bbox],
    }
    first, last = _moment(season.time[0]), _moment(season.time[-1])
    span: dict[str, Any] = {"datetime": None, "start_datetime": first, "end_datetime": last}
    if date is not None:
        span = {"datetime": _moment(season.time[date])}
        told = {name: column[date] for name, column in plan.provenance.items()}
        if "period_start" in told:
            span["start_datetime"] = _moment(np.datetime64(told.pop("period_start"), "s"))
            span["end_datetime"] = _moment(
                np.datetime64(told.pop("period_end"), "s") + np.timedelta64(86399, "s")
            )
        clear = int(season.coverage[date].sum()) / math.prod(season.shape_yx)
        properties["stcln_geo:clear_percent"] = round(100 * float(clear), 2)
        properties |= {f"stcln_geo:{name}": text for name, text in told.items() if text}
        if len(told.get("platform", "").split()) == 1:
            properties["platform"] = told["platform"]
    item = pystac.Item(
        id=plan.stems[date] if date is not None else f"labels_{season.name}",
        geometry=region.to_json(),
        bbox=region.bbox,
        properties=properties,
        stac_extensions=list(_EXTENSIONS),
        **span,
    )
    for name, entry in files.items():
        item.add_asset(entry["what"], _asset(plan, name, entry))
    return item


def _asset(plan: ExportPlan, name: str, entry: Mapping[str, Any]) -> Any:
    from pystac import Asset, MediaType

    what = entry["what"]
    fields: dict[str, Any] = {
        "data_type": _DTYPES[what],
        "raster:spatial_resolution": plan.season.resolution,
    }
    if what == "reflectance":
        fields |= {"nodata": FILL, "unit": "1", "raster:scale": SCALE, "raster:offset": 0.0}
        fields["bands"] = [
            {"name": band, "eo:common_name": _COMMON_NAMES.get(band, band)}
            for band in entry["bands"]
        ]
    elif what in {"scl", "labels"}:
        fields["nodata"] = 0 if what == "scl" else UNLABELLED
    if what != "reflectance":
        fields["classification:classes"] = _classes(plan, what)
    return Asset(
        href=f"./{name}",
        media_type=MediaType.COG,
        title=_title(plan, what),
        roles=["data"] if what in {"reflectance", "labels"} else ["data-mask"],
        extra_fields=fields,
    )


def _classes(plan: ExportPlan, what: str) -> list[dict[str, Any]]:
    """Return what the codes of an asset mean."""
    legend = plan.season.legend
    if what == "labels" and legend is not None:
        names = dict(enumerate(legend.names)) | {UNLABELLED: "unlabelled"}
        colors = {entry.code: entry.color[1:].upper() for entry in legend.classes}
    else:
        names = dict(enumerate(("not usable", "usable") if what == "valid" else SCENE_CLASSES))
        shown = SCENE_COLORS if what == "scl" else ()
        colors = {code: color[1:].upper() for code, color in enumerate(shown)}
    plain, nodata = plain_names(names), {"scl": 0, "labels": UNLABELLED}.get(what)
    return [
        {
            "value": code,
            "name": plain[code],
            "title": name,
        }
        | ({"color_hint": colors[code]} if code in colors else {})
        | ({"nodata": True} if code == nodata else {})
        for code, name in names.items()
    ]


def _title(plan: ExportPlan, what: str) -> str:
    if what == "reflectance" and plan.season.level == "top-of-atmosphere":
        return "Top-of-atmosphere reflectance"
    return _TITLES[what]


def _moment(time: np.datetime64) -> datetime.datetime:
    moment: datetime.datetime = time.astype("datetime64[s]").item()
    return moment.replace(tzinfo=datetime.UTC)
