"""Accuracy and area of a map from a probability sample, with standard errors: numpy only.

Every figure is a ratio of two population totals: user's accuracy is (area right and mapped as
k) / (area mapped as k), the area share of k is (area that is k) / (all area). The totals are
estimated by stratum and the ratio's variance by linearisation (Stehman 2014,
doi 10.1080/01431161.2014.930207, eqs. 2, 27 and 28), for units of equal size or not:

    e_u = z_u (y_u - R x_u - mean_h),   V(R) = 1 / X^2  sum_h W_h^2 (1 - n_h / N_h) var_h(e) / n_h

with z_u the unit's size over the mean size in the sample of its stratum h, mean_h the
size-weighted mean of y - R x there, W_h the stratum's share of the area and X the estimated
denominator. With units of equal size and the map's classes as strata these are, term by term,
the estimators of Olofsson et al. 2014 (doi 10.1016/j.rse.2014.02.015, eqs. 5-7, 10, 11).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

__all__ = ["AreaAccuracy", "Estimate", "estimate_accuracy", "normal_quantile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate with its uncertainty; NaN where the sample does not give it."""

    value: float
    standard_error: float
    lower: float
    """Lower end of the confidence interval, not below 0."""
    upper: float
    """Upper end, not above 1 for a share."""

    def times(self, factor: float) -> Estimate:
        """Return the estimate in another unit, such as hectares for a share."""
        return Estimate(
            value=self.value * factor,
            standard_error=self.standard_error * factor,
            lower=self.lower * factor,
            upper=self.upper * factor,
        )

    def to_json(self) -> dict[str, float | None]:
        """Return plain JSON values; None stands for NaN."""
        names = ("value", "standard_error", "lower", "upper")
        values = {name: getattr(self, name) for name in names}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class AreaAccuracy:
    """Estimates over the sampled part of a map; K classes, shares in 0 to 1."""

    proportions: NDArray[np.float64]
    """(K, K) estimated share of the area; rows the truth, columns the map; sums to 1."""
    overall_accuracy: Estimate
    users_accuracy: tuple[Estimate, ...]
    producers_accuracy: tuple[Estimate, ...]
    f1: tuple[Estimate, ...]
    iou: tuple[Estimate, ...]
    area_share: tuple[Estimate, ...]
    """Share of the area whose truth is each class: adjusted for the map's errors."""
    macro_f1: float
    macro_miou: float
    """Mean over the classes that occur in the truth or the map."""
    covered: float
    """Share of the area in strata with a sample: what the figures hold for."""
    confidence_level: float

    def over(self, classes: int) -> AreaAccuracy:
        """Return the same with macro figures over the first classes alone."""
        return replace(
            self, macro_f1=_mean(self.f1[:classes]), macro_miou=_mean(self.iou[:classes])
        )


def estimate_accuracy(
    truth: NDArray[Any],
    predicted: NDArray[Any],
    *,
    classes: int,
    strata: NDArray[Any],
    stratum_areas: NDArray[Any],
    stratum_units: NDArray[Any] | None = None,
    sizes: NDArray[Any] | None = None,
    confidence_level: float = 0.95,
) -> AreaAccuracy:
    """Estimate accuracy and area shares from a stratified (or, with one stratum, simple) sample.

    Parameters
    ----------
    truth, predicted : (n,) integer
        Class codes 0 to ``classes - 1`` of the sampled units.
    strata : (n,) integer
        Stratum of each unit, counted from 0: the map's classes, or those of any other map.
    stratum_areas : (H,)
        Area of each stratum, in any unit.
    stratum_units : (H,), optional
        Units in each stratum, for the finite population correction; by default many.
    sizes : (n,), optional
        Area of each unit where they differ, in any unit; units are then drawn with equal
        chance within a stratum and count by their area.
    confidence_level : float
        Of the intervals, which assume normal estimates (value -+ z standard errors).

    Notes
    -----
    A stratum with area and without a unit is left out, and ``covered`` says what is left. With a
    single unit in a stratum, what it contributes to has no standard error (NaN).
    """
    sample = _Sample(truth, predicted, strata, stratum_areas, stratum_units, sizes, classes)
    if not 0 < confidence_level < 1:
        raise InputError(
            f"Cannot give intervals of level {confidence_level:g}: it lies between 0 and 1, both "
            "excluded. Use --confidence-level 0.95."
        )
    z = normal_quantile(confidence_level)
    true = sample.truth[:, None] == np.arange(classes)  # (n, K)
    mapped = sample.predicted[:, None] == np.arange(classes)
    right = sample.truth == sample.predicted
    everything = np.ones(len(right))

    def each(top: NDArray[Any], bottom: NDArray[Any]) -> tuple[Estimate, ...]:
        return tuple(
            sample.ratio(top[:, code], bottom if bottom.ndim == 1 else bottom[:, code], z)
            for code in range(classes)
        )

    both = true & mapped
    f1 = each(2.0 * both, true.astype(float) + mapped)
    iou = each(both, true | mapped)
    proportions = np.zeros((classes, classes))
    np.add.at(proportions, (sample.truth, sample.predicted), sample.weights)
    return AreaAccuracy(
        proportions=proportions,
        overall_accuracy=sample.ratio(right, everything, z),
        users_accuracy=each(both, mapped),
        producers_accuracy=each(both, true),
        f1=f1,
        iou=iou,
        area_share=each(true, everything),
        macro_f1=_mean(f1),
        macro_miou=_mean(iou),
        covered=sample.covered,
        confidence_level=confidence_level,
    )


