"""The random forest beside a network: its series, its fields, and how sure the difference is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student

from stcln_geo.cli.main import invoke
from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import open_season
from stcln_geo.data.split import few_label_fields
from stcln_geo.errors import CheckpointError
from stcln_geo.train import baseline
from stcln_geo.train.baseline import compare_by_field, fill_gaps
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.evaluate import evaluate_run
from stcln_geo.train.finetune import finetune
from stcln_geo.train.over_seeds import evaluate_seeds
from stcln_geo.train.seeds import finetune_seeds

SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "data.halo": 3,
    "batch_size": 4,
    "steps": 2,
    "validation.every": 2,
    "labels.fields_per_class": 3,
    "seed": 4,
}


@pytest.fixture(scope="module")
def run(small_cube: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    finetune(small_cube, out, load_config(FinetuneConfig, overrides=SMALL))
    return out


def test_gaps_are_filled_linearly_in_time() -> None:
    generator = np.random.default_rng(3)
    days = np.sort(generator.choice(300, 9, replace=False))
    values = generator.normal(size=(40, 9, 3)).astype(np.float32)
    valid = generator.random((40, 9)) > 0.6
    valid[np.arange(40), generator.integers(0, 9, 40)] = True
    wanted = np.array([-20, 0, *days, 299, 300, 450])

    filled = fill_gaps(values, valid, days, wanted)

    for series, seen, found in zip(values, valid, filled, strict=True):
        for band in range(3):
            expected = np.interp(wanted, days[seen], series[seen, band])
            np.testing.assert_allclose(found[:, band], expected, atol=1e-5)


def test_pixels_of_a_field_are_no_evidence_each() -> None:
    generator = np.random.default_rng(1)
    sizes = generator.integers(1, 9, 23)
    field = np.repeat(np.arange(23), sizes)
    first, second = (generator.random(len(field)) < share for share in (0.8, 0.6))
    once = compare_by_field(first, second, field)
    many = compare_by_field(*(np.repeat(one, 7) for one in (first, second, field)))
    assert once == pytest.approx(many)
    assert once[0] == pytest.approx(first.mean() - second.mean())
    # Fields of one pixel: the interval of a mean of independent differences.
    apart = first.astype(float) - second
    alone = compare_by_field(first, second, np.arange(len(field)))
    expected = student.ppf(0.975, len(field) - 1) * apart.std(ddof=1) / np.sqrt(len(field))
    assert alone[1] == pytest.approx(expected)
    assert compare_by_field(first, second, np.zeros(len(field)))[1:] == (None, 1)


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(9)
    held = 0
    for _ in range(400):
        sizes = generator.integers(2, 40, 60)
        field = np.repeat(np.arange(60), sizes)
        # Whole fields are right or wrong together, as a class is taken for another.
        shares = generator.beta(0.4, 0.2, size=(2, 60))
        first, second = (generator.random(len(field)) < share[field] for share in shares)
        difference, half, _ = compare_by_field(first, second, field)
        held += abs(difference) <= (half or 0.0)
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.slow
def test_it_is_trained_and_judged_on_the_pixels_of_the_network(small_cube: Path, run: Path) -> None:
    evaluation = evaluate_run(run, small_cube, forest=True)
    found = evaluation.baseline
    assert found is not None

    season = open_season(small_cube)
    assert season.fields is not None
    chosen = few_label_fields(season.fields, fields_per_class=3, seed=4)
    seen = season.valid[:].any(axis=0)
    pixels = np.isin(season.parcels[:], season.fields.number[chosen]) & seen
    assert (found.trained_fields, found.trained_pixels) == (9, int(pixels.sum()))
    assert found.metrics.pixels == evaluation.metrics.pixels
    np.testing.assert_array_equal(found.metrics.support, evaluation.metrics.support)
    assert found.fields == int((season.fields.split == SPLITS["test"]).sum())
    assert found.difference == pytest.approx(
        evaluation.metrics.overall_accuracy - found.metrics.overall_accuracy
    )
    # The classes differ in the time of their green peak: two steps do not find it, a forest does.
    assert found.metrics.overall_accuracy > 0.9
    again = evaluate_run(run, small_cube, forest=True, pictures=False)
    assert again.to_json()["baseline"] == evaluation.to_json()["baseline"]


def test_of_many_pixels_some_are_taken(
    small_cube: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline, "MOST_PIXELS", 200)
    monkeypatch.setattr(baseline, "_AT_ONCE", 50)
    found = evaluate_run(run, small_cube, forest=True, pictures=False).baseline
    assert found is not None
    assert 150 < found.trained_pixels < 250
    assert found.trained_fields == 9


@pytest.mark.slow
def test_on_another_cube_it_is_trained_where_the_network_was(
    run: Path, new_cube: Callable[..., Path], tmp_path: Path, small_cube: Path
) -> None:
    here = evaluate_run(run, small_cube, forest=True, pictures=False).baseline
    there = evaluate_run(run, new_cube(seed=7, dates=11), forest=True, pictures=False).baseline
    assert here is not None
    assert there is not None
    assert there.trained_pixels == here.trained_pixels
    assert there.days == here.days

    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    weights = copied / "checkpoints" / "best.safetensors"
    alone = tmp_path / "alone.safetensors"
    shutil.copy(weights, alone)
    with pytest.raises(CheckpointError, match="lies in none"):
        evaluate_run(alone, small_cube, forest=True)


def test_the_command_says_whether_a_forest_does_as_well(
    small_cube: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["evaluate", str(run), str(small_cube)]
    assert invoke([*command, "--baseline", "forest"]) == 0
    said = capsys.readouterr().out
    assert "random forest (300 trees) on the same 9 training fields: overall_accuracy" in said
    assert "network less forest: overall_accuracy -" in said
    told = json.loads((run / "evaluation-test" / "metrics.json").read_text())["baseline"]
    apart = told["network_less_forest"]
    assert apart["overall_accuracy"] < 0 < apart["half_width_overall_accuracy"]
    assert f"over {apart['fields']} fields" in said
    card = (run / "model_card.md").read_text()
    assert f"random_forest_macro_miou {told['macro_miou']:.4f}" in card

    assert invoke([*command, "--baseline", "tree"]) == 2
    assert "none or forest" in capsys.readouterr().err
    assert invoke(command) == 0
    assert json.loads((run / "evaluation-test" / "metrics.json").read_text())["baseline"] is None


@pytest.mark.slow
def test_each_seed_has_a_forest_of_its_own(small_cube: Path, tmp_path: Path) -> None:
    config = load_config(FinetuneConfig, overrides=SMALL)
    finetune_seeds(small_cube, tmp_path / "runs", config, seeds=2)
    found = []
    told = evaluate_seeds(tmp_path / "runs", small_cube, forest=True, on_result=found.append)
    forests = [one.baseline for one in found]
    assert all(forests)
    figures = [one.metrics.macro_miou for one in forests if one is not None]
    assert told["forest"]["macro_miou"]["mean"] == pytest.approx(np.mean(figures))
    apart = [one.metrics.macro_miou - figure for one, figure in zip(found, figures, strict=True)]
    assert told["network_less_forest"]["macro_miou"]["mean"] == pytest.approx(np.mean(apart))
