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

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .dropout import add_dropped, attend_and_drop, draws_gaps, drop_after_relu

MAX_SEQUENCES = 32768
"""Most sequences one attention call takes: fused GPU kernels fail at 65536."""
Layer = Callable[[Tensor, Tensor | None], Tensor]
"""A transformer layer: series (S, T, D) and the dates attended to, (S, T) bool, to (S, T, D)."""
AFFINITY_BYTES = 2**27
"""Size of one block of spatial affinities; a few such blocks live at once."""
CPU_AFFINITY_BYTES = 2**25
"""The same in inference on a CPU."""
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

        with torch.no_grad():
            seen = (pixels > 0).to(self.running_mean.dtype)
            step = self.momentum * seen
            unbiased = variance * pixels / (pixels - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), step)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), step)
            self.num_batches_tracked += seen.long().squeeze()

        scale = self.weight * torch.rsqrt(variance + self.eps).to(x.dtype)
        return centred * scale[:, None, None] + self.bias[:, None, None]


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
        x = F.relu(self.norm(self.convolution(x), valid))
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
        prepared: Sequence[Layer] | None = None,
    ) -> Tensor:
        """Map series (S, T, D) with encoded positions (S, T, D) to features (S, T, D).

        `valid` (S, T) bool; features are 0 where it is False. `prepared` layers, if given, are
        run in place of `layers`; see `inference`.
        """
        keys = None
        if valid is not None:
            # A series without any valid date attends to all: finite, and zeroed below.
            keys = valid | ~valid.any(1, keepdim=True)
        x = self.norm(x, valid) + positions
        for layer in self.layers if prepared is None else prepared:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, keys, use_reentrant=False)
            else:
                x = layer(x, keys)
        if valid is None:
            return x
        usable = valid[..., None].to(x.dtype)  # a product with booleans takes twice as long
        return x * usable if prepared is None else x.mul_(usable)


