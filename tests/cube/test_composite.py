"""Composites: numpy's numbers, on one calendar, whatever the blocks and workers."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import composite as composite_module
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.calendar import period_index, season_periods
from stcln_geo.cube.clouds import CloudSpec
from stcln_geo.cube.composite import UNKNOWN_COVER, compose
from stcln_geo.cube.contract import FILL, NO_DAY, validate_cube
from stcln_geo.cube.cost import MERGE_BYTES, task_bytes
from stcln_geo.cube.dataset import open_cube
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.replace import open_old
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import Season, open_season
from stcln_geo.execution import Execution
from stcln_geo.grid import tiles
from stcln_geo.region import Region

SMALL = Layout(chunk=16, shard=48)
METHODS = ("median", "medoid", "least-cloudy")
PERIODS = ("P5D", "P10D", "P16D", "P1M")

# --- the calendar ---


@pytest.mark.parametrize("season", ["2018-09-01", "2019-09-01", "2020-01-01", "2019-03-15"])
@pytest.mark.parametrize(
    ("period", "count", "length"), [("P5D", 73, 5), ("P10D", 37, 10), ("P16D", 23, 16)]
)
def test_periods_partition_every_season_alike(season: str, period: Any, count: int, length: int):
    spans = season_periods(season, period)
    assert len(spans) == count
    assert str(spans[0].start) == season
    assert all(one.end == following.start for one, following in itertools.pairwise(spans))
    sizes = [int((span.end - span.start).astype(int)) for span in spans]
    assert set(sizes[:-1]) == {length}
    assert sum(sizes) in (365, 366)
    assert str(spans[-1].end)[5:] == season[5:]


def test_months_are_those_of_the_calendar():
    spans = season_periods("2019-09-01", "P1M")
    assert [str(span.start) for span in spans][4:7] == ["2020-01-01", "2020-02-01", "2020-03-01"]
    assert len(spans) == 12
    assert str(spans[5].last) == "2020-02-29"
    # A season from the middle of a month begins and ends with a part of it.
    cut = season_periods("2019-09-15", "P1M")
    assert len(cut) == 13
    assert [str(day) for day in (cut[0].last, cut[-1].start, cut[-1].last)] == [
        "2019-09-30", "2020-09-01", "2020-09-14",
    ]  # fmt: skip


def test_the_middle_of_a_period_lies_in_it_and_each_day_belongs_to_one():
    for period in PERIODS:
        spans = season_periods("2019-09-01", period)  # type: ignore[arg-type]
        for index, span in enumerate(spans):
            before = span.middle - span.start
            assert before == span.end.astype("datetime64[s]") - span.middle
            assert span.start <= span.last < span.end == span.last + np.timedelta64(1, "D")
            for day in np.arange(span.start, span.end):
                assert period_index(spans, day) == index
    assert period_index(spans, np.datetime64("2019-08-31")) == 0
    assert period_index(spans, np.datetime64("2020-09-01")) == len(spans) - 1


# --- the kernels, against one pixel at a time ---


def expect(
    method: str,
    values: np.ndarray,
    valid: np.ndarray,
    cover: np.ndarray,
    preference: list[int],
    days: np.ndarray,
) -> tuple[np.ndarray, int, int]:
    """Merge one pixel, (N, C) and (N,), by the words of the documentation."""
    clear = np.flatnonzero(valid)
    if not len(clear):
        return np.full(values.shape[1], FILL), 0, NO_DAY
    median = np.floor(np.median(values[clear].astype(float), axis=0))
    if method == "median":
        return median, len(clear), math.floor(days[clear].mean() + 0.5)
    if method == "medoid":
        distances = ((values[clear].astype(float) - median) ** 2).sum(axis=1)
        chosen = clear[np.argmin(distances)]
        return values[chosen], len(clear), days[chosen]
    chosen = min((day for day in preference if valid[day]), key=lambda day: cover[day])
    return values[chosen], len(clear), days[chosen]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("days", [1, 2, 5, 8])
@pytest.mark.parametrize("strip", [1, 200, 10**6], ids=["row", "rows", "whole"])
def test_kernels_equal_numpy(method: Any, days: int, strip: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(composite_module, "STRIP_VALUES", strip)
    rng = np.random.default_rng(days)
    shape = (11, 13)
    # Few distinct numbers, so that ties and pairs of middle values occur; and the extremes.
    values = rng.choice(
        np.array([-32767, -31, -30, 0, 7, 8, 2000, 32767], dtype=np.int16), (days, 3, *shape)
    )
    valid = rng.random((days, *shape)) < 0.6
    values[:, 0][~valid] = rng.choice([FILL, 12345], (~valid).sum())
    cover = rng.choice([0, 100, 10000, UNKNOWN_COVER], (days, *shape)).astype("uint16")
    preference = [int(day) for day in rng.permutation(days)]
    numbers = np.sort(rng.choice(np.arange(-15, 16), days, replace=False))
    got = compose(method, values, valid, days=list(numbers), cover=cover, preference=preference)
    assert got.reflectance.dtype == np.int16
    assert got.day.dtype == np.int8
    assert got.observations.dtype == np.uint8
    for row, col in np.ndindex(shape):
        spectrum, count, day = expect(
            method, values[..., row, col], valid[:, row, col], cover[:, row, col], preference,
            numbers,
        )  # fmt: skip
        np.testing.assert_array_equal(got.reflectance[:, row, col], spectrum)
        assert got.observations[row, col] == count
        assert got.day[row, col] == day
    assert 0 < (got.observations == 0).sum() < got.observations.size or days > 5


def test_a_medoid_is_always_an_observation_and_ties_go_to_the_earliest():
    values = np.array([10, 20, 30, 40], dtype=np.int16).reshape(4, 1, 1, 1)
    valid = np.ones((4, 1, 1), dtype=bool)
    # The median is 25: 20 and 30 are equally near.
    assert compose("median", values, valid).reflectance.item() == 25
    assert compose("medoid", values, valid).reflectance.item() == 20
    assert compose("medoid", values[::-1], valid).reflectance.item() == 30


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("days", [1, 12])
def test_kernels_take_no_more_memory_than_the_plan_says(
    method: Any, days: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(composite_module, "STRIP_VALUES", 60_000)
    values = np.ones((days, 10, 203, 301), dtype=np.int16)
    valid = np.ones((days, 203, 301), dtype=bool)
    cover = np.zeros(valid.shape, dtype=np.uint16)
    tracemalloc.start()
    merged = compose(method, values, valid, cover=cover)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    kept = merged.reflectance.nbytes + merged.observations.nbytes + merged.day.nbytes
    # Rows are not split: one more of them may be worked on.
    assert peak - kept <= MERGE_BYTES * (60_000 + days * 301)


# --- building ---

FULL = np.ones((102, 104), dtype="uint16")
DAYS = ("2019-03-01", "2019-03-04", "2019-03-06", "2019-03-11", "2019-03-14", "2019-03-29",
        "2019-05-03")  # fmt: skip
# The second day is as cloudy as the first and the third, and nearest to its period's middle.
COVERS = (3.25, 3.25, 3.25, None, 80.0, 12.0, 1.0)


@pytest.fixture(scope="module")
def cloudy(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Seven days with many clouds; on the second, two scenes of two offsets cover a half each."""
    from .conftest import Archive

    archive = Archive(tmp_path_factory.mktemp("cloudy") / "archive")
    rng = np.random.default_rng(3)

    def layers() -> dict[str, np.ndarray]:
        return {
            "red": rng.integers(1, 4000, (102, 104)).astype("uint16"),
            "nir": rng.integers(1, 9000, (102, 104)).astype("uint16"),
            "swir16": rng.integers(1, 6000, (51, 52)).astype("uint16"),
        }

    def sky() -> np.ndarray:
        return rng.choice([4, 5, 9], (51, 52), p=[0.3, 0.3, 0.4]).astype("uint8")

    for number, (day, cover) in enumerate(zip(DAYS, COVERS, strict=True)):
        told = {} if cover is None else {"eo:cloud_cover": cover}
        pixels = layers()
        if number == 1:
            halves = pixels, layers()
            for band, array in pixels.items():
                middle = array.shape[1] // 2
                array[:, middle:] = 0
                halves[1][band][:, :middle] = 0
            archive.add("S_1_east", f"{day}T10:50:20", pixels=halves[1], scl=sky(), offset=-0.1,
                        properties={"eo:cloud_cover": 90.0, "grid:code": "MGRS-31UGS",
                                    "s2:processing_baseline": "04.00"})  # fmt: skip
        archive.add(f"S_{number}", f"{day}T10:50:00", pixels=pixels, scl=sky(), properties=told)
    return archive


