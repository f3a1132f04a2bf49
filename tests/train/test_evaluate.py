"""Evaluation scores the map that prediction would make, on the pixels of one split only."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import open_season, write_fields, write_split
from stcln_geo.data.reader import drop_empty_dates, read_block
from stcln_geo.data.split import split_fields
from stcln_geo.errors import CheckpointError, InputError, LabelError
from stcln_geo.grid import Lattice
from stcln_geo.legend import Legend
from stcln_geo.model import join_checkpoints
from stcln_geo.model.checkpoint import (
    load_model,
    read_metadata,
    save_checkpoint,
    set_temperature,
)
from stcln_geo.model.stcln import Stcln
from stcln_geo.predict import PredictSpec
from stcln_geo.report.metrics import confusion_matrix
from stcln_geo.storage import location, write_file
from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config
from stcln_geo.train.evaluate import evaluate_run, plan_evaluation
from stcln_geo.train.finetune import finetune
from stcln_geo.train.over_seeds import evaluate_seeds, runs_of
from stcln_geo.train.pretrain import pretrain
from stcln_geo.train.recalibrate import calibrate_checkpoint
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
    "steps": 12,
    "validation.every": 12,
    "optimiser.learning_rate": 5e-3,
}


@pytest.fixture(scope="module")
def run(small_cube: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    finetune(small_cube, out, load_config(FinetuneConfig, overrides=SMALL))
    return out


def map_window_by_window(cube: Path, run: Path) -> np.ndarray:
    """Label the whole cube in the plainest way; 255 where no date is clear."""
    season = open_season(cube)
    lattice = Lattice(window=16, halo=3)
    network: Any = load_model(run)
    labelled = np.full(season.shape_yx, 255)
    for core in lattice.cores(season.window):
        window = lattice.window_of(core).relative_to(season.window)
        block = drop_empty_dates(read_block(season, window))
        if not len(block.days):
            continue
        images = torch.from_numpy(block.reflectance * 1e-4).float()[None]
        valid = torch.from_numpy(block.valid)[None]
        images = torch.where(valid[:, :, None], images, 0)
        with torch.inference_mode():
            logits = network(images, torch.from_numpy(block.days)[None], valid)
        classes = logits[0].argmax(0).numpy()
        classes[~block.valid.any(0)] = 255
        place = core.relative_to(season.window)
        for row in range(place.height):
            for col in range(place.width):
                y, x = place.row + row, place.col + col
                if 0 <= y < labelled.shape[0] and 0 <= x < labelled.shape[1]:
                    labelled[y, x] = classes[row + 3, col + 3]
    return labelled


@pytest.mark.parametrize("split", ["test", "validation", "train"])
def test_equals_the_map_on_the_fields_of_the_split(small_cube: Path, run: Path, split: Any) -> None:
    season = open_season(small_cube)
    assert season.fields is not None
    mapped = map_window_by_window(small_cube, run)
    mine = season.fields.number[season.fields.split == SPLITS[split]]
    truth = np.where(np.isin(season.parcels[:], mine), season.labels[:], 255)
    seen = mapped != 255

    evaluation = evaluate_run(run, small_cube, split=split)

    expected = confusion_matrix(truth[seen], mapped[seen], classes=3)
    # A tie may fall either way when windows share a batch: allow one pixel.
    assert np.abs(evaluation.metrics.confusion - expected).sum() <= 2
    assert evaluation.metrics.pixels == ((truth != 255) & seen).sum()
    assert evaluation.unseen_pixels == ((truth != 255) & ~seen).sum()
    counts = np.bincount(season.fields.code[season.fields.split == SPLITS[split]], minlength=3)
    assert evaluation.fields.tolist() == counts.tolist()


def test_calibrating_a_copy_fits_what_the_run_has_fitted_whatever_the_file_says(
    small_cube: Path, run: Path, tmp_path: Path
) -> None:
    best = run / "checkpoints" / "best.safetensors"
    copy = Path(shutil.copy(best, tmp_path / "copy.safetensors"))
    told = json.loads((run / "run.json").read_text())["calibration"]
    for before in (None, 7.0):
        if before is not None:
            set_temperature(copy, before)
        fitted = calibrate_checkpoint(copy, small_cube, device="cpu")
        assert asdict(fitted) == pytest.approx(told, rel=1e-3)
        assert read_metadata(copy).temperature == fitted.temperature
    for own in (run, best):
        with pytest.raises(InputError, match="belongs to a run"):
            calibrate_checkpoint(own, small_cube)
    # Files in a folder of that name, but of no run, and in another folder of a run.
    (tmp_path / "run" / "exports").mkdir(parents=True)
    shutil.copy(run / "run.json", tmp_path / "run")
    (tmp_path / "checkpoints").mkdir()
    for folder in (tmp_path / "checkpoints", tmp_path / "run" / "exports"):
        free = shutil.copy(copy, folder / "free.safetensors")
        assert calibrate_checkpoint(free, small_cube, device="cpu").pixels == told["pixels"]


def test_what_cannot_be_calibrated_is_left_as_it_is(
    new_cube: Callable[..., Path], run: Path, tmp_path: Path, s3: str
) -> None:
    network = load_model(run)
    assert isinstance(network, Stcln)
    with torch.no_grad():
        network.classifier.bias[0] += 1e4
    info = read_metadata(run)
    sure = save_checkpoint(
        tmp_path / "sure.safetensors", network, legend=info.legend, chip=info.chip, halo=info.halo
    )
    cube = new_cube()
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    judged = np.where(season.fields.code == 0, SPLITS["validation"], SPLITS["train"])
    write_split(season, judged.astype(np.uint8))
    before = sure.read_bytes()
    with pytest.raises(LabelError, match=r"Cannot calibrate .*all \d+ pixels .* are right"):
        calibrate_checkpoint(sure, cube, device="cpu")
    assert sure.read_bytes() == before
    away = location(f"{s3}/models/sure.safetensors")
    write_file(away, before)
    with pytest.raises(InputError, match=r"must be on this machine.*checkpoint export"):
        calibrate_checkpoint(away, cube)


@pytest.mark.slow
def test_an_ensemble_is_judged_as_it_maps_and_by_the_splits_of_all_its_members(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    cube, out = new_cube(), tmp_path / "all.safetensors"
    config = load_config(FinetuneConfig, overrides={**SMALL, "steps": 3})
    finetune_seeds(cube, tmp_path / "runs", config, seeds=2)
    join_checkpoints(runs_of(tmp_path / "runs"), out)
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    mapped = map_window_by_window(cube, out)
    mine = season.fields.number[season.fields.split == SPLITS["test"]]
    truth = np.where(np.isin(season.parcels[:], mine), season.labels[:], 255)
    seen = mapped != 255

    evaluation = evaluate_run(out, cube)

    expected = confusion_matrix(truth[seen], mapped[seen], classes=3)
    assert np.abs(evaluation.metrics.confusion - expected).sum() <= 2
    assert evaluation.folder is None
    fitted = calibrate_checkpoint(out, cube)
    assert read_metadata(out).temperature == fitted.temperature
    calibrated = evaluate_run(out, cube)
    assert np.array_equal(calibrated.metrics.confusion, evaluation.metrics.confusion)
    own = evaluate_run(out, cube, split="validation")
    assert own.uncalibrated.error == pytest.approx(fitted.error_before)
    assert own.calibration.error == pytest.approx(fitted.error_after)
    with pytest.raises(InputError, match="belongs to a run"):
        calibrate_checkpoint(tmp_path / "runs" / "seed-0", cube)
    write_split(season, split_fields(season.fields, seed=11))
    other = tmp_path / "other"
    finetune(cube, other, config)
    join_checkpoints([other, tmp_path / "runs" / "seed-1"], out)
    with pytest.raises(LabelError, match="burnt or split again since"):
        evaluate_run(out, cube)


def test_writes_figures_into_the_run(small_cube: Path, run: Path) -> None:
    evaluation = evaluate_run(run, small_cube)

    folder = run / "evaluation-test"
    assert evaluation.folder == folder
    told = json.loads((folder / "metrics.json").read_text())
    assert told["confusion"] == evaluation.metrics.confusion.tolist()
    assert told["macro_miou"] == pytest.approx(evaluation.metrics.macro_miou)
    assert [record["name"] for record in told["per_class"]] == ["crop 0", "crop 1", "crop 2"]
    assert sum(record["support_fields"] for record in told["per_class"]) == told["fields"]
    assert "never their labels" in told["note"]
    rows = list(csv.reader((folder / "confusion.csv").read_text().splitlines()))
    assert [[int(cell) for cell in row[1:]] for row in rows[1:]] == told["confusion"]
    assert (folder / "confusion.png").stat().st_size > 1000
    text = "\n".join(evaluation.lines())
    assert f"overall_accuracy: {evaluation.metrics.overall_accuracy:.4f}" in text
    plan = plan_evaluation(run, small_cube)
    assert f"{evaluation.windows} windows of 16 px" in "\n".join(plan.lines())


def test_validation_figures_are_those_of_training(small_cube: Path, run: Path) -> None:
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])

    evaluation = evaluate_run(run, small_cube, split="validation")

    assert evaluation.metrics.macro_miou == pytest.approx(last["validation_macro_miou"], abs=0.02)


def test_validation_figures_hold_in_reference_mode(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    # On some dates one window of 8 px is cloudy all over, another is not: series differ in length.
    cube = new_cube(dates=12)
    recipe = {**SMALL, "data.chip": 8, "data.halo": 1, "steps": 4, "validation.every": 4}
    recipe |= {"model.mode": "reference", "validation.choose_by": "overall_accuracy"}
    result = finetune(cube, tmp_path / "run", load_config(FinetuneConfig, overrides=recipe))
    told = json.loads((tmp_path / "run" / "run.json").read_text())["calibration"]
    evaluation = evaluate_run(tmp_path / "run", cube, split="validation")
    assert evaluation.metrics.overall_accuracy == pytest.approx(result.best)
    assert evaluation.uncalibrated.error == pytest.approx(told["error_before"], rel=1e-6)
    assert evaluation.calibration.error == pytest.approx(told["error_after"], rel=1e-6)


def test_pixels_without_a_clear_date_are_told_apart(
    new_cube: Callable[..., Path], run: Path
) -> None:
    cube = new_cube(seed=0)
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    tested = season.fields.number[season.fields.split == SPLITS["test"]]
    hidden = season.parcels[:] == tested[0]
    season.valid[:] = season.valid[:] & ~hidden

    evaluation = evaluate_run(run, cube)

    assert evaluation.unseen_pixels >= hidden.sum()
    assert any("no clear date" in line for line in evaluation.lines())


def test_pixels_that_a_map_leaves_blank_are_told_of(
    new_cube: Callable[..., Path], run: Path
) -> None:
    """The oracle counts clear dates in the cube; a map asks for three of them by default."""
    cube = new_cube(seed=0)
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    tested = season.fields.number[season.fields.split == SPLITS["test"]]
    valid = season.valid[:]
    half = np.cumsum(valid, axis=0) <= np.where(np.arange(valid.shape[2]) % 2, 2, 99)
    season.valid[:] = valid & half
    clear = season.valid[:].sum(axis=0)
    judged = np.isin(season.parcels[:], tested) & (clear > 0)
    few = judged & (clear < PredictSpec().min_clear)
    assert 0 < few.sum() < judged.sum()

    evaluation = evaluate_run(run, cube)

    assert (evaluation.metrics.pixels, evaluation.sparse_pixels) == (judged.sum(), few.sum())
    assert f"{few.sum()} of {judged.sum()} pixels have fewer than 3" in "\n".join(
        evaluation.lines()
    )
    assert json.loads(json.dumps(evaluation.to_json()))["sparse_pixels"] == few.sum()


def test_another_cube_is_transfer(new_cube: Callable[..., Path], run: Path) -> None:
    evaluation = evaluate_run(run, new_cube("elsewhere", seed=3))

    assert not evaluation.same_cube
    assert "transfer" in evaluation.note
    assert evaluation.folder == run / "evaluation-test-elsewhere-2018-09-01"


def test_cubes_of_one_name_do_not_lose_each_others_figures(
    new_cube: Callable[..., Path], run: Path, tmp_path: Path
) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("evaluation-*"))
    cubes = {}
    for place, seed in (("north", 3), ("south", 4)):
        (tmp_path / place).mkdir()
        cubes[place] = new_cube(f"made-{place}", seed=seed).rename(tmp_path / place / "cube.zarr")
    told = {place: evaluate_run(own, cube).to_json() for place, cube in cubes.items()}
    files = {
        file.parent.name: json.loads(file.read_text())
        for file in own.glob("evaluation-test-*/metrics.json")
    }
    assert files == {
        "evaluation-test-cube-2018-09-01": told["north"],
        "evaluation-test-south-cube-2018-09-01": told["south"],
    }
    evaluate_run(own, cubes["north"])
    evaluate_run(own, cubes["south"])
    assert len(list(own.glob("evaluation-test-*"))) == 2, "the same cubes take the same folders"
    # A cube that was moved is none beside which another one must be told apart.
    moved = cubes["north"].rename(tmp_path / "cube.zarr")
    assert evaluate_run(own, moved).folder == own / "evaluation-test-cube-2018-09-01"


def test_a_new_split_is_refused(new_cube: Callable[..., Path], tmp_path: Path) -> None:
    cube = new_cube()
    out = tmp_path / "run"
    finetune(cube, out, load_config(FinetuneConfig, overrides={**SMALL, "steps": 1}))
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    write_split(season, split_fields(season.fields, seed=11))

    with pytest.raises(LabelError, match="burnt or split again since"):
        evaluate_run(out, cube)


def test_what_does_not_fit_is_refused(
    small_cube: Path, new_cube: Callable[..., Path], run: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="splits are train, validation and test"):
        evaluate_run(run, small_cube, split="exam")  # type: ignore[arg-type]
    other = new_cube("other", seed=4)
    season = open_season(other, mode="r+")
    assert season.fields is not None
    write_fields(
        season,
        labels=season.labels[:],
        parcels=season.parcels[:],
        fields=season.fields,
        legend=Legend.from_values(["a", "b", "c"]),
    )
    with pytest.raises(CheckpointError, match=r"crop 0, crop 1, crop 2.*legend is a, b, c"):
        evaluate_run(run, other)
    config = load_config(PretrainConfig, overrides={**SMALL, "steps": 1, "masking.gate": False})
    pretrain([small_cube], tmp_path / "pre", config)
    with pytest.raises(CheckpointError, match="it is a pretrainer without a legend"):
        evaluate_run(tmp_path / "pre", small_cube)
    with pytest.raises(LabelError, match="none of its 20 fields is in the test split"):
        evaluate_run(run, new_cube("unsplit", split=False, seed=5))


def test_seeds_are_summed_up(small_cube: Path, tmp_path: Path) -> None:
    config = load_config(FinetuneConfig, overrides={**SMALL, "steps": 2})
    finetune_seeds(small_cube, tmp_path, config, seeds=2)

    told = evaluate_seeds(tmp_path, small_cube)

    assert runs_of(tmp_path) == [tmp_path / "seed-0", tmp_path / "seed-1"]
    values = [run["macro_miou"] for run in told["runs"]]
    assert told["macro_miou"]["mean"] == pytest.approx(np.mean(values))
    errors = [run["expected_calibration_error"] for run in told["runs"]]
    assert told["expected_calibration_error"]["mean"] == pytest.approx(np.mean(errors))
    assert told["macro_miou"]["deviation"] == pytest.approx(np.std(values, ddof=1))
    assert json.loads((tmp_path / "evaluation-test.json").read_text()) == told


@pytest.mark.slow
def test_figures_of_seeds_on_another_cube_stand_beside_those_on_their_own(
    small_cube: Path, new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    finetune_seeds(
        small_cube, out, load_config(FinetuneConfig, overrides={**SMALL, "steps": 2}), seeds=2
    )
    own = evaluate_seeds(out, small_cube)
    there = evaluate_seeds(out, new_cube("elsewhere", seed=4))
    files = {file.name: json.loads(file.read_text()) for file in out.glob("evaluation-*.json")}
    assert files == {
        "evaluation-test.json": own,
        "evaluation-test-elsewhere-2018-09-01.json": there,
    }
    assert "transfer" in there["note"]
    assert "transfer" not in own["note"]


@pytest.mark.slow
def test_a_run_that_was_stopped_is_in_no_mean(small_cube: Path, tmp_path: Path) -> None:
    """As after a kill: its weights are those of a few steps."""
    finetune_seeds(
        small_cube, tmp_path, load_config(FinetuneConfig, overrides={**SMALL, "steps": 2}), seeds=3
    )
    whole = evaluate_seeds(tmp_path, small_cube)
    stopped = tmp_path / "seed-1" / "run.json"
    stopped.write_text(json.dumps({**json.loads(stopped.read_text()), "status": "running"}))
    told = evaluate_seeds(tmp_path, small_cube)
    assert told["runs"] == [whole["runs"][0], whole["runs"][2]]
    values = [run["macro_miou"] for run in told["runs"]]
    assert told["macro_miou"]["mean"] == pytest.approx(np.mean(values))
    assert told["note"].endswith("Left out, as they are not finished: seed-1.")
    alone = evaluate_run(tmp_path / "seed-1", small_cube)
    assert "The run is not finished" in alone.lines()[-1]
    assert "not finished" not in evaluate_run(tmp_path / "seed-0", small_cube).note

    for seed in (0, 2):
        file = tmp_path / f"seed-{seed}" / "run.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "status": "failed"}))
    with pytest.raises(InputError, match="none of its 3 runs is finished"):
        evaluate_seeds(tmp_path, small_cube)
