"""Augmentation keeps pixels and targets together; padding adds nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from stcln_geo.cube.contract import FILL
from stcln_geo.data.batch import IGNORE_INDEX, Augmentation, augment, collate, decode_reflectance
from stcln_geo.data.chips import Chip, ChipSource
from stcln_geo.errors import InputError
from stcln_geo.grid import Window


def make_chip(dates: int = 5, side: int = 7, seed: int = 0) -> Chip:
    """Every pixel carries its own number in all arrays, so that a mix-up shows."""
    place = np.arange(side * side).reshape(side, side)
    generator = np.random.default_rng(seed)
    reflectance = place + 100 * np.arange(dates)[:, None, None, None] + np.zeros((1, 3, 1, 1))
    return Chip(
        reflectance=reflectance.astype(np.int16),
        valid=generator.random((dates, side, side)) < 0.7,
        days=np.arange(dates, dtype=np.int32) * 10 + 3,
        target=(place % 251).astype(np.uint8),
    )


@pytest.mark.parametrize("seed", range(12))
def test_augmentation_keeps_image_valid_and_target_aligned(seed: int) -> None:
    chip = make_chip()

    changed = augment(chip, np.random.default_rng(seed), Augmentation(max_dates=3))

    assert changed.target is not None
    assert chip.target is not None
    assert sorted(changed.target.flat) == sorted(chip.target.flat)
    assert len(changed.days) == 3
    assert (np.diff(changed.days) > 0).all()
    for date, day in enumerate(changed.days):
        before = (int(day) - 3) // 10
        numbers = changed.reflectance[date, 0] - 100 * before
        np.testing.assert_array_equal(changed.target, numbers)
        row, col = numbers // 7, numbers % 7
        np.testing.assert_array_equal(changed.valid[date], chip.valid[before][row, col])


def test_augmentation_reaches_all_eight_symmetries_evenly() -> None:
    chip = make_chip(dates=1)
    generator = np.random.default_rng(0)

    seen = [augment(chip, generator, Augmentation()).target for _ in range(1600)]

    counts: dict[bytes, int] = {}
    for target in seen:
        assert target is not None
        counts[target.tobytes()] = counts.get(target.tobytes(), 0) + 1
    assert len(counts) == 8
    # 200 each, with a standard deviation of 13.
    assert min(counts.values()) > 140
    assert max(counts.values()) < 260


def kept_dates(options: Augmentation, *, dates: int = 10, chips: int = 600) -> list[list[int]]:
    """Return the positions of the dates that chips of so many keep."""
    generator, chip = np.random.default_rng(2), make_chip(dates, side=2)
    thinned = [augment(chip, generator, options) for _ in range(chips)]
    return [((one.days - 3) // 10).tolist() for one in thinned]


def test_a_prefix_ends_at_any_date_and_leaves_out_none_before() -> None:
    kept = kept_dates(Augmentation(prefix=1.0, min_dates=4))
    assert all(dates == list(range(len(dates))) for dates in kept)
    ends = np.bincount([len(dates) for dates in kept], minlength=11)
    # 600 chips, 7 ends: 86 each, with a standard deviation of 8.6.
    assert not ends[:4].any()
    assert ends[4:].min() > 45
    assert ends[4:].max() < 130
    some = kept_dates(Augmentation(prefix=0.3, min_dates=4))
    assert np.mean([len(dates) < 10 for dates in some]) == pytest.approx(0.3 * 6 / 7, abs=0.08)


def test_dropping_dates_leaves_out_up_to_the_share_and_any_date_alike() -> None:
    kept = kept_dates(Augmentation(drop_dates=0.5))
    assert {len(dates) for dates in kept} == {5, 6, 7, 8, 9, 10}
    assert np.mean([len(dates) for dates in kept]) == pytest.approx(7.5, abs=0.25)
    shown = np.bincount([date for dates in kept for date in dates], minlength=10) / len(kept)
    assert shown == pytest.approx(0.75, abs=0.08)
    assert all(dates == sorted(set(dates)) for dates in kept)


def test_prefix_and_dropping_leave_the_least_and_no_more_than_the_most_dates() -> None:
    both = {"prefix": 1.0, "drop_dates": 0.9, "min_dates": 4}
    kept = kept_dates(Augmentation(**both))
    assert {len(dates) for dates in kept} == {4, 5, 6, 7, 8, 9, 10}
    assert {dates[-1] for dates in kept} == set(range(3, 10))
    assert any(len(dates) == 4 and dates[-1] == 9 for dates in kept)
    most = kept_dates(Augmentation(**both, max_dates=6))
    assert {len(dates) for dates in most} == {4, 5, 6}
    for options in (Augmentation(**both), Augmentation(max_dates=3)):
        assert kept_dates(options, dates=3, chips=60) == [[0, 1, 2]] * 60
    assert kept_dates(Augmentation(**both), dates=0, chips=2) == [[], []]


def test_a_chip_moves_as_a_whole_by_any_number_of_days_and_says_its_own_dates() -> None:
    season = ChipSource(cube="a", season="2019-09-01", window=Window(0, 0, 2, 2))
    chip = replace(make_chip(3, side=2), source=season, valid=np.ones((3, 2, 2), bool))
    generator = np.random.default_rng(4)
    options = Augmentation(dihedral=False, shift_days=2)
    moved = [augment(chip, generator, options) for _ in range(1000)]
    days = [one.days[0] - chip.days[0] for one in moved]
    # 200 each, with a standard deviation of 13.
    assert np.bincount(np.array(days) + 2).min() > 140
    assert set(days) == {-2, -1, 0, 1, 2}
    for one in moved[:20]:
        np.testing.assert_array_equal(np.diff(one.days), np.diff(chip.days))
        np.testing.assert_array_equal(one.reflectance, chip.reflectance)
        assert one.days.dtype == np.int32
    batch = collate(moved[:20])
    told = {batch.describe(place) for place in range(20)}
    assert told == {collate([chip]).describe(0)}
    assert {batch.part(7, 20).describe(place) for place in range(13)} == told


def test_augmentation_can_be_switched_off() -> None:
    chip = make_chip()

    same = augment(chip, np.random.default_rng(1), Augmentation(dihedral=False))

    np.testing.assert_array_equal(same.reflectance, chip.reflectance)
    np.testing.assert_array_equal(same.target, chip.target)


def test_padding_is_invalid_and_changes_no_real_date() -> None:
    generator = np.random.default_rng(6)
    chips = [
        Chip(
            reflectance=generator.integers(-200, 9000, (dates, 3, 5, 7)).astype(np.int16),
            valid=generator.random((dates, 5, 7)) < 0.7,
            days=np.sort(generator.choice(365, dates, replace=False)).astype(np.int32),
            target=generator.integers(0, 9, (5, 7)).astype(np.uint8),
            source=ChipSource(cube="a", season="2019-09-01", window=Window(dates, 4, 5, 7)),
        )
        for dates in (2, 6, 0)
    ]

    batch = collate(chips, samples=(7, 5, 9))

    assert batch.target is not None
    assert batch.reflectance.shape == (3, 6, 3, 5, 7)
    assert (batch.reflectance.dtype, batch.days.dtype) == (torch.int16, torch.float32)
    for place, chip in enumerate(chips):
        own = len(chip.days)
        np.testing.assert_array_equal(batch.reflectance[place, :own], chip.reflectance)
        np.testing.assert_array_equal(batch.valid[place, :own], chip.valid)
        np.testing.assert_array_equal(batch.days[place, :own], chip.days)
        np.testing.assert_array_equal(batch.target[place], chip.target)
        assert not batch.valid[place, own:].any()
        assert (batch.reflectance[place, own:] == FILL).all()
        assert (batch.days[place, own:] == 0).all()
        assert batch.images()[place, own:].abs().sum() == 0
    assert batch.sources == tuple(chip.source for chip in chips)

    plain = [replace(chip, target=None) for chip in chips]
    bare = collate([augment(one, np.random.default_rng(0), Augmentation()) for one in plain])
    assert bare.target is bare.part(0, 1).target is bare.to("meta").target is None

    part, moved = batch.part(1, 3), batch.to("meta")

    assert (len(part), part.samples, part.sources) == (2, (5, 9), batch.sources[1:])
    for name in ("reflectance", "valid", "days", "target"):
        whole = getattr(batch, name)
        assert torch.equal(getattr(part, name), whole[1:3])
        assert getattr(moved, name).device.type == "meta"
        assert getattr(moved, name).shape == whole.shape


def test_a_chip_without_dates_is_padded_too() -> None:
    empty = Chip(
        reflectance=np.zeros((0, 3, 7, 7), dtype=np.int16),
        valid=np.zeros((0, 7, 7), dtype=bool),
        days=np.zeros(0, dtype=np.int32),
        target=np.zeros((7, 7), dtype=np.uint8),
    )

    batch = collate([empty])

    assert batch.reflectance.shape == (1, 1, 3, 7, 7)
    assert not batch.valid.any()


def test_unlabelled_pixels_are_ignored() -> None:
    chip = make_chip()
    target = np.array(chip.target)
    target[0, :3] = 255
    batch = collate(
        [Chip(reflectance=chip.reflectance, valid=chip.valid, days=chip.days, target=target)]
    )

    assert batch.target is not None
    assert batch.target.dtype == torch.int64
    assert IGNORE_INDEX == -100, "what PyTorch's losses leave out"
    assert (batch.target[0, 0, :3] == IGNORE_INDEX).all()
    assert (batch.target == IGNORE_INDEX).sum() == 3


def test_decoding_gives_reflectance_and_nought_where_not_valid() -> None:
    raw = torch.tensor([[[[[1234, FILL, -50]]]]], dtype=torch.int16)
    valid = torch.tensor([[[[True, True, False]]]])

    images = decode_reflectance(raw, valid)

    assert images.dtype == torch.float32
    assert images.flatten().tolist() == pytest.approx([0.1234, 0.0, 0.0])


def test_mixed_sizes_are_refused() -> None:
    with pytest.raises(InputError, match="one chip size"):
        collate([make_chip(side=7), make_chip(side=8)])
    chip = make_chip()
    fewer_bands = replace(chip, reflectance=chip.reflectance[:, :2])
    with pytest.raises(InputError, match="one set of bands"):
        collate([chip, fewer_bands])
    with pytest.raises(InputError, match="at least one chip"):
        collate([])
