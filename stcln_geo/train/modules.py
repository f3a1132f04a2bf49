"""The task of pre-training: reconstruct hidden observations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError
from ..model.masking import make_mask, masked_loss
from ..model.stcln import MaskedPretrainer, positions_for
from .config import PretrainConfig
from .ranks import sum_over_ranks
from .task import TrainingTask, step_seed

__all__ = ["PretrainTask", "parameters_of"]


class _Hidden(NamedTuple):
    """What pre-training hides from the network in a batch."""

    images: Tensor
    """(B, T, C, H, W) float32 reflectance."""
    mask: Tensor
    """(B, T, H, W) bool. True where hidden."""


class PretrainTask(TrainingTask):
    """Reconstruct hidden observations."""

    monitor = "validation_loss"
    larger_is_better = False

    network: MaskedPretrainer
    recipe: PretrainConfig

    def prepare(self, batch: Batch) -> tuple[_Hidden, Tensor]:
        """Hide observations; count hidden values, and the usable ones."""
        hidden = self._hide(batch, 2)
        return hidden, self._count(batch, hidden)

    def error(self, batch: Batch, prepared: _Hidden) -> Tensor:
        """Return the sum of squared errors of the hidden values."""
        return self._error(self.network, batch, prepared)

    def on_validation_epoch_start(self) -> None:
        """Judge from nought."""
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the error of a batch; its masks are the same at each validation."""
        hidden = self._hide(batch, 3)
        error = self._error(self.judged, batch, hidden)
        self._sums += torch.stack([error.double(), self._count(batch, hidden)[0].double()])

    def on_validation_epoch_end(self) -> None:
        """Put the mean error of all hidden values into the figures."""
        error, values = sum_over_ranks(self._sums).tolist()
        self.figures = {"validation_loss": error / values if values else None}

    def end_round(self) -> dict[str, float | None]:
        """Return what a round tells besides loss and figures.

        Raises
        ------
        InputError
            If nothing was hidden in a whole round: there was nothing to learn from.
        """
        hidden, usable = self.counted
        if hidden == 0:
            raise InputError(
                f"Cannot pre-train: none of {usable / len(self.network.config.bands):.0f} clear "
                f"observations was hidden in {self.round_steps} steps, as no date was green over "
                "nearly a whole chip. Pre-training learns from hidden observations. Switch the "
                "gate off with --set masking.gate=false, or use smaller chips or other seasons."
            )
        return {"hidden_share": hidden / usable}

    def _hide(self, batch: Batch, purpose: int) -> _Hidden:
        """Draw masks, each from the seed and the place of the chip in its stream."""
        images = batch.images()
        options = self.recipe.masking
        bands = self.network.config.bands
        # Drawn on the CPU: the same on every device.
        generators = [
            torch.Generator().manual_seed(step_seed(self.recipe.seed, purpose, place))
            for place in batch.samples or range(len(batch))
        ]
        mask = make_mask(
            images,
            batch.valid,
            mask_ratio=options.mask_ratio,
            red=bands.index("red") if "red" in bands else None,
            nir=bands.index("nir") if "nir" in bands else None,
            generator=generators,
            strategy=options.strategy,
            gate=options.gate,
        )
        return _Hidden(images, mask)

    def _count(self, batch: Batch, hidden: _Hidden) -> Tensor:
        counts = torch.stack([hidden.mask.sum(), batch.valid.sum()])
        return counts * len(self.network.config.bands)

    def _error(self, network: Any, batch: Batch, hidden: _Hidden) -> Tensor:
        days = positions_for(network.config, batch.days)
        made = network(hidden.images, days, batch.valid, hidden.mask)
        target = network.normalise(hidden.images, batch.valid)
        mean = masked_loss(made, target, hidden.mask, batch.valid)
        return mean * self._count(batch, hidden)[0]


def parameters_of(network: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(weight.numel() for weight in network.parameters() if weight.requires_grad)
