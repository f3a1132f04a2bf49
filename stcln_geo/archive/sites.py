"""Sites: points with an id, each a square of pixels in its own UTM zone.

A square is placed around its point on the absolute pixels of the zone, with corners at multiples
of 60 m as all grids have them, so that squares of one zone share their pixels with every cube.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MissingFileError
from ..grid import SNAP_METRES, Window, geobox_from_window, utm_zone_at
from ..region import LONLAT, choose_layer, footprint, is_geoparquet

if TYPE_CHECKING:
    import geopandas
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

__all__ = ["Site", "check_size", "mgrs_cell", "place_site", "read_points", "read_sites"]

SIZE_STEP = 16
"""Sizes are multiples of this (pixels), as chunks are."""

_CELL_METRES = 100_000.0
_BANDS = "CDEFGHJKLMNPQRSTUVWX"
_COLUMNS = ("ABCDEFGH", "JKLMNPQR", "STUVWXYZ")
_ROWS = "ABCDEFGHJKLMNPQRSTUV"
_SOUTH, _NORTH = -80.0, 84.0
_LON, _LAT = ("lon", "longitude", "x"), ("lat", "latitude", "y")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A square of pixels around a point."""

    id: str
    lon: float
    lat: float
    """The point, degrees."""
    crs: str
    """The UTM zone that owns the point, ``EPSG:32xxx``."""
    window: Window
    """The square in absolute pixels of ``crs``."""
    resolution: float
    """Pixel size (metres)."""

    @property
    def cell(self) -> str:
        """The MGRS square of 100 km that holds the point, such as ``31UES``."""
        x, y = _to_utm(self.crs).transform(self.lon, self.lat)
        return mgrs_cell(self.crs, x, y)

    @property
    def geobox(self) -> GeoBox:
        """The grid."""
        return geobox_from_window(self.window, crs=self.crs, resolution=self.resolution)

    @property
    def footprint(self) -> BaseGeometry:
        """The outline in lon/lat, cut at the antimeridian."""
        return footprint(self.geobox)


def check_size(size: int, resolution: float) -> None:
    """Raise InputError unless a square of that many pixels can be a site."""
    if size < SIZE_STEP or size % SIZE_STEP:
        raise InputError(
            f"Cannot make sites of {size} px: the size must be a multiple of {SIZE_STEP} px, so "
            f"that sites hold whole chunks. Use for example --size {max(round(size / 16), 1) * 16}."
        )
    if size * resolution > _CELL_METRES:
        raise InputError(
            f"Cannot make sites of {size} px of {resolution:g} m: a site may be 100 km wide at "
            "most. Build a region that large with 'stcln-geo cube build'."
        )


def place_site(name: str, lon: float, lat: float, *, size: int, resolution: float = 10.0) -> Site:
    """Return the square of ``size`` pixels around a point, in the UTM zone that owns it.

    The corner is the multiple of 60 m (or of the pixel, where 60 m is no multiple of it) that
    brings the square's centre nearest to the point.

    Raises
    ------
    InputError
        If the point does not lie between 80 S and 84 N, where UTM is defined.
    """
    if not (-180 <= lon <= 180 and _SOUTH <= lat <= _NORTH):
        raise InputError(
            f"Cannot place site {name!r} at longitude {lon:g}, latitude {lat:g}: longitudes are "
            "-180 to 180 and UTM zones reach from 80 S to 84 N. Correct or remove the point."
        )
    crs = utm_zone_at(lon, lat)
    x, y = _to_utm(crs).transform(lon, lat)
    step = round(SNAP_METRES / resolution)
    if step < 1 or abs(step * resolution - SNAP_METRES) > 1e-6 * SNAP_METRES:
        step = 1
    row = round((-y / resolution - size / 2) / step) * step
    col = round((x / resolution - size / 2) / step) * step
    return Site(
        id=name, lon=lon, lat=lat, crs=crs, window=Window(row, col, size, size),
        resolution=resolution,
    )  # fmt: skip


def mgrs_cell(crs: str, x: float, y: float) -> str:
    """Return the MGRS square of 100 km of a place in a UTM zone, such as ``31UES``.

    The letter of the latitude band is that of the square's middle, so that a square which a band's
    edge cuts has one name.

    Examples
    --------
    >>> mgrs_cell("EPSG:32631", 573000, 5625000)
    '31UES'
    """
    zone = int(crs.removeprefix("EPSG:")) % 100
    col, row = math.floor(x / _CELL_METRES), math.floor(y / _CELL_METRES)
    middle = ((col + 0.5) * _CELL_METRES, (row + 0.5) * _CELL_METRES)
    lat = _to_utm(crs).transform(*middle, direction="INVERSE")[1]
    band = _BANDS[min(max(math.floor((lat - _SOUTH) / 8), 0), len(_BANDS) - 1)]
    column = _COLUMNS[(zone - 1) % 3][min(max(col - 1, 0), 7)]
    return f"{zone}{band}{column}{_ROWS[(row + (0 if zone % 2 else 5)) % 20]}"


