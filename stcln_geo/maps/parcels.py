"""What a class map says about each parcel: majority class, shares and confidence.

A pixel counts for every parcel that holds its centre, also where parcels overlap. A parcel too
small or too thin to hold a centre takes the pixels it touches instead, and is marked. The map is
read by windows; what grows with the number of parcels are their outlines and one row of counts
each, never pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..execution import ProgressHook
from ..grid import Window, tiles
from ..legend import CLASS_NODATA, Legend
from .classmap import WINDOW, ClassMap, open_class_map
from .vector import check_other_layers, check_target, read_vector, write_vector

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

__all__ = [
    "ParcelReport",
    "ParcelTable",
    "count_parcels",
    "placed",
    "read_parcels",
    "write_parcels",
]

_FRAME = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class ParcelTable:
    """Counts of P parcels, in their order."""

    counts: NDArray[np.int64]
    """(P, K) pixels by class code."""
    nodata: NDArray[np.int64]
    """(P,) pixels of the map without a label."""
    confidence: NDArray[np.int64] | None
    """(P, K) sum of the confidence (percent) of the pixels of each class; None without it."""
    all_touched: NDArray[np.bool_]
    """(P,) True where no pixel's centre lies in the parcel and touched pixels are counted."""
    outside: NDArray[np.float64]
    """(P,) share of the parcel's area beyond the map's raster."""

    @property
    def labelled(self) -> NDArray[np.int64]:
        """(P,) pixels with a label."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def majority(self) -> NDArray[np.int64]:
        """(P,) most frequent class code, the lowest of equals; 255 without a labelled pixel."""
        return np.where(self.labelled > 0, self.counts.argmax(axis=1), CLASS_NODATA)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParcelReport:
    """What ``write_parcels`` wrote."""

    path: Path
    parcels: int
    labelled: int
    """Parcels with a class."""
    outside: int
    """Parcels that lie wholly outside the map's raster."""
    all_touched: int
    """Parcels that hold no pixel's centre."""
    by_class: dict[int, int]
    """Parcels by majority class code."""

    def lines(self, legend: Legend) -> list[str]:
        """Return the report as lines of text for people."""
        lines = [f"{self.path}: {self.parcels} parcels, {self.labelled} with a class."]
        lines.extend(
            f"  {entry.name:24} {self.by_class.get(entry.code, 0):9,} parcels"
            for entry in legend.classes
        )
        if self.all_touched:
            lines.append(
                f"{self.all_touched} parcels hold no pixel's centre and take the pixels they "
                "touch (map_all_touched)."
            )
        if self.outside:
            lines.append(f"{self.outside} parcels lie outside the map and have no class.")
        return lines


def write_parcels(
    class_map: ClassMap | str | Path,
    parcels: str | Path,
    out: str | Path,
    *,
    layer: str | None = None,
    window: int = WINDOW,
    progress: ProgressHook | None = None,
) -> ParcelReport:
    """Write what a map says about each parcel, beside the parcel's own columns.

    Columns added (replaced where the file has them, in upper or lower case): ``map_code`` and
    ``map_class`` of the majority (the lowest code of equals; null without a labelled pixel),
    ``map_share`` of the labelled pixels that have it, ``map_confidence`` (mean of the majority's
    pixels, percent), ``map_confidence_all`` (of all), ``map_pixels`` (labelled), ``map_nodata``
    (share of the parcel's pixels without a label), ``map_outside`` (share of its area beyond the
    map), ``map_all_touched``, and ``map_fraction_<class>``, which sum to 1. Every parcel of the
    file has a row, in the file's order and CRS.

    Parameters
    ----------
    class_map
        A product's folder, a GeoTIFF of classes, or an open map. A map that is no product has
        no confidence.
    out
        ``.gpkg``, ``.parquet`` or ``.geoparquet``.
    window
        Side (pixels) of the squares the map is read by; the result does not depend on it.

    Raises
    ------
    InputError
        If the file holds anything but polygons, no parcel meets the map, or ``out`` is the file
        of the parcels and has other layers.
    """
    check_target(out)
    opened = class_map if isinstance(class_map, ClassMap) else open_class_map(class_map)
    frame = read_parcels(parcels, layer=layer)
    check_other_layers(parcels, out)
    geometries = frame.geometry.to_crs(opened.crs.to_wkt()).to_numpy()
    table = count_parcels(opened, geometries, window=window, progress=progress)
    if (table.outside >= 1).all():
        raise InputError(
            f"Cannot use {parcels} with the map {opened.path}: none of its {len(frame)} parcels "
            "meets the map's raster. Give the parcels of this region, or correct the file's CRS."
        )
    write_vector(_with_columns(frame, table, opened.legend), out)
    majority = table.majority
    labelled = majority != CLASS_NODATA
    return ParcelReport(
        path=Path(out),
        parcels=len(frame),
        labelled=int(labelled.sum()),
        outside=int((table.outside >= 1).sum()),
        all_touched=int(table.all_touched.sum()),
        by_class={
            int(code): int(count)
            for code, count in zip(*np.unique(majority[labelled], return_counts=True), strict=True)
        },
    )


