"""Cubes in object storage, on a real server on loopback: equal to local ones, never half there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
import zarr

from stcln_geo import bucket as bucket_module
from stcln_geo import storage
from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import publish
from stcln_geo.cube import season as season_module
from stcln_geo.cube.append import append_cube
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.contract import validate_cube
from stcln_geo.cube.cost import task_bytes
from stcln_geo.cube.dataset import open_cube, write_cube
from stcln_geo.cube.labels import burn_labels
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.lock import cube_lock, lock_path
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.preview import write_preview
from stcln_geo.cube.repair import find_left_out, repair_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import list_seasons, open_season, write_split
from stcln_geo.data.reader import read_block
from stcln_geo.errors import CubeError, InputError, MissingFileError, StorageError, TaskError
from stcln_geo.execution import Execution
from stcln_geo.grid import Window
from stcln_geo.storage import S3Path, list_files, location

ONE = Layout(chunk=16, shard=256)
"""A season is one shard: every request costs some milliseconds here."""

SMALL = Layout(chunk=16, shard=64)
"""Nine shards."""


def scene(archive: Any, day: str, *, seed: int, side: int = 102) -> None:
    rng = np.random.default_rng(seed)
    archive.add(
        f"S2_{day}",
        f"{day}T10:50:00",
        pixels={
            "red": rng.integers(1, 4000, (side, side)).astype("uint16"),
            "nir": rng.integers(1, 9000, (side, side)).astype("uint16"),
        },
        scl=rng.choice([4, 5, 9], p=[0.6, 0.35, 0.05], size=(side // 2,) * 2).astype("uint8"),
    )


DAYS = ("2017-10-02", "2018-05-01", "2018-10-03", "2019-04-04")
"""Two dates in each of two seasons."""


@pytest.fixture
def years(archive: Any) -> Any:
    for seed, day in enumerate(DAYS):
        scene(archive, day, seed=seed)
    return archive


def plan_until(archive: Any, until: str, **choices: Any) -> CubePlan:
    span = f"2017-09-01/{until}"
    snapshot = search_items(load_catalog(archive.location), time_range=span)
    plan = plan_cube(snapshot, spec=CubeSpec(**{"layout": ONE, **choices}))
    request = {"catalog": archive.location, "collection": None, "region": None, "time": span}
    return dataclasses.replace(plan, request=request)


def one_shard(plan: CubePlan) -> int:
    return max(task_bytes(plan, season, season.layout.shard) for season in plan.seasons)


def content(cube: str | Path) -> dict[str, bytes]:
    """Return all files of a cube by name."""
    where = location(cube)
    return {name: (where / name).read_bytes() for name in list_files(where)}


def assert_same_files(one: str | Path, two: str | Path) -> None:
    """Every array, attribute, manifest, plan: byte for byte, but for Parquet's own metadata."""
    first, second = content(one), content(two)
    assert sorted(first) == sorted(second)
    for name in first:
        if name != "items.parquet":
            assert first[name] == second[name], name


def versions(cube: str) -> dict[str, tuple[Any, Any]]:
    """Return ETag and time of every object."""
    where = location(cube)
    assert isinstance(where, S3Path)
    store = bucket_module.object_store(where.bucket)
    return {
        entry["path"].removeprefix(f"{where.key}/"): (entry["e_tag"], entry["last_modified"])
        for batch in store.list(where.key)
        for entry in batch
    }


def seconds_pass() -> None:
    """Wait until a new object would have another time."""
    time.sleep(1.1)


# --- the same cube ---


@pytest.mark.parametrize(
    ("layout", "until", "shards"),
    [(ONE, "2018-08-31", 1), pytest.param(SMALL, "2019-08-31", 18, marks=pytest.mark.slow)],
    ids=["one", "many"],
)
def test_built_in_a_bucket_equals_built_on_disk(
    years: Any, s3: str, tmp_path: Path, layout: Layout, until: str, shards: int
):
    plan = plan_until(years, until, layout=layout)
    there, here = f"{s3}/some/deep.zarr", tmp_path / "c.zarr"
    report = build_cube(plan, there, memory=one_shard(plan))
    build_cube(plan, here, memory=one_shard(plan))
    assert report.shards_written == shards
    assert_same_files(there, here)
    assert not storage.list_files(lock_path(there).parent / "deep.zarr.lock")
    assert "nothing to do" in str(build_cube(plan, there))
    assert "a-secret-word" not in repr(content(there))
    # Any reader of Zarr finds a season where it belongs.
    season = open_season(there, "2017-09-01")
    group: Any = zarr.open_group(
        zarr.storage.ObjectStore(
            bucket_module.object_store(season.cube.bucket, "some/deep.zarr/2017-09-01")
        ),
        mode="r",
    )
    np.testing.assert_array_equal(group["reflectance"][:], season.reflectance[:])


