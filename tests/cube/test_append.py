"""Appending: as if built at once, old files untouched, nothing read twice."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import block as block_module
from stcln_geo.cube import replace as replace_module
from stcln_geo.cube import store as store_module
from stcln_geo.cube.append import append_cube, plan_append
from stcln_geo.cube.build import BuildReport, build_cube, unfinished_plan
from stcln_geo.cube.contract import validate_cube
from stcln_geo.cube.cost import task_bytes
from stcln_geo.cube.dataset import open_cube
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.lock import cube_lock
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import (
    FieldTable,
    list_seasons,
    open_season,
    write_fields,
    write_split,
)
from stcln_geo.errors import CubeError, InputError, TaskError
from stcln_geo.execution import Execution
from stcln_geo.legend import Legend

SMALL = Layout(chunk=16, shard=48)
ASSETS = 4
"""red, nir, swir16 and scl."""
DAYS = ("2016-10-02", "2017-05-01", "2018-03-03", "2018-08-31", "2018-09-01", "2019-04-04",
        "2019-06-21")  # fmt: skip
"""Two, two and three dates of three seasons; two beside the line between seasons."""


def scene(archive: Any, name: str, day: str, **choices: Any) -> None:
    """Add a planted scene; its pixels are drawn from its name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    height, width = choices.pop("shape", (102, 104))
    scl = rng.choice([4, 5, 9], p=[0.6, 0.35, 0.05], size=(height // 2, width // 2))
    archive.add(
        name,
        f"{day}T10:50:0{choices.pop('second', seed % 10)}",
        pixels={
            "red": rng.integers(1, 4000, (height, width)).astype("uint16"),
            "nir": rng.integers(1, 9000, (height, width)).astype("uint16"),
            "swir16": rng.integers(1, 6000, (height // 2, width // 2)).astype("uint16"),
        },
        scl=scl.astype("uint8"),
        **choices,
    )


CORNER = {"shape": (30, 30), "properties": {"grid:code": "MGRS-31UFT"}}
"""A scene of another tile that meets the first shard only."""


@pytest.fixture
def years(archive: Any) -> Any:
    """Seven scenes that a test may change."""
    for day in DAYS:
        scene(archive, f"S2_{day}", day)
    return archive


@pytest.fixture(scope="module")
def once(planted_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cube of all seven scenes, built at once from another copy of the archive."""
    copy = type(planted_once)(tmp_path_factory.mktemp("once") / "archive")
    for day in DAYS:
        scene(copy, f"S2_{day}", day)
    path = copy.folder.parent / "once.zarr"
    build_until(copy, path, "2019-08-31")
    return path


def plan_until(archive: Any, until: str, **choices: Any) -> CubePlan:
    span = f"2016-09-01/{until}"
    snapshot = search_items(load_catalog(archive.location), time_range=span)
    plan = plan_cube(snapshot, spec=CubeSpec(**{"layout": SMALL, **choices}))
    request = {"catalog": archive.location, "collection": None, "region": None, "time": span}
    return dataclasses.replace(plan, request=request)


def build_until(archive: Any, path: Path, until: str, **choices: Any) -> BuildReport:
    return build_cube(plan_until(archive, until, **choices), path)


def one_shard(plan: CubePlan) -> int:
    return max(task_bytes(plan, season, season.layout.shard) for season in plan.seasons)


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Return time and hash of every file."""
    return {
        str(file.relative_to(folder)): (
            file.stat().st_mtime_ns,
            hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        for file in folder.rglob("*")
        if file.is_file()
    }


def assert_same_cube(first: Path, second: Path) -> None:
    """All seasons are equal: every array, every coordinate, the layout."""
    assert list_seasons(first) == list_seasons(second)
    for name in list_seasons(first):
        one, two = open_season(first, name), open_season(second, name)
        assert (one.layout, one.bands, one.geobox) == (two.layout, two.bands, two.geobox)
        assert one.attrs["fingerprint"] == two.attrs["fingerprint"]
        for array in ("reflectance", "valid", "scl", "coverage", "overview"):
            np.testing.assert_array_equal(getattr(one, array)[:], getattr(two, array)[:], array)
        left = open_cube(first, name, mask_and_scale=False)
        right = open_cube(second, name, mask_and_scale=False)
        for key in left.coords:
            np.testing.assert_array_equal(left[key].values, right[key].values, str(key))
        assert validate_cube(left)[0] == []


# --- the law ---


def test_season_by_season_equals_at_once(years: Any, once: Path, tmp_path: Path):
    path = tmp_path / "grown.zarr"
    reads = build_until(years, path, "2017-08-31").windows_read
    assert reads == 2 * ASSETS
    for until, dates in (("2018-08-31", 2), ("2019-08-31", 3)):
        before = {name: files(path / name) for name in list_seasons(path)}
        manifests = {name: files(path / "manifests" / name) for name in before}
        todo = plan_append(path, until)
        assert [(change.is_new, change.new_dates) for change in todo.changes] == [(True, dates)]
        report = append_cube(path, until)
        assert report.windows_read == dates * ASSETS == todo.changes[0].reads
        for name, held in before.items():
            assert files(path / name) == held
            assert files(path / "manifests" / name) == manifests[name]
    assert_same_cube(path, once)
    assert not list(path.glob("*.building"))


def test_within_a_season_only_new_dates_are_read(years: Any, once: Path, tmp_path: Path):
    path = tmp_path / "grown.zarr"
    build_until(years, path, "2018-04-01")
    closed = files(path / "2016-09-01")
    # The day that completes the current season, and one that also begins the next.
    first = append_cube(path, "2018-08-31")
    assert [(c.name, c.is_new, c.new_dates, c.changed_dates) for c in first.changes] == [
        ("2017-09-01", False, 1, 0)
    ]
    assert first.windows_read == ASSETS
    second = append_cube(path, "2019-04-30")
    assert second.windows_read == 2 * ASSETS
    third = append_cube(path, "2019-08-31")
    assert third.windows_read == ASSETS
    assert_same_cube(path, once)
    assert files(path / "2016-09-01") == closed


@pytest.mark.slow
def test_workers_append_the_same(years: Any, once: Path, tmp_path: Path):
    path = tmp_path / "w.zarr"
    build_until(years, path, "2018-04-01")
    memory = 2 * one_shard(plan_append(path, "2019-08-31").plan)
    append_cube(path, "2019-08-31", execution=Execution(workers=2), memory=memory)
    assert_same_cube(path, once)


@pytest.mark.slow
def test_blocks_of_an_append_read_only_new_dates(years: Any, once: Path, tmp_path: Path):
    path = tmp_path / "g.zarr"
    build_until(years, path, "2019-05-01")
    plan = plan_append(path, "2019-08-31").plan
    report = append_cube(path, "2019-08-31", memory=one_shard(plan))
    # Nine blocks of one shard read one date's assets each, and no other date's.
    assert report.windows_read == 9 * ASSETS
    assert_same_cube(path, once)


@pytest.mark.slow
def test_the_layout_may_change_with_the_number_of_dates(
    years: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def by_dates(dates: int, *_: Any) -> Layout:
        return SMALL if dates > 2 else Layout(chunk=32, shard=64)

    monkeypatch.setattr("stcln_geo.cube.plan.plan_layout", by_dates)
    path = tmp_path / "g.zarr"
    build_until(years, path, "2019-05-01", layout=None)
    assert open_season(path, "2018-09-01").layout.shard == 64
    report = append_cube(path, "2019-08-31")
    assert report.windows_read == ASSETS
    build_until(years, tmp_path / "once.zarr", "2019-08-31", layout=None)
    assert open_season(path, "2018-09-01").layout == SMALL
    assert_same_cube(path, tmp_path / "once.zarr")


# --- nothing new, something lost, something made anew ---


def test_nothing_new_reads_and_writes_nothing(
    years: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "n.zarr"
    build_until(years, path, "2019-06-30")

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a pixel is read")

    monkeypatch.setattr(rasterio, "open", refuse)
    before = files(path)
    same = append_cube(path, "2019-06-30")
    assert (same.changes, same.build, same.windows_read) == ((), None, 0)
    assert files(path) == before
    later = append_cube(path, "2021-08-31")
    assert (later.changes, later.windows_read) == ((), 0)
    after = files(path)
    del before["build.json"], after["build.json"]
    assert after == before
    with pytest.raises(InputError, match=r"already searched until 2021-08-31.*later date"):
        append_cube(path, "2021-08-30")


@pytest.mark.parametrize("span", [None, "2016-09-01/..", "../.."], ids=["none", "open", "both"])
def test_a_cube_without_an_end_loses_no_date(
    years: Any, once: Path, tmp_path: Path, span: str | None
):
    path = tmp_path / "o.zarr"
    plan = plan_until(years, "2019-08-31")
    build_cube(dataclasses.replace(plan, request={**plan.request, "time": span}), path)
    before = files(path)

    with pytest.raises(InputError, match=r"holds scenes until 2019-06-21T.*later date"):
        append_cube(path, "2019-05-01")

    assert files(path) == before
    assert append_cube(path, "2019-06-21").changes == ()
    assert_same_cube(path, once)


@pytest.mark.slow
def test_a_scene_that_the_catalog_lost_stays(years: Any, once: Path, tmp_path: Path):
    path = tmp_path / "l.zarr"
    build_until(years, path, "2019-05-01")
    years.items = [item for item in years.items if "2019-04-04" not in item["id"]]
    years._write_catalog()
    report = append_cube(path, "2019-08-31")
    assert report.windows_read == ASSETS
    assert_same_cube(path, once)


@pytest.mark.slow
def test_a_scene_processed_anew_rebuilds_the_shards_it_touches(years: Any, tmp_path: Path):
    scene(years, "corner_1", "2019-04-04", second=9, **CORNER)
    path = tmp_path / "p.zarr"
    build_until(years, path, "2019-08-01")
    names = ("reflectance/c/0/0/{}/{}", "valid/c/0/{}/{}", "overview/c/0/0/{}/{}")
    before = files(path / "2018-09-01")

    anew = {**CORNER["properties"], "s2:processing_baseline": "05.10"}
    scene(years, "corner_2", "2019-04-04", second=9, shape=(30, 30), properties=anew)
    report = append_cube(path, "2019-08-01")
    (change,) = report.changes
    assert (change.new_dates, change.changed_dates) == (0, 1)
    assert report.build is not None
    assert (report.build.shards_written, report.build.shards_taken) == (1, 8)
    # Both scenes of the one date, in the one block that holds the touched shard.
    assert report.windows_read == 2 * ASSETS

    after = files(path / "2018-09-01")
    for row in range(3):
        for col in range(3):
            manifest = path / "manifests" / "2018-09-01" / f"{row * 48}_{col * 48}.json"
            touched = (row, col) == (0, 0)
            assert json.loads(manifest.read_text())["taken_over"] is not touched
            for name in names:
                key = name.format(row, col)
                assert (after[key] == before[key]) is not touched
    build_until(years, tmp_path / "once.zarr", "2019-08-01")
    assert_same_cube(path, tmp_path / "once.zarr")


def test_a_late_scene_of_a_complete_season_changes_nothing(years: Any, tmp_path: Path):
    path = tmp_path / "c.zarr"
    build_until(years, path, "2018-08-31")
    before = files(path / "2017-09-01")
    scene(years, "late", "2018-05-05")
    append_cube(path, "2019-08-31")
    assert list_seasons(path) == ["2016-09-01", "2017-09-01", "2018-09-01"]
    assert files(path / "2017-09-01") == before


def test_labels_are_carried_over(years: Any, tmp_path: Path):
    path = tmp_path / "y.zarr"
    build_until(years, path, "2019-05-01")
    season = open_season(path, "2018-09-01", mode="r+")
    parcels = np.zeros(season.shape_yx, dtype=np.int32)
    parcels[20:50, 10:60], parcels[60:70, 33:44] = 1, 2
    labels = np.select([parcels == 1, parcels == 2], [0, 1], 255).astype(np.uint8)
    fields = FieldTable(
        number=np.array([1, 2], np.int32), code=np.array([0, 1], np.uint8),
        pixels=np.array([1500, 110], np.int32), split=np.zeros(2, np.uint8),
    )  # fmt: skip
    legend = Legend.from_values(["maize", "wheat"])
    write_fields(season, labels=labels, parcels=parcels, fields=fields, legend=legend)
    write_split(season, np.array([1, 3]))
    append_cube(path, "2019-08-31")
    after = open_season(path, "2018-09-01")
    assert len(after.time) == 3
    np.testing.assert_array_equal(after.labels[:], labels)
    np.testing.assert_array_equal(after.parcels[:], parcels)
    assert after.legend == legend
    assert after.fields is not None
    for name in ("number", "code", "pixels"):
        np.testing.assert_array_equal(getattr(after.fields, name), getattr(fields, name))
    np.testing.assert_array_equal(after.fields.split, [1, 3])
    assert validate_cube(open_cube(path, "2018-09-01", mask_and_scale=False))[0] == []


# --- stopped and gone on ---


def at_fourth_shard(patched: pytest.MonkeyPatch) -> None:
    original, written = block_module.write_shard, []

    def stop(season: Any, window: Any, **arrays: Any) -> None:
        if len(written) == 3:
            season.reflectance[:, :1, window.rows, window.cols] = 99
            raise KeyboardInterrupt
        written.append(window)
        original(season, window, **arrays)

    patched.setattr(block_module, "write_shard", stop)


def at_labels(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(store_module.zarr, "consolidate_metadata", interrupt)


def between_the_names(patched: pytest.MonkeyPatch) -> None:
    original = Path.rename

    def stop(self: Path, target: Any) -> Path:
        if self.name.endswith(".building") and self.parent.name != "manifests":
            raise KeyboardInterrupt
        return original(self, target)

    patched.setattr(Path, "rename", stop)


def before_the_manifests(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(replace_module, "_swap_manifests", interrupt)


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stop", "dates_left"),
    [
        (at_fourth_shard, 1),
        pytest.param(at_labels, 0, marks=pytest.mark.slow),
        pytest.param(between_the_names, 0, marks=pytest.mark.slow),
        pytest.param(before_the_manifests, 0, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_append_goes_on_and_also_elsewhere(
    years: Any,
    once: Path,
    tmp_path: Path,
    stop: Callable[[pytest.MonkeyPatch], None],
    dates_left: int,
):
    path = tmp_path / "here" / "s.zarr"
    build_until(years, path, "2019-05-01")
    plan = plan_append(path, "2019-08-20").plan
    with pytest.MonkeyPatch.context() as patched:
        stop(patched)
        with pytest.raises(KeyboardInterrupt):
            append_cube(path, "2019-08-20", memory=one_shard(plan))
    if stop is not between_the_names and stop is not before_the_manifests:
        # Until it is whole the season of before is what one reads.
        assert len(open_season(path, "2018-09-01").time) == 2

    # The folder goes to another place, with whatever lock lay beside it.
    there = tmp_path / "there" / "other.zarr"
    there.parent.mkdir()
    shutil.move(path, there)
    report = append_cube(there, "2019-08-20")
    assert report.windows_read == dates_left * ASSETS
    assert_same_cube(there, once)
    assert not [*there.glob("*.building"), *there.glob("*.replaced")]
    assert not list((there / "manifests").glob("*.building"))
    # What lies there is known again for the next time.
    scene(years, "next", "2019-08-01")
    assert append_cube(there, "2019-08-20").windows_read == ASSETS


def test_a_stopped_build_goes_on_elsewhere(years: Any, tmp_path: Path):
    here, there = tmp_path / "here.zarr", tmp_path / "far" / "there.zarr"
    plan = plan_until(years, "2017-08-31")
    with pytest.MonkeyPatch.context() as patched:
        at_fourth_shard(patched)
        with pytest.raises(KeyboardInterrupt):
            build_cube(plan, here, memory=one_shard(plan))
    there.parent.mkdir()
    shutil.move(here, there)
    stored = unfinished_plan(there, plan.request)
    assert stored is not None
    report = build_cube(stored, there, memory=one_shard(plan))
    assert (report.shards_kept, report.shards_written) == (3, 6)
    build_until(years, tmp_path / "once.zarr", "2017-08-31")
    assert_same_cube(there, tmp_path / "once.zarr")


@pytest.mark.slow
def test_a_killed_append_goes_on(years: Any, once: Path, tmp_path: Path):
    path = tmp_path / "k.zarr"
    build_until(years, path, "2019-05-01")
    memory = one_shard(plan_append(path, "2019-08-31").plan)
    script = (
        "import sys, time\n"
        "from stcln_geo.cube import append, block\n"
        "original = block.write_shard\n"
        "def slow(*args, **options):\n"
        "    original(*args, **options); time.sleep(0.3)\n"
        "block.write_shard = slow\n"
        "append.append_cube(sys.argv[1], '2019-08-31', memory=int(sys.argv[2]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path), str(memory)])
    manifests = path / "manifests" / "2018-09-01.building"
    deadline = time.monotonic() + 300
    while len(list(manifests.glob("*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(CubeError, match=f"process {process.pid} "):
        append_cube(path, "2019-08-31")
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    report = append_cube(path, "2019-08-31")
    assert report.build is not None
    assert 2 <= report.build.shards_kept - 18 < 9
    assert_same_cube(path, once)


# --- mistakes ---


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stcln_geo.cube.read._PAUSE_SECONDS", 0.0)


def test_the_first_build_is_told_of_the_append(years: Any, tmp_path: Path):
    path = tmp_path / "b.zarr"
    plan = plan_until(years, "2017-08-31")
    build_cube(plan, path)
    append_cube(path, "2018-08-31")
    with pytest.raises(CubeError, match="2 items more, as after 'cube append'"):
        build_cube(plan, path)


def test_a_new_scene_that_cannot_be_read_leaves_the_cube_as_it_was(years: Any, tmp_path: Path):
    path = tmp_path / "f.zarr"
    build_until(years, path, "2019-05-01")
    lost = years.folder / "S2_2019-06-21_nir.tif"
    content = lost.read_bytes()
    lost.unlink()
    before = files(path / "2018-09-01")
    with pytest.raises(TaskError, match="S2_2019-06-21 nir: gone"):
        append_cube(path, "2019-08-31")
    assert files(path / "2018-09-01") == before
    report = append_cube(path, "2019-08-31", on_error="skip")
    assert report.build is not None
    assert [entry.item for entry in report.build.failures] == ["S2_2019-06-21"]
    assert not open_season(path, "2018-09-01").valid[2].any()
    lost.write_bytes(content)


def test_mistakes_are_named(years: Any, tmp_path: Path, capsys: Any):
    path = tmp_path / "m.zarr"
    plan = plan_until(years, "2018-08-31")
    build_cube(dataclasses.replace(plan, request={}), path)
    with pytest.raises(CubeError, match=r"which catalog.*--catalog"):
        append_cube(path, "2019-08-31")
    report = append_cube(path, "2019-08-31", catalog=years.location)
    assert len(report.changes) == 1

    for arguments, message in (
        (["--until", "soon"], "--until 2020-08-31"),
        (["--until", "2019-01-01/2020-01-01"], "one date as YYYY-MM-DD"),
        (["--until", "2019-13-01"], "one date as YYYY-MM-DD"),
        (["--until", "2020-01-01", "--on-error", "hope"], "fail or skip"),
        (["--until", "2020-01-01", "--max-failed-fraction", "0.1"], "Add --on-error skip"),
    ):
        assert invoke(["cube", "append", str(path), *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    assert invoke(["cube", "append", str(tmp_path / "no.zarr"), "--until", "2020-01-01"]) == 2
    assert "no such folder" in capsys.readouterr().err
    (path / "build.json").unlink()
    with pytest.raises(CubeError, match="no search to repeat"):
        append_cube(path, "2020-01-01")
    with cube_lock(path), pytest.raises(CubeError, match="one writer"):
        build_cube(plan, path, overwrite=True)


def test_the_command(years: Any, tmp_path: Path, capsys: Any):
    path = str(tmp_path / "c.zarr")
    bbox = "4.4125,50.5365,4.4205,50.5440"
    common = ["cube", "build", "--catalog", years.location, "--bbox", bbox]
    assert invoke([*common, "--time", "2017-09-01/2019-05-01", path]) == 0
    capsys.readouterr()
    append = ["cube", "append", path, "--until", "2019-08-31"]
    assert invoke([*append, "--dry-run"]) == 0
    assert "1 new and 0 changed of 3 dates; 4 asset windows" in capsys.readouterr().out
    assert invoke(append) == 0
    assert "4 asset windows read" in capsys.readouterr().out
    assert invoke(append) == 0
    assert "nothing new until 2019-08-31; no pixel read" in capsys.readouterr().out
    once = str(tmp_path / "once.zarr")
    assert invoke([*common, "--time", "2017-09-01/2019-08-31", once]) == 0
    assert_same_cube(Path(path), Path(once))
