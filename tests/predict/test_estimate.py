"""How long a prediction takes is measured: on windows beforehand, then on its own shards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from stcln_geo.cli.main import invoke
from stcln_geo.execution import Execution
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.predict import PredictionPlan, PredictSpec, plan_prediction, predict_region
from stcln_geo.predict import estimate as estimate_module
from stcln_geo.predict.estimate import estimate_time

SPEC = PredictSpec(
    device="cpu", precision="float32", min_clear=1, seam_audit=0, shard_size=40, keep_shards=True
)


@pytest.fixture(scope="module")
def plan(world: Any) -> PredictionPlan:
    return plan_prediction(world.season, read_metadata(world.checkpoint), SPEC)


@pytest.mark.parametrize("workers", [0, 2, 4])
def test_a_run_takes_its_windows_times_what_one_takes(
    plan: PredictionPlan, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def half_a_second(_: Any, __: Any, samples: list[Any], lanes: int) -> float:
        return 0.5 * len(samples) / lanes

    monkeypatch.setattr(estimate_module, "_time", half_a_second)
    monkeypatch.setattr(estimate_module, "available_cores", lambda: 2)
    found = estimate_time(plan, execution=Execution(workers=workers, threads=1))
    assert found is not None
    assert len(plan.shards) == found.shards == 6
    lanes = min(max(workers, 1), 2)
    # Four workers have six shards in two rounds, as eight shards would take.
    rounds = {0: 6, 2: 6, 4: 8}[workers] / 6
    assert math.isclose(found.seconds, 0.5 * plan.window_count / lanes * rounds)


def test_shards_that_are_done_set_the_pace(
    world: Any, plan: PredictionPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predict_region(world.cube, world.checkpoint, tmp_path, spec=SPEC)
    manifests = sorted((tmp_path / "shards").glob("*.json"))
    everything = estimate_time(plan, out=tmp_path)
    assert everything is not None
    assert (everything.seconds, str(everything)) == (0.0, "all shards are labelled")
    areas = {}
    for path in manifests:
        told = json.loads(path.read_text())
        told["seconds"]["total"] = 2.0 * told["windows"]
        areas[path] = told["shard"][2] * told["shard"][3]
        path.write_text(json.dumps(told))
    gone = manifests[:3]
    for path in gone:
        path.unlink()
    monkeypatch.setattr(estimate_module, "_measure", None)  # nothing is measured
    found = estimate_time(plan, execution=Execution(workers=1), out=tmp_path)
    assert found is not None
    assert (found.shards, found.done) == (3, 3)
    share = sum(areas[path] for path in gone) / sum(areas.values())
    assert math.isclose(found.seconds, 2.0 * plan.window_count * share)


def test_a_dry_run_measures_and_writes_nothing(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(world.cube), "--checkpoint", str(world.checkpoint), "--dry-run"]
    command += ["--out", str(tmp_path / "map"), "--device", "cpu"]
    assert invoke(command) == 0
    assert "windows took on this machine's cpu just now" in capsys.readouterr().out
    if not torch.cuda.is_available():
        assert invoke([*command, "--device", "cuda"]) == 0, "the map is planned for another machine"
        assert "time        not known before" in capsys.readouterr().out
    assert invoke([*command, "--scheduler", "tcp://nowhere:8786"]) == 0
    assert "s of one worker's thread or GPU" in capsys.readouterr().out
    assert not (tmp_path / "map").exists()


def test_a_place_without_pixels_tells_nothing(
    plan: PredictionPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "read_samples", lambda *_: [None])
    assert estimate_time(plan) is None
