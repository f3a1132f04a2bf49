"""How many points a sample needs, and how they are shared out among the classes of a map."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

if TYPE_CHECKING:
    from ..maps.classmap import ClassAreas

__all__ = ["allocate", "count_needed", "standard_error"]

_ROUNDING = 0.01
"""By so much of it a target may be missed, for points are whole."""


def standard_error(
    points: NDArray[np.int64], expected: NDArray[np.float64], areas: ClassAreas
) -> float:
    """Return the standard error of the overall accuracy (Olofsson et al. 2014, eq. 5).

    Of a class whose pixels are all visited nothing is left to estimate.

    Parameters
    ----------
    points : (K,) of each class.
    expected : (K,) user's accuracy.
    """
    some = points > 0
    share = areas.areas[some] / areas.areas.sum()
    spread = expected[some] * (1 - expected[some])
    left = 1 - points[some] / areas.pixels[some]
    return float(np.sqrt((share**2 * spread * left / points[some]).sum()))


def count_needed(
    error_of: Callable[[int], float], target: float, *, least: int, most: int
) -> int | None:
    """Return the points with which a standard error is reached; None where ``least`` do.

    Parameters
    ----------
    error_of
        Standard error by number of points; the more, the less.
    least
        Points that were meant to reach it.
    most
        Points that surely reach it.
    """
    if error_of(least) <= target * (1 + _ROUNDING):
        return None
    while least + 1 < most:
        middle = (least + most) // 2
        if error_of(middle) <= target:
            most = middle
        else:
            least = middle
    return most


def allocate(
    weights: NDArray[Any], count: int, *, minimum: int, available: NDArray[Any]
) -> NDArray[np.int64]:
    """Divide points among strata: the minimum for the rare, the others by their weights.

    Parameters
    ----------
    weights : (H,)
        Share of the points where no bound holds.
    minimum : int
        Points of each stratum at least, as far as it has pixels.
    available : (H,)
        Pixels of each stratum: points at most.

    Returns
    -------
    (H,) int64, sums to ``count``.
    """
    weights = np.asarray(weights, dtype=np.float64)
    most = np.asarray(available, dtype=np.int64)
    least = np.minimum(minimum, most)
    if not least.sum() <= count <= most.sum():
        raise InputError(
            f"Cannot draw {count} points from {len(most)} classes with {int(most.sum())} pixels "
            f"and at least {minimum} points a class: that is {int(least.sum())} points or more, "
            "and at most one a pixel. Change --count or --minimum."
        )
    weights = np.maximum(weights, weights.max() * 1e-9) if weights.max() > 0 else weights + 1.0

    def bounded(scale: float) -> NDArray[np.float64]:
        return np.clip(weights * scale, least, most)

    low, high = 0.0, float((most / weights).max()) + 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if bounded(middle).sum() < count else (low, middle)
    exact = bounded(high)
    points = np.clip(np.floor(exact + 1e-9), least, most).astype(np.int64)
    # Largest remainders get the points that rounding down left over.
    for place in np.argsort(points - exact, kind="stable"):
        if points.sum() == count:
            break
        points[place] += points[place] < most[place]
    return points
