"""Streams of batches: reading, augmenting and padding run ahead of the network in threads."""

from __future__ import annotations

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ..errors import ChunkError, InputError
from .batch import Augmentation, Batch, augment, collate
from .chips import Chip, ChipDataset
from .process import HomeProcess
from .sampling import Group, SampleOrder, check_rank

__all__ = ["Augmentation", "OrderedStream", "ProblemLog", "TrainingStream", "run_ahead"]

T = TypeVar("T")

_BATCHES_AHEAD = 2


class ProblemLog:
    """Damaged chunks that were met, each once; too many of them are an error.

    Only chunks of chips that entered a batch count, so that the log is a function of the steps
    made, whatever was read ahead.

    Parameters
    ----------
    known
        What an earlier process met.
    most
        Damaged chunks that are still put up with.
    note
        Is told of each new one.
    """

    def __init__(
        self,
        known: Iterable[str] = (),
        *,
        most: int | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        self.problems = list(dict.fromkeys(known))
        self._most, self._note = most, note
        self._lock = threading.Lock()

    def add(self, problem: str) -> None:
        """Remember a damaged chunk.

        Raises
        ------
        ChunkError
            If there are more than are put up with.
        """
        with self._lock:
            if problem in self.problems:
                return
            self.problems.append(problem)
            if self._note is not None:
                self._note(problem)
        if self._most is not None and len(self.problems) > self._most:
            raise ChunkError(
                f"Cannot go on: {len(self.problems)} chunks are damaged, and at most {self._most} "
                f"are left out (--max-bad-fraction). The last: {problem}"
            )


class TrainingStream:
    """Shuffled, augmented batches: batch ``step`` depends on seed, ``step`` and rank only.

    Parameters
    ----------
    batch_size
        Chips of a batch of this rank.
    memory
        Bytes for chips in memory, of this rank. A dataset that fits is read once and kept.
    threads
        Threads that read.
    weights : (U,) float, optional
        How often an epoch shows each unit on average; 1 by default.
    problems
        Notes damaged chunks whose chips are blank.
    rank, world_size
        Which of how many processes this is. Ranks see disjoint chips, together the epoch; all
        make the same number of steps (`sampling` says how).
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
        weights: np.ndarray | None = None,
        problems: ProblemLog | None = None,
        rank: int = 0,
        world_size: int = 1,
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
            dataset.bytes_per_unit,
            memory=memory,
            seed=seed,
            rank=rank,
            world_size=world_size,
            weights=weights,
        )
        self.waited = 0.0
        """Seconds that batches were waited for, in all."""
        self._seed = seed
        self._augmentation = augmentation or Augmentation()
        self._problems = problems or ProblemLog()
        self._home = HomeProcess()
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="chips")
        self._groups: dict[tuple[int, int], dict[int, Future[list[Chip]]]] = {}
        self._current: tuple[int, int] | None = None

    def batches(self, start: int, count: int) -> Generator[Batch]:
        """Yield batches ``start`` to ``start + count - 1``; nothing is read before the first."""
        self._home.check()
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
                if chip.problem is not None:
                    self._problems.add(chip.problem)
                generator = np.random.default_rng([self._seed, sample.epoch, sample.offset])
                chips.append(augment(chip, generator, self._augmentation))
                places.append((sample.epoch << 40) + sample.offset)
            yield collate(chips, samples=places)

    def _chips(self, group: Group) -> dict[int, Future[list[Chip]]]:
        """Return the chips of a group, being read; begin the next group; forget older ones."""
        if self.order.resident:
            # Everything fits: what an earlier epoch has read is kept.
            held = self._groups.setdefault((0, 0), {})
            if self._current != (group.epoch, group.index):
                self._current = (group.epoch, group.index)
                held.update(self._begin([unit for unit in group.units if unit not in held]))
            return held
        key = (group.epoch, group.index)
        if key != self._current:
            after = self.order.after(group)
            members = {key: group, (after.epoch, after.index): after}
            old = self._groups
            self._groups = {
                name: old.pop(name) if name in old else self._begin(member.units)
                for name, member in members.items()
            }
            for future in (future for units in old.values() for future in units.values()):
                future.cancel()
            self._current = key
        return self._groups[key]

    def _begin(self, units: Iterable[int]) -> dict[int, Future[list[Chip]]]:
        return {unit: self._executor.submit(self.dataset.read, unit) for unit in units}


class OrderedStream:
    """All chips of a dataset in their planned order, unchanged; may be walked again and again.

    Parameters
    ----------
    memory
        Chips are kept after the first walk if they surely fit in so many bytes.
    problems
        Notes damaged chunks whose chips are blank.
    rank, world_size
        Which of how many processes this is. Each walks a run of neighbouring chips; together
        they see each chip once. All yield as many batches: where one has no chip left for the
        last, it yields a blank chip, without a valid pixel or a target.
    """

    def __init__(
        self,
        dataset: ChipDataset,
        *,
        batch_size: int,
        memory: int,
        threads: int = 2,
        problems: ProblemLog | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        check_rank(rank, world_size)
        self.dataset = dataset
        self.batch_size = batch_size
        self._threads = threads
        self._problems = problems or ProblemLog()
        self._home = HomeProcess()
        starts = np.concatenate([[0], np.cumsum(dataset.chips_per_unit)])
        total = int(starts[-1])
        begin, end = (total * place // world_size for place in (rank, rank + 1))
        self._first = begin
        self._batches = math.ceil(math.ceil(total / world_size) / batch_size)
        self._parts = [
            (int(unit), range(max(begin - start, 0), min(end - start, count)))
            for unit, (start, count) in enumerate(
                zip(starts[:-1].tolist(), dataset.chips_per_unit.tolist(), strict=True)
            )
            if start < end and start + count > begin
        ]
        """Units that hold chips of this rank, and which of their chips these are."""
        sizes = dataset.bytes_per_unit
        self._keep = sum(int(sizes[unit]) for unit, _ in self._parts) <= memory
        self._kept: list[Chip] | None = None

    def __len__(self) -> int:
        """Return the number of batches: the same on each rank."""
        return self._batches

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; the last may hold fewer chips."""
        self._home.check()
        return run_ahead(self._make(), depth=_BATCHES_AHEAD)

    def _make(self) -> Generator[Batch]:
        chips = self._chips()
        for number in range(self._batches):
            batch = list(itertools.islice(chips, self.batch_size))
            for problem in (chip.problem for chip in batch if chip.problem is not None):
                self._problems.add(problem)
            first = self._first + number * self.batch_size
            if not batch:
                yield collate([self.dataset.blank_chip()])
                continue
            yield collate(batch, samples=range(first, first + len(batch)))
        # Exhausted, so that what is to be kept is kept.
        next(chips, None)

    def _chips(self) -> Iterator[Chip]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Chip] = []
        with ThreadPoolExecutor(self._threads, thread_name_prefix="windows") as executor:
            waiting: list[tuple[range, Future[list[Chip]]]] = []
            parts = iter(self._parts)
            try:
                while True:
                    # As many reads under way as threads can use, and no more in memory.
                    for unit, own in itertools.islice(parts, 2 * self._threads - len(waiting)):
                        waiting.append((own, executor.submit(self.dataset.read, unit)))
                    if not waiting:
                        break
                    own, future = waiting.pop(0)
                    for chip in future.result()[own.start : own.stop]:
                        if self._keep:
                            kept.append(chip)
                        yield chip
            finally:
                for _, future in waiting:
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
