"""A map of several networks is the map of their mean probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
import zarr

from stcln_geo.model import join_checkpoints
from stcln_geo.predict import PredictSpec, predict_region

CPU: dict[str, Any] = {"device": "cpu", "precision": "float32", "min_clear": 1, "seam_audit": 0}
BOX = shapely.box(500_300, 5_599_900, 500_770, 5_600_310)


def test_layers_are_those_of_the_mean_probability(world: Any, tmp_path: Path) -> None:
    paths = [
        world.save(
            tmp_path / f"{seed}.safetensors",
            world.make_network(len(world.legend), seed=seed),
            temperature=temperature,
        )
        for seed, temperature in ((3, 1.5), (4, None))
    ]
    joined = join_checkpoints(paths, tmp_path / "all.safetensors").path
    spec = PredictSpec(outputs=("probabilities", "embeddings"), **CPU)
    layers, features, classes = [], [], []
    for path in (*paths, joined):
        product = predict_region(world.cube, path, tmp_path / path.stem, region=BOX, spec=spec)
        with rasterio.open(product.out / "probabilities.tif") as file:
            layers.append(file.read())
        with rasterio.open(product.classes) as file:
            classes.append(file.read(1))
        store = zarr.open_group(product.out / "embeddings.zarr", mode="r")
        features.append(store["embedding"][:])
    assert "2 networks label together" in (product.out / "report.html").read_text()
    labelled = classes[-1] != 255
    assert labelled.sum() > 1000
    mean = np.mean(layers[:-1], axis=0)[:, labelled]
    # Each is rounded to a step, and so is the mean.
    assert np.abs(layers[-1][:, labelled] - mean).max() <= 1
    first, second = np.sort(mean, axis=0)[[-1, -2]]
    sure = first - second > 1
    assert sure.mean() > 0.9
    assert np.array_equal(classes[-1][labelled][sure], mean.argmax(axis=0)[sure])
    for one in classes[:-1]:
        assert (one != classes[-1]).any()
    assert np.array_equal(features[-1], np.concatenate(features[:-1]), equal_nan=True)
