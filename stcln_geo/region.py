"""The area of interest: a geometry, and how it was given."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .antimeridian import cut_at_antimeridian, split_at_antimeridian, wrapped
from .errors import InputError, MissingFileError, StclnGeoWarning
from .grid import utm_zone_bounds, utm_zones

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

__all__ = ["LONLAT", "Region", "choose_layer", "footprint", "is_geoparquet", "spatial_layers"]

LONLAT = "EPSG:4326"

_WIDEST_CROSSING = 180.0
"""Wider than this (degrees) a box with west > east is a mistake, not a crossing."""
_METRES_PER_DEGREE = 111_000.0
"""A little less than there are, so that a margin is never too small."""

_EDGE_POINTS = 16
_EDGE_DEGREES = 0.005
_EDGE_METRES = 2000.0
"""Edges are split to these lengths before they are projected, so that they bend as they should."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """An area of interest.

    Parameters
    ----------
    geometry
        Polygon or multipolygon in lon/lat (EPSG:4326, degrees).
    source
        How it was given, for messages and provenance.
    native, native_crs
        The geometry as given, where it was given in another CRS: exact there.
    """

    geometry: BaseGeometry
    source: str
    native: BaseGeometry | None = None
    native_crs: str | None = None

    def __post_init__(self) -> None:
        """Check that the geometry is an area on the globe."""
        if self.geometry.is_empty or self.geometry.area <= 0:
            raise InputError(
                f"Cannot use the region of {self.source}: it is empty or has no area. "
                "Give polygons, not points or lines."
            )
        west, south, east, north = self.geometry.bounds
        if west < -180 or east > 180 or south < -90 or north > 90:
            raise InputError(
                f"Cannot use the region of {self.source}: its bounds {west:g}, {south:g}, "
                f"{east:g}, {north:g} leave the range of longitude (-180 to 180) and latitude "
                "(-90 to 90). Give degrees, in the order west, south, east, north; a file in "
                "metres must name its CRS."
            )

    @classmethod
    def from_bbox(cls, bbox: Sequence[float] | str) -> Region:
        """Return the region of west, south, east, north in degrees.

        Parameters
        ----------
        bbox
            Four numbers, or a text ``W,S,E,N``. Where the box crosses the antimeridian west is
            greater than east, or longitudes go on beyond 180; it is then split there.
        """
        from shapely.geometry import MultiPolygon, box

        parts = bbox.split(",") if isinstance(bbox, str) else list(bbox)
        try:
            west, south, east, north = (float(part) for part in parts)
        except ValueError as error:
            raise InputError(
                f"Cannot read the bounding box {bbox!r}: it must be four numbers W,S,E,N in "
                "degrees, as in --bbox 4.0,50.7,4.2,50.8."
            ) from error
        crosses = -180 <= east < west <= 180 and east + 360 - west < _WIDEST_CROSSING
        if not ((west < east or crosses) and south < north):
            raise InputError(
                f"Cannot use the bounding box {west:g},{south:g},{east:g},{north:g}: west must be "
                "less than east and south less than north (only a box across the antimeridian, at "
                "most 180 degrees wide, has west greater than east). Give it in the order W,S,E,N."
            )
        halves = [box(west, south, 180, north), box(-180, south, east, north)]
        parts_of_area = [half for half in halves if half.area > 0]
        whole = MultiPolygon(parts_of_area) if crosses else wrapped(box(west, south, east, north))
        return cls(
            geometry=whole,
            source=f"the bounding box {west:g},{south:g},{east:g},{north:g}",
        )

    @classmethod
    def from_file(cls, path: str | Path) -> Region:
        """Return the union of all polygons of a vector file.

        Polygons across the antimeridian are split there, however they are drawn: those that go on
        beyond 180 degrees, and those whose edges jump from one side to the other, with a warning.

        Raises
        ------
        MissingFileError
            If there is no such file.
        InputError
            If it cannot be read, has several layers, no CRS or no area.
        """
        import geopandas
        import pyarrow
        import pyogrio

        path = Path(path)
        if not path.exists():
            raise MissingFileError(
                f"Cannot read the region {path}: there is no such file. Check --region."
            )
        try:
            if is_geoparquet(path):
                layers, table = [path.stem], geopandas.read_parquet(path)
            else:
                layers = spatial_layers(path)
                one = layers[0] if layers else None  # a table without geometry is named below
                table = geopandas.read_file(path, layer=one) if len(layers) < 2 else None
        except (
            pyogrio.errors.DataSourceError,
            pyogrio.errors.DataLayerError,
            pyarrow.ArrowException,
            OSError,
            ValueError,
        ) as error:
            raise InputError(
                f"Cannot read the region {path}: {error}. It must be a vector file such as "
                "GeoJSON, GeoPackage or GeoParquet."
            ) from error
        if table is None:
            raise InputError(
                f"Cannot choose a layer of {path}: those with geometry are {', '.join(layers)}. "
                f"Give a file with one, for example made with 'ogr2ogr one.gpkg {path.name} "
                f"{layers[0]}'."
            )
        if not isinstance(table, geopandas.GeoDataFrame):
            raise InputError(
                f"Cannot read the region {path}: it is a table without geometry (columns: "
                f"{', '.join(map(str, table.columns))}). Give a vector file of polygons, such as "
                "GeoJSON or GeoPackage."
            )
        if table.crs is None:
            raise InputError(
                f"Cannot place the region {path}: the file names no CRS. Assign it, for example "
                f"with 'ogr2ogr -a_srs EPSG:32631 fixed.gpkg {path.name}'."
            )
        shapes = table.geometry
        parts = shapes[~(shapes.isna() | shapes.is_empty)].to_numpy()
        crs = _crs_name(table.crs)
        split = (
            [split_at_antimeridian(part) for part in parts] if table.crs.is_geographic else parts
        )
        if any(new is not old and _is_wide(old) for new, old in zip(split, parts, strict=True)):
            warnings.warn(
                f"The region {path} has an edge over more than 180 degrees of longitude. It is "
                "taken to cross the antimeridian, the short way. Split the polygon there, or give "
                "a region that reaches around the Earth by --bbox.",
                StclnGeoWarning,
                stacklevel=2,
            )
        geometry = _area_of(split)
        lonlat = geometry if crs == LONLAT else _to_lonlat(geometry, crs)
        native = (None, None) if crs == LONLAT else (geometry, crs)
        return cls(geometry=lonlat, source=str(path), native=native[0], native_crs=native[1])

    @classmethod
    def from_projected(cls, geometry: BaseGeometry, crs: str, *, source: str) -> Region:
        """Return the region of a geometry in a projected CRS, which stays exact there."""
        return cls(
            geometry=_to_lonlat(geometry, crs),
            source=source,
            native=geometry,
            native_crs=crs,
        )

    @property
    def unwrapped(self) -> BaseGeometry:
        """The lon/lat geometry in one piece: east of the antimeridian longitudes go on over 180."""
        from shapely import box, union_all
        from shapely.affinity import translate

        west, _, east, _ = self.geometry.bounds
        if west > -180 or east < 180:
            return self.geometry
        eastern = self.geometry.intersection(box(0, -90, 180, 90))
        western = self.geometry.intersection(box(-180, -90, 0, 90))
        joined: BaseGeometry = union_all([eastern, translate(western, xoff=360)])
        # What spans the whole Earth is one piece already.
        return joined if joined.bounds[2] - joined.bounds[0] < east - west else self.geometry

    @property
    def bbox(self) -> list[float]:
        """West, south, east, north (degrees), as GeoJSON has it: across 180 degrees W > E."""
        west, south, east, north = self.unwrapped.bounds
        return [west, south, east - 360 if east > 180 else east, north]

    @property
    def centre(self) -> tuple[float, float]:
        """Longitude (-180 to 180) and latitude of the centre, in degrees."""
        point = self.unwrapped.centroid
        return (point.x + 180) % 360 - 180, point.y

    def to_crs(self, crs: str) -> BaseGeometry:
        """Return the geometry in a CRS, exactly as given where that is the CRS it came in."""
        if crs == LONLAT:
            return self.geometry
        if self.native is not None and crs == self.native_crs:
            return self.native
        return _transformed(self.geometry, LONLAT, crs, edge=_EDGE_DEGREES)

    def by_utm_zone(self, *, margin: float) -> dict[str, Region]:
        """Return the region's part in each UTM zone, the western first, by ``EPSG:32xxx``.

        Parameters
        ----------
        margin
            How far (metres) a part reaches beyond what its zone owns, so that neighbouring parts
            overlap.
        """
        from shapely.geometry import box

        zones = utm_zones(self.geometry)
        if len(zones) == 1:
            # Nothing is cut, so what was given in metres stays exact.
            return {zones[0]: self}
        parts = {}
        _, south, _, north = self.geometry.bounds
        shrink = math.cos(math.radians(min(max(abs(south), abs(north)), 85.0)))
        for zone in zones:
            west, bottom, east, top = utm_zone_bounds(zone)
            aside, along = margin / (_METRES_PER_DEGREE * shrink), margin / _METRES_PER_DEGREE
            band = box(west - aside, bottom - along, east + aside, top + along)
            parts[zone] = Region(
                geometry=_area_of([self.geometry.intersection(band)]),
                source=f"the part of {self.source} in {zone}",
            )
        return parts

    def to_json(self) -> dict[str, Any]:
        """Return the lon/lat geometry as GeoJSON."""
        from shapely.geometry import mapping

        geometry: dict[str, Any] = mapping(self.geometry)
        return geometry


def choose_layer(path: Path, layer: str | None = None) -> str | None:
    """Return the layer of a vector file to read: the one named, else the first with geometry.

    Tables without geometry do not count, such as the ``layer_styles`` that QGIS stores. Of several
    layers a `StclnGeoWarning` says which is read. None where no layer has a geometry: the reader
    then says what the file holds instead.
    """
    if layer is not None:
        return layer
    layers = spatial_layers(path)
    if len(layers) > 1:
        warnings.warn(
            f"{path} has {len(layers)} layers: {', '.join(layers)}. The first is read; name "
            "another with --layer, or make a file of it alone.",
            StclnGeoWarning,
            stacklevel=3,
        )
    return layers[0] if layers else None


def spatial_layers(path: Path) -> list[str]:
    """Return the names of the layers of a vector file that have a geometry, in its order."""
    import pyogrio

    return [str(name) for name, kind in pyogrio.list_layers(path) if kind is not None]


def is_geoparquet(path: Path) -> bool:
    """Return True where a vector file is GeoParquet by its name, which GDAL may not read."""
    return path.suffix.lower() in {".parquet", ".geoparquet"}


def footprint(geobox: GeoBox) -> BaseGeometry:
    """Return the outline of a grid in lon/lat (OGC:CRS84), cut in two at the antimeridian.

    Edges have 16 points each, since they bend when they leave their CRS.
    """
    from shapely.geometry import box

    bounds = geobox.boundingbox
    outline = box(bounds.left, bounds.bottom, bounds.right, bounds.top)
    edge = max(bounds.right - bounds.left, bounds.top - bounds.bottom) / _EDGE_POINTS
    return cut_at_antimeridian(_transformed(outline, str(geobox.crs), LONLAT, edge=edge))


def _to_lonlat(geometry: BaseGeometry, crs: str) -> BaseGeometry:
    """Return a geometry of any CRS in lon/lat, its edges bent, cut in two at the antimeridian."""
    import shapely
    from pyproj import CRS

    known = CRS(crs)
    edge = None
    if known.is_projected:
        edge = _EDGE_METRES / known.axis_info[0].unit_conversion_factor
    moved = _transformed(geometry, crs, LONLAT, edge=edge)
    west, _, east, _ = moved.bounds
    if not np.isfinite(moved.bounds).all() or east - west <= _WIDEST_CROSSING:
        return moved
    return _area_of([cut_at_antimeridian(part) for part in shapely.get_parts(moved)])


def _is_wide(geometry: BaseGeometry) -> bool:
    """Return True where a geometry in lon/lat fits on the globe as it is drawn, the long way."""
    west, _, east, _ = geometry.bounds
    return bool(west >= -180 and east <= 180)


def _area_of(geometries: Any) -> BaseGeometry:
    """Return the union of the polygons of a column, repaired where they cross themselves."""
    import shapely
    from shapely.geometry import MultiPolygon

    union = shapely.union_all(shapely.make_valid(np.asarray(geometries)))
    parts = shapely.get_parts(union, return_index=False)
    polygons = [part for part in shapely.get_parts(parts) if part.geom_type == "Polygon"]
    return polygons[0] if len(polygons) == 1 else MultiPolygon(polygons)


def _crs_name(crs: Any) -> str:
    code = crs.to_epsg()
    return f"EPSG:{code}" if code is not None else str(crs.to_wkt())


def _transformed(
    geometry: BaseGeometry, source: str, target: str, *, edge: float | None = None
) -> BaseGeometry:
    import shapely
    from pyproj import Transformer

    transformer = Transformer.from_crs(source, target, always_xy=True)
    dense = shapely.segmentize(geometry, edge) if edge is not None else geometry

    def move(points: np.ndarray) -> np.ndarray:
        return np.column_stack(transformer.transform(points[:, 0], points[:, 1]))

    moved: BaseGeometry = shapely.transform(dense, move)
    return moved
