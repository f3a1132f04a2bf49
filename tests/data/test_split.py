"""Splits divide fields, class by class, and depend on nothing but the seed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import FieldTable, open_season
from stcln_geo.data import split as split_module
from stcln_geo.data.split import check_labelled, few_label_fields, field_positions, split_fields
from stcln_geo.errors import InputError, LabelError

TRAIN, VALIDATION, TEST = (SPLITS[name] for name in ("train", "validation", "test"))


def table(counts: dict[int, int], split: np.ndarray | None = None) -> FieldTable:
    code = np.concatenate([np.full(count, value) for value, count in counts.items()])
    code = np.random.default_rng(5).permutation(code).astype(np.uint8)
    return FieldTable(
        number=np.arange(1, code.size + 1, dtype=np.int32),
        code=code,
        pixels=np.full(code.size, 20, dtype=np.int32),
        split=np.zeros(code.size, dtype=np.uint8) if split is None else split,
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_class_is_in_every_split(seed: int) -> None:
    fields = table({0: 101, 1: 7, 2: 3, 3: 4, 4: 13})

    split = split_fields(fields, seed=seed)

    assert split.dtype == np.uint8
    assert set(split.tolist()) == {TRAIN, VALIDATION, TEST}
    for code in range(5):
        assert set(split[fields.code == code].tolist()) == {TRAIN, VALIDATION, TEST}


def test_shares_hold_in_each_class() -> None:
    fields = table({0: 100, 1: 50})

    split = split_fields(fields, test=0.3, validation=0.2)

    for code, count in ((0, 100), (1, 50)):
        counts = np.bincount(split[fields.code == code], minlength=4)
        assert counts.tolist() == [0, count // 2, count // 5, 3 * count // 10]


def test_two_fields_give_one_to_train_and_one_to_test() -> None:
    fields = table({0: 2, 1: 9})

    split = split_fields(fields)

    assert sorted(split[fields.code == 0].tolist()) == [TRAIN, TEST]


@pytest.mark.parametrize(("test", "validation"), [(0.3, 0.2), (0.07, 0.13), (0.55, 0.4), (0.9, 0)])
def test_each_class_gets_the_nearest_number_that_leaves_a_field_for_all(
    test: float, validation: float
) -> None:
    sizes = range(2, 41)
    fields = table({code: count for code, count in enumerate(sizes)})

    split = split_fields(fields, test=test, validation=validation)

    for code, count in enumerate(sizes):
        _, train, valid, tests = np.bincount(split[fields.code == code], minlength=4)
        least = 1 if validation and count > 2 else 0
        assert train >= 1
        possible = range(1, count - least)
        assert abs(tests - test * count) == min(abs(one - test * count) for one in possible)
        possible = range(least, count - int(tests))
        wanted = validation * count
        assert abs(valid - wanted) == min(abs(one - wanted) for one in possible)


def test_is_deterministic_and_moves_with_the_seed() -> None:
    fields = table({0: 30, 1: 30})

    assert split_fields(fields, seed=3).tolist() == split_fields(fields, seed=3).tolist()
    assert split_fields(fields, seed=3).tolist() != split_fields(fields, seed=4).tolist()


def test_without_validation() -> None:
    split = split_fields(table({0: 10, 1: 10}), validation=0)

    assert set(split.tolist()) == {TRAIN, TEST}


@pytest.mark.parametrize("seed", range(3))
def test_blocks_stay_together(seed: int) -> None:
    fields = table({0: 60, 1: 40, 2: 25})
    positions = np.random.default_rng(seed).uniform(0, 1000, (125, 2))

    split = split_fields(fields, by="block", positions=positions, block_pixels=100, seed=seed)

    block = (positions // 100).astype(int)
    for corner in np.unique(block, axis=0):
        inside = (block == corner).all(axis=1)
        assert len(set(split[inside].tolist())) == 1
    for code in range(3):
        mine = split[fields.code == code]
        assert (mine == TRAIN).any()
        assert (mine == TEST).any()
        assert 0.1 < (mine == TEST).mean() < 0.5


@pytest.mark.parametrize("validation", [0.2, 0.0])
def test_many_blocks_come_near_the_shares_in_each_class(validation: float) -> None:
    fields = table({0: 500, 1: 300, 2: 200})
    positions = np.random.default_rng(7).uniform(-500, 500, (1000, 2))

    split = split_fields(
        fields, by="block", positions=positions, block_pixels=90, validation=validation, test=0.25
    )

    for code in range(3):
        shares = np.bincount(split[fields.code == code], minlength=4) / (fields.code == code).sum()
        assert shares == pytest.approx([0, 0.75 - validation, validation, 0.25], abs=0.03)
    again = split_fields(
        fields, by="block", positions=positions, block_pixels=90, validation=validation, test=0.25
    )
    assert np.array_equal(split, again)


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_a_field_each_give_classes_of_three_all_splits(seed: int) -> None:
    fields = table({0: 3, 1: 3, 2: 4, 3: 5})
    positions = 100.0 * np.arange(30).reshape(15, 2)

    split = split_fields(fields, by="block", positions=positions, block_pixels=50, seed=seed)

    for code in range(4):
        assert set(split[fields.code == code].tolist()) == {TRAIN, VALIDATION, TEST}


@pytest.mark.parametrize("at_once", [1, 100, 1 << 23])
@pytest.mark.parametrize("validation", [0.0, 0.2])
def test_orders_are_dealt_out_as_one_by_one(
    validation: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(11)
    code = rng.choice(13, 407, p=rng.dirichlet(np.full(13, 0.5)))
    groups = np.unique(rng.integers(0, 31, 407), return_inverse=True)[1]
    monkeypatch.setattr(split_module, "_ORDERS", at_once)
    found, lacking = split_module.deal_groups(
        code, groups, test=0.3, validation=validation, generator=np.random.default_rng(5),
        trials=23,
    )  # fmt: skip

    total = np.bincount(code, minlength=13)
    there = total > 0
    of_group = np.stack([np.bincount(code[groups == one], minlength=13) for one in range(31)])
    of_group, total = of_group[:, there].astype(float), total[there]
    shares = np.array([1 - 0.3 - validation, validation, 0.3])
    target = shares[:, None] * total
    generator, results = np.random.default_rng(5), []
    for _ in range(23):
        dealt, choice = np.zeros_like(target), np.zeros(31, dtype=int)
        for group in generator.permutation(31):
            gain = ((target - dealt) * of_group[group] / total**2).sum(axis=1)
            choice[group] = np.where(shares == 0, -np.inf, gain).argmax()
            dealt[choice[group]] += of_group[group]
        missing = (dealt[[0, 2]] == 0).sum()
        short = ((dealt[1] == 0) & (total >= 3)).sum() if validation else 0
        away = (((dealt - target) / total) ** 2).sum()
        results.append((1e6 * missing + 1e3 * short + away, missing, choice))
    _, missing, choice = min(results, key=lambda one: one[0])
    assert np.array_equal(found, np.array([1, 2, 3])[choice[groups]])
    assert lacking == missing


def test_few_labels_are_train_fields_and_nested() -> None:
    fields = table({0: 40, 1: 11, 2: 6})
    fields = table({0: 40, 1: 11, 2: 6}, split_fields(fields))
    train = fields.split == TRAIN

    two = few_label_fields(fields, fields_per_class=2, seed=1)
    five = few_label_fields(fields, fields_per_class=5, seed=1)

    assert not (two & ~five).any()
    assert not (five & ~train).any()
    assert np.bincount(fields.code[two]).tolist() == [2, 2, 2]
    one = few_label_fields(fields, fields_per_class=1, seed=1)
    assert not (one & ~two).any()
    assert np.bincount(fields.code[one]).tolist() == [1, 1, 1]
    # Another class changes nothing for those there are.
    more = replace(fields, code=np.where(fields.code == 2, 9, fields.code).astype(np.uint8))
    other = few_label_fields(more, fields_per_class=2, seed=1)
    assert np.array_equal(other[fields.code < 2], two[fields.code < 2])
    assert np.bincount(fields.code[five])[0] == 5
    assert (few_label_fields(fields) == train).all()
    assert two.tolist() != few_label_fields(fields, fields_per_class=2, seed=2).tolist()


def test_fraction_rounds_up_and_keeps_every_class() -> None:
    fields = table({0: 50, 1: 3}, np.full(53, TRAIN, dtype=np.uint8))

    chosen = few_label_fields(fields, fraction=0.05)

    assert np.bincount(fields.code[chosen]).tolist() == [3, 1]
    # 0.07 x 100 is a little more than 7 in binary, and means 7.
    hundred = table({0: 100, 1: 100}, np.full(200, TRAIN, dtype=np.uint8))
    for share in (0.07, 0.14, 0.29, 0.55, 1.0):
        found = few_label_fields(hundred, fraction=share)
        assert np.bincount(hundred.code[found]).tolist() == [round(100 * share)] * 2


def test_positions_are_the_centres_of_the_fields(cube: Path) -> None:
    season = open_season(cube)
    fields, _ = check_labelled(season)
    parcels = season.parcels[:]

    positions = field_positions(season)

    for place in (0, 17, len(fields) - 1):
        row, col = np.nonzero(parcels == fields.number[place])
        assert positions[place].tolist() == pytest.approx([row.mean(), col.mean()])


def test_positions_are_counted_from_the_corner_of_a_large_cube(cube: Path) -> None:
    season = open_season(cube)
    parcels = np.zeros((1103, 1051), dtype=np.int32)
    spots = np.random.default_rng(3).integers(0, len(check_labelled(season)[0]) + 9, (70, 70))
    parcels[500:1100:10, 50:1050:20] = spots[:60, :50]
    geobox = season.geobox.crop((1103, 1051))
    large = replace(season, parcels=parcels, geobox=geobox)

    positions = field_positions(large)

    number = check_labelled(season)[0].number
    seen = np.isin(number, parcels)
    assert seen.sum() > 30
    expected = ndimage.center_of_mass(parcels > 0, parcels, number[seen])
    np.testing.assert_allclose(positions[seen], expected)


def test_refuses_what_cannot_be_divided() -> None:
    with pytest.raises(LabelError, match=r"class codes \[1\] have one field"):
        split_fields(table({0: 5, 1: 1}))
    with pytest.raises(InputError, match=r"test=0\.7 and validation=0\.4"):
        split_fields(table({0: 5, 1: 5}), test=0.7, validation=0.4)
    for shares in ((0.0, 0.2), (1.0, 0.0), (0.5, 0.5), (0.3, -0.1)):
        with pytest.raises(InputError, match="training fields remain"):
            split_fields(table({0: 5, 1: 5}), test=shares[0], validation=shares[1])
    with pytest.raises(InputError, match="fields_per_class=0"):
        few_label_fields(table({0: 5, 1: 5}), fields_per_class=0)
    for fraction in (0.0, 1.1):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            few_label_fields(table({0: 5, 1: 5}), fraction=fraction)
    with pytest.raises(InputError, match="blocks of 0 px"):
        split_fields(table({0: 5, 1: 5}), by="block", positions=np.zeros((10, 2)), block_pixels=0)
    with pytest.raises(InputError, match="never by pixel"):
        split_fields(table({0: 5, 1: 5}), by="pixel")  # type: ignore[arg-type]
    with pytest.raises(LabelError, match="by blocks of 1000 px"):
        split_fields(
            table({0: 5, 1: 5}), by="block", positions=np.zeros((10, 2)), block_pixels=1000
        )
    with pytest.raises(LabelError, match="labels split"):
        few_label_fields(table({0: 5, 1: 5}))
    with pytest.raises(InputError, match="Give one of them"):
        few_label_fields(table({0: 5, 1: 5}), fields_per_class=1, fraction=0.1)
