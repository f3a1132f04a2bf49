"""Means over seeds, with Student's intervals; differences of pairs of runs of the same seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["LEVEL", "Estimate", "estimate", "estimate_difference"]

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """The mean of some runs, and how sure it is."""

    count: int
    """Runs that have the figure."""
    mean: float | None
    """None without runs."""
    deviation: float | None
    """Standard deviation between runs (n - 1); None of fewer than two."""
    low: float | None
    high: float | None
    """Ends of the 95 % interval of the mean, by Student's t; None of fewer than two runs."""


def estimate(values: Sequence[float | None]) -> Estimate:
    """Estimate a mean from one value a run; None and NaN are left out.

    The interval is mean ± t(0.975, n - 1) · sd / √n: of the mean over all seeds there could be, if
    values of seeds are normal.
    """
    known = np.array(
        [value for value in values if value is not None and math.isfinite(value)], dtype=np.float64
    )
    if not known.size:
        return Estimate(count=0, mean=None, deviation=None, low=None, high=None)
    mean = float(known.mean())
    if known.size == 1:
        return Estimate(count=1, mean=mean, deviation=None, low=None, high=None)
    from scipy.stats import t as student

    deviation = float(known.std(ddof=1))
    half = float(student.ppf((1 + LEVEL) / 2, known.size - 1)) * deviation / math.sqrt(known.size)
    return Estimate(
        count=int(known.size), mean=mean, deviation=deviation, low=mean - half, high=mean + half
    )


def estimate_difference(
    first: Mapping[int, float | None], second: Mapping[int, float | None]
) -> Estimate:
    """Estimate the mean of ``first`` minus ``second``, by seed; seeds that one lacks are left out.

    Runs of a seed share fields, order and first weights as far as they can, so that the interval
    is that of the differences, not of two independent means.
    """
    differences = []
    for seed in first.keys() & second.keys():
        one, other = first[seed], second[seed]
        if one is not None and other is not None:
            differences.append(one - other)
    return estimate(sorted(differences))
