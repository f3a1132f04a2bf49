"""Chips hold the pixels of the cube, and targets only of the fields that are wanted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stcln_geo.cube.contract import FILL, SPLITS
from stcln_geo.cube.store import FieldTable, Season, open_season
from stcln_geo.data.chips import (
    ChipDataset,
    band_statistics,
    plan_chips,
    plan_labelled_chips,
    plan_windows,
)
from stcln_geo.data.targets import Targets
from stcln_geo.errors import CubeError, LabelError
from stcln_geo.grid import Lattice, Window


@pytest.fixture
def season(cube: Path) -> Season:
    return open_season(cube)


def covered(units: list, shape_yx: tuple[int, int]) -> np.ndarray:
    counts = np.zeros((shape_yx[0] + 64, shape_yx[1] + 64), dtype=int)
    for unit in units:
        for chip in unit.chips:
            assert unit.window.contains(chip)
            counts[chip.rows, chip.cols] += 1
    return counts[: shape_yx[0], : shape_yx[1]]


@pytest.mark.parametrize("chip", [16, 24, 32, 48])
def test_chips_partition_the_season(season: Season, chip: int) -> None:
    units = plan_chips(season, chip=chip)

    assert (covered(units, season.shape_yx) == 1).all()
    reads = np.zeros((3, 4), dtype=int)
    for unit in units:
        inside = unit.window.intersection(Window(0, 0, *season.shape_yx))
        bottom, right = inside.row + inside.height, inside.col + inside.width
        reads[inside.row // 32 : -(-bottom // 32), inside.col // 32 : -(-right // 32)] += 1
    # Each storage chunk is decoded once.
    assert (reads == 1).all()


def test_chips_that_are_never_clear_are_left_out(new_cube: Callable[..., Path]) -> None:
    path = new_cube(shape_yx=(86, 101))
    opened = open_season(path, mode="r+")
    opened.coverage[:, 1, 2] = 0

    chips = [chip for unit in plan_chips(open_season(path), chip=16) for chip in unit.chips]

    assert len(chips) == 6 * 7 - 4
    assert not any(32 <= chip.row < 64 and 64 <= chip.col < 96 for chip in chips)


@pytest.mark.parametrize("chip", [16, 24])
def test_labelled_chips_are_those_with_a_wanted_pixel(season: Season, chip: int) -> None:
    assert season.fields is not None
    wanted = season.fields.number % 7 == 3

    units = plan_labelled_chips(season, wanted, chip=chip)

    chosen = np.isin(season.parcels[:], season.fields.number[wanted])
    expected = {
        (row, col)
        for row in range(0, 86, chip)
        for col in range(0, 101, chip)
        if chosen[row : row + chip, col : col + chip].any()
    }
    assert {(chip.row, chip.col) for unit in units for chip in unit.chips} == expected


def test_windows_lie_on_the_absolute_lattice_and_judge_each_pixel_once(season: Season) -> None:
    assert season.fields is not None
    lattice = Lattice(window=20, halo=3)
    wanted = season.fields.split == SPLITS["test"]

    units = plan_windows(season, wanted, lattice=lattice)
    dataset = ChipDataset([season], units, bands=season.bands, wanted=[wanted], halo=lattice.halo)

    judged = np.zeros(season.shape_yx, dtype=int)
    for number, unit in enumerate(units):
        absolute = unit.window.shift(season.window.row, season.window.col)
        assert (absolute.row + 3) % 14 == 0
        assert (absolute.col + 3) % 14 == 0
        (chip,) = dataset.read(number)
        assert chip.target is not None
        row, col = np.nonzero(chip.target != 255)
        assert row.min() >= 3
        assert row.max() < 17
        judged[row + unit.window.row, col + unit.window.col] += 1
    assert (judged == np.isin(season.parcels[:], season.fields.number[wanted])).all()


@pytest.mark.parametrize("side", [16, 24, 48])
def test_chips_equal_the_arrays_beyond_the_edge_too(season: Season, side: int) -> None:
    """Whether chips are smaller or larger than chunks, with and without their targets."""
    assert season.fields is not None
    units = plan_chips(season, chip=side)
    wanted = season.fields.number % 2 == 0
    plain = ChipDataset([season], units, bands=("nir", "green"))
    labelled = ChipDataset([season], units, bands=season.bands, wanted=[wanted])
    beyond = ((0, 64), (0, 64))
    valid = np.pad(season.valid[:], ((0, 0), *beyond))
    numbers = np.pad(season.reflectance[:], ((0, 0), (0, 0), *beyond), constant_values=FILL)
    known = np.isin(season.parcels[:], season.fields.number[wanted])
    target = np.pad(np.where(known, season.labels[:], 255), beyond, constant_values=255)

    for number, unit in enumerate(units):
        read = plain.read(number), labelled.read(number), unit.chips
        for chip, taught, window in zip(*read, strict=True):
            at = window.rows, window.cols
            kept = valid[:, *at].any(axis=(1, 2))
            assert chip.target is None
            assert taught.target is not None
            assert chip.days.tolist() == taught.days.tolist() == season.days[kept].tolist()
            np.testing.assert_array_equal(chip.valid, valid[kept][:, *at])
            np.testing.assert_array_equal(taught.reflectance, numbers[kept][:, :, *at])
            np.testing.assert_array_equal(chip.reflectance, taught.reflectance[:, [2, 0]])
            np.testing.assert_array_equal(taught.target, target[at])


def test_targets_are_labels_of_wanted_fields_only(season: Season) -> None:
    assert season.fields is not None
    wanted = season.fields.split == SPLITS["train"]
    units = plan_labelled_chips(season, wanted, chip=32)
    dataset = ChipDataset([season], units, bands=season.bands, wanted=[wanted])
    labels, parcels = season.labels[:], season.parcels[:]

    for number, unit in enumerate(units):
        for chip, window in zip(dataset.read(number), unit.chips, strict=True):
            inside = window.intersection(Window(0, 0, 86, 101))
            known = np.isin(parcels[inside.rows, inside.cols], season.fields.number[wanted])
            expected = np.where(known, labels[inside.rows, inside.cols], 255)
            assert chip.target is not None
            np.testing.assert_array_equal(chip.target[: inside.height, : inside.width], expected)
            assert (chip.target[inside.height :] == 255).all()


def test_statistics_are_those_of_the_valid_pixels(season: Season) -> None:
    dataset = ChipDataset([season], plan_chips(season, chip=32), bands=("swir16", "red"))

    found = band_statistics(dataset)

    values = np.moveaxis(season.reflectance[:], 1, -1)[season.valid[:]][:, [3, 1]] * 1e-4
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.std, values.std(axis=0), rtol=1e-6)
    assert found.observations == season.valid[:].sum()


def test_a_parcel_that_is_no_row_of_the_table_carries_no_target(season: Season) -> None:
    fields = season.fields
    assert fields is not None
    parcels, labels = season.parcels[:], season.labels[:]
    beyond, between = fields.number[3], fields.number[5]
    parcels[parcels == beyond] = fields.number.max() + 1000
    rows = np.flatnonzero(~np.isin(fields.number, (beyond, between)))
    table = FieldTable(
        number=fields.number[rows], code=fields.code[rows], pixels=fields.pixels[rows],
        split=fields.split[rows],
    )  # fmt: skip
    changed = replace(season, parcels=parcels, labels=labels, fields=table)

    target = Targets(changed, np.ones(len(rows), dtype=bool)).read(Window(0, 0, *season.shape_yx))

    np.testing.assert_array_equal(target, np.where(np.isin(parcels, table.number), labels, 255))
    assert ((labels != 255) & (target == 255)).sum() > 20


def test_unit_bytes_are_what_chips_with_all_dates_of_the_unit_take(season: Season) -> None:
    assert season.fields is not None
    wanted = np.ones(len(season.fields), dtype=bool)
    units = plan_chips(season, chip=16)
    for planned in (units, list(units)):
        dataset = ChipDataset([season], planned, bands=season.bands[:3], wanted=[wanted])
        for number, unit in enumerate(units):
            inside = unit.window.intersection(Window(0, 0, *season.shape_yx))
            dates = int(season.valid[:, inside.rows, inside.cols].any(axis=(1, 2)).sum())
            taken = 0
            for chip in dataset.read(number):
                assert chip.target is not None
                assert len(chip.days) <= dates
                a_date = (chip.reflectance.nbytes + chip.valid.nbytes) // len(chip.days)
                taken += a_date * dates + chip.target.nbytes
            assert dataset.unit_bytes(number) == dataset.bytes_per_unit[number] == taken


def test_says_what_is_missing(season: Season) -> None:
    with pytest.raises(CubeError, match=r"lacks band 'blue'.*The cube has: green, red"):
        ChipDataset([season], plan_chips(season, chip=32), bands=("nir", "blue"))
    with pytest.raises(LabelError, match="one value a field"):
        plan_labelled_chips(season, np.ones(3, dtype=bool), chip=32)
