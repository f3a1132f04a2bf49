"""Fields burnt into a grid as numbers, strip by strip: the raster is never in memory as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from affine import Affine

__all__ = ["BurntFields", "NumberedStrips", "burn_fields"]


@dataclass(frozen=True, slots=True)
class _Strip:
    rows: slice
    packed: bytes
    """(rows, X) int32, compressed: some hundredths of its size, as rows repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BurntFields:
    """The number of the field in each pixel: 1, 2, ... in the order of the polygons, 0 for none."""

    shape_yx: tuple[int, int]
    pixels: NDArray[np.int64]
    """(P,) pixels of each polygon that are left to it."""
    strips: tuple[_Strip, ...]

    def through(self, table: NDArray[Any]) -> NumberedStrips:
        """Return the raster of ``table[number]``; ``table`` is (P + 1,) of any dtype."""
        return NumberedStrips(fields=self, table=table)


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberedStrips:
    """A raster whose rows are made when they are read, like those of a Zarr array."""

    fields: BurntFields
    table: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.fields.shape_yx

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values."""
        return self.table.dtype

    def __getitem__(self, rows: slice) -> NDArray[Any]:
        """Return whole rows, (rows, X)."""
        from numcodecs import blosc

        first, end, _ = rows.indices(self.shape[0])
        found = np.empty((max(end - first, 0), self.shape[1]), dtype=self.dtype)
        for strip in self.fields.strips:
            top, bottom = max(strip.rows.start, first), min(strip.rows.stop, end)
            if top < bottom:
                held = np.frombuffer(blosc.decompress(strip.packed), dtype=np.int32)
                numbers = held.reshape(-1, self.shape[1])
                here = slice(top - strip.rows.start, bottom - strip.rows.start)
                found[top - first : bottom - first] = self.table[numbers[here]]
        return found


def burn_fields(
    polygons: NDArray[Any],
    affine: Affine,
    shape_yx: tuple[int, int],
    *,
    all_touched: bool = False,
    erode: int = 0,
    strip: int = 512,
) -> BurntFields:
    """Burn polygons into a grid; where they overlap, the later one wins.

    Parameters
    ----------
    polygons
        (P,) polygons in the grid's CRS.
    affine
        From pixels to the CRS, without rotation.
    all_touched
        True burns every pixel a field touches; False those whose centre it holds.
    erode
        Pixels taken off each field's border.
    strip
        Rows that are burnt at a time. The result does not depend on it, except that
        ``all_touched`` may or may not burn a pixel of which a slanted side meets a corner alone.
    """
    import shapely
    from affine import Affine as Grid
    from numcodecs import blosc
    from rasterio.features import rasterize

    height, width = shape_yx
    shapes: NDArray[Any] = shapely.transform(
        shapely.force_2d(polygons), lambda points: _to_pixels(points, affine)
    )
    up = -1 if affine.e < 0 else 1
    _, north, _, south = shapely.bounds(shapes).T
    pixels = np.zeros(len(shapes) + 1, dtype=np.int64)
    strips = []
    for top, bottom in pairwise([*range(0, height, strip), height]):
        # What erosion looks at beyond the strip; the grid's own edge stays an edge.
        first, end = max(top - erode, 0), min(bottom + erode, height)
        near = np.flatnonzero((north <= end + 1) & (south >= first - 1))
        numbers = np.zeros((end - first, width), dtype=np.int32)
        if len(near):
            # Only rows are shifted: where sides cross a row is computed as in the whole raster.
            # GDAL treats the northern and southern sides of rectangles by the sign of y.
            origin, sides = np.array([0, first]), np.array([1, up])
            here = shapely.transform(shapes[near], partial(_moved, origin=origin, sides=sides))
            rasterize(
                zip(here, (near + 1).tolist(), strict=True), out=numbers,
                transform=Grid.scale(1, up), all_touched=all_touched,
            )  # fmt: skip
        for _ in range(erode):
            numbers = _erode_once(numbers)
        numbers = np.ascontiguousarray(numbers[top - first : bottom - first])
        pixels += np.bincount(numbers.reshape(-1), minlength=len(pixels))
        packed = blosc.compress(numbers, b"lz4", 1, blosc.SHUFFLE)
        strips.append(_Strip(slice(top, bottom), packed))
    return BurntFields(shape_yx=shape_yx, pixels=pixels[1:], strips=tuple(strips))


def _to_pixels(points: NDArray[np.float64], affine: Affine) -> NDArray[np.float64]:
    """Return (P, 2) places in pixels, rounded just as GDAL does when it burns on a grid."""
    return np.column_stack(
        [-affine.c / affine.a + points[:, 0] * (1 / affine.a),
         -affine.f / affine.e + points[:, 1] * (1 / affine.e)]
    )  # fmt: skip


def _moved(points: NDArray[Any], *, origin: NDArray[Any], sides: NDArray[Any]) -> NDArray[Any]:
    moved: NDArray[Any] = (points - origin) * sides
    return moved


def _erode_once(parcels: NDArray[np.int32]) -> NDArray[np.int32]:
    """Clear each pixel that has another field, or none, among its eight neighbours.

    The edge of the grid is no border: the field may go on beyond it.
    """
    padded = np.pad(parcels, 1, mode="edge")
    height, width = parcels.shape
    inner = np.ones(parcels.shape, dtype=bool)
    for row in range(3):
        for col in range(3):
            inner &= padded[row : row + height, col : col + width] == parcels
    return np.where(inner, parcels, np.int32(0))