def plan_of(archive: Any, *, region: Region | None = None, **choices: Any) -> CubePlan:
    snapshot = search_items(load_catalog(archive.location), region=region)
    clouds = CloudSpec(cloud_margin=1, shadow_margin=0)
    return plan_cube(snapshot, region, CubeSpec(clouds=clouds, layout=SMALL, **choices))


def one_shard(plan: CubePlan) -> int:
    return task_bytes(plan, plan.seasons[0], SMALL.shard)


@pytest.fixture(scope="module")
def every_day(cloudy: Any, tmp_path_factory: pytest.TempPathFactory) -> Season:
    path = tmp_path_factory.mktemp("days") / "days.zarr"
    build_cube(plan_of(cloudy), path)
    return open_season(path)


def assert_equal(first: Season, second: Season) -> None:
    np.testing.assert_array_equal(first.time, second.time)
    for name in ("reflectance", "valid", "observations", "day_offset", "coverage", "overview"):
        np.testing.assert_array_equal(
            getattr(first, name)[:], getattr(second, name)[:], err_msg=name
        )


@pytest.mark.parametrize(
    ("method", "period"),
    [
        pytest.param("median", "P10D", marks=pytest.mark.slow),
        ("medoid", "P1M"),
        pytest.param("least-cloudy", "P10D", marks=pytest.mark.slow),
    ],
)
def test_a_composite_cube_is_the_composite_of_the_cube_of_all_days(
    cloudy: Any, every_day: Season, tmp_path: Path, method: Any, period: Any
):
    plan = plan_of(cloudy, composite=method, period=period)
    build_cube(plan, tmp_path / "c.zarr")
    season = open_season(tmp_path / "c.zarr")
    spans = season_periods("2018-09-01", period)
    assert [str(time)[:19] for time in season.time] == [str(span.middle) for span in spans]
    np.testing.assert_array_equal(
        season.days, [(span.middle - spans[0].start).astype("timedelta64[D]").astype(int)
                      for span in spans]
    )  # fmt: skip
    assert season.scl is None

    values, valid = every_day.reflectance[:], every_day.valid[:]
    member = np.array([period_index(spans, time.astype("datetime64[D]"))
                       for time in every_day.time])  # fmt: skip
    scene_cover = np.array([UNKNOWN_COVER if c is None else round(c * 100) for c in COVERS])
    cover = np.broadcast_to(scene_cover[:, None, None], valid.shape).astype("uint16").copy()
    east = 60052 - every_day.window.col
    cover[1, :, east:] = 9000
    merged = 0
    for index, span in enumerate(spans):
        days = np.flatnonzero(member == index)
        if not len(days):
            assert (season.reflectance[index] == FILL).all()
            assert not season.valid[index].any()
            assert not season.observations[index].any()
            assert (season.day_offset[index] == NO_DAY).all()
            continue
        merged += len(days) > 1
        away = [abs(every_day.time[day].astype("datetime64[D]") + np.timedelta64(12, "h")
                    - span.middle.astype("datetime64[ns]")) for day in days]  # fmt: skip
        preference = sorted(range(len(days)), key=lambda position, away=away: away[position])
        since = (every_day.time[days].astype("datetime64[D]") - spans[0].start).astype(int)
        expected = compose(
            method, values[days], valid[days], days=list(since - season.days[index]),
            cover=cover[days], preference=preference,
        )  # fmt: skip
        np.testing.assert_array_equal(
            season.reflectance[index], expected.reflectance, err_msg=str(span)
        )
        np.testing.assert_array_equal(season.day_offset[index], expected.day)
        np.testing.assert_array_equal(season.observations[index], valid[days].sum(axis=0))
        np.testing.assert_array_equal(season.valid[index], valid[days].any(axis=0))
    assert merged
    errors, warnings = validate_cube(open_cube(tmp_path / "c.zarr", mask_and_scale=False))
    assert (errors, warnings) == ([], [])


