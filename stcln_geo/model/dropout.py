"""Dropout on a CPU that draws a number for each value dropped, not for each value.

Where each value is dropped by itself, the gaps between dropped values are geometric: these are
drawn, and zeros written where they lead. One draw for each value, a mask kept for the backward pass
and two products with it cost a quarter of a training step. What is kept must be scaled by 1 / (1 -
share); that is left to the weights of the linear map that follows, where it costs nothing.

The law is that of `nn.Dropout`; for one seed the values dropped are others.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

VECTOR = 16
"""Shorter rows than this take a CPU's softmax several times as long as padded ones."""


def draws_gaps(x: Tensor, share: float) -> bool:
    """Return True where values are to be dropped in these ways: on a CPU, outside of a capture."""
    return share > 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()


def draw_places(values: int, share: float) -> Tensor:
    """Draw which of `values` to drop, each with chance `share` by itself: int64 places, ascending.

    `share` lies in (0, 1), both excluded. Torch's generator of the CPU is the source of chance.
    """
    rate = math.log1p(-share)
    parts: list[Tensor] = []
    last = -1
    while last < values - 1:
        expected = (values - 1 - last) * share
        count = int(expected + 6 * math.sqrt(expected)) + 8  # nearly always enough
        # log(u) / log(1 - share), u uniform in (0, 1]: its whole part is geometric.
        places = torch.rand(count).neg_().add_(1).log_().div_(rate).to(torch.int64).add_(1)
        places[0] += last
        parts.append(places.cumsum_(0))
        last = int(places[-1])
    places = parts[0] if len(parts) == 1 else torch.cat(parts)
    return places[: int(torch.searchsorted(places, values))]


def drop(x: Tensor, share: float) -> Tensor:
    """Give `x` with values set to 0, each with chance `share`."""
    dropped: Tensor = _Drop.apply(x, share)  # type: ignore[no-untyped-call]
    return dropped


def drop_after_relu(x: Tensor, share: float) -> Tensor:
    """Give relu(x) with values set to 0, each with chance `share`.

    `x` is written over, and the result is all that is kept for the gradients. It should not be a
    view: autograd copies back and forth for those.
    """
    dropped: Tensor = _ReluDrop.apply(x, share)  # type: ignore[no-untyped-call]
    return dropped


def add_dropped(x: Tensor, change: Tensor, share: float) -> Tensor:
    """Give x + dropout(change), what is kept of the change being scaled as dropout does."""
    added: Tensor = _AddDropped.apply(x, change, share)  # type: ignore[no-untyped-call]
    return added


def attend_and_drop(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None, share: float
) -> Tensor:
    """Attend with weights some of which are dropped, and the others not scaled.

    All are (S, heads, T, d). Fused kernels do not drop on a CPU.
    """
    sequences, heads, dates, width = query.shape
    spare = max(VECTOR - dates, 0)
    if spare:
        key, value = (F.pad(part, (0, 0, 0, spare)) for part in (key, value))
    query, key, value = (part.flatten(0, 1) for part in (query, key, value))
    bias = query.new_zeros(1, dates + spare)
    bias[:, dates:] = -torch.inf
    if keys is not None:
        bias = bias.repeat(sequences, 1)
        bias[:, :dates].masked_fill_(~keys, -torch.inf)
        bias = bias.repeat_interleave(heads, 0)[:, None]  # (S, T) -> (S * heads, 1, T)
    logits = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=1 / math.sqrt(width))
    mixed = torch.bmm(drop(logits.softmax(-1), share), value)
    return mixed.view(sequences, heads, dates, width)


def _zero(x: Tensor, places: Tensor) -> Tensor:
    x.view(-1).index_fill_(0, places, 0.0)
    return x


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        places = draw_places(x.numel(), share)
        ctx.save_for_backward(places)
        return _zero(x.clone(memory_format=torch.contiguous_format), places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _zero(gradient.clone(memory_format=torch.contiguous_format), places), None


class _ReluDrop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.mark_dirty(x)
        made = _zero(x.relu_(), draw_places(x.numel(), share))
        ctx.save_for_backward(made)
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (made,) = ctx.saved_tensors
        # 0 because it was dropped, or because it was not above 0: no gradient either way.
        return torch.ops.aten.threshold_backward(gradient, made, 0.0), None


class _AddDropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, change: Tensor, share: float) -> Tensor:
        places = draw_places(change.numel(), share)
        ctx.save_for_backward(places)
        ctx.scale, ctx.dtype = 1 / (1 - share), change.dtype
        added = torch.add(x, change, alpha=ctx.scale)
        added.view(-1)[places] = x.reshape(-1)[places]
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (places,) = ctx.saved_tensors
        scaled = (gradient * ctx.scale).to(ctx.dtype).contiguous()
        return gradient, _zero(scaled, places), None
