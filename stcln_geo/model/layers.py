"""The parts of STCLN: normalisations that skip invalid values, convolutions, time, space.

Shapes use B samples, T dates, C bands, H x W pixels, D features, N = H*W, and S sequences (one
pixel's series each). `valid` is True where an observation is usable; None means all of them are.

What an invalid observation does, everywhere in this file: nothing. It enters as 0, and it is set
back to 0 after every convolution block and at the end of the temporal encoder. A convolution thus
sees it exactly as it sees the border of the chip, at every depth: a chip with a margin of invalid
pixels is the chip without the margin. (Zeroing the input alone would not do: normalisation makes
something of a zero, and the next convolution would read it.) Batch and group statistics,
attention, the maximum over time and the affinities leave it out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import fused
from .device import product_dtype
from .dropout import add_dropped, attend_and_drop, draws_gaps, drop_after_relu

MAX_SEQUENCES = 32768
"""Most sequences one attention call takes: fused GPU kernels fail at 65536."""
CACHE_BYTES = 2**23
"""Working memory of one block of inference on a CPU: little enough to stay near the cores."""


def full_precision(x: Tensor) -> Tensor:
    """Return `x` as float32, or as it is where it is wider."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def runs_without_gradients(module: nn.Module) -> bool:
    """Return True where a module may take the ways that leave nothing for a backward pass.

    A graph that is being captured shows the plain ways, whatever the mode.
    """
    return not (module.training or torch.is_grad_enabled() or torch.compiler.is_compiling())


