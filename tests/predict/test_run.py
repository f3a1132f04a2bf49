"""The map is a function of cube, checkpoint and lattice, and of nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
import torch
from PIL import Image

from stcln_geo import open_cube
from stcln_geo.cog import validate_cog
from stcln_geo.cube.store import open_season
from stcln_geo.errors import (
    CheckpointError,
    CubeError,
    InputError,
    OutputError,
    StclnGeoWarning,
)
from stcln_geo.execution import Execution
from stcln_geo.grid import Window
from stcln_geo.model.checkpoint import load_model, read_metadata
from stcln_geo.predict import Prediction, PredictSpec, forward, plan_prediction, predict_region
from stcln_geo.predict import run as run_module
from stcln_geo.predict import shard as shard_module
from stcln_geo.predict import windows as windows_module
from stcln_geo.predict.folder import folder_lock
from stcln_geo.predict.smooth import Smoothing, smooth
from stcln_geo.report.accuracy import evaluate_map, write_accuracy
from stcln_geo.storage import list_files, location, write_file

PRODUCT = {
    "classes.tif", "classes.tif.aux.xml", "classes.qml", "confidence.png", "confidence.tif",
    "item.json", "legend.csv", "legend.json", "observations.tif", "plan.json", "qa.png", "qa.qml",
    "qa.tif", "qa.tif.aux.xml", "quicklook.png", "report.html", "run.json", "shards",
}  # fmt: skip

CPU = {"device": "cpu", "precision": "float32", "min_clear": 1, "seam_audit": 0}


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as source:
        return source.read(1)


def layers(product: Prediction) -> np.ndarray:
    return np.stack([read(product.classes), read(product.confidence)])


def label_by_hand(
    world: Any, *, min_clear: int = 1, smoothing: Smoothing | None = None, heard: int = 1
) -> np.ndarray:
    """Run the network window by window over the region; classes and confidence, (2, H, W).

    With smoothing, pixels of so many dates are heard.
    """
    season, lattice, extent = world.season, world.lattice, world.extent
    module = load_model(world.checkpoint)
    bands = [season.bands.index(band) for band in module.config.bands]
    pad = 2 * lattice.window
    space = ((0, 0), (pad, pad), (pad, pad))
    numbers = np.pad(season.reflectance[:][:, bands], ((0, 0), *space), constant_values=-32768)
    valid = np.pad(season.valid[:], space)
    found = np.full((2, *extent.shape_yx), 255, dtype=np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for core in lattice.cores(extent):
        at = core.expand(lattice.halo).relative_to(season.window).shift(pad, pad)
        usable = valid[:, at.rows, at.cols]
        dates = [date for date in range(len(usable)) if usable[date].any()]
        if not dates:
            continue
        images = numbers[dates][:, :, at.rows, at.cols].astype(np.float32) * np.float32(1e-4)
        with torch.inference_mode():
            logits = module(
                torch.from_numpy(images)[None],
                torch.from_numpy(season.days[dates])[None],
                torch.from_numpy(usable[dates])[None],
            )[0]
        shares = torch.softmax(logits, 0)
        if smoothing is not None:
            have_a_say = torch.from_numpy(usable.sum(0) >= heard)
            shares = smooth(shares[None], have_a_say[None], smoothing)[0]
        probability, best = shares.max(0).values.numpy(), shares.argmax(0).numpy()
        for row in range(lattice.stride):
            for col in range(lattice.stride):
                y, x = core.row + row - extent.row, core.col + col - extent.col
                if not (0 <= y < extent.height and 0 <= x < extent.width):
                    continue
                centre = shapely.Point((core.col + col + 0.5) * 10, -(core.row + row + 0.5) * 10)
                inside = row + lattice.halo, col + lattice.halo
                seen = usable[:, inside[0], inside[1]].sum()
                if seen >= min_clear and season.aoi.intersects(centre):
                    found[0, y, x] = int(best[inside])
                    found[1, y, x] = int(np.floor(probability[inside] * 100 + 0.5))
    torch.set_num_threads(threads)
    return found


@pytest.fixture(scope="module")
def by_hand(world: Any) -> np.ndarray:
    return label_by_hand(world)


@pytest.fixture(scope="module")
def product(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    out = tmp_path_factory.mktemp("product") / "map"
    return predict_region(world.cube, world.checkpoint, out, spec=PredictSpec(**CPU))


@pytest.mark.parametrize(
    ("shard_size", "workers", "memory"),
    [
        (64, 0, None), (96, 0, 2000), (256, 0, None),
        pytest.param(64, 1, None, marks=pytest.mark.slow),
        pytest.param(24, 2, 100_000, marks=pytest.mark.slow),
    ],
    ids=["64", "96-low-memory", "256", "64-one-worker", "24-two-workers"],
)  # fmt: skip
def test_the_map_equals_windows_run_by_hand(
    world: Any,
    by_hand: np.ndarray,
    tmp_path: Path,
    shard_size: int,
    workers: int,
    memory: int | None,
) -> None:
    spec = PredictSpec(shard_size=shard_size, memory=memory, **CPU)
    product = predict_region(
        world.cube, world.checkpoint, tmp_path, spec=spec, execution=Execution(workers=workers)
    )
    assert np.array_equal(layers(product), by_hand)
    assert set(np.unique(by_hand[0])) == {0, 1, 2, 3, 255}, "the test must tell classes apart"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing_and_torch_keeps_its_own(
    world: Any, by_hand: np.ndarray, tmp_path: Path, threads: int
) -> None:
    before = torch.get_num_threads()
    product = predict_region(
        world.cube,
        world.checkpoint,
        tmp_path,
        spec=PredictSpec(**CPU),
        execution=Execution(threads=threads),
    )
    assert np.array_equal(layers(product), by_hand)
    assert torch.get_num_threads() == before


def test_two_regions_agree_where_they_overlap(
    world: Any, by_hand: np.ndarray, tmp_path: Path
) -> None:
    """Regions of one cube, and another cube over other land."""
    top, left = -world.extent.row * 10.0, world.extent.col * 10.0
    part = shapely.Polygon(
        [(left + 96, top - 300), (left + 700, top - 310), (left + 395, top - 955)]
    )
    elsewhere = shapely.box(left + 211, top - 1333, left + 999, top - 388)
    other_cube = world.make_season(tmp_path / "other.zarr", elsewhere, chunk=16).cube
    runs = [
        (world.cube, part, Window(world.extent.row + 30, world.extent.col + 9, 66, 61)),
        (other_cube, None, Window(world.extent.row + 38, world.extent.col + 21, 96, 79)),
    ]
    for index, (cube, region, expected) in enumerate(runs):
        product = predict_region(
            cube, world.checkpoint, tmp_path / str(index), region=region, spec=PredictSpec(**CPU)
        )
        with rasterio.open(product.classes) as source:
            place = Window(
                round(-source.transform.f / 10), round(source.transform.c / 10), *source.shape
            )
        assert place == expected
        both = place.intersection(world.extent)
        one, whole = both.relative_to(place), both.relative_to(world.extent)
        mine, theirs = layers(product)[:, one.rows, one.cols], by_hand[:, whole.rows, whole.cols]
        labelled = (mine[0] != 255) & (theirs[0] != 255)
        assert labelled.sum() > 1000
        assert np.array_equal(mine[:, labelled], theirs[:, labelled])


def test_what_was_read_is_freed_before_more_is_read(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block at work and one that waits; never a third."""
    arrays: list[weakref.ref[np.ndarray]] = []
    held = []
    read = windows_module.read_block

    def watch(*arguments: Any, **options: Any) -> Any:
        held.append(sum(array() is not None for array in arrays))
        block = read(*arguments, **options)
        arrays.append(weakref.ref(block.reflectance))
        return block

    monkeypatch.setattr(windows_module, "read_block", watch)
    spec = PredictSpec(shard_size=256, memory=1, **CPU)
    predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert len(held) > 3
    assert max(held) <= 1, "the one that waits"


