"""Another layout holds the same cube, and lives on: it validates, appends and repairs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from shapely.geometry import box

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube.append import append_cube
from stcln_geo.cube.audit import merge_audits
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.clouds import CloudSpec
from stcln_geo.cube.contract import validate_cube
from stcln_geo.cube.dataset import open_cube
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.rechunk import rechunk_cube
from stcln_geo.cube.repair import find_left_out, repair_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import (
    FieldTable,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_fields,
    write_shard,
)
from stcln_geo.cube.stored import manifest_paths, read_manifest
from stcln_geo.errors import CubeError
from stcln_geo.execution import Execution
from stcln_geo.grid import Window, geobox_from_window
from stcln_geo.legend import Legend

OLD = Layout(chunk=16, shard=48)
SEASON = "2018-09-01"


def plan_of(archive: Any, **choices: Any) -> CubePlan:
    snapshot = search_items(load_catalog(archive.location), time_range="2018-09-01/2019-03-31")
    clouds = CloudSpec(cloud_margin=1, shadow_margin=0)
    made = plan_cube(snapshot, None, CubeSpec(clouds=clouds, layout=OLD, **choices))
    request = {"catalog": archive.location, "time": "2018-09-01/2019-03-31"}
    return dataclasses.replace(made, request=request)


@pytest.fixture(scope="module")
def cube(planted_once: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled cube of two dates; the third scene is left for an append."""
    path = tmp_path_factory.mktemp("rechunk") / "old.zarr"
    build_cube(plan_of(planted_once), path)
    season = open_season(path, mode="r+")
    labels = np.full(season.shape_yx, 255, dtype=np.uint8)
    parcels = np.zeros(season.shape_yx, dtype=np.int32)
    labels[5:20, 5:30], parcels[5:20, 5:30] = 0, 1
    labels[60:70, 50:90], parcels[60:70, 50:90] = 1, 2
    table = FieldTable(
        number=np.array([1, 2], "int32"), code=np.array([0, 1], "uint8"),
        pixels=np.array([375, 400], "int32"), split=np.array([1, 3], "uint8"),
    )  # fmt: skip
    legend = Legend.from_values(["wheat", "maize"])
    write_fields(season, labels=labels, parcels=parcels, fields=table, legend=legend)
    return path


def arrays_of(path: Path) -> dict[str, np.ndarray]:
    group: Any = zarr.open_group(path / SEASON, mode="r", use_consolidated=False)
    return {name: np.asarray(array[...]) for name, array in group.arrays()}


