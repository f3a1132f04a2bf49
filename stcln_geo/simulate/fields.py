"""Lay out a farm landscape: parishes, the fields in them, roads, woods and villages.

The land is cut into parishes (the Voronoi cells of a jittered grid of points), each parish into
rows of fields along a direction of its own. All of it is plain geometry in metres that follows
from the seed and the place, so any block can be drawn alone, and the polygons of the parcels are
the very ones that were drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..grid import Window
from .noise import Floats, UInts, make_key, make_noise, make_uniform, mix, to_uniform
from .phenology import CROPS, EDGE, MEADOW, VILLAGE, WOODS
from .spec import RESOLUTION, SimulationSpec

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    Geometries = NDArray[np.object_]

Point = tuple[float, float]

# Every place is within 1.14 spacings of a point of the jittered grid, and points outside the 24
# around a point are at least 2.4 spacings away, so those 24 decide its cell.
_JITTER = 0.6
_REACH = 2
_FIELDS_ACROSS = 4.0
_MARGIN = 2.5
_UNDECLARED = 0.05
_CACHED_BLOCKS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Parish:
    """One Voronoi cell: its ground and its fields."""

    row: int
    col: int
    """Indices of the point in the jittered grid, counted northwards and eastwards."""
    key: int
    ground: BaseGeometry
    """The cell without half the width of the roads around it, in metres."""
    cover: int
    """Cover of the ground outside the fields, an index into `phenology.COVERS`."""
    fields: Geometries
    """(F,) polygons in metres."""
    ranks: NDArray[np.float64]
    """(F,) in [0, 1): what is grown follows from it; spread evenly within a parish."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Surfaces:
    """Everything homogeneous in a block: entry 0 is roads and hedges, then grounds and fields."""

    covers: NDArray[np.uint8]
    """(S, seasons + 1) index into `phenology.COVERS`; column 0 is the season before the first."""
    keys: UInts
    """(S,) what is random about a surface follows from its key."""
    declared: NDArray[np.bool_]
    """(S,) True where the surface is a field with a known crop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landscape:
    """One block of the land, drawn in pixels of 10 m."""

    window: Window
    surfaces: Surfaces
    ids: NDArray[np.int32]
    """(H, W) index into the surfaces."""
    vigour: Floats
    """(H, W) smooth texture of growth, mean 0, deviation about 1."""
    soil: Floats
    """(H, W) smooth texture of the soil, mean 0, deviation about 1."""

    def crops(self, season: int) -> NDArray[np.uint8]:
        """Draw the declared crops of a season: (H, W) uint8, index into `CROPS`; 255 elsewhere."""
        table = self.surfaces.covers[:, season + 1].copy()
        table[~self.surfaces.declared] = 255
        drawn: NDArray[np.uint8] = table[self.ids]
        return drawn


def make_parish(spec: SimulationSpec, row: int, col: int) -> Parish:
    """Make one parish from the seed and its indices."""
    return _make_parish(spec.seed, spec.field_pixels, row, col)


def parishes_in(
    spec: SimulationSpec, bounds: tuple[float, float, float, float]
) -> list[tuple[int, int]]:
    """List the parishes that can meet bounds in metres (west, south, east, north)."""
    spacing = _spacing(spec.field_pixels)
    west, south, east, north = (int(np.floor(bound / spacing)) for bound in bounds)
    return [(row, col) for row in range(south - 1, north + 2) for col in range(west - 1, east + 2)]


@lru_cache(maxsize=_CACHED_BLOCKS)
def make_landscape(spec: SimulationSpec, window: Window) -> Landscape:
    """Draw the land of an absolute window; the last few blocks are kept.

    Parameters
    ----------
    spec : SimulationSpec
        Only the seed, the field size and the number of seasons matter.
    window : Window
        Absolute pixels of 10 m.
    """
    from rasterio.features import rasterize
    from rasterio.transform import from_origin

    west, north = window.col * RESOLUTION, -window.row * RESOLUTION
    bounds = (west, north - window.height * RESOLUTION, west + window.width * RESOLUTION, north)
    parishes = [make_parish(spec, row, col) for row, col in parishes_in(spec, bounds)]

    shapes: list[tuple[BaseGeometry, int]] = []
    ranks: list[float] = [0.0]
    covers: list[int] = [EDGE]
    keys: list[int] = [make_key(spec.seed, 41)]
    for parish in parishes:
        for number, shape in enumerate([parish.ground, *parish.fields]):
            shapes.append((shape, len(keys)))
            keys.append(make_key(parish.key, 43, number))
            covers.append(parish.cover if number == 0 else -1)
            ranks.append(0.0 if number == 0 else float(parish.ranks[number - 1]))

    shape_yx = (window.height, window.width)
    ids = rasterize(
        shapes,
        out_shape=shape_yx,
        transform=from_origin(west, north, RESOLUTION, RESOLUTION),
        dtype="int32",
    )
    surfaces = _make_surfaces(
        spec, np.array(keys, dtype=np.uint32), np.array(ranks), np.array(covers)
    )
    return Landscape(
        window=window,
        surfaces=surfaces,
        ids=ids,
        vigour=make_noise(
            window, cells=(23, 11, 5), weights=(1.0, 0.6, 0.4), key=make_key(spec.seed, 47)
        ),
        soil=make_noise(
            window, cells=(31, 7, 2), weights=(1.0, 0.6, 0.6), key=make_key(spec.seed, 53)
        ),
    )


def choose_crops(ranks: NDArray[np.float64], keys: UInts, *, season: int) -> NDArray[np.uint8]:
    """Choose what is grown: grassland stays, the other crops rotate from season to season.

    Parameters
    ----------
    ranks : (F,) float64 in [0, 1).
    keys : (F,) uint32.
    season : int
        Calendar year in which the season starts.

    Returns
    -------
    (F,) uint8, an index into `CROPS`.
    """
    shares = np.array([crop.share for crop in CROPS])
    shares = shares / shares.sum()
    permanent = [index for index, crop in enumerate(CROPS) if crop.permanent]
    rotating = [index for index, crop in enumerate(CROPS) if not crop.permanent]
    grass = float(shares[permanent].sum())

    # Low ranks are grassland in every season; the others move along a circle of their own.
    along = (ranks - grass) / (1 - grass)
    along = (along + 0.381966 * season + 0.02 * to_uniform(mix(keys, make_key(59, season)))) % 1.0
    edges = np.cumsum(shares[rotating] / (1 - grass))
    chosen = np.array(rotating)[
        np.minimum(np.searchsorted(edges, along, side="right"), len(rotating) - 1)
    ]
    return np.where(ranks < grass, permanent[0], chosen).astype(np.uint8)


def is_declared(keys: UInts) -> NDArray[np.bool_]:
    """Say which fields have a known crop: (F,) bool, True for nearly all."""
    declared: NDArray[np.bool_] = to_uniform(mix(keys, 61)) >= _UNDECLARED
    return declared


def _make_surfaces(
    spec: SimulationSpec, keys: UInts, ranks: NDArray[np.float64], covers: NDArray[np.int64]
) -> Surfaces:
    is_field = covers < 0
    by_season = np.repeat(covers[:, np.newaxis], spec.seasons + 1, axis=1)
    for column in range(spec.seasons + 1):
        year = spec.start_year - 1 + column
        by_season[is_field, column] = choose_crops(ranks[is_field], keys[is_field], season=year)
    return Surfaces(
        covers=by_season.astype(np.uint8), keys=keys, declared=is_field & is_declared(keys)
    )


def _spacing(field_pixels: int) -> float:
    return _FIELDS_ACROSS * RESOLUTION * float(np.sqrt(field_pixels))


@lru_cache(maxsize=4_000)
def _make_parish(seed: int, field_pixels: int, row: int, col: int) -> Parish:
    import shapely

    key = make_key(seed, 31, row, col)
    road = (2.0, 3.0, 6.0)[int(make_uniform(key, 1) * 3)]
    ground = shapely.Polygon(
        _voronoi_cell(seed, row, col, spacing=_spacing(field_pixels), road=road)
    )
    draw = make_uniform(key, 2)
    wild = WOODS if draw < 0.09 else VILLAGE if draw < 0.125 else None
    boxes = [] if wild is not None else _field_boxes(seed, field_pixels, row, col)
    fields = np.empty(0, dtype=object)
    if boxes:
        cut: Geometries = np.asarray(
            shapely.intersection(shapely.polygons(np.array(boxes)), ground)
        )
        smallest = 0.22 * field_pixels * RESOLUTION**2
        # A strip thinner than about 40 m holds hardly a pure pixel of 20 m: it stays meadow.
        thick = shapely.area(shapely.buffer(cut, -20.0)) > 0
        fields = cut[(shapely.area(cut) > smallest) & thick]
    golden = 0.6180339887498949
    return Parish(
        row=row,
        col=col,
        key=key,
        ground=ground,
        cover=MEADOW if wild is None else wild,
        fields=fields,
        ranks=(make_uniform(key, 3) + golden * np.arange(len(fields), dtype=np.float64)) % 1.0,
    )


def _site(seed: int, row: int, col: int, spacing: float) -> Point:
    key = make_key(seed, 37, row, col)
    x = col + 0.5 + _JITTER * (make_uniform(key, 1) - 0.5)
    y = row + 0.5 + _JITTER * (make_uniform(key, 2) - 0.5)
    return x * spacing, y * spacing


def _voronoi_cell(seed: int, row: int, col: int, *, spacing: float, road: float) -> list[Point]:
    x, y = _site(seed, row, col, spacing)
    far = 2 * _REACH * spacing
    corners = [(x - far, y - far), (x + far, y - far), (x + far, y + far), (x - far, y + far)]
    for other_row in range(row - _REACH, row + _REACH + 1):
        for other_col in range(col - _REACH, col + _REACH + 1):
            if (other_row, other_col) == (row, col):
                continue
            other_x, other_y = _site(seed, other_row, other_col, spacing)
            distance = float(np.hypot(other_x - x, other_y - y))
            direction = ((other_x - x) / distance, (other_y - y) / distance)
            corners = _clip(corners, (x, y), direction, distance / 2 - road)
    return corners


def _clip(corners: list[Point], origin: Point, direction: Point, reach: float) -> list[Point]:
    """Keep the part of a convex polygon within `reach` of the origin along a direction."""
    beyond = [
        (x - origin[0]) * direction[0] + (y - origin[1]) * direction[1] - reach for x, y in corners
    ]
    if max(beyond) <= 0:
        return corners
    kept: list[Point] = []
    for index, corner in enumerate(corners):
        before = index - 1
        if (beyond[before] > 0) != (beyond[index] > 0):
            part = beyond[before] / (beyond[before] - beyond[index])
            start = corners[before]
            kept.append(
                (start[0] + part * (corner[0] - start[0]), start[1] + part * (corner[1] - start[1]))
            )
        if beyond[index] <= 0:
            kept.append(corner)
    return kept


def _field_boxes(seed: int, field_pixels: int, row: int, col: int) -> list[list[Point]]:
    """List the rectangles of a parish's fields, before they are cut by its borders."""
    key = make_key(seed, 67, row, col)
    centre_x, centre_y = _site(seed, row, col, _spacing(field_pixels))
    angle = make_uniform(key, 1) * np.pi
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    side = RESOLUTION * float(np.sqrt(field_pixels)) * 1.26
    stretch = 0.75 + 0.5 * make_uniform(key, 2)
    across, along = side * stretch, side / stretch
    reach = int(np.ceil(1.2 * _spacing(field_pixels) / min(across, along))) + 1

    boxes: list[list[Point]] = []
    for strip in range(-reach, reach):
        bottom, top = (_cut(key, 5, at, across) for at in (strip, strip + 1))
        for part in range(-reach, reach):
            left, right = (_cut(key, 100 + strip, at, along) for at in (part, part + 1))
            edges = (left + _MARGIN, bottom + _MARGIN, right - _MARGIN, top - _MARGIN)
            corners = [(edges[a], edges[b]) for a, b in ((0, 1), (2, 1), (2, 3), (0, 3))]
            boxes.append(
                [(centre_x + u * cos - v * sin, centre_y + u * sin + v * cos) for u, v in corners]
            )
    return boxes


def _cut(key: int, line: int, index: int, step: float) -> float:
    return (index + 0.5 * (make_uniform(key, line, index) - 0.5)) * step
