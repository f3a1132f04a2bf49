"""Merge the clear observations of a period into one: median, medoid or least cloudy.

All three work pixel by pixel on integers, so the result does not depend on how a grid is cut
into blocks. A pixel without a clear observation has no data. Cloudy values never count.

- ``median``: each band's median of the clear values. Between two middle values it is their mean,
  half a digital number rounded down. The spectrum may mix days.
- ``medoid``: the observation nearest to that median spectrum (least sum of squared differences
  over the bands; of equally near ones the earliest). The spectrum is one that was measured.
- ``least-cloudy``: the observation from the scene with the least cloud cover by its metadata; of
  equal ones the nearest to the middle of the period, then the earliest. Scenes that do not
  say how cloudy they are come last.

Each pixel also gets its day of acquisition: that of the observation it is, or, for the median, the
mean day of the clear observations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .contract import FILL, NO_DAY

__all__ = ["UNKNOWN_COVER", "Composite", "Composited", "compose"]

Composite = Literal["none", "median", "medoid", "least-cloudy"]
"""How dates are merged over time; ``none`` keeps each solar day."""

UNKNOWN_COVER = 65535
"""Cloud cover of a scene that does not tell; others are in 0.01 %, 0 to 10000."""

STRIP_VALUES = 1_000_000
"""About as many values (days x pixels) are worked on at a time, which bounds the memory."""

_LAST = np.int16(32767)
"""Sorts behind all values, so that those under clouds come last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Composited:
    """One period, merged."""

    reflectance: np.ndarray
    """(C, H, W) int16; -32768 where no observation was clear."""
    observations: np.ndarray
    """(H, W) uint8: number of clear observations."""
    day: np.ndarray
    """(H, W) int8: the day, by the numbers given; of a median their mean, rounded to the nearest
    whole number, halves up. -128 where no observation was clear."""


def compose(
    method: Composite,
    reflectance: np.ndarray,
    valid: np.ndarray,
    *,
    days: Sequence[int] | None = None,
    cover: np.ndarray | None = None,
    preference: Sequence[int] | None = None,
) -> Composited:
    """Merge the days of one period.

    Parameters
    ----------
    reflectance : (N, C, H, W) int16, one solar day after another, at most 255.
    valid : (N, H, W) bool, True where the observation is clear.
    days : (N,) -127 to 127, what to call each day; by default its position.
    cover : (N, H, W) uint16, for ``least-cloudy``: cloud cover of the scene that the pixel is
        from, in 0.01 %, or ``UNKNOWN_COVER``.
    preference : (N,) positions of the days, for ``least-cloudy``: of equally cloudy ones the
        first in this order wins; by default the earliest.
    """
    count, bands, height, width = reflectance.shape
    numbers = np.asarray(range(count) if days is None else days, dtype=np.int8)
    result = np.full((bands, height, width), FILL, dtype=np.int16)
    observations = valid.sum(axis=0, dtype=np.uint8)
    day = np.full((height, width), NO_DAY, dtype=np.int8)
    for rows in _strips(count, height, width):
        values, usable, out = reflectance[:, :, rows], valid[:, rows], result[:, rows]
        if not usable.any():
            continue
        if method == "least-cloudy":
            hidden = np.zeros(valid.shape, dtype=np.uint16) if cover is None else cover
            chosen = _pick_least(out, values, usable, hidden[:, rows], preference or range(count))
            np.copyto(day[rows], numbers[chosen], where=observations[rows] > 0)
            continue
        _write_median(out, values, usable, observations[rows])
        if method == "medoid":
            chosen = _replace_by_nearest(out, values, usable)
            np.copyto(day[rows], numbers[chosen], where=observations[rows] > 0)
        else:
            _write_mean_day(day[rows], numbers, usable, observations[rows])
    return Composited(reflectance=result, observations=observations, day=day)


def _strips(days: int, height: int, width: int) -> Iterator[slice]:
    step = max(STRIP_VALUES // max(days * width, 1), 1)
    for start in range(0, height, step):
        yield slice(start, start + step)


def _write_median(
    out: np.ndarray, values: np.ndarray, usable: np.ndarray, count: np.ndarray
) -> None:
    """Write the median of each band's clear values where there is one: (C, H, W)."""
    some = count > 0
    lower = np.maximum(count.astype(np.intp) - 1, 0) // 2
    upper = count.astype(np.intp) // 2
    for band in range(values.shape[1]):
        ordered = np.sort(np.where(usable, values[:, band], _LAST), axis=0)
        middle = np.take_along_axis(ordered, lower[None], axis=0)[0].astype(np.int32)
        middle += np.take_along_axis(ordered, upper[None], axis=0)[0]
        np.copyto(out[band], (middle >> 1).astype(np.int16), where=some)


def _write_mean_day(
    out: np.ndarray, numbers: np.ndarray, usable: np.ndarray, count: np.ndarray
) -> None:
    """Write the mean number of the clear days where there is one: (H, W) int8."""
    total = np.zeros(out.shape, dtype=np.int32)
    for number, clear in zip(numbers.tolist(), usable, strict=True):
        np.add(total, number, out=total, where=clear)
    some = count > 0
    divisor = np.maximum(count, 1).astype(np.int32) * 2
    np.copyto(out, ((2 * total + count) // divisor).astype(np.int8), where=some)


def _replace_by_nearest(out: np.ndarray, values: np.ndarray, usable: np.ndarray) -> np.ndarray:
    """Replace a median spectrum by the nearest clear observation: (C, H, W), in place.

    Returns
    -------
    (H, W) uint8, the observation's position; 0 where none is clear.
    """
    median = out.copy()
    least = np.full(out.shape[1:], np.iinfo(np.int64).max)
    chosen = np.zeros(least.shape, dtype=np.uint8)
    for position, (spectrum, clear) in enumerate(zip(values, usable, strict=True)):
        distance = np.zeros(least.shape, dtype=np.int64)
        for band in range(len(median)):
            distance += (spectrum[band].astype(np.int64) - median[band]) ** 2
        nearer = clear & (distance < least)
        np.copyto(least, distance, where=nearer)
        np.copyto(out, spectrum, where=nearer)
        chosen[nearer] = position
    return chosen


def _pick_least(
    out: np.ndarray,
    values: np.ndarray,
    usable: np.ndarray,
    cover: np.ndarray,
    preference: Sequence[int],
) -> np.ndarray:
    """Write the clear observation of the least cloudy scene: (C, H, W), in place.

    Returns
    -------
    (H, W) uint8, the observation's position; 0 where none is clear.
    """
    # One more than the largest cover, so that an unknown one still beats nothing.
    least = np.full(out.shape[1:], UNKNOWN_COVER + 1, dtype=np.int32)
    chosen = np.zeros(least.shape, dtype=np.uint8)
    for day in preference:
        better = usable[day] & (cover[day] < least)
        np.copyto(least, cover[day], where=better)
        np.copyto(out, values[day], where=better)
        chosen[better] = day
    return chosen
