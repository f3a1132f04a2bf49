"""Repairing: what was left out is put back, and only that is touched."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import block as block_module
from stcln_geo.cube.append import append_cube
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.cost import task_bytes
from stcln_geo.cube.dataset import open_cube
from stcln_geo.cube.granules import describe_item
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.planned import Scene
from stcln_geo.cube.read import read_ledger
from stcln_geo.cube.repair import find_left_out, repair_cube, same_granule
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import list_seasons, open_season
from stcln_geo.errors import CubeError, InputError, NothingFoundError, TaskError

SMALL = Layout(chunk=16, shard=48)
ORBIT = {"sat:relative_orbit": 51}
SPAN = "2018-09-01/2019-06-30"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stcln_geo.cube.read._PAUSE_SECONDS", 0.0)


def plant(archive: Any, *, raised: int = 0, prefix: str = "S2", seconds: int = 0) -> Any:
    """Add two whole scenes, and on the second day a corner of another tile.

    A raised archive holds the same reflectance under other numbers, and declares the offset.
    """
    rng = np.random.default_rng(11)
    for name, day, shape, tile in (
        ("a", "2019-03-01", (102, 104), "31UFS"),
        ("b", "2019-03-11", (102, 104), "31UFS"),
        ("corner", "2019-03-11", (30, 30), "31UFT"),
    ):
        half = (shape[0] // 2, shape[1] // 2)
        pixels = {
            "red": rng.integers(1, 4000, shape),
            "nir": rng.integers(1, 9000, shape),
            "swir16": rng.integers(1, 6000, half),
        }
        archive.add(
            f"{prefix}_{name}",
            f"{day}T10:50:{seconds:02d}",
            pixels={key: (values + raised).astype("uint16") for key, values in pixels.items()},
            scl=rng.choice([4, 9], p=[0.7, 0.3], size=half).astype("uint8"),
            offset=-raised / 10_000,
            properties={"grid:code": f"MGRS-{tile}", **ORBIT},
        )
    return archive


def plan_of(archive: Any, **choices: Any) -> CubePlan:
    snapshot = search_items(load_catalog(archive.location), time_range=SPAN)
    plan = plan_cube(snapshot, spec=CubeSpec(layout=SMALL, **choices))
    request = {"catalog": archive.location, "collection": None, "region": None, "time": SPAN}
    return dataclasses.replace(plan, request=request)


def one_shard(plan: CubePlan) -> int:
    return task_bytes(plan, plan.seasons[0], SMALL.shard)


def assert_same(first: Path, second: Path) -> None:
    one, two = open_season(first), open_season(second)
    np.testing.assert_array_equal(one.time, two.time)
    for array in ("reflectance", "valid", "scl", "coverage", "overview"):
        np.testing.assert_array_equal(getattr(one, array)[:], getattr(two, array)[:], array)


@pytest.fixture
def broken(archive: Any) -> Any:
    """An archive of which one band of the corner is cut short."""
    plant(archive)
    file = archive.folder / "S2_corner_nir.tif"
    shutil.copy(file, archive.folder / "good.tif")
    file.write_bytes(file.read_bytes()[:500])
    return archive


def mend(archive: Any) -> None:
    shutil.copy(archive.folder / "good.tif", archive.folder / "S2_corner_nir.tif")


@pytest.fixture(scope="module")
def perfect(planted_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cube of the same scenes, all of them whole."""
    folder = tmp_path_factory.mktemp("perfect")
    build_cube(plan_of(plant(type(planted_once)(folder / "archive"))), folder / "p.zarr")
    return folder / "p.zarr"


