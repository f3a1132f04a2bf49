"""Accuracy as the published STCLN scripts count it, for comparison with their numbers only.

Qin et al. (2025) score with rules of their own, which flatter in some cases. Our figures (see
`metrics`) count every labelled pixel; those here follow the published rules, so that a number
beside one of theirs means the same. The two never share a column.

``pastis``
    Pixels whose truth is background (0) or void (19) are left out. Only classes that occur in the
    truth are scored. A pixel that is wrongly given another class (background, void, or one that
    does not occur) counts against the overall accuracy, but is missing from the denominator of
    the IoU, which is a little too high. The F1 is a mean over all classes that occur in the truth
    or in the prediction: one stray pixel adds a class with an F1 of 0.
``mtlcc``
    Pixels whose truth *or prediction* is unknown (0) are left out, so that crops taken for
    unknown are no errors in any figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from ..errors import InputError

__all__ = ["PublishedMetrics", "PublishedRule", "published_confusion", "published_metrics"]

PublishedRule = Literal["pastis", "mtlcc"]

_LEFT_OUT: dict[PublishedRule, tuple[int, ...]] = {"pastis": (0, 19), "mtlcc": (0,)}
"""Class codes whose pixels are not scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMetrics:
    """Figures by a published rule; shares in 0 to 1, NaN where nothing was scored."""

    rule: PublishedRule
    overall_accuracy: float
    miou: float
    """Mean over the classes that occur in the truth."""
    f1: float
    """Mean over the classes that occur in the truth or the prediction."""
    kappa: float
    classes: int
    """Classes in the mean of the IoU."""
    pixels: int
    """Pixels scored."""

    def summary(self) -> dict[str, float | None]:
        """Return the figures; None stands for NaN (JSON has no NaN)."""
        figures = {
            "overall_accuracy": self.overall_accuracy,
            "miou": self.miou,
            "f1": self.f1,
            "kappa": self.kappa,
        }
        return {name: None if math.isnan(value) else value for name, value in figures.items()}


def published_confusion(
    confusion: np.ndarray, values: Sequence[str], *, rule: PublishedRule
) -> np.ndarray:
    """Put the classes of an imported set in the places of the published codes.

    Parameters
    ----------
    confusion : (K, K) integer, pixels; rows truth, columns prediction.
    values : (K,) the classes' values in the source, as in their legend. Those of PASTIS are the
        published codes. Those of MTLCC have the order of the published codes, from 1; its unknown
        has the value 0.

    Returns
    -------
    (P, P) int64, for `published_metrics`: 20 x 20 for PASTIS, one more than classes for MTLCC.

    Raises
    ------
    InputError
        If the classes are not those of the set.
    """
    if rule == "pastis":
        size = max(_LEFT_OUT[rule]) + 1
        known = [value.isdecimal() and int(value) < size for value in values]
        if not all(known):
            raise InputError(
                f"Cannot score by the rule {rule!r}: the classes have the values "
                f"{', '.join(values)}, and those of PASTIS are 0 to {size - 1}. Map with the "
                "legend that the importer wrote."
            )
        places = [int(value) for value in values]
    else:
        crops = [value for value in values if value != "0"]
        size = len(crops) + 1
        places = [0 if value == "0" else crops.index(value) + 1 for value in values]
    placed = np.zeros((size, size), dtype=np.int64)
    placed[np.ix_(places, places)] = confusion
    return placed


def published_metrics(confusion: np.ndarray, *, rule: PublishedRule) -> PublishedMetrics:
    """Score by a published rule.

    Parameters
    ----------
    confusion : (K, K) integer, pixels; rows truth, columns prediction. Codes are those of the
        published set (PASTIS: K = 20; MTLCC: K = 18), unscored ones included.
    rule
        Which rule; see the module.

    Raises
    ------
    InputError
        If the rule is unknown, or the matrix is not of its classes.
    """
    if rule not in get_args(PublishedRule):
        raise InputError(
            f"Cannot score by the rule {rule!r}: it must be one of "
            f"{', '.join(get_args(PublishedRule))}. Use the one of the set that was mapped."
        )
    counts = np.asarray(confusion, dtype=np.int64)
    left_out = list(_LEFT_OUT[rule])
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) <= max(left_out):
        raise InputError(
            f"Cannot score a matrix of shape {counts.shape} by the rule {rule!r}: it must be "
            f"square, with all classes of the set, {max(left_out)} included. Map with the legend "
            "that the importer wrote."
        )
    counts = counts.copy()
    counts[left_out] = 0
    if rule == "mtlcc":
        counts[:, left_out] = 0

    true, predicted, right = counts.sum(axis=1), counts.sum(axis=0), np.diag(counts)
    total = int(counts.sum())
    occurs = true > 0
    scored = counts[np.ix_(occurs, occurs)]
    hits = np.diag(scored)
    union = scored.sum(axis=0) + scored.sum(axis=1) - hits
    either = occurs | (predicted > 0)
    overall = _share(right.sum(), total)
    chance = _share(float(true.astype(float) @ predicted), float(total) ** 2)
    return PublishedMetrics(
        rule=rule,
        overall_accuracy=overall,
        # The union is 0 where all pixels of a class went to classes that are not scored.
        miou=_mean([_share(hit, whole) for hit, whole in zip(hits, union, strict=True)]),
        f1=_mean(list(2 * right[either] / (true + predicted)[either])),
        kappa=_share(overall - chance, 1 - chance),
        classes=int(occurs.sum()),
        pixels=total,
    )


def _share(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _mean(values: list[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