def test_the_record_splits_the_time_of_the_shards(world: Any, tmp_path: Path) -> None:
    spec = PredictSpec(shard_size=64, **CPU)
    predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    run = json.loads((tmp_path / "run.json").read_text())
    spent = run["seconds"]["shards"]
    assert spent["total"] >= spent["wait"] + spent["write"] > 0
    assert 0 < spent["device"] <= spent["total"]
    assert spent["idle"] == pytest.approx(spent["total"] - spent["device"], abs=0.01)
    assert spent["read"] > 0
    assert "Device idle" in (tmp_path / "report.html").read_text()


def test_pixels_without_enough_dates_or_outside_the_region_are_nodata(
    world: Any, by_hand: np.ndarray, tmp_path: Path
) -> None:
    assert (by_hand[:, 40:47, :9] == 255).all(), "no date sees this place"
    assert (by_hand[:, -1, -1] == 255).all(), "the polygon's cut corner"
    assert (by_hand[0, 70:75, 50:] != 255).all(), "one date sees this place"
    spec = PredictSpec(**{**CPU, "min_clear": 2})
    product = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    found = layers(product)
    assert (found[:, 70:75, 50:] == 255).all()
    assert np.array_equal(found, label_by_hand(world, min_clear=2))


def test_pixels_without_enough_dates_have_no_say_in_their_neighbours(
    world: Any, tmp_path: Path
) -> None:
    smoothing = Smoothing(method="majority")
    expected = label_by_hand(world, min_clear=4, smoothing=smoothing, heard=4)
    all_heard = label_by_hand(world, min_clear=4, smoothing=smoothing, heard=1)
    assert (expected[0] != all_heard[0]).sum() > 10
    spec = PredictSpec(**{**CPU, "min_clear": 4, "smooth": "majority"})
    product = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert np.array_equal(layers(product), expected)