def test_only_the_shard_that_lacks_is_built_again(broken: Any, perfect: Path, tmp_path: Path):
    path = tmp_path / "r.zarr"
    build_cube(plan_of(broken, on_error="skip"), path)
    assert not np.array_equal(open_season(path).reflectance[:], open_season(perfect).reflectance[:])
    lacking = find_left_out(path)
    assert [(entry.item, entry.shards) for entry in lacking] == [("S2_corner", 1)]
    files = {file: file.stat().st_mtime_ns for file in path.glob("2018-09-01/reflectance/c/**/*")}

    mend(broken)
    report = repair_cube(path)
    assert report.repaired == lacking
    assert not report.remaining
    assert report.build is not None
    assert (report.build.shards_written, report.build.shards_taken) == (1, 8)
    # Both scenes of that day, in the one shard: the better pixel of the two is found again.
    assert report.build.windows_read == 2 * 4
    changed = [file for file, time in files.items() if file.stat().st_mtime_ns != time]
    assert [file.name for file in changed if file.is_file()] == ["0"]
    assert_same(path, perfect)
    assert open_season(path).attrs["fingerprint"] == open_season(perfect).attrs["fingerprint"]

    again = repair_cube(path)
    assert again.build is None
    assert "nothing to repair" in str(again)


def test_what_is_still_broken_stays_left_out(
    broken: Any, perfect: Path, tmp_path: Path, capsys: Any
):
    path = tmp_path / "s.zarr"
    build_cube(plan_of(broken, on_error="skip"), path)
    shutil.copytree(path, tmp_path / "before.zarr")
    assert invoke(["cube", "repair", str(path), "--dry-run"]) == 0
    assert "S2_corner lacks in 1 shards" in capsys.readouterr().out
    assert invoke(["cube", "repair", str(path)]) == 1
    captured = capsys.readouterr()
    assert "0 scenes repaired, 1 still lack" in captured.out
    assert "S2_corner lacks in 1 shards" in captured.err
    assert_same(path, tmp_path / "before.zarr")
    mend(broken)
    assert invoke(["cube", "repair", str(path)]) == 0
    assert "1 scenes repaired" in capsys.readouterr().out
    assert_same(path, perfect)


def test_another_catalog_has_the_same_granule(broken: Any, perfect: Path, tmp_path: Path):
    path = tmp_path / "o.zarr"
    build_cube(plan_of(broken, on_error="skip"), path)
    # Other ids, other numbers under a declared offset, the datatake's time for the granule's.
    other = plant(type(broken)(tmp_path / "other"), raised=1000, prefix="Z9", seconds=40)
    report = repair_cube(path, catalog=other.location)
    assert report.substitutes == {"S2_corner": "Z9_corner"}
    assert not report.remaining
    assert_same(path, perfect)
    dataset = open_cube(path)
    assert [str(value) for value in dataset["item_ids"].values] == ["S2_a", "S2_b Z9_corner"]
    assert str(dataset["offset_dn"].values[1]) == "0 -1000"

    # An append knows the scene again: it neither reads nor undoes the repair.
    broken.add("late", "2019-06-01T10:50:00", pixels={
        key: np.full(shape, 500, "uint16")
        for key, shape in (("red", (102, 104)), ("nir", (102, 104)), ("swir16", (51, 52)))
    }, scl=np.full((51, 52), 4, "uint8"))  # fmt: skip
    added = append_cube(path, "2019-07-31")
    assert added.windows_read == 4
    np.testing.assert_array_equal(
        open_season(path).reflectance[:2], open_season(perfect).reflectance[:]
    )


def test_a_copy_of_the_catalog_elsewhere(broken: Any, perfect: Path, tmp_path: Path):
    path = tmp_path / "c.zarr"
    build_cube(plan_of(broken, on_error="skip"), path)
    copy = plant(type(broken)(tmp_path / "copy"))
    report = repair_cube(path, catalog=copy.location)
    assert not report.substitutes
    assert_same(path, perfect)
    assert open_season(path).attrs["fingerprint"] == open_season(perfect).attrs["fingerprint"]