def test_a_chip_is_the_same(years: Any, s3: str, tmp_path: Path):
    plan = plan_until(years, "2018-08-31")
    for cube in (f"{s3}/c.zarr", tmp_path / "c.zarr"):
        build_cube(plan, cube)
    window = Window(40, 30, 32, 32)
    one, two = (
        read_block(open_season(cube), window) for cube in (f"{s3}/c.zarr", tmp_path / "c.zarr")
    )
    np.testing.assert_array_equal(one.reflectance, two.reflectance)
    np.testing.assert_array_equal(one.valid, two.valid)
    assert one.valid.any()


@pytest.mark.slow
def test_datasets_travel_and_come_back(years: Any, s3: str, tmp_path: Path):
    build_cube(plan_until(years, "2019-08-31"), tmp_path / "c.zarr")
    dataset = open_cube(tmp_path / "c.zarr")
    target = f"{s3}/w.zarr"
    assert str(write_cube(dataset, target)) == target
    assert_same_files(target, write_cube(dataset, tmp_path / "w.zarr"))
    with pytest.raises(CubeError, match="already"):
        write_cube(dataset, target)
    write_cube(dataset, target, overwrite=True)
    assert_same_files(target, tmp_path / "w.zarr")
    back = open_cube(target)
    assert b"a-secret-word" not in pickle.dumps(back)
    again = pickle.loads(pickle.dumps(back))
    # What was padded around the dataset is no data.
    np.testing.assert_array_equal(
        again["reflectance"].sel(x=dataset["x"], y=dataset["y"]).values,
        dataset["reflectance"].values,
    )
    for name in list_seasons(target):
        assert validate_cube(open_cube(target, name, mask_and_scale=False))[0] == []


@pytest.mark.slow
def test_workers_do_not_show(years: Any, s3: str, tmp_path: Path):
    plan = plan_until(years, "2018-08-31", layout=SMALL)
    build_cube(plan, f"{s3}/c.zarr", execution=Execution(workers=2), memory=2 * one_shard(plan))
    # In blocks of the same size: manifests name the scenes that meet the block.
    build_cube(plan, tmp_path / "c.zarr", memory=one_shard(plan))
    assert_same_files(f"{s3}/c.zarr", tmp_path / "c.zarr")


@pytest.mark.slow
def test_append_leaves_old_seasons_alone(years: Any, s3: str, tmp_path: Path):
    grown = f"{s3}/c.zarr"
    build_cube(plan_until(years, "2018-08-31"), grown)
    before = versions(grown)
    seconds_pass()
    append_cube(grown, "2018-12-31")
    append_cube(grown, "2019-08-31")
    after = versions(grown)
    old = [name for name in before if name.startswith(("2017-09-01/", "manifests/2017-09-01/"))]
    assert len(old) > 20
    assert {name: after[name] for name in old} == {name: before[name] for name in old}
    build_cube(plan_until(years, "2019-08-31"), tmp_path / "once.zarr")
    for name in list_seasons(tmp_path / "once.zarr"):
        np.testing.assert_array_equal(
            open_season(grown, name).reflectance[:],
            open_season(tmp_path / "once.zarr", name).reflectance[:],
        )
    assert not [name for name in after if ".building" in name or publish.JOURNAL in name]


