"""Smoothing: a neighbourhood of usable pixels within one window."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch

from stcln_geo.predict import PredictSpec, predict_region
from stcln_geo.predict.smooth import Smoothing, smooth


def window_of(seed: int = 1, classes: int = 3, height: int = 9, width: int = 11) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn((1, classes, height, width), generator=generator)
    usable = torch.rand((1, height, width), generator=generator) > 0.2
    return torch.softmax(logits, 1), usable


def bayesian_by_hand(
    probability: np.ndarray, usable: np.ndarray, smoothing: Smoothing
) -> np.ndarray:
    """Camara et al. pixel by pixel, with plain loops."""
    classes, height, width = probability.shape
    reach = smoothing.window // 2
    logit = np.log(probability / (1 - probability))
    found = probability.copy()
    for row in range(height):
        for col in range(width):
            if not usable[row, col]:
                continue
            posterior = []
            for code in range(classes):
                around = [
                    logit[code, y, x]
                    for y in range(max(row - reach, 0), min(row + reach + 1, height))
                    for x in range(max(col - reach, 0), min(col + reach + 1, width))
                    if usable[y, x]
                ]
                high = sorted(around, reverse=True)[: math.ceil(len(around) * smoothing.fraction)]
                variance = float(np.var(high, ddof=1)) if len(high) > 1 else 0.0
                weight = variance / (variance + smoothing.smoothness)
                mean = weight * logit[code, row, col] + (1 - weight) * float(np.mean(high))
                posterior.append(1 / (1 + math.exp(-mean)))
            found[:, row, col] = np.array(posterior) / sum(posterior)
    return found


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("smoothness", [0.5, 20.0])
def test_bayesian_equals_the_formula(side: int, smoothness: float) -> None:
    probability, usable = window_of()
    smoothing = Smoothing(method="bayesian", window=side, smoothness=smoothness)
    found = smooth(probability, usable, smoothing)[0].numpy()
    expected = bayesian_by_hand(probability[0].double().numpy(), usable[0].numpy(), smoothing)
    assert np.allclose(found, expected, atol=1e-5)


def test_majority_counts_the_votes_of_usable_neighbours() -> None:
    probability, usable = window_of(seed=6)
    found = smooth(probability, usable, Smoothing(method="majority", window=3))[0].numpy()
    best = probability[0].argmax(0).numpy()
    for row, col in np.argwhere(usable[0].numpy()):
        rows, cols = slice(max(row - 1, 0), row + 2), slice(max(col - 1, 0), col + 2)
        voters = best[rows, cols][usable[0].numpy()[rows, cols]]
        votes = np.bincount(voters, minlength=3)
        assert votes[found[:, row, col].argmax()] == votes.max()


@pytest.mark.parametrize("method", ["majority", "bayesian"])
def test_smoothing_keeps_sums_and_unusable_pixels(method: Any) -> None:
    probability, usable = window_of(seed=2)
    found = smooth(probability, usable, Smoothing(method=method, window=5))
    assert torch.allclose(found.sum(1), torch.ones_like(found[:, 0]), atol=1e-5)
    assert torch.equal(found[:, :, ~usable[0]], probability[:, :, ~usable[0]])
    other = torch.where(usable[:, None], probability, probability.flip(1))
    again = smooth(other, usable, Smoothing(method=method, window=5))
    assert torch.equal(again[:, :, usable[0]], found[:, :, usable[0]]), "they have no say"


@pytest.mark.parametrize("method", ["majority", "bayesian"])
def test_a_network_that_is_sure_to_the_last_digit_gives_numbers(method: Any) -> None:
    """A softmax in float32 gives whole ones and noughts."""
    _, usable = window_of(seed=3)
    best = torch.from_numpy(np.random.default_rng(3).integers(0, 3, (9, 11)))
    probability = torch.nn.functional.one_hot(best, 3).permute(2, 0, 1)[None].float()
    found = smooth(probability, usable, Smoothing(method=method, window=3))
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(1), torch.ones_like(found[:, 0]), atol=1e-5)
    alike = smooth(probability[:, :, :1, :1], usable[:, :1, :1] | True, Smoothing(method=method))
    assert (alike.argmax(1) == best[:1, :1]).all()


def test_a_single_odd_pixel_is_smoothed_away() -> None:
    probability = torch.full((1, 2, 7, 7), 0.1)
    probability[0, 0] = 0.9
    probability[0, :, 3, 3] = torch.tensor([0.4, 0.6])
    usable = torch.ones((1, 7, 7), dtype=torch.bool)
    for method in ("majority", "bayesian"):
        found = smooth(probability, usable, Smoothing(method=method, window=3))  # type: ignore[arg-type]
        assert (found.argmax(1) == 0).all()


@pytest.mark.parametrize(
    ("method", "blend"),
    [
        ("majority", True),
        pytest.param("bayesian", False, marks=pytest.mark.slow),
    ],
)
def test_a_smoothed_map_is_the_same_for_any_shard(
    world: Any, tmp_path: Path, method: Any, blend: bool
) -> None:
    found = []
    for size in (40, 256):
        spec = PredictSpec(
            device="cpu", precision="float32", smooth=method, blend=blend, shard_size=size,
            seam_audit=0,
        )  # fmt: skip
        product = predict_region(world.cube, world.checkpoint, tmp_path / str(size), spec=spec)
        with rasterio.open(product.classes) as source:
            found.append(source.read(1))
    assert np.array_equal(*found)
