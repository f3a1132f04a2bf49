"""Runs kept in a bucket, on a real server on loopback: killed anywhere, and as a local one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from stcln_geo import load_model
from stcln_geo.cli.main import invoke
from stcln_geo.errors import MissingFileError, StorageError
from stcln_geo.experiments import (
    Choices,
    Experiment,
    ExperimentResult,
    Settings,
    plan_experiment,
    run_experiment,
)  # fmt: skip
from stcln_geo.model.checkpoint import find_checkpoint, read_metadata
from stcln_geo.saves import SAVE_FILE, read_save
from stcln_geo.storage import S3Path, list_files, location, write_file
from stcln_geo.train.finetune import finetune
from stcln_geo.train.seeds import finetune_seeds

from .test_killed import (
    COMMAND,
    EXTRA,
    OPTIONS,
    TIMED,
    assert_same_run,
    finish,
    lines,
)  # fmt: skip
from .test_training import finetune_config

SMALL = [
    "--steps", "4", "--preset", "tiny", "--chip", "16", "--batch-size", "2", "--workers", "1",
    "--device", "cpu", "--set", "model.widths=[8, 16]", "--set", "model.layers=1",
    "--set", "model.heads=2", "--set", "model.feedforward=32", "--set", "validation.every=2",
]  # fmt: skip


def download(run: str, folder: Path) -> Path:
    """Bring all objects of a run into a folder, as other tools do."""
    where = location(run)
    for name in list_files(where):
        write_file(folder / name, (where / name).read_bytes())
    return folder


def start(kind: str, cube: Path, out: str, here: Path, *more: str) -> subprocess.Popen[str]:
    """Begin a command in a folder of its own, as on another machine."""
    here.mkdir()
    arguments = [kind, str(cube), "--out", out, *OPTIONS, *EXTRA[kind], *more]
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        start_new_session=True, cwd=here,
    )  # fmt: skip


def saved_steps(run: str) -> int:
    """Return the steps in the trace of the last save."""
    where = location(run)
    assert isinstance(where, S3Path)
    save = read_save(where)
    if save is None or "steps.jsonl" not in save.files:
        return 0
    try:
        return (where / save.files["steps.jsonl"].at).read_text().count("\n")
    except FileNotFoundError:
        return 0


def wait_for_save(process: subprocess.Popen[str], run: str, step: int) -> None:
    """Wait until so many steps are in the bucket, and then some part of a save more."""
    deadline = time.monotonic() + 300
    while saved_steps(run) < step:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
    time.sleep(random.Random(step).random() * 0.1)


def contents(folder: Path) -> dict[str, Any]:
    """Return what a run's files hold, but for times and places."""
    found: dict[str, Any] = {}
    for name in list_files(folder):
        text = (folder / name).read_bytes()
        if (
            name.endswith((".ckpt", ".html", ".png", ".npz", "model_card.md", "model_card.json"))
            or "tensorboard" in name
        ):
            # Holds times, or places.
            found[name.partition("tfevents")[0]] = None
        elif name == "metrics.jsonl":
            told = lines(folder / name)
            found[name] = [{k: v for k, v in line.items() if k not in TIMED} for line in told]
        elif name == "run.json":
            # A run that went on says that it did not fail.
            timed = ("id", "seconds", "error")
            found[name] = {k: v for k, v in json.loads(text).items() if k not in timed}
        elif name.startswith("evaluation-") and name.endswith(".json"):
            # The hash is of a file that names what it was begun from.
            named = ("checkpoint", "sha256")
            found[name] = {k: v for k, v in json.loads(text).items() if k not in named}
        else:
            found[name] = text
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_sigkill_and_an_empty_machine(kind: str, small_cube: Path, s3: str, tmp_path: Path) -> None:
    finish(kind, small_cube, tmp_path / "whole")
    run = f"{s3}/runs/whole"
    draw = random.Random(f"bucket {kind}")

    for number, step in enumerate(sorted(draw.sample(range(1, 24), 2))):
        process = start(kind, small_cube, run, tmp_path / f"machine-{number}")
        wait_for_save(process, run, step)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        shutil.rmtree(tmp_path / f"machine-{number}")
    process = start(kind, small_cube, run, tmp_path / "last")
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told

    there = download(run, tmp_path / "there")
    assert_same_run(tmp_path / "whole", there)
    assert list_files(there) == sorted([*list_files(tmp_path / "whole"), SAVE_FILE])
    assert contents(there) == {
        **contents(tmp_path / "whole"),
        SAVE_FILE: contents(there)[SAVE_FILE],
    }
    assert os.listdir(tmp_path / "last") == []
    assert not location(f"{run}.lock").exists()
    assert "a-secret-word" not in "".join(
        (there / name).read_text(errors="replace") for name in list_files(there)
    )