def read_sites(
    path: str | Path, *, size: int, resolution: float = 10.0, id_column: str | None = None
) -> tuple[Site, ...]:
    """Read points and make a site of each.

    Parameters
    ----------
    path
        GeoPackage, GeoJSON, shapefile or GeoParquet of points; or CSV with the columns ``lon``
        and ``lat`` (degrees).
    id_column
        Column of the ids; by default ``id`` where there is one, else the sites are numbered.

    Raises
    ------
    MissingFileError, InputError
        If there is no such file or column, no point, something other than points, or an id twice.
    """
    check_size(size, resolution)
    points = read_points(path)
    if id_column is not None and id_column not in points.columns:
        raise InputError(
            f"Cannot take the ids from the column {id_column!r} of {path}: it has "
            f"{', '.join(map(str, points.columns.drop('geometry'))) or 'no columns'}. Name one of "
            "these with --id-column, or leave it out to number the sites."
        )
    column = id_column or ("id" if "id" in points.columns else None)
    width = max(len(str(len(points))), 4)
    names = (
        [_text(value) for value in points[column]]
        if column is not None
        else [f"site-{number:0{width}d}" for number in range(1, len(points) + 1)]
    )
    twice = sorted({name for name in names if names.count(name) > 1}) if _repeats(names) else []
    if twice or "" in names:
        raise InputError(
            f"Cannot use the ids of the column {column!r} of {path}: "
            f"{f'{twice[0]!r} stands more than once' if twice else 'some are empty'}, but every "
            "site needs an id of its own. Correct them, or choose another --id-column."
        )
    return tuple(
        place_site(name, point.x, point.y, size=size, resolution=resolution)
        for name, point in zip(names, points.geometry, strict=True)
    )


def read_points(path: str | Path) -> geopandas.GeoDataFrame:
    """Read a table of points, in lon/lat."""
    import geopandas
    import pyogrio

    path = Path(path)
    if not path.exists():
        raise MissingFileError(
            f"Cannot read the sites {path}: there is no such file. Check --sites, or propose "
            "points with 'stcln-geo archive sample'."
        )
    try:
        if path.suffix.lower() == ".csv":
            table = _from_csv(path)
        elif is_geoparquet(path):
            table = geopandas.read_parquet(path)
        else:
            table = geopandas.read_file(path, layer=choose_layer(path))
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"Cannot read the sites {path}: {error}. It must be points as GeoPackage, GeoJSON, "
            "GeoParquet, or CSV with the columns lon and lat."
        ) from error
    if not isinstance(table, geopandas.GeoDataFrame):
        raise InputError(
            f"Cannot read the sites {path}: it is a table without geometry. It must be points as "
            "GeoPackage, GeoJSON, GeoParquet, or CSV with the columns lon and lat."
        )
    if "geometry" not in table.columns:
        table = table.rename_geometry("geometry")
    if not len(table):
        raise InputError(
            f"Cannot make an archive of {path}: it holds no point. Give at least one site."
        )
    if table.crs is None:
        raise InputError(
            f"Cannot place the sites of {path}: the file names no CRS. Assign it, for example with "
            f"'ogr2ogr -a_srs EPSG:4326 fixed.gpkg {path.name}'."
        )
    kinds = sorted({str(kind) for kind in table.geometry.geom_type})
    if kinds != ["Point"] or table.geometry.is_empty.any():
        raise InputError(
            f"Cannot use {path} as sites: it holds {', '.join(kinds)}, but a site is one point, "
            "the centre of its square. Give points, for example the centroids."
        )
    return table.to_crs(LONLAT)


def _from_csv(path: Path) -> Any:
    import geopandas
    import pandas

    try:
        # As text: an id may be 0012, or NA for Namibia.
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])
    except pandas.errors.EmptyDataError:
        table = pandas.DataFrame(columns=["lon", "lat"])
    names = {str(name).strip().lower(): name for name in table.columns}
    lon = next((names[name] for name in _LON if name in names), None)
    lat = next((names[name] for name in _LAT if name in names), None)
    if lon is None or lat is None:
        raise InputError(
            f"Cannot find the points of {path}: it has the columns "
            f"{', '.join(map(str, table.columns))}, but needs lon and lat in degrees. Rename them."
        )
    values = table[[lon, lat]].apply(pandas.to_numeric, errors="coerce")
    if values.isna().any(axis=None):
        row = int(np.flatnonzero(values.isna().any(axis=1).to_numpy())[0]) + 1
        raise InputError(
            f"Cannot read point {row} of {path}: its {lon} or {lat} is not a number. Correct it."
        )
    points = geopandas.points_from_xy(values[lon], values[lat])
    return geopandas.GeoDataFrame(table, geometry=points, crs=LONLAT)


def _text(value: Any) -> str:
    """Return an id as text; whole numbers that a table holds as floats lose their point."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or value != value else str(value).strip()


def _repeats(names: Sequence[str]) -> bool:
    return len(set(names)) < len(names)


@lru_cache(maxsize=128)
def _to_utm(crs: str) -> Any:
    from pyproj import Transformer

    return Transformer.from_crs(LONLAT, crs, always_xy=True)
