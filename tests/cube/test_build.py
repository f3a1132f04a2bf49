"""Building: rasterio's numbers in the cube, whatever the blocks, workers and interruptions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

from stcln_geo.catalog import BaselineRule, OffsetRule, load_catalog
from stcln_geo.cube import block as block_module
from stcln_geo.cube import cost
from stcln_geo.cube.build import build_cube, unfinished_plan
from stcln_geo.cube.clouds import CloudSpec, clear_sky
from stcln_geo.cube.contract import FILL, validate_cube
from stcln_geo.cube.cost import count_reads, plan_blocks, task_bytes
from stcln_geo.cube.dataset import open_cube
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.preview import write_preview
from stcln_geo.cube.read import read_ledger
from stcln_geo.cube.search import search_items
from stcln_geo.cube.snapshot import read_items, write_items
from stcln_geo.cube.stage import Stage
from stcln_geo.cube.store import Season, list_seasons, open_season
from stcln_geo.errors import CubeError, InputError, OutputError, TaskError
from stcln_geo.execution import Execution
from stcln_geo.region import Region

SMALL = Layout(chunk=16, shard=48)
NO_MARGIN = CloudSpec(cloud_margin=0, shadow_margin=0)


def plan_of(location: str | Path, *, region: Region | None = None, **choices: Any) -> CubePlan:
    snapshot = search_items(load_catalog(location), region=region)
    return plan_cube(snapshot, region, CubeSpec(**choices))


def one_shard(plan: CubePlan) -> int:
    """Memory for one shard per block."""
    return max(task_bytes(plan, season, season.layout.shard) for season in plan.seasons)


def assert_equal(first: Season, second: Season) -> None:
    np.testing.assert_array_equal(first.time, second.time)
    for name in ("reflectance", "valid", "scl", "coverage", "overview"):
        np.testing.assert_array_equal(
            getattr(first, name)[:], getattr(second, name)[:], err_msg=name
        )


# --- the numbers ---


def test_flanders_equals_rasterio(flanders: Path, tmp_path: Path):
    catalog = load_catalog(flanders)
    snapshot = search_items(catalog, time_range="2018-09-01/2018-12-31")
    bands = ("swir16", "blue", "nir", "rededge1")
    plan = plan_cube(snapshot, spec=CubeSpec(bands=bands, clouds=NO_MARGIN))
    report = build_cube(plan, tmp_path / "f.zarr")
    season = open_season(tmp_path / "f.zarr")
    assert season.bands == bands
    assert report.windows_read == len(snapshot) * 5
    left, top = plan.geobox.affine.c, plan.geobox.affine.f
    col, row = int(574680 - left) // 10, int(top - 5622440) // 10
    inner = (slice(row, row + 64), slice(col, col + 64))

    for index, item in enumerate(snapshot.items):
        cube = season.reflectance[index]
        usable = np.ones(plan.window.shape_yx, dtype=bool)
        for number, band in enumerate(bands):
            with rasterio.open(item["assets"][band]["href"]) as file:
                raw = file.read(1)
                expected = np.zeros(plan.window.shape_yx, dtype="uint16")
                if raw.shape == (64, 64):
                    expected[inner] = raw
                else:
                    reproject(
                        raw, expected, src_transform=file.transform, src_crs=file.crs,
                        dst_transform=plan.geobox.affine, dst_crs=file.crs, src_nodata=0,
                        dst_nodata=0, resampling=Resampling.bilinear,
                    )  # fmt: skip
            expected = np.where(expected == 0, FILL, expected.astype("int32"))
            np.testing.assert_array_equal(cube[number], expected)
            usable &= expected != FILL
        with rasterio.open(item["assets"]["scl"]["href"]) as file:
            scl = np.repeat(np.repeat(file.read(1), 2, 0), 2, 1)
        np.testing.assert_array_equal(season.scl[index][inner], scl)
        clear = np.zeros(plan.window.shape_yx, dtype=bool)
        clear[inner] = np.isin(scl, (4, 5, 6, 7, 11))
        np.testing.assert_array_equal(season.valid[index], clear & usable)
    assert 0.2 < season.valid[:][:, inner[0], inner[1]].mean() < 0.9
    errors, _ = validate_cube(open_cube(tmp_path / "f.zarr", mask_and_scale=False))
    assert errors == []


def test_clouds_are_masked_with_their_margin(planted: Any, tmp_path: Path):
    plan = plan_of(planted.location, clouds=CloudSpec(cloud_margin=3, shadow_margin=1))
    build_cube(plan, tmp_path / "c.zarr")
    season = open_season(tmp_path / "c.zarr")
    for index in range(3):
        scl = season.scl[index]
        measured = (season.reflectance[index] != FILL).all(axis=0)
        expected = clear_sky(np.pad(scl, 3), plan.spec.clouds) & measured
        np.testing.assert_array_equal(season.valid[index], expected)
        assert (scl[measured] == 9).any()


def test_tanzania_without_ten_metre_bands(shared: Path, tmp_path: Path):
    snapshot = search_items(
        load_catalog(shared / "data" / "tanzania_2021"), time_range="2020-09-01/2020-12-31"
    )
    plan = plan_cube(snapshot)
    build_cube(plan, tmp_path / "t.zarr")
    season = open_season(tmp_path / "t.zarr")
    assert season.bands == plan.bands
    assert season.valid[:].any()
    assert season.overview[:].any()


FULL = np.ones((102, 104), dtype="uint16")
CLEAR = np.full((51, 52), 4, dtype="uint8")


def test_offsets_are_applied_before_scenes_are_fused(archive: Any, tmp_path: Path):
    # One solar day, one place, two offsets; the halves of the raster are measured by one each.
    west, east = FULL * 3000, FULL * 2000
    west[:, 52:] = 0
    east[:, :52] = 0
    archive.add("raw", "2019-03-01T10:50:00", pixels={"red": west}, scl=CLEAR, offset=-0.1,
                properties={"grid:code": "MGRS-31UFT"})  # fmt: skip
    archive.add("done", "2019-03-01T10:50:10", pixels={"red": east}, scl=CLEAR, offset=-0.1,
                properties={"earthsearch:boa_offset_applied": True})  # fmt: skip
    build_cube(plan_of(archive.location), tmp_path / "o.zarr")
    season = open_season(tmp_path / "o.zarr")
    assert season.reflectance.shape[0] == 1
    values = season.reflectance[0, 0]
    assert set(np.unique(values)) == {FILL, 2000}
    assert (values == 2000).sum() == 102 * 104
    dataset = open_cube(tmp_path / "o.zarr")
    assert str(dataset["item_ids"].values[0]) == "done raw"
    assert str(dataset["offset_dn"].values[0]) == "0 -1000"
    assert str(dataset["offset_rule"].values[0]) == "already_applied declared"


@pytest.mark.parametrize("rule", ["declared", "baseline"])
def test_two_baselines_of_one_solar_day_agree_to_the_digit(archive: Any, tmp_path: Path, rule: str):
    # One ground, measured twice: raw with an offset of 1000, and before there was any.
    rng = np.random.default_rng(11)
    ground = {
        "red": rng.integers(1, 3000, (102, 104)).astype("uint16"),
        "swir16": rng.integers(1, 5000, (51, 52)).astype("uint16"),
    }
    clouds = [rng.choice([4, 9], (51, 52)).astype("uint8") for _ in range(2)]
    declares = rule == "declared"
    archive.add("new", "2019-03-01T10:50:10", scl=clouds[0], offset=-0.1 if declares else None,
                pixels={band: values + 1000 for band, values in ground.items()},
                properties={"s2:processing_baseline": "05.11"})  # fmt: skip
    archive.add("old", "2019-03-01T10:50:00", scl=clouds[1], offset=0.0 if declares else None,
                pixels=ground, properties={"s2:processing_baseline": "03.01",
                                           "grid:code": "MGRS-31UFT"})  # fmt: skip
    catalog = load_catalog(archive.location)
    offset = OffsetRule(declared=True, baseline=BaselineRule(since="04.00", offset=-0.1))
    profile = catalog.defaults.model_copy(update={"offset": offset})
    snapshot = search_items(catalog.model_copy(update={"defaults": profile}))
    plan = plan_cube(snapshot, spec=CubeSpec(clouds=NO_MARGIN, resampling="nearest"))
    assert [scene.item for scene in plan.scenes] == ["new", "old"]
    build_cube(plan, tmp_path / "b.zarr")
    season = open_season(tmp_path / "b.zarr")
    row, col = -560004 - season.window.row, 60000 - season.window.col
    values = season.reflectance[0, :, row : row + 102, col : col + 104]
    truth = {"red": ground["red"], "swir16": ground["swir16"].repeat(2, 0).repeat(2, 1)}
    for index, band in enumerate(season.bands):
        np.testing.assert_array_equal(values[index], truth[band])
    clear = (clouds[0] == 4) | (clouds[1] == 4)
    valid = season.valid[0, row : row + 102, col : col + 104]
    np.testing.assert_array_equal(valid, clear.repeat(2, 0).repeat(2, 1))
    # Both took part: the older where only it saw the ground.
    scl = season.scl[0, row : row + 102, col : col + 104][::2, ::2]
    np.testing.assert_array_equal(scl == 4, clear)
    dataset = open_cube(tmp_path / "b.zarr")
    assert str(dataset["offset_dn"].values[0]) == "-1000 0"
    assert str(dataset["baseline"].values[0]) == "05.11 03.01"


def test_overlapping_scenes_do_not_depend_on_the_order_of_the_items(archive: Any, tmp_path: Path):
    rng = np.random.default_rng(4)
    for name, tile, baseline in (
        ("a", "31UFS", "05.09"), ("b", "31UGS", "05.10"), ("c", "31UFT", "05.09"),
    ):  # fmt: skip
        red = rng.integers(1, 4000, (102, 104)).astype("uint16")
        red[rng.random(red.shape) < 0.3] = 0
        archive.add(name, "2019-03-01T10:50:00", pixels={"red": red},
                    scl=rng.choice([4, 9], (51, 52)).astype("uint8"),
                    properties={"grid:code": f"MGRS-{tile}",
                                "s2:processing_baseline": baseline})  # fmt: skip
    plan = plan_of(archive.location, clouds=NO_MARGIN)
    assert [scene.item for scene in plan.scenes] == ["b", "a", "c"]
    build_cube(plan, tmp_path / "one.zarr")
    archive.items.reverse()
    archive._write_catalog()
    again = plan_of(archive.location, clouds=NO_MARGIN)
    assert again.fingerprint == plan.fingerprint
    season = open_season(tmp_path / "one.zarr")
    row, col = -560004 - season.window.row, 60000 - season.window.col
    layers = []
    for name in ("b", "a", "c"):
        with rasterio.open(archive.folder / f"{name}_red.tif") as file:
            red = file.read(1).astype(int)
        with rasterio.open(archive.folder / f"{name}_scl.tif") as file:
            scl = file.read(1).repeat(2, 0).repeat(2, 1)
        layers.append((red, np.where(red == 0, 0, np.where(scl == 4, 2, 1))))
    ranks = np.stack([rank for _, rank in layers])
    first = ranks.argmax(axis=0)
    expected = np.take_along_axis(np.stack([red for red, _ in layers]), first[None], 0)[0]
    expected[ranks.max(axis=0) == 0] = FILL
    np.testing.assert_array_equal(
        season.reflectance[0, 0, row : row + 102, col : col + 104], expected
    )
    assert {0, 1, 2} == set(np.unique(first))


def test_negatives_are_kept_and_too_bright_is_never_valid(archive: Any, tmp_path: Path):
    red = FULL * 1500
    red[0, :5] = (0, 500, 33767, 40000, 65535)
    archive.add("a", "2019-03-01T10:50:00", pixels={"red": red, "nir": FULL * 1500}, scl=CLEAR,
                offset=-0.1)  # fmt: skip
    build_cube(plan_of(archive.location), tmp_path / "n.zarr")
    season = open_season(tmp_path / "n.zarr")
    row, col = -560004 - season.window.row, 60000 - season.window.col
    np.testing.assert_array_equal(
        season.reflectance[0, 0, row, col : col + 5], [FILL, -500, 32767, 32767, 32767]
    )
    np.testing.assert_array_equal(
        season.valid[0, row, col : col + 6], [False, True, True, False, False, True]
    )


def test_a_clear_pixel_beats_a_cloudy_one_and_the_preferred_scene_wins_otherwise(
    archive: Any, tmp_path: Path
):
    cloudy = CLEAR.copy()
    cloudy[:, 26:] = 9
    first, second = FULL * 1000, FULL * 2000
    first[:10] = 0
    archive.add("a", "2019-03-01T10:50:00", pixels={"red": first}, scl=cloudy,
                properties={"s2:processing_baseline": "05.11"})  # fmt: skip
    both = CLEAR.copy()
    both[40:, :] = 9
    archive.add("b", "2019-03-01T10:50:10", pixels={"red": second}, scl=both,
                properties={"grid:code": "MGRS-31UFT"})  # fmt: skip
    plan = plan_of(archive.location, clouds=NO_MARGIN)
    build_cube(plan, tmp_path / "m.zarr")
    season = open_season(tmp_path / "m.zarr")
    row, col = -560004 - season.window.row, 60000 - season.window.col
    values = season.reflectance[0, 0, row : row + 102, col : col + 104]
    expected = np.full((102, 104), 1000)
    expected[:80, 52:] = 2000  # cloudy in a, clear in b
    expected[:10] = 2000  # not measured in a
    np.testing.assert_array_equal(values, expected)
    valid = season.valid[0, row : row + 102, col : col + 104]
    assert not valid[80:, 52:].any()
    assert valid[:80].all()
    assert valid[80:, :52].all()
    assert (season.scl[0, row : row + 80, col : col + 104] == 4).all()


def test_another_zone_is_warped_and_comes_second(archive: Any, tmp_path: Path):
    archive.add("own", "2019-03-01T10:50:00", pixels={"red": FULL * 1000}, scl=CLEAR,
                properties={"s2:processing_baseline": "02.14"})  # fmt: skip
    far = np.random.default_rng(5).integers(2000, 9000, (300, 300)).astype("uint16")
    archive.add("far", "2019-03-01T10:50:10", crs="EPSG:32632", origin=(174800, 5609400),
                pixels={"red": far},
                scl=np.full((150, 150), 4, "uint8"),
                properties={"grid:code": "MGRS-32ULB"})  # fmt: skip
    region = Region.from_bbox((4.412, 50.532, 4.43, 50.544))
    plan = plan_of(archive.location, region=region, crs="EPSG:32631", layout=SMALL)
    assert [scene.item for scene in plan.scenes] == ["own", "far"]
    build_cube(plan, tmp_path / "one.zarr")
    build_cube(plan, tmp_path / "many.zarr", memory=one_shard(plan))
    season = open_season(tmp_path / "one.zarr")
    row, col = -560004 - season.window.row, 60000 - season.window.col
    values = season.reflectance[0, 0]
    own = values[max(row, 0) : row + 102, max(col, 0) : col + 104]
    assert own.size > 5000
    assert (own == 1000).all()
    assert (values == 1000).sum() == own.size
    assert (values >= 2000).sum() > 1000
    assert_equal(season, open_season(tmp_path / "many.zarr"))


# --- the laws ---


@pytest.fixture(scope="module")
def plan(planted_once: Any) -> CubePlan:
    """A grid of three by three shards, ragged at the far edges."""
    return plan_of(planted_once.location, layout=SMALL)


@pytest.fixture(scope="module")
def whole(plan: CubePlan, tmp_path_factory: pytest.TempPathFactory) -> Season:
    """The plan built in one block."""
    path = tmp_path_factory.mktemp("whole") / "whole.zarr"
    report = build_cube(plan, path)
    assert (report.shards_written, report.windows_read) == (9, 12)
    return open_season(path)


def test_blocks_do_not_show(plan: CubePlan, whole: Season, tmp_path: Path):
    blocks = plan_blocks(plan, plan.seasons[0], memory=one_shard(plan))
    report = build_cube(plan, tmp_path / "b.zarr", memory=one_shard(plan))
    assert len(blocks) == 9
    assert report.windows_read == count_reads(plan, plan.seasons[0], blocks)
    assert_equal(whole, open_season(tmp_path / "b.zarr"))


@pytest.mark.parametrize("threads", [1, 3])
def test_where_pixels_wait_does_not_show(
    plan: CubePlan, whole: Season, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
):
    # All shards in one block, with memory for one of them: the pixels read must wait on disk.
    waiting: list[int] = []
    original = Stage.take

    def looking(stage: Stage, *place: Any) -> Any:
        waiting.append(sum(file.stat().st_size for file in (tmp_path / "s").rglob("pixels")))
        return original(stage, *place)

    monkeypatch.setattr(Stage, "take", looking)
    report = build_cube(
        plan,
        tmp_path / "b.zarr",
        execution=Execution(threads=threads),
        memory=task_bytes(plan, plan.seasons[0], 144),
        scratch=tmp_path / "s",
    )
    assert report.windows_read == 12
    pixels = {"red": 2, "nir": 2, "swir16": 0.5, "scl": 0.25}
    assert min(waiting) > 3 * 102 * 104 * sum(pixels.values())
    assert list((tmp_path / "s").iterdir()) == []
    assert_equal(whole, open_season(tmp_path / "b.zarr"))


def test_little_memory_does_not_ask_servers_more_often(
    archive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # Files with blocks of 64 px, and blocks of the cube that relate to them as 2304 px to 1024 px.
    rng = np.random.default_rng(6)
    height, width = 290, 230
    archive.add(
        "S2",
        "2019-03-01T10:50:00",
        pixels={
            "red": rng.integers(1, 9000, (height, width)).astype("uint16"),
            "swir16": rng.integers(1, 9000, (height // 2, width // 2)).astype("uint16"),
        },
        scl=rng.choice([4, 9], (height // 2, width // 2)).astype("uint8"),
    )
    monkeypatch.setattr(cost, "WIDEST_BLOCK", 144)
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from _measure import range_server

    cubes = []
    for name, memory in (("little", 0), ("much", 8_000_000_000)):
        with range_server(archive.folder) as server:
            made = plan_of(f"{server.url}/catalog.json", layout=Layout(chunk=48, shard=48))
            memory = memory or task_bytes(made, made.seasons[0], 144)
            build_cube(made, tmp_path / f"{name}.zarr", memory=memory)
            asked = server.requests
        cubes.append(open_season(tmp_path / f"{name}.zarr"))
        for band, size, most in (("red", 1, 2), ("swir16", 2, 3)):
            blocks = -(-height // size // 64) * -(-width // size // 64)
            assert 0 < asked[f"S2_{band}.tif"] <= most * blocks, (name, band)
    assert_equal(*cubes)


@pytest.mark.slow
def test_workers_do_not_show(plan: CubePlan, whole: Season, tmp_path: Path):
    calls: list[tuple[int, int, str]] = []
    build_cube(
        plan,
        tmp_path / "w.zarr",
        execution=Execution(workers=2),
        memory=2 * one_shard(plan),
        progress=lambda *call: calls.append(call),
    )
    assert calls[-1] == (9, 9, "block")
    assert_equal(whole, open_season(tmp_path / "w.zarr"))


def test_every_asset_is_opened_once_per_block(
    plan: CubePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    opened: list[str] = []
    original = rasterio.open

    def counting(path: Any, *args: Any, **options: Any) -> Any:
        opened.append(str(path))
        return original(path, *args, **options)

    monkeypatch.setattr(rasterio, "open", counting)
    build_cube(plan, tmp_path / "c.zarr")
    assert len(opened) == len(set(opened)) == 12


def test_overlap_of_two_regions_is_equal(planted_once: Any, tmp_path: Path):
    seasons = []
    for name, bbox in (("w", (4.4125, 50.5365, 4.4205, 50.5440)),
                       ("e", (4.4170, 50.5350, 4.4270, 50.5425))):  # fmt: skip
        made = plan_of(planted_once.location, region=Region.from_bbox(bbox), layout=SMALL)
        build_cube(made, tmp_path / f"{name}.zarr")
        seasons.append(open_season(tmp_path / f"{name}.zarr"))
    west, east = seasons
    shared = west.window.intersection(east.window)
    assert shared.area > 1000
    assert shared not in (west.window, east.window)
    for name in ("reflectance", "valid", "scl"):
        parts = []
        for season in seasons:
            inside = shared.relative_to(season.window)
            parts.append(getattr(season, name)[..., inside.rows, inside.cols])
        np.testing.assert_array_equal(*parts)
    assert parts[0].any()


def test_seasons_built_together_equal_seasons_built_alone(planted: Any, tmp_path: Path):
    pixels = {"red": FULL * 5, "nir": FULL * 6, "swir16": FULL[:51, :52] * 7}
    planted.add("next", "2019-10-01T10:50:00", pixels=pixels, scl=CLEAR)
    build_cube(plan_of(planted.location), tmp_path / "both.zarr")
    assert list_seasons(tmp_path / "both.zarr") == ["2018-09-01", "2019-09-01"]
    snapshot = search_items(load_catalog(planted.location), time_range="2019-09-01/2020-08-31")
    build_cube(plan_cube(snapshot), tmp_path / "alone.zarr")
    assert_equal(
        open_season(tmp_path / "both.zarr", "2019-09-01"), open_season(tmp_path / "alone.zarr")
    )


# --- stopping, resuming, repeating ---


def test_a_finished_build_has_nothing_to_do(plan: CubePlan, tmp_path: Path):
    build_cube(plan, tmp_path / "r.zarr")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "r.zarr" / "2018-09-01").rglob("*")}
    report = build_cube(plan, tmp_path / "r.zarr")
    assert (report.shards_written, report.shards_kept, report.windows_read) == (0, 9, 0)
    assert "nothing to do" in str(report)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_an_interrupted_build_goes_on(
    plan: CubePlan, whole: Season, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path, written = tmp_path / "i.zarr", []
    original = block_module.write_shard

    def stop_at_fourth(season: Season, window: Any, **arrays: Any) -> None:
        if len(written) == 3:
            # Half of the shard reaches the disk before the lights go out.
            season.reflectance[:, :1, window.rows, window.cols] = 99
            raise KeyboardInterrupt
        written.append(window)
        original(season, window, **arrays)

    with monkeypatch.context() as patched:
        patched.setattr(block_module, "write_shard", stop_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            build_cube(plan, path, memory=one_shard(plan))
    assert list_seasons(path) == []
    assert (path / "2018-09-01.building").is_dir()
    with pytest.raises(CubeError, match="is unfinished"):
        open_season(path)
    # Going on with blocks of another size is the same build.
    report = build_cube(plan, path)
    assert (report.shards_written, report.shards_kept) == (6, 3)
    assert_equal(whole, open_season(path))


BUILD = """
import dataclasses, json, sys
from stcln_geo.cube import build, cost
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.plan import CubePlan
from stcln_geo.cube.snapshot import read_items
from stcln_geo.execution import Execution

