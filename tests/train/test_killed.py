"""Commands killed at random, by one process or two, and run again: as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from stcln_geo.model.checkpoint import save_checkpoint
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import MaskedPretrainer

COMMAND = "from stcln_geo.cli.main import run; run()"
OPTIONS = [
    "--steps", "30", "--preset", "tiny", "--chip", "16", "--batch-size", "2", "--workers", "1",
    "--device", "cpu", "--track", "none", "--save-every", "0", "--seed", "5",
    "--set", "model.widths=[8, 16]", "--set", "model.layers=1", "--set", "model.heads=2",
    "--set", "model.feedforward=32", "--set", "model.dropout=0.3", "--set", "validation.every=8",
    "--set", "deterministic=true", "--set", "optimiser.ema=0.9",
]  # fmt: skip
EXTRA = {
    "pretrain": ["--set", "masking.gate=false", "--set", "data.memory_gb=0.0006"],
    "finetune": ["--set", "accumulate=2"],
}
TIMED = ("seconds", "samples_per_second", "data_wait")


def start(kind: str, cube: Path, out: Path, *more: str) -> subprocess.Popen[str]:
    arguments = [kind, str(cube), "--out", str(out), *OPTIONS, *EXTRA[kind], *more]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def finish(kind: str, cube: Path, out: Path, *more: str) -> None:
    process = start(kind, cube, out, *more)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until so many steps are in the trace, and then some part of a step more."""
    deadline = time.monotonic() + 300
    trace = out / "steps.jsonl"
    while not trace.is_file() or trace.read_text().count("\n") < step:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(random.Random(step).random() * 0.05)


def kill_at(step: int, kind: str, cube: Path, out: Path, *more: str) -> None:
    """Begin or go on, and kill the command at a step."""
    process = start(kind, cube, out, *more)
    wait_for_step(process, out, step)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert step <= len(lines(out / "steps.jsonl")) < 30


def children(process: int) -> list[int]:
    """The processes that a process began."""
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return [int(one) for one in found]


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def assert_same_run(one: Path, other: Path) -> None:
    """Loss of each step, figures of each round, and all weights, to the last bit."""
    assert [line["step"] for line in lines(one / "steps.jsonl")] == list(range(1, 31))
    assert lines(one / "steps.jsonl") == lines(other / "steps.jsonl")
    rounds = [
        [{key: value for key, value in line.items() if key not in TIMED} for line in lines(path)]
        for path in (one / "metrics.jsonl", other / "metrics.jsonl")
    ]
    assert len(rounds[0]) == 4
    assert rounds[0] == rounds[1]
    for name in ("best.safetensors", "last.safetensors"):
        # Whole files: weights, statistics and the metadata with the step they are of.
        files = [run / "checkpoints" / name for run in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_sigkill_at_random_steps_and_resume(kind: str, small_cube: Path, tmp_path: Path) -> None:
    finish(kind, small_cube, tmp_path / "whole")
    draw = random.Random(f"steps of {kind}")
    steps = sorted(draw.sample(range(1, 24), 4))

    for step in steps:
        kill_at(step, kind, small_cube, tmp_path / "parts")
    finish(kind, small_cube, tmp_path / "parts")

    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_continued_pretraining_is_killed_and_resumed(small_cube: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    network = StclnConfig(
        bands=("nir", "red", "swir16"), widths=(8, 16), layers=1, heads=2, feedforward=32,
        mode="reference", positions="index",
    )  # fmt: skip
    init = save_checkpoint(tmp_path / "init.safetensors", MaskedPretrainer(network))
    begun = ("--init", str(init))
    finish("pretrain", small_cube, tmp_path / "whole", *begun)

    for step in (3, 17):
        kill_at(step, "pretrain", small_cube, tmp_path / "parts", *begun)
    finish("pretrain", small_cube, tmp_path / "parts", *begun)

    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    told = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("whole", "parts")]
    assert told[0]["notes"] == told[1]["notes"]
    assert any("positions='index', this has 'days'" in note for note in told[0]["notes"])


@pytest.mark.slow(minutes=1.5)
@pytest.mark.parametrize("victim", ["the command", "a rank"])
def test_two_ranks_killed_and_resumed(victim: str, small_cube: Path, tmp_path: Path) -> None:
    two = ("--devices", "2")
    finish("finetune", small_cube, tmp_path / "whole", *two)
    step = random.Random(victim).randrange(1, 26)

    process = start("finetune", small_cube, tmp_path / "parts", *two)
    wait_for_step(process, tmp_path / "parts", step)
    ranks = children(process.pid)
    assert len(ranks) == 2
    if victim == "a rank":
        os.kill(ranks[1], signal.SIGKILL)
        _, told = process.communicate(timeout=300)
        assert process.returncode == 1
        assert "rank 1 of 2 was ended by signal 9" in told
        assert "it goes on from the last save" in told
    else:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 120
    while any(is_alive(rank) for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlived the others"
        time.sleep(0.05)
    assert len(lines(tmp_path / "parts" / "steps.jsonl")) < 30
    finish("finetune", small_cube, tmp_path / "parts", *two)

    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    told = (tmp_path / "parts" / "config.toml").read_text()
    assert "ranks = 2" in told
    run = json.loads((tmp_path / "parts" / "run.json").read_text())
    assert run["global_batch"] == 2 * 2 * 2