@pytest.mark.parametrize(
    "method",
    [one if one == "medoid" else pytest.param(one, marks=pytest.mark.slow) for one in METHODS],
)
def test_blocks_do_not_show(cloudy: Any, tmp_path: Path, method: str):
    plan = plan_of(cloudy, composite=method, period="P10D")
    assert build_cube(plan, tmp_path / "one.zarr").shards_written == 9
    build_cube(plan, tmp_path / "many.zarr", memory=one_shard(plan))
    whole = open_season(tmp_path / "one.zarr")
    assert (whole.observations[:] > 1).any()
    assert_equal(whole, open_season(tmp_path / "many.zarr"))


@pytest.mark.slow
def test_workers_do_not_show(cloudy: Any, tmp_path: Path):
    plan = plan_of(cloudy, composite="medoid", period="P1M")
    build_cube(plan, tmp_path / "one.zarr")
    two = Execution(workers=2)
    build_cube(plan, tmp_path / "two.zarr", execution=two, memory=2 * one_shard(plan))
    assert_equal(open_season(tmp_path / "one.zarr"), open_season(tmp_path / "two.zarr"))


@pytest.mark.parametrize("method", METHODS)
def test_days_are_those_of_the_observations(
    cloudy: Any, every_day: Season, tmp_path: Path, method: Any
):
    """Look the stored day up among the days of the cube that keeps them all."""
    build_cube(plan_of(cloudy, composite=method, period="P1M"), tmp_path / "d.zarr")
    cube = open_cube(tmp_path / "d.zarr", mask_and_scale=False)
    day = cube["days"] + cube["day_offset"].astype("int32")
    march = 6
    assert str(cube["solar_days"].values[march]).split() == list(DAYS[:6])
    assert str(cube["solar_days"].values[march + 1]) == ""
    found, some = day[march].to_numpy(), cube["valid"][march].to_numpy()
    shown, clear = every_day.reflectance[:], every_day.valid[:]
    if method == "median":
        count = clear[:6].sum(axis=0)
        mean = (clear[:6] * every_day.days[:6, None, None]).sum(axis=0) / np.maximum(count, 1)
        assert np.abs(found - mean)[some].max() <= 0.5
        return
    for row, col in np.argwhere(some)[::97]:
        (source,) = np.flatnonzero(every_day.days == found[row, col])
        assert clear[source, row, col]
        np.testing.assert_array_equal(
            shown[source, :, row, col], cube["reflectance"][march, :, row, col]
        )


