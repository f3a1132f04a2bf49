"""Pixels, windows and the window lattice.

Absolute pixels count from the origin of the CRS: ``col = x / resolution`` to the east and
``row = -y / resolution`` to the south. Cubes, shards and windows of one CRS and resolution
therefore share one numbering, whoever built them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import InputError

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "SNAP_METRES",
    "Lattice",
    "Window",
    "absolute_window",
    "bounds_window",
    "crop_geobox",
    "geobox_from_window",
    "snapped_geobox",
    "tiles",
    "utm_crs",
    "utm_zone_at",
    "utm_zone_bounds",
    "utm_zones",
]

SNAP_METRES = 60.0
"""Grids start at multiples of this, the coarsest Sentinel-2 pixel (metres)."""

_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of pixels; rows run south, columns run east.

    Parameters
    ----------
    row, col
        First row and first column (pixels).
    height, width
        Extent (pixels); a window without pixels has a height or width of 0 or less.
    """

    row: int
    col: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.height} x {self.width} px at row {self.row}, column {self.col}"

    @property
    def rows(self) -> slice:
        """Rows as a slice; meaningful when ``row`` is not negative."""
        return slice(self.row, self.row + self.height)

    @property
    def cols(self) -> slice:
        """Columns as a slice; meaningful when ``col`` is not negative."""
        return slice(self.col, self.col + self.width)

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Height and width (pixels)."""
        return self.height, self.width

    @property
    def area(self) -> int:
        """Number of pixels, 0 if empty."""
        return max(self.height, 0) * max(self.width, 0)

    @property
    def is_empty(self) -> bool:
        """True where the window holds no pixel."""
        return self.height <= 0 or self.width <= 0

    def intersection(self, other: Window) -> Window:
        """Return the pixels both windows hold (possibly an empty window)."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        bottom = min(self.row + self.height, other.row + other.height)
        right = min(self.col + self.width, other.col + other.width)
        return Window(row, col, max(bottom - row, 0), max(right - col, 0))

    def union(self, other: Window) -> Window:
        """Return the smallest window that contains both."""
        row, col = min(self.row, other.row), min(self.col, other.col)
        bottom = max(self.row + self.height, other.row + other.height)
        right = max(self.col + self.width, other.col + other.width)
        return Window(row, col, bottom - row, right - col)

    def expand(self, pixels: int) -> Window:
        """Return the window grown by ``pixels`` on each side."""
        return Window(
            self.row - pixels, self.col - pixels, self.height + 2 * pixels, self.width + 2 * pixels
        )

    def shift(self, rows: int, cols: int) -> Window:
        """Return the window moved south by ``rows`` and east by ``cols`` pixels."""
        return Window(self.row + rows, self.col + cols, self.height, self.width)

    def relative_to(self, origin: Window) -> Window:
        """Return the window counted from the first pixel of ``origin``."""
        return self.shift(-origin.row, -origin.col)

    def contains(self, other: Window) -> bool:
        """Return True where every pixel of ``other`` lies in this window."""
        return self.intersection(other) == other


@dataclass(frozen=True, slots=True, kw_only=True)
class Lattice:
    """All windows of a CRS: squares with a core that owns pixels and a halo of context.

    The cores are the squares of side ``stride`` whose corners lie at multiples of ``stride``
    in absolute pixels. They partition the plane, so each pixel is owned by exactly one
    window, whatever region, cube, shard or worker asks.

    Parameters
    ----------
    window
        Side of the square the network sees (pixels).
    halo
        Context pixels on each side that the window sees but does not own.
    """

    window: int = 32
    halo: int = 4

    def __post_init__(self) -> None:
        """Check that a core is left."""
        if self.halo < 0 or self.window - 2 * self.halo < 1:
            raise InputError(
                f"Cannot lay windows of {self.window} px with a halo of {self.halo} px: the core, "
                "window - 2 x halo, must be at least 1 px. Choose a larger window or smaller halo."
            )

    @property
    def stride(self) -> int:
        """Side of a core (pixels)."""
        return self.window - 2 * self.halo

    def cores(self, area: Window) -> list[Window]:
        """Return the whole cores that meet an absolute area, row by row."""
        if area.is_empty:
            return []
        whole = self._whole_cores(area)
        return [
            Window(row, col, self.stride, self.stride)
            for row in range(whole.row, whole.row + whole.height, self.stride)
            for col in range(whole.col, whole.col + whole.width, self.stride)
        ]

    def window_of(self, core: Window) -> Window:
        """Return what the network sees to label a core."""
        return core.expand(self.halo)

    def cover(self, area: Window) -> Window:
        """Return what must be read to label an absolute area: its cores and their halo."""
        return self._whole_cores(area).expand(self.halo)

    def _whole_cores(self, area: Window) -> Window:
        row = math.floor(area.row / self.stride) * self.stride
        col = math.floor(area.col / self.stride) * self.stride
        bottom = math.ceil((area.row + area.height) / self.stride) * self.stride
        right = math.ceil((area.col + area.width) / self.stride) * self.stride
        return Window(row, col, bottom - row, right - col)


def absolute_window(geobox: GeoBox) -> Window:
    """Return a grid's place in the absolute pixels of its CRS.

    Raises
    ------
    InputError
        If the grid is rotated, has rectangular pixels, or does not start at a whole pixel.
    """
    affine = geobox.affine
    resolution = float(affine.a)
    if affine.b or affine.d or resolution <= 0 or not math.isclose(affine.e, -resolution):
        raise InputError(
            f"Cannot place the grid with transform {tuple(affine)[:6]}: grids are north-up with "
            "square pixels. Reproject the data first, for example with rioxarray's reproject."
        )
    col, row = affine.c / resolution, -affine.f / resolution
    if abs(col - round(col)) > 1e-3 or abs(row - round(row)) > 1e-3:
        raise InputError(
            f"Cannot place the grid with origin ({affine.c}, {affine.f}): it must be a multiple of "
            f"the {resolution:g} m pixel, so that neighbouring cubes agree. Shift or resample the "
            "data to such a grid first."
        )
    return Window(round(row), round(col), int(geobox.shape[0]), int(geobox.shape[1]))


