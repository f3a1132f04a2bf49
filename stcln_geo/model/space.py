"""The part of STCLN that looks across a chip: spatiotemporal attention.

Shapes and `valid` as in `layers`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import fused
from .layers import CACHE_BYTES, full_precision, runs_without_gradients

AFFINITY_BYTES = 2**27
"""Size of one block of spatial affinities; a few such blocks live at once."""
CPU_AFFINITY_BYTES = 2**25
"""The same in inference on a CPU."""


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

    def forward(
        self,
        temporal: Tensor,
        spatial: Tensor,
        valid: Tensor | None = None,
        narrow: Tensor | None = None,
    ) -> Tensor:
        """Combine temporal and convolution features, both (B, N, T, D), into (B, N, D).

        `valid` (B, N, T) bool; features must be 0 where it is False. `narrow` may be `temporal` in
        the type in which matrices are multiplied. float32, in blocks of queries: the N x N
        affinities are never held at once. On a GPU under autocast the factors of the logits are as
        narrow as what they are made from; logits, softmax and values are not.
        """
        kind = temporal.device.type
        queries = full_precision(temporal)
        if torch.is_autocast_enabled(kind) and fused.usable(temporal):
            queries = temporal.to(torch.get_autocast_dtype(kind)) if narrow is None else narrow
        with torch.autocast(device_type=kind, enabled=False):
            if runs_without_gradients(self):
                highest = _maximum_in_blocks(temporal, valid)
            else:
                highest = _maximum_over_time(temporal, valid)
            value: Tensor = self.value(full_precision(highest))
            if not self.borrow:
                return value
            borrowed = self._borrowed(queries, spatial, value, valid)
            combined: Tensor = self.gate * borrowed + value
        return combined

    def _borrowed(
        self,
        temporal: Tensor,
        spatial: Tensor,
        value: Tensor,
        valid: Tensor | None,
    ) -> Tensor:
        # (x Wq^T)(y Wk^T)^T = x (Wq^T Wk) y^T: projecting the queries alone gives the same
        # logits, and the keys stay a view of the convolution features.
        mix = self.query.weight.t() @ self.key.weight / math.sqrt(self.query.in_features)
        if self.affinity_dates is not None:
            mix = mix * math.sqrt(self.affinity_dates)
        wide = full_precision(temporal).dtype == temporal.dtype
        keys = full_precision(spatial) if wide else spatial.to(temporal.dtype)
        keys = keys.flatten(2)  # (B, N, T*D)
        shared = None if valid is None else valid.to(value.dtype)

        if self.affinity_bytes is None:
            return self._attend(temporal, keys, value, mix, shared, shared)
        batch, pixels = value.shape[:2]
        held: _Held | None = None
        row_bytes = batch * pixels * value.element_size()
        affinity_bytes: int = self.affinity_bytes
        if runs_without_gradients(self) and value.device.type == "cpu":
            affinity_bytes = min(affinity_bytes, CPU_AFFINITY_BYTES)
            held = _Held()
        block = max(1, min(pixels, affinity_bytes // row_bytes))
        if block == pixels:
            return self._attend(temporal, keys, value, mix, shared, shared, held)

        recompute = torch.is_grad_enabled()
        parts = []
        for start in range(0, pixels, block):
            rows = slice(start, start + block)
            shared_rows = None if shared is None else shared[:, rows]
            inputs = (temporal[:, rows], keys, value, mix, shared_rows, shared)
            if recompute:
                parts.append(checkpoint(self._attend, *inputs, use_reentrant=False))
            else:
                parts.append(self._attend(*inputs, held))
        return torch.cat(parts, 1)

    def _attend(
        self,
        temporal: Tensor,
        keys: Tensor,
        value: Tensor,
        mix: Tensor,
        shared_rows: Tensor | None,
        shared: Tensor | None,
        held: _Held | None = None,
    ) -> Tensor:
        mix = mix.to(temporal.dtype)
        if held is None:
            query = (temporal @ mix).flatten(2)  # (B, n, T, D) -> (B, n, T*D)
            first = second = third = None  # each result is a tensor of its own
        else:
            rows = temporal.flatten(0, 2)
            query = torch.mm(rows, mix, out=held.get("query", rows.shape, rows.dtype))
            query = query.view(*temporal.shape[:2], -1)
            pairs = (*temporal.shape[:2], keys.shape[1])
            first, second = (held.get(name, pairs, value.dtype) for name in ("logits", "dates"))
            third = held.get("apart", pairs, torch.bool)
        if narrow := query.dtype != value.dtype:
            value = value.to(query.dtype)
            logits = fused.wide_product(query, keys.transpose(1, 2))  # (B, n, N)
        else:
            logits = torch.matmul(query, keys.transpose(1, 2), out=first)
        if shared is None or shared_rows is None:
            if self.affinity_dates is not None:
                logits = torch.div(logits, math.sqrt(temporal.shape[2]), out=first)
            usable = None
        else:
            # Dates valid at both pixels, (B, n, N)
            dates = torch.matmul(shared_rows, shared.transpose(1, 2), out=second)
            apart = torch.eq(dates, 0, out=third)
            if self.affinity_dates is not None:
                scale = torch.rsqrt(torch.clamp(dates, min=1, out=second), out=second)
                logits = torch.mul(logits, scale, out=first)
            hide = logits.masked_fill if held is None else logits.masked_fill_
            logits = hide(apart, torch.finfo(logits.dtype).min)
            # A pixel with a valid date shares it with itself at least.
            usable = shared_rows.any(-1, keepdim=True)
        weights = torch.softmax(logits, -1, out=second).to(value.dtype)
        mixed = fused.wide_product(weights, value) if narrow else weights @ value
        return mixed if usable is None else mixed * usable


class _Held:
    """Memory for the blocks of a pass, used again from block to block.

    Tensors of this size, asked for and given back again and again, leave gaps that nothing fills.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Give a tensor (*shape) under a name; the first call under it must want the most."""
        values = math.prod(shape)
        if name not in self._held:
            self._held[name] = torch.empty(values, dtype=dtype)
        return self._held[name][:values].view(*shape)


def _maximum_over_time(temporal: Tensor, valid: Tensor | None) -> Tensor:
    """Take the maximum over the valid dates, (B, N, T, D) -> (B, N, D); 0 without any."""
    if valid is None:
        return temporal.amax(2)
    highest = temporal.masked_fill(~valid[..., None], -torch.inf).amax(2)
    return highest.masked_fill(~valid.any(2)[..., None], 0.0)


def _maximum_in_blocks(temporal: Tensor, valid: Tensor | None) -> Tensor:
    """Do the same by blocks of pixels: no masked copy of all features is ever held."""
    batch, pixels, dates, dim = temporal.shape
    if fused.usable(temporal, dates):
        series = None if valid is None else valid.flatten(0, 1)
        return fused.maximum_over_dates(temporal.flatten(0, 1), series).view(batch, pixels, dim)
    size = max(1, CACHE_BYTES // (4 * batch * dates * dim))
    usable = [None] * len(temporal.split(size, 1)) if valid is None else valid.split(size, 1)
    highest = temporal.new_empty(batch, pixels, dim)
    parts = zip(temporal.split(size, 1), usable, highest.split(size, 1), strict=True)
    for features, kept, made in parts:
        made.copy_(_maximum_over_time(features, kept))
    return highest