def read_parcels(path: str | Path, *, layer: str | None = None) -> GeoDataFrame:
    """Read a file of polygons."""
    frame = read_vector(path, layer=layer, purpose="take parcels from")
    kinds = set(frame.geometry.geom_type.dropna()) - {"Polygon", "MultiPolygon"}
    if kinds:
        raise InputError(
            f"Cannot take parcels from {path}: it holds {', '.join(sorted(kinds))}, and parcels "
            "are polygons. Give a file of polygons only."
        )
    return frame


def count_parcels(
    class_map: ClassMap,
    geometries: NDArray[Any],
    *,
    window: int = WINDOW,
    progress: ProgressHook | None = None,
) -> ParcelTable:
    """Count the pixels of each class in each parcel.

    Parameters
    ----------
    geometries
        (P,) polygons in the map's CRS; None and empty ones count nothing, nor do those with a
        corner at infinity, which is where places go that the CRS does not have.
    window
        Side (pixels) of the squares the map is read by.
    """
    import shapely

    shapes = _in_pixels(placed(geometries), class_map)
    extent = shapely.box(0, 0, class_map.shape_yx[1], class_map.shape_yx[0])
    outside = _outside(shapes, extent)
    tree = shapely.STRtree(shapes)
    total = _Totals(
        len(shapes), len(class_map.legend), with_confidence=class_map.confidence is not None
    )
    squares = class_map.windows(window)
    with class_map.reader() as reader, _confidence(class_map) as percent:
        for done, square in enumerate(squares):
            near = np.sort(tree.query(_box(square)))
            if len(near):
                here = _shifted(shapes[near], square)
                codes, sure = reader.read(square), percent(square)
                for numbers, inside in _burn(here, square.shape_yx):
                    total.add(near[numbers], codes[inside], None if sure is None else sure[inside])
            if progress is not None:
                progress(done + 1, len(squares), "windows")
        touched = (total.pixels == 0) & (outside < 1)
        for number in np.flatnonzero(touched):
            for square in _frames(shapes[number], class_map.shape_yx):
                here = _shifted(shapes[number : number + 1], square)
                inside = _mask(here[0], square.shape_yx, all_touched=True)
                codes, sure = reader.read(square)[inside], percent(square)
                owner = np.full(codes.shape, number)
                total.add(owner, codes, None if sure is None else sure[inside])
    return ParcelTable(
        counts=total.counts[:, :-1],
        nodata=total.counts[:, -1],
        confidence=total.confidence,
        all_touched=touched & (total.pixels > 0),
        outside=outside,
    )


def placed(geometries: NDArray[Any]) -> NDArray[Any]:
    """Return outlines; None in place of those that reach places which their CRS does not have."""
    import shapely

    found = np.array(geometries, dtype=object)
    found[np.isinf(shapely.bounds(found)).any(axis=1)] = None
    return found


