"""The parts of the network between products of matrices, as kernels for GPUs.

Each function here computes what a part of `layers` computes, with gradients, in one pass over
memory (`kernels`). `usable` says where they can run: on a GPU, with Triton, outside of a capture.
Elsewhere the plain parts run. Both give the same results but for rounding; dropout draws from
torch's generator of the device, and from other places of it than the plain parts.

Tensors are (S, T, D) sequences, or (N, C, H, W) images whose channels lie next to each other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_DATES = 128
"""Longest series that a kernel holds at once."""
TILE = 4096
"""Values that a program holds at a time."""
_HAS_WIDE_SUMS = torch.torch_version.TorchVersion(torch.__version__) >= "2.8"
STEPS = 16
"""Tiles, or sequences, whose sums are one row."""


@functools.cache
def kernels() -> Any:
    """Return the module of kernels; None where there is no Triton."""
    try:
        from . import kernels as module
    except ImportError:
        return None
    return module


def usable(x: Tensor, dates: int = 1) -> bool:
    """Return True where kernels can take the place of the plain parts."""
    return (
        x.device.type == "cuda"
        and x.dtype != torch.float64
        and dates <= MAX_DATES
        and not torch.compiler.is_compiling()
        and kernels() is not None
    )


def attend(projected: Tensor, heads: int, keys: Tensor | None, share: float) -> Tensor:
    """Attend among dates: queries, keys and values (S, T, 3 * D) to (S, T, D).

    Parameters
    ----------
    keys : (S, T) bool. True where a date may be attended to; one at least in each sequence.
    share : in [0, 1). Weights to drop.
    """
    made: Tensor = _Attend.apply(projected.contiguous(), heads, _contiguous(keys), share)  # type: ignore[no-untyped-call]
    return made


def add_norm(
    x: Tensor,
    change: Tensor,
    norm: nn.LayerNorm,
    share: float,
    *,
    low: Tensor,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Give norm(x + dropout(change)) in the type of `x`, and once more in that of `low`.

    Without gradients `x` and `low` are written over.

    Parameters
    ----------
    valid : (S, T) bool. Results are 0 where it is False. None: nowhere.
    """
    wide, narrow = _AddNorm.apply(  # type: ignore[no-untyped-call]
        x.contiguous(), change.contiguous(), norm.weight, norm.bias, norm.eps, share, low,
        _contiguous(valid), torch.is_grad_enabled(),
    )  # fmt: skip
    return wide, wide if narrow is None else narrow


def relu_drop(x: Tensor, share: float) -> Tensor:
    """Give relu(x) with values dropped, written over `x`; what is kept is not scaled."""
    if share == 0:
        return torch.relu_(x)
    made: Tensor = _ReluDrop.apply(x, share)  # type: ignore[no-untyped-call]
    return made


