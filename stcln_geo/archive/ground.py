"""How much ground the pixels of a raster cover."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["EQUAL_AREA", "pixel_areas"]

EQUAL_AREA = "EPSG:6933"
"""A CRS of the whole world but the poles, in which equal areas are equal."""

_WORLD = 2 * 17_367_530.445
"""Metres around the world in it."""

_CELL = 32
"""Side (pixels) of the cells in which pixels count as equally large."""


def pixel_areas(crs: str, corner: Any, shape_yx: tuple[int, int]) -> np.ndarray:
    """Return the area on the ground of the pixels of a projected raster: (H, W), square metres.

    Measured by cells of at most `_CELL` pixels a side; 0 where the CRS has no place.
    """
    from pyproj import Transformer

    ends = [np.unique(np.append(np.arange(0, size, _CELL), size)) for size in shape_yx]
    cols, rows = np.meshgrid(ends[1], ends[0])
    x, y = Transformer.from_crs(crs, EQUAL_AREA, always_xy=True).transform(*(corner * (cols, rows)))
    # The two diagonals of a cell span twice its area; they may reach over the antimeridian.
    with np.errstate(invalid="ignore"):
        (down_x, down_y), (up_x, up_y) = (
            (_around(x[1:, to] - x[:-1, of]), y[1:, to] - y[:-1, of])
            for to, of in ((slice(1, None), slice(None, -1)), (slice(None, -1), slice(1, None)))
        )
        areas = np.abs(down_x * up_y - down_y * up_x) / 2
    areas = np.where(np.isfinite(areas), areas, 0.0)
    sizes = [np.diff(one) for one in ends]
    areas /= sizes[0][:, None] * sizes[1]
    found: np.ndarray = np.repeat(np.repeat(areas, sizes[0], axis=0), sizes[1], axis=1)
    return found


def _around(across: np.ndarray) -> np.ndarray:
    """Return distances along the parallels of the equal-area projection, the short way round."""
    return (across + _WORLD / 2) % _WORLD - _WORLD / 2
