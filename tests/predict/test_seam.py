"""The seam audit: nothing where windows do not matter, the truth where they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from stcln_geo.execution import Execution
from stcln_geo.grid import Window
from stcln_geo.model.checkpoint import load_model, read_metadata
from stcln_geo.predict import PredictSpec, plan_prediction, predict_region
from stcln_geo.predict.seam import seam_tasks

CPU = {"device": "cpu", "precision": "float32", "min_clear": 1, "shard_size": 64}


def classes_by_hand(world: Any, shift: int) -> np.ndarray:
    """Label the whole extent with the lattice moved south-east by some pixels, (H, W)."""
    season, lattice, extent = world.season, world.lattice, world.extent
    module = load_model(world.checkpoint)
    bands = [season.bands.index(band) for band in module.config.bands]
    pad = 3 * lattice.window
    space = ((0, 0), (pad, pad), (pad, pad))
    numbers = np.pad(season.reflectance[:][:, bands], ((0, 0), *space))
    valid = np.pad(season.valid[:], space)
    found = np.full(extent.shape_yx, 255, dtype=np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for core in lattice.cores(extent.shift(-shift, -shift)):
        moved = core.shift(shift, shift)
        at = moved.expand(lattice.halo).relative_to(season.window).shift(pad, pad)
        usable = valid[:, at.rows, at.cols]
        images = numbers[:, :, at.rows, at.cols].astype(np.float32) * np.float32(1e-4)
        images[~np.broadcast_to(usable[:, None], images.shape)] = 0
        with torch.inference_mode():
            logits = module(
                torch.from_numpy(images)[None],
                torch.from_numpy(season.days[:])[None],
                torch.from_numpy(usable)[None],
            )[0]
        owned = moved.intersection(extent)
        inside, place = owned.relative_to(moved.expand(lattice.halo)), owned.relative_to(extent)
        best = logits.argmax(0).numpy().astype(np.uint8)
        found[place.rows, place.cols] = best[inside.rows, inside.cols]
    torch.set_num_threads(threads)
    return found


@pytest.mark.slow
def test_the_share_equals_a_map_made_on_the_shifted_lattice(world: Any, tmp_path: Path) -> None:
    spec = PredictSpec(**CPU, seam_audit=12)
    product = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    plan = plan_prediction(world.season, read_metadata(world.checkpoint), spec)
    cores = []
    for task in seam_tasks(plan, "", threads=1):
        cores += task.cores[: task.count]
    straight, shifted = classes_by_hand(world, 0), classes_by_hand(world, 4)
    with rasterio.open(product.classes) as source:
        mapped = source.read(1) != 255
    differ = pixels = 0
    for row, col in cores:
        core = Window(row, col, 8, 8).intersection(world.extent).relative_to(world.extent)
        part = np.s_[core.rows, core.cols]
        pixels += int(mapped[part].sum())
        differ += int((mapped[part] & (straight[part] != shifted[part])).sum())
    seams = product.seam_audit
    assert seams is not None
    assert seams["pixels"] == pixels
    assert seams["windows"] == 12
    assert abs(seams["differ_by_cores"] - differ / pixels) < 1e-6
    assert seams["differ_by_cores"] > 0, "its attention sees the window"
    assert seams["differ_blended"] > 0
    assert json.loads((tmp_path / "run.json").read_text())["seam_audit"] == seams
    assert "moved by 4 px" in (tmp_path / "report.html").read_text()


def test_a_network_that_only_looks_as_far_as_the_halo_has_no_seams(
    world: Any, tmp_path: Path
) -> None:
    network = world.make_network(4)
    with torch.no_grad():
        network.attention.gate.fill_(0.0)  # convolutions reach 4 px, as far as the halo
    path = world.save(tmp_path / "local.safetensors", network)
    spec = PredictSpec(**CPU, seam_audit=4)
    product = predict_region(world.cube, path, tmp_path / "map", spec=spec)
    assert product.seam_audit is not None
    assert product.seam_audit["differ_by_cores"] == 0


@pytest.mark.slow
def test_the_sample_is_the_same_whoever_asks(world: Any, tmp_path: Path) -> None:
    found = [
        predict_region(
            world.cube,
            world.checkpoint,
            tmp_path / str(workers),
            spec=PredictSpec(**CPU, seam_audit=3),
            execution=Execution(workers=workers),
        ).seam_audit
        for workers in (0, 2)
    ]
    assert found[0] == found[1]


def test_the_audit_stays_small_by_default(world: Any) -> None:
    info = read_metadata(world.checkpoint)
    plan = plan_prediction(world.season, info, PredictSpec())
    assert sum(task.count for task in seam_tasks(plan, "", threads=1)) == 1
    none = plan_prediction(world.season, info, PredictSpec(seam_audit=0))
    assert seam_tasks(none, "", threads=1) == []
    many = plan_prediction(world.season, info, PredictSpec(seam_audit=1000))
    tasks = seam_tasks(many, "", threads=1)
    cores = [core for task in tasks for core in task.cores]
    assert len(cores) == len(set(cores)), "no core twice"
    assert 100 < len(cores) <= 137
