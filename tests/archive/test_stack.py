"""Stacks: what is written is read, and what breaks the contract is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stcln_geo import open_cube
from stcln_geo.cube.contract import FILL
from stcln_geo.cube.stack import (
    Stack,
    StackLayout,
    is_stack,
    open_building_stack,
    open_stack,
    plan_stack_layout,
)
from stcln_geo.cube.stack_contract import stack_dataset, validate_stack
from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites
from stcln_geo.cube.store import open_season
from stcln_geo.errors import CubeError, InputError
from stcln_geo.legend import Legend

SEASON, BANDS = "2018-09-01", ("red", "nir")
DATES = ((3, 40, 41), (5, 6), (0, 100, 200), (7,), (9, 10, 11))
"""Days of each site; the sites have different dates, and not equally many."""

SIDE, TIMES = 24, 3


def times() -> np.ndarray:
    table = np.full((len(DATES), TIMES), "NaT", dtype="datetime64[s]")
    for site, days in enumerate(DATES):
        table[site, : len(days)] = np.datetime64(SEASON, "s") + np.array(days) * 86_400 + 37_800
    return table


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    here = ~np.isnat(times())[:, :, None, None]
    valid = here & (rng.random((len(DATES), TIMES, SIDE, SIDE)) < 0.7)
    values = rng.integers(-50, 5000, (len(DATES), TIMES, 2, SIDE, SIDE)).astype("int16")
    values[~valid.any(axis=(2, 3))] = FILL
    return {
        "reflectance": values,
        "valid": valid,
        "labels": rng.integers(0, 3, (len(DATES), SIDE, SIDE)).astype("uint8"),
        "parcels": parcels_of(rng),
    }


def parcels_of(rng: np.random.Generator) -> np.ndarray:
    """Field numbers, 0 for none; each in one site only."""
    number = rng.integers(0, 9, (len(DATES), SIDE, SIDE))
    apart = 9 * np.arange(len(DATES))[:, None, None]
    return np.where(number > 0, number + apart, 0).astype("int32")


def make(path: Path, **changes: Any) -> Stack:
    """Five sites of 24 px in three zones, two per shard, with labels, parcels and folds."""
    sites = len(DATES)
    return create_stack(
        path,
        SEASON,
        **{
            "site_id": [f"s{number}" for number in range(sites)],
            "crs": ["EPSG:32631", "EPSG:32631", "EPSG:32632", "EPSG:32733", "EPSG:32631"],
            "transform": np.array(
                [[10, 0, 600000 + 300 * n, 0, -10, 5600040] for n in range(sites)]
            ),
            "shape_yx": (SIDE, SIDE),
            "time": times(),
            "bands": BANDS,
            "layout": StackLayout(chunk=16, sites=2),
            "fold": np.array([1, 2, 3, 4, 5]),
            "legend": Legend.from_values(["a", "b", "c"]),
            "with_parcels": True,
            **changes,
        },
    )


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    content = arrays(np.random.default_rng(1))
    stack = make(tmp_path / "s.zarr")
    for shard in stack.shards:
        part = {name: values[shard.start : shard.stop] for name, values in content.items()}
        write_sites(stack, shard.start, **part)
    finish_stack(tmp_path / "s.zarr", SEASON)
    return tmp_path / "s.zarr", content


def test_what_is_written_is_read(written: tuple[Path, dict[str, np.ndarray]]):
    path, content = written
    stack = open_stack(path)
    for name, values in content.items():
        np.testing.assert_array_equal(getattr(stack, name)[:], values)
    np.testing.assert_array_equal(stack.time, times())
    assert stack.days.tolist()[:2] == [[3, 40, 41], [5, 6, -1]]
    assert stack.dates.tolist() == [3, 2, 3, 1, 3]
    assert stack.fold is not None
    assert stack.fold.tolist() == [1, 2, 3, 4, 5]
    assert [list(shard) for shard in stack.shards] == [[0, 1], [2, 3], [4]]
    assert stack.legend is not None
    assert stack.geobox(3).crs.epsg == 32733
    # Chunks of 16 px over 24: each counts its own pixels.
    coverage = stack.coverage[:]
    assert coverage.shape == (5, TIMES, 2, 2)
    np.testing.assert_array_equal(coverage[..., 1, 0], content["valid"][..., 16:, :16].sum((2, 3)))
    assert stack.reflectance.chunks == (1, TIMES, 2, 16, 16)
    assert stack.reflectance.shards == (2, TIMES, 2, 32, 32)


def test_chunks_of_256_px_that_are_all_clear_are_counted(tmp_path: Path):
    side = 277
    stack = create_stack(
        tmp_path / "s.zarr", SEASON, site_id=["s0"], crs=["EPSG:32631"], bands=("red",),
        transform=np.array([[10, 0, 600000, 0, -10, 5600040]]), shape_yx=(side, side),
        time=np.array([["2019-05-01T10:50:00"]], "datetime64[s]"),
        layout=StackLayout(chunk=256, sites=1),
    )  # fmt: skip
    values = np.full((1, 1, 1, side, side), 500, dtype=np.int16)
    write_sites(stack, 0, reflectance=values, valid=np.ones((1, 1, side, side), dtype=bool))
    finish_stack(stack.path, SEASON)
    assert open_stack(stack.path).coverage[0, 0].tolist() == [[65536, 5376], [5376, 441]]
    assert validate_stack(stack_dataset(stack.path, SEASON))[0] == []


def test_it_opens_as_a_dataset_that_keeps_the_contract(written: tuple[Path, Any]):
    path, content = written
    dataset = stack_dataset(path)
    assert validate_stack(dataset) == ([], [])
    np.testing.assert_array_equal(dataset["reflectance"].to_numpy(), content["reflectance"])
    assert dataset["time"].dims == ("site", "time")
    assert int(np.isnat(dataset["time"].to_numpy()).sum()) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ds: ds.drop_vars("valid"), "'valid' is missing"),
        (lambda ds: ds.drop_vars("site_id"), "'site_id' is missing"),
        (lambda ds: ds.transpose("time", "site", ...), "must be"),
        (lambda ds: ds.assign(valid=ds["valid"] | True), "NaT"),
        (lambda ds: ds.assign(valid=~ds["valid"]), "coverage"),
        (lambda ds: ds.assign(reflectance=ds["reflectance"] * 0 + FILL), "missing"),
        (lambda ds: ds.assign(labels=ds["labels"] + 1), "Run label_stack again"),
        (lambda ds: ds.assign_coords(site_id=("site", ["a"] * 5)), "more than once"),
        (lambda ds: ds.assign_coords(crs=("site", ["EPSG:99"] * 5)), "not known"),
        (lambda ds: ds.assign_coords(transform=-ds["transform"]), "north-up"),
        (lambda ds: ds.assign_coords(days=ds["days"] + 1), "'days' must be -1"),
        (
            lambda ds: ds.assign_coords(time=ds["time"][:, ::-1].assign_coords()),
            "increase strictly",
        ),
    ],
)
def test_breaches_are_told(written: tuple[Path, Any], change: Any, message: str):
    dataset = stack_dataset(written[0]).load()
    errors, _ = validate_stack(change(dataset))
    assert any(message in text for text in errors), errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site_id": ["a", "a", "b", "c", "d"]}, "id of its own"),
        ({"crs": ["EPSG:32631"]}, "5 ids come with 1 CRS"),
        ({"bands": ("red", "B08")}, "B08"),
        ({"time": times()[:, ::-1]}, "increase strictly"),
        ({"time": np.full((5, 3), "NaT", "datetime64[s]")}, "at least one date"),
    ],
)
def test_bad_stacks_are_not_created(tmp_path: Path, changes: Any, message: str):
    with pytest.raises(CubeError, match=message):
        make(tmp_path / "s.zarr", **changes)


def test_shards_are_written_whole(tmp_path: Path):
    stack = make(tmp_path / "s.zarr")
    content = arrays(np.random.default_rng(1))
    for first, count in ((1, 2), (0, 1), (4, 2)):
        part = {name: values[first : first + count] for name, values in content.items()}
        if (first, count) == (4, 2):
            part = {name: values[3:5] for name, values in content.items()}
        with pytest.raises(InputError, match="whole shard at a time"):
            write_sites(stack, first, **part)
    assert open_building_stack(tmp_path / "s.zarr", SEASON) is not None
    assert open_building_stack(tmp_path / "s.zarr", "2019-09-01") is None
    # A folder left half-created, without its attributes, is none.
    group: Any = zarr.open_group(tmp_path / "s.zarr" / f"{SEASON}.building", mode="r+")
    group.attrs.put({})
    assert open_building_stack(tmp_path / "s.zarr", SEASON) is None


def test_stacks_and_cubes_are_told_apart(written: tuple[Path, Any]):
    assert is_stack(written[0])
    with pytest.raises(CubeError, match=r"is a stack of many sites.*open_stack"):
        open_season(written[0])
    for chunks in ("auto", None):
        with pytest.raises(CubeError, match=r"is a stack of many sites.*open_stack"):
            open_cube(written[0], chunks=chunks)


@pytest.mark.parametrize(
    ("dates", "bands", "side"), [(73, 10, 64), (146, 10, 128), (12, 10, 48), (73, 13, 512)]
)
def test_layouts_keep_their_bounds(dates: int, bands: int, side: int):
    layout = plan_stack_layout(dates, bands, (side, side))
    site = dates * bands * 2 * side * side
    assert layout.chunk <= min(64, side)
    assert layout.sites == 1 or layout.sites * site <= 400_000_000
    assert (layout.sites + 1) * site > 100_000_000
