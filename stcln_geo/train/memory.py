"""How many chips fit: trials on a GPU, arithmetic on a CPU; and what a process has taken so far."""

from __future__ import annotations

import re
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import InputError, TaskError
from ..heap import keep_memory
from .config import TrainConfig

__all__ = [
    "blank_batch", "find_batch_size", "is_out_of_memory", "memory_kept", "peak_memory",
    "saved_bytes", "too_big",
]  # fmt: skip

_MOST = 256
_SHARE = 0.8
"""Of the free memory; the rest is for the optimiser, kernels and fragments."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True where memory of a GPU, or of this machine, ran out."""
    # torch has a class for GPUs only.
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def too_big(recipe: TrainConfig, chips: int, *, ranks: int) -> TaskError:
    """Return the error for batches that do not fit, and that cannot be cut here."""
    if chips == 1:
        return TaskError(
            "Cannot make a step: one chip alone takes more memory than there is. Use smaller chips "
            "(--chip), fewer dates (--max-dates), a smaller network (--preset), or set "
            "recompute=true."
        )
    half = max(recipe.rank_batch // 2, 1)
    return TaskError(
        f"Cannot make a step: {chips} chips at a time take more memory than there is, and {ranks} "
        f"ranks cannot cut a step each by itself. Begin anew with --batch-size {half} --set "
        f"accumulate={2 * recipe.accumulate}, which is the same step, or with --set "
        "recompute=true."
    )


def find_batch_size(try_batch: Callable[[int], int], *, device: str, chips: int) -> int:
    """Return the largest power of two of chips that goes through the network together.

    At most 256, and an eighth of the training chips, so that a step is no whole epoch.

    Parameters
    ----------
    try_batch
        Runs so many chips forward and backward; returns the bytes that were kept for the
        gradients.
    chips
        Training chips.

    Raises
    ------
    InputError
        If not even one chip fits.
    """
    most = 1
    while 2 * most <= min(_MOST, chips // 8):
        most *= 2
    if device == "cuda":
        size = _largest_on_gpu(try_batch, most)
    else:
        # What is kept grows with the chips; as much again is at work.
        one, size = 2 * try_batch(1), most
        while size * one > _SHARE * _free_memory():
            size //= 2
    if size == 0:
        raise InputError(
            "Cannot choose a batch size: one chip alone takes more memory than is free. Use "
            "smaller chips (--chip), fewer dates (--max-dates) or --preset tiny."
        )
    return size


def peak_memory(device: str) -> int:
    """Return the most that this process has held so far (bytes), on a GPU of the device."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if status.exists() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) * 1024
    # This one begins with the peak of the process that started ours. Kilobytes, bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_kept(device: str) -> AbstractContextManager[None]:
    """Return the context in which steps use the memory of earlier ones; on a GPU torch sees to it.

    Measured by benchmarks/train_memory.py.
    """
    return nullcontext() if device == "cuda" else keep_memory()


def saved_bytes(network: nn.Module, work: Callable[[], Tensor]) -> int:
    """Return the bytes that a computation keeps for its gradients, without the weights."""
    weights = {tensor.data_ptr() for tensor in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if tensor.data_ptr() not in weights:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work().backward()
    return sum(kept.values())


def blank_batch(*, chips: int, dates: int, bands: int, side: int, labelled: bool) -> Batch:
    """Return chips that are clear on all dates: the most that a step can take."""
    shape = (chips, dates, bands, side, side)
    return Batch(
        reflectance=torch.randint(0, 8000, shape, dtype=torch.int16),
        valid=torch.ones(chips, dates, side, side, dtype=torch.bool),
        days=torch.arange(dates, dtype=torch.float32).expand(chips, dates).contiguous(),
        target=torch.zeros(chips, side, side, dtype=torch.int64) if labelled else None,
        samples=tuple(range(chips)),
    )


def _largest_on_gpu(try_batch: Callable[[int], int], most: int) -> int:
    size = 0
    while size < most:
        try:
            try_batch(2 * size or 1)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            torch.cuda.empty_cache()
        if torch.cuda.max_memory_allocated() > _SHARE * torch.cuda.mem_get_info()[1]:
            break
        size = 2 * size or 1
    return size


def _free_memory() -> int:
    """Return the bytes that this process may still take: of the machine, or of its container."""
    free = [_meminfo("MemAvailable")]
    limit, used = (
        _number(Path("/sys/fs/cgroup") / name) for name in ("memory.max", "memory.current")
    )
    if limit is not None and used is not None:
        free.append(limit - used)
    return max(min(free), 0)


def _meminfo(name: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return int(value.split()[0]) * 1024
    except OSError:
        pass
    # Not Linux: a modest guess.
    return 8 * 2**30


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
