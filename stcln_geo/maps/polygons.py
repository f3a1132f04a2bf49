"""Polygons of a class map: one for each 4-connected patch of a class, however the map is read.

The map is read by windows. A patch that meets no window's edge is written at once; the
fragments of the others are held until the sweep has passed them, joined by union-find where two
of one class share pixels' sides across a window's line, and merged. Coordinates are whole
pixels until a polygon is written, so nothing is joined by tolerance.

What grows is the outline of the patches that the sweep has begun and not passed: with the
map's width, and with the size of patches that wind through all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..execution import ProgressHook
from ..grid import Window
from ..legend import CLASS_NODATA
from .classmap import WINDOW, ClassMap, open_class_map
from .vector import check_target, open_writer

if TYPE_CHECKING:
    from geopandas import GeoDataFrame
    from shapely.geometry import Polygon

__all__ = ["Patch", "PolygonReport", "iter_patches", "write_polygons"]

_BATCH = 5000
_NONE = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A 4-connected patch of one class."""

    code: int
    polygon: Polygon
    """In pixels of the map: x to the east, y to the south, whole numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolygonReport:
    """What ``write_polygons`` wrote."""

    path: Path
    polygons: int
    dropped: int
    """Patches smaller than the minimum area."""
    dropped_m2: float
    area_note: str

    def lines(self) -> list[str]:
        """Return the report as lines of text for people."""
        lines = [f"{self.path}: {self.polygons:,} polygons."]
        if self.dropped:
            lines.append(
                f"{self.dropped:,} patches below the minimum area were dropped "
                f"({self.dropped_m2 / 1e4:,.2f} ha)."
            )
        return [*lines, self.area_note]


def write_polygons(
    class_map: ClassMap | str | Path,
    out: str | Path,
    *,
    minimum_area: float = 0.0,
    window: int = WINDOW,
    progress: ProgressHook | None = None,
) -> PolygonReport:
    """Write the patches of a map as polygons with code, class, pixels and area_m2.

    Pixels without a label are not part of any polygon. The order of the rows is not fixed.

    Parameters
    ----------
    out
        ``.gpkg``, ``.parquet`` or ``.geoparquet``.
    minimum_area
        Patches smaller than this (square metres) are left out; nothing is merged into their
        neighbours.
    window
        Side (pixels) of the squares the map is read by; the polygons do not depend on it.
    """
    check_target(out)
    if not minimum_area >= 0:
        raise InputError(
            f"Cannot drop patches below {minimum_area:g} m2: an area is 0 or more. Leave "
            "--minimum-area out to keep all."
        )
    opened = class_map if isinstance(class_map, ClassMap) else open_class_map(class_map)
    measure = _measure(opened)
    dropped, dropped_m2 = 0, 0.0
    with open_writer(out) as writer:
        batch: list[tuple[Patch, float]] = []
        for patch in iter_patches(opened, window=window, progress=progress):
            area = measure(patch.polygon)
            if area < minimum_area:
                dropped, dropped_m2 = dropped + 1, dropped_m2 + area
                continue
            batch.append((patch, area))
            if len(batch) == _BATCH:
                writer.append(_frame(opened, batch))
                batch.clear()
        if batch or not writer.features:
            writer.append(_frame(opened, batch))
    return PolygonReport(
        path=Path(out),
        polygons=writer.features,
        dropped=dropped,
        dropped_m2=dropped_m2,
        area_note=opened.area_note,
    )


def iter_patches(
    class_map: ClassMap, *, window: int = WINDOW, progress: ProgressHook | None = None
) -> Iterator[Patch]:
    """Yield the 4-connected patches of a map, each when the sweep has passed it."""
    squares = class_map.windows(window)
    sweep = _Sweep(class_map.shape_yx)
    with class_map.reader() as reader:
        for done, square in enumerate(squares):
            yield from sweep.add(square, reader.read(square))
            if square.col + square.width == class_map.shape_yx[1]:
                yield from sweep.pass_row()
            if progress is not None:
                progress(done + 1, len(squares), "windows")


@dataclass(slots=True)
class _Line:
    """The fragments and classes along a window's line."""

    fragments: NDArray[np.int64]
    codes: NDArray[np.uint8]

    @classmethod
    def empty(cls, length: int) -> _Line:
        return cls(np.full(length, _NONE), np.full(length, CLASS_NODATA, dtype=np.uint8))


