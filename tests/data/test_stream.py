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
from stcln_geo.data.stream import Augmentation, OrderedStream, TrainingStream, run_ahead
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
        held = [[10 * CHIPS[unit] for unit in group.units] for group in order.epoch(epoch)]
        assert all(sum(group) <= 70 for group in held)
        # The unit that the next group begins with would not have found room.
        assert all(sum(one) + max(other) > 70 for one, other in itertools.pairwise(held))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("memory", [60, 140, 10_000])
def test_the_order_can_be_entered_anywhere(memory: int) -> None:
    def places(start: int, count: int) -> list[tuple[int, int, int]]:
        order = SampleOrder(CHIPS, [10 * chips for chips in CHIPS], memory=memory, seed=3)
        samples = itertools.islice(order.samples(start), count)
        return [(sample.unit, sample.chip, sample.epoch) for sample in samples]

    whole = places(0, 60)

    for start in range(60):
        assert places(start, 60 - start) == whole[start:]


@pytest.mark.parametrize("world", [1, 2])
def test_what_fits_in_memory_is_one_group_and_a_byte_more_is_not(world: int) -> None:
    sizes = [10 * count for count in CHIPS]
    for memory, one in ((sum(sizes), True), (sum(sizes) - 1, False)):
        orders = [
            SampleOrder(CHIPS, sizes, memory=memory, seed=3, rank=rank, world_size=world)
            for rank in range(world)
        ]
        assert all(order.resident == one for order in orders)
        groups = [order.epoch(0) for order in orders]
        assert all(len(own) == 1 for own in groups) == one
        held = [sum(sizes[unit] for unit in group.units) for own in groups for group in own]
        assert one or max(held) <= memory / 2


def test_a_unit_too_big_for_the_memory_is_a_group_of_its_own() -> None:
    order = SampleOrder([2, 2], [1000, 1000], memory=10, seed=0)

    assert [len(group.units) for group in order.epoch(0)] == [1, 1]


@pytest.mark.parametrize("memory", [10, 140, 10_000])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 25])
def test_ranks_partition_every_epoch_and_share_it_evenly(world: int, memory: int) -> None:
    sizes = [10 * count for count in CHIPS]
    orders = [
        SampleOrder(CHIPS, sizes, memory=memory, seed=3, rank=rank, world_size=world)
        for rank in range(world)
    ]
    every = sorted((unit, chip) for unit, count in enumerate(CHIPS) for chip in range(count))
    shown = np.zeros(world, dtype=int)
    for epoch in range(2 * world):
        seen, places, reads = [], [], []
        for rank, order in enumerate(orders):
            own = [tuple(chip) for group in order.epoch(epoch) for chip in group.samples.tolist()]
            shown[rank] += len(own)
            seen += own
            places += [
                group.offset + place
                for group in order.epoch(epoch)
                for place in range(len(group.samples))
            ]
            reads += [unit for group in order.epoch(epoch) for unit in group.units]
            # A rank reads what it shows, and nothing else.
            assert {unit for unit, _ in own} == {
                unit for group in order.epoch(epoch) for unit in group.units
            }
            assert all(group.units for group in order.epoch(epoch))
        assert sorted(seen) == every
        assert sorted(places) == list(range(len(every)))
        assert len(reads) <= len(CHIPS) + world - 1
        assert shown.max() - shown.min() <= 1
    assert (shown == 2 * len(every)).all()


def test_ranks_go_on_from_anywhere_and_rank_0_of_1_is_the_default() -> None:
    def places(start: int, count: int, **ranks: int) -> list[tuple[int, int, int]]:
        order = SampleOrder(CHIPS, [10] * len(CHIPS), memory=30, seed=3, **ranks)
        samples = itertools.islice(order.samples(start), count)
        return [(sample.unit, sample.chip, sample.offset) for sample in samples]

    for rank in range(3):
        whole = places(0, 40, rank=rank, world_size=3)
        for start in range(20):
            assert places(start, 40 - start, rank=rank, world_size=3) == whole[start:]
    assert places(0, 40) == places(0, 40, rank=0, world_size=1)
    assert places(0, 6, rank=0, world_size=3) != places(0, 6, rank=1, world_size=3)