def test_a_catalog_without_the_scene_is_refused(broken: Any, archive: Any, tmp_path: Path):
    path = tmp_path / "n.zarr"
    build_cube(plan_of(broken, on_error="skip"), path)
    other = type(broken)(tmp_path / "other")
    pixels = {"red": np.ones((102, 104), "uint16"), "nir": np.ones((102, 104), "uint16"),
              "swir16": np.ones((51, 52), "uint16")}  # fmt: skip
    other.add("x", "2019-03-11T10:50:00", pixels=pixels, properties=ORBIT,
              scl=np.full((51, 52), 4, "uint8"))  # fmt: skip
    with pytest.raises(NothingFoundError, match=r"none of the 1 scenes .*S2_corner"):
        repair_cube(path, catalog=other.location)


def test_an_append_tries_again_and_forgets_nothing(broken: Any, perfect: Path, tmp_path: Path):
    path = tmp_path / "a.zarr"
    build_cube(plan_of(broken, on_error="skip"), path)
    broken.add("late", "2019-06-29T10:50:00", pixels={
        key: np.full(shape, 500, "uint16")
        for key, shape in (("red", (102, 104)), ("nir", (102, 104)), ("swir16", (51, 52)))
    }, scl=np.full((51, 52), 4, "uint8"))  # fmt: skip
    lacking = find_left_out(path)
    report = append_cube(path, "2019-07-31")
    # The new date, and the two scenes of the day that lacks one of them, but for its broken band.
    assert report.windows_read == 4 + 4 + 3
    assert find_left_out(path) == lacking
    mend(broken)
    assert not repair_cube(path).remaining
    np.testing.assert_array_equal(
        open_season(path).reflectance[:2], open_season(perfect).reflectance[:]
    )
    build_cube(plan_of(broken), tmp_path / "once.zarr")
    assert_same(path, tmp_path / "once.zarr")


def test_a_stopped_repair_goes_on(broken: Any, perfect: Path, tmp_path: Path):
    path = tmp_path / "k.zarr"
    plan = plan_of(broken, on_error="skip")
    build_cube(plan, path)
    other = plant(type(broken)(tmp_path / "other"), raised=1000, prefix="Z9")

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(block_module, "write_shard", stop)
        with pytest.raises(KeyboardInterrupt):
            repair_cube(path, catalog=other.location, memory=one_shard(plan))
    assert list_seasons(path) == ["2018-09-01"]
    report = repair_cube(path, catalog=other.location)
    assert [entry.item for entry in report.repaired] == ["S2_corner"]
    assert not report.remaining
    assert_same(path, perfect)


def test_too_many_failures_leave_the_season_unfinished(
    broken: Any, perfect: Path, tmp_path: Path, capsys: Any
):
    path = tmp_path / "f.zarr"
    # One of three scenes: more than 0.3, less than 0.34.
    with pytest.raises(TaskError, match=r"1 of 3 scenes .*\(S2_corner\).*is 0\.3\. .*larger share"):
        build_cube(plan_of(broken, on_error="skip", max_failed_fraction=0.3), path)
    assert list_seasons(path) == []
    assert {entry.item for entry in read_ledger(path / "ledger.jsonl")} == {"S2_corner"}
    with pytest.raises(CubeError, match="2018-09-01 is unfinished"):
        repair_cube(path)
    # The shards that lack nothing are kept; those that lack are tried again.
    report = build_cube(plan_of(broken, on_error="skip", max_failed_fraction=0.34), path)
    assert (report.shards_kept, report.shards_written) == (8, 1)
    assert [entry.item for entry in report.failures] == ["S2_corner"]
    mend(broken)
    repair_cube(path)
    assert_same(path, perfect)

    common = ["cube", "build", "--catalog", broken.location, str(tmp_path / "x.zarr")]
    for arguments, message in (
        (["--max-failed-fraction", "0.1"], "Add --on-error skip"),
        (["--on-error", "skip", "--max-failed-fraction", "1.5"], "0 to 1"),
    ):
        assert invoke([*common, *arguments]) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    with pytest.raises(InputError, match="share of the scenes"):
        CubeSpec(on_error="skip", max_failed_fraction=-0.1)


