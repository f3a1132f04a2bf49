"""The temperature is the likeliest one, is stored, and never changes a class."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_calibration_error,
)

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import open_season, write_split
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.report import calibration as calibration_module
from stcln_geo.report import plots
from stcln_geo.report.calibration import Calibration, plot_reliability
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.evaluate import evaluate_run
from stcln_geo.train.finetune import finetune
from stcln_geo.train.temperature import LARGEST, SMALLEST, fit_temperature, stride_for

SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "data.halo": 3,
    "batch_size": 4,
    "steps": 12,
    "optimiser.learning_rate": 5e-3,
}


def make_pixels(true: float, *, count: int = 20_000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are ``true`` times too large for the classes drawn from them."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(count, 4, generator=generator)
    target = torch.multinomial((logits / true).softmax(1), 1, generator=generator)[:, 0]
    return logits, target


@pytest.mark.parametrize("true", [0.4, 1.0, 2.5])
def test_the_temperature_is_the_likeliest(true: float) -> None:
    logits, target = make_pixels(true)

    found = fit_temperature(logits, target)

    assert found == pytest.approx(true, rel=0.05)

    def cost(temperature: float) -> float:
        scaled = logits.double() / temperature
        return float(torch.nn.functional.cross_entropy(scaled, target))

    # No other temperature of a fine search is likelier.
    others = np.geomspace(found / 1.5, found * 1.5, 41)
    assert min(cost(float(other)) for other in others) >= cost(found) - 1e-12
    assert cost(found * 1.001) > cost(found) < cost(found / 1.001)
    # Two ranks with the same pixels, which add up their sums.
    assert fit_temperature(logits, target, add_up=lambda sums: 2 * sums) == pytest.approx(found)


def test_bounds_and_nothing() -> None:
    logits, _ = make_pixels(1.0, count=50)

    right, wrong = logits.argmax(1), logits.argmin(1)
    nearly = logits.clone()
    nearly[0, wrong[0]] = nearly[0, right[0]] + 1e-3

    # The lower, the likelier: none is the likeliest.
    assert fit_temperature(logits, right) is None
    assert fit_temperature(nearly, right) == pytest.approx(SMALLEST, rel=1e-5)
    # Right here, and wrong on another rank.
    assert fit_temperature(logits, right, add_up=lambda sums: sums + 1) is not None
    assert fit_temperature(logits, wrong) == pytest.approx(LARGEST, rel=1e-5)
    assert fit_temperature(logits[:0], right[:0]) is None


@pytest.mark.parametrize("pixels", [0, 1, 2_000_000, 2_000_001, 4_000_000, 123_456_789])
def test_as_many_pixels_are_fitted_on_as_two_million_allow(pixels: int) -> None:
    stride = stride_for(pixels)

    assert len(range(0, pixels, stride)) <= 2_000_000
    assert stride == 1 or len(range(0, pixels, stride - 1)) > 2_000_000


def test_logits_so_large_that_no_temperature_is_seen_have_one_in_bounds() -> None:
    """Probabilities of exactly 0 and 1, as a network that diverged gives them."""
    logits = torch.tensor([[3e5, 0.0], [3e5, 0.0], [0.0, 3e5]])

    assert fit_temperature(logits, torch.tensor([0, 1, 1])) == pytest.approx(LARGEST, rel=1e-5)


def test_the_error_is_that_of_torchmetrics() -> None:
    logits, target = make_pixels(2.5, count=3001)
    shares = logits.softmax(1)
    confidence, right = shares.amax(1).numpy(), (shares.argmax(1) == target).numpy()

    calibration = Calibration()
    for part in (slice(0, 700), slice(700, None)):
        calibration.add(confidence[part], right[part])

    expected = multiclass_calibration_error(shares, target, num_classes=4, n_bins=15, norm="l1")
    assert calibration.error == pytest.approx(float(expected), abs=1e-6)
    assert calibration.error > 0.1
    assert sum(row["pixels"] for row in calibration.to_json()) == 3001
    assert Calibration().error is None


def test_bins_too_sure_and_too_doubtful_do_not_cancel() -> None:
    generator = torch.Generator().manual_seed(6)
    confidence = torch.rand(3001, generator=generator)
    # One of two is right however sure: too doubtful below 1/2, too sure above.
    right = torch.rand(3001, generator=generator) < 0.5

    calibration = Calibration()
    calibration.add(confidence.numpy(), right.numpy())

    expected = binary_calibration_error(confidence, right.long(), n_bins=15, norm="l1")
    assert calibration.error == pytest.approx(float(expected), abs=1e-6)
    assert calibration.error > 0.2 > abs(float((confidence - right.float()).mean()))


def test_each_bin_holds_its_upper_edge() -> None:
    # Edges of eight bins are exact numbers.
    confidence = np.r_[np.arange(9), np.arange(9), np.random.default_rng(2).random(61) * 8] / 8
    right = np.arange(79) % 3 == 0
    place = pandas.cut(confidence, np.arange(9) / 8, include_lowest=True, labels=False)

    calibration = Calibration(bins=8)
    calibration.add(confidence, right)

    assert calibration.count.tolist() == np.bincount(place, minlength=8).tolist()
    assert calibration.right.tolist() == np.bincount(place[right], minlength=8).tolist()
    told = calibration.to_json()
    for row, one in zip(told, range(8), strict=True):
        assert row["confidence"] == pytest.approx(confidence[place == one].mean())
        assert row["right"] == pytest.approx(right[place == one].mean())


def test_the_picture_shows_each_bin_at_its_confidence_and_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []

    @contextlib.contextmanager
    def kept(*told: Any) -> Iterator[Any]:
        with plots.figure(*told) as axes:
            yield axes
            drawn.append(axes)

    monkeypatch.setattr(calibration_module, "figure", kept)
    generator = np.random.default_rng(3)
    some = Calibration()
    some.add(generator.random(503) ** 0.3, generator.random(503) < 0.8)

    written = plot_reliability({"some": some, "none": Calibration()}, tmp_path / "r.png")

    assert written.stat().st_size > 1000
    (axes,) = drawn
    diagonal, line, empty = (np.transpose(one.get_data()) for one in axes.get_lines())
    assert np.array_equal(diagonal[:, 0], diagonal[:, 1])
    rows = some.to_json()
    places = [(row["confidence"], row["right"]) for row in rows]
    assert line.tolist() == axes.collections[0].get_offsets().tolist() == [[*at] for at in places]
    assert len(empty) == 0
    labels = [one.get_label() for one in axes.get_lines()]
    assert labels == ["calibrated", f"some: error {some.error:.3f}", "none"]
    # The more pixels, the larger the dot; all lie in the picture.
    by_pixels = np.argsort([row["pixels"] for row in rows], kind="stable")
    assert (np.diff(axes.collections[0].get_sizes()[by_pixels]) >= 0).all()
    assert axes.get_xlim()[0] <= 0 < max(at for at, _ in places) <= 1 <= axes.get_xlim()[1]
    assert axes.get_ylim()[0] <= 0 < 1 <= axes.get_ylim()[1]
    assert axes.get_xlabel() == "confidence"
    assert "right" in axes.get_ylabel()


def test_parts_that_were_written_come_together_as_if_counted_at_once() -> None:
    generator = np.random.default_rng(4)
    confidence, right = generator.random(607) ** 0.5, generator.random(607) < 0.7
    whole, summed = Calibration(), Calibration()
    whole.add(confidence, right)
    for part in np.split(np.arange(607), [100, 101, 350]):
        one = Calibration()
        one.add(confidence[part], right[part])
        summed.add_bins(json.loads(json.dumps(one.to_json())))
    assert summed.count.tolist() == whole.count.tolist()
    assert summed.right.tolist() == whole.right.tolist()
    assert summed.error == pytest.approx(whole.error, abs=1e-12)


def test_a_run_fits_stores_and_reports(small_cube: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(small_cube, run, load_config(FinetuneConfig, overrides=SMALL))

    temperature = read_metadata(run).temperature
    assert temperature is not None
    assert read_metadata(run / "checkpoints" / "last.safetensors").temperature is None
    told = json.loads((run / "run.json").read_text())["calibration"]
    assert told["temperature"] == temperature
    season = open_season(small_cube)
    assert season.fields is not None
    judged = season.fields.split == SPLITS["validation"]
    assert 0.8 * season.fields.pixels[judged].sum() < told["pixels"]

    evaluation = evaluate_run(run, small_cube, split="validation")

    # The very pixels that it was fitted on.
    assert told["pixels"] == evaluation.metrics.pixels
    assert evaluation.calibration.error == pytest.approx(told["error_after"], abs=1e-4)
    assert evaluation.uncalibrated.error == pytest.approx(told["error_before"], abs=1e-4)
    written = json.loads((evaluation.folder / "metrics.json").read_text())["calibration"]
    assert written["expected_calibration_error"] == evaluation.calibration.error
    assert sum(row["pixels"] for row in written["bins"]) == evaluation.metrics.pixels
    assert (evaluation.folder / "reliability.png").stat().st_size > 1000
    assert f"temperature scaling, by {temperature:.3f}" in "\n".join(evaluation.lines())
    card = (run / "model_card.md").read_text()
    assert f"calibrated by the temperature {temperature:.3f}, fitted on the" in card
    assert "expected_calibration_error" in card


def test_without_validation_fields_there_is_none(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    cube = new_cube()
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    split = season.fields.split.copy()
    split[split == SPLITS["validation"]] = SPLITS["train"]
    write_split(season, split)

    result = finetune(
        cube, tmp_path / "run", load_config(FinetuneConfig, overrides={**SMALL, "steps": 2})
    )

    assert any("confidence is not calibrated" in note for note in result.notes)
    assert read_metadata(tmp_path / "run").temperature is None
    evaluation = evaluate_run(tmp_path / "run", cube)
    assert evaluation.calibration.error == evaluation.uncalibrated.error
    assert "the checkpoint has no temperature" in "\n".join(evaluation.lines())
    assert "- confidence is not calibrated\n" in (tmp_path / "run" / "model_card.md").read_text()


def test_where_all_pixels_are_right_nothing_is_fitted_and_a_note_says_so(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    cube = new_cube()
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    # One class alone is learnt and judged.
    others = season.fields.code > 0
    write_split(season, np.where(others, SPLITS["test"], season.fields.split).astype(np.uint8))
    config = load_config(FinetuneConfig, overrides={**SMALL, "optimiser.learning_rate": 0.05})

    result = finetune(cube, tmp_path / "run", config)

    assert result.best == 1
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["calibration"] is None
    assert read_metadata(tmp_path / "run").temperature is None
    for notes in (told["notes"], result.notes):
        assert [note for note in notes if "pixels of the validation fields are right" in note]
    assert "confidence is not calibrated" in (tmp_path / "run" / "model_card.md").read_text()
