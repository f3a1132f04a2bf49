"""Describe a simulated archive as a static STAC catalog, laid out as Earth Search v1 does."""

from __future__ import annotations

import json
import math
from datetime import datetime
from typing import Any

import numpy as np

from ..antimeridian import split_at_antimeridian
from .scene import FINE_BANDS
from .sky import swath_edge
from .spec import RESOLUTION, Acquisition, SimulationSpec

COLLECTION = "simulated-sentinel-2-l2a"

ASSETS = {
    "blue": "B02",
    "green": "B03",
    "red": "B04",
    "rededge1": "B05",
    "rededge2": "B06",
    "rededge3": "B07",
    "nir": "B08",
    "nir08": "B8A",
    "swir16": "B11",
    "swir22": "B12",
    "scl": "SCL",
}
"""Asset keys, and the names of their files without the ending."""

_TITLE = "Simulated Sentinel-2 L2A over a made-up farm landscape"
_ABOUT = "Simulated data: no satellite took these images and no farmer grows these fields."
_EXTENSIONS = [
    "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
    "https://stac-extensions.github.io/projection/v1.1.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "https://stac-extensions.github.io/grid/v1.1.0/schema.json",
    "https://stac-extensions.github.io/sat/v1.0.0/schema.json",
]
_COG = "image/tiff; application=geotiff; profile=cloud-optimized"


def item_id(spec: SimulationSpec, acquisition: Acquisition) -> str:
    """Name an item as Earth Search does."""
    day = acquisition.when.strftime("%Y%m%d")
    return f"S2{acquisition.platform}_{mgrs_square(spec)}_{day}_0_L2A"


def asset_resolution(asset: str) -> int:
    """Give the pixel size of an asset in metres."""
    return RESOLUTION if asset in FINE_BANDS else 2 * RESOLUTION


def asset_shape(spec: SimulationSpec, asset: str) -> tuple[int, int]:
    """Give the rows and columns of an asset; pixels of 20 m cover a ragged edge whole."""
    step = asset_resolution(asset) // RESOLUTION
    return math.ceil(spec.height / step), math.ceil(spec.width / step)


def make_item(
    spec: SimulationSpec, acquisition: Acquisition, *, cloud_cover: float
) -> dict[str, Any]:
    """Make the STAC item of one acquisition.

    Parameters
    ----------
    spec : SimulationSpec
    acquisition : Acquisition
    cloud_cover : float
        Percent of the covered area that the classification calls cloud.
    """
    footprint = _to_lonlat(spec, _footprint(spec, acquisition))
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": item_id(spec, acquisition),
        "collection": COLLECTION,
        "geometry": _polygon(footprint),
        "bbox": _bbox(footprint),
        "stac_extensions": _EXTENSIONS,
        "properties": {
            "datetime": format_time(acquisition.when),
            "platform": f"sentinel-2{acquisition.platform.lower()}",
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "eo:cloud_cover": round(cloud_cover, 3),
            "proj:epsg": spec.epsg,
            "grid:code": f"MGRS-{mgrs_square(spec)}",
            "sat:relative_orbit": acquisition.orbit,
            "s2:processing_baseline": acquisition.baseline,
            "earthsearch:boa_offset_applied": False,
        },
        "assets": {asset: _make_asset(spec, acquisition, asset) for asset in ASSETS},
        "links": [
            {"rel": "root", "href": "../catalog.json", "type": "application/json"},
            {"rel": "parent", "href": "../collection.json", "type": "application/json"},
            {"rel": "collection", "href": "../collection.json", "type": "application/json"},
        ],
    }


def make_collection(spec: SimulationSpec, items: list[dict[str, Any]]) -> dict[str, Any]:
    """Make the STAC collection of all items."""
    times = sorted(item["properties"]["datetime"] for item in items)
    links = [
        {"rel": "root", "href": "./catalog.json", "type": "application/json"},
        {"rel": "parent", "href": "./catalog.json", "type": "application/json"},
    ]
    links += [
        {"rel": "item", "href": f"./{item['id']}/{item['id']}.json", "type": "application/geo+json"}
        for item in items
    ]
    return {
        "type": "Collection",
        "stac_version": "1.0.0",
        "id": COLLECTION,
        "title": _TITLE,
        "description": f"{_ABOUT} Seed {spec.seed}, {spec.width} x {spec.height} px of 10 m.",
        "license": "CC0-1.0",
        "extent": {
            "spatial": {"bbox": [_bbox(_region_ring(spec))]},
            "temporal": {"interval": [[times[0], times[-1]]]},
        },
        "links": links,
    }