def test_the_product_is_whole_and_says_what_it_is(world: Any, product: Prediction) -> None:
    assert {path.name for path in product.out.iterdir()} == PRODUCT
    assert {path.suffix for path in (product.out / "shards").iterdir()} == {".json"}
    values = read(product.classes)
    counts = dict(
        zip(*(part.tolist() for part in np.unique(values, return_counts=True)), strict=True)
    )
    assert product.histogram == counts
    assert product.pixels == int((values != 255).sum())
    assert product.windows == len(world.lattice.cores(world.extent)) - 3, "cut corner: 3 windows"
    assert validate_cog(product.classes, legend=world.legend, histogram=counts) == ([], [])
    assert validate_cog(product.confidence) == ([], [])
    with rasterio.open(product.classes) as source, rasterio.open(product.confidence) as other:
        assert source.crs.to_epsg() == 32631
        assert tuple(source.transform)[:6] == (10, 0, 500_170, 0, -10, 5_600_330)
        assert source.nodata == other.nodata == 255
        assert source.shape == other.shape == world.extent.shape_yx
        palette = source.colormap(1)
        assert all(palette[code] == color for code, color in world.legend.colormap().items())
        confidence = other.read(1)
    assert np.array_equal(confidence == 255, values == 255)
    assert confidence[confidence != 255].max() <= 100
    assert confidence[confidence != 255].min() >= 25, "the winner of four classes"

    run = json.loads((product.out / "run.json").read_text())
    assert (run["cube"], run["checkpoint"]) == (world.cube.name, world.checkpoint.name)
    for name in ("run.json", "item.json", "report.html"):
        assert str(world.cube.parent) not in (product.out / name).read_text(), name
    assert run["owned_pixels"] == product.pixels
    assert run["spec"]["window"] == 16
    assert run["spec"]["halo"] == 4
    assert run["km2_per_second"] > 0
    assert run["devices"] == ["cpu"]


def test_the_stac_item_describes_the_files(world: Any, product: Prediction) -> None:
    pystac = pytest.importorskip("pystac")
    item = pystac.Item.from_file(product.item)
    for asset in item.assets.values():
        assert asset.href.startswith("./")
        assert (product.out / asset.href).is_file()
    assert item.properties["proj:code"] == "EPSG:32631"
    assert item.properties["proj:shape"] == [101, 75]
    assert item.properties["start_datetime"] == "2018-09-21T00:00:00Z"
    assert item.properties["end_datetime"] == "2019-06-29T00:00:00Z"
    classes = item.assets["classes"].extra_fields["classification:classes"]
    assert [entry["title"] for entry in classes[:-1]] == list(world.legend.names)
    assert sum(entry.get("count", 0) for entry in classes) == product.pixels
    west, south, east, north = item.bbox
    assert 3.00 < west < east < 3.02
    assert 50.54 < south < north < 50.56


