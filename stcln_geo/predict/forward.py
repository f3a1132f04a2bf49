"""Run the network on windows: device, precision and batches.

On a CPU every window runs alone and on one thread, several windows side by side. What a
window gives then depends on nothing but the window, and the map is the same, bit for bit, for
any number of threads, workers and shards. On a GPU windows of equal length share a batch, and the
next batch is on its way before the results of one are waited for.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..cube.contract import SCALE
from ..errors import BrokenDeviceError, CheckpointError, InputError
from ..model.checkpoint import load_model, read_metadata
from ..model.config import StclnConfig
from ..model.device import (
    Device,
    Precision,
    autocast_for,
    choose_device,
    choose_precision,
)
from ..model.ensemble import Classifier
from ..model.space import AFFINITY_BYTES
from ..model.stcln import SLICE_BYTES, positions_for, probabilities
from .outputs import check_finite, decide
from .smooth import Smoothing, smooth

__all__ = ["Answer", "Launched", "Network", "Recipe", "Sample", "load_network", "window_bytes"]

_PAD_DATES = 8
_CUDA_BATCH = 64

_BROKEN = ("CUDA error", "CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_INTERNAL_ERROR")
"""Words of the errors that the libraries of a GPU raise as plain RuntimeError."""


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
class Recipe:
    """What to make of a window."""

    layers: tuple[str, ...] = ()
    """Names of layers to decide on the device; see ``outputs.decide``."""
    probability: bool = False
    """True: give the probabilities themselves, to be merged."""
    embedding: bool = False
    """True: give what the classifier decides from."""
    smoothing: Smoothing | None = None
    min_clear: int = 1
    """Pixels with fewer clear dates have no say in smoothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the network says of one window."""

    layers: dict[str, np.ndarray]
    """(H, W) uint8 by name; (K, H, W) where a layer has a band for each class."""
    probability: np.ndarray | None
    """(K, H, W) float32."""
    embedding: np.ndarray | None
    """(D, H, W) float16."""
    seconds: float
    """That the device (on a CPU: a thread) spent on it; its share of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A batch on its way through a device; nothing has been waited for yet."""

    count: int
    """Samples in it, B."""
    finite: Tensor
    """() bool."""
    layers: dict[str, Tensor]
    probability: Tensor | None
    embedding: Tensor | None
    """(B, D, H, W) float16."""
    clock: _Clock

    def answers(self) -> list[Answer]:
        """Wait for the device; return an answer for each sample."""
        check_finite(self.finite)
        layers = {name: value.cpu().numpy() for name, value in self.layers.items()}
        merged = None if self.probability is None else self.probability.cpu().numpy()
        features = None if self.embedding is None else self.embedding.cpu().numpy()
        seconds = self.clock.seconds() / self.count
        return [
            Answer(
                layers={name: value[place] for name, value in layers.items()},
                probability=None if merged is None else merged[place],
                embedding=None if features is None else features[place],
                seconds=seconds,
            )
            for place in range(self.count)
        ]


class _Clock:
    """Time of a device between its first operation and ``stop``; on a GPU by its own events."""

    def __init__(self, device: torch.device) -> None:
        self._events = None
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()
        self._started = self._stopped = time.perf_counter()

    def stop(self) -> None:
        if self._events is not None:
            self._events[1].record()
        self._stopped = time.perf_counter()

    def seconds(self) -> float:
        """Return the time; the device must have come to the end."""
        if self._events is None:
            return self._stopped - self._started
        first, last = self._events
        last.synchronize()
        return float(first.elapsed_time(last)) / 1000.0


class Network:
    """A checkpoint's network on a device, ready to label windows.

    Parameters
    ----------
    temperature
        What logits are divided by before a probability is made of them; None for nothing.
    """

    def __init__(
        self, module: Classifier, *, device: str, precision: str, temperature: float | None = None
    ) -> None:
        self.module = module.to(device).eval()
        self.device = device
        self.precision = precision
        self.temperature = temperature
        self._batch = _CUDA_BATCH

    def label(
        self,
        samples: Sequence[Sample],
        recipe: Recipe,
        *,
        threads: int,
        batch_size: int | None = None,
    ) -> Generator[Answer]:
        """Yield what the network says of samples, in their order.

        Parameters
        ----------
        threads
            Windows that run side by side on a CPU.
        batch_size
            Windows per batch on a GPU; None = as many as fit, at most 64.
        """
        if self.device == "cpu":
            yield from self._label_on_cpu(samples, recipe, threads)
        else:
            yield from self._label_in_batches(samples, recipe, batch_size)

    def _label_on_cpu(
        self, samples: Sequence[Sample], recipe: Recipe, threads: int
    ) -> Generator[Answer]:
        with (
            _one_thread_each(),
            ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool,
        ):
            yield from pool.map(lambda one: self._launch([one], recipe).answers()[0], samples)

    def _label_in_batches(
        self, samples: Sequence[Sample], recipe: Recipe, batch_size: int | None
    ) -> Generator[Answer]:
        # Invalid dates change nothing, so sequences are filled up to a few common lengths.
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            by_length[self._padded(len(sample.dates))].append(index)
        found: dict[int, Answer] = {}
        told = 0
        pending: tuple[list[int], Launched] | None = None
        for length in sorted(by_length):
            waiting = by_length[length]
            while waiting:
                size = self._batch if batch_size is None else min(batch_size, self._batch)
                batch, rest = waiting[:size], waiting[size:]
                launched = None
                try:
                    with _broken_devices(self.device):
                        launched = self._launch([samples[index] for index in batch], recipe)
                except torch.OutOfMemoryError as error:
                    if len(batch) == 1:
                        raise InputError(
                            f"Cannot label a window of {samples[batch[0]].valid.shape} (dates, "
                            f"rows, columns): {self.device} has too little memory even for one. "
                            "Choose --device cpu, or a smaller --window."
                        ) from error
                    torch.cuda.empty_cache()
                    self._batch = max(len(batch) // 2, 1)
                if launched is None:
                    continue
                if pending is not None:
                    found.update(self._answers(*pending))
                pending, waiting = (batch, launched), rest
                # Told while the device is busy with the batch that was just launched.
                while told in found:
                    yield found.pop(told)
                    told += 1
        if pending is not None:
            found.update(self._answers(*pending))
        yield from (found[index] for index in range(told, len(samples)))

    def _answers(self, batch: Sequence[int], launched: Launched) -> Iterator[tuple[int, Answer]]:
        with _broken_devices(self.device):
            answers = launched.answers()
        return zip(batch, answers, strict=True)

    def _padded(self, dates: int) -> int:
        """Return the length to which a series is filled up with invalid dates."""
        # The published network takes them for observations; a batch of one needs no company.
        if self.device == "cpu" or self.module.config.mode == "reference":
            return dates
        return -(-dates // _PAD_DATES) * _PAD_DATES

    def _launch(self, samples: Sequence[Sample], recipe: Recipe) -> Launched:
        """Start one forward pass on samples of equal height, width and padded length."""
        return self.start(*self._gather(samples), recipe)

    def start(self, numbers: Tensor, days: Tensor, valid: Tensor, recipe: Recipe) -> Launched:
        """Start one forward pass; a GPU is not waited for.

        Parameters
        ----------
        numbers : (B, T, C, H, W) int16. Reflectance / 0.0001; anything where invalid.
        days : (B, T) int64. Days since the season's first day.
        valid : (B, T, H, W) bool. True where usable.
        """
        shape_yx = (int(valid.shape[2]), int(valid.shape[3]))
        device = torch.device(self.device)
        clock = _Clock(device)
        with torch.inference_mode():
            seen = valid.to(device, non_blocking=True)
            # Digital numbers are half as much to copy as floats.
            images = numbers.to(device, non_blocking=True).float().mul_(SCALE)
            images = torch.where(seen[:, :, None], images, 0.0)
            positions = positions_for(self.module.config, days).to(device, non_blocking=True)
            with autocast_for(self.precision, device.type):
                embedded = self.module.embed(images, positions, seen)
                logits = self.module.classify(embedded, shape_yx).float()
            probability, ranking = probabilities(logits, self.temperature), None
            by_itself = recipe.smoothing is None and "classes" in recipe.layers
            if self.temperature is not None and by_itself:
                # So that rounding never changes a class.
                ranking = probabilities(logits)
            if recipe.smoothing is not None:
                usable = seen.sum(dim=1) >= recipe.min_clear
                probability = smooth(probability, usable, recipe.smoothing)
            launched = Launched(
                count=len(numbers),
                finite=torch.isfinite(logits).all(),
                layers=decide(probability, recipe.layers, ranking=ranking),
                probability=probability if recipe.probability else None,
                embedding=_features(embedded, shape_yx) if recipe.embedding else None,
                clock=clock,
            )
        clock.stop()
        return launched

    def _gather(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the dates that samples show, filled up to the padded length with invalid ones.

        Returns
        -------
        tuple
            (B, T, C, H, W) int16 digital numbers, (B, T) int64 days, (B, T, H, W) bool valid; in
            memory from which a GPU copies while others work.
        """
        dates = self._padded(len(samples[0].dates))
        _, bands, height, width = samples[0].reflectance.shape
        pinned = self.device != "cpu"
        shape = (len(samples), dates, bands, height, width)
        numbers = torch.zeros(shape, dtype=torch.int16, pin_memory=pinned)
        valid = torch.zeros((*shape[:2], height, width), dtype=torch.bool, pin_memory=pinned)
        days = torch.zeros(shape[:2], dtype=torch.int64, pin_memory=pinned)
        for place, sample in enumerate(samples):
            count = len(sample.dates)
            numbers.numpy()[place, :count] = sample.reflectance[sample.dates]
            valid.numpy()[place, :count] = sample.valid[sample.dates]
            days.numpy()[place, :count] = sample.days[sample.dates]
        return numbers, days, valid


