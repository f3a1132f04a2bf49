"""Each epoch shows every chip once; a batch depends on the seed and its number only."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch

from stcln_geo.cube.store import open_season
from stcln_geo.data.batch import Batch
from stcln_geo.data.chips import ChipDataset, plan_chips
from stcln_geo.data.sampling import SampleOrder
from stcln_geo.data.stream import OrderedStream, TrainingStream, run_ahead
from stcln_geo.errors import InputError

CHIPS = [4, 1, 3, 2, 4, 4, 1]


@pytest.fixture
def dataset(cube: Path) -> ChipDataset:
    season = open_season(cube)
    return ChipDataset([season], plan_chips(season, chip=16), bands=season.bands)


def test_each_epoch_sees_every_chip_once_and_each_unit_in_one_group() -> None:
    order = SampleOrder(CHIPS, [10 * count for count in CHIPS], memory=140, seed=3)
    assert not order.resident

    samples = list(itertools.islice(order.samples(0), 3 * order.chips))

    every = {(unit, chip) for unit, count in enumerate(CHIPS) for chip in range(count)}
    epochs = []
    for epoch in range(3):
        part = samples[epoch * order.chips : (epoch + 1) * order.chips]
        assert {(sample.unit, sample.chip) for sample in part} == every
        assert [sample.offset for sample in part] == list(range(order.chips))
        epochs.append([(sample.unit, sample.chip) for sample in part])
        units = [unit for group in order.epoch(epoch) for unit in group.units]
        assert sorted(units) == list(range(len(CHIPS)))
        for group in order.epoch(epoch):
            assert sum(10 * CHIPS[unit] for unit in group.units) <= 70
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("memory", [60, 140, 10_000])
def test_the_order_can_be_entered_anywhere(memory: int) -> None:
    def places(start: int, count: int) -> list[tuple[int, int, int]]:
        order = SampleOrder(CHIPS, [10 * chips for chips in CHIPS], memory=memory, seed=3)
        samples = itertools.islice(order.samples(start), count)
        return [(sample.unit, sample.chip, sample.epoch) for sample in samples]

    whole = places(0, 60)

    for start in (1, 18, 19, 20, 37, 45):
        assert places(start, 60 - start) == whole[start:]


def test_a_unit_too_big_for_the_memory_is_a_group_of_its_own() -> None:
    order = SampleOrder([2, 2], [1000, 1000], memory=10, seed=0)

    assert [len(group.units) for group in order.epoch(0)] == [1, 1]


def test_no_chip_is_an_error() -> None:
    with pytest.raises(InputError, match="there is no chip"):
        SampleOrder([], [], memory=10, seed=0)


def content(batch: Batch) -> tuple[bytes, bytes, bytes]:
    return tuple(array.numpy().tobytes() for array in (batch.reflectance, batch.valid, batch.days))


@pytest.mark.parametrize("memory", [10**9, 400_000], ids=["resident", "groups"])
def test_batches_depend_on_seed_and_number_only(dataset: ChipDataset, memory: int) -> None:
    def run(threads: int, parts: list[tuple[int, int]]) -> list[tuple[bytes, bytes, bytes]]:
        stream = TrainingStream(dataset, batch_size=5, seed=7, memory=memory, threads=threads)
        batches = [content(batch) for part in parts for batch in stream.batches(*part)]
        stream.close()
        return batches

    whole = run(1, [(0, 20)])

    assert run(3, [(0, 20)]) == whole
    assert run(2, [(0, 3), (3, 9), (12, 8)]) == whole
    assert run(2, [(11, 9)]) == whole[11:]


def test_memory_bounds_what_is_held(dataset: ChipDataset) -> None:
    stream = TrainingStream(dataset, batch_size=4, seed=0, memory=400_000, threads=2)
    assert not stream.order.resident

    for _ in stream.batches(0, 25):
        held = {unit for group in stream._groups.values() for unit in group}
        assert sum(dataset.unit_bytes(unit) for unit in held) <= 400_000
    stream.close()


def test_each_chunk_is_read_once_an_epoch(
    dataset: ChipDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: Counter[int] = Counter()
    read = dataset.read

    def counting(unit: int) -> list:
        reads[unit] += 1
        return read(unit)

    monkeypatch.setattr(dataset, "read", counting)
    stream = TrainingStream(dataset, batch_size=6, seed=0, memory=10**9, threads=2)
    assert dataset.chips == 42
    list(stream.batches(0, 21))
    stream.close()

    assert set(reads.values()) == {1}


@pytest.mark.parametrize("memory", [0, 10**9], ids=["read again", "kept"])
def test_ordered_stream_gives_all_chips_in_order_each_time(
    dataset: ChipDataset, memory: int
) -> None:
    stream = OrderedStream(dataset, batch_size=9, memory=memory, threads=3)

    first, second = list(stream), list(stream)

    assert [len(batch) for batch in first] == [9, 9, 9, 9, 6]
    assert len(stream) == 5
    assert [content(batch) for batch in first] == [content(batch) for batch in second]
    chips = [chip for unit in range(len(dataset.units)) for chip in dataset.read(unit)]
    expected = torch.from_numpy(np.array(chips[10].reflectance))
    assert torch.equal(first[1].reflectance[1, : len(expected)], expected)


def test_run_ahead_raises_what_its_source_raises_and_stops_when_closed() -> None:
    closed = threading.Event()

    def source(*, fail: bool) -> Generator[int]:
        try:
            yield 1
            if fail:
                raise ValueError("broken source")
            yield from range(10**9)
        finally:
            closed.set()

    ahead = run_ahead(source(fail=True), depth=2)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="broken source"):
        next(ahead)

    closed.clear()
    ahead = run_ahead(source(fail=False), depth=2)
    assert next(ahead) == 1
    ahead.close()
    assert closed.is_set()
    assert not any(thread.name == "run-ahead" for thread in threading.enumerate())
