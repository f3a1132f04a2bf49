"""The task of fine-tuning: classify labelled pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.batch import IGNORE_INDEX, Batch
from ..data.stream import OrderedStream, TrainingStream
from ..errors import InputError
from ..model.stcln import Stcln, positions_for
from ..report.metrics import metrics_from_confusion
from .config import FinetuneConfig
from .ranks import Ranks, sum_over_ranks
from .task import TrainingTask

__all__ = ["FinetuneTask", "classification_loss", "count_confusion"]


class FinetuneTask(TrainingTask):
    """Classify the pixels of labelled fields.

    Parameters
    ----------
    class_pixels : (K,) training pixels of each class, for the weights.
    """

    monitor = "validation_macro_miou"
    larger_is_better = True

    network: Stcln
    recipe: FinetuneConfig
    class_weights: Tensor

    def __init__(
        self,
        network: Stcln,
        config: FinetuneConfig,
        *,
        stream: TrainingStream | None = None,
        validation: OrderedStream | None = None,
        class_pixels: Sequence[int],
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(network, config, stream=stream, validation=validation, ranks=ranks)
        weights = torch.ones(len(class_pixels))
        if config.loss.class_weights == "inverse-sqrt":
            pixels = torch.tensor(class_pixels, dtype=torch.float32)
            weights = torch.where(pixels > 0, pixels.clamp(min=1).rsqrt(), 0.0)
            weights = weights / weights[pixels > 0].mean()
        self.register_buffer("class_weights", weights, persistent=False)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the target of the pixels seen at least once, and the weight of them all."""
        target = observed_target(batch)
        return target, weight_of(target, self.class_weights)[None]

    def error(self, batch: Batch, prepared: Tensor) -> Tensor:
        """Return the weighted sum of the pixels' errors."""
        return classification_error(
            self._classify(self.network, batch),
            prepared,
            weights=self.class_weights,
            label_smoothing=self.recipe.loss.label_smoothing,
        )

    def on_validation_epoch_start(self) -> None:
        """Judge from nought."""
        classes = len(self.class_weights)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of validation fields by true and predicted class."""
        logits = self._classify(self.judged, batch)
        self._confusion += count_confusion(logits, observed_target(batch))

    def on_validation_epoch_end(self) -> None:
        """Put the figures of this validation in place."""
        confusion = sum_over_ranks(self._confusion).cpu().numpy()
        found = metrics_from_confusion(confusion).summary()
        self.figures = {f"validation_{name}": value for name, value in found.items()}

    def _classify(self, network: Any, batch: Batch) -> Tensor:
        days = positions_for(network.config, batch.days)
        logits: Tensor = network(batch.images(), days, batch.valid)
        return logits


def observed_target(batch: Batch) -> Tensor:
    """Return the target (B, H, W) int64, -100 also where no date is valid."""
    if batch.target is None:
        raise InputError(
            "Cannot judge chips without targets: the dataset was made without fields. "
            "Pass wanted= to ChipDataset."
        )
    return torch.where(batch.valid.any(dim=1), batch.target, IGNORE_INDEX)


def classification_loss(
    logits: Tensor, target: Tensor, *, weights: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the weighted mean cross-entropy; 0 where no pixel counts.

    Parameters
    ----------
    logits : (B, K, H, W) float.
    target : (B, H, W) int64, -100 = ignored.
    weights : (K,) float32.
    """
    total = classification_error(logits, target, weights=weights, label_smoothing=label_smoothing)
    return total / weight_of(target, weights).clamp(min=1e-12)


def classification_error(
    logits: Tensor, target: Tensor, *, weights: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Return the weighted sum of the pixels' cross-entropy; see `classification_loss`."""
    return functional.cross_entropy(
        logits.float(),
        target,
        weight=weights,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )


def weight_of(target: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of the class weights of all pixels that count."""
    return torch.where(target != IGNORE_INDEX, weights[target.clamp(min=0)], 0.0).sum()


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


def parameters_of(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
