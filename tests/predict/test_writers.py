"""The layers of a map are the same, whichever writer makes the files of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import rasterio
import shapely

from stcln_geo.cog import validate_cog
from stcln_geo.cog.pyramid import halve
from stcln_geo.cube.store import (
    Layout,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_shard,
)
from stcln_geo.errors import OutputError, TaskError
from stcln_geo.grid import snapped_geobox
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.predict import Prediction, PredictSpec, plan_prediction, predict_region

CPU = {"device": "cpu", "precision": "float32", "seam_audit": 0}
NUMBERS = ("probabilities", "entropy", "margin")
LAYERS = ("classes", "confidence", "qa", "observations", *NUMBERS)
DATES = 4
SIDE = 4096 + 130
"""Of the region (pixels): two shards of 4096 px each way."""


def pixels(folder: Path, layer: str) -> np.ndarray:
    with rasterio.open(folder / f"{layer}.tif") as source:
        return source.read()


def remake(product: Path, world: Any, cube: Path, writer: str, spec: PredictSpec) -> Prediction:
    """Make the maps of a folder's shards again."""
    for layer in LAYERS:
        (product / f"{layer}.tif").unlink(missing_ok=True)
    (product / "run.json").unlink(missing_ok=True)
    made = predict_region(cube, world.checkpoint, product, spec=spec)
    run = json.loads((product / "run.json").read_text())
    assert run["spec"]["cog_writer"] == writer
    assert run["resumed_shards"] == run["shards"]
    return made


def test_both_writers_give_the_same_layers(world: Any, tmp_path: Path) -> None:
    common = {**CPU, "outputs": NUMBERS, "keep_shards": True, "min_clear": 4}
    plain = predict_region(
        world.cube, world.checkpoint, tmp_path / "plain", spec=PredictSpec(shard_size=40, **common)
    )
    spec = PredictSpec(cog_writer="parallel", **common)
    made = predict_region(world.cube, world.checkpoint, tmp_path / "parallel", spec=spec)
    other = tmp_path / "gdal"
    shutil.copytree(made.out, other)
    remake(
        other, world, world.cube, "gdal", PredictSpec(shard_size=4096, cog_writer="gdal", **common)
    )
    for layer in LAYERS:
        expected = pixels(plain.out, layer)
        assert np.array_equal(pixels(made.out, layer), expected), layer
        assert np.array_equal(pixels(other, layer), expected), layer
        for folder in (plain.out, made.out, other):
            assert validate_cog(folder / f"{layer}.tif") == ([], [])
        with (
            rasterio.open(made.out / f"{layer}.tif") as ours,
            rasterio.open(other / f"{layer}.tif") as theirs,
        ):
            assert ours.descriptions == theirs.descriptions
            assert ours.scales == theirs.scales
            assert ours.units == theirs.units
            assert ours.nodatavals == theirs.nodatavals
            names = ("STCLN_GEO_KIND", "TIFFTAG_IMAGEDESCRIPTION", "STCLN_GEO_LEGEND")
            assert [ours.tags().get(one) for one in names] == [
                theirs.tags().get(one) for one in names
            ]


