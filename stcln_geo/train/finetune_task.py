"""The task of fine-tuning: classify the pixels of labelled fields."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..data.stream import OrderedStream, TrainingStream
from ..model.stcln import Encoder, Stcln, positions_for
from ..report.metrics import metrics_from_confusion
from .config import FinetuneConfig
from .losses import classification_error, make_class_weights, weight_of
from .ranks import Ranks, sum_over_ranks
from .scoring import count_confusion, observed_target
from .task import TrainingTask

__all__ = ["FinetuneTask"]


class FinetuneTask(TrainingTask):
    """Classify the pixels of labelled fields.

    Parameters
    ----------
    class_pixels : (K,) training pixels of each output, as often as an epoch shows them, for the
        weights.
    lookup : (L,) int64, the output of each code of the cube's legend, -100 where it has none; None
        where codes and outputs are the same. See `scoring.make_lookup`.
    """

    larger_is_better = True

    network: Stcln
    recipe: FinetuneConfig
    class_weights: Tensor
    lookup: Tensor

    def __init__(
        self,
        network: Stcln,
        config: FinetuneConfig,
        *,
        stream: TrainingStream | None = None,
        validation: OrderedStream | None = None,
        class_pixels: Sequence[int],
        lookup: Tensor | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__(network, config, stream=stream, validation=validation, ranks=ranks)
        self.monitor = f"validation_{config.validation.choose_by}"
        loss = config.loss
        weights = make_class_weights(loss.class_weights, class_pixels, beta=loss.beta)
        self.register_buffer("class_weights", weights, persistent=False)
        if lookup is None:
            lookup = torch.arange(len(class_pixels))
        self.register_buffer("lookup", lookup, persistent=False)
        if self._frozen is not None and not config.optimiser.freeze_steps:
            # Before DDP looks: it then leaves these weights alone.
            self._frozen.requires_grad_(False)
        self.train()

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the target of the pixels seen at least once, and the weight of them all."""
        target = observed_target(batch, self.lookup)
        return target, weight_of(target, self.class_weights)[None]

    def error(self, batch: Batch, prepared: Tensor) -> Tensor:
        """Return the weighted sum of the pixels' errors."""
        loss = self.recipe.loss
        return classification_error(
            self.classify(self.trained, batch),
            prepared,
            weights=self.class_weights,
            kind=loss.kind,
            gamma=loss.gamma,
            label_smoothing=loss.label_smoothing,
        )

    def classify(self, network: Callable[..., Tensor], batch: Batch) -> Tensor:
        """Return a network's logits (B, K, H, W)."""
        days = positions_for(self.network.config, batch.days)
        logits: Tensor = network(batch.images(), days, batch.valid)
        return logits

    # What is held still, and what moves slowly.

    @property
    def _frozen(self) -> nn.Module | None:
        """The part that is held still at this step; None for none."""
        options = self.recipe.optimiser
        if options.freeze == "none" or 0 < options.freeze_steps <= self.step:
            return None
        encoder: Encoder = self.network.encoder
        return encoder if options.freeze == "encoder" else encoder.convolutions

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen part stays in evaluation, with its statistics as they are."""
        super().train(mode)
        if self._frozen is not None:
            self._frozen.eval()
        return self

    def training_step(self, batches: Sequence[Batch], batch_idx: int) -> None:
        """Move the weights once; what is frozen for the first steps comes free after them."""
        self.train()
        super().training_step(batches, batch_idx)

    def drop_gradients(self) -> None:
        """Drop the gradients of what is frozen for now.

        Not ``requires_grad``: ranks have agreed at the start on the weights that they share.
        """
        if self._frozen is not None:
            for weight in self._frozen.parameters():
                weight.grad = None

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the weights by learning rate: the head's first, then from bands to features."""
        options = self.recipe.optimiser
        if options.layer_decay == 1:
            return super().parameter_groups(rate)
        head, _ = super().parameter_groups(rate)
        depths = _depths(self.network.encoder)
        return [
            head,
            *(
                {
                    "params": weights,
                    "lr": rate * options.encoder_factor * options.layer_decay ** (len(depths) - at),
                }
                for at, weights in enumerate(depths)
            ),
        ]

    # A validation.

    def on_validation_epoch_start(self) -> None:
        """Judge from nought."""
        classes = len(self.class_weights)
        self._confusion = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count the pixels of validation fields by true and predicted class."""
        logits = self.classify(self.judged, batch)
        self._confusion += count_confusion(logits, observed_target(batch, self.lookup))

    def on_validation_epoch_end(self) -> None:
        """Put the figures of this validation in place."""
        confusion = sum_over_ranks(self._confusion).cpu().numpy()
        found = metrics_from_confusion(confusion).summary()
        self.figures = {f"validation_{name}": value for name, value in found.items()}


def _depths(encoder: Encoder) -> list[list[nn.Parameter]]:
    """Return the weights of the encoder by depth: four convolutions, then the layers."""
    convolutions = [list(block.parameters()) for block in encoder.convolutions.blocks]
    layers = [list(layer.parameters()) for layer in encoder.temporal.layers]
    layers[0] = [*encoder.temporal.norm.parameters(), *layers[0]]
    return [*convolutions, *layers]
