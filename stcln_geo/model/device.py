"""Where and how exactly a network runs: device and precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

__all__ = [
    "Device", "Precision", "autocast_for", "choose_device", "choose_precision", "product_dtype",
    "rng_kept", "without_tf32",
]  # fmt: skip

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["auto", "float32", "bf16"]


def choose_device(device: Device) -> str:
    """Return ``cuda`` or ``cpu``; ``auto`` takes a GPU where there is one.

    Raises
    ------
    InputError
        If the device is unknown, or is a GPU that torch cannot use.
    """
    if device not in get_args(Device):
        raise InputError(
            f"Cannot run on {device!r}: devices are {', '.join(get_args(Device))}. "
            "Use --device auto."
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "Cannot run on 'cuda': torch finds no usable GPU here. Choose --device cpu, or install "
            "the CUDA build of torch."
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def choose_precision(
    precision: Precision, device: str, *, width: int
) -> Literal["float32", "bf16"]:
    """Return the precision; ``auto`` takes bfloat16 where the hardware is faster at it.

    That is on GPUs that support it, on CPUs with AMX, and on CPUs with AVX512-BF16 where the
    features are `_WIDE` or wider: narrower products are no faster there than the casts are slow.

    Parameters
    ----------
    width
        Length of the network's features, as ``StclnConfig.dim`` has it.
    """
    if precision != "auto":
        return precision
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "float32"
    fast = _has("_is_amx_tile_supported") or (_has("_is_avx512_bf16_supported") and width >= _WIDE)
    return "bf16" if fast else "float32"


_WIDE = 64


def _has(instructions: str) -> bool:
    """Ask torch about this CPU; versions that cannot tell are taken for no."""
    return bool(getattr(torch.cpu, instructions, bool)())


def autocast_for(precision: str, device: str) -> AbstractContextManager[object]:
    """Return the context in which the network runs at a precision."""
    if precision == "bf16":
        return torch.autocast(device, dtype=torch.bfloat16)
    return without_tf32() if device == "cuda" else nullcontext()


@contextmanager
def without_tf32() -> Iterator[None]:
    """Keep all digits of float32 in the convolutions of a GPU.

    Torch lets cuDNN round their factors to the 10 bits of TF32 otherwise; other products it leaves
    alone. Holds for the whole process.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def rng_kept(device: str) -> AbstractContextManager[None]:
    """Return the context after which torch's generators are as before: the CPU's, a GPU's in use.

    Left to itself, torch keeps those of all GPUs, and warns where there are several.
    """
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    kept: AbstractContextManager[None] = torch.random.fork_rng(devices)
    return kept


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which matrices are multiplied here: autocast's, or that of `x`."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