def make_catalog() -> dict[str, Any]:
    """Make the root of the static catalog."""
    return {
        "type": "Catalog",
        "stac_version": "1.0.0",
        "id": f"{COLLECTION}-catalog",
        "description": f"{_TITLE}. {_ABOUT}",
        "links": [
            {"rel": "root", "href": "./catalog.json", "type": "application/json"},
            {"rel": "child", "href": "./collection.json", "type": "application/json"},
        ],
    }


def region_geometry(spec: SimulationSpec) -> dict[str, Any]:
    """Give the region in longitude and latitude, drawn in by 1 m to add no pixel, as GeoJSON."""
    return _polygon(_region_ring(spec))


def format_time(when: datetime) -> str:
    """Write a time as STAC items do."""
    return when.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def mgrs_square(spec: SimulationSpec) -> str:
    """Name the MGRS square of 100 km at the region's centre, such as 31UES."""
    zone = spec.epsg % 100
    west, south, east, north = spec.bounds
    x, y = (west + east) / 2, (south + north) / 2
    latitude = _to_lonlat(spec, [(x, y)])[0][1]
    band = "CDEFGHJKLMNPQRSTUVWX"[min(max(int((latitude + 80) // 8), 0), 19)]
    column = ("ABCDEFGH", "JKLMNPQR", "STUVWXYZ")[(zone - 1) % 3][(int(x // 100_000) - 1) % 8]
    row = "ABCDEFGHJKLMNPQRSTUV"[(int(y // 100_000) + (5 if zone % 2 == 0 else 0)) % 20]
    return f"{zone:02d}{band}{column}{row}"


def _make_asset(spec: SimulationSpec, acquisition: Acquisition, asset: str) -> dict[str, Any]:
    resolution = asset_resolution(asset)
    height, width = asset_shape(spec, asset)
    described: dict[str, Any] = {
        "href": f"./{ASSETS[asset]}.tif",
        "type": _COG,
        "roles": ["data"],
        "gsd": resolution,
        "proj:shape": [height, width],
        "proj:transform": [resolution, 0, spec.origin_x, 0, -resolution, spec.origin_y],
    }
    if asset == "scl":
        raster = {"nodata": 0, "data_type": "uint8", "spatial_resolution": resolution}
        return {**described, "raster:bands": [raster]}
    raster = {
        "nodata": 0,
        "data_type": "uint16",
        "spatial_resolution": resolution,
        "scale": 0.0001,
        "offset": -0.1 if acquisition.offset else 0,
    }
    return {**described, "raster:bands": [raster], "eo:bands": [{"name": asset}]}


def _footprint(spec: SimulationSpec, acquisition: Acquisition) -> list[tuple[float, float]]:
    import shapely

    west, south, east, north = spec.bounds
    area: Any = shapely.box(west, south, east, north)
    if acquisition.partial:
        ends = np.array([south, north])
        x_south, x_north = (float(x) for x in swath_edge(spec, ends))
        far = min(west, x_south, x_north) - 1000
        area &= shapely.Polygon([(far, south), (x_south, south), (x_north, north), (far, north)])
    return [(float(x), float(y)) for x, y in area.exterior.coords]


def _region_ring(spec: SimulationSpec) -> list[list[float]]:
    west, south, east, north = spec.bounds
    return _to_lonlat(spec, _ring(west + 1, south + 1, east - 1, north - 1))


def _ring(west: float, south: float, east: float, north: float) -> list[tuple[float, float]]:
    return [(west, south), (east, south), (east, north), (west, north), (west, south)]


def _to_lonlat(spec: SimulationSpec, points: list[tuple[float, float]]) -> list[list[float]]:
    from rasterio.warp import transform

    longitudes, latitudes = transform(spec.crs, "EPSG:4326", *zip(*points, strict=True))[:2]
    return [[round(x, 7), round(y, 7)] for x, y in zip(longitudes, latitudes, strict=True)]


def _polygon(ring: list[list[float]]) -> dict[str, Any]:
    """Give an outline as GeoJSON, split at the antimeridian."""
    import shapely

    polygon = shapely.Polygon(ring)
    split = split_at_antimeridian(polygon)
    if split is polygon:
        return {"type": "Polygon", "coordinates": [ring]}
    mapped: dict[str, Any] = json.loads(shapely.to_geojson(split))
    return mapped


def _bbox(ring: list[list[float]]) -> list[float]:
    """Give west, south, east and north of an outline; across the antimeridian west is greater."""
    longitudes, latitudes = [point[0] for point in ring], [point[1] for point in ring]
    west, east = min(longitudes), max(longitudes)
    if east - west > 180:
        west, east = min(x for x in longitudes if x > 0), max(x for x in longitudes if x < 0)
    return [west, min(latitudes), east, max(latitudes)]