def test_an_older_cube_without_days_is_not_mixed_with_one_that_has_them(
    cloudy: Any, tmp_path: Path
):
    """An append takes no shard over from a season that lacks an array of the new one."""
    import shutil

    path, plan = tmp_path / "o.zarr", plan_of(cloudy, composite="median", period="P1M")
    build_cube(plan, path)
    new, season_plan = open_season(path), plan.seasons[0]
    assert open_old(new, plan, season_plan) is not None
    shutil.rmtree(path / new.name / "day_offset")
    assert open_season(path).day_offset is None
    assert open_old(new, plan, season_plan) is None


def test_regions_do_not_show(cloudy: Any, tmp_path: Path):
    seasons = []
    for name, bbox in (("w", (4.4125, 50.5365, 4.4205, 50.5440)),
                       ("e", (4.4170, 50.5350, 4.4270, 50.5425))):  # fmt: skip
        plan = plan_of(
            cloudy, region=Region.from_bbox(bbox), composite="least-cloudy", period="P10D"
        )
        build_cube(plan, tmp_path / f"{name}.zarr")
        seasons.append(open_season(tmp_path / f"{name}.zarr"))
    west, east = seasons
    np.testing.assert_array_equal(west.time, east.time)
    shared = west.window.intersection(east.window)
    assert shared.area > 1000
    assert shared not in (west.window, east.window)
    for name in ("reflectance", "valid", "observations", "day_offset"):
        parts = []
        for season in seasons:
            inside = shared.relative_to(season.window)
            parts.append(getattr(season, name)[..., inside.rows, inside.cols])
        np.testing.assert_array_equal(*parts)
        assert parts[0].any()


