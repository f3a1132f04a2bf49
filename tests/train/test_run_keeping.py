"""The saves of a run in a bucket: one or the other, whole, of one writer; on a real server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stcln_geo import bucket as bucket_module
from stcln_geo import lock as lock_module
from stcln_geo.errors import (
    InputError,
    MissingFileError,
    StclnGeoError,
    StclnGeoWarning,
    StorageError,
)
from stcln_geo.lock import lock_path
from stcln_geo.model.checkpoint import find_checkpoint
from stcln_geo.saves import SAVE_FILE, STAGE, fetch_save, is_saved, local_copy, read_save
from stcln_geo.storage import S3Path, list_files, location, write_file
from stcln_geo.train import run_keeping
from stcln_geo.train.ranks import Ranks
from stcln_geo.train.run_copy import run_copy, written_to
from stcln_geo.train.run_directory import RunDirectory
from stcln_geo.train.run_keeping import RunMirror, kept_run, work_folder

FIRST = {
    "run.json": b'{"status": "running"}',
    "steps.jsonl": b"1\n",
    "bad_chunks.jsonl": b"x\n",
    "checkpoints/last.ckpt": b"l" * 7001,
    "checkpoints/best.safetensors": b"b" * 313,
}
SECOND = {
    "run.json": b'{"status": "finished"}',
    "steps.jsonl": b"1\n2\n",
    "checkpoints/last.ckpt": b"m" * 7013,
    "checkpoints/best.safetensors": FIRST["checkpoints/best.safetensors"],
    "tensorboard/events.1": b"e" * 11,
}


class Killed(BaseException):
    """Ends what runs, and runs none of what would follow."""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work folders are made in the current one."""
    monkeypatch.chdir(tmp_path)


def put(folder: Path, files: dict[str, bytes]) -> None:
    """Make a folder hold these files, written as a run writes them."""
    for name in list_files(folder) if folder.is_dir() else []:
        if name not in files:
            (folder / name).unlink()
    for name, content in files.items():
        write_file(folder / name, content)


def held(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in list_files(folder)}


def address(s3: str, name: str = "x") -> S3Path:
    found = location(f"{s3}/runs/{name}")
    assert isinstance(found, S3Path)
    return found


def saved(where: S3Path, folder: Path) -> dict[str, bytes]:
    """Return what a new machine gets."""
    mirror = RunMirror(folder / "new" / where.name, where)
    mirror.fetch()
    return held(folder / "new" / where.name) if (folder / "new" / where.name).is_dir() else {}


def send(where: S3Path, folder: Path, files: dict[str, bytes], **options: bool) -> RunMirror:
    """Make a save by a process of its own."""
    mirror = RunMirror(folder / where.name, where)
    mirror.fetch(**options)
    put(folder / where.name, files)
    mirror.end()
    return mirror