def assert_same_content(first: Path, second: Path) -> None:
    one, other = arrays_of(first), arrays_of(second)
    assert set(one) == set(other)
    for name in set(one) - {"coverage"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        assert one[name].dtype == other[name].dtype
    old, new = (zarr.open_group(path / SEASON, mode="r") for path in (first, second))
    for name in one:
        assert dict(old[name].attrs) == dict(new[name].attrs)
    differing = {"layout", "fingerprint"}
    for group in (old, new):
        assert differing <= set(group.attrs)
    assert {k: v for k, v in old.attrs.items() if k not in differing} == {
        k: v for k, v in new.attrs.items() if k not in differing
    }


LAYOUTS = {
    "training": {"chunk": 32, "shard": 64, "codec": "lz4"},
    "looking": {"chunk": 48, "shard": 96, "dates": 1},
    "one shard": {"shard": 160},
}


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_the_content_is_the_same_array_for_array(
    cube: Path, tmp_path: Path, options: dict[str, Any]
):
    out = tmp_path / "new.zarr"
    report = rechunk_cube(cube, out, **options)
    assert_same_content(cube, out)
    old, new = open_season(cube), open_season(out)
    assert new.layout.chunk == options.get("chunk", 16)
    assert new.layout.shard == options["shard"]
    assert new.reflectance.shards[2:] == (options["shard"],) * 2
    assert new.reflectance.chunks[0] == options.get("dates", len(new.time))
    assert new.reflectance.compressors[0].cname.value == options.get("codec", "zstd")
    rows, cols = (-(-side // options["shard"]) for side in new.shape_yx)
    assert report.shards_written == rows * cols
    # Coverage counts what valid says, by the new chunks.
    valid, side = new.valid[:], new.layout.chunk
    for row, col in np.ndindex(new.coverage.shape[1:]):
        inside = valid[:, row * side : (row + 1) * side, col * side : (col + 1) * side]
        np.testing.assert_array_equal(new.coverage[:, row, col], inside.sum(axis=(1, 2)))
    np.testing.assert_array_equal(old.fields.split, new.fields.split)
    assert new.legend == old.legend
    assert validate_cube(open_cube(out, mask_and_scale=False)) == validate_cube(
        open_cube(cube, mask_and_scale=False)
    )
    assert (out / "items.parquet").read_bytes() == (cube / "items.parquet").read_bytes()
    xr.testing.assert_identical(
        open_cube(cube).drop_vars("coverage").compute().drop_attrs(),
        open_cube(out).drop_vars("coverage").compute().drop_attrs(),
    )
    assert not (out / "rechunk.shards").exists()
    assert "nothing to do" in str(rechunk_cube(cube, out, **options))


@pytest.mark.parametrize("begun", [64, 256], ids=["rechunked", "written so"])
def test_chunks_of_256_px_that_are_all_clear_are_counted(tmp_path: Path, begun: int):
    out = tmp_path / "new.zarr"
    made = write_clear(tmp_path / "old.zarr", Layout(chunk=begun, shard=512))
    if begun != 256:
        rechunk_cube(made, out, chunk=256, shard=512)
    new = open_season(out if out.exists() else made)
    assert new.coverage[:].tolist() == [[[65536, 65536, 11520], [9984, 9984, 1755]]]
    written = open_cube(new.cube, mask_and_scale=False)
    assert validate_cube(written)[0] == []
    wrapped = written.assign(coverage=written.coverage.astype("uint16"))
    (error,) = validate_cube(wrapped)[0]
    assert "counts to 65535; a chunk of 256 x 256 px has more" in error


def write_clear(path: Path, layout: Layout) -> Path:
    """Write a cube of 295 x 557 px with one date, clear everywhere."""
    window = Window(-563000, 57000, 295, 557)
    geobox = geobox_from_window(window, crs="EPSG:32631", resolution=10)
    season = create_season(
        path, SEASON, geobox=geobox, time=np.array(["2019-05-01T10:50:00"], "datetime64[s]"),
        bands=("red",), aoi=box(*geobox.boundingbox.bbox), layout=layout,
    )  # fmt: skip
    for shard in shards_of(season):
        values = np.full((1, 1, *shard.shape_yx), 500, dtype=np.int16)
        write_shard(season, shard, reflectance=values, valid=np.ones(values.shape[1:], dtype=bool))
    finish_season(path, SEASON)
    return path


def test_what_the_manifests_count_is_kept(cube: Path, tmp_path: Path):
    out = tmp_path / "new.zarr"
    rechunk_cube(cube, out, chunk=32, shard=32)
    before, after = (
        [read_manifest(file) for file in manifest_paths(path, SEASON)] for path in (cube, out)
    )
    assert len(after) > len(before)
    assert merge_audits(before) == merge_audits(after)
    valid = open_season(cube).valid[:]
    for manifest in after:
        window = manifest["window"]
        rows = slice(window["row"], window["row"] + window["height"])
        cols = slice(window["col"], window["col"] + window["width"])
        assert manifest["valid_fraction"] == pytest.approx(valid[:, rows, cols].mean())


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_where_nothing_was_written_nothing_is_read(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    path, out = tmp_path / "sparse.zarr", tmp_path / "new.zarr"
    geobox = geobox_from_window(Window(0, 0, 330, 415), crs="EPSG:32631", resolution=10)
    season = create_season(
        path, SEASON, geobox=geobox, time=np.array(["2018-10-03", "2018-10-08"], "datetime64[s]"),
        bands=("red", "nir"), layout=OLD, aoi=box(*geobox.boundingbox.bbox),
    )  # fmt: skip
    rng = np.random.default_rng(8)
    filled = np.zeros((330, 415), dtype=bool)
    for shard in shards_of(season):
        if (shard.row, shard.col) in ((0, 48), (288, 384)):
            values = rng.integers(1, 9000, (2, 2, *shard.shape_yx)).astype(np.int16)
            valid = rng.random((2, *shard.shape_yx)) < 0.7
            write_shard(season, shard, reflectance=values, valid=valid)
            filled[shard.rows, shard.cols] = True
    finish_season(path, SEASON)
    read: list[Window] = []
    get = zarr.Array.__getitem__

    def seen(array: Any, place: Any) -> Any:
        if array.basename in {"reflectance", "valid"}:
            rows, cols = place[-2:]
            read.append(Window(rows.start, cols.start, rows.stop - rows.start,
                               cols.stop - cols.start))  # fmt: skip
        return get(array, place)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__getitem__", seen)
        rechunk_cube(path, out, **options)

    before, after = arrays_of(path), arrays_of(out)
    for name in set(before) - {"coverage"}:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    assert read
    for window in read:
        near = window.expand(OLD.shard).intersection(Window(0, 0, 330, 415))
        assert filled[near.rows, near.cols].any()
    assert len(set(read)) < len(shards_of(open_season(out)))
    np.testing.assert_array_equal(
        open_season(out).coverage[:].sum(axis=(1, 2)), open_season(path).valid[:].sum(axis=(1, 2))
    )


@pytest.mark.parametrize("shard", [32, 64, 160], ids=["smaller", "larger", "one"])
def test_what_was_left_out_is_known_of_each_shard_it_lies_under(
    cube: Path, tmp_path: Path, shard: int
):
    copied, out = tmp_path / "copy.zarr", tmp_path / "new.zarr"
    shutil.copytree(cube, copied)
    height, width = open_season(copied).shape_yx
    lacking: dict[str, np.ndarray] = {}
    for number, file in enumerate(manifest_paths(copied, SEASON)):
        manifest, item = read_manifest(file), f"item {number % 3}"
        file.write_text(json.dumps({**manifest, "left_out": [item]}))
        rows, cols = (slice(s, s + n) for s, n in (
            (manifest["window"]["row"], manifest["window"]["height"]),
            (manifest["window"]["col"], manifest["window"]["width"]),
        ))  # fmt: skip
        lacking.setdefault(item, np.zeros((height, width), dtype=bool))[rows, cols] = True
    assert len(manifest_paths(copied, SEASON)) > 3

    rechunk_cube(copied, out, chunk=32, shard=shard)

    for manifest in map(read_manifest, manifest_paths(out, SEASON)):
        window = Window(**manifest["window"])
        here = {item for item, pixels in lacking.items() if pixels[window.rows, window.cols].any()}
        assert set(manifest["left_out"]) == here


@pytest.mark.slow
def test_append_goes_on_in_the_new_layout(cube: Path, planted_once: Any, tmp_path: Path):
    """Append after rechunk equals rechunk after append; what is unchanged is not read again."""
    moved, appended, both = (tmp_path / f"{name}.zarr" for name in ("moved", "appended", "both"))
    options = {"chunk": 32, "shard": 64, "dates": 1}
    rechunk_cube(cube, moved, **options)  # type: ignore[arg-type]
    assert "nothing new" in str(append_cube(moved, "2019-04-01"))
    report = append_cube(moved, "2019-04-30")
    assert report.windows_read == 4  # three bands and the classes of the third scene, one block
    assert open_season(moved).layout == Layout(chunk=32, shard=64, dates=1)
    shutil.copytree(cube, appended)
    append_cube(appended, "2019-04-30")
    rechunk_cube(appended, both, **options)  # type: ignore[arg-type]
    assert len(open_season(moved).time) == 3
    one, other = arrays_of(moved), arrays_of(both)
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_repair_goes_on_in_the_new_layout(planted: Any, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr("stcln_geo.cube.read._PAUSE_SECONDS", 0.0)
    broken = planted.folder / "S2_1_nir.tif"
    whole = broken.read_bytes()
    build_cube(plan_of(planted), tmp_path / "perfect.zarr")
    broken.unlink()
    build_cube(plan_of(planted, on_error="skip"), tmp_path / "lacking.zarr")
    rechunk_cube(tmp_path / "lacking.zarr", tmp_path / "new.zarr", chunk=32, shard=64)
    assert [entry.item for entry in find_left_out(tmp_path / "new.zarr")] == ["S2_1"]
    assert (tmp_path / "new.zarr" / "ledger.jsonl").is_file()
    broken.write_bytes(whole)
    report = repair_cube(tmp_path / "new.zarr")
    assert not report.remaining
    new, perfect = (open_season(tmp_path / f"{name}.zarr") for name in ("new", "perfect"))
    np.testing.assert_array_equal(new.reflectance[:], perfect.reflectance[:])
    np.testing.assert_array_equal(new.valid[:], perfect.valid[:])


@pytest.mark.slow
def test_workers_do_not_show_and_a_killed_one_goes_on(cube: Path, tmp_path: Path):
    script = (
        "import os, signal, sys\n"
        "from stcln_geo.cube.rechunk import rechunk_cube\n"
        "def kill(done, total, what):\n"
        "    if done == 3:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "rechunk_cube(sys.argv[1], sys.argv[2], chunk=32, shard=32, progress=kill)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    out = tmp_path / "new.zarr"
    done = subprocess.run([sys.executable, "-c", script, str(cube), str(out)], env=environment)
    assert done.returncode == -9
    report = rechunk_cube(cube, out, chunk=32, shard=32, execution=Execution(workers=2))
    assert report.shards_kept == 3
    assert report.shards_written > 5
    assert_same_content(cube, out)


def test_the_command_and_its_refusals(cube: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "new.zarr"

    def run(*options: str, to: Path = out) -> tuple[int, str]:
        code = invoke(["cube", "rechunk", str(cube), str(to), *options])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).split())

    code, text = run("--dry-run", "--chunk", "32", "--shard", "64")
    assert code == 0
    assert "chunks of 32 px and all dates in shards of 64 px, codec zstd" in text
    assert not out.exists()
    for options, words in (
        (["--chunk", "20"], "multiple of 16"),
        (["--chunk", "0"], "chunks of 0 px in shards of 0 px"),
        (["--chunk", "32", "--shard", "0"], "shards of 0 px"),
        (["--codec", "zip"], "zstd or lz4"),
        (["--dates-per-chunk", "0"], "1 or more"),
        (["--memory", "1MB"], "Give more --memory"),
    ):
        code, text = run(*options)
        assert (code, "Traceback" in text) == (2, False)
        assert words in text
    assert "not changed in place" in run(to=cube)[1]
    assert not out.exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert "something else is there" in run(to=tmp_path / "full")[1]
    assert run("--chunk", "32", "--shard", "64")[0] == 0
    assert run("--chunk", "32", "--shard", "64") == (0, f"{out} is complete: nothing to do.")
    code, text = run("--chunk", "16")
    assert code == 2
    assert "the layout is another now" in text
    assert invoke(["cube", "validate", str(out)]) == 0
    assert invoke(["cube", "info", str(out)]) == 0
    assert "chunks 32 px, shards 64 px" in capsys.readouterr().out


def test_a_cube_that_changes_meanwhile_is_noticed(cube: Path, tmp_path: Path):
    source, out = tmp_path / "s.zarr", tmp_path / "new.zarr"
    shutil.copytree(cube, source)

    def change(done: int, total: int, what: str) -> None:
        metadata = source / SEASON / "zarr.json"
        content = json.loads(metadata.read_text())
        content["attributes"]["note"] = "changed"
        metadata.write_text(json.dumps(content))

    with pytest.raises(CubeError, match="changed meanwhile"):
        rechunk_cube(source, out, progress=change)