def test_a_block_holds_the_days_of_one_period_only(
    cloudy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from stcln_geo.cube import merge

    held: list[int] = []
    original = merge.compose

    def counting(method: Any, reflectance: np.ndarray, *args: Any, **options: Any) -> Any:
        assert reflectance.base is not None
        held.append(len(reflectance.base))
        return original(method, reflectance, *args, **options)

    monkeypatch.setattr(merge, "compose", counting)
    plan = plan_of(cloudy, composite="median", period="P10D")
    build_cube(plan, tmp_path / "h.zarr")
    assert [len(date.days()) for date in plan.seasons[0].dates if date.scenes] == [3, 2, 1, 1]
    shards = len(tiles(plan.window.shape_yx, SMALL.shard))
    assert held == [3] * 4 * shards
    thinner = plan_of(cloudy, composite="median", period="P5D")
    dates = len(plan.seasons[0].dates), len(thinner.seasons[0].dates)
    assert dates == (37, 73)
    assert one_shard(plan) < one_shard(thinner)


def test_a_scene_that_cannot_be_read_is_left_out_of_its_period(
    planted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stcln_geo.cube.read._PAUSE_SECONDS", 0.0)
    choices = {"composite": "median", "period": "P1M"}
    alone = [item for item in planted.items if item["id"] != "S2_1"]
    (planted.folder / "S2_1_nir.tif").unlink()
    build_cube(plan_of(planted, on_error="skip", **choices), tmp_path / "skipped.zarr")
    planted.items = alone
    planted._write_catalog()
    build_cube(plan_of(planted, **choices), tmp_path / "without.zarr")
    assert_equal(open_season(tmp_path / "skipped.zarr"), open_season(tmp_path / "without.zarr"))


def test_plans_of_composites_survive_the_disk_and_tell_what_they_do(cloudy: Any):
    plan = plan_of(cloudy, composite="least-cloudy", period="P1M")
    back = CubePlan.from_json(plan.to_json())
    assert back == plan
    assert back.fingerprint == plan.fingerprint
    assert plan.fingerprint != plan_of(cloudy, composite="median", period="P1M").fingerprint
    text = str(plan)
    assert "least-cloudy of the clear observations in each period (P1M" in text
    assert "10 of 12 periods have no scene" in text
    assert plan.seasons[0].gaps == [("2019-03-29", "2019-05-03", 35)]


def test_a_composite_that_contradicts_its_counts_is_found(cloudy: Any, tmp_path: Path):
    build_cube(plan_of(cloudy, composite="median", period="P1M"), tmp_path / "v.zarr")
    cube = open_cube(tmp_path / "v.zarr", mask_and_scale=False)
    broken = cube.assign(observations=cube["observations"] * 0)
    assert "'valid' and 'observations' disagree" in " ".join(validate_cube(broken)[0])
    undated = cube.assign(day_offset=cube["day_offset"] * 0)
    assert "'valid' and 'day_offset' disagree" in " ".join(validate_cube(undated)[0])
    assert validate_cube(cube.drop_vars("day_offset")) == ([], [])
    wrong = cube.assign(observations=cube["observations"].astype("int32"))
    assert "'observations' has the dtype int32" in " ".join(validate_cube(wrong)[0])


def test_the_commands_take_composites(cloudy: Any, tmp_path: Path, capsys: Any):
    out = str(tmp_path / "c.zarr")
    common = ["--catalog", cloudy.location, "--composite", "median", "--period", "P1M", out]
    assert invoke(["cube", "plan", *common]) == 0
    assert "12 dates, 2018-09-16 to 2019-08-16" in capsys.readouterr().out
    assert invoke(["cube", "build", *common]) == 0
    assert invoke(["cube", "build", *common]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert invoke(["cube", "info", out]) == 0
    assert "median of each P1M" in capsys.readouterr().out
    assert invoke(["cube", "validate", out]) == 0
    dataset = open_cube(out)
    assert str(dataset["period_start"].values[6]) == "2019-03-01"
    assert str(dataset["period_end"].values[6]) == "2019-03-31"
    assert str(dataset["item_ids"].values[6]).split() == [
        "S_0", "S_1", "S_1_east", "S_2", "S_3", "S_4", "S_5",
    ]  # fmt: skip
    assert invoke(["cube", "plan", *common[:4], out]) == 2
    assert "Give --period" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_composites_train_and_predict(tmp_path: Path, capsys: Any):
    archive, cube, run = (str(tmp_path / name) for name in ("archive", "c.zarr", "run"))
    assert invoke(["simulate", archive, "--size", "128x96", "--dates", "14"]) == 0
    build = ["cube", "build", "--catalog", archive, "--composite", "medoid", "--period", "P1M"]
    assert invoke([*build, cube]) == 0
    season = open_season(cube)
    assert season.observations[:].max() > 1
    options = ["--steps", "2", "--preset", "tiny", "--batch-size", "4", "--workers", "1"]
    assert invoke(["pretrain", cube, "--out", run, *options]) == 0
    assert "validation_loss" in capsys.readouterr().out

    fields = str(tmp_path / "archive" / "parcels.gpkg")
    assert invoke(["labels", "burn", cube, fields, "--column", "crop_code"]) == 0
    assert invoke(["labels", "split", cube, "--by", "field", "--seed", "0"]) == 0
    tuned, product = str(tmp_path / "tuned"), tmp_path / "map"
    assert invoke(["finetune", cube, "--out", tuned, "--init", run, *options]) == 0
    assert invoke(["predict", cube, "--checkpoint", tuned, "--out", str(product)]) == 0
    with rasterio.open(product / "classes.tif") as source:
        classes = source.read(1)
    assert classes.shape == (96, 128)
    assert (classes != 255).mean() > 0.9
