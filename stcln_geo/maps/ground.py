"""Areas on the ground of a raster's pixels, where the grid's own are too far from them.

A mosaic shows maps of several UTM zones in the CRS of one. Far from that zone's meridian a pixel
covers less ground than its size on the grid says: 2 per cent less at the equator, a zone away. The
areal scale of the projection changes slowly, so that one number serves each square of pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from affine import Affine
    from shapely.geometry import Polygon

__all__ = ["GroundAreas", "ground_areas"]

_SIDE = 64
"""Pixels: over 640 m in UTM the areal scale changes by less than 0.01 %."""
_MOST_SQUARES = 512
"""Along a side of the raster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroundAreas:
    """What a pixel covers on the ellipsoid, by squares of pixels."""

    side: int
    """Side of a square (pixels)."""
    pixel: NDArray[np.float64]
    """(R, C) square metres of a pixel in each square."""
    width: int
    """Columns of the raster."""

    def at(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the areas (square metres) of pixels: (n,) float64."""
        found: NDArray[np.float64] = self.pixel[rows // self.side, cols // self.side]
        return found

    def of_row(self, row: int) -> NDArray[np.float64]:
        """Return the areas (square metres) of a row's pixels: (W,) float64."""
        return np.repeat(self.pixel[row // self.side], self.side)[: self.width]

    def measure(self) -> Callable[[Polygon], float]:
        """Return what gives an outline's area (square metres); its corners are whole pixels."""
        # What lies to the north and west of each corner of a square.
        before = np.zeros((self.pixel.shape[0] + 1, self.pixel.shape[1] + 1))
        before[1:, 1:] = self.pixel.cumsum(axis=0).cumsum(axis=1) * self.side**2
        last = np.array(self.pixel.shape) - 1

        def corner(points: NDArray[np.float64]) -> NDArray[np.float64]:
            at = points[:, ::-1] / self.side
            square = np.minimum(at.astype(np.int64), last)
            (row, col), (down, right) = square.T, (at - square).T
            upper = before[row, col] * (1 - right) + before[row, col + 1] * right
            lower = before[row + 1, col] * (1 - right) + before[row + 1, col + 1] * right
            found: NDArray[np.float64] = upper * (1 - down) + lower * down
            return found

        def ring(points: NDArray[np.float64]) -> float:
            # Between each level side and the raster's northern edge.
            level = points[:-1, 1] == points[1:, 1]
            found = corner(points)
            return abs(float((np.diff(found) * level).sum()))

        def outline(polygon: Polygon) -> float:
            holes = sum(ring(np.asarray(hole.coords)) for hole in polygon.interiors)
            return ring(np.asarray(polygon.exterior.coords)) - holes

        return outline


def ground_areas(crs: Any, transform: Affine, shape_yx: tuple[int, int]) -> GroundAreas:
    """Measure the pixels of a north-up raster in a projected CRS.

    Parameters
    ----------
    crs
        Anything pyproj takes.
    """
    from pyproj import CRS, Proj

    known = CRS.from_user_input(crs)
    height, width = shape_yx
    side = max(_SIDE, math.ceil(max(height, width) / _MOST_SQUARES))
    rows = (np.arange(math.ceil(height / side)) + 0.5) * side
    cols = (np.arange(math.ceil(width / side)) + 0.5) * side
    # The last squares reach beyond the raster, and what counts is within.
    rows, cols = np.minimum(rows, height - 0.5), np.minimum(cols, width - 0.5)
    x, y = np.meshgrid(transform.c + transform.a * cols, transform.f + transform.e * rows)
    projection = Proj(known)
    scale = np.asarray(projection.get_factors(*projection(x, y, inverse=True)).areal_scale)
    metres = known.axis_info[0].unit_conversion_factor
    return GroundAreas(side=side, pixel=abs(transform.determinant) * metres**2 / scale, width=width)