@pytest.mark.parametrize("ranks", [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_that_does_not_exist_is_an_error(ranks: tuple[int, int]) -> None:
    with pytest.raises(InputError, match="ranks count from 0"):
        SampleOrder([1], [1], memory=10, seed=0, rank=ranks[0], world_size=ranks[1])


def test_weights_say_how_often_an_epoch_shows_a_unit() -> None:
    weights = np.array([1, 0.25, 0, 2.5, 1, 1, 1])
    orders = [
        SampleOrder(CHIPS, [10] * 7, memory=40, seed=3, weights=weights, rank=rank, world_size=2)
        for rank in range(2)
    ]
    counts = np.zeros((8, 7), dtype=int)
    lengths = [0, 0]
    for epoch in range(8):
        for rank, order in enumerate(orders):
            for group in order.epoch(epoch):
                lengths[rank] += len(group.samples)
                np.add.at(counts[epoch], group.samples[:, 0], 1)

    shown = counts / np.array(CHIPS)
    assert set(shown[:, 0]) == {1}
    assert set(shown[:, 2]) == {0}
    assert set(shown[:, 3]) == {2, 3}
    assert shown.sum(axis=0).tolist() == [8, 2, 0, 20, 8, 8, 8]
    assert abs(lengths[0] - lengths[1]) <= 1
    whole = [(s.unit, s.chip, s.epoch) for s in itertools.islice(orders[1].samples(0), 60)]
    for start in (1, 13, 14, 30, 41):
        entered = itertools.islice(orders[1].samples(start), 60 - start)
        assert [(s.unit, s.chip, s.epoch) for s in entered] == whole[start:]


def test_no_chip_is_an_error() -> None:
    with pytest.raises(InputError, match="there is no chip"):
        SampleOrder([], [], memory=10, seed=0)
    with pytest.raises(InputError, match="there is no chip"):
        SampleOrder([2, 0], [1, 1], memory=10, seed=0, weights=np.array([0.0, 1.0]))


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


def chip_prints(batches: list[Batch]) -> list[bytes]:
    return [
        image[valid.any(dim=(1, 2))].numpy().tobytes()
        for batch in batches
        for image, valid in zip(batch.reflectance, batch.valid, strict=True)
        if valid.any()
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 50])
def test_ranks_walk_each_chip_once_in_equal_numbers_of_batches(
    dataset: ChipDataset, world: int
) -> None:
    streams = [
        OrderedStream(dataset, batch_size=7, memory=0, rank=rank, world_size=world)
        for rank in range(world)
    ]
    walks = [list(stream) for stream in streams]

    assert {len(walk) for walk in walks} == {len(streams[0])}
    whole = list(OrderedStream(dataset, batch_size=7, memory=0))
    assert chip_prints([batch for walk in walks for batch in walk]) == chip_prints(whole)


def test_ranks_train_on_disjoint_chips_that_make_up_the_epoch(dataset: ChipDataset) -> None:
    plain = Augmentation(dihedral=False)
    seen: list[list[bytes]] = []
    for rank in range(2):
        stream = TrainingStream(
            dataset, batch_size=7, seed=1, memory=400_000, augmentation=plain,
            rank=rank, world_size=2,
        )  # fmt: skip
        seen.append(chip_prints(list(stream.batches(0, 3))))
        stream.close()

    assert dataset.chips == 42
    assert [len(prints) for prints in seen] == [21, 21]
    whole = chip_prints(list(OrderedStream(dataset, batch_size=7, memory=0)))
    assert sorted(seen[0] + seen[1]) == sorted(whole)


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
