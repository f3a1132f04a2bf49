"""Mean, deviation and Student's interval of the scores of a few seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """What a few values say about their mean."""

    mean: float
    deviation: float
    """Standard deviation (n - 1); NaN of one value."""
    low: float
    """Lower end of the interval of the mean; NaN of one value."""
    high: float
    count: int


def t_interval(values: Sequence[float], *, level: float = 0.95) -> Interval:
    """Return mean, deviation and Student's interval of values."""
    from scipy.stats import t as student

    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean=mean, deviation=math.nan, low=math.nan, high=math.nan, count=count)
    deviation = float(np.std(values, ddof=1))
    half = float(student.ppf((1 + level) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean=mean, deviation=deviation, low=mean - half, high=mean + half, count=count)


def paired_interval(
    values: Sequence[float], others: Sequence[float], *, level: float = 0.95
) -> Interval:
    """Return the interval of the differences ``values - others``, seed by seed."""
    return t_interval(np.subtract(values, others).tolist(), level=level)