def group_norm(
    x: Tensor,
    norm: Any,
    valid: Tensor | None,
    positions: Tensor,
    sample: Tensor,
    *,
    into: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Write a `PixelGroupNorm` of x (S, T, D) plus positions into two tensors of types of choice.

    Parameters
    ----------
    positions : (B, T, D) float32. One table for each sample.
    sample : (S,) int64. The sample that a sequence is of.
    """
    wide, narrow = _GroupNorm.apply(  # type: ignore[no-untyped-call]
        x.contiguous(),
        norm.weight,
        norm.bias,
        norm.groups,
        norm.eps,
        _contiguous(valid),
        positions.contiguous(),
        sample.contiguous(),
        *into,
        torch.is_grad_enabled(),
    )
    return wide, wide if narrow is None else narrow


def norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Give relu of the batch normalisation of x (N, C, H, W) over its valid pixels, 0 elsewhere.

    Parameters
    ----------
    valid : (N, 1, H, W) bool.

    Returns
    -------
    The result in the type of `x`; number () of valid pixels, mean and variance (C,), float64.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    made: tuple[Tensor, Tensor, Tensor, Tensor] = _NormRelu.apply(
        x, weight, bias, eps, _contiguous(valid)
    )  # type: ignore[no-untyped-call]
    return made


def finish_convolution(
    x: Tensor,
    bias: Tensor,
    valid: Tensor | None,
    *,
    dates: int,
    first: int = 0,
    frames: int = 1,
    series: Tensor | None = None,
) -> Tensor:
    """Give relu(x + bias), 0 where invalid, without gradients.

    Parameters
    ----------
    x : (B * frames, C, H, W).
    valid : (B, H, W, T) bool.
    dates : T.
    first : the date of the first frame.
    series : (B, H, W, T, C), written at the dates of the frames. None: written over `x`.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    made = x if series is None else series
    rows, dim, block, height = _shape(x)
    kernels().finish_convolution[(-(-rows // height),)](
        x, bias, _contiguous(valid), made, rows, x.shape[2] * x.shape[3], frames, dates, first,
        DIM=dim, BLOCK=block, ROWS=height, MASKED=valid is not None, SERIES=series is not None,
    )  # fmt: skip
    return made


def maximum_over_dates(x: Tensor, valid: Tensor | None) -> Tensor:
    """Take the maximum over the valid dates, (S, T, D) to (S, D), without gradients; 0 if none."""
    sequences, dates, dim = x.shape
    made = x.new_empty(sequences, dim)
    groups = 1 if dim % 64 else dim // 64
    kernels().maximum_over_dates[(sequences, groups)](
        x.contiguous(), _contiguous(valid), made, dates, **_groups(dim, groups, dates, valid)
    )
    return made


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Give a @ b in float32, and its gradients, of batches of matrices in a narrower type.

    What torch before 2.8 cannot do, it does after widening the factors.
    """
    made: Tensor = _WideProduct.apply(a, b)  # type: ignore[no-untyped-call]
    return made


def _power(count: int) -> int:
    """Return the next power of two."""
    return 1 << (count - 1).bit_length()


def _shape(x: Tensor, tile: int = TILE) -> tuple[int, int, int, int]:
    """Rows and channels of images or sequences; channels and rows of a tile."""
    dim = x.shape[1] if x.ndim == 4 else x.shape[-1]
    block = _power(dim)
    return x.numel() // dim, dim, block, max(1, tile // block)


def _seed(x: Tensor, share: float) -> Tensor | None:
    """Draw where dropout begins, on the device: nothing waits for it."""
    if share == 0:
        return None
    return torch.randint(2**31 - 1, (1,), device=x.device, dtype=torch.int64)


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        if _HAS_WIDE_SUMS and a.is_cuda:
            return torch.bmm(a, b, out_dtype=torch.float32)
        return torch.bmm(a.float(), b.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        gradient = gradient.to(a.dtype)
        return torch.bmm(gradient, b.mT), torch.bmm(a.mT, gradient)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, projected: Tensor, heads: int, keys: Tensor | None, share: float
    ) -> Tensor:
        sequences, dates, width = projected.shape
        seed = _seed(projected, share)
        made = projected.new_empty(sequences, dates, width // 3)
        how = _attention(projected, heads, keys, share)
        kernels().attend[(sequences * heads,)](
            projected, keys, made, seed, share, _scale(projected, heads), dates, **how
        )
        ctx.save_for_backward(projected, keys, made, seed)
        ctx.how, ctx.share = how, share
        return made

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        projected, keys, made, seed = ctx.saved_tensors
        sequences, dates, _ = projected.shape
        heads = ctx.how["HEADS"]
        given = torch.empty_like(projected)
        kernels().attend_backward[(sequences * heads,)](
            projected, keys, made, gradient.contiguous(), given, seed, ctx.share,
            _scale(projected, heads), dates, **ctx.how,
        )  # fmt: skip
        return given, None, None, None


def _attention(projected: Tensor, heads: int, keys: Tensor | None, share: float) -> dict[str, Any]:
    dates = max(_power(projected.shape[1]), 16)
    return {
        "HEADS": heads, "WIDTH": projected.shape[2] // 3 // heads, "DATES": dates,
        "MASKED": keys is not None, "DROP": share > 0,
        "num_warps": min(max(1, dates * dates // 512), 8),
    }  # fmt: skip


def _scale(projected: Tensor, heads: int) -> float:
    return 1 / math.sqrt(projected.shape[2] // 3 // heads)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        change: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        share: float,
        low: Tensor,
        valid: Tensor | None,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, dim, block, height = _shape(x)
        made, narrow = x, None if low.dtype == x.dtype else low
        if keep:
            made = torch.empty_like(x)
            narrow = None if narrow is None else torch.empty_like(narrow)
        added = torch.empty_like(x) if keep else None
        mean, scale = (x.new_empty(rows) if keep else None for _ in range(2))
        seed = _seed(x, share)
        kernels().add_norm[(-(-rows // height),)](
            x, change, valid, weight, bias, added, mean, scale, made, narrow, seed, share, eps,
            rows, DIM=dim, BLOCK=block, ROWS=height,
            DROP=share > 0, KEEP=keep, LOW=narrow is not None, MASKED=valid is not None,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(added, mean, scale, weight, valid, seed)
        ctx.share, ctx.change = share, change.dtype
        return made, narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wide: Tensor | None, narrow: Tensor | None) -> tuple[Any, ...]:
        added, mean, scale, weight, valid, seed = ctx.saved_tensors
        rows, dim, block, height = _shape(added, TILE // 2)
        programs = -(-rows // (height * STEPS))
        of_x, of_change = torch.empty_like(added), torch.empty_like(added, dtype=ctx.change)
        sums = added.new_empty(2, programs, dim, dtype=torch.float32)
        kernels().add_norm_backward[(programs,)](
            added, mean, scale, valid, weight, _contiguous(wide), _contiguous(narrow), of_x,
            of_change, sums[0], sums[1], seed, ctx.share, rows, DIM=dim, BLOCK=block, ROWS=height,
            DROP=ctx.share > 0, LOW=narrow is not None, WIDE=wide is not None,
            MASKED=valid is not None, STEPS=STEPS, num_warps=2,
        )  # fmt: skip
        of_weight, of_bias = sums.sum(1).to(weight.dtype)
        return of_x, of_change, of_weight, of_bias, *(None,) * 5


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


class _ReluDrop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.mark_dirty(x)
        kernels().relu_drop[(-(-x.numel() // TILE),)](
            x, _seed(x, share), share, x.numel(), QUARTER=TILE // 4
        )
        ctx.save_for_backward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (made,) = ctx.saved_tensors
        # 0 because it was dropped, or because it was not above 0: no gradient either way.
        return torch.ops.aten.threshold_backward(gradient, made, 0.0), None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
        valid: Tensor | None,
        positions: Tensor,
        sample: Tensor,
        made: Tensor,
        low: Tensor,
        keep: bool,
    ) -> tuple[Tensor, Tensor | None]:
        sequences, dates, dim = x.shape
        narrow = None if low.dtype == made.dtype else low
        ctx.mark_dirty(*(tensor for tensor in (made, narrow) if tensor is not None))
        mean, scale = (
            x.new_empty(sequences * groups, dtype=torch.float32) if keep else None for _ in range(2)
        )
        how = _groups(dim, groups, dates, valid)
        kernels().group_norm[(sequences * groups,)](
            x, valid, positions, sample, weight, bias, made, narrow, mean,
            scale, eps, dates, LOW=narrow is not None, KEEP=keep, **how,
        )  # fmt: skip
        if keep:
            ctx.save_for_backward(x, valid, mean, scale, weight)
        ctx.how = how
        return made, narrow

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, wide: Tensor | None, narrow: Tensor | None) -> tuple[Any, ...]:
        x, valid, mean, scale, weight = ctx.saved_tensors
        sequences, dates, dim = x.shape
        programs = -(-sequences // STEPS)
        of_x = torch.empty_like(x)
        sums = x.new_empty(2, programs, dim, dtype=torch.float32)
        kernels().group_norm_backward[(programs, ctx.how["GROUPS"])](
            x, valid, mean, scale, weight, _contiguous(wide), _contiguous(narrow), of_x, sums[0],
            sums[1], sequences, dates, LOW=narrow is not None, WIDE=wide is not None,
            STEPS=STEPS, **ctx.how,
        )  # fmt: skip
        of_weight, of_bias = sums.sum(1).to(weight.dtype)
        return of_x, of_weight, of_bias, *(None,) * 8


def _groups(dim: int, groups: int, dates: int, valid: Tensor | None) -> dict[str, Any]:
    width = dim // groups
    return {
        "GROUPS": groups, "WIDTH": width, "CHANNELS": _power(width), "DATES": _power(dates),
        "MASKED": valid is not None,
    }  # fmt: skip


class _NormRelu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        rows, dim, block, height = _shape(x)
        programs, masked = -(-rows // (height * STEPS)), valid is not None
        sums = x.new_empty(programs, dim, dtype=torch.float32)

        def add_up(mean: Tensor | None) -> Tensor:
            kernels().sum_over_pixels[(programs,)](
                x, mean, valid, sums, rows, DIM=dim, BLOCK=block, ROWS=height,
                MASKED=masked, SQUARE=mean is not None, STEPS=STEPS,
            )  # fmt: skip
            return sums.sum(0, dtype=torch.float64)

        pixels = sums.new_full((), rows, dtype=torch.float64)
        if valid is not None:
            pixels = valid.sum(dtype=torch.float64)
        mean = add_up(None) / pixels.clamp(min=1)
        middle = mean.float()
        variance = add_up(middle) / pixels.clamp(min=1)
        spread = torch.rsqrt(variance + eps).float()
        made = torch.empty_like(x)
        kernels().norm_relu[(-(-rows // height),)](
            x, middle, spread * weight, bias, valid, made, rows,
            DIM=dim, BLOCK=block, ROWS=height, MASKED=masked,
        )  # fmt: skip
        ctx.save_for_backward(x, middle, spread, weight, valid, made, pixels)
        ctx.mark_non_differentiable(pixels, mean, variance)
        return made, pixels, mean, variance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
        x, middle, spread, weight, valid, made, pixels = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        rows, dim, block, height = _shape(x)
        programs = -(-rows // (height * STEPS))
        sums = x.new_empty(2, programs, dim, dtype=torch.float32)
        kernels().norm_relu_sums[(programs,)](
            x, middle, spread, made, gradient, sums[0], sums[1], rows,
            DIM=dim, BLOCK=block, ROWS=height, STEPS=STEPS,
        )  # fmt: skip
        of_bias, of_weight = sums.sum(1, dtype=torch.float64)
        about, along = ((of / pixels.clamp(min=1)).float() for of in (of_bias, of_weight))
        of_x = torch.empty_like(x)
        kernels().norm_relu_backward[(-(-rows // height),)](
            x, middle, spread, weight, about, along, made, gradient, valid, of_x, rows,
            DIM=dim, BLOCK=block, ROWS=height, MASKED=valid is not None,
        )  # fmt: skip
        return of_x, of_weight.to(weight.dtype), of_bias.to(weight.dtype), None, None
