"""Streams of batches: reading, augmenting and padding run ahead of the network in threads."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ..errors import InputError
from .batch import Batch, augment, collate
from .chips import Chip, ChipDataset
from .sampling import Group, SampleOrder

__all__ = ["Augmentation", "OrderedStream", "TrainingStream", "run_ahead"]

T = TypeVar("T")

_BATCHES_AHEAD = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmentation:
    """Random changes of training chips."""

    max_dates: int | None = None
    dihedral: bool = True


class TrainingStream:
    """Shuffled, augmented batches: batch number ``step`` depends on the seed and ``step`` only.

    Parameters
    ----------
    memory
        Bytes for chips in memory. A dataset that fits is read once and kept.
    threads
        Threads that read.
    """

    def __init__(
        self,
        dataset: ChipDataset,
        *,
        batch_size: int,
        seed: int,
        memory: int,
        threads: int = 2,
        augmentation: Augmentation | None = None,
    ) -> None:
        if batch_size < 1 or threads < 1:
            raise InputError(
                f"Cannot stream batches of {batch_size} chips with {threads} threads: both must "
                "be 1 or more. Use for example --batch-size 8 --workers 2."
            )
        self.dataset = dataset
        self.batch_size = batch_size
        self.order = SampleOrder(
            dataset.chips_per_unit,
            [dataset.unit_bytes(unit) for unit in range(len(dataset.units))],
            memory=memory,
            seed=seed,
        )
        self.waited = 0.0
        """Seconds that batches were waited for, in all."""
        self._seed = seed
        self._augmentation = augmentation or Augmentation()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="chips")
        self._groups: dict[tuple[int, int], dict[int, Future[list[Chip]]]] = {}
        self._current: tuple[int, int] | None = None

    def batches(self, start: int, count: int) -> Generator[Batch]:
        """Yield batches ``start`` to ``start + count - 1``; nothing is read before the first."""
        source = run_ahead(self._make(start, count), depth=_BATCHES_AHEAD)
        try:
            while True:
                begun = time.perf_counter()
                batch = next(source, None)
                self.waited += time.perf_counter() - begun
                if batch is None:
                    return
                yield batch
        finally:
            source.close()

    def close(self) -> None:
        """Stop reading and free the chips."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._groups = {}

    def _make(self, start: int, count: int) -> Generator[Batch]:
        samples = self.order.samples(start * self.batch_size)
        for _ in range(count):
            chips, places = [], []
            for _ in range(self.batch_size):
                sample = next(samples)
                chip = self._chips(sample.group)[sample.unit].result()[sample.chip]
                generator = np.random.default_rng([self._seed, sample.epoch, sample.offset])
                chips.append(
                    augment(
                        chip,
                        generator,
                        max_dates=self._augmentation.max_dates,
                        dihedral=self._augmentation.dihedral,
                    )
                )
                places.append(sample.epoch * self.order.chips + sample.offset)
            yield collate(chips, samples=places)

    def _chips(self, group: Group) -> dict[int, Future[list[Chip]]]:
        """Return the chips of a group, being read; begin the next group; forget older ones."""
        if self.order.resident:
            if not self._groups:
                self._groups = {(0, 0): self._begin(group)}
            return self._groups[0, 0]
        key = (group.epoch, group.index)
        if key != self._current:
            after = self.order.after(group)
            members = {key: group, (after.epoch, after.index): after}
            self._groups = {
                name: self._groups.get(name) or self._begin(member)
                for name, member in members.items()
            }
            self._current = key
        return self._groups[key]

    def _begin(self, group: Group) -> dict[int, Future[list[Chip]]]:
        return {unit: self._executor.submit(self.dataset.read, unit) for unit in group.units}


class OrderedStream:
    """All chips of a dataset in their planned order, unchanged; may be walked again and again.

    Parameters
    ----------
    memory
        Chips are kept after the first walk if they surely fit in so many bytes.
    """

    def __init__(
        self, dataset: ChipDataset, *, batch_size: int, memory: int, threads: int = 2
    ) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self._threads = threads
        total = sum(dataset.unit_bytes(unit) for unit in range(len(dataset.units)))
        self._keep = total <= memory
        self._kept: list[Chip] | None = None

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.dataset.chips // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the last may hold fewer chips."""
        return run_ahead(self._make(), depth=_BATCHES_AHEAD)

    def _make(self) -> Generator[Batch]:
        pending: list[Chip] = []
        done = 0
        for chip in self._chips():
            pending.append(chip)
            if len(pending) == self.batch_size:
                yield collate(pending, samples=range(done, done + len(pending)))
                done += len(pending)
                pending = []
        if pending:
            yield collate(pending, samples=range(done, done + len(pending)))

    def _chips(self) -> Iterator[Chip]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Chip] = []
        with ThreadPoolExecutor(self._threads, thread_name_prefix="windows") as executor:
            waiting: list[Future[list[Chip]]] = []
            units = iter(range(len(self.dataset.units)))
            try:
                while True:
                    # As many reads under way as threads can use, and no more in memory.
                    while len(waiting) < 2 * self._threads:
                        unit = next(units, None)
                        if unit is None:
                            break
                        waiting.append(executor.submit(self.dataset.read, unit))
                    if not waiting:
                        break
                    for chip in waiting.pop(0).result():
                        if self._keep:
                            kept.append(chip)
                        yield chip
            finally:
                for future in waiting:
                    future.cancel()
        if self._keep:
            self._kept = kept


def run_ahead(source: Generator[T], *, depth: int) -> Generator[T]:
    """Yield what a source yields, while a thread works up to ``depth`` items ahead.

    Nothing runs before the first item is asked for. The thread ends when the source is
    exhausted, fails (the error is raised here), or the caller closes this generator.
    """
    ready: queue.Queue[_Ready[T]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: _Ready[T]) -> None:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for value in source:
                put(_Ready(values=(value,)))
                if stop.is_set():
                    break
            put(_Ready())
        except BaseException as error:
            put(_Ready(error=error))
        finally:
            source.close()

    thread = threading.Thread(target=work, name="run-ahead", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if item.error is not None:
                raise item.error
            if not item.values:
                return
            yield item.values[0]
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready(Generic[T]):
    """What the thread hands over: one value, none at the end, or the error that ended it."""

    values: tuple[T, ...] = ()
    error: BaseException | None = None