class SpatioTemporalAttention(nn.Module):
    """Let each pixel borrow from the pixels of the chip whose series resemble its own (STA).

    The logit of pixels i and j is the product of i's temporal features with j's convolution
    features, both projected, summed over the dates valid at both, and scaled. The published scale
    is 1/sqrt(D), whatever the number of dates n; as the sum grows with n, so does the contrast of
    the softmax. In `geo` mode the scale is sqrt(affinity_dates / n_ij) / sqrt(D), with n_ij the
    number of dates valid at both: for independent terms of unit variance the spread of the logits
    is then sqrt(affinity_dates) for any n and any D, and equals the published one at n = 30.

    A pair of pixels that share no valid date has weight 0. So a pixel without any valid date is
    never a key, and as a query gets nothing.

    With ``borrow=False`` no pixel borrows: what is left is the projected maximum over time, and
    there are no weights for queries and keys.
    """

    def __init__(self, dim: int, *, affinity_dates: int | None, borrow: bool = True) -> None:
        super().__init__()
        self.borrow = borrow
        self.affinity_dates = affinity_dates
        self.affinity_bytes: int | None = AFFINITY_BYTES
        """Size of a block of affinities; None: all at once, as a graph of any batch must."""
        # All are drawn, so that with and without, the other weights begin alike.
        query, key, value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        if borrow:
            self.query = query
            self.key = key
        self.value = value
        if borrow:
            self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, temporal: Tensor, spatial: Tensor, valid: Tensor | None = None) -> Tensor:
        """Combine temporal and convolution features, both (B, N, T, D), into (B, N, D).

        `valid` (B, N, T) bool; features must be 0 where it is False. float32, in blocks of
        queries: the N x N affinities are never held at once.
        """
        with torch.autocast(device_type=temporal.device.type, enabled=False):
            if runs_without_gradients(self):
                highest = _maximum_in_blocks(temporal, valid)
            else:
                highest = _maximum_over_time(temporal, valid)
            value: Tensor = self.value(full_precision(highest))
            if not self.borrow:
                return value
            combined: Tensor = self.gate * self._borrowed(temporal, spatial, value, valid) + value
        return combined

    def _borrowed(
        self, temporal: Tensor, spatial: Tensor, value: Tensor, valid: Tensor | None
    ) -> Tensor:
        # (x Wq^T)(y Wk^T)^T = x (Wq^T Wk) y^T: projecting the queries alone gives the same
        # logits, and the keys stay a view of the convolution features.
        mix = self.query.weight.t() @ self.key.weight / math.sqrt(self.query.in_features)
        if self.affinity_dates is not None:
            mix = mix * math.sqrt(self.affinity_dates)
        keys = full_precision(spatial).flatten(2)  # (B, N, T*D)
        shared = None if valid is None else valid.to(value.dtype)

        if self.affinity_bytes is None:
            return self._attend(temporal, keys, value, mix, shared, shared)
        batch, pixels = value.shape[:2]
        row_bytes = batch * pixels * value.element_size()
        affinity_bytes: int = self.affinity_bytes
        if runs_without_gradients(self) and value.device.type == "cpu":
            affinity_bytes = min(affinity_bytes, CPU_AFFINITY_BYTES)
        block = max(1, min(pixels, affinity_bytes // row_bytes))
        if block == pixels:
            return self._attend(temporal, keys, value, mix, shared, shared)

        recompute = torch.is_grad_enabled()
        parts = []
        for start in range(0, pixels, block):
            rows = slice(start, start + block)
            shared_rows = None if shared is None else shared[:, rows]
            inputs = (temporal[:, rows], keys, value, mix, shared_rows, shared)
            if recompute:
                parts.append(checkpoint(self._attend, *inputs, use_reentrant=False))
            else:
                parts.append(self._attend(*inputs))
        return torch.cat(parts, 1)

    def _attend(
        self,
        temporal: Tensor,
        keys: Tensor,
        value: Tensor,
        mix: Tensor,
        shared_rows: Tensor | None,
        shared: Tensor | None,
    ) -> Tensor:
        query = (full_precision(temporal) @ mix).flatten(2)  # (B, n, T, D) -> (B, n, T*D)
        logits = query @ keys.transpose(1, 2)  # (B, n, N)
        if shared is None or shared_rows is None:
            if self.affinity_dates is not None:
                logits = logits / math.sqrt(temporal.shape[2])
            return logits.softmax(-1) @ value

        dates = shared_rows @ shared.transpose(1, 2)  # (B, n, N): dates valid at both pixels
        if self.affinity_dates is not None:
            logits = logits * dates.clamp(min=1).rsqrt()
        logits = logits.masked_fill(dates == 0, torch.finfo(logits.dtype).min)
        # A pixel with a valid date shares it with itself at least.
        usable = shared_rows.any(-1, keepdim=True)
        return (logits.softmax(-1) @ value) * usable


def _maximum_over_time(temporal: Tensor, valid: Tensor | None) -> Tensor:
    """Take the maximum over the valid dates, (B, N, T, D) -> (B, N, D); 0 without any."""
    if valid is None:
        return temporal.amax(2)
    highest = temporal.masked_fill(~valid[..., None], -torch.inf).amax(2)
    return highest.masked_fill(~valid.any(2)[..., None], 0.0)


def _maximum_in_blocks(temporal: Tensor, valid: Tensor | None) -> Tensor:
    """Do the same by blocks of pixels: no masked copy of all features is ever held."""
    batch, pixels, dates, dim = temporal.shape
    size = max(1, CACHE_BYTES // (4 * batch * dates * dim))
    usable = [None] * len(temporal.split(size, 1)) if valid is None else valid.split(size, 1)
    highest = temporal.new_empty(batch, pixels, dim)
    parts = zip(temporal.split(size, 1), usable, highest.split(size, 1), strict=True)
    for features, kept, made in parts:
        made.copy_(_maximum_over_time(features, kept))
    return highest