def kill_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Kill the process before its request of this number that writes; tell how many there were."""
    count = 0
    lock = threading.Lock()

    def wrap(name: str) -> None:
        original = getattr(run_keeping, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            # Links of local files are no requests.
            if any(isinstance(one, S3Path) for one in arguments):
                with lock:
                    count += 1
                    if count > number:
                        raise Killed
            return original(*arguments, **options)

        monkeypatch.setattr(run_keeping, name, counted)

    for name in ("upload_file", "copy_file", "replace_save", "remove_files"):
        wrap(name)
    return lambda: count


@pytest.mark.slow
def test_a_kill_between_objects_leaves_one_save_or_the_other(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_keeping, "TRANSFERS", 1)
    seen = []
    for number in range(100):
        where, machine = address(s3, f"x{number}"), tmp_path / str(number)
        send(where, machine / "one", FIRST)
        with monkeypatch.context() as patch:
            requests = kill_at(number, patch)
            with contextlib.suppress(Killed):
                send(where, machine / "two", SECOND)
            whole = requests() <= number
        got = saved(where, machine)
        assert got in (FIRST, SECOND), f"killed before request {number + 1}"
        seen.append(got == SECOND)
        # Who goes on from there leaves nothing of it behind.
        send(where, machine / "three", SECOND)
        assert saved(where, machine / "last") == SECOND
        assert list_files(where) == sorted([*SECOND, SAVE_FILE])
        shutil.rmtree(machine)
        if whole:
            break
    # 4 objects, save.json, their names, save.json, the staged and the one that is gone: as counted.
    assert seen == sorted(seen)
    assert not seen[0]
    assert len(seen) >= 10


def test_the_first_save_cut_short_is_none(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_keeping, "TRANSFERS", 1)
    where = address(s3)
    with monkeypatch.context() as patch:
        kill_at(3, patch)
        with pytest.raises(Killed):
            send(where, tmp_path / "one", FIRST)
    assert [name.split("/")[0] for name in list_files(where)] == [STAGE] * 3
    assert saved(where, tmp_path) == {}
    send(where, tmp_path / "two", FIRST)
    assert list_files(where) == sorted([*FIRST, SAVE_FILE])


def test_weights_are_found_before_they_have_their_name(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = address(s3)
    best = where / "checkpoints" / "best.safetensors"

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RunMirror, "_give_names", die)
        with pytest.raises(Killed):
            send(where, tmp_path / "one", FIRST)
    assert not best.exists()
    assert find_checkpoint(where) == best
    assert [is_saved(where, name) for name in ("steps.jsonl", "other.jsonl")] == [True, False]
    assert not is_saved(address(s3, "none"), "steps.jsonl")
    assert not is_saved(tmp_path / "one" / "x", "steps.jsonl")
    with local_copy(best) as file:
        assert file.read_bytes() == FIRST["checkpoints/best.safetensors"]
    send(where, tmp_path / "two", FIRST)
    assert list_files(where) == sorted([*FIRST, SAVE_FILE])


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"l" * 7000 + b"k", "is damaged"), (b"l" * 100, "is damaged"), (None, "is missing")],
    ids=["changed", "cut short", "gone"],
)
def test_a_damaged_object_is_named(
    s3: str, tmp_path: Path, content: bytes | None, told: str
) -> None:
    where = address(s3)
    send(where, tmp_path / "one", FIRST)
    target = where / "checkpoints" / "last.ckpt"
    target.unlink() if content is None else write_file(target, content)
    with pytest.raises(
        StorageError, match=rf"{target} {told}.*checkpoints/last\.ckpt.*--overwrite"
    ):
        saved(where, tmp_path)
    # One that is not asked for is not in the way.
    with local_copy(where / "checkpoints" / "best.safetensors") as file:
        assert file.read_bytes() == FIRST["checkpoints/best.safetensors"]
    with pytest.raises(StorageError, match=f"{target} {told}"), local_copy(target):
        pass
    mirror = send(where, tmp_path / "two", SECOND, overwrite=True)
    assert mirror.is_sent
    assert saved(where, tmp_path / "last") == SECOND


def test_save_json_says_what_each_object_holds(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    send(where, tmp_path / "one", FIRST)
    told = json.loads((where / SAVE_FILE).read_text())
    assert told["files"] == {
        name: {
            "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest(), "at": name
        }
        for name, content in FIRST.items()
    }  # fmt: skip
    write_file(where / SAVE_FILE, b'{"format": 7, "files": {}}')
    with pytest.raises(
        StorageError, match=r"save\.json is damaged or of another version.*format 7"
    ):
        saved(where, tmp_path)


def test_a_save_that_leads_out_of_the_run_is_refused(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    send(where, tmp_path / "one", FIRST)
    told = json.loads((where / SAVE_FILE).read_text())
    told["files"]["../outside"] = told["files"].pop("run.json")
    write_file(where / SAVE_FILE, json.dumps(told).encode())
    with pytest.raises(StorageError, match=r"'../outside', which lies outside"):
        fetch_save(where, tmp_path / "two" / "x")
    assert not (tmp_path / "two" / "outside").exists()


def test_who_reads_while_a_save_comes_gets_the_new_one_whole(s3: str, tmp_path: Path) -> None:
    """The writer comes between the list of the files and the files themselves."""
    where = address(s3)
    send(where, tmp_path / "zero", FIRST)
    told: list[str] = []

    def meanwhile(name: str) -> bool:
        if not told:
            send(where, tmp_path / "one", SECOND)
            # As if it had been brought before the writer took it away.
            write_file(where / "bad_chunks.jsonl", FIRST["bad_chunks.jsonl"])
        told.append(name)
        return True

    save = fetch_save(where, tmp_path / "got", wanted=meanwhile)

    assert save is not None
    assert save == read_save(where)
    assert held(tmp_path / "got") == SECOND
    assert set(told) == {*FIRST, *SECOND}


def test_a_run_that_is_removed_while_it_is_read_is_none(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    assert fetch_save(where, tmp_path / "got") is None
    send(where, tmp_path / "zero", FIRST)

    def meanwhile(_: str) -> bool:
        for name in list_files(where):
            (where / name).unlink()
        return True

    assert fetch_save(where, tmp_path / "got", wanted=meanwhile) is None


def test_who_never_finds_a_save_at_rest_is_told_so(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    send(where, tmp_path / "zero", FIRST)
    saves = 0

    def meanwhile(name: str) -> bool:
        nonlocal saves
        if name == "run.json":
            saves += 1
            content = f"{saves}\n".encode() * saves
            send(where, tmp_path / "one", dict.fromkeys(FIRST, content))
        return True

    with pytest.raises(StorageError, match=r"saved anew each of 5 times.*Try again"):
        fetch_save(where, tmp_path / "got", wanted=meanwhile)
    assert saves == 5


@pytest.mark.parametrize("beside", ["a save", "nothing"])
def test_a_copy_of_any_object_lies_here_and_errors_name_the_object(
    s3: str, tmp_path: Path, beside: str
) -> None:
    where = address(s3)
    if beside == "a save":
        send(where, tmp_path / "one", FIRST)
    lone = where / "checkpoints" / "other.safetensors"
    with pytest.raises(MissingFileError, match=f"Cannot read {lone}: there is no such object"):
        local_copy(lone).__enter__()
    write_file(lone, b"other")
    with local_copy(lone) as file:
        assert file.read_bytes() == b"other"
    assert not file.exists()
    with pytest.raises(InputError) as caught, local_copy(lone) as file:
        raise InputError(f"Cannot use {file}: so it is.")
    assert str(caught.value) == f"Cannot use {lone}: so it is."
    mine = InputError("Cannot use another: so it is.")
    with pytest.raises(InputError) as caught, local_copy(lone):
        raise mine
    assert caught.value is mine
    here = tmp_path / "here.bin"
    with local_copy(here) as file:
        assert file is here


def test_two_writers_never_mix(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    send(where, tmp_path / "zero", FIRST)
    one, other = (RunMirror(tmp_path / name / "x", where) for name in ("one", "other"))
    one.fetch()
    other.fetch()
    put(tmp_path / "one" / "x", SECOND)
    put(tmp_path / "other" / "x", {**FIRST, "steps.jsonl": b"1\n2\n3\n"})
    one.end()
    other.save()
    with pytest.raises(InputError, match=r"save\.json was written meanwhile, not by this command"):
        other.end()
    assert not other.is_sent
    assert saved(where, tmp_path) == SECOND


def test_a_folder_that_went_on_by_itself_is_kept(s3: str, tmp_path: Path) -> None:
    where, folder = address(s3), tmp_path / "one" / "x"
    send(where, tmp_path / "one", FIRST)
    # A process that was killed before its save got to the bucket.
    put(folder, SECOND)
    RunMirror(folder, where).fetch()
    assert held(folder) == SECOND
    # Meanwhile another machine has gone on.
    send(where, tmp_path / "two", {**FIRST, "steps.jsonl": b"other\n"})
    RunMirror(folder, where).fetch()
    assert held(folder) == {**FIRST, "steps.jsonl": b"other\n"}


def test_a_run_copied_there_by_other_means_goes_on(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    evaluation = {"evaluation-test/metrics.json": b"{}", "model_card.md": b"card"}
    for name, content in {**FIRST, **evaluation}.items():
        write_file(where / name, content)
    send(where, tmp_path / "one", SECOND)
    assert saved(where, tmp_path) == SECOND
    assert list_files(where) == sorted([*SECOND, *evaluation, SAVE_FILE])


def test_other_objects_are_left_alone(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    write_file(where / "classes.tif", b"a map")
    with pytest.raises(InputError, match=r"it holds other objects \(classes.tif\)"):
        RunMirror(tmp_path / "x", where).fetch()
    assert list_files(where) == ["classes.tif"]


def test_beginning_anew_replaces_all_of_a_run(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    send(where, tmp_path / "one", {**FIRST, "model_card.md": b"card"})
    write_file(where / "evaluation-test" / "metrics.json", b"{}")
    send(where, tmp_path / "two", SECOND, overwrite=True)
    assert list_files(where) == sorted([*SECOND, SAVE_FILE])
    assert saved(where, tmp_path) == SECOND


def test_beginning_anew_in_vain_leaves_the_run(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    send(where, tmp_path / "one", FIRST)
    with pytest.raises(InputError, match="no"), kept_run(where, Ranks(), overwrite=True):
        raise InputError("no")
    assert saved(where, tmp_path) == FIRST
    assert not (tmp_path / "stcln-geo-work").exists()
    assert not lock_path(where).exists()


def test_evaluating_disturbs_no_training(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    mirror = RunMirror(tmp_path / "one" / "x", where)
    mirror.fetch()
    put(tmp_path / "one" / "x", FIRST)
    mirror.save()
    deadline = time.monotonic() + 60
    while (found := read_save(where)) is None or found.files["run.json"].at != "run.json":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with run_copy(where) as run:
        assert run.status == "running"
        assert not run.resume_file.exists()
        write_file(run.path / "evaluation-test" / "metrics.json", b'{"fields": 7}')
        write_file(run.path / "model_card.md", b"card")
    put(tmp_path / "one" / "x", SECOND)
    mirror.end()
    assert saved(where, tmp_path) == SECOND
    made = ("evaluation-test/metrics.json", "model_card.md")
    assert list_files(where) == sorted([*SECOND, *made, SAVE_FILE])
    with contextlib.suppress(ZeroDivisionError), run_copy(where) as run:
        assert (run.path / "model_card.md").read_bytes() == b"card"
        write_file(run.path / "model_card.md", b"half")
        raise ZeroDivisionError
    assert (where / "model_card.md").read_bytes() == b"card"


@pytest.mark.parametrize("kept", ["a save", "other means"])
def test_a_copy_holds_what_is_read_and_brings_what_is_made_of_it(
    s3: str, tmp_path: Path, kept: str
) -> None:
    where = address(s3)
    derived = {"evaluation-test/metrics.json": b"old", "model_card.md": b"card"}
    if kept == "a save":
        send(where, tmp_path / "one", SECOND)
    for name, content in (derived if kept == "a save" else {**SECOND, **derived}).items():
        write_file(where / name, content)
    # Resuming and the progress of training are no part of it.
    needed = {"run.json", "steps.jsonl", "checkpoints/best.safetensors"}

    with run_copy(where) as run:
        assert run.where == where
        own = {name: SECOND[name] for name in needed}
        found = held(run.path)
        assert {n: found[n] for n in found if n != SAVE_FILE} == {**own, **derived}
        write_file(run.path / "evaluation-test" / "metrics.json", b"new")
        write_file(run.path / "evaluation-test" / "confusion.csv", b"more")
        write_file(run.path / "steps.jsonl", b"no part of it\n")
        # Another command that judges the run meanwhile.
        write_file(where / "model_card.md", b"of another")

    assert not run.path.exists()
    expected = {
        **SECOND, "evaluation-test/metrics.json": b"new", "evaluation-test/confusion.csv": b"more",
        "model_card.md": b"of another",
    }  # fmt: skip
    found = {name: (where / name).read_bytes() for name in list_files(where)}
    found.pop(SAVE_FILE, None)
    assert found == expected

    def judge_and_die() -> None:
        with run_copy(where) as run:
            write_file(run.path / "model_card.md", b"half")
            raise Killed

    with pytest.raises(Killed):
        judge_and_die()
    assert (where / "model_card.md").read_bytes() == b"of another"


def test_a_folder_is_its_own_copy_and_what_is_written_to_a_bucket_lies_there(
    s3: str, tmp_path: Path
) -> None:
    put(tmp_path / "run", FIRST)
    with run_copy(tmp_path / "run") as run:
        assert run.path == run.where == tmp_path / "run"
    with written_to(tmp_path) as folder:
        assert folder is tmp_path
    assert held(tmp_path / "run") == FIRST
    where = address(s3)
    with written_to(where) as folder:
        put(folder, SECOND)
    assert not folder.exists()
    assert {name: (where / name).read_bytes() for name in list_files(where)} == SECOND


def test_a_server_that_is_away_is_waited_for(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_RETRIES", 0)
    where = address(s3)
    server = os.environ["AWS_ENDPOINT_URL"]
    with kept_run(where, Ranks()) as run:
        put(run.path, FIRST)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
            for number in range(3):
                write_file(run.path / "steps.jsonl", b"1\n" * number)
                run.saved()
                deadline = time.monotonic() + 60
                while any(run.path.with_name("x.sending").iterdir()):
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
            monkeypatch.setenv("AWS_ENDPOINT_URL", server)
        assert len(told) == 1
        assert "Training goes on, and each save tries again" in str(told[0].message)
        put(run.path, SECOND)
    assert saved(where, tmp_path) == SECOND
    assert os.listdir(tmp_path) == ["new"]


def test_a_last_save_that_fails_is_an_error_and_is_brought_later(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_RETRIES", 0)
    where = address(s3)
    server = os.environ["AWS_ENDPOINT_URL"]

    def run_and_lose_the_server() -> None:
        with kept_run(where, Ranks()) as run:
            put(run.path, SECOND)
            monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")

    with pytest.raises(StorageError, match=r"did not get there lies in .*: the same command"):
        run_and_lose_the_server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    lock_path(where).unlink()  # of a process that has ended, it would be taken over
    assert held(work_folder(where)) == SECOND
    with kept_run(where, Ranks()) as run:
        assert held(run.path) == SECOND
    assert saved(where, tmp_path) == SECOND
    assert not work_folder(where).exists()


def test_a_failed_run_is_saved_and_its_error_told(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "_RETRIES", 0)
    where = address(s3)

    def fail(files: dict[str, bytes], server: str) -> None:
        with kept_run(where, Ranks()) as run:
            put(run.path, files)
            monkeypatch.setenv("AWS_ENDPOINT_URL", server)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(FIRST, os.environ["AWS_ENDPOINT_URL"])
    assert saved(where, tmp_path) == FIRST
    away = pytest.warns(StclnGeoWarning, match="What did not get there lies in")
    with away, pytest.raises(ZeroDivisionError):
        fail(SECOND, "http://127.0.0.1:1")


def test_a_work_folder_that_is_named_stays(s3: str, tmp_path: Path) -> None:
    where = address(s3)
    with kept_run(where, Ranks(), work=tmp_path / "w") as run:
        assert run.path == work_folder(where, tmp_path / "w")
        assert run.path.name == "x"
        put(run.path, FIRST)
    assert held(run.path) == FIRST
    assert work_folder(address(s3, "y"), "w").parent != work_folder(where, "w").parent
    with (
        pytest.raises(InputError, match="Leave --work out"),
        kept_run(tmp_path / "here", Ranks(), work=tmp_path / "w"),
    ):
        pass
    with kept_run(tmp_path / "here", Ranks()) as local:
        assert isinstance(local, RunDirectory)
        assert local.path == local.where == tmp_path / "here"


@pytest.mark.parametrize("text", ["s3://KEY:a-secret@bucket/x", "s3://KEY:a-se/cret@bucket/x"])
def test_keys_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(InputError, match=r"key or signature in it.*AWS_PROFILE") as caught:
        location(text)
    assert "secret" not in str(caught.value)
    assert "a-se" not in str(caught.value)


# --- the lock ---


def forge(where: S3Path, **changes: object) -> None:
    """Leave the lock of another process."""
    with kept_run(where, Ranks()):
        told = json.loads(lock_path(where).read_text())
    lock = lock_path(where)
    assert isinstance(lock, S3Path)
    write_file(lock, json.dumps({**told, **changes}).encode())


def test_a_machine_that_vanished_is_waited_out(s3: str) -> None:
    where = address(s3)
    forge(where, host="elsewhere", pid=1, beat=0.05)
    told = pytest.warns(StclnGeoWarning, match="process 1 on elsewhere: waiting up to")
    with told, kept_run(where, Ranks()):
        assert json.loads(lock_path(where).read_text())["pid"] == os.getpid()
    assert not lock_path(where).exists()


def test_a_machine_that_lives_is_not_overruled(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "_OBJECT_BEAT_SECONDS", 0.1)
    where = address(s3)
    with kept_run(where, Ranks()):
        # The same holder, seen from another host.
        monkeypatch.setattr(lock_module.socket, "gethostname", lambda: "elsewhere")
        match = rf"process {os.getpid()} on .* has been writing this run"
        with (
            pytest.warns(StclnGeoWarning, match="waiting up to"),
            pytest.raises(InputError, match=match),
            kept_run(where, Ranks()),
        ):
            pass
        deadline = time.monotonic() + 60
        while json.loads(lock_path(where).read_text())["sign"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert not lock_path(where).exists()


def test_errors_are_of_one_kind(s3: str) -> None:
    with pytest.raises(StclnGeoError, match="no bucket 'none-such'"):
        RunMirror(Path("x"), S3Path("none-such", "x")).fetch()
