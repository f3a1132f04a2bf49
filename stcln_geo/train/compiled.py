"""The network of a training run, compiled by `torch.compile`.

Each shape of a batch is compiled by itself, which takes minutes. So series are filled up to one of
a few lengths, by dates on which nothing is valid; the network leaves those out. Only training steps
run compiled: validations are short, and have shapes of their own.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError, TaskError
from ..model.fused import kernels
from .memory import is_out_of_memory

__all__ = ["DATE_BUCKETS", "CompiledNetwork", "check_compiler"]

DATE_BUCKETS = (4, 8, 12, 16, 24, 30, 36, 48, 61, 80, 100, 128)
"""Lengths that series are filled up to; longer ones keep their own."""


class CompiledNetwork:
    """Calls a network as compiled for the shape at hand.

    Weights and statistics stay those of the network itself.

    Parameters
    ----------
    fills_up
        Whether invalid dates leave results as they are, as in `geo` mode.
    """

    def __init__(self, network: nn.Module, *, fills_up: bool) -> None:
        self._fills_up = fills_up

        def call(*inputs: Tensor) -> Tensor:
            made: Tensor = network(*inputs)
            return made

        # A function, not a module of torch: nothing is registered twice.
        self._call: Callable[..., Tensor] = torch.compile(call, dynamic=False)

    def __call__(self, images: Tensor, days: Tensor, valid: Tensor, *mask: Tensor) -> Tensor:
        """Run the network; parameters and result as of its ``forward``.

        Raises
        ------
        TaskError
            If torch cannot compile the network.
        """
        dates = images.shape[1]
        inputs = (images, days, valid, *mask)
        if self._fills_up:
            inputs = tuple(_fill_up(one, _bucket_of(dates)) for one in inputs)
        try:
            made = self._call(*inputs)
        except RuntimeError as error:
            from torch._dynamo.exc import TorchDynamoException  # takes a second to import

            if not isinstance(error, TorchDynamoException) or is_out_of_memory(error):
                raise
            raise TaskError(
                f"Cannot compile the network for a batch of {tuple(images.shape)} (chips, dates, "
                f"bands, rows, columns): {error}. Training runs without compiling too: set "
                "compile=false, and begin anew with --overwrite."
            ) from error
        # Reconstructions have dates, logits have none.
        return made[:, :dates] if made.ndim == 5 else made


def check_compiler(device: str) -> None:
    """Look for what `torch.compile` needs.

    Raises
    ------
    InputError
        If there is no compiler for this device.
    """
    if device == "cuda":
        if kernels() is None:
            raise InputError(
                "Cannot compile the network for a GPU (compile=true): Triton is not installed. "
                "Install the CUDA build of torch, which brings it, or set compile=false."
            )
        return
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        raise InputError(
            f"Cannot compile the network (compile=true): there is no C++ compiler here (looked "
            f"for {' and '.join(names)}). Install one, name it in CXX, or set compile=false."
        )


def _bucket_of(dates: int) -> int:
    """Return the length that series of so many dates are filled up to."""
    return next((length for length in DATE_BUCKETS if length >= dates), dates)


def _fill_up(series: Tensor, dates: int) -> Tensor:
    """Add zeros, or False, to the end of axis 1: (B, T, ...) to (B, dates, ...)."""
    return F.pad(series, [0, 0] * (series.ndim - 2) + [0, dates - series.shape[1]])
