"""The whole path by its commands: on real pixels, and with one map whatever the execution."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.windows import from_bounds

from stcln_geo.cli.main import invoke
from stcln_geo.cog import read_legend
from stcln_geo.cube.store import open_season

pytestmark = pytest.mark.slow


def run(*arguments: object) -> None:
    assert invoke([str(argument) for argument in arguments]) == 0, arguments


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ragged") / "archive"
    run("simulate", folder, "--size", "301x203", "--dates", "8", "--seed", "7")
    return folder


@pytest.fixture(scope="module")
def cube(archive) -> Path:
    path = archive.parent / "cube.zarr"
    run("cube", "build", "--catalog", archive, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(cube) -> Path:
    """Random weights with the spatial attention switched on: classes vary from pixel to pixel."""
    import torch

    from stcln_geo.legend import Legend
    from stcln_geo.model import Stcln, StclnConfig, save_checkpoint

    torch.manual_seed(1)
    model = Stcln(StclnConfig.preset("tiny", bands=open_season(cube).bands, classes=5))
    model.encoder.set_normalisation([0.2] * 10, [0.15] * 10)
    with torch.no_grad():
        model.attention.gate.fill_(0.8)
    legend = Legend.from_values([f"crop {number}" for number in range(5)])
    return save_checkpoint(
        cube.parent / "random.safetensors", model, kind="classifier", legend=legend.to_json(),
        chip=32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def reference(cube, checkpoint) -> np.ndarray:
    out = cube.parent / "reference"
    run("predict", cube, "--checkpoint", checkpoint, "--out", out)
    with rasterio.open(out / "classes.tif") as source:
        assert source.shape == (203, 301)
        classes = source.read(1)
    assert len(np.unique(classes[classes != 255])) >= 3
    return classes


@pytest.mark.parametrize(("workers", "shard_size"), [(1, 64), (2, 96), (2, 256)])
def test_one_map_for_any_shard_size_and_worker_count(
    cube, checkpoint, reference, tmp_path, workers, shard_size
):
    run(
        "predict", cube, "--checkpoint", checkpoint, "--out", tmp_path / "map",
        "--shard-size", shard_size, "--workers", workers,
    )  # fmt: skip
    with rasterio.open(tmp_path / "map" / "classes.tif") as source:
        np.testing.assert_array_equal(source.read(1), reference)


def test_one_map_on_the_overlap_of_two_regions_built_and_predicted_apart(
    archive, checkpoint, reference, cube, tmp_path
):
    with rasterio.open(cube.parent / "reference" / "classes.tif") as source:
        bounds, crs = source.bounds, source.crs
    west = (bounds.left + 137, bounds.bottom + 211, bounds.left + 1873, bounds.top - 95)
    east = (bounds.left + 1021, bounds.bottom + 43, bounds.right - 77, bounds.top - 389)
    maps = []
    for name, area in (("west", west), ("east", east)):
        lonlat = rasterio.warp.transform_bounds(crs, "EPSG:4326", *area)
        bbox = ",".join(f"{value:.7f}" for value in lonlat)
        path = tmp_path / f"{name}.zarr"
        run("cube", "build", "--catalog", archive, f"--bbox={bbox}", path)
        run("predict", path, "--checkpoint", checkpoint, "--out", tmp_path / name)
        maps.append(rasterio.open(tmp_path / name / "classes.tif"))
    first, second = maps
    left, bottom = max(west[0], east[0]) + 60, max(west[1], east[1]) + 60
    right, top = min(west[2], east[2]) - 60, min(west[3], east[3]) - 60
    # Whole pixels, well inside both: the region's edge is slanted in UTM.
    left, bottom, right, top = (round(value / 10) * 10 for value in (left, bottom, right, top))
    shared = (left, bottom, right, top)
    a, b = (
        source.read(1, window=from_bounds(*shared, transform=source.transform)) for source in maps
    )
    assert a.shape == b.shape
    assert a.size > 5000
    assert (a != 255).mean() > 0.9
    np.testing.assert_array_equal(a, b)
    row, col = round((bounds.top - top) / 10), round((left - bounds.left) / 10)
    np.testing.assert_array_equal(a, reference[row : row + a.shape[0], col : col + a.shape[1]])
    first.close()
    second.close()


@pytest.fixture(scope="module")
def demo(flanders, tmp_path_factory) -> Path:
    """The demo on real scenes, shortened, as a user would start it."""
    out = tmp_path_factory.mktemp("real") / "demo"
    command = Path(sys.executable).with_name("stcln-geo")
    finished = subprocess.run(
        [
            command,
            "demo",
            "--data",
            flanders,
            "--out",
            out,
            "--steps",
            "12",
            "--finetune-steps",
            "40",
        ],
        # Another test runs beside it: threads that wait for each other would take minutes.
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return out


class TestRealPixels:
    def test_the_page_tells_the_accuracy_with_its_fields(self, demo):
        page = (demo / "report.html").read_text()
        told = json.loads((demo / "finetune" / "evaluation-test" / "metrics.json").read_text())
        assert told["fields"] >= 3
        assert told["pixels"] > 0
        assert f"{100 * told['overall_accuracy']:.1f}" in page
        assert "imulated data" not in page
        temperature = told["calibration"]["temperature"]
        said = "uncalibrated" if temperature is None else f"by a temperature of {temperature:.2f}"
        assert said in page

    def test_the_cube_holds_the_numbers_of_the_files(self, demo, flanders):
        season = open_season(demo / "cube.zarr", "2018-09-01")
        top, left = -season.window.row * 10, season.window.col * 10
        checked = 0
        for index, time in enumerate(season.time):
            day = str(time.astype("datetime64[D]")).replace("-", "")
            folder = flanders / f"S2_31UES_{day}_0_L2A"
            for band, file in (("blue", "B02"), ("red", "B04"), ("nir", "B08")):
                with rasterio.open(folder / f"{file}.tif") as source:
                    expected = source.read(1).astype("int32")
                    row = round((top - source.transform.f) / 10)
                    col = round((source.transform.c - left) / 10)
                found = season.reflectance[
                    index, season.bands.index(band), row : row + 64, col : col + 64
                ].astype("int32")
                np.testing.assert_array_equal(np.where(expected == 0, -32768, expected), found)
                checked += 1
        assert checked == 3 * len(season.time) >= 150

    def test_the_map_is_a_cog_with_palette_names_and_nodata(self, demo):
        from rio_cogeo import cog_validate

        path = demo / "map" / "classes.tif"
        assert cog_validate(path, strict=True)[0]
        run("cog", "validate", path)
        with rasterio.open(path) as source:
            assert source.crs.to_epsg() == 32631
            assert source.shape == (64, 64)
            assert source.nodata == 255
            assert source.colormap(1)[0][3] == 255
        legend = read_legend(path)
        assert legend is not None
        assert set(legend.names) == {"1110", "1200", "9120"}

    def test_a_foreign_netcdf_is_mapped_by_a_network_of_nine_bands(self, demo, shared, tmp_path):
        import xarray as xr

        from stcln_geo import predict_region, write_cube

        bands = "blue,green,red,rededge1,rededge2,rededge3,nir,swir16,swir22"
        season = ["--season", "2018-09-01"]
        run(
            "finetune", demo / "cube.zarr", "--out", tmp_path / "run", "--preset", "tiny",
            "--steps", "4", "--set", f'model.bands={json.dumps(bands.split(","))}', *season,
        )  # fmt: skip
        source = xr.open_dataset(shared / "data" / "belgium_2021_monthly_100x100.nc")
        codes = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B11", "B12")
        names = {f"S2-L2A-{code}": band for code, band in zip(codes, bands.split(","), strict=True)}
        cube = write_cube(
            source, tmp_path / "b.zarr", bands=names, nodata=65535, season_start="11-01"
        )
        with pytest.warns(match="season"):
            made = predict_region(cube, tmp_path / "run", tmp_path / "map")
        with rasterio.open(made.classes) as mapped:
            assert mapped.shape == (100, 100)
            assert mapped.crs.to_epsg() == 32631
            assert (mapped.read(1) != 255).all()
