"""What the network's outputs are held against, and how often they are right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.batch import IGNORE_INDEX, Batch
from ..errors import InputError
from .classes import ClassChoice

__all__ = ["count_confusion", "make_lookup", "observed_target"]


def make_lookup(classes: ClassChoice) -> Tensor:
    """Return the output of each code of a cube's legend: (L,) int64, -100 where it has none."""
    lookup = torch.full((classes.total,), IGNORE_INDEX)
    lookup[list(classes.codes)] = torch.tensor(classes.outputs)
    return lookup


def observed_target(batch: Batch, lookup: Tensor) -> Tensor:
    """Return the target (B, H, W) int64 in classes, -100 also where no date is valid."""
    if batch.target is None:
        raise InputError(
            "Cannot judge chips without targets: the dataset was made without fields. "
            "Pass wanted= to ChipDataset."
        )
    labelled = (batch.target != IGNORE_INDEX) & batch.valid.any(dim=1)
    return torch.where(labelled, lookup[batch.target.clamp(min=0)], IGNORE_INDEX)


def count_confusion(logits: Tensor, target: Tensor) -> Tensor:
    """Count pixels by true (rows) and predicted class: (K, K) int64.

    Parameters
    ----------
    logits : (B, K, H, W) float.
    target : (B, H, W) int64, -100 = not judged.
    """
    classes = logits.shape[1]
    counted = target != IGNORE_INDEX
    pairs = target[counted] * classes + logits.argmax(dim=1)[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)