def test_the_quicklook_has_the_legends_colours(world: Any, product: Prediction) -> None:
    picture = np.asarray(Image.open(product.out / "quicklook.png"))
    values = read(product.classes)
    height, width = values.shape
    assert picture.shape[0] > 5 * height, "the legend stands below"
    picture = picture[: 5 * height : 5, : 5 * width : 5]
    for code, color in world.legend.colormap().items():
        assert (picture[values == code] == color).all()
    assert (picture[values == 255][:, 3] == 0).all()


def test_a_finished_run_is_not_touched(
    world: Any, product: Prediction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "predict_shard", explode)
    before = {path.name: path.stat().st_mtime_ns for path in product.out.glob("*.*")}
    again = predict_region(world.cube, world.checkpoint, product.out, spec=PredictSpec(**CPU))
    assert again.histogram == product.histogram
    after = {path.name: path.stat().st_mtime_ns for path in product.out.glob("*.*")}
    assert {name for name in after if after[name] != before[name]} <= {"plan.json"}

    (product.out / "quicklook.png").unlink()
    predict_region(world.cube, world.checkpoint, product.out, spec=PredictSpec(**CPU))
    assert {path.name for path in product.out.iterdir()} == PRODUCT


def explode(task: Any) -> Any:
    raise AssertionError(f"{task} must not run")


@pytest.mark.slow
def test_damaged_shards_are_labelled_again_and_others_kept(
    world: Any, by_hand: np.ndarray, tmp_path: Path
) -> None:
    spec = PredictSpec(shard_size=40, keep_shards=True, **CPU)
    first = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    manifests = sorted((tmp_path / "shards").glob("*.json"))
    rasters = sorted((tmp_path / "shards").glob("*.confidence.tif"))
    assert len(manifests) == 6
    manifests[0].unlink()
    rasters[1].write_bytes(rasters[1].read_bytes()[:-300])
    with rasterio.open(rasters[2], "r+") as source:
        source.write(source.read(1) ^ 1, 1)
    rasters[3].unlink()
    manifests[4].write_text("{")
    (tmp_path / "classes.tif").unlink()

    second = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert second.resumed_shards == 1
    assert np.array_equal(layers(second), by_hand)
    assert second.windows == first.windows


