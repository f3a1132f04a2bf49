"""Validate a map's layout and its content.

The usual validators look at offsets only: they pass a file whose tiles were lost or whose
overviews average class codes. Here the pixels are read too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from ..errors import InputError, MissingFileError
from ..grid import Window, tiles
from ..legend import CLASS_NODATA, Legend
from .names import CONFIDENCE_NODATA, KIND_TAG, LEGEND_TAG

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["check_cog", "validate_cog"]

Kind = Literal["auto", "classes", "confidence", "scaled", "counts"]
_LARGEST = {"confidence": 100, "scaled": 250, "counts": 254}

_READ = 2048
_SAMPLE_BASE = 1024  # side of the full-resolution squares that overviews are compared with
_SAMPLES = 16  # squares per overview level


def validate_cog(
    path: str | Path,
    *,
    kind: Kind = "auto",
    legend: Legend | None = None,
    histogram: Mapping[int, int] | None = None,
    geobox: GeoBox | None = None,
) -> tuple[list[str], list[str]]:
    """Return the errors and warnings of a map: first layout, then content.

    Parameters
    ----------
    path
        A cloud-optimized GeoTIFF of uint8; class maps have one band.
    kind
        What the pixels are: "classes", "confidence" (0 to 100), "scaled" (0 to 250), "counts" (0
        to 254); "auto" asks the file's tags, then whether it has a palette.
    legend
        The classes that may occur; None = the legend stored in the file.
    histogram
        Expected number of pixels by value, nodata (255) included; all bands together.
    geobox
        Expected grid.

    Returns
    -------
    tuple
        Errors, then warnings; both empty for a good file. Each says what is wrong, the value
        found, the rule and the remedy.
    """
    import rasterio
    from rasterio.errors import RasterioIOError
    from rio_cogeo.cogeo import cog_validate

    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"Cannot validate {path}: there is no such file. Give the path of a GeoTIFF."
        )
    if path.suffix.lower() == ".vrt":
        raise InputError(
            f"Cannot validate {path}: a VRT holds no pixels, it shows those of other files. "
            "Validate these, such as the maps in the folders of the zones."
        )
    try:
        _, layout_errors, layout_warnings = cog_validate(str(path), strict=True, quiet=True)
    except RasterioIOError as error:
        return [f"{path} cannot be opened: {error}. Give a GeoTIFF, or write it again."], []
    errors = [
        f"Layout: {text}. Write the file again, and never update it." for text in layout_errors
    ]
    warnings = [f"Layout: {text}." for text in layout_warnings]

    with rasterio.open(path) as source:
        if kind == "auto":
            kind = _guess_kind(source)
        one_band = kind in {"classes", "confidence"}
        if (one_band and source.count != 1) or set(source.dtypes) != {"uint8"}:
            errors.append(
                f"Content: the file has {source.count} band(s) of {source.dtypes[0]}; class and "
                "confidence maps have one band of uint8. Only its layout was checked."
            )
            return errors, warnings
        errors += _grid_errors(source, geobox)
        if kind == "classes":
            legend = legend or _stored_legend(source, errors)
            errors += _class_header_errors(source, path, legend)
            allowed = {CLASS_NODATA, *(legend.codes if legend else range(CLASS_NODATA))}
        else:
            allowed = {CONFIDENCE_NODATA, *range(_LARGEST[kind] + 1)}
            if source.nodata != CONFIDENCE_NODATA:
                errors.append(_nodata_error(source))
        errors += _tile_errors(source)
        try:
            errors += _histogram_errors(_histogram(source), allowed, histogram)
            levels = len(source.overviews(1))
            for level in range(levels):
                with rasterio.open(path, OVERVIEW_LEVEL=level) as overview:
                    errors += _overview_errors(source, overview, level, allowed, kind)
        except RasterioIOError as error:
            errors.append(f"Content: a tile cannot be decoded ({error}). Write the file again.")
    return errors, warnings


def check_cog(path: str | Path, **expected: Any) -> None:
    """Raise where ``validate_cog`` (same arguments) finds an error or a warning.

    Raises
    ------
    InputError
        With every problem found.
    """
    errors, warnings = validate_cog(path, **expected)
    if errors or warnings:
        raise InputError(f"{path} is not a valid map. " + " ".join([*errors, *warnings]))


def _guess_kind(source: Any) -> Kind:
    from rasterio.enums import ColorInterp

    tag = source.tags().get(KIND_TAG)
    if tag in get_args(Kind):
        known: Kind = tag
        return known
    return "classes" if source.colorinterp[0] is ColorInterp.palette else "confidence"


def _stored_legend(source: Any, errors: list[str]) -> Legend | None:
    text = source.tags().get(LEGEND_TAG)
    if text is None:
        errors.append(
            f"Names: the file has no {LEGEND_TAG} tag, so the meaning of its codes is lost. Give "
            "the legend, or write the map again with it."
        )
        return None
    return Legend.from_json(text)


def _grid_errors(source: Any, geobox: GeoBox | None) -> list[str]:
    errors = []
    if source.crs is None:
        errors.append("Grid: the file has no CRS. Write it again with one.")
    if geobox is None:
        return errors
    shape = tuple(int(side) for side in geobox.shape)
    if source.shape != shape:
        errors.append(
            f"Grid: the shape is {source.shape} (rows, columns) but {shape} was expected. "
            "Write the map again on the expected grid."
        )
    if not source.transform.almost_equals(geobox.affine, precision=1e-6):
        errors.append(
            f"Grid: the transform is {tuple(source.transform)[:6]} but "
            f"{tuple(geobox.affine)[:6]} was expected. Write the map again on the expected grid."
        )
    if source.crs is not None and geobox.crs is not None:
        import rasterio.crs

        if source.crs != rasterio.crs.CRS.from_wkt(geobox.crs.to_wkt()):
            errors.append(
                f"Grid: the CRS is {source.crs} but {geobox.crs} was expected. Write the map again."
            )
    return errors


def _nodata_error(source: Any) -> str:
    return (
        f"Nodata: the file declares {source.nodata}, the rule is {CLASS_NODATA}. "
        "Write the map again."
    )


def _class_header_errors(source: Any, path: Path, legend: Legend | None) -> list[str]:
    """Return what lacks of nodata, palette and names."""
    errors = []
    if source.nodata != CLASS_NODATA:
        errors.append(_nodata_error(source))
    try:
        palette = source.colormap(1)
    except ValueError:
        palette = None
        errors.append("Palette: the file has none. Write the map again with its legend.")
    if legend is None:
        return errors
    if palette is not None:
        wrong = [code for code, color in legend.colormap().items() if palette.get(code) != color]
        if wrong:
            errors.append(
                f"Palette: the colours of classes {wrong} differ from the legend's. "
                "Write the map again with its legend."
            )
    text = source.tags().get(LEGEND_TAG)
    stored = None if text is None else Legend.from_json(text)
    if stored is not None and stored.names != legend.names:
        errors.append(
            f"Names: the file says {stored.names}, the legend {legend.names}. "
            "Write the map again with its legend."
        )
    sidecar = path.with_name(f"{path.name}.aux.xml")
    if not sidecar.is_file() or _category_names(sidecar) != legend.names:
        lack = "cannot be read" if sidecar.is_file() else "is missing"
        errors.append(
            f"Names: {sidecar.name} {lack} or names other classes, so that GIS programs show "
            "bare codes. Keep it beside the map, or write the map again."
        )
    return errors


def _category_names(sidecar: Path) -> tuple[str, ...] | None:
    """Return the names in a sidecar, or None where it is no XML."""
    from xml.etree import ElementTree

    try:
        root = ElementTree.parse(sidecar).getroot()
    except ElementTree.ParseError:
        return None
    return tuple(entry.text or "" for entry in root.iter("Category"))


def _tile_errors(source: Any) -> list[str]:
    """Return an error for each level that lacks the bytes of a tile."""
    errors = []
    tile_height, tile_width = source.block_shapes[0]
    factors = [1, *source.overviews(1)]
    for index, factor in enumerate(factors):
        options = {} if index == 0 else {"ovr": index - 1}
        rows = math.ceil(math.ceil(source.height / factor) / tile_height)
        cols = math.ceil(math.ceil(source.width / factor) / tile_width)
        empty = [
            (row, col)
            for row in range(rows)
            for col in range(cols)
            if not int(
                source.get_tag_item(f"BLOCK_SIZE_{col}_{row}", "TIFF", bidx=1, **options) or 0
            )
        ]
        if empty:
            level = "the full resolution" if index == 0 else f"overview {index - 1}"
            errors.append(
                f"Tiles: {len(empty)} of {rows * cols} tiles of {level} hold no bytes (first: "
                f"row {empty[0][0]}, column {empty[0][1]}). Write the map again."
            )
    return errors


def _histogram(source: Any) -> np.ndarray:
    """Return the number of pixels by value, (256,) int64."""
    counts = np.zeros(256, dtype=np.int64)
    for values in _blocks(source):
        counts += np.bincount(values.ravel(), minlength=256)
    return counts


def _blocks(source: Any) -> Iterator[np.ndarray]:
    for window in tiles(source.shape, _READ):
        for band in source.indexes:
            yield _read(source, window, band)


def _read(source: Any, window: Window, band: int = 1) -> np.ndarray:
    from rasterio.windows import Window as RasterioWindow

    values: np.ndarray = source.read(
        band, window=RasterioWindow(window.col, window.row, window.width, window.height)
    )
    return values


def _histogram_errors(
    counts: np.ndarray, allowed: set[int], expected: Mapping[int, int] | None
) -> list[str]:
    errors = []
    strange = sorted(set(np.flatnonzero(counts).tolist()) - allowed)
    if strange:
        errors.append(
            f"Content: pixel values {strange} are neither in the legend nor nodata. "
            "Write the map again, or give the legend it was made with."
        )
    if expected is not None:
        wrong = [value for value in range(256) if counts[value] != expected.get(value, 0)]
        if wrong:
            value = wrong[0]
            errors.append(
                f"Histogram: value {value} stands {counts[value]} times in the map but "
                f"{expected.get(value, 0)} times in its shards ({len(wrong)} values differ): "
                "pixels were lost or changed. Write the map again from the shards."
            )
    return errors


def _overview_errors(
    source: Any, overview: Any, level: int, allowed: set[int], kind: str
) -> list[str]:
    """Return what is wrong with the values of one overview."""
    present: set[int] = set()
    for values in _blocks(overview):
        present |= set(np.unique(values).tolist())
    strange = sorted(present - allowed)
    if strange:
        return [
            f"Overview {level}: values {strange} are neither in the legend nor nodata. Make "
            "overviews of class maps by mode, never by average or cubic."
        ]
    if kind != "classes":
        return []
    invented = sum(
        _invented(source, overview, level, window) for window in _sample_windows(source, overview)
    )
    if invented:
        return [
            f"Overview {level}: {invented} sampled pixels show a class that none of the pixels "
            "below them has. Make overviews by mode, never by average, and anew after any change."
        ]
    return []


def _sample_windows(source: Any, overview: Any) -> list[Window]:
    """Return squares spread evenly over an overview (all of it where it is small)."""
    factor = max(source.height / overview.height, source.width / overview.width)
    windows = tiles(overview.shape, max(int(_SAMPLE_BASE // factor), 1))
    step = max(len(windows) / _SAMPLES, 1.0)
    return [windows[int(index * step)] for index in range(min(len(windows), _SAMPLES))]


def _invented(source: Any, overview: Any, level: int, window: Window) -> int:
    """Count overview pixels whose class is absent below them, one pixel of slack around."""
    values = _read(overview, window)
    row_edges = _edges(window.row, window.height, overview.height, source.height, level)
    col_edges = _edges(window.col, window.width, overview.width, source.width, level)
    top, left = int(row_edges[0].min()), int(col_edges[0].min())
    base = _read(
        source, Window(top, left, int(row_edges[1].max()) - top, int(col_edges[1].max()) - left)
    )
    rows = np.stack(row_edges, axis=1).ravel() - top
    cols = np.stack(col_edges, axis=1).ravel() - left
    present = np.unique(values)
    found = np.zeros(values.shape, dtype=bool)
    for start in range(0, len(present), 64):
        # One bit per class: a rectangle's classes are the bitwise or of its pixels.
        bits = np.zeros(256, dtype=np.uint64)
        some = present[start : start + 64]
        bits[some] = np.uint64(1) << np.arange(len(some), dtype=np.uint64)
        below = np.pad(bits[base], ((0, 1), (0, 1)))  # so that an end may be the last edge
        below = np.bitwise_or.reduceat(below, rows, axis=0)[::2]
        below = np.bitwise_or.reduceat(below, cols, axis=1)[:, ::2]
        found |= (bits[values] & below) != 0
    return int(np.count_nonzero(~found))


def _edges(
    start: int, count: int, coarse: int, fine: int, level: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return first and end fine pixel below each coarse pixel, with one pixel of slack.

    Writers differ where a side is no multiple of a power of two. GDAL leaves the odd pixel out of
    the count and spreads the pixels of each level evenly over the one before, so that what a pixel
    saw widens from level to level; others lay them at multiples of the power. Both are allowed.
    """
    sides = _halvings(fine, coarse, level)
    low = np.arange(start, start + count)
    high = low + 1
    for finer, coarser in zip(sides[-2::-1], sides[:0:-1], strict=True):
        low = low * finer // coarser
        high = np.maximum(-(-high * finer // coarser), np.minimum(high * 2, finer))
    low, high = np.clip(low - 1, 0, fine - 1), high + 1
    return low, np.clip(high, 0, fine)


def _halvings(fine: int, coarse: int, level: int) -> list[int]:
    """Return the sides of the levels from ``fine`` to ``coarse``; only these two if unknown."""
    for odd in (0, 1):
        sides = [fine]
        for _ in range(level + 1):
            sides.append(max((sides[-1] + odd) // 2, 1))
        if sides[-1] == coarse:
            return sides
    return [fine, coarse]
