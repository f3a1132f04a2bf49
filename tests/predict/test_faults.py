"""What goes wrong in the field: odd regions, few dates, broken chunks, full disks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely

from stcln_geo.cli.main import invoke
from stcln_geo.cube.store import (
    Layout,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_shard,
)
from stcln_geo.errors import CheckpointError, CubeError, OutputError, TaskError
from stcln_geo.execution import Execution
from stcln_geo.grid import Window, snapped_geobox
from stcln_geo.predict import Prediction, PredictSpec, predict_region
from stcln_geo.predict import run as run_module
from stcln_geo.predict import shard as shard_module
from stcln_geo.predict.shard import ShardTask, predict_shard

CPU = {"device": "cpu", "precision": "float32", "seam_audit": 0}


def read(product: Prediction, name: str) -> np.ndarray:
    with rasterio.open(product.out / f"{name}.tif") as source:
        return source.read(1)


@pytest.fixture(scope="module")
def whole(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    out = tmp_path_factory.mktemp("faults") / "whole"
    return predict_region(world.cube, world.checkpoint, out, spec=PredictSpec(**CPU, shard_size=40))


@pytest.mark.parametrize(
    ("height", "width"), [(1, 60), (60, 1), (1, 1), (3, 5)], ids=["row", "column", "pixel", "patch"]
)
@pytest.mark.parametrize("blend", [False, True])
def test_regions_smaller_than_a_window(
    world: Any, whole: Prediction, tmp_path: Path, height: int, width: int, blend: bool
) -> None:
    top, left = -world.extent.row * 10.0, world.extent.col * 10.0
    part = shapely.box(left + 50, top - 200 - 10 * height, left + 50 + 10 * width, top - 200)
    spec = PredictSpec(**{**CPU, "seam_audit": None}, blend=blend)
    product = predict_region(world.cube, world.checkpoint, tmp_path, region=part, spec=spec)
    found = read(product, "classes")
    assert found.shape == (height, width)
    at = np.s_[20 : 20 + height, 5 : 5 + width]
    expected = read(whole, "classes")[at]
    assert np.array_equal(found == 255, expected == 255)
    if not blend:
        assert np.array_equal(found, expected)


def test_three_dates_are_enough_and_two_are_not(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for dates, code in ((3, 0), (2, 2)):
        cube = few_dates(world, tmp_path / f"{dates}.zarr", dates)
        out = tmp_path / str(dates)
        arguments = ["predict", str(cube), "--checkpoint", str(world.checkpoint), "--out", str(out)]
        assert invoke([*arguments, "--device", "cpu"]) == code
        text = capsys.readouterr()
        if code:
            assert "--min-clear 2" in text.err
        else:
            with rasterio.open(out / "classes.tif") as source:
                assert (source.read(1) != 255).any()


def few_dates(world: Any, path: Path, dates: int) -> Path:
    """Write a small cube with some dates, all clear but for a corner."""
    aoi = shapely.box(500_200, 5_600_000, 500_500, 5_600_250)
    geobox = snapped_geobox(aoi, crs=world.crs, resolution=10, lattice=world.lattice)
    days = np.linspace(20, 280, dates).astype(int)
    building = create_season(
        path, "2018-09-01", geobox=geobox, bands=world.bands, aoi=aoi, lattice=world.lattice,
        time=np.datetime64("2018-09-01", "s") + days * np.timedelta64(86400, "s"),
        layout=Layout(chunk=16, shard=32),
    )  # fmt: skip
    for shard in shards_of(building):
        place = shard.shift(building.window.row, building.window.col)
        numbers = world.pixels_at(place, 8, len(world.bands))[0][:dates]
        valid = np.ones((dates, *place.shape_yx), dtype=bool)
        write_shard(building, shard, reflectance=np.maximum(numbers, 100), valid=valid)
    finish_season(path, "2018-09-01")
    return path


def test_a_shard_without_a_clear_date_is_nodata_and_runs_nothing(
    world: Any, tmp_path: Path
) -> None:
    cube = tmp_path / "cloudy.zarr"
    shutil.copytree(world.cube, cube)
    season = open_season(cube, mode="r+")
    season.valid[:] = False
    season.coverage[:] = 0
    product = predict_region(cube, world.checkpoint, tmp_path / "map", spec=PredictSpec(**CPU))
    assert product.windows == 0
    assert product.pixels == 0
    assert (read(product, "classes") == 255).all()
    assert set(np.unique(read(product, "qa")).tolist()) == {1, 2}
    assert set(np.unique(read(product, "observations")).tolist()) == {0, 255}


def break_one_chunk(cube: Path) -> tuple[Path, bytes]:
    """Spoil the middle of the largest file of reflectances; return it and what it held."""
    files = [path for path in cube.glob("*/reflectance/c/**/*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = victim.read_bytes()
    size = len(content)
    victim.write_bytes(content[: size // 8] + b"\x5a" * (size // 2) + content[-(size * 3 // 8) :])
    return victim, content


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corrupt_chunk_costs_its_shards_only(
    world: Any,
    whole: Prediction,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    workers: int,
) -> None:
    cube = tmp_path / "cube.zarr"
    shutil.copytree(world.cube, cube)
    victim, content = break_one_chunk(cube)
    out = tmp_path / "map"
    spec = PredictSpec(**CPU, shard_size=40, memory=100_000)
    with pytest.raises(TaskError, match=r"shards failed after 2 attempts: row \d+, column \d+"):
        predict_region(cube, world.checkpoint, out, spec=spec, execution=Execution(workers=workers))
    run = json.loads((out / "run.json").read_text())
    failed = [tuple(one["shard"]) for one in run["failed_shards"]]
    assert 0 < len(failed) < run["shards"]
    for one in run["failed_shards"]:
        assert one["error"].startswith("UnreadableError: Cannot read rows ")
        assert str(cube) in one["error"]
    with rasterio.open(out / "qa.tif") as source:
        quality = source.read(1)
    with rasterio.open(out / "classes.tif") as source:
        classes = source.read(1)
    for shard in failed:
        at = Window(*shard).relative_to(world.extent)
        assert set(np.unique(quality[at.rows, at.cols]).tolist()) <= {1, 5}
        assert (classes[at.rows, at.cols] == 255).all()
    rest = quality != 5
    assert np.array_equal(classes[rest], read(whole, "classes")[rest])

    command = [
        "predict", str(cube), "--checkpoint", str(world.checkpoint), "--out", str(out),
        "--device", "cpu", "--precision", "float32", "--shard-size", "40", "--memory", "100000",
        "--seam-audit", "0",
    ]  # fmt: skip
    assert invoke(command) == 1
    assert "quality code 5" in capsys.readouterr().err.replace("\n", " ")

    victim.write_bytes(content)
    product = predict_region(cube, world.checkpoint, out, spec=spec)
    assert product.resumed_shards == run["shards"] - len(failed), "only these ran"
    assert np.array_equal(read(product, "classes"), read(whole, "classes"))
    assert not list((out / "shards").glob("*.tif"))
    assert json.loads((out / "run.json").read_text())["failed_shards"] == []


def test_a_damaged_part_of_the_mask_costs_its_shards_only(
    world: Any, whole: Prediction, tmp_path: Path
) -> None:
    extent, mask = world.extent, tmp_path / "cropland.tif"
    with rasterio.open(
        mask, "w", driver="GTiff", height=128, width=128, count=1, dtype="uint8", crs=world.crs,
        transform=rasterio.Affine(10, 0, extent.col * 10, 0, -10, -extent.row * 10),
        tiled=True, blockxsize=64, blockysize=64, compress="deflate",
    ) as target:  # fmt: skip
        target.write(np.ones((1, 128, 128), dtype=np.uint8))
    with rasterio.open(mask) as source:
        place = int(source.get_tag_item("BLOCK_OFFSET_0_1", "TIFF", bidx=1))
    content = bytearray(mask.read_bytes())
    content[place : place + 20] = b"\x5a" * 20
    mask.write_bytes(content)
    spec = PredictSpec(**CPU, shard_size=40, mask=mask)
    with pytest.raises(TaskError, match=r"shards failed .* Cannot read the mask .*cropland\.tif"):
        predict_region(world.cube, world.checkpoint, tmp_path / "map", spec=spec)
    run = json.loads((tmp_path / "map" / "run.json").read_text())
    assert 0 < len(run["failed_shards"]) < run["shards"]
    with rasterio.open(tmp_path / "map" / "qa.tif") as source:
        rest = source.read(1) != 5
    with rasterio.open(tmp_path / "map" / "classes.tif") as source:
        assert np.array_equal(source.read(1)[rest], read(whole, "classes")[rest])


def test_what_hits_every_shard_stops_at_the_first(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def count(task: ShardTask) -> dict[str, Any]:
        seen.append(task)
        return predict_shard(task)

    monkeypatch.setattr(run_module, "predict_shard", count)
    network = world.make_network(4)
    network.classifier.weight.data[2] = np.nan
    broken = world.save(tmp_path / "nan.safetensors", network)
    with pytest.raises(CheckpointError, match="NaN"):
        predict_region(world.cube, broken, tmp_path / "map", spec=PredictSpec(**CPU, shard_size=40))
    assert len(seen) == 1


def test_no_map_is_made_of_nothing(world: Any, tmp_path: Path) -> None:
    cube = tmp_path / "cube.zarr"
    shutil.copytree(world.cube, cube)
    for path in cube.glob("*/reflectance/c/**/*"):
        if path.is_file():
            path.write_bytes(b"\x5a" * path.stat().st_size)
    out = tmp_path / "map"
    with pytest.raises(TaskError, match=r"None of 6 shards .*no map\. .*Cannot read rows"):
        predict_region(cube, world.checkpoint, out, spec=PredictSpec(**CPU, shard_size=40))
    assert not (out / "classes.tif").exists()
    assert not list(out.rglob(".*"))


@pytest.fixture
def one_shard(world: Any, whole: Prediction, tmp_path: Path) -> tuple[ShardTask, Path]:
    """A run of which one shard is to be labelled again, and its manifest."""
    out = tmp_path / "map"
    shutil.copytree(whole.out, out)
    manifest = sorted((out / "shards").glob("*.json"))[0]
    plan = json.loads((out / "plan.json").read_text())
    shard = tuple(json.loads(manifest.read_text())["shard"])
    return ShardTask(out=str(out), run=plan["run"], shard=shard, threads=1), manifest


def test_a_shard_that_another_worker_finished_meanwhile_is_not_written_again(
    one_shard: tuple[ShardTask, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after kill -9 of a client, whose workers go on with what they have in hand."""
    task, manifest = one_shard
    made = predict_shard(task)
    finished = manifest.read_text()
    label = shard_module._Shard.label

    def be_late(self: Any, **options: Any) -> Any:
        tally = label(self, **options)
        manifest.write_text(finished)
        return tally

    monkeypatch.setattr(shard_module._Shard, "label", be_late)
    manifest.unlink()
    before = {path: path.stat().st_mtime_ns for path in manifest.parent.glob("*.tif")}
    assert len(before) == 4
    assert predict_shard(task) == {**made, "reused": True}
    assert {path: path.stat().st_mtime_ns for path in manifest.parent.glob("*.tif")} == before


