"""Workers that cannot predict are found before they have touched a shard."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio

from stcln_geo.cube.store import open_season
from stcln_geo.errors import (
    CheckpointError,
    CubeError,
    InputError,
    OutputError,
    StclnGeoError,
    StclnGeoWarning,
)
from stcln_geo.execution import Execution
from stcln_geo.predict import Prediction, PredictSpec, predict_region
from stcln_geo.predict import mask as mask_module
from stcln_geo.predict import windows as windows_module
from stcln_geo.predict.mask import open_mask
from stcln_geo.predict.windows import check_worker

from ..dask_cluster import Cluster, wait_for_workers

CPU = {"device": "cpu", "precision": "float32", "seam_audit": 0, "shard_size": 40}

HIDE = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0, "a mount namespace of its own"
assert libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None) == 0, "changes stay in it"
assert libc.mount(b"tmpfs", {folder!r}.encode(), b"tmpfs", 0, None) == 0
"""
"""Statements after which a process sees an empty folder; others see what is there."""


def classes(product: Prediction) -> np.ndarray:
    with rasterio.open(product.classes) as source:
        return source.read(1)


@pytest.fixture(scope="module")
def product(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    folder = tmp_path_factory.mktemp("check")
    checkpoint = shutil.copy(world.checkpoint, folder / "network.safetensors")
    return predict_region(world.cube, checkpoint, folder / "map", spec=PredictSpec(**CPU))


def copy_of(product: Prediction, folder: Path, **changes: Any) -> tuple[str, str]:
    """Copy the plan, with changes; return its folder and the name of the run."""
    plan = json.loads((product.out / "plan.json").read_text())
    (folder / "plan.json").write_text(json.dumps({**plan, **changes}))
    return str(folder), plan["run"]


def test_a_worker_that_sees_everything_is_fit(product: Prediction, tmp_path: Path) -> None:
    check_worker(*copy_of(product, tmp_path))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"run": "another"}, CubeError, "the plan of another run"),
        ({"cube": "/nowhere/cube.zarr"}, StclnGeoError, "/nowhere/cube.zarr"),
        ({"checkpoint": "/nowhere/model"}, StclnGeoError, "/nowhere/model"),
    ],
    ids=["run", "cube", "checkpoint"],
)
def test_what_a_worker_does_not_see_is_named(
    product: Prediction,
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        check_worker(*copy_of(product, tmp_path, **changes))


def test_no_plan_another_checkpoint_or_no_gpu(
    world: Any, product: Prediction, tmp_path: Path
) -> None:
    with pytest.raises(StclnGeoError, match="Workers must see the output folder"):
        check_worker(str(tmp_path / "elsewhere"), "run")
    other = world.save(tmp_path / "other.safetensors", world.make_network(4, seed=8))
    with pytest.raises(CheckpointError, match="Give all workers the same file"):
        check_worker(*copy_of(product, tmp_path, checkpoint=str(other)))
    identity = json.loads((product.out / "plan.json").read_text())["identity"]
    folder = tmp_path / "gpu"
    folder.mkdir()
    changed = copy_of(product, folder, identity={**identity, "device": "cuda"})
    if shutil.which("nvidia-smi") is None:
        with pytest.raises(InputError, match="cuda"):
            check_worker(*changed)


def test_other_data_under_the_same_path_are_named(
    world: Any, product: Prediction, tmp_path: Path
) -> None:
    other = tmp_path / "other.zarr"
    shutil.copytree(world.cube, other)
    check_worker(*copy_of(product, tmp_path, cube=str(other)))
    season = open_season(other, mode="r+")
    season.coverage[0, 0, 0] += 1
    windows_module._job.cache_clear()  # as in another worker
    with pytest.raises(CubeError, match=r"season 2018-09-01 of .*other\.zarr.* other data"):
        check_worker(*copy_of(product, tmp_path, cube=str(other)))

    mask = tmp_path / "mask.tif"
    shutil.copy(product.out / "classes.tif", mask)
    identity = json.loads((product.out / "plan.json").read_text())["identity"]
    planned = {**identity, "mask": open_mask(mask).to_json()}
    masked = copy_of(product, tmp_path, identity=planned)
    check_worker(*masked)
    shutil.copy(product.out / "confidence.tif", mask)
    windows_module._job.cache_clear()
    with pytest.raises(CubeError, match=r"the mask .*mask\.tif.* other data"):
        check_worker(*masked)


def test_a_worker_that_cannot_write_is_named(product: Prediction, tmp_path: Path) -> None:
    (tmp_path / "shards").touch()
    with pytest.raises(OutputError, match=r"Cannot write to .*shards"):
        check_worker(*copy_of(product, tmp_path))


def test_a_copy_of_a_large_mask_is_the_mask(
    product: Prediction, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask_module, "_WHOLE", 10)
    monkeypatch.setattr(mask_module, "_PART", 10)
    path = Path(shutil.copy(product.out / "classes.tif", tmp_path / "mask.tif"))
    planned = open_mask(path)
    os.utime(path, (1, 1))
    assert planned.is_as_planned
    assert open_mask(path) != planned, "where a run is planned, the time tells"
    path.write_bytes(path.read_bytes() + b"0")
    assert not planned.is_as_planned


@pytest.mark.slow
def test_a_worker_that_does_not_see_the_checkpoint_is_sent_away(
    world: Any, product: Prediction, tmp_path: Path, cluster: Cluster
) -> None:
    models = tmp_path / "models"
    models.mkdir()
    hide = HIDE.format(folder=str(models))
    if os.geteuid() or subprocess.run(["python3", "-c", hide], capture_output=True).returncode:
        pytest.skip("needs root, to give a process a file system of its own")
    checkpoint = shutil.copy(world.checkpoint, models / "network.safetensors")
    cluster.worker()
    cluster.worker(first=hide)
    wait_for_workers(cluster, 2)
    with pytest.warns(StclnGeoWarning, match=r"1 of 2 Dask workers.*models/network\.safetensors"):
        made = predict_region(
            world.cube, checkpoint, tmp_path / "map", spec=PredictSpec(**CPU),
            execution=Execution(scheduler=cluster.address),
        )  # fmt: skip
    assert np.array_equal(classes(made), classes(product))
    assert made.resumed_shards == 0
