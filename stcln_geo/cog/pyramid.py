"""Overview levels of uint8 rasters: how large they are, and how four pixels become one.

Each level halves the one before, its size rounded up, and an overview pixel stands for exactly
the two by two pixels at twice its row and column. A square whose side is a multiple of 2^n, and
whose first pixel lies at such a multiple, therefore has n overviews that need no neighbour.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = [
    "NODATA",
    "Resampling",
    "count_values",
    "halve",
    "level_shape",
    "level_shapes",
    "pyramid",
]

Resampling = Literal["mode", "average"]
"""How overviews are made: the most frequent class, or the mean."""

NODATA = 255
"""The value without meaning, in classes and in percents."""

_STRIP = 64  # overview rows at a time: the temporary arrays stay in the processor's cache
_COUNT_UNIT = 1024  # more than the sum of four pixels
_MAX_PIXEL = 254


def level_shape(shape_yx: tuple[int, int], level: int) -> tuple[int, int]:
    """Return rows and columns of a level; 0 is the full resolution."""
    height, width = shape_yx
    return -(-height >> level), -(-width >> level)


def level_shapes(shape_yx: tuple[int, int], tile: int) -> list[tuple[int, int]]:
    """Return the shapes from full resolution to the first level that fits in one tile."""
    shapes = [level_shape(shape_yx, 0)]
    while max(shapes[-1]) > tile:
        shapes.append(level_shape(shape_yx, len(shapes)))
    return shapes


def pyramid(values: np.ndarray, levels: int, resampling: Resampling) -> list[np.ndarray]:
    """Return a raster and its overviews, each made from the one before.

    Parameters
    ----------
    values : (H, W) uint8, 255 = nodata.
    levels
        Number of overviews.

    Returns
    -------
    list
        (ceil(H / 2^k), ceil(W / 2^k)) uint8 for k = 0 to ``levels``.
    """
    made = [values]
    for _ in range(levels):
        made.append(halve(made[-1], resampling))
    return made


def halve(values: np.ndarray, resampling: Resampling) -> np.ndarray:
    """Return the next overview of a raster.

    Parameters
    ----------
    values : (H, W) uint8, 255 = nodata. Pixels beyond an odd edge count as nodata.
    resampling
        "mode" takes the most frequent of the valid values, of equally frequent ones the lowest.
        "average" takes their mean, a half rounded up. Both give nodata where none is valid.

    Returns
    -------
    (ceil(H / 2), ceil(W / 2)) uint8.
    """
    width = values.shape[1]
    result = np.empty(level_shape(values.shape, 1), dtype=np.uint8)
    shrink = _mode if resampling == "mode" else _average
    for top in range(0, result.shape[0], _STRIP):
        strip = values[2 * top : 2 * (top + _STRIP)]
        odd = (strip.shape[0] % 2, width % 2)
        if any(odd):
            strip = np.pad(strip, ((0, odd[0]), (0, odd[1])), constant_values=NODATA)
        result[top : top + _STRIP] = shrink(np.ascontiguousarray(strip))
    return result


def count_values(values: np.ndarray) -> dict[int, int]:
    """Return the number of pixels by value that occurs, of (H, W) uint8.

    Counted strip by strip: numpy counts integers of eight bytes only, and copies.
    """
    counts = np.zeros(256, dtype=np.int64)
    for top in range(0, values.shape[0], _STRIP):
        counts += np.bincount(values[top : top + _STRIP].ravel(), minlength=256)
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _mode(strip: np.ndarray) -> np.ndarray:
    """Return the mode of each two by two pixels, (2H, 2W) uint8 -> (H, W) uint8.

    The four are sorted (nodata last), so that equal values are neighbours.
    """
    upper, lower = strip[0::2], strip[1::2]
    left, right = _columns(np.minimum(upper, lower))
    first, second = np.minimum(left, right), np.maximum(left, right)
    left, right = _columns(np.maximum(upper, lower))
    third, fourth = np.minimum(left, right), np.maximum(left, right)
    second, third = np.minimum(second, third), np.maximum(second, third)

    # From the weakest claim to the strongest: any value, the upper pair, the middle pair, the
    # lower pair. Three or four of a kind include one of the pairs and win by it.
    chosen: np.ndarray = first.copy()
    _replace(chosen, third, (third == fourth) & (third != NODATA))
    _replace(chosen, second, (second == third) & (second != NODATA))
    _replace(chosen, first, first == second)
    return chosen


def _replace(target: np.ndarray, source: np.ndarray, where: np.ndarray) -> None:
    """Copy values where a condition holds, without branches (much faster than a mask)."""
    bits = np.negative(where.view(np.uint8))  # 0 or 255
    target ^= (target ^ source) & bits


def _columns(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the two pixels of each pair of columns; which comes first does not matter here."""
    pairs = values.view(np.uint16)
    return pairs.astype(np.uint8), (pairs >> 8).astype(np.uint8)


def _average(strip: np.ndarray) -> np.ndarray:
    """Return the mean of each two by two pixels, (2H, 2W) uint8 -> (H, W) uint8."""
    weighed = strip.astype(np.uint16)
    gaps = strip == NODATA
    whole = not gaps.any()
    if not whole:
        # Sum and number of valid pixels travel in one integer.
        weighed += _COUNT_UNIT
        weighed[gaps] = 0
    rows = weighed[0::2] + weighed[1::2]
    sums: np.ndarray = rows[:, 0::2] + rows[:, 1::2]
    means: np.ndarray = ((sums + 2) >> 2).astype(np.uint8) if whole else _MEANS[sums]
    return means


def _mean_table() -> np.ndarray:
    """Return the rounded mean by ``count x unit + sum``."""
    table = np.full(5 * _COUNT_UNIT, NODATA, dtype=np.uint8)
    for count in range(1, 5):
        sums = np.arange(count * _MAX_PIXEL + 1)
        table[count * _COUNT_UNIT + sums] = (2 * sums + count) // (2 * count)
    return table


_MEANS = _mean_table()