def test_a_map_of_two_precisions_is_told(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by workers of two kinds of processor, or where a run goes on elsewhere."""
    spec = PredictSpec(shard_size=40, keep_shards=True, device="cpu", seam_audit=0)

    def on_a_processor(precision: str) -> Prediction:
        monkeypatch.setattr(forward, "_LOADED", OrderedDict())
        monkeypatch.setattr(forward, "choose_precision", lambda *_, **__: precision)
        return predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)

    on_a_processor("float32")
    for name in [*sorted((tmp_path / "shards").glob("*.json"))[:2], tmp_path / "classes.tif"]:
        name.unlink()
    with pytest.warns(StclnGeoWarning, match=r"2 of 6 in bf16 on cpu.*--precision") as told:
        second = on_a_processor("bf16")
    assert second.resumed_shards == 4
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["warnings"] == [str(one.message) for one in told]
    assert run["precisions"] == ["bf16", "float32"]


def test_an_interrupted_run_continues_and_leaves_no_litter(
    world: Any, by_hand: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PredictSpec(shard_size=40, **CPU)
    done = []

    def stop_in_the_third(path: Path, *rest: Any, **options: Any) -> None:
        if path.name.endswith("classes.tif") and len(done) == 2:
            path.with_name(f".{path.name}.1234.part").write_bytes(b"half")
            raise KeyboardInterrupt
        if path.name.endswith("confidence.tif"):
            done.append(path)
        write_raster(path, *rest, **options)

    write_raster = shard_module.write_raster
    with monkeypatch.context() as patched:
        patched.setattr(shard_module, "write_raster", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert not (tmp_path / "classes.tif").exists()
    assert not (tmp_path / "run.json").exists()

    product = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert product.resumed_shards == 2
    assert np.array_equal(layers(product), by_hand)
    assert {path.name for path in tmp_path.iterdir()} == PRODUCT
    assert {path.suffix for path in (tmp_path / "shards").iterdir()} == {".json"}


@pytest.mark.slow
def test_a_killed_process_is_resumed(world: Any, by_hand: np.ndarray, tmp_path: Path) -> None:
    code = (
        "import sys; from stcln_geo.predict import *;"
        "predict_region(sys.argv[1], sys.argv[2], sys.argv[3], spec=PredictSpec("
        "shard_size=16, device='cpu', precision='float32', min_clear=1, seam_audit=0))"
    )
    arguments = [str(world.cube), str(world.checkpoint), str(tmp_path)]
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        deadline = time.monotonic() + 300
        while len(list(tmp_path.glob("shards/*.json"))) < 3 and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
    assert not (tmp_path / "run.json").exists()
    spec = PredictSpec(shard_size=16, **CPU)
    product = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert product.resumed_shards >= 3
    assert np.array_equal(layers(product), by_hand)
    assert {path.name for path in tmp_path.iterdir()} == PRODUCT


def test_runs_are_never_mixed(world: Any, tmp_path: Path) -> None:
    other = world.save(tmp_path / "other.safetensors", world.make_network(4, seed=5))
    out = tmp_path / "out"
    small = shapely.box(500_300, 5_600_000, 500_420, 5_600_100)
    spec = PredictSpec(**CPU)
    first = predict_region(world.cube, world.checkpoint, out, region=small, spec=spec)
    with pytest.raises(OutputError, match=r"another run \(different: checkpoint\).*--overwrite"):
        predict_region(world.cube, other, out, region=small, spec=spec)
    assert first.classes.is_file()
    (out / "notes.txt").write_text("mine")
    second = predict_region(world.cube, other, out, region=small, spec=spec, overwrite=True)
    fresh = predict_region(world.cube, other, tmp_path / "fresh", region=small, spec=spec)
    assert np.array_equal(layers(second), layers(fresh))
    assert {path.name for path in out.iterdir()} == {*PRODUCT, "notes.txt"}


def test_a_folder_has_one_command_at_a_time(world: Any, tmp_path: Path) -> None:
    """A second one would remove the temporary files, and in the end the shards, of the first."""
    out = tmp_path / "out"
    small = shapely.box(500_300, 5_600_000, 500_420, 5_600_100)
    spec = PredictSpec(**CPU)
    with (
        folder_lock(out),
        pytest.raises(OutputError, match=rf"process {os.getpid()} .*one command at a time.*remove"),
    ):
        predict_region(world.cube, world.checkpoint, out, region=small, spec=spec, overwrite=True)
    assert not list(out.iterdir())
    pixels = open_cube(world.cube)
    with folder_lock(out), pytest.raises(OutputError, match="one command at a time"):
        predict_region(pixels, world.checkpoint, out, region=small, spec=spec, overwrite=True)
    assert not list(out.iterdir()), "the cube that another call maps is not replaced"
    predict_region(world.cube, world.checkpoint, out, region=small, spec=spec)
    assert {path.name for path in out.iterdir()} == PRODUCT


def test_a_cube_that_changes_while_it_is_mapped_makes_no_map(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cube, out = tmp_path / "cube.zarr", tmp_path / "map"
    shutil.copytree(world.cube, cube)
    spec = PredictSpec(**CPU, shard_size=40)
    made = []

    def be_replaced(task: Any) -> dict[str, Any]:
        if len(made) == 3:
            season = open_season(cube, mode="r+")
            season.valid[:2, :32] = False
            season.coverage[:2, 0] = 0
        made.append(predict_shard(task))
        return made[-1]

    predict_shard = shard_module.predict_shard
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "predict_shard", be_replaced)
        with pytest.raises(CubeError, match=r"season 2018-09-01 of .* was changed while"):
            predict_region(cube, world.checkpoint, out, spec=spec)
    assert not list(out.glob("*.tif"))
    with pytest.raises(OutputError, match=r"different: fingerprint, of the cube's season"):
        predict_region(cube, world.checkpoint, out, spec=spec)
    after = predict_region(cube, world.checkpoint, out, spec=spec, overwrite=True)
    fresh = predict_region(cube, world.checkpoint, tmp_path / "fresh", spec=spec)
    assert np.array_equal(layers(after), layers(fresh))


def test_the_accuracy_of_a_map_does_not_outlive_it(world: Any, tmp_path: Path) -> None:
    other = world.save(tmp_path / "other.safetensors", world.make_network(4, seed=5))
    out = tmp_path / "out"
    small = shapely.box(500_300, 5_600_000, 500_420, 5_600_100)
    points = tmp_path / "points.gpkg"
    geopandas.GeoDataFrame(
        {"crop": ["Wheat", "Oat"]},
        geometry=geopandas.points_from_xy([500_345, 500_365], [5_600_045, 5_600_055]),
        crs="EPSG:32631",
    ).to_file(points)
    predict_region(world.cube, world.checkpoint, out, region=small, spec=PredictSpec(**CPU))
    write_accuracy(evaluate_map(out, points, column="crop"), out / "accuracy")
    (out / "accuracy" / "notes.txt").write_text("mine")

    predict_region(world.cube, world.checkpoint, out, region=small, spec=PredictSpec(**CPU))
    assert (out / "accuracy" / "report.html").is_file(), "the map is the same"
    predict_region(world.cube, other, out, region=small, spec=PredictSpec(**CPU), overwrite=True)
    assert [path.name for path in (out / "accuracy").iterdir()] == ["notes.txt"]

    write_accuracy(evaluate_map(out, points, column="crop"), out / "accuracy")
    (out / "accuracy" / "notes.txt").unlink()
    predict_region(
        world.cube, world.checkpoint, out, region=small, spec=PredictSpec(**CPU), overwrite=True
    )
    assert not (out / "accuracy").exists()


def test_a_folder_with_a_foreign_map_is_left_alone(world: Any, tmp_path: Path) -> None:
    (tmp_path / "classes.tif").write_bytes(b"precious")
    with pytest.raises(OutputError, match="holds another run"):
        predict_region(world.cube, world.checkpoint, tmp_path)
    assert (tmp_path / "classes.tif").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["run.json", "legend.csv", "report.html", "zarr.json"])
def test_files_that_are_no_maps_are_not_written_over(world: Any, tmp_path: Path, name: str) -> None:
    """As a run of training, the folder of one's own files, or a cube given as --out."""
    (tmp_path / name).write_bytes(b"precious")
    with pytest.raises(OutputError, match=rf"other files.*\({name}\).*another --out"):
        predict_region(world.cube, world.checkpoint, tmp_path)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"precious"]


