"""Give reproducible random numbers that depend on place, never on the order of the calls.

Every value is a hash of integer coordinates and a key, so a pixel has the same value whichever
block it is computed in. The arithmetic is on unsigned 32-bit integers and is the same on every
machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ..grid import Window

UInts = NDArray[np.uint32]
Floats = NDArray[np.float32]

_WORD = 0xFFFFFFFF
_BYTES_DEVIATION = float(np.sqrt(4 * (256**2 - 1) / 12))
# Mean variance of a smoothstep interpolation of independent values of variance 1.
_NOISE_VARIANCE = (26 / 35) ** 2


def make_key(*parts: int) -> int:
    """Hash whole numbers into one 32-bit key."""
    value = 0x9E3779B9
    for part in parts:
        value ^= part & _WORD
        value = ((value ^ (value >> 16)) * 0x7FEB352D) & _WORD
        value = ((value ^ (value >> 15)) * 0x846CA68B) & _WORD
        value = (value ^ (value >> 16)) & _WORD
        value = (value + 0x9E3779B9) & _WORD
    return value


def make_uniform(*parts: int) -> float:
    """Hash whole numbers into one number in [0, 1)."""
    return make_key(*parts) / 2.0**32


def mix(values: UInts, key: int) -> UInts:
    """Hash an array of 32-bit words with a key; equal words give equal hashes."""
    mixed: UInts = values ^ np.uint32(key & _WORD)
    mixed ^= mixed >> np.uint32(16)
    mixed *= np.uint32(0x7FEB352D)
    mixed ^= mixed >> np.uint32(15)
    mixed *= np.uint32(0x846CA68B)
    mixed ^= mixed >> np.uint32(16)
    return mixed


def hash_grid(rows: NDArray[np.int64], cols: NDArray[np.int64], key: int) -> UInts:
    """Hash every pair of a row and a column: (R,) and (C,) give (R, C)."""
    by_row = mix((rows & _WORD).astype(np.uint32), key)
    by_col = (cols & _WORD).astype(np.uint32) * np.uint32(0x9E3779B1)
    return mix(by_row[:, np.newaxis] + by_col[np.newaxis, :], key)


def to_uniform(words: UInts) -> NDArray[np.float64]:
    """Turn hashes into numbers in [0, 1)."""
    return words / np.float64(2.0**32)


def to_normal(words: UInts) -> Floats:
    """Turn hashes into nearly normal numbers: the sums of their bytes, mean 0, deviation 1."""
    pairs = (words & np.uint32(0x00FF00FF)) + ((words >> np.uint32(8)) & np.uint32(0x00FF00FF))
    total = (pairs & np.uint32(0xFFFF)) + (pairs >> np.uint32(16))
    return (total.astype(np.float32) - np.float32(510.0)) * np.float32(1.0 / _BYTES_DEVIATION)


def make_noise(
    window: Window, *, cells: Sequence[int], weights: Sequence[float], key: int
) -> Floats:
    """Make a smooth random field of mean 0 and deviation about 1 over an absolute window.

    Parameters
    ----------
    window : Window
        Absolute pixels.
    cells : sequence of int
        Sizes of the features in pixels, one per octave.
    weights : sequence of float
        Amplitude of each octave, relative to one another.

    Returns
    -------
    (H, W) float32.
    """
    total = np.zeros((window.height, window.width), dtype=np.float32)
    for octave, (cell, weight) in enumerate(zip(cells, weights, strict=True)):
        total += np.float32(weight) * _octave(window, cell=cell, key=make_key(key, octave))
    return total * np.float32(1.0 / np.sqrt(_NOISE_VARIANCE * sum(weight**2 for weight in weights)))


def _octave(window: Window, *, cell: int, key: int) -> Floats:
    row, row_part = _cell_and_part(window.row, window.height, cell)
    col, col_part = _cell_and_part(window.col, window.width, cell)
    knots_y = np.arange(row[0], row[-1] + 2)
    knots_x = np.arange(col[0], col[-1] + 2)
    knots = to_normal(hash_grid(knots_y, knots_x, key))
    row, col = row - row[0], col - col[0]

    along_x = (
        knots[:, col] + (knots[:, col + 1] - knots[:, col]) * col_part[np.newaxis, :]
    )  # (knots_y, W)
    result: Floats = (
        along_x[row] + (along_x[row + 1] - along_x[row]) * row_part[:, np.newaxis]
    )  # (H, W)
    return result


def _cell_and_part(start: int, size: int, cell: int) -> tuple[NDArray[np.int64], Floats]:
    pixels = np.arange(start, start + size, dtype=np.int64)
    index = pixels // cell
    part = ((pixels - index * cell) / cell).astype(np.float32)
    return index, part * part * (np.float32(3.0) - np.float32(2.0) * part)
