"""One map, whatever cuts the work up and whoever does it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely

from stcln_geo.cube.store import (
    Layout,
    create_season,
    finish_season,
    open_season,
    shards_of,
    write_shard,
)
from stcln_geo.execution import Execution
from stcln_geo.grid import snapped_geobox
from stcln_geo.predict import Prediction, PredictSpec, predict_region

pytestmark = pytest.mark.slow(minutes=1)

CPU = {"device": "cpu", "precision": "float32", "min_clear": 1, "seam_audit": 0}
LEFT, TOP, DATES = 500_170.0, 5_600_330.0, 4
CENTRES = [(3, 4), (512, 498), (1000, 1013), (1024, 2055), (4096, 3071), (4101, 4140)]
"""Rows and columns (pixels from the region's corner) where shards of some size meet."""
RUNS = {
    False: [(512, 0), (512, 4), (1000, 1), (1000, 2), (4096, 0), (4096, 2)],
    True: [(512, 2), (4096, 0)],
}
"""Sides of shards (pixels), and workers; without and with blending."""


def places() -> shapely.MultiPolygon:
    """Small polygons across the lines at which shards of 512, 1000 and 4096 px meet."""
    return shapely.MultiPolygon(
        [
            shapely.Point(LEFT + 10 * col, TOP - 10 * row).buffer(193, quad_segs=3)
            for row, col in CENTRES
        ]
    )


@pytest.fixture(scope="module")
def wide(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube of 4136 x 4155 px, of which little is in the region."""
    path = tmp_path_factory.mktemp("wide") / "cube.zarr"
    aoi = places()
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
        if outline.distance(aoi) < 500:
            numbers, valid = world.pixels_at(place, 8, len(world.bands))
            write_shard(building, shard, reflectance=numbers[:DATES], valid=valid[:DATES])
    finish_season(path, "2018-09-01")
    return open_season(path).cube


def pixels(product: Prediction, layer: str) -> np.ndarray:
    with rasterio.open(product.out / f"{layer}.tif") as source:
        return source.read(1)


@pytest.mark.parametrize("blend", [False, True], ids=["cores", "blend"])
def test_one_map_for_shards_of_512_1000_and_4096_px_and_1_2_and_4_workers(
    world: Any, wide: Path, tmp_path: Path, blend: bool
) -> None:
    found = {}
    for size, workers in RUNS[blend]:
        product = predict_region(
            wide,
            world.checkpoint,
            tmp_path / f"{size}-{workers}",
            spec=PredictSpec(**CPU, shard_size=size, blend=blend),
            execution=Execution(workers=workers),
        )
        classes, confidence = pixels(product, "classes"), pixels(product, "confidence")
        digest = hashlib.sha256(classes.tobytes()).hexdigest()
        tasks = len(list((product.out / "shards").glob("*.json")))
        found[size, workers] = digest, confidence, tasks
    first = found[RUNS[blend][0]]
    assert set(np.unique(classes).tolist()) == {0, 1, 2, 3, 255}, "classes must be told apart"
    cut = {size: tasks for (size, _), (_, _, tasks) in found.items()}
    assert sorted(cut.values(), reverse=True) == [cut[size] for size in sorted(cut)]
    assert cut[512] > cut[4096] > 2, "cut up in other ways"
    for run, (digest, confidence, _) in found.items():
        assert digest == first[0], run
        assert np.abs(confidence.astype(int) - first[1]).max() <= 1, run
