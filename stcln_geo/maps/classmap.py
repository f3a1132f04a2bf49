"""A class map on disk: a product's folder or any GeoTIFF of classes, read by windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..cog import read_legend
from ..errors import InputError, MissingFileError
from ..grid import Window, tiles
from ..legend import CLASS_NODATA, Legend
from .ground import GroundAreas, ground_areas

if TYPE_CHECKING:
    from affine import Affine

__all__ = ["ClassMap", "is_class_map", "open_class_map"]

WINDOW = 2048
"""Side of the windows a map is read by (pixels), unless a caller chooses."""

_STRIP_PIXELS = 1 << 25
_CACHE_BYTES = 64_000_000
_CLASSES = ("classes.tif", "classes.vrt")
"""A product of one CRS, and the mosaic of one of several."""

_SUFFIXES = {".tif", ".tiff", ".vrt"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassMap:
    """Where a class map lies and what its pixels mean; no pixel is held."""

    path: Path
    """The raster of classes."""
    confidence: Path | None
    """The raster of confidence in percent beside it, where the map is a product."""
    legend: Legend
    values: dict[int, int]
    """Class code of each pixel value: the same number in a product."""
    nodata: int | None
    """Pixel value of no label."""
    shape_yx: tuple[int, int]
    crs: Any
    """rasterio CRS."""
    transform: Affine

    @contextmanager
    def reader(self) -> Iterator[_Reader]:
        """Open the map for reading; the reader belongs to one thread."""
        import rasterio

        with rasterio.open(self.path) as source, _bounded_cache(_cache_bytes(source)):
            yield _Reader(self, source)

    def windows(self, size: int = WINDOW) -> list[Window]:
        """Return the squares of the map, row by row, ragged at the far edges."""
        if size < 1:
            raise InputError(
                f"Cannot read {self.path} by windows of {size} px: a window has 1 px or more. "
                f"Leave it out for {WINDOW}."
            )
        return tiles(self.shape_yx, size)

    def strips(self) -> list[Window]:
        """Return full-width strips, from the north, of bounded size: pixels in row-major order."""
        height, width = self.shape_yx
        rows = max(min(512, _STRIP_PIXELS // width), 1)
        return [Window(row, 0, min(rows, height - row), width) for row in range(0, height, rows)]

    def count_pixels(self) -> ClassAreas:
        """Count the pixels of each class, and their area, in one pass over the map."""
        classes = len(self.legend)
        pixels = np.zeros(classes + 1, dtype=np.int64)
        areas = np.zeros(classes + 1)
        ground = self.ground()
        row_areas = self.row_areas()
        equal = ground is None and bool((row_areas == row_areas[0]).all())
        with self.reader() as reader:
            for strip in self.strips():
                codes = np.minimum(reader.read(strip), classes)
                if equal:
                    pixels += np.bincount(codes.reshape(-1), minlength=classes + 1)
                    continue
                for row, line in zip(
                    range(strip.row, strip.row + strip.height), codes, strict=True
                ):
                    counts = np.bincount(line, minlength=classes + 1)
                    pixels += counts
                    areas += (
                        counts * row_areas[row]
                        if ground is None
                        else np.bincount(line, weights=ground.of_row(row), minlength=classes + 1)
                    )
        if equal:
            areas = pixels * row_areas[0]
        return ClassAreas(
            pixels=pixels[:-1], areas=areas[:-1], nodata_pixels=int(pixels[-1]), note=self.area_note
        )

    @property
    def is_mosaic(self) -> bool:
        """True where the map shows those of several UTM zones in the CRS of one."""
        return self.path.name == _CLASSES[1]

    def ground(self) -> GroundAreas | None:
        """Measure the pixels on the ellipsoid; None where areas go by rows (``row_areas``)."""
        if not self.is_mosaic or self.crs.is_geographic:
            return None
        return ground_areas(self.crs.to_wkt(), self.transform, self.shape_yx)

    def row_areas(self) -> NDArray[np.float64]:
        """Return the area (square metres) of a pixel in each row: (H,) float64.

        In a projected CRS the area on the grid, for a mosaic see ``ground``; in a geographic one
        the area on the ellipsoid of a pixel between its meridians and parallels (by pyproj's
        geodesics).
        """
        height = self.shape_yx[0]
        transform = self.transform
        if not self.crs.is_geographic:
            metres = float(self.crs.linear_units_factor[1])
            return np.full(height, abs(transform.determinant) * metres**2)
        if transform.b or transform.d:
            raise InputError(
                f"Cannot tell the areas of the pixels of {self.path}: its grid in degrees is "
                "rotated, and then pixels of a row differ. Warp it to a north-up grid first."
            )
        from pyproj import CRS

        geod: Any = CRS.from_user_input(self.crs.to_wkt()).get_geod()
        edges = transform.f + transform.e * np.arange(height + 1)
        across = np.linspace(0.0, abs(transform.a), 5)
        areas = np.empty(height)
        for row, (top, bottom) in enumerate(pairwise(edges)):
            lons = np.concatenate([across, across[::-1]])
            lats = np.repeat([top, bottom], len(across))
            areas[row] = abs(geod.polygon_area_perimeter(lons, lats)[0])
        return areas

    @property
    def area_note(self) -> str:
        """Say how areas are measured."""
        if self.crs.is_geographic or self.is_mosaic:
            return "Areas are those of the pixels on the ellipsoid."
        text = "Areas are those of the grid: number of pixels times the pixel's area in the CRS."
        more = self._enlargement()
        if more is None:
            return text
        low, high = (_more_or_less(one) for one in more)
        than = "as" if high == "as much" else "than"
        return f"{text} That is {low if low == high else f'{low} to {high}'} {than} on the ground."

    def _enlargement(self) -> tuple[float, float] | None:
        """Return by which share areas on the grid are larger than on the ellipsoid.

        The least and the greatest, of pixels spread over the raster; None where the CRS has no
        place for any.
        """
        from pyproj import CRS, Transformer

        crs, grid = CRS.from_user_input(self.crs.to_wkt()), self.transform
        height, width = self.shape_yx
        cols, rows = np.meshgrid(np.linspace(0, width - 1, 17), np.linspace(0, height - 1, 17))
        cols = cols.reshape(-1, 1) + np.array([0, 1, 1, 0])  # the corners of each pixel
        rows = rows.reshape(-1, 1) + np.array([0, 0, 1, 1])
        x = grid.a * cols + grid.b * rows + grid.c
        y = grid.d * cols + grid.e * rows + grid.f
        lon, lat = Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True).transform(x, y)
        known = np.isfinite(lon + lat).all(axis=1)
        geod: Any = crs.get_geod()
        ground = np.array(
            [
                abs(geod.polygon_area_perimeter(one, other)[0])
                for one, other in zip(lon[known], lat[known], strict=True)
            ]
        )
        if not (ground > 0).any():
            return None
        more = self.row_areas()[0] / ground[ground > 0] - 1
        return float(more.min()), float(more.max())

    @property
    def name(self) -> str:
        """Name for people: the product's folder, or the file."""
        product = self.path.name in _CLASSES and self.confidence is not None
        return self.path.parent.name if product else self.path.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassAreas:
    """Pixels and area of each class of a map."""

    pixels: NDArray[np.int64]
    """(K,) pixels by code."""
    areas: NDArray[np.float64]
    """(K,) square metres by code."""
    nodata_pixels: int
    note: str
    """How areas are measured."""


