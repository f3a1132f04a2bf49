"""One writer per cube, and no lock that outlives its process."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from stcln_geo.cube.lock import cube_lock, lock_path
from stcln_geo.cube.read import LedgerEntry, append_ledger
from stcln_geo.errors import CubeError, OutputError


def forge(cube: Path, **changes: object) -> Path:
    """Write a lock of ours, changed."""
    with cube_lock(cube):
        content = json.loads(lock_path(cube).read_text())
    lock_path(cube).write_text(json.dumps({**content, **changes}))
    return lock_path(cube)


def test_a_second_writer_is_told_who_writes(tmp_path: Path):
    cube = tmp_path / "deep" / "c.zarr"
    with cube_lock(cube):
        match = rf"process {os.getpid()} on .*Wait.*remove"
        with pytest.raises(CubeError, match=match) as caught, cube_lock(cube):
            pass
        assert str(lock_path(cube)) in str(caught.value)
        with cube_lock(tmp_path / "other.zarr"):
            pass
    assert not lock_path(cube).exists()
    with cube_lock(cube):
        pass


def test_the_lock_is_freed_by_an_error(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt), cube_lock(tmp_path / "c.zarr"):
        raise KeyboardInterrupt
    with cube_lock(tmp_path / "c.zarr"):
        pass


def test_two_spellings_of_a_path_are_one_cube(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    again = cube_lock(tmp_path / "x" / ".." / "c.zarr")
    with cube_lock("c.zarr"), pytest.raises(CubeError, match="one writer"), again:
        pass


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path):
    cube = tmp_path / "c.zarr"
    script = (
        "import os, signal, sys\n"
        "from stcln_geo.cube.lock import cube_lock\n"
        "with cube_lock(sys.argv[1]):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(cube)], check=False)
    left = json.loads(lock_path(cube).read_text())
    assert left["pid"] != os.getpid()
    with cube_lock(cube):
        assert json.loads(lock_path(cube).read_text())["pid"] == os.getpid()
    assert not lock_path(cube).exists()


@pytest.mark.parametrize(
    "changes",
    [{"pid": "x"}, {"pid": 10**30}, {"pid": 0}, {"pid": None}, {"host": "other", "beat": "x"}],
    ids=str,
)
def test_a_lock_that_no_writer_wrote_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object]
):
    monkeypatch.setattr("stcln_geo.lock._UNWRITTEN_SECONDS", 0.05)
    forge(tmp_path / "c.zarr", **changes)
    with cube_lock(tmp_path / "c.zarr"):
        assert json.loads(lock_path(tmp_path / "c.zarr").read_text())["pid"] == os.getpid()


def test_a_lock_of_a_later_version_which_tells_more_is_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("stcln_geo.lock._UNWRITTEN_SECONDS", 0.05)
    forge(tmp_path / "c.zarr", rack="west", sockets=[1, 2])
    with pytest.raises(CubeError, match="one writer"), cube_lock(tmp_path / "c.zarr"):
        pass


def test_a_lock_of_deep_brackets_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stcln_geo.lock._UNWRITTEN_SECONDS", 0.05)
    lock_path(tmp_path / "c.zarr").write_text("[" * 100_000)
    with cube_lock(tmp_path / "c.zarr"):
        assert json.loads(lock_path(tmp_path / "c.zarr").read_text())["pid"] == os.getpid()


def test_a_reused_process_number_is_no_holder(tmp_path: Path):
    forge(tmp_path / "c.zarr", born="1")
    with cube_lock(tmp_path / "c.zarr"):
        pass


@pytest.mark.parametrize("rest", [b"", b'{"host": "h'])
def test_a_half_written_lock_is_no_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: bytes
):
    monkeypatch.setattr("stcln_geo.lock._UNWRITTEN_SECONDS", 0.05)
    lock_path(tmp_path / "c.zarr").write_bytes(rest)
    with cube_lock(tmp_path / "c.zarr"):
        pass


@pytest.mark.parametrize(
    ("beat", "still", "taken"),
    [(30.0, 590, False), (30.0, 610, True), (0.0, 10**6, False)],
    ids=["alive", "gone", "silent by nature"],
)
def test_another_host_is_overruled_where_it_is_surely_gone(
    tmp_path: Path, beat: float, still: float, taken: bool
):
    lock = forge(tmp_path / "c.zarr", host="elsewhere", pid=1, beat=beat)
    os.utime(lock, (time.time() - still,) * 2)
    refused = pytest.raises(CubeError, match="process 1 on elsewhere")
    with contextlib.nullcontext() if taken else refused, cube_lock(tmp_path / "c.zarr"):
        pass
    assert lock.exists() is not taken
    assert os.listdir(tmp_path) == ([] if taken else ["c.zarr.lock"])


def test_a_holder_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("stcln_geo.lock._BEAT_SECONDS", 0.01)
    cube = tmp_path / "c.zarr"
    with cube_lock(cube):
        assert json.loads(lock_path(cube).read_text())["beat"] == 0.01
        os.utime(lock_path(cube), (0, 0))
        deadline = time.monotonic() + 20
        while lock_path(cube).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        assert time.time() - lock_path(cube).stat().st_mtime < 60
    assert not lock_path(cube).exists()


def test_the_lock_of_a_zombie_is_taken_over(tmp_path: Path):
    cube = tmp_path / "c.zarr"
    script = (
        "import os, signal, sys\n"
        "from stcln_geo.cube.lock import cube_lock\n"
        "with cube_lock(sys.argv[1]):\n"
        "    print(flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(cube)], stdout=subprocess.PIPE
    ) as process:
        # All it holds is closed, but nobody has asked how it ended.
        assert process.stdout is not None
        process.stdout.read()
        assert lock_path(cube).exists()
        while _state(process.pid) != "Z":
            time.sleep(0.001)
        with cube_lock(cube):
            pass
        assert _state(process.pid) == "Z"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("job", "restarts", "taken"),
    [("7", "1", True), ("7", "0", False), ("8", "1", False)],
    ids=["requeued", "same life", "another job"],
)
def test_a_requeued_job_goes_on_from_another_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, restarts: str, taken: bool
):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CLUSTER_NAME", "fields")
    forge(tmp_path / "c.zarr", host="elsewhere", pid=1)
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
    refused = pytest.raises(CubeError, match="process 1 on elsewhere")
    with contextlib.nullcontext() if taken else refused, cube_lock(tmp_path / "c.zarr"):
        pass
    assert lock_path(tmp_path / "c.zarr").exists() is not taken


def test_of_many_that_find_a_dead_holder_one_wins(tmp_path: Path):
    cube = tmp_path / "c.zarr"
    forge(cube, born="1")
    inside: list[int] = []

    def enter(number: int) -> bool:
        try:
            with cube_lock(cube):
                inside.append(number)
                assert len(inside) == 1
                inside.remove(number)
                return True
        except CubeError:
            return False

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(enter, range(64)))
    assert any(outcomes)
    assert not lock_path(cube).exists()


def test_a_lock_that_is_a_link_is_not_written_through(tmp_path: Path):
    victim = tmp_path / "of_mine.txt"
    victim.write_text("years of work")
    lock_path(tmp_path / "c.zarr").symlink_to(victim)
    with (
        pytest.raises(OutputError, match=r"c\.zarr\.lock: it is a link to another file"),
        cube_lock(tmp_path / "c.zarr"),
    ):
        pass
    assert victim.read_text() == "years of work"


@pytest.mark.parametrize("mask", [0o002, 0o077])
def test_who_may_write_a_lock_or_a_ledger_is_up_to_the_umask(mask: int, tmp_path: Path):
    ledger = tmp_path / "ledger.jsonl"
    entry = LedgerEntry(
        item="i", asset="red", href="r.tif", kind="gone", error="x", attempts=1,
        window=(0, 0, 3, 5),
    )  # fmt: skip
    before = os.umask(mask)
    try:
        append_ledger(ledger, entry)
        with cube_lock(tmp_path / "c.zarr"):
            modes = [one.stat().st_mode & 0o777 for one in (ledger, lock_path(tmp_path / "c.zarr"))]
    finally:
        os.umask(before)
    assert modes == [0o666 & ~mask] * 2
