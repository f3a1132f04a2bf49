"""Merge overlapping windows by weights that the lattice fixes.

A window sees its core and a halo, so near the edges of a core two or four windows know
something of a pixel. Their probabilities are summed with Hann weights that depend on nothing
but the pixel's place in the lattice, and that add up to one at each pixel. The sums are made
of whole numbers (probability times weight, in units of 2^-30): such sums are exact, so that
neither the order of windows nor the way a region is cut into shards can change a digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ..grid import Lattice, Window

if TYPE_CHECKING:
    from .stitch import Piece

__all__ = ["Accumulator", "window_weights"]

_ONE = 2**30
_SLAB = 64


def window_weights(lattice: Lattice) -> np.ndarray:
    """Return the weights of a window's pixels, (window, window) float64, all positive.

    Over all windows of the lattice the weights add up to one at each pixel.
    """
    side, stride = lattice.window, lattice.stride
    hann = np.sin(math.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(side)
    for shift in range(-(side // stride) * stride, side, stride):
        first, last = max(shift, 0), min(side + shift, side)
        if first < last:
            total[first:last] += hann[first - shift : last - shift]
    axis = hann / total
    return np.outer(axis, axis)


class Accumulator:
    """Sums of weighted probabilities, for the rows of a target that are being worked on.

    Parameters
    ----------
    target
        The rectangle to fill (absolute pixels).
    rows
        Rows of the target that are kept at a time; ``add`` may reach no further beyond the last
        finished row.
    classes
        Number of classes, K.
    """

    def __init__(self, target: Window, lattice: Lattice, *, rows: int, classes: int) -> None:
        self._target = target
        self._weights = (window_weights(lattice) * _ONE).astype(np.float32)
        self._top = target.row
        self._end = target.row + target.height
        self._sums = np.zeros(
            (classes, min(rows, target.height), target.width), dtype=np.int32
        )  # (K, rows, W)

    def add(self, piece: Piece, probability: np.ndarray) -> None:
        """Add a window's probabilities, (K, window, window) float32, where it meets the target."""
        inside = piece.owned.relative_to(piece.seen)
        part = probability[:, inside.rows, inside.cols]
        share = part * self._weights[inside.rows, inside.cols]
        place = piece.owned.shift(-self._top, -self._target.col)
        self._sums[:, place.rows, place.cols] += np.rint(share).astype(np.int32)

    def finish(self, row: int | None = None) -> Iterator[tuple[Window, np.ndarray]]:
        """Yield the finished rows and their probabilities, and make room for others.

        Parameters
        ----------
        row
            The first absolute row that a window to come may still change; None: all are done.

        Yields
        ------
        tuple
            Absolute pixels, and (K, h, W) float32: 0 where no window was added. Rows that no window
            can have reached may be left out.
        """
        end = self._end if row is None else min(max(row, self._top), self._end)
        done = end - self._top
        # Where the region has a gap, no window reached the rows beyond those that are kept.
        held = min(done, self._sums.shape[1])
        for first in range(0, held, _SLAB):
            last = min(first + _SLAB, held)
            window = Window(self._top + first, self._target.col, last - first, self._target.width)
            yield window, self._sums[:, first:last].astype(np.float32) * np.float32(1 / _ONE)
        if done:
            kept = self._sums.shape[1] - held
            self._sums[:, :kept] = self._sums[:, held:].copy()
            self._sums[:, kept:] = 0
            self._top = end
