"""Figures also go to TensorBoard, W&B and MLflow, by their own packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stcln_geo.errors import InputError
from stcln_geo.train import journal
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.finetune import finetune

SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "data.chip": 16,
    "batch_size": 4,
    "steps": 5,
    "validation.every": 2,
}


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


@pytest.mark.parametrize("killed", [1, 3], ids=["before the first save", "after it"])
def test_tensorboard_shows_each_step_once_also_after_a_kill(
    killed: int, small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(FinetuneConfig, overrides=SMALL)
    end = journal.Journal.on_train_batch_end

    def dying(self: Any, trainer: Any, task: Any, *rest: Any) -> None:
        end(self, trainer, task, *rest)
        if task.step == killed:
            self._flush()
            raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "on_train_batch_end", dying)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(small_cube, tmp_path / "run", config, trackers=["tensorboard"])
    finetune(small_cube, tmp_path / "run", config, trackers=["tensorboard"])

    run = tmp_path / "run"
    trace = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    shown = scalars(run / "tensorboard", "loss")
    assert [step for step, _ in shown] == [1, 2, 3, 4, 5]
    assert [value for _, value in shown] == pytest.approx([one["loss"] for one in trace])
    rounds = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    judged = scalars(run / "tensorboard", "validation_macro_miou")
    assert judged == [(one["step"], pytest.approx(one["validation_macro_miou"])) for one in rounds]


def test_wandb_is_told(small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = load_config(FinetuneConfig, overrides=SMALL)

    finetune(small_cube, tmp_path / "run", config, trackers=["wandb"])

    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"validation_macro_miou" in kept.read_bytes()


def test_mlflow_is_told(small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = load_config(FinetuneConfig, overrides=SMALL)
    with pytest.raises(InputError, match="MLFLOW_TRACKING_URI is not set"):
        finetune(small_cube, tmp_path / "run", config, trackers=["mlflow"])
    # A folder in place of a server: MLflow itself has to be told that this is meant.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())

    finetune(small_cube, tmp_path / "run", config, trackers=["mlflow"])

    (losses,) = (tmp_path / "server").glob("*/*/metrics/loss")
    assert len(losses.read_text().splitlines()) == 5


def test_unknown_and_missing_trackers_are_refused(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    config = load_config(FinetuneConfig, overrides=SMALL)
    with pytest.raises(InputError, match=r"'comet': trackers are tensorboard, wandb, mlflow"):
        finetune(small_cube, tmp_path / "run", config, trackers=["comet"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'stcln-geo\[wandb\]'"):
        finetune(small_cube, tmp_path / "run", config, trackers=["wandb"])
    assert not (tmp_path / "run").exists()