def geobox_from_window(window: Window, *, crs: Any, resolution: float) -> GeoBox:
    """Return the grid of an absolute window."""
    from affine import Affine
    from odc.geo.geobox import GeoBox

    affine = Affine(
        resolution, 0.0, window.col * resolution, 0.0, -resolution, -window.row * resolution
    )
    return GeoBox(window.shape_yx, affine, crs)


def snapped_geobox(
    geometry: Any,
    *,
    crs: Any,
    resolution: float,
    lattice: Lattice,
    snap: float = SNAP_METRES,
) -> GeoBox:
    """Return the grid that holds every window needed to label a geometry.

    Parameters
    ----------
    geometry
        Shapely geometry in ``crs``; its bounding box counts.
    resolution
        Pixel size (units of the CRS).
    snap
        The grid's edges lie at multiples of this (units of the CRS) where it is a multiple of
        the resolution; else at whole pixels.
    """
    left, bottom, right, top = geometry.bounds
    if not (right > left and top > bottom):
        raise InputError(
            f"Cannot lay a grid over the bounds {geometry.bounds}: they have no area. "
            "Give a region with an area."
        )
    area = bounds_window((left, bottom, right, top), resolution=resolution)
    cover = lattice.cover(area)
    step = round(snap / resolution)
    if step < 1 or abs(step * resolution - snap) > _TOLERANCE * snap:
        step = 1
    row = math.floor(cover.row / step) * step
    col = math.floor(cover.col / step) * step
    end_row = math.ceil((cover.row + cover.height) / step) * step
    end_col = math.ceil((cover.col + cover.width) / step) * step
    return geobox_from_window(
        Window(row, col, end_row - row, end_col - col), crs=crs, resolution=resolution
    )


def bounds_window(bounds: tuple[float, float, float, float], *, resolution: float) -> Window:
    """Return the absolute pixels that bounds (left, bottom, right, top) touch."""
    left, bottom, right, top = bounds
    row = math.floor(-top / resolution + _TOLERANCE)
    col = math.floor(left / resolution + _TOLERANCE)
    end_row = math.ceil(-bottom / resolution - _TOLERANCE)
    end_col = math.ceil(right / resolution - _TOLERANCE)
    return Window(row, col, max(end_row - row, 1), max(end_col - col, 1))


def crop_geobox(geobox: GeoBox, window: Window) -> GeoBox:
    """Return the part of a grid that a window, counted from its first pixel, covers.

    The window may reach beyond the grid.
    """
    from affine import Affine
    from odc.geo.geobox import GeoBox

    affine = geobox.affine
    left = affine.c + window.col * affine.a
    top = affine.f + window.row * affine.e
    return GeoBox(window.shape_yx, Affine(affine.a, 0.0, left, 0.0, affine.e, top), geobox.crs)


def utm_crs(geometry: Any) -> str:
    """Return the UTM zone, as ``EPSG:32xxx``, of a lon/lat geometry's centre.

    Longitudes may go on beyond 180, as those of a region across the antimeridian.
    """
    centre = geometry.centroid
    longitude = centre.x - 360 if centre.x > 180 + _TOLERANCE else centre.x
    return utm_zone_at(longitude, centre.y)


def utm_zone_at(lon: float, lat: float) -> str:
    """Return the UTM zone that owns a place: the one rule for all zone questions.

    Zones are bands of 6 degrees that own their western edge, and 180 E belongs to zone 60; the
    equator belongs to the north. The wider and narrower zones of Norway and Svalbard are not
    followed.

    Examples
    --------
    >>> utm_zone_at(5.999, 50.0), utm_zone_at(6.0, 50.0), utm_zone_at(6.0, -0.001)
    ('EPSG:32631', 'EPSG:32632', 'EPSG:32732')
    """
    zone = min(max(int((lon + 180) // 6) + 1, 1), 60)
    return f"EPSG:{32600 + zone if lat >= 0 else 32700 + zone}"


def utm_zone_bounds(crs: str) -> tuple[float, float, float, float]:
    """Return west, south, east, north (degrees) of what a zone ``EPSG:32xxx`` owns."""
    code = int(crs.removeprefix("EPSG:"))
    west = (code % 100) * 6.0 - 186.0
    return (west, 0.0, west + 6.0, 90.0) if code < 32700 else (west, -90.0, west + 6.0, 0.0)


def utm_zones(geometry: Any) -> list[str]:
    """Return the zones that own a part, with an area, of a lon/lat geometry; from the west."""
    from shapely.geometry import box

    west, south, east, north = geometry.bounds
    found = []
    for column in range(max(math.floor(west / 6), -30), min(math.ceil(east / 6), 30)):
        for lat, touched in ((1.0, north > 0), (-1.0, south < 0)):
            zone = utm_zone_at(column * 6 + 3.0, lat)
            if touched and geometry.intersection(box(*utm_zone_bounds(zone))).area > 0:
                found.append(zone)
    return found


def tiles(shape_yx: tuple[int, int], size: int) -> list[Window]:
    """Return the squares of a grid, row by row, ragged at the far edges."""
    return list(_iter_tiles(shape_yx, size))


def _iter_tiles(shape_yx: tuple[int, int], size: int) -> Iterator[Window]:
    height, width = shape_yx
    for row in range(0, height, size):
        for col in range(0, width, size):
            yield Window(row, col, min(size, height - row), min(size, width - col))
