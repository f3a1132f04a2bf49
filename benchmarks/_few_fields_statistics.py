"""Mean, deviation and Student's interval of the figures of a few seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Of all intervals."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What the figures of some seeds say of their mean."""

    count: int
    mean: float | None
    """None without any figure."""
    deviation: float | None
    """Standard deviation (n - 1); None, as the ends, of fewer than two figures."""
    low: float | None
    high: float | None
    """Ends of the interval of the mean."""


def estimate(values: Sequence[float]) -> Estimate:
    """Return mean, deviation and Student's interval of one figure a seed."""
    count = len(values)
    mean = float(np.mean(values)) if count else None
    if mean is None or count < 2:
        return Estimate(count=count, mean=mean, deviation=None, low=None, high=None)
    from scipy.stats import t as student

    deviation = float(np.std(values, ddof=1))
    half = float(student.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
    return Estimate(count=count, mean=mean, deviation=deviation, low=mean - half, high=mean + half)


def estimate_difference(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate:
    """Return the estimate of ``first - second``, by seed; seeds that one lacks are left out."""
    return estimate([first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())])
