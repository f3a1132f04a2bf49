"""The STCLN network: a classifier of pixels, and the masked reconstruction that pre-trains it.

Paper: Qin et al., "STCLN", International Journal of Applied Earth Observation and Geoinformation,
2025, doi 10.1016/j.jag.2025.104426. Written anew from the description of the published system.

Kept: convolutions on single dates, a transformer on each pixel's series, the maximum over time,
spatiotemporal attention over the chip, one learnable number as the mask token.
Changed in `geo` mode: positions are days, invalid observations are left out everywhere, spatial
affinities do not sharpen as dates are added. `reference` mode is the published behaviour.
Left out in both: five modules of the published network that no result depends on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError
from . import fused
from .config import StclnConfig
from .device import product_dtype
from .inference import prepare_layers
from .layers import (
    CACHE_BYTES,
    MAX_SEQUENCES,
    ConvEncoder,
    TemporalEncoder,
    full_precision,
    runs_without_gradients,
    sinusoids,
)
from .masking import hidden_values
from .space import SpatioTemporalAttention

SLICE_BYTES = 2**28
"""Working memory of one slice of dates or one block of pixels in inference, at most."""
GPU_SLICE_BYTES = 2**30
"""The same by kernels of a GPU, which is busy with one slice for about as long as it takes to
start the next one."""


class Features(NamedTuple):
    """What the encoder makes of a batch, pixel by pixel."""

    temporal: Tensor
    """(B, H, W, T, D). After the transformer; 0 where invalid in `geo` mode."""
    spatial: Tensor
    """(B, H, W, T, D). After the convolutions; 0 where invalid in `geo` mode."""
    valid: Tensor | None
    """(B, H, W, T) bool, True where usable; None when nothing is to be left out."""
    narrow: Tensor | None = None
    """`temporal` once more, in the type in which matrices are multiplied, where it is at hand."""


class Encoder(nn.Module):
    """Turn a series of images into features for each pixel and date.

    Holds the z-score of the bands (`mean`, `std`, both (C,), in reflectance), so that callers pass
    reflectance. Without gradients, convolutions run by slices of dates and the transformer by
    blocks of pixels, each of about `slice_bytes`; results do not depend on the cut.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: StclnConfig) -> None:
        super().__init__()
        self.config = config
        self.slice_bytes = SLICE_BYTES
        self.max_sequences: int | None = MAX_SEQUENCES
        """Sequences the transformer takes at a time; None: all, as a graph for any batch must."""
        self.register_buffer("mean", torch.zeros(len(config.bands)))
        self.register_buffer("std", torch.ones(len(config.bands)))
        self.convolutions = ConvEncoder(len(config.bands), config.widths)
        self.temporal = TemporalEncoder(
            config.dim,
            layers=config.layers,
            heads=config.heads,
            feedforward=config.feedforward,
            dropout=config.dropout,
        )

    def forward(self, images: Tensor, days: Tensor, valid: Tensor | None = None) -> Tensor:
        """Encode a batch.

        Parameters
        ----------
        images : (B, T, C, H, W) float. Reflectance; anything, NaN included, where invalid.
        days : (B, T) float or int. Days since the season's start, or 0..T-1: what the network was
            trained on (`config.positions`). Anything on dates that are invalid everywhere.
        valid : (B, T, H, W) bool. True where the observation is usable. None: all of them.

        Returns
        -------
        (B, T, D, H, W) float32. A view; 0 where invalid in `geo` mode.
        """
        check_batch(self.config, images, days, valid)
        features = self.encode(self.normalise(images, valid), days, valid)
        return features.temporal.permute(0, 3, 4, 1, 2)

    def set_normalisation(
        self, mean: Sequence[float] | Tensor, std: Sequence[float] | Tensor
    ) -> None:
        """Set the z-score of the bands: `mean` and `std`, each (C,), in reflectance, `std` > 0."""
        new_mean = torch.as_tensor(mean, dtype=self.mean.dtype)
        new_std = torch.as_tensor(std, dtype=self.std.dtype)
        finite = bool(torch.isfinite(new_mean).all() and torch.isfinite(new_std).all())
        if new_mean.shape != self.mean.shape or new_std.shape != self.std.shape or not finite:
            raise InputError(
                f"Cannot normalise: mean {new_mean.tolist()} and std {new_std.tolist()} must be "
                f"one finite number for each of the {len(self.config.bands)} bands "
                f"({', '.join(self.config.bands)}). Compute them from the cube again."
            )
        if not bool((new_std > 0).all()):
            raise InputError(
                f"Cannot normalise: std {new_std.tolist()} must be positive for each band "
                f"({', '.join(self.config.bands)}). A band that never varies carries nothing: "
                "leave it out."
            )
        self.mean.copy_(new_mean)
        self.std.copy_(new_std)

    def normalise(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """Apply the z-score to reflectance (B, T, C, H, W); exactly 0 where invalid."""
        scored = (images - self.mean[:, None, None]) / self.std[:, None, None]
        if valid is None:
            return scored
        return torch.where(valid[:, :, None], scored, 0.0)

    def encode(self, inputs: Tensor, days: Tensor, valid: Tensor | None = None) -> Features:
        """Encode normalised inputs (B, T, C, H, W), which are 0 where invalid.

        In `reference` mode `valid` plays no further part: invalid observations are zeros like any
        other, as the padding of the published system is.
        """
        if self.config.mode == "reference":
            valid = None
        if valid is not None:
            # Dates without a valid pixel may carry any number, or none: keep it out of the sines.
            days = torch.where(valid.flatten(2).any(2), days, 0)
            valid = valid.permute(0, 2, 3, 1).contiguous()  # (B, T, H, W) -> (B, H, W, T)

        spatial = self._spatial(inputs, valid)
        positions = sinusoids(
            days,
            dim=self.config.dim,
            heads=self.config.heads,
            base=self.config.position_base,
            dtype=torch.promote_types(spatial.dtype, torch.float32),
        )
        temporal, narrow = self._temporal(spatial, positions, valid)
        return Features(temporal, spatial, valid, narrow)

    def _spatial(self, inputs: Tensor, valid: Tensor | None) -> Tensor:
        """Run the convolutions on every date: (B, T, C, H, W) -> (B, H, W, T, D)."""
        batch, dates, _, height, width = inputs.shape
        frames_valid = None if valid is None else valid.permute(0, 3, 1, 2)[:, :, None]

        def convolve(first: int, last: int) -> Tensor:
            frames = inputs[:, first:last].flatten(0, 1)  # (B, t, C, H, W) -> (B*t, C, H, W)
            frames = frames.contiguous(memory_format=torch.channels_last)
            usable = None if frames_valid is None else frames_valid[:, first:last].flatten(0, 1)
            made: Tensor = self.convolutions(frames, usable)
            # (B*t, D, H, W) -> (B, H, W, t, D)
            return made.view(batch, -1, *made.shape[1:]).permute(0, 3, 4, 1, 2)

        # In training the batch statistics need all dates together.
        if not runs_without_gradients(self):
            return convolve(0, dates).contiguous()
        step = max(1, self._slice_bytes(inputs) // (4 * batch * height * width * self.config.dim))
        if fused.usable(inputs):
            shape = (batch, height, width, dates, self.config.dim)
            features = inputs.new_empty(shape, dtype=product_dtype(inputs))
            for first in range(0, dates, step):
                frames = inputs[:, first : first + step].flatten(0, 1)
                frames = frames.contiguous(memory_format=torch.channels_last)
                self.convolutions.into_series(frames, valid, features, first)
            return features
        parts = convolve(0, min(step, dates))
        # Wide at once: the attention over space would copy all of them otherwise.
        wide = torch.promote_types(parts.dtype, torch.float32)
        features = parts.new_empty(batch, height, width, dates, self.config.dim, dtype=wide)
        features[..., :step, :] = parts
        for first in range(step, dates, step):
            features[..., first : first + step, :] = convolve(first, first + step)
        return features

    def _temporal(
        self, spatial: Tensor, positions: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the transformer on every pixel; give two of `Features`, `temporal` and `narrow`."""
        batch, height, width, dates, dim = spatial.shape
        series = spatial.view(-1, dates, dim)
        usable = None if valid is None else valid.view(-1, dates)
        sample = torch.arange(batch, device=spatial.device)[:, None]
        sample = sample.expand(batch, height * width).reshape(-1)

        def encode(first: int, last: int) -> Tensor:
            block = slice(first, last)
            made: Tensor = self.temporal(
                series[block],
                positions,
                None if usable is None else usable[block],
                prepared,
                sample[block],
            )
            return made

        step, prepared = self.max_sequences, None
        if runs_without_gradients(self):
            series_bytes = 4 * dates * (self.config.feedforward + 4 * dim)
            step = max(1, min(step or MAX_SEQUENCES, self._slice_bytes(spatial) // series_bytes))
            prepared = prepare_layers(self.temporal.layers, spatial)
        total = series.shape[0]
        if prepared is not None and fused.usable(spatial, dates):
            wide = torch.empty_like(series, dtype=torch.float32)
            narrow = torch.empty_like(series, dtype=product_dtype(spatial))
            for first in range(0, total, step or total):
                block = slice(first, first + (step or total))
                known = None if usable is None else usable[block]
                self.temporal.in_kernels(
                    series[block], positions, known, prepared, sample[block],
                    into=(wide[block], narrow[block]),
                )  # fmt: skip
            return wide.view_as(spatial), narrow.view_as(spatial)
        if step is None or step >= total:
            return encode(0, total).view_as(spatial), None
        if torch.is_grad_enabled():
            parts = [encode(first, first + step) for first in range(0, total, step)]
            return torch.cat(parts).view_as(spatial), None
        part = encode(0, step)
        features = part.new_empty(total, dates, dim)
        features[:step] = part
        for first in range(step, total, step):
            features[first : first + step] = encode(first, first + step)
        return features.view_as(spatial), None

    def _slice_bytes(self, x: Tensor) -> int:
        if x.device.type == "cpu":
            return min(self.slice_bytes, CACHE_BYTES)
        return max(self.slice_bytes, GPU_SLICE_BYTES) if fused.usable(x) else self.slice_bytes


class Stcln(nn.Module):
    """Classify each pixel of a chip from its series and from the pixels around it."""

    def __init__(self, config: StclnConfig) -> None:
        super().__init__()
        if config.classes < 1:
            raise InputError(
                f"Cannot build a classifier: classes={config.classes}, and at least one is needed. "
                "Pass classes=len(legend)."
            )
        self.config = config
        self.encoder = Encoder(config)
        self.attention = SpatioTemporalAttention(
            config.dim,
            affinity_dates=config.affinity_dates if config.mode == "geo" else None,
            borrow=config.sta,
        )
        self.classifier = nn.Linear(config.dim, config.classes)

    @property
    def embedding_dim(self) -> int:
        """Length of what `embed` gives of a pixel."""
        return self.config.dim

    def forward(self, images: Tensor, days: Tensor, valid: Tensor | None = None) -> Tensor:
        """Classify a batch; parameters as in `Encoder.forward`.

        Returns
        -------
        (B, K, H, W) float32 logits, always finite. In `geo` mode a pixel without a valid date has
        the classifier's bias: it says nothing, and a map must mark it as nodata.
        """
        height, width = images.shape[-2:]
        return self.classify(self.embed(images, days, valid), (height, width))

    def embed(self, images: Tensor, days: Tensor, valid: Tensor | None = None) -> Tensor:
        """Give what the classifier decides from; parameters as in `Encoder.forward`.

        Returns
        -------
        (B, H*W, D). Features of each pixel after the spatiotemporal attention, row by row.
        """
        check_batch(self.config, images, days, valid)
        features = self.encoder.encode(self.encoder.normalise(images, valid), days, valid)
        usable = None if features.valid is None else features.valid.flatten(1, 2)
        attended: Tensor = self.attention(
            features.temporal.flatten(1, 2),
            features.spatial.flatten(1, 2),
            usable,
            None if features.narrow is None else features.narrow.flatten(1, 2),
        )
        return attended

    def classify(self, embedded: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Turn what `embed` gave, (B, H*W, D), into logits (B, K, H, W) float32."""
        with torch.autocast(device_type=embedded.device.type, enabled=False):
            logits: Tensor = self.classifier(full_precision(embedded))  # (B, N, K)
        return logits.transpose(1, 2).reshape(embedded.shape[0], -1, *shape_yx)  # (B, K, H, W)


class MaskedPretrainer(nn.Module):
    """Reconstruct hidden observations from what is around them in time and space.

    A hidden observation shows one learnable number in every band, or in those that are hidden. It
    keeps its place in time, and takes part in attention like a visible one.
    """

    def __init__(self, config: StclnConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.token = nn.Parameter(torch.zeros(1))
        self.reconstruction = nn.Linear(config.dim, len(config.bands))

    def forward(self, images: Tensor, days: Tensor, valid: Tensor | None, mask: Tensor) -> Tensor:
        """Reconstruct a batch; parameters as in `Encoder.forward`.

        Parameters
        ----------
        mask : (B, T, H, W) or (B, T, C, H, W) bool. True where the observation, or its value in one
            band, is hidden; no effect where invalid.

        Returns
        -------
        (B, T, C, H, W) float32, in normalised units: compare with `normalise(images)`.
        """
        check_batch(self.config, images, days, valid)
        expected = images.shape if mask.ndim == 5 else (*images.shape[:2], *images.shape[-2:])
        if mask.dtype != torch.bool or mask.shape != expected:
            raise InputError(
                f"Cannot hide observations: mask is {tuple(mask.shape)} {mask.dtype}, but must be "
                f"(B, T, H, W) or (B, T, C, H, W) bool for images {tuple(images.shape)}. Make it "
                "with make_mask(...)."
            )
        hidden = hidden_values(mask, valid)
        inputs = self.encoder.normalise(images, valid)
        inputs = torch.where(hidden, self.token.to(inputs.dtype), inputs)
        features = self.encoder.encode(inputs, days, valid)
        with torch.autocast(device_type=images.device.type, enabled=False):
            made: Tensor = self.reconstruction(full_precision(features.temporal))
        return made.permute(0, 3, 4, 1, 2)  # (B, H, W, T, C) -> (B, T, C, H, W)

    def normalise(self, images: Tensor, valid: Tensor | None = None) -> Tensor:
        """Apply the z-score to reflectance (B, T, C, H, W); exactly 0 where invalid."""
        return self.encoder.normalise(images, valid)


def positions_for(config: StclnConfig, days: Tensor) -> Tensor:
    """Give what a network must be passed as `days`: (B, T) or (T,) days, or their ranks 0..T-1.

    Networks never choose for themselves, so that positions stay visible to the caller.
    """
    if config.positions == "days":
        return days
    return torch.arange(days.shape[-1], device=days.device).expand(days.shape)


def probabilities(logits: Tensor, temperature: float | None = None) -> Tensor:
    """Turn logits (B, K, H, W) float32 into probabilities that add up to one over K.

    Parameters
    ----------
    temperature : logits are divided by it: above 1 it makes the network less sure, and the order
        of the classes stays. None divides by nothing.
    """
    return torch.softmax(logits if temperature is None else logits / temperature, dim=1)


def check_batch(config: StclnConfig, images: Tensor, days: Tensor, valid: Tensor | None) -> None:
    """Raise InputError where the shapes of a batch do not agree with one another or the network."""
    bands = len(config.bands)
    if images.ndim != 5 or images.shape[2] != bands or 0 in images.shape:
        raise InputError(
            f"Cannot run the network: images are {tuple(images.shape)}, but must be non-empty "
            f"(B, T, {bands}, H, W), with the bands {', '.join(config.bands)}. "
            "Select the bands by name, in this order."
        )
    if days.shape != images.shape[:2]:
        raise InputError(
            f"Cannot run the network: days are {tuple(days.shape)}, but must be (B, T) = "
            f"{tuple(images.shape[:2])} as in images. Pass one day for each sample and date."
        )
    expected = (*images.shape[:2], *images.shape[-2:])
    if valid is not None and (valid.dtype != torch.bool or valid.shape != expected):
        raise InputError(
            f"Cannot run the network: valid is {tuple(valid.shape)} {valid.dtype}, but must be "
            f"(B, T, H, W) = {expected} bool, True where usable. Convert it, or pass None."
        )