def test_a_worker_of_a_replaced_run_writes_nothing(
    one_shard: tuple[ShardTask, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a client was killed and the command given again with --overwrite."""
    task, manifest = one_shard
    manifest.unlink()
    label = shard_module._Shard.label

    def be_replaced(self: Any, **options: Any) -> Any:
        tally = label(self, **options)
        path = Path(task.out) / "plan.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "run": "another"}))
        return tally

    monkeypatch.setattr(shard_module._Shard, "label", be_replaced)
    with pytest.raises(CubeError, match="the plan of another run"):
        predict_shard(task)
    assert not list(manifest.parent.glob("*.tif"))
    assert not manifest.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("needs root to mount a small file system")
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True
    )
    if made.returncode:
        pytest.skip("mount is not allowed here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_run_goes_on_elsewhere(
    world: Any, whole: Prediction, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"x" * 260_000)
    out = small_disk / "map"
    spec = PredictSpec(**CPU, shard_size=40)
    with pytest.raises(OutputError, match=r"[Ff]ree some space"):
        predict_region(world.cube, world.checkpoint, out, spec=spec)
    assert not (out / "run.json").exists()
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    product = predict_region(world.cube, world.checkpoint, out, spec=spec)
    assert np.array_equal(read(product, "classes"), read(whole, "classes"))
    assert not list(out.rglob("*.part*"))