@pytest.mark.parametrize("failure", ["raises", "returns nothing"])
def test_a_compressor_that_fails_fails_the_run(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """No map is written of tiles that were lost, and the next call makes it."""
    spec = PredictSpec(cog_writer="parallel", min_clear=1, **CPU)

    def fail(self: Any, data: Any) -> bytes:
        if failure == "raises":
            raise RuntimeError("out of memory")
        return b""

    with monkeypatch.context() as patched:
        patched.setattr(numcodecs.Zstd, "encode", fail)
        with pytest.raises(OutputError, match="Cannot compress a tile"):
            predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert not list(tmp_path.glob("*.tif"))
    assert not (tmp_path / "run.json").exists()
    made = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert validate_cog(made.classes, histogram=made.histogram) == ([], [])


def test_the_plan_says_what_gdal_writes(world: Any) -> None:
    season, info = open_season(world.cube), read_metadata(world.checkpoint)
    few = plan_prediction(season, info, PredictSpec(cog_writer="parallel", outputs=("margin",)))
    many = plan_prediction(season, info, PredictSpec(cog_writer="parallel", outputs=NUMBERS))
    assert "COG writer  parallel" in str(few)
    assert "gdal" not in str(few)
    assert "gdal for probabilities" in str(many)
    assert "COG writer  gdal" in str(plan_prediction(season, info, PredictSpec()))


@pytest.fixture
def far_apart(world: Any, tmp_path: Path) -> Path:
    """A cube of two small places in opposite corners; the shards between have no pixel."""
    left, top = 500_170.0, 5_600_330.0
    end = 10.0 * SIDE
    aoi = shapely.MultiPolygon(
        [
            shapely.box(left, top - 600, left + 500, top),
            shapely.box(left + end - 450, top - end, left + end, top - end + 550),
        ]
    )
    path = tmp_path / "far.zarr"
    days = np.linspace(20, 280, DATES).astype(int)
    building = create_season(
        path, "2018-09-01", aoi=aoi, lattice=world.lattice, bands=world.bands,
        geobox=snapped_geobox(aoi, crs=world.crs, resolution=10, lattice=world.lattice),
        time=np.datetime64("2018-09-01", "s") + days * np.timedelta64(86400, "s"),
        layout=Layout(chunk=32, shard=128),
    )  # fmt: skip
    for shard in shards_of(building):
        place = shard.shift(building.window.row, building.window.col)
        outline = shapely.box(
            place.col * 10.0, -(place.row + place.height) * 10.0,
            (place.col + place.width) * 10.0, -place.row * 10.0,
        )  # fmt: skip
        if not outline.intersects(aoi):
            continue
        numbers, valid = world.pixels_at(place, 8, len(world.bands))
        write_shard(building, shard, reflectance=numbers[:DATES], valid=valid[:DATES])
    finish_season(path, "2018-09-01")
    return path


@pytest.mark.slow
def test_shards_that_failed_or_lie_outside_are_the_same_with_both_writers(
    world: Any, far_apart: Path, tmp_path: Path
) -> None:
    common = {**CPU, "shard_size": 4096, "keep_shards": True, "min_clear": 1}
    whole = predict_region(
        far_apart, world.checkpoint, tmp_path / "whole", spec=PredictSpec(**common)
    )
    # The last shard of the cube is spoiled, and with it the last prediction shard.
    files = [path for path in far_apart.glob("*/reflectance/c/**/*") if path.is_file()]
    victim = max(files, key=lambda path: [int(part) for part in path.parts[-4:]])
    content = victim.read_bytes()
    size = len(content)
    victim.write_bytes(content[: size // 8] + b"\x5a" * (size // 2) + content[-(size * 3 // 8) :])
    found = {}
    for writer in ("parallel", "gdal"):
        out = tmp_path / writer
        spec = PredictSpec(cog_writer=writer, **common)
        with pytest.raises(TaskError, match="1 of 2 shards failed"):
            predict_region(far_apart, world.checkpoint, out, spec=spec)
        assert len(json.loads((out / "run.json").read_text())["failed_shards"]) == 1
        found[writer] = {layer: pixels(out, layer)[0] for layer in LAYERS[:4]}
        for layer in LAYERS[:4]:
            assert validate_cog(out / f"{layer}.tif") == ([], [])
    for layer, values in found["parallel"].items():
        assert np.array_equal(values, found["gdal"][layer]), layer
    quality = found["parallel"]["qa"]
    assert set(np.unique(quality).tolist()) == {0, 1, 2, 5}
    assert (quality[:, 4096:][:4096] == 1).all(), "no shard was labelled there"
    rest = quality != 5
    assert np.array_equal(quality[rest], pixels(whole.out, "qa")[0][rest])

    with rasterio.open(tmp_path / "parallel" / "qa.tif") as source:
        levels = len(source.overviews(1))
    assert levels == 4, "the last is made by the assembler, across shards"
    fine = quality
    for level in range(levels):
        with rasterio.open(tmp_path / "parallel" / "qa.tif", OVERVIEW_LEVEL=level) as overview:
            coarse = overview.read(1)
        assert np.array_equal(coarse, halve(fine, "mode"))
        fine = coarse