@pytest.mark.slow
def test_left_out_scenes_are_recorded_and_repaired(
    years: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stcln_geo.cube.read.time.sleep", lambda _: None)
    # It meets the first shard alone.
    scene(years, "2018-06-01", seed=9, side=30)
    broken = years.folder / "S2_2018-06-01_red.tif"
    kept = broken.read_bytes()
    broken.unlink()
    cube = f"{s3}/c.zarr"
    with pytest.raises(TaskError, match="1 assets could not be read"):
        build_cube(plan_until(years, "2018-08-31", layout=SMALL), cube)
    report = build_cube(plan_until(years, "2018-08-31", layout=SMALL, on_error="skip"), cube)
    assert [entry.item for entry in report.failures] == ["S2_2018-06-01"]
    assert {entry.item for entry in find_left_out(cube)} == {"S2_2018-06-01"}
    broken.write_bytes(kept)
    repaired = repair_cube(cube)
    assert repaired.remaining == ()
    assert repaired.build is not None
    # The others are copied within the bucket.
    assert repaired.build.shards_taken == 8
    build_cube(plan_until(years, "2018-08-31", layout=SMALL), tmp_path / "c.zarr")
    np.testing.assert_array_equal(
        open_season(cube).reflectance[:], open_season(tmp_path / "c.zarr").reflectance[:]
    )


# --- stopped and gone on ---


@pytest.mark.slow
def test_a_killed_build_goes_on(years: Any, s3: str, tmp_path: Path):
    plan = plan_until(years, "2018-08-31", layout=SMALL)
    cube = location(f"{s3}/k.zarr")
    (tmp_path / "plan.pickle").write_bytes(pickle.dumps(plan))
    script = (
        "import pickle, sys, time\n"
        "from stcln_geo.cube import block, build\n"
        "original = block.write_shard\n"
        "def slow(*args, **options):\n"
        "    original(*args, **options); time.sleep(0.5)\n"
        "block.write_shard = slow\n"
        "plan = pickle.load(open(sys.argv[1], 'rb'))\n"
        "build.build_cube(plan, sys.argv[2], memory=int(sys.argv[3]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "plan.pickle"), str(cube),
         str(one_shard(plan))],
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list_files(cube / "manifests")) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(CubeError, match=f"process {process.pid} "):
        build_cube(plan, cube)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert list_seasons(cube) == []
    report = build_cube(plan, cube, memory=one_shard(plan))
    assert 2 <= report.shards_kept < 9
    build_cube(plan, tmp_path / "k.zarr", memory=one_shard(plan))
    assert_same_files(str(cube), tmp_path / "k.zarr")


class Stop(BaseException):
    """A process that ends here and now."""