def test_failing_is_no_longer_satisfied_with_what_skipping_left(broken: Any, tmp_path: Path):
    path = tmp_path / "t.zarr"
    with pytest.raises(TaskError):
        build_cube(plan_of(broken, on_error="skip", max_failed_fraction=0.0), path)
    with pytest.raises(TaskError, match="S2_corner nir: corrupt"):
        build_cube(plan_of(broken), path)
    mend(broken)
    assert build_cube(plan_of(broken), path).windows_read == 3 * 4


# --- which granule is the same ---


def scene_of(item: dict[str, Any], catalog: str) -> Scene:
    granule = describe_item(item, load_catalog(catalog).profile("sentinel-2-l2a"))
    return Scene(
        item=granule.item, time=str(granule.time), day=str(granule.time)[:10],
        platform=granule.platform,
        orbit=granule.orbit, baseline=granule.baseline, crs=None, place=None, bands=(), scl=None,
        tile=granule.tile, sensing=str(granule.sensing),
    )  # fmt: skip


def test_a_recorded_granule_is_the_same_as_no_other(shared: Path):
    folder = shared / "data" / "stac_items"
    recorded = {
        (catalog, item["id"]): item
        for catalog in ("earth-search-v1", "cdse", "planetary-computer")
        for file in sorted((folder / catalog / "sentinel-2-l2a").glob("*.json"))
        for item in [json.loads(file.read_text())]
    }
    names = {"earth-search-v1": "earth-search"}
    scenes = {key: scene_of(item, names.get(key[0], key[0])) for key, item in recorded.items()}
    for key, item in recorded.items():
        profile = load_catalog(names.get(key[0], key[0])).profile("sentinel-2-l2a")
        granule = describe_item(item, profile)
        assert same_granule(scenes[key], granule)
        same = [other for other, scene in scenes.items() if same_granule(scene, granule)]
        assert {(scenes[k].tile, scenes[k].time[:10]) for k in same} == {
            (granule.tile, str(granule.time)[:10])
        }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"time": "2020-07-03T10:41:00.000"}, True),
        ({"time": "2020-07-03T11:31:00.000"}, False),
        ({"tile": "32TMT"}, False),
        ({"orbit": 65}, False),
        ({"orbit": None}, True),
        ({"platform": "sentinel-2b"}, False),
        ({"sensing": "2020-07-03T10:36:00"}, False),
    ],
    ids=["same", "datatake", "later", "tile", "orbit", "no orbit", "platform", "other half"],
)
def test_what_makes_a_granule_the_same(shared: Path, changes: dict[str, Any], expected: bool):
    name = "S2A_MSIL2A_20200703T103031_N0500_R108_T32TNT_20230613T212700.json"
    file = shared / "data" / "stac_items" / "cdse" / "sentinel-2-l2a" / name
    item = json.loads(file.read_text())
    granule = describe_item(item, load_catalog("cdse").profile("sentinel-2-l2a"))
    scene = dataclasses.replace(scene_of(item, "cdse"), **changes)
    assert (granule.tile, granule.orbit, granule.platform) == ("32TNT", 108, "sentinel-2a")
    assert same_granule(scene, granule) is expected


@pytest.mark.parametrize("ours", ["9VXK", "09VXK"])
@pytest.mark.parametrize(("theirs", "expected"), [("9VXK", True), ("09VXK", True), ("9VXL", False)])
def test_a_zero_before_the_zone_makes_no_other_tile(
    shared: Path, ours: str, theirs: str, expected: bool
):
    name = "S2A_MSIL2A_20200703T103031_N0500_R108_T32TNT_20230613T212700.json"
    file = shared / "data" / "stac_items" / "cdse" / "sentinel-2-l2a" / name
    item = json.loads(file.read_text())
    granule = describe_item(item, load_catalog("cdse").profile("sentinel-2-l2a"))
    scene = dataclasses.replace(scene_of(item, "cdse"), tile=ours)
    assert same_granule(scene, dataclasses.replace(granule, tile=theirs)) is expected
