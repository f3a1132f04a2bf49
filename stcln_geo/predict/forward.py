"""Run the network on windows: device, precision and batches.

On a CPU every window runs alone and on one thread, several windows side by side. What a
window gives then depends on nothing but the window, and the map is the same, bit for bit, for
any number of threads, workers and shards. On a GPU windows of equal length share a batch.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..cube.contract import SCALE
from ..errors import CheckpointError, InputError
from ..legend import CLASS_NODATA
from ..model.checkpoint import load_model, read_metadata
from ..model.device import (
    Device,
    Precision,
    autocast_for,
    choose_device,
    choose_precision,
)
from ..model.stcln import Stcln, positions_for

__all__ = ["Labels", "Network", "Sample", "load_network"]

_PAD_DATES = 8
_CUDA_BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One window of a cube. The arrays are views of what was read; nothing is copied yet."""

    reflectance: np.ndarray
    """(T, C, H, W) int16; reflectance / 0.0001."""
    valid: np.ndarray
    """(T, H, W) bool; True where usable."""
    days: np.ndarray
    """(T,) int32: days since the season's first day."""
    dates: np.ndarray
    """(N,) int, N > 0: positions of the dates with a valid pixel, which the network sees."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Labels:
    """What the network says of one window."""

    classes: np.ndarray
    """(H, W) uint8: the most probable class, the lowest code where classes tie."""
    confidence: np.ndarray
    """(H, W) uint8: its probability in percent, halves rounded up."""


class Network:
    """A checkpoint's network on a device, ready to label windows."""

    def __init__(self, module: Stcln, *, device: str, precision: str) -> None:
        self.module = module.to(device).eval()
        self.device = device
        self.precision = precision
        self._batch = _CUDA_BATCH

    def label(
        self, samples: Sequence[Sample], *, threads: int, batch_size: int | None = None
    ) -> Generator[Labels]:
        """Yield the labels of samples, in their order.

        Parameters
        ----------
        threads
            Windows that run side by side on a CPU.
        batch_size
            Windows per batch on a GPU; None = as many as fit, at most 64.
        """
        if self.device == "cpu":
            yield from self._label_on_cpu(samples, threads)
        else:
            yield from self._label_in_batches(samples, batch_size)

    def _label_on_cpu(self, samples: Sequence[Sample], threads: int) -> Generator[Labels]:
        with (
            _one_thread_each(),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield from pool.map(lambda sample: self._run([sample])[0], samples)

    def _label_in_batches(
        self, samples: Sequence[Sample], batch_size: int | None
    ) -> Generator[Labels]:
        # Invalid dates change nothing, so sequences are filled up to a few common lengths.
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            by_length[self._padded(len(sample.dates))].append(index)
        found: dict[int, Labels] = {}
        for length in sorted(by_length):
            waiting = by_length[length]
            while waiting:
                size = self._batch if batch_size is None else min(batch_size, self._batch)
                batch, rest = waiting[:size], waiting[size:]
                try:
                    labels = self._run([samples[index] for index in batch])
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise InputError(
                            f"Cannot label a window of {samples[batch[0]].valid.shape} (dates, "
                            f"rows, columns): {self.device} has too little memory even for one. "
                            "Choose --device cpu, or a smaller --window."
                        ) from error
                    torch.cuda.empty_cache()
                    self._batch = max(len(batch) // 2, 1)
                    continue
                found.update(zip(batch, labels, strict=True))
                waiting = rest
        yield from (found[index] for index in range(len(samples)))

    def _padded(self, dates: int) -> int:
        """Return the length to which a series is filled up with invalid dates."""
        # The published network takes them for observations; a batch of one needs no company.
        if self.device == "cpu" or self.module.config.mode == "reference":
            return dates
        return -(-dates // _PAD_DATES) * _PAD_DATES

    def _run(self, samples: Sequence[Sample]) -> list[Labels]:
        """Label samples of equal height, width and padded length in one forward pass."""
        dates = self._padded(len(samples[0].dates))
        _, bands, height, width = samples[0].reflectance.shape
        images = np.zeros((len(samples), dates, bands, height, width), dtype=np.float32)
        valid = np.zeros((len(samples), dates, height, width), dtype=bool)
        days = np.zeros((len(samples), dates), dtype=np.int64)
        for place, sample in enumerate(samples):
            count = len(sample.dates)
            images[place, :count] = sample.reflectance[sample.dates]
            valid[place, :count] = sample.valid[sample.dates]
            days[place, :count] = sample.days[sample.dates]
        images *= np.float32(SCALE)
        images[~np.broadcast_to(valid[:, :, None], images.shape)] = 0.0

        device = torch.device(self.device)
        with torch.inference_mode(), autocast_for(self.precision, device.type):
            logits = self.module(
                torch.from_numpy(images).to(device),
                positions_for(self.module.config, torch.from_numpy(days)).to(device),
                torch.from_numpy(valid).to(device),
            ).float()
        with torch.inference_mode():
            return _labels_of(logits)


def load_network(
    checkpoint: str | Path, *, sha256: str, device: Device, precision: Precision
) -> Network:
    """Return the checkpoint's network; kept in this process for the next call.

    Parameters
    ----------
    sha256
        What the checkpoint must be; a file changed since the plan is refused.
    """
    where = choose_device(device)
    how = choose_precision(precision, where)
    key = (sha256, where, how)
    with _LOCK:
        if key not in _LOADED:
            if read_metadata(checkpoint).sha256 != sha256:
                raise CheckpointError(
                    f"Cannot use {checkpoint}: it is not the file that was planned with (sha256 "
                    f"{sha256[:12]}...). Plan again, with the checkpoint you mean."
                )
            while len(_LOADED) >= _KEPT:
                _LOADED.popitem(last=False)
            module = load_model(checkpoint)
            if not isinstance(module, Stcln):
                raise CheckpointError(
                    f"Cannot label with {checkpoint}: it knows no classes. Fine-tune it first."
                )
            _LOADED[key] = Network(module, device=where, precision=how)
        return _LOADED[key]


_LOCK = threading.Lock()
_LOADED: OrderedDict[tuple[str, str, str], Network] = OrderedDict()
_KEPT = 2


def _labels_of(logits: torch.Tensor) -> list[Labels]:
    """Turn logits (B, K, H, W) into classes and confidences."""
    top = logits.amax(dim=1, keepdim=True)
    codes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1)
    nothing = torch.full_like(codes, CLASS_NODATA)
    classes = torch.where(logits == top, codes, nothing).amin(dim=1)
    if bool((classes == CLASS_NODATA).any()):
        raise CheckpointError(
            "Cannot label a window: the network gave NaN for some pixels. The checkpoint's weights "
            "or its mean and std are broken; train again, or choose another checkpoint."
        )
    probability = torch.softmax(logits, dim=1).amax(dim=1)
    percent = torch.floor(probability * 100.0 + 0.5).clamp(0, 100)
    class_codes = classes.to(torch.uint8).cpu().numpy()
    percents = percent.to(torch.uint8).cpu().numpy()
    return [
        Labels(classes=one, confidence=other)
        for one, other in zip(class_codes, percents, strict=True)
    ]


class _ThreadCount:
    """How many callers want torch to use one thread, and what it used before them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users = 0
        self.before = 1


_COUNT = _ThreadCount()


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch use one thread per operation; put the setting back after the last caller."""
    with _COUNT.lock:
        if _COUNT.users == 0:
            _COUNT.before = torch.get_num_threads()
        _COUNT.users += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _COUNT.lock:
            _COUNT.users -= 1
            if _COUNT.users == 0:
                torch.set_num_threads(_COUNT.before)