class Switch:
    """Counts what is asked of the server to change; from a number on nothing is done any more."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.done = 0
        self.limit: int | None = None
        original = storage.object_store
        switch = self

        class Client:
            def __init__(self, client: Any) -> None:
                self._client = client

            def __getattr__(self, name: str) -> Any:
                method = getattr(self._client, name)
                return switch.counted(method) if name in {"put", "copy", "delete"} else method

        patched.setattr(storage, "object_store", lambda bucket: Client(original(bucket)))
        # One by one, so that every place to stop at is met.
        patched.setattr(storage, "_TRANSFERS", 1)

    def counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if self.limit is not None and self.done >= self.limit:
                raise Stop
            self.done += 1
            return method(*args, **options)

        return call


@pytest.fixture
def replacement(years: Any, s3: str) -> tuple[S3Path, np.ndarray, np.ndarray]:
    """A season and, beside it, the whole one that is to replace it; and the pixels of both."""
    cube, newer = location(f"{s3}/old.zarr"), location(f"{s3}/new.zarr")
    assert isinstance(cube, S3Path)
    assert isinstance(newer, S3Path)
    build_cube(plan_until(years, "2017-12-31"), cube)
    build_cube(plan_until(years, "2018-08-31"), newer)
    old, new = (open_season(one).reflectance[:] for one in (cube, newer))
    for part in ("", "manifests/"):
        source, target = f"{part}2017-09-01", f"{part}2017-09-01.building"
        storage.copy_tree(newer / source, cube / target, list_files(newer / source))
    # Something that the new season does not have.
    storage.write_file(cube / "2017-09-01" / "scl" / "c" / "9" / "9" / "9", b"left over")
    return cube, old, new


@pytest.mark.slow(minutes=2)
def test_a_swap_may_stop_anywhere(
    replacement: tuple[S3Path, np.ndarray, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
):
    template, old, new = replacement
    names = list_files(template)
    expected = {
        name.replace(".building", ""): (template / name).read_bytes()
        for name in names
        if ".building" in name
    }
    switch = Switch(monkeypatch)
    whole = template.with_name("whole.zarr")
    storage.copy_tree(template, whole, names)
    switch.done = 0
    publish.publish_season(whole, "2017-09-01")
    total = switch.done
    assert total > 40

    seen = set()
    for stop in range(total):
        cube = template.with_name(f"at{stop}.zarr")
        storage.copy_tree(template, cube, names)
        switch.done, switch.limit = 0, stop
        with pytest.raises(Stop):
            publish.publish_season(cube, "2017-09-01")
        switch.limit = None
        # A reader sees the old season, none, or the new one.
        if list_seasons(cube):
            found = open_season(cube).reflectance[:]
            assert any(np.array_equal(found, one) for one in (old, new))
            seen.add("old" if np.array_equal(found, old) else "new")
        else:
            seen.add("none")
            with pytest.raises(CubeError, match="is unfinished"):
                open_season(cube)
        # Recovery may be stopped as well.
        switch.done, switch.limit = 0, 3
        with contextlib.suppress(Stop):
            publish.recover_publications(cube)
        switch.limit = None
        publish.recover_publications(cube)
        left = list_files(cube)
        if stop == 0:
            # Nothing was begun, so nothing is touched.
            assert left == names
            continue
        np.testing.assert_array_equal(open_season(cube).reflectance[:], new)
        assert {name: (cube / name).read_bytes() for name in expected} == expected
        assert not [n for n in left if ".building" in n or n.endswith(publish.JOURNAL)]
        assert "2017-09-01/scl/c/9/9/9" not in left
    assert seen == {"old", "none", "new"}


def test_what_is_replaced_while_it_is_opened_does_not_open(
    years: Any, s3: str, monkeypatch: pytest.MonkeyPatch
):
    cube = location(f"{s3}/c.zarr")
    build_cube(plan_until(years, "2018-08-31"), cube)
    original = season_module.days_since

    def swap_begins(*args: Any) -> Any:
        (cube / "2017-09-01" / "zarr.json").unlink()
        return original(*args)

    monkeypatch.setattr(season_module, "days_since", swap_begins)
    with pytest.raises(CubeError, match="being replaced"):
        open_season(cube, "2017-09-01")


def test_a_build_stopped_in_its_last_step_goes_on(years: Any, s3: str, tmp_path: Path):
    plan = plan_until(years, "2018-08-31")
    cube = f"{s3}/c.zarr"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(publish, "copy_file", lambda *_: (_ for _ in ()).throw(Stop))
        with pytest.raises(Stop):
            build_cube(plan, cube)
    assert list_seasons(cube) == []
    report = build_cube(plan, cube)
    assert report.windows_read == 0
    build_cube(plan, tmp_path / "c.zarr")
    assert_same_files(cube, tmp_path / "c.zarr")


@pytest.mark.slow
def test_overwriting_may_stop_too(years: Any, s3: str, monkeypatch: pytest.MonkeyPatch):
    cube = f"{s3}/c.zarr"
    build_cube(plan_until(years, "2018-08-31"), cube)
    other = plan_until(years, "2019-08-31")
    with pytest.raises(CubeError, match="holds another cube"):
        build_cube(other, cube)
    with pytest.MonkeyPatch.context() as patched:
        switch = Switch(patched)
        # The lock, then the marks of what is whole, one request per depth.
        switch.limit = 3
        with pytest.raises(Stop):
            build_cube(other, cube, overwrite=True)
    storage.location(lock_path(cube)).unlink()
    with pytest.raises(MissingFileError):
        list_seasons(cube)
    build_cube(other, cube, overwrite=True)
    assert len(list_seasons(cube)) == 2


# --- the lock ---


def forge(cube: str, **changes: object) -> None:
    with cube_lock(cube):
        held = json.loads(lock_path(cube).read_text())
    storage.write_file(lock_path(cube), json.dumps({**held, **changes}).encode())


def test_a_cube_has_one_writer(s3: str):
    cube = f"{s3}/c.zarr"
    with cube_lock(cube), pytest.raises(CubeError, match="one writer") as caught, cube_lock(cube):
        pass
    assert f"{cube}.lock" in str(caught.value)
    assert f"process {os.getpid()} " in str(caught.value)
    with cube_lock(cube):
        pass
    assert not lock_path(cube).exists()


def test_another_host_is_never_overruled(s3: str):
    cube = f"{s3}/c.zarr"
    forge(cube, host="elsewhere", pid=1)
    with pytest.raises(CubeError, match="process 1 on elsewhere"), cube_lock(cube):
        pass
    assert lock_path(cube).is_file()


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "free"])
def test_of_many_writers_one_wins(s3: str, dead: bool):
    cube = f"{s3}/c.zarr"
    if dead:
        forge(cube, born="1")
    inside: list[int] = []

    def enter(number: int) -> bool:
        try:
            with cube_lock(cube):
                inside.append(number)
                assert len(inside) == 1
                time.sleep(0.02)
                inside.remove(number)
                return True
        except CubeError:
            return False

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(enter, range(24)))
    assert any(outcomes)
    assert not all(outcomes)
    assert not lock_path(cube).exists()


# --- mistakes ---


def deny(address: str, bucket: str) -> None:
    policy = {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Deny",
                "Principal": "*",
                "Action": "s3:*",
                "Resource": [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"],
            }
        ],
    }
    client = boto3.client("s3", endpoint_url=address)
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))


def test_a_missing_bucket_is_named(years: Any, s3: str):
    for act in (
        lambda: build_cube(plan_until(years, "2018-08-31"), "s3://not-there/c.zarr"),
        lambda: list_seasons("s3://not-there/c.zarr"),
    ):
        with pytest.raises(StorageError, match=r"no bucket 'not-there' at http.*Create it"):
            act()
    with pytest.raises(MissingFileError, match="no Zarr v3 group"):
        list_seasons(f"{s3}/c.zarr")


def test_a_refusal_is_named_without_secrets(years: Any, s3: str, s3_server: str):
    cube = f"{s3}/c.zarr"
    plan = plan_until(years, "2018-08-31")
    build_cube(plan, cube)
    season = open_season(cube)
    deny(s3_server, s3.removeprefix("s3://"))
    for act in (
        lambda: open_season(cube),
        lambda: build_cube(plan, cube),
        # Pixels that are refused are not taken for none.
        lambda: season.reflectance[:],
    ):
        with pytest.raises(StorageError, match=r"refuses access.*Check AWS_PROFILE") as caught:
            act()
        assert "a-secret-word" not in str(caught.value)


def test_a_server_that_does_not_answer_is_named(s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(bucket_module, "_RETRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match=r"Cannot reach http://127.0.0.1:9 for .*c.zarr"):
        list_seasons(f"{s3}/c.zarr")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    find = bucket_module.importlib.util.find_spec
    monkeypatch.setattr(
        bucket_module.importlib.util,
        "find_spec",
        lambda name: None if name == "obstore" else find(name),
    )
    with pytest.raises(InputError, match=r"pip install 'stcln-geo\[s3\]'"):
        open_season("s3://b/c.zarr")


@pytest.mark.parametrize("text", ["s3://bucket", "s3:///c.zarr", "gs://b/c.zarr", "s3://b/../c"])
def test_other_addresses_are_refused(text: str):
    with pytest.raises(InputError, match="s3://bucket/prefix"):
        location(text)


def test_a_profile_gives_credentials(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    file.write_text("[farm]\naws_access_key_id = tester\naws_secret_access_key = another-secret\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_PROFILE", "farm")
    with cube_lock(f"{s3}/c.zarr"):
        bucket = s3.removeprefix("s3://")
        assert b"another-secret" not in pickle.dumps(bucket_module.object_store(bucket))
    # Keys may be there for the provider of the images.
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "of-the-provider")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(InputError, match="AWS profile 'nobody'"):
        list_seasons(f"{s3}/c.zarr")


# --- as a user ---


@pytest.mark.slow
def test_the_commands(years: Any, s3: str, tmp_path: Path, capsys: Any):
    cube = f"{s3}/region/c.zarr"
    common = ["--catalog", years.location, "--time", "2017-09-01/2018-04-30"]
    assert invoke(["cube", "build", cube, *common]) == 0
    assert f"{cube}: 1 dates" in capsys.readouterr().out
    assert invoke(["cube", "append", cube, "--until", "2018-08-31"]) == 0
    assert invoke(["cube", "info", cube]) == 0
    assert invoke(["cube", "validate", cube]) == 0
    assert "keeps the contract" in capsys.readouterr().out
    assert invoke(["cube", "repair", cube]) == 0
    assert f"{cube} lacks no scene" in capsys.readouterr().out
    assert invoke(["cube", "preview", cube, str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 1000
    assert invoke(["cube", "info", f"{s3}/nothing.zarr"]) == 2
    assert f"the cube {s3}/nothing.zarr:" in capsys.readouterr().err


@pytest.mark.slow
def test_labels_are_burnt_and_split(years: Any, s3: str, tmp_path: Path):
    import geopandas
    from shapely.geometry import box

    for cube in (f"{s3}/c.zarr", tmp_path / "c.zarr"):
        build_cube(plan_until(years, "2018-08-31"), cube)
        season = open_season(cube)
        left, _, _, top = season.aoi.bounds
        fields = [
            box(left + 90 * i, top - 90 * j - 60, left + 90 * i + 60, top - 90 * j)
            for i in range(3)
            for j in range(4)
        ]
        crops = ["wheat", "maize"] * 6
        frame = geopandas.GeoDataFrame({"crop": crops}, geometry=fields, crs=season.geobox.crs)
        frame.to_file(tmp_path / "fields.gpkg")
        report = burn_labels(cube, tmp_path / "fields.gpkg", column="crop")
        assert len(report.fields) == 12
        # A second time in place of the first.
        burn_labels(cube, tmp_path / "fields.gpkg", column="crop")
        write_split(open_season(cube, mode="r+"), np.arange(12) % 3 + 1)
    assert_same_files(f"{s3}/c.zarr", tmp_path / "c.zarr")
    assert write_preview(f"{s3}/c.zarr", tmp_path / "p.png").is_file()