def normal_quantile(confidence_level: float) -> float:
    """Return the standard errors from a normal estimate to either end of its interval.

    >>> round(normal_quantile(0.95), 3)
    1.96
    """
    return NormalDist().inv_cdf(0.5 + confidence_level / 2)


class _Sample:
    """A sample with the weights of its units."""

    def __init__(
        self,
        truth: NDArray[Any],
        predicted: NDArray[Any],
        strata: NDArray[Any],
        areas: NDArray[Any],
        units: NDArray[Any] | None,
        sizes: NDArray[Any] | None,
        classes: int,
    ) -> None:
        self.truth, self.predicted, self.strata = (
            np.asarray(one).astype(np.int64) for one in (truth, predicted, strata)
        )
        areas = np.asarray(areas, dtype=np.float64)
        size = np.ones(len(self.truth)) if sizes is None else np.asarray(sizes, dtype=np.float64)
        _check(self.truth, self.predicted, self.strata, areas, size, classes)
        self.number = np.bincount(self.strata, minlength=len(areas))  # n_h
        sampled = np.where(self.number > 0, areas, 0.0)
        self.covered = float(sampled.sum() / areas.sum())
        self.share = sampled / sampled.sum()  # W_h
        total = np.bincount(self.strata, weights=size, minlength=len(areas))
        some = np.maximum(self.number, 1)
        self.relative = size / (total / some)[self.strata]  # z_u
        # What a unit stands for: W_h times its part of the sampled area of its stratum.
        self.weights = self.share[self.strata] * size / total[self.strata]
        left = np.ones(len(areas))
        if units is not None:
            population = np.maximum(np.asarray(units, dtype=np.float64), some)
            left = 1 - self.number / population
        # W_h^2 (1 - n_h / N_h) / (n_h (n_h - 1)), to be multiplied with sums of squares.
        self.factor = self.share**2 * left / (some * np.maximum(self.number - 1, 1))

    def ratio(self, top: NDArray[Any], bottom: NDArray[Any], z: float) -> Estimate:
        """Estimate the ratio of the totals of two variables, (n,) each; top is within bottom."""
        y, x = np.asarray(top, dtype=np.float64), np.asarray(bottom, dtype=np.float64)
        denominator = float(self.weights @ x)
        if denominator <= 0:
            return Estimate(value=math.nan, standard_error=math.nan, lower=math.nan, upper=math.nan)
        value = float(self.weights @ y) / denominator
        difference = y - value * x
        strata, length = self.strata, len(self.share)
        weighted = np.bincount(strata, weights=self.relative * difference, minlength=length)
        mean = weighted / np.maximum(self.number, 1)
        residual = self.relative * (difference - mean[strata])
        squares = np.bincount(strata, weights=residual**2, minlength=length)
        variance = float(self.factor @ squares) / denominator**2
        alone = self.number[strata] == 1
        error = math.nan if (alone & (x != 0)).any() else math.sqrt(variance)
        return Estimate(
            value=value,
            standard_error=error,
            lower=max(value - z * error, 0.0) if error == error else math.nan,
            upper=min(value + z * error, 1.0) if error == error else math.nan,
        )


def _check(
    truth: NDArray[Any],
    predicted: NDArray[Any],
    strata: NDArray[Any],
    areas: NDArray[Any],
    sizes: NDArray[Any],
    classes: int,
) -> None:
    """Raise unless the arrays describe one sample."""
    lengths = {len(truth), len(predicted), len(strata), len(sizes)}
    if lengths != {len(truth)} or not len(truth):
        raise InputError(
            f"Cannot estimate accuracy from arrays of lengths {sorted(lengths)}: truth, map and "
            "stratum are given for each unit, and there is at least one. Select the same units."
        )
    for name, codes, end in (("truth", truth, classes), ("map", predicted, classes),
                             ("stratum", strata, len(areas))):  # fmt: skip
        if codes.min() < 0 or codes.max() >= end:
            wrong = codes[(codes < 0) | (codes >= end)][0]
            raise InputError(
                f"Cannot estimate accuracy: the {name} of a unit is {wrong}, and there are codes "
                f"0 to {end - 1}. Leave out units without a class."
            )
    if not (areas[strata] > 0).all() or not (sizes > 0).all():
        raise InputError(
            "Cannot estimate accuracy: a unit, or a stratum that has units, has no area. The "
            "areas must be those of the strata the sample was drawn from."
        )


def _mean(estimates: tuple[Estimate, ...]) -> float:
    known = [one.value for one in estimates if one.value == one.value]
    return sum(known) / len(known) if known else math.nan