@dataclass(slots=True)
class _Sweep:
    """Windows come row by row, from the west; fragments wait until their patch is whole."""

    shape_yx: tuple[int, int]
    parent: dict[int, int] = field(default_factory=dict)
    pieces: dict[int, list[Polygon]] = field(default_factory=dict)
    code: dict[int, int] = field(default_factory=dict)
    count: int = 0
    above: _Line = field(init=False)
    below: _Line = field(init=False)
    west: _Line = field(init=False)

    def __post_init__(self) -> None:
        """Begin north of the first row."""
        self.above = _Line.empty(self.shape_yx[1])
        self.below = _Line.empty(self.shape_yx[1])
        self.west = _Line.empty(0)

    def add(self, square: Window, codes: NDArray[np.uint8]) -> Iterator[Patch]:
        """Take a window; yield its patches that meet no other window."""
        from affine import Affine
        from rasterio.features import shapes

        bottom, right = square.row + square.height, square.col + square.width
        sides = {
            "north": _Line(np.full(square.width, _NONE), codes[0]),
            "south": _Line(np.full(square.width, _NONE), codes[-1]),
            "west": _Line(np.full(square.height, _NONE), codes[:, 0]),
            "east": _Line(np.full(square.height, _NONE), codes[:, -1]),
        }
        lines = {"north": (1, square.row), "south": (1, bottom),
                 "west": (0, square.col), "east": (0, right)}  # fmt: skip
        if square.row == 0:
            del lines["north"]
        if bottom == self.shape_yx[0]:
            del lines["south"]
        if square.col == 0:
            del lines["west"]
        if right == self.shape_yx[1]:
            del lines["east"]

        labelled, found = codes != CLASS_NODATA, iter(())
        if labelled.any():
            found = shapes(
                codes, mask=labelled, connectivity=4,
                transform=Affine.translation(square.col, square.row),
            )  # fmt: skip
        for batch in _outlines(found):
            runs = {name: batch.runs(axis, at) for name, (axis, at) in lines.items()}
            held = {
                place: self._hold(batch.polygons[place], batch.codes[place])
                for place in sorted({place for spans in runs.values() for place, _, _ in spans})
            }
            for name, spans in runs.items():
                first = square.col if lines[name][0] == 1 else square.row
                for place, begin, end in spans:
                    sides[name].fragments[begin - first : end - first] = held[place]
            for place, polygon in enumerate(batch.polygons):
                if place not in held:
                    yield Patch(code=batch.codes[place], polygon=polygon)

        here = slice(square.col, right)
        self._join(sides["north"], _Line(self.above.fragments[here], self.above.codes[here]))
        if "west" in lines:
            self._join(sides["west"], self.west)
        self.west = sides["east"]
        self.below.fragments[here] = sides["south"].fragments
        self.below.codes[here] = sides["south"].codes

    def pass_row(self) -> Iterator[Patch]:
        """End a row of windows; yield the patches that do not reach the next."""
        numbers, place = np.unique(self.below.fragments, return_inverse=True)
        roots = np.array([n if n < 0 else self._root(n) for n in numbers.tolist()], dtype=np.int64)
        self.below.fragments = roots[place]
        going_on = set(roots[roots >= 0].tolist())
        pieces: dict[int, list[Polygon]] = {}
        for number in self.parent:
            pieces.setdefault(self._root(number), []).extend(self.pieces[number])
        for root in pieces.keys() - going_on:
            yield Patch(code=self.code[root], polygon=_merged(pieces[root]))
        self.parent = {root: root for root in going_on}
        self.pieces = {root: pieces[root] for root in going_on}
        self.code = {root: self.code[root] for root in going_on}
        self.above, self.below = self.below, _Line.empty(self.shape_yx[1])

    def _hold(self, polygon: Polygon, code: int) -> int:
        number, self.count = self.count, self.count + 1
        self.parent[number], self.pieces[number], self.code[number] = number, [polygon], code
        return number

    def _join(self, one: _Line, other: _Line) -> None:
        """Join fragments of one class that lie on both sides of a line."""
        same = (one.codes == other.codes) & (one.fragments >= 0) & (other.fragments >= 0)
        if not same.any():
            return
        pairs = np.unique(np.stack([one.fragments[same], other.fragments[same]]), axis=1)
        for left, right in pairs.T.tolist():
            roots = self._root(left), self._root(right)
            self.parent[max(roots)] = min(roots)

    def _root(self, number: int) -> int:
        return _find(self.parent, number)


