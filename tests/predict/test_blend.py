"""Blending: exact sums, and a map that knows nothing of shards, workers or regions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
import torch

from stcln_geo.execution import Execution
from stcln_geo.grid import Lattice, Window
from stcln_geo.model.checkpoint import load_model
from stcln_geo.predict import Prediction, PredictSpec, predict_region
from stcln_geo.predict.blend import Accumulator, window_weights
from stcln_geo.predict.stitch import pieces_of

BLEND = {
    "device": "cpu", "precision": "float32", "min_clear": 1, "seam_audit": 0, "blend": True,
}  # fmt: skip
LATTICES = [
    Lattice(window=16, halo=4), Lattice(window=13, halo=1), Lattice(window=9, halo=0),
    Lattice(window=11, halo=5),
]  # fmt: skip


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as source:
        return source.read(1)


def layers(product: Prediction) -> np.ndarray:
    return np.stack([read(product.classes), read(product.confidence)])


@pytest.mark.parametrize("lattice", LATTICES)
def test_weights_are_positive_symmetric_and_add_up_to_one(lattice: Lattice) -> None:
    weights = window_weights(lattice)
    assert weights.shape == (lattice.window, lattice.window)
    assert (weights > 0).all()
    assert np.allclose(weights, weights[::-1, ::-1])
    assert np.allclose(weights, weights.T)
    area = Window(-7, 5, 23, 31)
    total = np.zeros(area.shape_yx)
    for piece in pieces_of(area, lattice, np.ones(area.shape_yx, dtype=bool), blend=True):
        at, inside = piece.owned.relative_to(area), piece.owned.relative_to(piece.seen)
        total[at.rows, at.cols] += weights[inside.rows, inside.cols]
    assert np.allclose(total, 1.0)


@pytest.mark.parametrize("lattice", LATTICES)
def test_a_gap_of_more_rows_than_are_kept(lattice: Lattice) -> None:
    area = Window(-7, 5, 301, 31)
    wanted = np.zeros(area.shape_yx, dtype=bool)
    wanted[3:20], wanted[270:299] = True, True
    pieces = pieces_of(area, lattice, wanted, blend=True)
    found = {}
    for rows in (3 * lattice.window, area.height):
        sums = Accumulator(area, lattice, rows=rows, classes=2)
        merged = np.zeros((2, *area.shape_yx), dtype=np.float32)

        def keep(row: int | None, sums: Accumulator, merged: np.ndarray) -> None:
            for window, values in sums.finish(row):
                at = window.relative_to(area)
                merged[:, at.rows, at.cols] += values

        for piece in pieces:
            keep(piece.core.row - lattice.halo, sums, merged)
            sums.add(piece, np.full((2, lattice.window, lattice.window), 0.5, dtype=np.float32))
        keep(None, sums, merged)
        found[rows] = merged
    one, all_at_once = found.values()
    assert np.array_equal(one, all_at_once)
    assert np.allclose(one[:, wanted], 0.5, atol=1e-6)


@pytest.mark.parametrize("lattice", LATTICES)
def test_sums_do_not_depend_on_order_or_on_the_rows_kept(lattice: Lattice) -> None:
    generator = np.random.default_rng(4)
    area = Window(-7, 5, 67, 31)
    pieces = pieces_of(area, lattice, np.ones(area.shape_yx, dtype=bool), blend=True)
    side = lattice.window
    given = {}
    for piece in pieces:
        raw = generator.random((3, side, side)).astype(np.float32)
        given[piece.seen] = raw / raw.sum(0)

    def merged(order: list[Any], rows: int) -> np.ndarray:
        sums = Accumulator(area, lattice, rows=rows, classes=3)
        found = np.full((3, *area.shape_yx), np.nan, dtype=np.float32)
        for piece in order:
            if rows < area.height:
                for window, values in sums.finish(piece.core.row - lattice.halo):
                    at = window.relative_to(area)
                    found[:, at.rows, at.cols] = values
            sums.add(piece, given[piece.seen])
        for window, values in sums.finish():
            at = window.relative_to(area)
            found[:, at.rows, at.cols] = values
        return found

    whole = merged(pieces, area.height)
    assert np.allclose(whole.sum(0), 1.0, atol=1e-6)
    assert np.array_equal(merged(pieces[::-1], area.height), whole)
    assert np.array_equal(merged(pieces, lattice.window), whole)


def blended_by_hand(world: Any) -> np.ndarray:
    """Sum all windows over a large canvas in float64; classes and confidence, (2, H, W)."""
    season, lattice, extent = world.season, world.lattice, world.extent
    module = load_model(world.checkpoint)
    bands = [season.bands.index(band) for band in module.config.bands]
    pad = 3 * lattice.window
    space = ((0, 0), (pad, pad), (pad, pad))
    numbers = np.pad(season.reflectance[:][:, bands], ((0, 0), *space))
    valid = np.pad(season.valid[:], space)
    canvas = extent.expand(2 * lattice.window)
    sums = np.zeros((4, *canvas.shape_yx))
    totals = np.zeros(canvas.shape_yx)
    hann = np.sin(np.pi * (np.arange(16) + 0.5) / 16) ** 2
    weights = np.outer(hann, hann)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for core in lattice.cores(extent.expand(lattice.halo)):
        seen = core.expand(lattice.halo)
        at, on = seen.relative_to(season.window).shift(pad, pad), seen.relative_to(canvas)
        usable = valid[:, at.rows, at.cols]
        images = numbers[:, :, at.rows, at.cols].astype(np.float32) * np.float32(1e-4)
        images[~np.broadcast_to(usable[:, None], images.shape)] = 0
        with torch.inference_mode():
            logits = module(
                torch.from_numpy(images)[None],
                torch.from_numpy(season.days[:])[None],
                torch.from_numpy(usable)[None],
            )[0]
        sums[:, on.rows, on.cols] += weights * torch.softmax(logits, 0).double().numpy()
        totals[on.rows, on.cols] += weights
    torch.set_num_threads(threads)
    place = extent.relative_to(canvas)
    probability = (sums / np.maximum(totals, 1e-9))[:, place.rows, place.cols]
    return np.stack([probability.argmax(0), 100 * probability.max(0)])


@pytest.fixture(scope="module")
def blended(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    out = tmp_path_factory.mktemp("blend") / "map"
    spec = PredictSpec(outputs=("probabilities", "entropy", "margin"), **BLEND)
    return predict_region(world.cube, world.checkpoint, out, spec=spec)


def test_the_map_equals_windows_blended_by_hand(world: Any, blended: Prediction) -> None:
    classes, confidence = layers(blended)
    by_hand = blended_by_hand(world)
    mapped = classes != 255
    assert (classes == by_hand[0])[mapped].mean() > 0.999, "but for ties of the last digit"
    assert np.abs(confidence - by_hand[1])[mapped].max() <= 0.51


@pytest.mark.parametrize(
    ("shard_size", "workers", "memory"),
    [(40, 0, 30_000), pytest.param(64, 2, None, marks=pytest.mark.slow)],
    ids=["40-low-memory", "64-two-workers"],
)
def test_shards_workers_and_memory_change_nothing(
    world: Any,
    blended: Prediction,
    tmp_path: Path,
    shard_size: int,
    workers: int,
    memory: int | None,
) -> None:
    spec = PredictSpec(
        shard_size=shard_size,
        memory=memory,
        outputs=("probabilities", "entropy", "margin"),
        **BLEND,
    )
    product = predict_region(
        world.cube, world.checkpoint, tmp_path, spec=spec, execution=Execution(workers=workers)
    )
    for name in ("classes", "confidence", "qa", "observations", "entropy", "margin"):
        assert np.array_equal(read(tmp_path / f"{name}.tif"), read(blended.out / f"{name}.tif"))
    assert product.histogram == blended.histogram


def test_two_regions_agree_where_they_overlap(
    world: Any, blended: Prediction, tmp_path: Path
) -> None:
    top, left = -world.extent.row * 10.0, world.extent.col * 10.0
    part = shapely.Polygon(
        [(left + 96, top - 300), (left + 700, top - 310), (left + 395, top - 955)]
    )
    product = predict_region(
        world.cube, world.checkpoint, tmp_path, region=part, spec=PredictSpec(**BLEND)
    )
    with rasterio.open(product.classes) as source:
        place = Window(
            round(-source.transform.f / 10), round(source.transform.c / 10), *source.shape
        )
    at = place.relative_to(world.extent)
    mine, theirs = layers(product), layers(blended)[:, at.rows, at.cols]
    labelled = mine[0] != 255
    assert labelled.sum() > 1000
    assert np.array_equal(mine[:, labelled], theirs[:, labelled])


def test_blending_changes_some_labels_and_not_which_pixels_have_one(
    world: Any, blended: Prediction, tmp_path: Path
) -> None:
    cores = predict_region(
        world.cube, world.checkpoint, tmp_path, spec=PredictSpec(**{**BLEND, "blend": False})
    )
    one, other = layers(cores)[0], layers(blended)[0]
    assert np.array_equal(one == 255, other == 255)
    assert 0 < (one != other).mean() < 0.5
