"""Runs kept in a bucket, on a real server on loopback: killed anywhere, and as a local one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from stcln_geo.cli.main import invoke
from stcln_geo.errors import CheckpointError, InputError, StclnGeoWarning, StorageError
from stcln_geo.model.checkpoint import find_checkpoint, load_model, read_metadata
from stcln_geo.saves import SAVE_FILE, STAGE, fetch_save, local_copy, read_save, replace_save
from stcln_geo.storage import S3Path, list_files, location, remove_files, write_file
from stcln_geo.train.ranks import Ranks
from stcln_geo.train.run_keeping import RunMirror, kept_run, work_folder

from .test_killed import COMMAND, EXTRA, OPTIONS, TIMED, assert_same_run, finish, lines


def download(run: str, folder: Path) -> Path:
    """Bring all objects of a run into a folder, as other tools do."""
    where = location(run)
    for name in list_files(where):
        write_file(folder / name, (where / name).read_bytes())
    return folder


def start(kind: str, cube: Path, out: str, here: Path) -> subprocess.Popen[str]:
    """Begin a command in a folder of its own, as on another machine."""
    here.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, kind, str(cube), "--out", out, *OPTIONS, *EXTRA[kind]],
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_sigkill_and_an_empty_machine(kind: str, small_cube: Path, s3: str, tmp_path: Path) -> None:
    finish(kind, small_cube, tmp_path / "whole")
    run = f"{s3}/runs/whole"
    draw = random.Random(f"bucket {kind}")

    for number, step in enumerate(sorted(draw.sample(range(1, 24), 3))):
        process = start(kind, small_cube, run, tmp_path / f"machine-{number}")
        deadline = time.monotonic() + 300
        while saved_steps(run) < step:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            assert time.monotonic() < deadline
        time.sleep(draw.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        shutil.rmtree(tmp_path / f"machine-{number}")
    process = start(kind, small_cube, run, tmp_path / "last")
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told

    there = download(run, tmp_path / "there")
    assert_same_run(tmp_path / "whole", there)
    assert list_files(there) == sorted([*list_files(tmp_path / "whole"), SAVE_FILE])
    assert os.listdir(tmp_path / "last") == []
    assert not location(f"{run}.lock").exists()
    assert "a-secret-word" not in "".join(
        (there / name).read_text(errors="replace") for name in list_files(there)
    )
