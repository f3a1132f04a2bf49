"""Pixels as they lie in a file, and the numbers of a grid that are made of them.

Half of Sentinel-2's bands have pixels of 20 m, whose corners lie on a grid of 10 m. There a number
of the grid is a sum of sixteenths of four pixels, which whole numbers hold exactly: it is the
number that GDAL's warper gives, to the digit, at a small part of its work. So a file's own pixels
can be kept, and be brought onto the grid piece by piece.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ..grid import Window

__all__ = ["Pixels"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """A rectangle of a file whose pixels are squares of whole pixels of a grid."""

    values: np.ndarray
    """(h, w), the file's numbers; of unsigned integers with no data 0 where ``smooth``."""
    row: int
    """Of the grid: where the first value begins; may be negative."""
    col: int
    nodata: int
    """Number that means no data, and what lies beyond the values."""
    step: int = 1
    """Pixels of the grid along the side of one of the file."""
    smooth: bool = False
    """True interpolates linearly, for a step of 2; False repeats."""

    def shift(self, rows: int, cols: int) -> Pixels:
        """Return the same pixels of a grid that begins so much further north and west."""
        return dataclasses.replace(self, row=self.row + rows, col=self.col + cols)

    def part(self, area: Window) -> Pixels:
        """Return a copy of what an area of the grid needs, for whoever keeps it."""
        window = self._needed(area)
        return dataclasses.replace(
            self,
            values=self.values[window.rows, window.cols].copy(),
            row=self.row + window.row * self.step,
            col=self.col + window.col * self.step,
        )

    def on_grid(self, area: Window) -> np.ndarray:
        """Return the numbers of an area of the grid, (H, W) in the dtype of the file.

        Interpolation is that of GDAL's warper: a pixel whose own file pixel has no data has none;
        else those of the four pixels around it that have data count, by their nearness.
        """
        height, width = self.values.shape
        place = Window(self.row, self.col, height * self.step, width * self.step)
        inside = place.intersection(area)
        if inside.is_empty:
            return np.full(area.shape_yx, self.nodata, dtype=self.values.dtype)
        here = inside.relative_to(place)
        window = _pixels_under(here, self.step)
        if self.smooth:
            large = _doubled(_with_neighbours(self.values, window))
        else:
            large = self.values[window.rows, window.cols]
            if self.step > 1:
                large = large.repeat(self.step, axis=0).repeat(self.step, axis=1)
        cut = here.shift(-window.row * self.step, -window.col * self.step)
        numbers: np.ndarray = large[cut.rows, cut.cols]
        if inside == area:
            return numbers
        filled = np.full(area.shape_yx, self.nodata, dtype=self.values.dtype)
        target = inside.relative_to(area)
        filled[target.rows, target.cols] = numbers
        return filled

    def _needed(self, area: Window) -> Window:
        """Return which of the values an area needs; an empty window where none."""
        whole = Window(0, 0, *self.values.shape)
        window = _pixels_under(area.shift(-self.row, -self.col), self.step)
        return window.expand(int(self.smooth)).intersection(whole)


def _pixels_under(area: Window, step: int) -> Window:
    """Return the pixels of some step that an area touches; both count from the same corner."""
    row, col = area.row // step, area.col // step
    bottom, right = -(-(area.row + area.height) // step), -(-(area.col + area.width) // step)
    return Window(row, col, bottom - row, right - col)


def _with_neighbours(values: np.ndarray, window: Window) -> np.ndarray:
    """Return a window and one pixel around it; at the edges those inside are repeated."""
    wide = window.expand(1)
    there = wide.intersection(Window(0, 0, *values.shape))
    found: np.ndarray = values[there.rows, there.cols]
    if there == wide:
        return found
    above, left = there.row - wide.row, there.col - wide.col
    below, right = wide.height - above - there.height, wide.width - left - there.width
    return np.pad(found, ((above, below), (left, right)), mode="edge")


def _doubled(around: np.ndarray) -> np.ndarray:
    """Interpolate linearly to twice as many pixels along each axis.

    Parameters
    ----------
    around : (h + 2, w + 2) uint8 or uint16, 0 where there is no data; one pixel more on each side.

    Returns
    -------
    (2 h, 2 w) in the same dtype.
    """
    total = _sixteenths(around, np.uint32)
    result: np.ndarray = ((total + 8) >> 4).astype(around.dtype)
    measured = around != 0
    if measured.all():
        return result
    share = _sixteenths(measured, np.uint8)
    # Where some of the four have no data, the others share their weight among themselves.
    some = np.flatnonzero((share > 0) & (share < 16))
    weight = share.ravel()[some].astype(np.uint32)
    own = measured[1:-1, 1:-1].repeat(2, axis=0).repeat(2, axis=1).ravel()[some]
    numbers = (2 * total.ravel()[some] + weight) // (2 * weight)
    result.reshape(-1)[some] = np.where(own, numbers, 0)
    return result


def _sixteenths(around: np.ndarray, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return 16 times the interpolated numbers: (h + 2, w + 2) -> (2 h, 2 w)."""
    wide = around.astype(dtype)
    height, width = wide.shape[0] - 2, wide.shape[1] - 2
    rows = np.empty((2 * height, width + 2), dtype=dtype)
    centre = 3 * wide[1:-1]
    np.add(centre, wide[:-2], out=rows[0::2])
    np.add(centre, wide[2:], out=rows[1::2])
    total = np.empty((2 * height, 2 * width), dtype=dtype)
    centre = 3 * rows[:, 1:-1]
    np.add(centre, rows[:, :-2], out=total[:, 0::2])
    np.add(centre, rows[:, 2:], out=total[:, 1::2])
    return total