def test_a_broken_network_is_named(world: Any, tmp_path: Path) -> None:
    network = world.make_network(4)
    with torch.no_grad():
        network.classifier.weight[2] = torch.nan
    path = world.save(tmp_path / "nan.safetensors", network)
    with pytest.raises(CheckpointError, match="NaN"):
        predict_region(world.cube, path, tmp_path / "out", spec=PredictSpec(**CPU))


def test_a_dataset_is_mapped_like_the_cube_made_of_it(
    world: Any, tmp_path: Path, by_hand: np.ndarray
) -> None:
    import rioxarray  # noqa: F401 -- registers the accessor
    import xarray as xr

    season = world.season
    numbers = season.reflectance[:]
    height, width = season.shape_yx
    affine = season.geobox.affine
    dataset = xr.Dataset(
        {
            band: (("time", "y", "x"), numbers[:, index], {"_FillValue": -32768})
            for index, band in enumerate(season.bands)
        },
        coords={
            "time": season.time,
            "y": affine.f + affine.e * (np.arange(height) + 0.5),
            "x": affine.c + affine.a * (np.arange(width) + 0.5),
        },
    ).rio.write_crs(world.crs)
    options = {"region": season.aoi, "spec": PredictSpec(**CPU)}
    product = predict_region(dataset, world.checkpoint, tmp_path, **options)
    assert np.array_equal(layers(product), by_hand)
    assert (tmp_path / "cube.zarr" / season.name).is_dir()
    again = predict_region(dataset, world.checkpoint, tmp_path, **options)
    assert again.resumed_shards

    # A cube of one's own of that name, as in the folder of a project, stays.
    mine = tmp_path / "project" / "cube.zarr"
    shutil.copytree(world.cube, mine)
    kept = list_files(mine)
    with pytest.raises(OutputError, match=r"holds a cube of that name.*overwrite=True"):
        predict_region(dataset, world.checkpoint, mine.parent, **options)
    assert list_files(mine) == kept


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_agrees_with_the_cpu(world: Any, by_hand: np.ndarray, tmp_path: Path) -> None:
    spec = PredictSpec(**{**CPU, "device": "cuda", "shard_size": 40})
    found = layers(predict_region(world.cube, world.checkpoint, tmp_path, spec=spec))
    assert np.array_equal(found[0] == 255, by_hand[0] == 255)
    assert (found[0] == by_hand[0]).mean() > 0.99