def _find(parent: dict[int, int], number: int) -> int:
    """Return the root of a fragment, and shorten the path to it."""
    root = number
    while parent[root] != root:
        root = parent[root]
    while parent[number] != root:
        parent[number], number = root, parent[number]
    return root


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outlines:
    """Some thousands of the patches of a window: made together, they cost a fraction."""

    codes: list[int]
    polygons: list[Polygon]
    points: NDArray[np.float64]
    """(P, 2) corners of the outer rings, one closed ring after the other."""
    owner: NDArray[np.int64]
    """(P,) the patch of each corner."""

    def runs(self, axis: int, at: int) -> list[tuple[int, int, int]]:
        """Return where outer rings run along the line x = at (axis 0) or y = at (axis 1)."""
        on = self.points[:, axis] == at
        along = np.flatnonzero(on[:-1] & on[1:] & (self.owner[:-1] == self.owner[1:]))
        other = self.points[:, 1 - axis].astype(np.int64)
        begin, end = other[along], other[along + 1]
        columns = (self.owner[along], np.minimum(begin, end), np.maximum(begin, end))
        return list(zip(*(column.tolist() for column in columns), strict=True))


def _outlines(found: Iterator[tuple[dict[str, Any], float]]) -> Iterator[_Outlines]:
    """Gather what GDAL finds, outline by outline."""
    import shapely

    while batch := list(islice(found, _BATCH)):
        rings = [corners for geometry, _ in batch for corners in geometry["coordinates"]]
        counts = np.array([len(geometry["coordinates"]) for geometry, _ in batch])
        points = np.array([point for corners in rings for point in corners], dtype=np.float64)
        ring = np.repeat(np.arange(len(rings)), [len(corners) for corners in rings])
        owner = np.repeat(np.arange(len(batch)), counts)
        outer = np.isin(ring, np.cumsum(counts) - counts)
        closed: Any = shapely.linearrings(points, indices=ring)
        polygons: Any = shapely.polygons(closed, indices=owner)
        yield _Outlines(
            codes=[int(value) for _, value in batch],
            polygons=polygons.tolist(),
            points=points[outer],
            owner=owner[ring[outer]],
        )


def _merged(pieces: list[Polygon]) -> Polygon:
    """Return the union of fragments, without the corners where windows cut straight sides."""
    import shapely
    from shapely.geometry import Polygon

    if len(pieces) == 1:
        return pieces[0]
    union: Any = shapely.union_all(pieces)
    return Polygon(_corners(union.exterior), [_corners(interior) for interior in union.interiors])


def _corners(ring: Any) -> NDArray[np.float64]:
    """Return the vertices of a ring of level and upright sides at which it turns."""
    points = np.asarray(ring.coords)[:-1]
    before = points - np.roll(points, 1, axis=0)
    after = np.roll(points, -1, axis=0) - points
    return np.asarray(points[(before[:, 0] == 0) != (after[:, 0] == 0)])


def _measure(class_map: ClassMap) -> Any:
    """Return what gives a polygon's area (square metres) from its outline in pixels."""
    ground = class_map.ground()
    if ground is not None:
        return ground.measure()
    if not class_map.crs.is_geographic:
        pixel = float(class_map.row_areas()[0])
        return lambda polygon: polygon.area * pixel
    rows = np.concatenate([[0.0], np.cumsum(class_map.row_areas())])

    def geodesic(polygon: Polygon) -> float:
        # Green's theorem, with the area from the top edge to each row in place of y.
        total = 0.0
        for ring in (polygon.exterior, *polygon.interiors):
            points = np.asarray(ring.coords)
            depth = rows[points[:, 1].astype(np.int64)]
            part = abs(float(np.sum(np.diff(points[:, 0]) * depth[:-1])))
            total += part if ring is polygon.exterior else -part
        return total

    return geodesic


def _frame(class_map: ClassMap, patches: list[tuple[Patch, float]]) -> GeoDataFrame:
    """Return patches as rows with a geometry in the map's CRS."""
    import geopandas
    import pandas
    import shapely

    transform = class_map.transform

    def place(points: NDArray[np.float64]) -> NDArray[np.float64]:
        col, row = points[:, 0], points[:, 1]
        return np.column_stack(
            [transform.a * col + transform.b * row + transform.c,
             transform.d * col + transform.e * row + transform.f]
        )  # fmt: skip

    shapes = np.array([patch.polygon for patch, _ in patches], dtype=object)
    names = class_map.legend.names
    table = {
        "code": np.array([patch.code for patch, _ in patches], dtype=np.int16),
        "class": pandas.array([names[patch.code] for patch, _ in patches], dtype="string"),
        "pixels": np.array([round(patch.polygon.area) for patch, _ in patches], dtype=np.int64),
        "area_m2": np.array([area for _, area in patches], dtype=np.float64),
    }
    return geopandas.GeoDataFrame(
        table, geometry=shapely.transform(shapes, place), crs=class_map.crs.to_wkt()
    )
