"""A run that is killed at any moment, and run again, gives the undisturbed archive."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.archive.create import create_archive
from stcln_geo.archive.index import open_archive
from stcln_geo.archive.plan import ArchivePlan, plan_archive
from stcln_geo.archive.validate import validate_archive
from stcln_geo.cli.main import invoke
from stcln_geo.storage import list_files, location

from .conftest import PLACES, SIZE, SMALL_SHARDS, make_sites, make_spec
from .test_create import assert_equal

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_per_shard")]

_KILLS = 2
"""Runs that are killed, one after the other, before one may end."""


def run_command(command: list[str]) -> None:
    """Be the process that is killed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*SMALL_SHARDS)
        sys.exit(invoke(command))


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("points") / "p.csv"
    lines = [f"{name},{lon!r},{lat!r}" for name, (lon, lat) in PLACES.items()]
    file.write_text("\n".join(["id,lon,lat", *lines]))
    return file


def start(points: Path, catalog: str, out: str) -> Any:
    """Begin 'archive create' in a process of its own, which has its libraries already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.archive.test_killed"])
    command = ["archive", "create", "--sites", str(points), "--size", str(SIZE),
               "--seasons", "2018,2019", "--catalog", catalog, out]  # fmt: skip
    process = context.Process(target=run_command, args=(command,))
    process.start()
    return process


def wait_for_files(process: Any, out: Path, count: int) -> None:
    """Wait until an archive has so many files, or until who writes it has ended."""
    deadline = time.monotonic() + 300
    # Folders are renamed meanwhile, which os.walk does not mind.
    while sum(len(files) for *_, files in os.walk(out)) < count and process.is_alive():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_killed_run_goes_on_and_gives_the_same(
    whole_plan: ArchivePlan, planted: Any, points: Path, tmp_path: Path
):
    # A moment is a number of files, from none to all, and a little later. (A moment of a clock
    # depends on the machine: where it starts slowly, all of them come before the first shard.)
    rng = np.random.default_rng(7)
    total = len(list_files(whole_plan.path))
    moments = rng.permutation(np.linspace(0, total - 1, 5 * _KILLS).astype(int))
    expected = open_archive(whole_plan.path).index
    killed = unfinished = kept = 0
    for number in range(5):
        out = tmp_path / str(number)
        for moment in moments[number * _KILLS : (number + 1) * _KILLS]:
            process = start(points, planted.location, str(out))
            wait_for_files(process, out, moment)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            process.join()
            assert process.exitcode in {-signal.SIGKILL, 0}
            killed += process.exitcode == -signal.SIGKILL
        unfinished += any(".building/" in name for name in list_files(out))
        plan = plan_archive(make_sites(), make_spec(planted.location), out)
        report = create_archive(plan)
        kept += 0 < report.windows_read < plan.windows
        assert_equal(plan, whole_plan)
        assert open_archive(out).index.equals(expected), "index rows, with SHA-256 of manifests"
        assert validate_archive(out)[0] == []
        assert not [name for name in list_files(out) if ".building/" in name]
        assert not location(f"{out}.lock").is_file()
    # Otherwise this shows nothing.
    assert killed > 4
    assert unfinished > 0
    assert kept > 0


def test_a_killed_run_goes_on_in_a_bucket(
    whole_plan: ArchivePlan, planted: Any, points: Path, s3: str
):
    expected = open_archive(whole_plan.path).index
    out = location(f"{s3}/archive")
    # A server of processes would not have the environment that leads to the bucket.
    script = (
        "import sys\nfrom tests.archive.test_killed import run_command\nrun_command(sys.argv[1:])\n"
    )
    command = ["archive", "create", "--sites", str(points), "--size", str(SIZE),
               "--seasons", "2018,2019", "--catalog", planted.location, str(out)]  # fmt: skip
    total = len(list_files(whole_plan.path))
    for objects in sorted(np.random.default_rng(3).choice(total, 3, replace=False)):
        process = subprocess.Popen([sys.executable, "-c", script, *command])
        deadline = time.monotonic() + 120
        while len(list_files(out)) < objects and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    plan = plan_archive(make_sites(), make_spec(planted.location), out)
    report = create_archive(plan)
    assert 0 < report.windows_read < plan.windows
    assert_equal(plan, whole_plan)
    assert open_archive(out).index.equals(expected)
    assert validate_archive(out)[0] == []
    assert not [name for name in list_files(out) if ".building" in name or "publish" in name]
