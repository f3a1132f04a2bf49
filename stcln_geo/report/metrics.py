"""Accuracy figures of a class map, all derived from one confusion matrix.

Rows of a confusion matrix are the truth, columns the prediction, entries numbers of pixels.

A figure of a class whose denominator is zero is NaN and stays out of the macro means: IoU and
F1 of a class that occurs neither in the truth nor in the prediction, producer's accuracy of a
class that does not occur in the truth, user's accuracy of a class that is never predicted. A
class that occurs in the truth and is never found has an IoU and F1 of 0 and does count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from ..errors import InputError

__all__ = ["Metrics", "confusion_matrix", "metrics_from_confusion"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Accuracy of one class map; all shares lie in 0 to 1.

    Parameters
    ----------
    confusion : (K, K) int64, pixels; rows truth, columns prediction.
    iou : (K,) float64, intersection over union.
    f1 : (K,) float64, harmonic mean of user's and producer's accuracy.
    users_accuracy : (K,) float64, precision: share of the predicted pixels that are right.
    producers_accuracy : (K,) float64, recall: share of the true pixels that are found.
    support : (K,) int64, pixels of the truth.
    overall_accuracy : share of all pixels that are right; NaN without pixels.
    macro_miou, macro_f1 : mean over the classes that are not NaN.
    kappa : Cohen's kappa; NaN where agreement by chance is 1.
    """

    confusion: np.ndarray
    iou: np.ndarray
    f1: np.ndarray
    users_accuracy: np.ndarray
    producers_accuracy: np.ndarray
    support: np.ndarray
    overall_accuracy: float
    macro_miou: float
    macro_f1: float
    kappa: float

    @property
    def pixels(self) -> int:
        """Number of pixels counted."""
        return int(self.confusion.sum())

    def over(self, classes: int) -> Metrics:
        """Return the same with macro figures over the first classes alone."""
        return replace(
            self, macro_miou=_mean(self.iou[:classes]), macro_f1=_mean(self.f1[:classes])
        )

    def summary(self) -> dict[str, float | None]:
        """Return the figures over all classes; None stands for NaN (JSON has no NaN)."""
        return {
            "overall_accuracy": _finite(self.overall_accuracy),
            "macro_miou": _finite(self.macro_miou),
            "macro_f1": _finite(self.macro_f1),
            "kappa": _finite(self.kappa),
        }

    def per_class(self, names: tuple[str, ...]) -> list[dict[str, float | int | str | None]]:
        """Return one record a class, in order of the codes; None stands for NaN."""
        if len(names) != len(self.support):
            raise InputError(
                f"Cannot name {len(self.support)} classes with {len(names)} names: each code needs "
                "one. Pass the legend that the confusion matrix was made with."
            )
        return [
            {
                "code": code,
                "name": name,
                "iou": _finite(self.iou[code]),
                "f1": _finite(self.f1[code]),
                "users_accuracy": _finite(self.users_accuracy[code]),
                "producers_accuracy": _finite(self.producers_accuracy[code]),
                "support_pixels": int(self.support[code]),
            }
            for code, name in enumerate(names)
        ]


def confusion_matrix(truth: np.ndarray, prediction: np.ndarray, *, classes: int) -> np.ndarray:
    """Count pixels by true and predicted class.

    Parameters
    ----------
    truth, prediction : same shape, integer. Pixels whose truth is not a class code, 0 to
        ``classes - 1``, are left out (255 is unlabelled).

    Returns
    -------
    (classes, classes) int64, rows truth, columns prediction.

    Raises
    ------
    InputError
        If a labelled pixel has a prediction that is no class code: dropping it would flatter.
    """
    truth = np.asarray(truth).reshape(-1).astype(np.int64)
    prediction = np.asarray(prediction).reshape(-1).astype(np.int64)
    if truth.shape != prediction.shape:
        raise InputError(
            f"Cannot compare {truth.size} true with {prediction.size} predicted pixels: there must "
            "be one prediction a pixel. Crop both to the same window."
        )
    labelled = (truth >= 0) & (truth < classes)
    truth, prediction = truth[labelled], prediction[labelled]
    if prediction.size and (prediction.min() < 0 or prediction.max() >= classes):
        wrong = prediction[(prediction < 0) | (prediction >= classes)][0]
        raise InputError(
            f"Cannot count the prediction {wrong}: predictions are class codes 0 to {classes - 1}. "
            "Leave out pixels without a prediction by giving them the truth 255."
        )
    counts = np.bincount(truth * classes + prediction, minlength=classes * classes)
    return counts.reshape(classes, classes).astype(np.int64)


def metrics_from_confusion(confusion: np.ndarray) -> Metrics:
    """Derive all figures from a confusion matrix.

    Parameters
    ----------
    confusion : (K, K) integer, pixels; rows truth, columns prediction.
    """
    confusion = np.asarray(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or (confusion < 0).any():
        raise InputError(
            f"Cannot derive metrics from an array of shape {confusion.shape}: a confusion matrix "
            "is square and holds counts of 0 or more. Make it with confusion_matrix."
        )
    confusion = confusion.astype(np.int64)
    right = np.diag(confusion).astype(np.float64)
    true, predicted = confusion.sum(axis=1), confusion.sum(axis=0)
    iou = _ratio(right, true + predicted - right)
    f1 = _ratio(2 * right, true + predicted)
    total = float(confusion.sum())
    overall = float(right.sum()) / total if total else math.nan
    chance = float(true.astype(np.float64) @ predicted) / total**2 if total else math.nan
    return Metrics(
        confusion=confusion,
        iou=iou,
        f1=f1,
        users_accuracy=_ratio(right, predicted),
        producers_accuracy=_ratio(right, true),
        support=true,
        overall_accuracy=overall,
        macro_miou=_mean(iou),
        macro_f1=_mean(f1),
        kappa=(overall - chance) / (1 - chance) if total and chance < 1 else math.nan,
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    result = np.full(part.shape, np.nan)
    np.divide(part, whole, out=result, where=whole > 0)
    return result


def _mean(values: np.ndarray) -> float:
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else math.nan


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