@contextmanager
def _bounded_cache(most: int) -> Iterator[None]:
    """Let GDAL keep no more bytes of what this process reads; an ``Env`` within another stays."""
    from rasterio.env import get_gdal_config, set_gdal_config

    before = get_gdal_config("GDAL_CACHEMAX")
    set_gdal_config("GDAL_CACHEMAX", most)
    try:
        yield
    finally:
        set_gdal_config("GDAL_CACHEMAX", before)


def _cache_bytes(source: Any) -> int:
    """Return what GDAL may keep of a map: its own bound is a share of the machine's memory.

    Blocks as wide as the map lie under all windows of a row, and with them those of a file beside.
    """
    rows, cols = source.block_shapes[0]
    if cols < source.width:
        return _CACHE_BYTES
    row = (WINDOW + 2 * rows) * cols * np.dtype(source.dtypes[0]).itemsize
    return max(2 * int(row), _CACHE_BYTES)


class _Reader:
    """Reads windows of an open map as codes."""

    def __init__(self, class_map: ClassMap, source: Any) -> None:
        self._map, self._source = class_map, source
        pairs = sorted(class_map.values.items())
        self._values = np.array([value for value, _ in pairs])
        self._codes = np.array([code for _, code in pairs])
        self._table: NDArray[np.uint8] | None = None
        self._strange: NDArray[np.bool_] | None = None
        if np.dtype(source.dtypes[0]) in (np.uint8, np.uint16):
            everything = np.arange(np.iinfo(source.dtypes[0]).max + 1)
            self._table, self._strange = self._translate(everything)

    def read(self, window: Window) -> NDArray[np.uint8]:
        """Return the codes of a window, (h, w) uint8, 255 where there is no label.

        Raises
        ------
        InputError
            If a pixel is neither a class of the legend nor nodata.
        """
        pixels = self._source.read(1, window=_raster_window(window))
        if self._table is None or self._strange is None:
            codes, strange = self._translate(pixels)
        else:
            codes, strange = self._table[pixels], self._strange[pixels]
        if strange.any():
            known = ", ".join(str(value) for value in self._map.values)
            raise InputError(
                f"Cannot use the map {self._map.path}: it holds the value {pixels[strange][0]}, "
                f"which is neither nodata ({self._map.nodata}) nor a class of its legend "
                f"({known}). Give a --legend with all its values, or set the map's nodata, for "
                "example with `gdal_edit.py -a_nodata`."
            )
        return codes

    def _translate(self, pixels: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return codes, and where a value has none though it is not nodata."""
        place = np.minimum(np.searchsorted(self._values, pixels), len(self._values) - 1)
        known = self._values[place] == pixels
        empty = np.zeros(pixels.shape, dtype=bool)
        if self._map.nodata is not None:
            empty = pixels == self._map.nodata
        known &= ~empty
        codes = np.where(known, self._codes[place], CLASS_NODATA).astype(np.uint8)
        return codes, ~known & ~empty


def is_class_map(path: str | Path) -> bool:
    """Tell whether a path names a map rather than a run or a checkpoint."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in _CLASSES)
    return path.suffix.lower() in _SUFFIXES


def open_class_map(path: str | Path, *, legend: Legend | str | Path | None = None) -> ClassMap:
    """Open a product's folder or a raster of classes.

    Parameters
    ----------
    legend
        Classes of a raster that has none inside; the legend's values are its pixel values. By
        default each value that occurs is a class of that name.

    Raises
    ------
    MissingFileError
        If there is no such map.
    InputError
        If it is not one band of whole numbers with a CRS.
    """
    import rasterio
    from rasterio.errors import RasterioIOError

    folder = Path(path)
    file = folder
    if folder.is_dir():
        held = [folder / name for name in _CLASSES if (folder / name).is_file()]
        file = held[0] if held else folder / _CLASSES[0]
    if not file.is_file():
        raise MissingFileError(
            f"Cannot open the map {path}: there is no "
            f"{_CLASSES[0] + ' in it' if folder.is_dir() else 'such file'}. Give the folder that "
            "`stcln-geo predict` wrote, or a GeoTIFF of classes."
        )
    try:
        with rasterio.open(file) as source:
            _check_raster(file, source)
            own = read_legend(file) if legend is None else None
            values, chosen = _meaning(file, source, own, legend)
            beside = file.with_name(f"confidence{file.suffix}")
            return ClassMap(
                path=file,
                confidence=beside if file.name in _CLASSES and beside.is_file() else None,
                legend=chosen,
                values=values,
                nodata=None if source.nodata is None else int(source.nodata),
                shape_yx=(int(source.height), int(source.width)),
                crs=source.crs,
                transform=source.transform,
            )
    except RasterioIOError as error:
        raise InputError(
            f"Cannot open the map {file}: {error}. It must be a raster that GDAL reads, such as "
            "a GeoTIFF of classes."
        ) from error


def _more_or_less(share: float) -> str:
    """Return a difference for people, such as ``0.08 % less``."""
    percent = round(abs(100 * share), 2)
    return f"{percent:.2f} % {'less' if share < 0 else 'more'}" if percent else "as much"


def _check_raster(file: Path, source: Any) -> None:
    kind = np.dtype(source.dtypes[0]).kind
    if source.count != 1 or kind not in "ui" or source.crs is None:
        found = f"{source.count} bands of {source.dtypes[0]}, CRS {source.crs or 'missing'}"
        raise InputError(
            f"Cannot use {file} as a class map: it has {found}. A class map has one band of whole "
            "numbers and a CRS. Give the map's classes, or assign its CRS with `gdal_edit.py "
            "-a_srs`."
        )


def _meaning(
    file: Path, source: Any, own: Legend | None, given: Legend | str | Path | None
) -> tuple[dict[int, int], Legend]:
    """Return the class code of each pixel value, and the legend."""
    if own is not None:
        return {code: code for code in own.codes}, own
    if given is not None:
        legend = given if isinstance(given, Legend) else Legend.read(given)
        try:
            return {
                int(value): entry.code for entry in legend.classes for value in entry.values
            }, legend
        except ValueError as error:
            raise InputError(
                f"Cannot read {file} with this legend: the values of a class map's legend are "
                f"pixel values, that is whole numbers ({error}). Give value,name,color with the "
                "map's own numbers."
            ) from error
    found: set[int] = set()
    height, width = source.shape
    rows = max(min(512, _STRIP_PIXELS // width), 1)
    for row in range(0, height, rows):
        strip = Window(row, 0, min(rows, height - row), width)
        found.update(np.unique(source.read(1, window=_raster_window(strip))).tolist())
        if len(found) > 256:
            break
    values = sorted(found - ({int(source.nodata)} if source.nodata is not None else set()))
    if not 1 <= len(values) <= CLASS_NODATA:
        raise InputError(
            f"Cannot use {file} as a class map: it holds {len(values) or 'no'} different values "
            "beside nodata, and a map has 1 to 255 classes. Give a map of classes."
        )
    codes = {value: code for code, value in enumerate(values)}
    return codes, Legend.from_values([str(value) for value in values])


def _raster_window(window: Window) -> Any:
    from rasterio.windows import Window as RasterWindow

    return RasterWindow(window.col, window.row, window.width, window.height)