def start_two(
    cube: Path, out: str, machines: Sequence[Path], monkeypatch: pytest.MonkeyPatch
) -> list[subprocess.Popen[str]]:
    """Begin one run on two machines of one process each, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_PORT": port}
    found = []
    with monkeypatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        for rank, machine in enumerate(machines):
            patch.setenv("RANK", str(rank))
            found.append(start("finetune", cube, out, machine))
    return found


@pytest.mark.slow
def test_two_machines_without_a_common_folder(
    small_cube: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish("finetune", small_cube, tmp_path / "whole", "--devices", "2")
    run = f"{s3}/runs/two"
    first = start_two(small_cube, run, [tmp_path / "a", tmp_path / "b"], monkeypatch)
    wait_for_save(first[0], run, 7)
    for process in first:
        process.kill()
        process.wait()
    second = start_two(small_cube, run, [tmp_path / "c", tmp_path / "d"], monkeypatch)
    for process in second:
        _, told = process.communicate(timeout=600)
        assert process.returncode == 0, told
    assert_same_run(tmp_path / "whole", download(run, tmp_path / "there"))
    assert os.listdir(tmp_path / "c") == []


@pytest.mark.slow
def test_sigterm_brings_the_save_before_it_ends(small_cube: Path, s3: str, tmp_path: Path) -> None:
    run = f"{s3}/runs/told"
    # No save is due before the end.
    never = ("--save-every", "60", "--set", "validation.every=30")
    process = start("finetune", small_cube, run, tmp_path / "one", *never)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("one/stcln-geo-work/*/told/steps.jsonl")) or not lines(
        next(tmp_path.glob("one/stcln-geo-work/*/told/steps.jsonl"))
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert 10 <= saved_steps(run) < 30
    assert os.listdir(tmp_path / "one") == []
    assert not location(f"{run}.lock").exists()


@pytest.mark.slow
def test_the_path_in_a_bucket_is_that_of_folders(
    small_cube: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    cube = str(small_cube)
    for root in (s3, str(tmp_path)):
        first, second = f"{root}/first", f"{root}/second"
        gate = ["--set", "masking.gate=false"]
        assert invoke(["pretrain", cube, "--out", first, *SMALL, *gate]) == 0
        assert invoke(["finetune", cube, "--out", second, "--init", first, *SMALL]) == 0
        assert invoke(["evaluate", second, cube, "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert f"Kept in {s3}/first after each save; written below stcln-geo-work" in told
    assert f"Weights: {s3}/second/checkpoints/best.safetensors" in told
    assert f"Next: stcln-geo evaluate {s3}/second {cube}" in told
    for name in ("first", "second"):
        there = download(f"{s3}/{name}", tmp_path / "there" / name)
        here = contents(tmp_path / name)
        assert contents(there).keys() == {*here, SAVE_FILE}
        found = {key: value for key, value in contents(there).items() if key != SAVE_FILE}
        unlike = {key for key in here if found[key] != here[key]}
        # They name the checkpoint begun from, and times.
        named = {"config.toml", "run.json"}
        weights = {f"checkpoints/{one}.safetensors" for one in ("best", "last")}
        assert unlike <= (named | weights if name == "second" else set())
    card = (tmp_path / "there" / "second" / "model_card.md").read_text()
    assert "test" in card.split("validation", 1)[1]

    # What reads a checkpoint.
    assert invoke(["checkpoint", "info", f"{s3}/second", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["path"] == f"{s3}/second/checkpoints/best.safetensors"
    assert shown["provenance"]["init"]["path"] == "first/checkpoints/best.safetensors"
    out = tmp_path / "copy.safetensors"
    assert invoke(["checkpoint", "export", f"{s3}/second", str(out)]) == 0
    networks = [load_model(f"{s3}/second"), load_model(out)]
    states = [network.state_dict() for network in networks]
    assert all(states[0][key].equal(states[1][key]) for key in states[0])
    for root in (s3, str(tmp_path)):
        product = tmp_path / f"map-{len(root)}"
        words = ["predict", cube, "--checkpoint", f"{root}/second", "--out", str(product)]
        assert invoke([*words, "--device", "cpu"]) == 0

    # A finished run is left alone, and nothing is left here.
    before = {name: (location(f"{s3}/second") / name).read_bytes() for name in list_files(there)}
    assert invoke(["finetune", cube, "--out", f"{s3}/second", "--init", f"{s3}/first", *SMALL]) == 0
    assert "Nothing to do" in capsys.readouterr().out
    after = {name: (location(f"{s3}/second") / name).read_bytes() for name in list_files(there)}
    assert before == after
    assert not (tmp_path / "stcln-geo-work").exists()

    # A damaged network is named, not used.
    damaged = location(f"{s3}/second/checkpoints/best.safetensors")
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 1
    write_file(damaged, bytes(content))
    with pytest.raises(StorageError, match=f"{damaged} is damaged"):
        load_model(f"{s3}/second")


def test_dry_run_touches_nothing(
    small_cube: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = f"{s3}/runs/x"
    assert invoke(["finetune", str(small_cube), "--out", out, *SMALL, "--dry-run"]) == 0
    assert list_files(location(f"{s3}/runs")) == []
    assert os.listdir(tmp_path) == []


def test_other_options_are_refused_by_address(
    small_cube: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    out = f"{s3}/runs/x"
    finetune(small_cube, out, finetune_config(steps=3), device="cpu")
    words = ["finetune", str(small_cube), "--out", out, *SMALL]
    assert invoke(words) == 2
    assert f"Cannot go on in {out}: its options differ" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
    assert invoke([*words, "--init", out, "--overwrite"]) == 2
    assert f"Cannot begin anew in {out}" in capsys.readouterr().err
    assert read_metadata(out).kind == "classifier"
    bare = location(f"{s3}/bare.safetensors")
    write_file(bare, find_checkpoint(out).read_bytes())
    assert invoke(["checkpoint", "calibrate", str(bare), str(small_cube)]) == 2
    assert f"Cannot calibrate {bare}: the temperature is written" in capsys.readouterr().err
    with pytest.raises(MissingFileError, match=f"Cannot find the checkpoint {s3}/none"):
        find_checkpoint(f"{s3}/none")


@pytest.mark.slow
def test_seeds_in_a_bucket(
    small_cube: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    out = f"{s3}/runs/seeds"
    config = finetune_config(steps=3)
    summary = finetune_seeds(small_cube, out, config, seeds=2, device="cpu")
    assert str(summary.path) == out
    told = json.loads(location(f"{out}/summary.json").read_text())
    assert [run["run"] for run in told["runs"]] == ["seed-5", "seed-6"]
    with pytest.raises(MissingFileError, match=f"folder of 2 seeds.*{out}/seed-5"):
        find_checkpoint(out)
    assert invoke(["evaluate", out, str(small_cube), "--device", "cpu"]) == 0
    figures = json.loads(location(f"{out}/evaluation-test.json").read_text())
    assert len(figures["runs"]) == 2
    joined = tmp_path / "joined.safetensors"
    assert invoke(["checkpoint", "ensemble", out, "--out", str(joined)]) == 0
    assert read_metadata(joined).members == 2


def carry_out(planned: Experiment) -> tuple[ExperimentResult, list[bool]]:
    """Run an experiment; tell of each run whether there was anything to do."""
    worked: list[bool] = []
    return run_experiment(planned, on_done=lambda _, did: worked.append(did)), worked


@pytest.mark.slow
def test_an_experiment_in_a_bucket(
    small_cube: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = []
    for out in (f"{s3}/paper", "paper"):
        settings = Settings(
            data=(small_cube,), out=location(out), seeds=2, preset="tiny", steps=3, device="cpu",
            assignments=("data.chip=16", "batch_size=4", "pretrain.masking.gate=false"),
        )  # fmt: skip
        planned = plan_experiment("few-labels", settings, Choices(fields=(1,)))
        result, worked = carry_out(planned)
        assert str(result.report) == f"{out}/report.md"
        assert all(worked)
        assert not any(carry_out(planned)[1])
        tables.append((location(out) / "table.csv").read_text())
    assert tables[0] == tables[1]
    there = [name for name in list_files(location(f"{s3}/paper")) if not name.endswith(SAVE_FILE)]
    assert there == [name for name in list_files(Path("paper")) if not name.endswith(".lock")]
