"""What Lightning trains: a network, its loss and its figures, fed by our streams.

A Lightning epoch is a round: the steps between two validations. Batches, masks and dropout of a
step depend on the seed and the number of the step only, so a resumed run repeats an uninterrupted
one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional

from ..data.batch import IGNORE_INDEX, Batch
from ..data.stream import OrderedStream, TrainingStream
from ..errors import InputError
from ..model.masking import make_mask, masked_loss
from ..model.stcln import MaskedPretrainer, Stcln, positions_for
from ..report.metrics import metrics_from_confusion
from .config import FinetuneConfig, OptimiserSection, PretrainConfig, TrainConfig

__all__ = ["FinetuneTask", "PretrainTask", "TrainingTask", "count_confusion", "step_seed"]


def step_seed(seed: int, *place: int) -> int:
    """Return a well-mixed seed for a step (or any other place) of a run."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


class _Round:
    """The batches up to the next validation, as Lightning wants them: sized and iterable."""

    def __init__(self, stream: TrainingStream, start: int, count: int) -> None:
        self._stream, self._start, self._count = stream, start, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        return self._stream.batches(self._start, self._count)


class TrainingTask(LightningModule):
    """Steps, optimiser and data of one run; subclasses give loss and figures.

    Parameters
    ----------
    network
        The network that is trained; saved without this wrapper.
    config
        A settled recipe.
    validation
        What to judge on; None judges nothing.
    """

    monitor: str
    """The figure by which the best weights are chosen."""
    larger_is_better: bool

    def __init__(
        self,
        network: Stcln | MaskedPretrainer,
        config: TrainConfig,
        *,
        stream: TrainingStream,
        validation: OrderedStream | None,
    ) -> None:
        super().__init__()
        self.network = network
        self.recipe = config
        self.stream = stream
        self.validation = validation
        self.figures: dict[str, float | None] = {}
        """Figures of the last validation."""

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.recipe.steps or 1)

    @property
    def round_steps(self) -> int:
        """Steps of a round; the last may be shorter."""
        return int(self.recipe.validation.every or 1)

    @property
    def rounds(self) -> int:
        """Rounds of the whole run."""
        return math.ceil(self.steps / self.round_steps)

    def train_dataloader(self) -> Any:
        """Return the batches of the coming round."""
        start = int(self.global_step)
        return _Round(self.stream, start, min(self.round_steps, self.steps - start))

    def val_dataloader(self) -> Any:
        """Return the validation batches."""
        return self.validation if self.validation is not None else []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Make dropout a function of the seed and the step."""
        torch.manual_seed(step_seed(self.recipe.seed, 1, int(self.global_step)))

    def configure_optimizers(self) -> Any:
        """Return the optimiser and the schedule of the recipe."""
        options = self.recipe.optimiser
        encoder = list(self.network.encoder.parameters())
        known = {id(weight) for weight in encoder}
        others = [weight for weight in self.network.parameters() if id(weight) not in known]
        rate = float(options.learning_rate or 1e-3)
        groups = [
            {"params": others, "lr": rate},
            {"params": encoder, "lr": rate * options.encoder_factor},
        ]
        make = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
        decay = options.weight_decay if options.name == "adamw" else 0.0
        optimiser = make(groups, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: rate_factor(step, steps=self.steps, options=options)
        )
        return {
            "optimizer": optimiser,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def rate_factor(step: int, *, steps: int, options: OptimiserSection) -> float:
    """Return the learning rate of a step as a share of the highest."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - warm) / max(steps - warm, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class PretrainTask(TrainingTask):
    """Reconstruct hidden observations."""

    monitor = "validation_loss"
    larger_is_better = False

    network: MaskedPretrainer
    recipe: PretrainConfig
    _hidden: Tensor
    _usable: Tensor

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss, hidden, usable = self._loss(batch, 2, int(self.global_step))
        self._hidden = self._hidden + hidden
        self._usable = self._usable + usable
        return loss

    def on_train_epoch_start(self) -> None:
        """Count anew what is hidden in this round."""
        self._hidden = torch.zeros((), dtype=torch.int64, device=self.device)
        self._usable = torch.zeros((), dtype=torch.int64, device=self.device)

    def on_validation_epoch_start(self) -> None:
        """Judge from nought."""
        self._sum = torch.zeros((), dtype=torch.float64, device=self._sum_device())
        self._count = torch.zeros((), dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the error of a batch; its mask is the same at each validation."""
        loss, hidden, _ = self._loss(batch, 3, batch_idx)
        self._sum += (loss * hidden).to(self._sum)
        self._count += hidden

    def on_validation_epoch_end(self) -> None:
        """Put the mean error of all hidden observations into the figures."""
        count = int(self._count)
        self.figures = {"validation_loss": float(self._sum) / count if count else None}

    def end_round(self) -> dict[str, float | None]:
        """Return what a round tells besides loss and figures.

        Raises
        ------
        InputError
            If nothing was hidden in a whole round: there was nothing to learn from.
        """
        hidden, usable = int(self._hidden), int(self._usable)
        if hidden == 0:
            raise InputError(
                f"Cannot pre-train: none of {usable} clear observations was hidden in "
                f"{self.round_steps} steps, as no date was green over nearly a whole chip. "
                "Pre-training learns from hidden observations. Switch the gate off with "
                "--set masking.gate=false, or use smaller chips or other seasons."
            )
        return {"hidden_share": hidden / usable}

    def _loss(self, batch: Batch, *place: int) -> tuple[Tensor, Tensor, Tensor]:
        images = batch.images()
        options = self.recipe.masking
        bands = self.network.config.bands
        # Drawn on the CPU: the same on every device.
        generator = torch.Generator().manual_seed(step_seed(self.recipe.seed, *place))
        mask = make_mask(
            images,
            batch.valid,
            mask_ratio=options.mask_ratio,
            red=bands.index("red") if "red" in bands else None,
            nir=bands.index("nir") if "nir" in bands else None,
            generator=generator,
            strategy=options.strategy,
            gate=options.gate,
        )
        days = positions_for(self.network.config, batch.days)
        made = self.network(images, days, batch.valid, mask)
        target = self.network.normalise(images, batch.valid)
        return masked_loss(made, target, mask, batch.valid), mask.sum(), batch.valid.sum()

    def _sum_device(self) -> torch.device:
        # Apple's GPUs have no float64.
        return torch.device("cpu") if self.device.type == "mps" else self.device


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
        stream: TrainingStream,
        validation: OrderedStream | None,
        class_pixels: Sequence[int],
    ) -> None:
        super().__init__(network, config, stream=stream, validation=validation)
        weights = torch.ones(len(class_pixels))
        if config.loss.class_weights == "inverse-sqrt":
            pixels = torch.tensor(class_pixels, dtype=torch.float32)
            weights = torch.where(pixels > 0, pixels.clamp(min=1).rsqrt(), 0.0)
            weights = weights / weights[pixels > 0].mean()
        self.register_buffer("class_weights", weights, persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss over the pixels of training fields that are seen at least once."""
        logits, target = self._classify(batch)
        return classification_loss(
            logits,
            target,
            weights=self.class_weights,
            label_smoothing=self.recipe.loss.label_smoothing,
        )

    def on_validation_epoch_start(self) -> None:
        """Judge from nought."""
        classes = len(self.class_weights)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of validation fields by true and predicted class."""
        logits, target = self._classify(batch)
        self._confusion += count_confusion(logits, target)

    def on_validation_epoch_end(self) -> None:
        """Put the figures of this validation in place."""
        found = metrics_from_confusion(self._confusion.cpu().numpy()).summary()
        self.figures = {f"validation_{name}": value for name, value in found.items()}

    def end_round(self) -> dict[str, float | None]:
        """Return what a round tells besides loss and figures: nothing."""
        return {}

    def _classify(self, batch: Batch) -> tuple[Tensor, Tensor]:
        days = positions_for(self.network.config, batch.days)
        logits = self.network(batch.images(), days, batch.valid)
        return logits, observed_target(batch)


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
    total = functional.cross_entropy(
        logits.float(),
        target,
        weight=weights,
        ignore_index=IGNORE_INDEX,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    counted = target != IGNORE_INDEX
    weight = torch.where(counted, weights[target.clamp(min=0)], 0.0).sum()
    return total / weight.clamp(min=1e-12)


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
