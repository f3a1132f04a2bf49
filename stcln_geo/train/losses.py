"""What a classified pixel costs: class weights, cross-entropy, focal loss, dice.

Every error here is a sum, and every one is divided by the same number: the class weights of the
pixels that count, summed over all chips of a step (`weight_of`). So a step may be cut into batches
and shared among ranks without changing it. Cross-entropy and focal loss are sums over pixels.
Dice is not; it is therefore one number a chip, never of pixels of several chips together, times
the weight of the chip's pixels: the mean over chips, in which a chip with more pixels counts more.

A pixel whose target is -100 takes no part in any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..data.batch import IGNORE_INDEX

__all__ = [
    "ClassWeights",
    "LossKind",
    "classification_error",
    "make_class_weights",
    "weight_of",
]

ClassWeights = Literal["none", "inverse-sqrt", "effective-number"]
LossKind = Literal["cross-entropy", "focal", "dice", "cross-entropy+dice"]

_SURE = 1e-7
"""Least doubt of a pixel in the focal loss: its power has no slope at zero."""


def make_class_weights(
    kind: ClassWeights, pixels: Sequence[int], *, beta: float = 0.9999
) -> Tensor:
    """Weigh the classes by how often they occur.

    ``effective-number`` is (1 - beta) / (1 - beta^n) for n pixels (Cui et al. 2019, "Class-balanced
    loss based on effective number of samples"): beyond about 1 / (1 - beta) pixels, more of them
    are no more evidence. ``beta`` = 0 weighs all alike, and near 1 it is 1 / n.

    Parameters
    ----------
    pixels : (K,) training pixels of each class.

    Returns
    -------
    (K,) float32 with a mean of 1 over the classes that occur; 0 for those that do not, except
        with ``none``, which is 1 for all.
    """
    counts = torch.tensor([float(count) for count in pixels], dtype=torch.float64)
    if kind == "none":
        return torch.ones(len(counts))
    seen = counts > 0
    often = counts.clamp(min=1)
    if kind == "inverse-sqrt":
        weights = often.rsqrt()
    elif beta == 0:
        weights = torch.ones_like(often)
    else:
        weights = (1 - beta) / -torch.expm1(often * math.log(beta))
    weights = torch.where(seen, weights, 0.0)
    return (weights / weights[seen].mean()).float()


def classification_error(
    logits: Tensor,
    target: Tensor,
    *,
    weights: Tensor,
    kind: LossKind = "cross-entropy",
    gamma: float = 2.0,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the sum of the errors, to be divided by `weight_of`.

    Parameters
    ----------
    logits : (B, K, H, W) float.
    target : (B, H, W) int64, -100 = ignored.
    weights : (K,) float32.
    gamma
        Of the focal loss.
    label_smoothing
        Of cross-entropy, alone or beside dice.
    """
    logits = logits.float()
    if kind == "focal":
        return _focal(logits, target, weights, gamma)
    if kind == "dice":
        return _dice(logits, target, weights)
    entropy = functional.cross_entropy(
        logits,
        target,
        weight=weights,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    if kind == "cross-entropy+dice":
        return entropy + _dice(logits, target, weights)
    return entropy


def weight_of(target: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the class weights of all pixels that count."""
    return _pixel_weights(target, weights).sum()


def _pixel_weights(target: Tensor, weights: Tensor) -> Tensor:
    return torch.where(target != IGNORE_INDEX, weights[target.clamp(min=0)], 0.0)


def _focal(logits: Tensor, target: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Sum -(1 - p)^gamma log p over pixels, p that of the true class (Lin et al. 2017)."""
    logs = logits.log_softmax(dim=1).gather(1, target.clamp(min=0)[:, None])[:, 0]
    doubt = (-torch.expm1(logs)).clamp(min=_SURE) ** gamma
    return -(_pixel_weights(target, weights) * doubt * logs).sum()


def _dice(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Sum one minus the soft dice of each chip, times the weight of its pixels.

    The dice of a class is 2 sum(p y) / (sum(p) + sum(y)) over the chip's pixels that count (without
    the squares of Milletari et al. 2016); that of a chip is the mean over the classes that occur
    in its truth, by their weights. A class that does not occur there has no say of its own: what
    it takes, the others lack.
    """
    counted = (target != IGNORE_INDEX)[:, None]
    shares = logits.softmax(dim=1) * counted  # (B, K, H, W)
    truth = functional.one_hot(target.clamp(min=0), logits.shape[1]).movedim(-1, 1) * counted
    pixels = truth.sum((2, 3))  # (B, K)
    both, total = (shares * truth).sum((2, 3)), shares.sum((2, 3)) + pixels
    error = 1 - 2 * both / total.clamp(min=1e-12)
    say = weights * (pixels > 0)
    mean = (say * error).sum(1) / say.sum(1).clamp(min=1e-12)
    return (mean * _pixel_weights(target, weights).sum((1, 2))).sum()