def window_bytes(config: StclnConfig, side: int, dates: int) -> int:
    """Return about what a network takes at most while it runs on one window (bytes).

    Parameters
    ----------
    side
        Of the window (pixels).
    dates
        Of the season.
    """
    pixels = side * side
    block = min(SLICE_BYTES, 4 * pixels * dates * (config.feedforward + 4 * config.dim))
    features = 4 * pixels * dates * config.dim
    affinities = min(AFFINITY_BYTES, 4 * pixels * pixels)
    # Measured for tiny, base and large, 4 to 60 dates, 16 to 64 px: 50 to 97 % of this.
    return 8 * block // 5 + 4 * features + 6 * affinities


def is_broken_device(error: RuntimeError) -> bool:
    """Return True for errors of a GPU after which its process cannot use it any more.

    Too little memory is no such error: what was allocated is freed, and work goes on.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return False
    return isinstance(error, torch.AcceleratorError) or any(words in text for words in _BROKEN)


@contextmanager
def _broken_devices(device: str) -> Iterator[None]:
    """Turn errors after which a device is of no use into BrokenDeviceError."""
    try:
        yield
    except RuntimeError as error:
        if is_broken_device(error):
            raise BrokenDeviceError(f"{device}: {error}") from error
        raise


def _features(embedded: Tensor, shape_yx: tuple[int, int]) -> Tensor:
    """Return (B, H*W, D) features as (B, D, H, W) float16; too large ones at its limit."""
    limit = torch.finfo(torch.float16).max
    half = embedded.float().clamp(-limit, limit).half()
    return half.transpose(1, 2).reshape(len(half), -1, *shape_yx)


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
    key = (sha256, where, precision)
    with _LOCK:
        if key not in _LOADED:
            info = read_metadata(checkpoint)
            if info.sha256 != sha256:
                raise CheckpointError(
                    f"Cannot use {checkpoint}: it is not the file that was planned with (sha256 "
                    f"{sha256[:12]}...). Plan again, with the checkpoint you mean."
                )
            while len(_LOADED) >= _KEPT:
                _LOADED.popitem(last=False)
            module = load_model(checkpoint)
            if not isinstance(module, Classifier):
                raise CheckpointError(
                    f"Cannot label with {checkpoint}: it knows no classes. Fine-tune it first."
                )
            _LOADED[key] = Network(
                module,
                device=where,
                precision=choose_precision(precision, where, width=info.config.dim),
                temperature=info.temperature,
            )
        return _LOADED[key]


_LOCK = threading.Lock()
_LOADED: OrderedDict[tuple[str, str, str], Network] = OrderedDict()
_KEPT = 2


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