@pytest.mark.slow
def test_a_cube_in_a_bucket_gives_the_same_map(world: Any, s3: str, tmp_path: Path):
    cube = location(f"{s3}/cube.zarr")
    for name in list_files(world.cube):
        write_file(cube / name, (world.cube / name).read_bytes())
    there = predict_region(str(cube), world.checkpoint, tmp_path / "there", spec=PredictSpec(**CPU))
    here = predict_region(world.cube, world.checkpoint, tmp_path / "here", spec=PredictSpec(**CPU))
    np.testing.assert_array_equal(layers(there), layers(here))
    assert json.loads((tmp_path / "there" / "plan.json").read_text())["cube"] == str(cube)


@pytest.fixture(scope="module")
def assembled(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    """The map of shards that workers compressed, with the shards kept."""
    spec = PredictSpec(shard_size=4096, keep_shards=True, **CPU)
    out = tmp_path_factory.mktemp("assembled") / "map"
    return predict_region(world.cube, world.checkpoint, out, spec=spec)


def test_maps_assembled_from_segments_are_the_same(
    world: Any, assembled: Prediction, by_hand: np.ndarray
) -> None:
    assert np.array_equal(layers(assembled), by_hand)
    assert json.loads((assembled.out / "run.json").read_text())["spec"]["cog_writer"] == "parallel"
    assert validate_cog(assembled.classes, histogram=assembled.histogram) == ([], [])
    assert validate_cog(assembled.confidence) == ([], [])
    (manifest,) = (assembled.out / "shards").glob("*.json")
    assert manifest.stat().st_size < 1000 * 4, "it travels through the scheduler"


def test_gdal_takes_the_same_shards(world: Any, assembled: Prediction, tmp_path: Path) -> None:
    out = tmp_path / "map"
    shutil.copytree(assembled.out, out)
    for name in ("classes.tif", "confidence.tif", "run.json"):
        (out / name).unlink()
    spec = PredictSpec(shard_size=4096, keep_shards=True, cog_writer="gdal", **CPU)
    again = predict_region(world.cube, world.checkpoint, out, spec=spec)
    assert again.resumed_shards == 1
    assert np.array_equal(layers(again), layers(assembled))
    assert again.classes.read_bytes() != assembled.classes.read_bytes(), "another writer made it"


@pytest.mark.parametrize("layer", ["classes", "confidence"])
def test_a_damaged_segment_is_labelled_again(
    world: Any, assembled: Prediction, tmp_path: Path, layer: str
) -> None:
    """Also where the damage is in an overview, which the pixels do not tell."""
    out = tmp_path / "map"
    shutil.copytree(assembled.out, out)
    (out / "classes.tif").unlink()
    (segment,) = (out / "shards").glob(f"*.{layer}.tif")
    whole = bytearray(segment.read_bytes())
    (manifest,) = (out / "shards").glob("*.json")
    coarsest = json.loads(manifest.read_text())[layer]["head_bytes"]
    whole[coarsest + 9] ^= 4
    segment.write_bytes(whole)
    spec = PredictSpec(shard_size=4096, keep_shards=True, **CPU)
    again = predict_region(world.cube, world.checkpoint, out, spec=spec)
    assert again.resumed_shards == 0
    for name in ("classes.tif", "confidence.tif"):
        assert (out / name).read_bytes() == (assembled.out / name).read_bytes()


def test_a_writer_that_does_not_fit_the_shards_is_refused() -> None:
    with pytest.raises(InputError, match="shard_size=1000: its shards are multiples of 4096 px"):
        PredictSpec(shard_size=1000, cog_writer="parallel")
    with pytest.raises(InputError, match=r"auto, parallel, gdal\. Correct --cog-writer"):
        PredictSpec(cog_writer="fast")  # type: ignore[arg-type]


def test_the_parallel_writer_chooses_its_shards(world: Any) -> None:
    season, info = open_season(world.cube), read_metadata(world.checkpoint)
    assert not plan_prediction(season, info, PredictSpec()).parallel_cog
    plan = plan_prediction(season, info, PredictSpec(cog_writer="parallel"))
    assert plan.parallel_cog
    assert plan.shard_size == 4096