class _Totals:
    """Adds up pixels by parcel and class; whole numbers, so that the order does not matter."""

    def __init__(self, parcels: int, classes: int, *, with_confidence: bool) -> None:
        self.counts = np.zeros((parcels, classes + 1), dtype=np.int64)
        self.confidence = np.zeros((parcels, classes), np.int64) if with_confidence else None

    @property
    def pixels(self) -> NDArray[np.int64]:
        return np.asarray(self.counts.sum(axis=1))

    def add(
        self, owner: NDArray[Any], codes: NDArray[np.uint8], percent: NDArray[np.uint8] | None
    ) -> None:
        """Add pixels: (n,) parcel of each, its class code, its confidence."""
        parcels, local = np.unique(owner, return_inverse=True)
        columns = self.counts.shape[1]
        place = local * columns + np.minimum(codes, columns - 1)
        shape, size = (len(parcels), columns), len(parcels) * columns
        self.counts[parcels] += np.bincount(place, minlength=size).reshape(shape)
        if self.confidence is None or percent is None:
            return
        sums = np.bincount(place, weights=percent, minlength=size).reshape(shape)
        self.confidence[parcels] += sums[:, :-1].astype(np.int64)


def _in_pixels(geometries: NDArray[Any], class_map: ClassMap) -> NDArray[Any]:
    """Return the outlines in pixels of the map, so that shifting by a window is exact."""
    import shapely

    to_pixels, grid = ~class_map.transform, class_map.transform

    def move(points: NDArray[np.float64]) -> NDArray[np.float64]:
        x, y = points[:, 0], points[:, 1]
        if not (grid.b or grid.d):
            # Exact for the usual grids, unlike the inverse: borders through centres stay there.
            return np.column_stack([(x - grid.c) / grid.a, (y - grid.f) / grid.e])
        return np.column_stack(
            [to_pixels.a * x + to_pixels.b * y + to_pixels.c,
             to_pixels.d * x + to_pixels.e * y + to_pixels.f]
        )  # fmt: skip

    moved: NDArray[Any] = shapely.transform(shapely.force_2d(np.asarray(geometries)), move)
    return moved


def _outside(shapes: NDArray[Any], extent: Any) -> NDArray[np.float64]:
    """Return the share of each outline's area beyond the raster; 1 where there is no area."""
    import shapely

    shares = np.zeros(len(shapes))
    crossing = np.flatnonzero(~shapely.covered_by(shapes, extent))
    repaired = shapely.make_valid(shapes[crossing])
    area = shapely.area(repaired)
    inside = shapely.area(shapely.intersection(repaired, extent))
    shares[crossing] = np.where(area > 0, 1 - inside / np.where(area > 0, area, 1), 1.0)
    return shares


def _burn(
    shapes: NDArray[Any], shape_yx: tuple[int, int]
) -> Iterator[tuple[NDArray[np.int64], Any]]:
    """Yield pairs of (number of the outline per pixel, what selects these pixels).

    All outlines are burnt at once, with the last on top and with the first: that settles pixels
    in one or two of them. Those in three or more are burnt one by one, each within its bounds.
    """
    from rasterio.enums import MergeAlg
    from rasterio.features import rasterize

    options: dict[str, Any] = {"out_shape": shape_yx, "fill": 0, "dtype": "int32"}
    pairs = [(shape, n) for n, shape in enumerate(shapes, start=1)]
    layers = rasterize(((shape, 1) for shape in shapes), merge_alg=MergeAlg.add, **options)
    last = rasterize(pairs, **options)
    few = (layers == 1) | (layers == 2)
    yield last[few].astype(np.int64) - 1, few
    if (layers == 2).any():
        first = rasterize(pairs[::-1], **options)
        # Where they are one, parts of an outline cover each other.
        two = (layers == 2) & (first != last)
        yield first[two].astype(np.int64) - 1, two
    many = layers > 2
    if not many.any():
        return
    for number, shape in enumerate(shapes):
        for frame in _frames(shape, shape_yx):
            if not many[frame.rows, frame.cols].any():
                continue
            own = _mask(_shifted(shapes[number : number + 1], frame)[0], frame.shape_yx)
            rows, cols = np.nonzero(own & many[frame.rows, frame.cols])
            if len(rows):
                yield np.full(len(rows), number), (rows + frame.row, cols + frame.col)


def _mask(shape: Any, shape_yx: tuple[int, int], *, all_touched: bool = False) -> NDArray[np.bool_]:
    """Return True where an outline holds a pixel's centre, or where it touches a pixel."""
    from rasterio.features import rasterize

    burnt = rasterize(
        [(shape, 1)], out_shape=shape_yx, fill=0, dtype="uint8", all_touched=all_touched
    )
    return np.asarray(burnt > 0)


