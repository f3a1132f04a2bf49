"""The task of pre-training: reconstruct hidden observations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import InputError
from ..model.masking import draw_mask, hidden_errors, hidden_values, hideable, masked_loss
from ..model.stcln import MaskedPretrainer, positions_for
from .config import PretrainConfig
from .error_table import ErrorTable, add_up_errors, months_of
from .masking import groups_of
from .ranks import sum_over_ranks
from .reconstruction import (
    ReconstructedChip,
    ReconstructionKeeper,
    first_chips,
    write_reconstructions,
)
from .run_directory import RunDirectory, write_text
from .task import TrainingTask, step_seed

__all__ = ["PretrainTask"]


class _Hidden(NamedTuple):
    """What pre-training hides from the network in a batch."""

    images: Tensor
    """(B, T, C, H, W) float32 reflectance."""
    mask: Tensor
    """(B, T, H, W) or (B, T, C, H, W) bool. True where hidden; hidden values are valid."""
    allowed: Tensor
    """(B, T, H, W) bool. True where the observation may be hidden."""


class PretrainTask(TrainingTask):
    """Reconstruct hidden observations."""

    monitor = "validation_loss"
    larger_is_better = False

    network: MaskedPretrainer
    recipe: PretrainConfig

    table: ErrorTable | None = None
    """Errors of the last validation, over all ranks."""
    chips: tuple[ReconstructedChip, ...] = ()
    """Chips of the last validation to draw, of all ranks."""

    def prepare(self, batch: Batch) -> tuple[_Hidden, Tensor]:
        """Hide observations; count hidden values, usable ones, and those that may be hidden."""
        ratio = self.recipe.masking.ratio_at(self.step, steps=self.steps)
        hidden = self._hide(batch, 2, mask_ratio=ratio)
        return hidden, self._count(batch, hidden)

    def error(self, batch: Batch, prepared: _Hidden) -> Tensor:
        """Return the sum of squared errors of the hidden values."""
        made, target = self._reconstruct(self.trained, batch, prepared)
        mean = masked_loss(made, target, prepared.mask, batch.valid)
        return mean * self._count(batch, prepared)[0]

    def on_validation_epoch_start(self) -> None:
        """Judge from nought."""
        bands = self.network.config.bands
        self._sums = torch.zeros(3, 13, len(bands), dtype=torch.float64, device=self.device)
        self._keeper = ReconstructionKeeper(bands, seed=self.recipe.seed)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the errors of a batch; its masks are the same at each validation."""
        hidden = self._hide(batch, 3, mask_ratio=self.recipe.masking.mask_ratio)
        made, target = self._reconstruct(self.judged, batch, hidden)
        values = hidden_values(hidden.mask, batch.valid)
        errors = hidden_errors(made, target, values)
        self._sums += add_up_errors(errors, values, batch.valid, months_of(batch))
        encoder: Any = self.judged.encoder
        mean, std = (part[:, None, None] for part in (encoder.mean, encoder.std))
        self._keeper.look(batch, images=hidden.images, made=made * std + mean, hidden=values)

    def on_validation_epoch_end(self) -> None:
        """Put the errors of hidden values into the figures: of all, per band and per month."""
        encoder: Any = self.judged.encoder
        self.table = ErrorTable(
            bands=self.network.config.bands,
            std=encoder.std.double().cpu().numpy(),
            sums=np.asarray(sum_over_ranks(self._sums).tolist()),
        )
        kept = self.ranks.gather(self._keeper.kept)
        self.chips = tuple(first_chips(chip for own in kept for chip in own))
        self.figures = {"validation_loss": self.table.mean, **self.table.figures()}

    def write_best(self, run: RunDirectory) -> None:
        """Write errors.csv and reconstructed chips, where anything was judged."""
        if self.table is None:
            return
        write_text(run.errors_file, self.table.to_csv())
        write_reconstructions(run.reconstructions_file, self.chips)

    def end_round(self) -> dict[str, float | None]:
        """Return what a round tells besides loss and figures.

        Raises
        ------
        InputError
            If nothing could be hidden in a whole round: there was nothing to learn from.
        """
        hidden, usable, allowed = self.counted
        if allowed == 0:
            raise InputError(
                f"Cannot pre-train: none of {usable / len(self.network.config.bands):.0f} clear "
                f"observations could be hidden in {self.round_steps} steps, as no date was green "
                "over nearly a whole chip. Pre-training learns from hidden observations. Switch "
                "the gate off with --set masking.gate=false, or use smaller chips or other seasons."
            )
        told: dict[str, float | None] = {"hidden_share": hidden / usable}
        if self.recipe.masking.schedule != "constant":
            told["mask_ratio"] = self.recipe.masking.ratio_at(self.step - 1, steps=self.steps)
        return told

    def _hide(self, batch: Batch, purpose: int, *, mask_ratio: float) -> _Hidden:
        """Draw masks, each from the seed and the place of the chip in its stream."""
        images = batch.images()
        options = self.recipe.masking
        bands = self.network.config.bands
        # Drawn on the CPU: the same on every device.
        generators = [
            torch.Generator().manual_seed(step_seed(self.recipe.seed, purpose, place))
            for place in batch.samples or range(len(batch))
        ]
        mask = draw_mask(
            images.shape,
            mask_ratio=mask_ratio,
            generator=generators,
            strategy=options.strategy,
            block=options.block,
            groups=groups_of(options, bands),
        ).to(images.device)
        allowed = hideable(
            images,
            batch.valid,
            red=bands.index("red") if "red" in bands else None,
            nir=bands.index("nir") if "nir" in bands else None,
            gate=options.gate,
        )
        mask &= allowed if mask.ndim == 4 else allowed[:, :, None]
        return _Hidden(images, mask, allowed)

    def _count(self, batch: Batch, hidden: _Hidden) -> Tensor:
        bands = len(self.network.config.bands)
        masked = hidden.mask.sum() * (bands if hidden.mask.ndim == 4 else 1)
        return torch.stack([masked, batch.valid.sum() * bands, hidden.allowed.sum() * bands])

    def _reconstruct(
        self, network: Callable[..., Tensor], batch: Batch, hidden: _Hidden
    ) -> tuple[Tensor, Tensor]:
        """Return what the network makes, and what it should: (B, T, C, H, W), normalised."""
        days = positions_for(self.network.config, batch.days)
        made = network(hidden.images, days, batch.valid, hidden.mask)
        return made, self.network.normalise(hidden.images, batch.valid)