class MaskedBatchNorm2d(nn.Module):
    """Normalise each channel by the statistics of the valid pixels of the batch.

    With everything valid this is `nn.BatchNorm2d`. Without one valid pixel in the batch the
    running statistics stay as they are. Computed in float32; the result has the input's dtype.
    Where `sum_over_ranks` is set, the batch is that of all processes together.
    """

    sum_over_ranks: Callable[[Tensor], Tensor] | None = None
    """Adds up a tensor over the processes of a run, with gradients; None: this one is alone."""
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0, dtype=torch.long))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise `x` (N, C, H, W) with `valid` (N, 1, H, W) bool.

        Values at invalid pixels come out finite, but mean nothing.
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            values = full_precision(x)
            if not self.training or (valid is None and self.sum_over_ranks is None):
                normalised = self._plain(values)
            else:
                normalised = self._over_valid(values, valid)
        return normalised.to(x.dtype)

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Give weight (C, ...) and bias (C,) of a convolution with this norm, in evaluation."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        folded = weight * scale.view(-1, *[1] * (weight.ndim - 1))
        return folded, self.bias - self.running_mean * scale

    def _plain(self, x: Tensor) -> Tensor:
        if self.training:
            self.num_batches_tracked += 1
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )

    def _over_valid(self, x: Tensor, valid: Tensor | None) -> Tensor:
        # Two passes: the variance of centred values keeps its digits. Sums are over each image,
        # then over images in float64: those without a valid pixel move no digit.
        weight = x.new_ones(len(x), 1, *x.shape[-2:]) if valid is None else valid.to(x.dtype)
        wide = torch.float64
        pixels, total = weight.sum(dtype=wide), (x * weight).sum((2, 3)).sum(0, dtype=wide)
        if self.sum_over_ranks is not None:
            pixels, total = self.sum_over_ranks(torch.cat([pixels[None], total])).tensor_split([1])
        mean = total / pixels.clamp(min=1)
        centred = (x - mean.to(x.dtype)[:, None, None]) * weight
        squares = centred.square().sum((2, 3)).sum(0, dtype=wide)
        if self.sum_over_ranks is not None:
            squares = self.sum_over_ranks(squares)
        variance = squares / pixels.clamp(min=1)
        self._track(pixels, mean, variance)
        scale = self.weight * torch.rsqrt(variance + self.eps).to(x.dtype)
        return centred * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _track(self, pixels: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Let the running statistics follow those of a batch of so many valid pixels."""
        seen = (pixels > 0).to(self.running_mean.dtype)
        step = self.momentum * seen
        unbiased = variance * pixels / (pixels - 1).clamp(min=1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)
        self.num_batches_tracked += seen.long().squeeze()

    def with_relu(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Normalise in training, take the ReLU and zero what is invalid, by kernels of a GPU."""
        made, *statistics = fused.norm_relu(x, self.weight, self.bias, self.eps, valid)
        self._track(*statistics)
        return made


class PixelGroupNorm(nn.Module):
    """Normalise each pixel's series over (channels of a group x valid dates)."""

    def __init__(self, dim: int, groups: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Normalise `x` (S, T, D) with `valid` (S, T) bool; float32 (S, T, D).

        A series without a valid date comes out as the bias.
        """
        with torch.autocast(device_type=x.device.type, enabled=False):
            sequences, dates, dim = x.shape
            # (S, T, D) -> (S, T, G, D/G)
            grouped = full_precision(x).reshape(sequences, dates, self.groups, dim // self.groups)
            if valid is None:
                centred = grouped - grouped.mean((1, 3), keepdim=True)
                variance = centred.square().mean((1, 3), keepdim=True)
            else:
                weight = valid[:, :, None, None].to(grouped.dtype)
                values = weight.sum(1, keepdim=True).clamp(min=1) * grouped.shape[-1]
                mean = (grouped * weight).sum((1, 3), keepdim=True) / values
                centred = (grouped - mean) * weight
                variance = centred.square().sum((1, 3), keepdim=True) / values
            normalised = (centred * torch.rsqrt(variance + self.eps)).flatten(-2)
            scaled: Tensor = normalised * self.weight + self.bias
        return scaled


class FullLayerNorm(nn.LayerNorm):
    """Layer normalisation that stays in float32 under autocast."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis; the result is float32."""
        with torch.autocast(device_type=input.device.type, enabled=False):
            return super().forward(full_precision(input))


class ConvBlock(nn.Module):
    """3 x 3 convolution without bias, batch normalisation, ReLU, zero at invalid pixels."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm = MaskedBatchNorm2d(channels_out)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W) to (N, C', H, W); `valid` (N, 1, H, W) bool."""
        if runs_without_gradients(self):
            return self._folded(x, valid)
        x = self.convolution(x)
        if self.training and self.norm.sum_over_ranks is None and fused.usable(x):
            return self.norm.with_relu(x, valid)
        x = F.relu(self.norm(x, valid))
        return x if valid is None else x * valid.to(x.dtype)

    def _folded(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Run with the normalisation, which is affine in evaluation, inside the convolution."""
        weight, bias = self.norm.fold(self.convolution.weight)
        x = F.conv2d(x, weight, bias, padding=1).relu_()
        return x if valid is None else x.mul_(valid.to(x.dtype))


class ConvEncoder(nn.Module):
    """Two pairs of 3 x 3 convolutions on single dates, at full resolution; reach: 4 pixels."""

    def __init__(self, bands: int, widths: tuple[int, int]) -> None:
        super().__init__()
        first, second = widths
        self.blocks = nn.ModuleList(
            [
                ConvBlock(bands, first),
                ConvBlock(first, first),
                ConvBlock(first, second),
                ConvBlock(second, second),
            ]
        )

    def forward(self, frames: Tensor, valid: Tensor | None = None) -> Tensor:
        """Map frames (N, C, H, W), 0 at invalid pixels, to features (N, D, H, W)."""
        for block in self.blocks:
            frames = block(frames, valid)
        return frames

    def into_series(self, frames: Tensor, valid: Tensor | None, series: Tensor, first: int) -> None:
        """Write features of frames (B * t, C, H, W) to their dates of `series`, on a GPU.

        `series` (B, H, W, T, D) and `valid` (B, H, W, T) have all dates; `first` is the first
        one of `frames`. Without gradients.
        """
        batch, _, _, dates, _ = series.shape
        blocks = [block for block in self.blocks if isinstance(block, ConvBlock)]
        for number, block in enumerate(blocks, 1):
            weight, bias = block.norm.fold(block.convolution.weight)
            frames = fused.finish_convolution(
                F.conv2d(frames, weight, padding=1),
                bias,
                valid,
                dates=dates,
                first=first,
                frames=len(frames) // batch,
                series=series if number == len(blocks) else None,
            )


def sinusoids(days: Tensor, *, dim: int, heads: int, base: float, dtype: torch.dtype) -> Tensor:
    """Encode positions (B, T) as (B, T, D): one table of sines and cosines, equal in every head.

    Channel i of a head turns at `base ** (-2 * (i // 2) / head_dim)` radians a day; even channels
    are sines, odd ones cosines.
    """
    head_dim = dim // heads
    pair = torch.arange(head_dim, device=days.device) // 2
    wavelength = torch.pow(base, 2 * pair.to(dtype) / head_dim)
    angle = days.to(dtype)[..., None] / wavelength  # (B, T, head_dim)
    even = torch.arange(head_dim, device=days.device) % 2 == 0
    table = torch.where(even, angle.sin(), angle.cos())
    return table.repeat(1, 1, heads)


class SelfAttention(nn.Module):
    """Multi-head attention among the dates of each sequence, without the weights as output."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.projection = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Attend within (S, T, D); `keys` (S, T) bool, True where a date may be attended to.

        Every sequence needs at least one such date.
        """
        sequences, dates, dim = x.shape
        projected = self.projection(x).view(sequences, dates, 3, self.heads, dim // self.heads)
        query, key, value = projected.permute(2, 0, 3, 1, 4)  # each (S, heads, T, D/heads)
        # At lower precision the softmax wants more care than two plain products take.
        wide = projected.dtype in (torch.float32, torch.float64)
        if self.training and wide and draws_gaps(projected, self.dropout):
            mixed = attend_and_drop(query, key, value, keys, self.dropout)
            mixed = mixed.transpose(1, 2).reshape(sequences, dates, dim)
            return F.linear(mixed, self.output.weight / (1 - self.dropout), self.output.bias)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if keys is None else keys[:, None, None, :],
            dropout_p=self.dropout if self.training else 0.0,
        )
        joined: Tensor = self.output(mixed.transpose(1, 2).reshape(sequences, dates, dim))
        return joined


class TransformerLayer(nn.Module):
    """Post-norm transformer layer: attention, then a two-layer ReLU network."""

    def __init__(self, dim: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, dropout)
        self.attention_norm = FullLayerNorm(dim)
        self.expand = nn.Linear(dim, feedforward)
        self.contract = nn.Linear(feedforward, dim)
        self.feedforward_norm = FullLayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, keys: Tensor | None = None) -> Tensor:
        """Map (S, T, D) to (S, T, D); `keys` (S, T) bool as in `SelfAttention`."""
        share = self.dropout.p
        if self.training and draws_gaps(x, share):
            x = self.attention_norm(add_dropped(x, self.attention(x, keys), share))
            hidden = drop_after_relu(self.expand(x.flatten(0, 1)), share)
            changed = F.linear(hidden, self.contract.weight / (1 - share), self.contract.bias)
            made: Tensor = self.feedforward_norm(add_dropped(x, changed.view_as(x), share))
            return made
        x = self.attention_norm(x + self.dropout(self.attention(x, keys)))
        hidden = self.dropout(F.relu(self.expand(x)))
        normalised: Tensor = self.feedforward_norm(x + self.dropout(self.contract(hidden)))
        return normalised

    def in_kernels(
        self, x: Tensor, low: Tensor, keys: Tensor | None, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Do the same on a GPU; results are 0 where `valid` (S, T) is False.

        `low` is `x` in the type in which matrices are multiplied; the result comes in both.
        """
        share = self.dropout.p if self.training else 0.0
        attention = self.attention
        mixed = fused.attend(
            attention.projection(low),
            attention.heads,
            keys,
            attention.dropout if self.training else 0.0,
        )
        x, low = fused.add_norm(x, attention.output(mixed), self.attention_norm, share, low=low)
        hidden = fused.relu_drop(self.expand(low.flatten(0, 1)), share)
        changed = F.linear(hidden, self.contract.weight / (1 - share), self.contract.bias)
        return fused.add_norm(
            x, changed.view_as(x), self.feedforward_norm, share, low=low, valid=valid
        )


class TemporalEncoder(nn.Module):
    """Group normalisation, positions and a transformer, on each pixel's series by itself."""

    def __init__(
        self, dim: int, *, layers: int, heads: int, feedforward: int, dropout: float
    ) -> None:
        super().__init__()
        self.norm = PixelGroupNorm(dim, heads)
        self.layers = nn.ModuleList(
            [TransformerLayer(dim, heads, feedforward, dropout) for _ in range(layers)]
        )
        self.recompute = False
        """True keeps a layer's input only, and runs it again for the gradients: less memory."""

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        valid: Tensor | None = None,
        prepared: Sequence[Any] | None = None,
        sample: Tensor | None = None,
    ) -> Tensor:
        """Map series (S, T, D) with encoded positions (B, T, D) to features (S, T, D).

        `sample` (S,) int64 says of which sample a series is; None: B is S. `valid` (S, T) bool;
        features are 0 where it is False. `prepared` layers, if given, are run in place of
        `layers`; see `inference`.
        """
        keys = _dates_to_see(valid)
        if fused.usable(x, x.shape[1]):
            wide = x.new_empty(x.shape, dtype=torch.float32)
            low = x.new_empty(x.shape, dtype=product_dtype(x))
            return self.in_kernels(x, positions, valid, prepared, sample, into=(wide, low))
        x = self.norm(x, valid) + (positions if sample is None else positions[sample])
        for layer in self.layers if prepared is None else prepared:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, keys, use_reentrant=False)
            else:
                x = layer(x, keys)
        if valid is None:
            return x
        usable = valid[..., None].to(x.dtype)  # a product with booleans takes twice as long
        return x * usable if prepared is None else x.mul_(usable)

    def in_kernels(
        self,
        x: Tensor,
        positions: Tensor,
        valid: Tensor | None,
        prepared: Sequence[Any] | None,
        sample: Tensor | None,
        *,
        into: tuple[Tensor, Tensor],
    ) -> Tensor:
        """Do the same on a GPU.

        `into` are tensors like `x`, one in float32, one in the type in which matrices are
        multiplied. Without gradients they hold the features afterwards.
        """
        if sample is None:
            sample = torch.arange(len(x), device=x.device)
        keys = _dates_to_see(valid)
        wide, low = fused.group_norm(x, self.norm, valid, positions, sample, into=into)
        layers = self.layers if prepared is None else prepared
        for number, layer in enumerate(layers, 1):
            inputs = (wide, low, keys, valid if number == len(layers) else None)
            if self.recompute and torch.is_grad_enabled():
                wide, low = checkpoint(layer.in_kernels, *inputs, use_reentrant=False)
            else:
                wide, low = layer.in_kernels(*inputs)
        return wide


def _dates_to_see(valid: Tensor | None) -> Tensor | None:
    """Dates that a series attends to; without a valid one, all: finite, and zeroed in the end."""
    return None if valid is None else valid | ~valid.any(1, keepdim=True)