if __name__ == "__main__":
    plan, path, items, memory, workers = sys.argv[1:]
    plan = CubePlan.from_json(json.load(open(plan)))
    plan = dataclasses.replace(plan, items=tuple(read_items(items)))
    # All pixels wait in scratch.
    build.task_share = lambda *_, **__: cost.TaskShare(together=1, keep=0)
    build_cube(plan, path, memory=int(memory), execution=Execution(workers=int(workers)))
"""
SLOW = """
import time
from stcln_geo.cube import block

# Dask loads this for the worker and for its nanny.
original = block.at_full_speed = getattr(block, "at_full_speed", block.write_shard)

def slow(*args, **options):
    original(*args, **options)
    time.sleep(0.5)

block.write_shard = slow
"""


def start_slow_build(
    plan: CubePlan, items: Path, path: Path, *, workers: int
) -> subprocess.Popen[bytes]:
    """Begin to build in a process group of its own, with a pause after every shard."""
    folder = path.parent
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    (folder / "slow.py").write_text(SLOW)
    (folder / "build.py").write_text(BUILD if workers else SLOW + BUILD)
    # Blocks of up to four shards.
    memory = task_bytes(plan, plan.seasons[0], 96) * max(workers, 1)
    return subprocess.Popen(
        [sys.executable, folder / "build.py", folder / "plan.json", path, items, str(memory),
         str(workers)],
        env={
            **os.environ,
            "DASK_DISTRIBUTED__WORKER__PRELOAD": str(folder / "slow.py"),
            "TMPDIR": str(scratch_of(path)),
        },
        start_new_session=True,
    )  # fmt: skip


def scratch_of(cube: Path) -> Path:
    folder = cube.with_name("temporary")
    folder.mkdir(exist_ok=True)
    return folder


def scratch_left(cube: Path) -> list[Path]:
    return list(scratch_of(cube).glob("stcln-geo-scratch-*"))


def wait_for_shards(path: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(list((path / "manifests" / "2018-09-01").glob("*.json"))) < count:
        assert time.monotonic() < deadline, "no shard in five minutes"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_killed_process_goes_on(plan: CubePlan, whole: Season, tmp_path: Path):
    path = tmp_path / "k.zarr"
    process = start_slow_build(plan, whole.cube / "items.parquet", path, workers=0)
    wait_for_shards(path, 2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list_seasons(path) == []
    assert scratch_left(path), "nobody could remove it"
    report = build_cube(plan, path, scratch=scratch_of(path))
    assert 2 <= report.shards_kept < 9
    assert scratch_left(path) == []
    assert_equal(whole, open_season(path))


@pytest.mark.slow
@pytest.mark.parametrize("all_at_once", [False, True], ids=["a-worker", "a-worker-then-all"])
def test_a_killed_worker_and_a_killed_tree_go_on(
    plan: CubePlan, whole: Season, tmp_path: Path, all_at_once: bool
):
    import psutil

    path = tmp_path / "w.zarr"
    process = start_slow_build(plan, whole.cube / "items.parquet", path, workers=2)
    wait_for_shards(path, 2)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("spawn_main" in part for part in child.cmdline())
    ]
    assert len(workers) == 2
    workers[0].kill()
    if all_at_once:
        wait_for_shards(path, 4)
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        # Who dies holds its locks until the system has taken its memory back.
        _, alive = psutil.wait_procs(family, timeout=300)
        assert not alive
        assert list_seasons(path) == []
    else:
        # Its task runs again on the other worker, and nobody has to do anything.
        assert process.wait(120) == 0
    report = build_cube(plan, path, scratch=scratch_of(path))
    assert 4 <= report.shards_kept <= 9
    assert report.shards_kept < 9 or not all_at_once
    assert scratch_left(path) == []
    assert_equal(whole, open_season(path))
    assert not list(path.glob("*.building"))


def test_a_killed_build_goes_on_with_the_items_it_began_with(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import dataclasses

    request = {"catalog": "x", "time": None}
    plan = dataclasses.replace(plan_of(planted.location), request=request)

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(block_module, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            build_cube(plan, tmp_path / "u.zarr")
    stored = unfinished_plan(tmp_path / "u.zarr", request)
    assert stored == plan
    assert unfinished_plan(tmp_path / "u.zarr", {"catalog": "y"}) is None
    assert stored is not None
    build_cube(stored, tmp_path / "u.zarr")
    assert unfinished_plan(tmp_path / "u.zarr", request) is None
    assert {item["id"] for item in read_items(tmp_path / "u.zarr" / "items.parquet")} == {
        "S2_0", "S2_1", "S2_2",
    }  # fmt: skip


def test_another_plan_is_refused_and_overwritten_on_demand(planted_once: Any, tmp_path: Path):
    path = tmp_path / "p.zarr"
    build_cube(plan_of(planted_once.location, bands=("red", "nir")), path)
    other = plan_of(planted_once.location, bands=("nir",))
    with pytest.raises(CubeError, match=r"its bands are red, nir.*--overwrite"):
        build_cube(other, path)
    colder = plan_of(planted_once.location, bands=("red", "nir"), resampling="nearest")
    with pytest.raises(CubeError, match="its resampling is bilinear"):
        build_cube(colder, path)
    assert open_season(path).bands == ("red", "nir")
    build_cube(other, path, overwrite=True)
    assert open_season(path).bands == ("nir",)


@pytest.mark.parametrize("name", ["build.json", "zarr.json"])
def test_only_cubes_are_replaced(plan: CubePlan, tmp_path: Path, name: str):
    """Other programs write a build.json, and Zarr groups that are no cubes."""
    (tmp_path / name).write_text("{}")
    (tmp_path / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds other files"):
            build_cube(plan, tmp_path, overwrite=overwrite)
    assert {entry.name for entry in tmp_path.iterdir()} == {name, "thesis.txt"}


def test_killed_before_the_plan_was_written_goes_on(plan: CubePlan, tmp_path: Path):
    path = tmp_path / "p.zarr"
    path.mkdir()
    write_items(path / "items.parquet", plan.items, plan.queries)
    (path / ".build.json.0123456789ab.part").write_text("{")
    assert build_cube(plan, path).shards_written > 0


def test_places_that_cannot_hold_a_cube_are_named(plan: CubePlan, tmp_path: Path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="it is a file"):
        build_cube(plan, file)
    with pytest.raises(OutputError, match="Cannot write to"):
        build_cube(plan, file / "x.zarr")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="holds other files"):
            build_cube(plan, tmp_path / "full", overwrite=overwrite)
    with pytest.raises(InputError, match="needs"):
        build_cube(plan, tmp_path / "no.zarr", memory=1)
    assert not (tmp_path / "no.zarr").exists()


# --- assets that cannot be read ---


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stcln_geo.cube.read._PAUSE_SECONDS", 0.0)


def test_a_missing_asset_stops_the_build_and_can_be_put_back(
    planted: Any, whole: Season, tmp_path: Path
):
    path = tmp_path / "m.zarr"
    plan = plan_of(planted.location, layout=SMALL)
    lost = planted.folder / "S2_1_swir16.tif"
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(TaskError, match=r"S2_1 swir16: gone after 1 attempts.*--on-error skip"):
        build_cube(plan, path, memory=one_shard(plan))
    assert list_seasons(path) == []
    entries = read_ledger(path / "ledger.jsonl")
    assert {(entry.item, entry.asset, entry.kind) for entry in entries} == {
        ("S2_1", "swir16", "gone")
    }
    assert 1 <= len(entries) <= 9

    lost.write_bytes(content)
    build_cube(plan, path)
    assert_equal(whole, open_season(path))


def test_a_broken_asset_is_skipped_on_demand(planted: Any, whole: Season, tmp_path: Path):
    path = tmp_path / "s.zarr"
    broken = planted.folder / "S2_1_nir.tif"
    broken.write_bytes(broken.read_bytes()[:600])
    failing = plan_of(planted.location, layout=SMALL)
    with pytest.raises(TaskError, match=r"S2_1 nir: corrupt after 2 attempts"):
        build_cube(failing, path)
    skipping = plan_of(planted.location, layout=SMALL, on_error="skip")
    report = build_cube(skipping, path)
    assert [(entry.item, entry.asset) for entry in report.failures] == [("S2_1", "nir")]
    season = open_season(path)
    assert not season.valid[1].any()
    assert (season.reflectance[1] == FILL).all()
    for index in (0, 2):
        np.testing.assert_array_equal(season.reflectance[index], whole.reflectance[index])
        np.testing.assert_array_equal(season.valid[index], whole.valid[index])
    manifest = json.loads((path / "manifests" / "2018-09-01" / "0_0.json").read_text())
    assert manifest["left_out"] == ["S2_1"]


# --- pictures ---


def test_previews(whole: Season, tmp_path: Path):
    from PIL import Image

    sheet = write_preview(whole.cube, tmp_path / "sheet.png")
    one = write_preview(whole.cube, tmp_path / "deep" / "one.png", date="2019-03-11")
    height, width = (-(-size // 16) for size in whole.shape_yx)
    with Image.open(one) as picture:
        factor = 1200 // max(height, width)
        assert picture.size == (width * factor, height * factor)
        values = np.asarray(picture)[::factor, ::factor]
    np.testing.assert_array_equal(values, np.moveaxis(whole.overview[1], 0, -1))
    with Image.open(sheet) as picture:
        assert picture.size[0] > picture.size[1]
    with pytest.raises(InputError, match="It has: 2019-03-01, 2019-03-11, 2019-04-30"):
        write_preview(whole.cube, tmp_path / "x.png", date="2020-01-01")
    with pytest.raises(InputError, match=r"sheet\.jpg: it is a PNG"):
        write_preview(whole.cube, tmp_path / "sheet.jpg")