def _frames(shape: Any, shape_yx: tuple[int, int]) -> list[Window]:
    """Return squares, fixed by the outline alone, that cover its part of the raster."""
    left, top, right, bottom = shape.bounds
    col, row = max(int(np.floor(left)), 0), max(int(np.floor(top)), 0)
    end_col = min(int(np.floor(right)) + 1, shape_yx[1])
    end_row = min(int(np.floor(bottom)) + 1, shape_yx[0])
    if end_col <= col or end_row <= row:
        return []
    return [one.shift(row, col) for one in tiles((end_row - row, end_col - col), _FRAME)]


def _shifted(shapes: NDArray[Any], square: Window) -> NDArray[Any]:
    import shapely

    corner = np.array([square.col, square.row], dtype=np.float64)
    moved: NDArray[Any] = shapely.transform(shapes, lambda points: points - corner)
    return moved


def _box(square: Window) -> Any:
    import shapely

    return shapely.box(
        square.col, square.row, square.col + square.width, square.row + square.height
    )


@contextmanager
def _confidence(class_map: ClassMap) -> Iterator[Callable[[Window], NDArray[np.uint8] | None]]:
    """Give what reads windows of the confidence; None where the map has none beside it."""
    import rasterio
    from rasterio.windows import Window as RasterWindow

    if class_map.confidence is None:
        yield lambda square: None
        return
    with rasterio.open(class_map.confidence) as source:
        if source.shape != class_map.shape_yx:
            raise InputError(
                f"Cannot use {class_map.confidence} with {class_map.path}: their shapes differ "
                f"({source.shape} and {class_map.shape_yx}). Both must come from one run: predict "
                "again."
            )

        def read(square: Window) -> NDArray[np.uint8]:
            place = RasterWindow(square.col, square.row, square.width, square.height)
            return np.asarray(source.read(1, window=place))

        yield read


def _with_columns(frame: GeoDataFrame, table: ParcelTable, legend: Legend) -> GeoDataFrame:
    """Add the columns of ``write_parcels`` to the parcels."""
    import pandas

    labelled, majority = table.labelled, table.majority
    some = labelled > 0
    share = table.counts / np.where(some, labelled, 1)[:, None]
    rows, winner = np.arange(len(frame)), np.where(some, majority, 0)
    names = np.array([*legend.names], dtype=object)
    columns: dict[str, Any] = {
        "map_code": pandas.array(np.where(some, majority, 0), dtype="Int16"),
        "map_class": pandas.array(names[winner], dtype="string"),
        "map_share": np.where(some, share[rows, winner], np.nan),
    }
    for name in ("map_code", "map_class"):
        columns[name][~some] = pandas.NA
    if table.confidence is not None:
        most = table.counts[rows, winner]
        sure = table.confidence[rows, winner] / np.where(some, most, 1)
        everywhere = table.confidence.sum(axis=1) / np.where(some, labelled, 1)
        columns["map_confidence"] = np.where(some, sure, np.nan)
        columns["map_confidence_all"] = np.where(some, everywhere, np.nan)
    pixels = labelled + table.nodata
    columns |= {
        "map_pixels": labelled,
        "map_nodata": np.where(pixels > 0, table.nodata / np.where(pixels > 0, pixels, 1), np.nan),
        "map_outside": table.outside,
        "map_all_touched": table.all_touched,
    }
    for code, name in enumerate(_column_names(legend)):
        columns[name] = np.where(some, share[:, code], np.nan)
    # In a GeoPackage names that differ in upper and lower case alone are one.
    kept = frame.drop(columns=[name for name in frame.columns if str(name).lower() in columns])
    return kept.assign(**columns)


def _column_names(legend: Legend) -> list[str]:
    """Return a column's name for the fraction of each class."""
    plain = [re.sub(r"\W+", "_", entry.name.lower()).strip("_") for entry in legend.classes]
    coded = [f"{name}_{code}" for code, name in enumerate(plain)]
    names = [
        name if name and plain.count(name) == 1 else other
        for name, other in zip(plain, coded, strict=True)
    ]
    # "Grass", "grass" and "Grass 1": what ends with its own code is nobody else's.
    chosen = names if len(set(names)) == len(names) else coded
    return [f"map_fraction_{name}" for name in chosen]
