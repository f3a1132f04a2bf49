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
from ..errors import BrokenDeviceError, CheckpointError, InputError
from ..model.checkpoint import load_model, read_metadata
from ..model.device import (
    Device,
    Precision,
    autocast_for,
    choose_device,
    choose_precision,
)
from ..model.stcln import Stcln, positions_for
from .outputs import check_finite, decide
from .smooth import Smoothing, smooth

__all__ = ["Answer", "Network", "Recipe", "Sample", "load_network"]

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


class Network:
    """A checkpoint's network on a device, ready to label windows."""

    def __init__(self, module: Stcln, *, device: str, precision: str) -> None:
        self.module = module.to(device).eval()
        self.device = device
        self.precision = precision
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
            yield from pool.map(lambda sample: self._run([sample], recipe)[0], samples)

    def _label_in_batches(
        self, samples: Sequence[Sample], recipe: Recipe, batch_size: int | None
    ) -> Generator[Answer]:
        # Invalid dates change nothing, so sequences are filled up to a few common lengths.
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            by_length[self._padded(len(sample.dates))].append(index)
        found: dict[int, Answer] = {}
        for length in sorted(by_length):
            waiting = by_length[length]
            while waiting:
                size = self._batch if batch_size is None else min(batch_size, self._batch)
                batch, rest = waiting[:size], waiting[size:]
                try:
                    answers = self._run([samples[index] for index in batch], recipe)
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
                except RuntimeError as error:
                    if is_broken_device(error):
                        raise BrokenDeviceError(f"{self.device}: {error}") from error
                    raise
                found.update(zip(batch, answers, strict=True))
                waiting = rest
        yield from (found[index] for index in range(len(samples)))

    def _padded(self, dates: int) -> int:
        """Return the length to which a series is filled up with invalid dates."""
        # The published network takes them for observations; a batch of one needs no company.
        if self.device == "cpu" or self.module.config.mode == "reference":
            return dates
        return -(-dates // _PAD_DATES) * _PAD_DATES

    def _run(self, samples: Sequence[Sample], recipe: Recipe) -> list[Answer]:
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
        seen = torch.from_numpy(valid).to(device)
        with torch.inference_mode(), autocast_for(self.precision, device.type):
            embedded = self.module.embed(
                torch.from_numpy(images).to(device),
                positions_for(self.module.config, torch.from_numpy(days)).to(device),
                seen,
            )
            logits = self.module.classify(embedded, (height, width)).float()
        with torch.inference_mode():
            check_finite(logits)
            probability = torch.softmax(logits, dim=1)
            if recipe.smoothing is not None:
                usable = seen.sum(dim=1) >= recipe.min_clear
                probability = smooth(probability, usable, recipe.smoothing)
            decided = decide(probability, recipe.layers)
        layers = {name: value.cpu().numpy() for name, value in decided.items()}
        merged = probability.cpu().numpy() if recipe.probability else None
        features = _features(embedded, (height, width)) if recipe.embedding else None
        return [
            Answer(
                layers={name: value[place] for name, value in layers.items()},
                probability=None if merged is None else merged[place],
                embedding=None if features is None else features[place],
            )
            for place in range(len(samples))
        ]


def is_broken_device(error: RuntimeError) -> bool:
    """Return True for errors of a GPU after which its process cannot use it any more.

    Too little memory is no such error: what was allocated is freed, and work goes on.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in text:
        return False
    return isinstance(error, torch.AcceleratorError) or any(words in text for words in _BROKEN)


def _features(embedded: torch.Tensor, shape_yx: tuple[int, int]) -> np.ndarray:
    """Return (B, H*W, D) features as (B, D, H, W) float16; too large ones at its limit."""
    limit = torch.finfo(torch.float16).max
    half = embedded.float().clamp(-limit, limit).half()
    turned: np.ndarray = half.transpose(1, 2).reshape(len(half), -1, *shape_yx).cpu().numpy()
    return turned


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
