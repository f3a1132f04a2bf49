from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from stcln_geo.cube.block import BlockTask
from stcln_geo.errors import (
    BrokenDeviceError,
    CubeError,
    InputError,
    OutputError,
    TaskError,
    UnreadableError,
)
from stcln_geo.execution import Execution, FailedTask, run_tasks
from stcln_geo.grid import Window

EXECUTIONS = [Execution(), Execution(workers=1), Execution(workers=2)]
IDS = ["in-process", "1-worker", "2-workers"]


def _square(number: int) -> tuple[int, int]:
    time.sleep(0.01 * (number % 3))
    return number * number, os.getpid()


def _fail_on_three(task: tuple[int, str]) -> int:
    number, folder = task
    Path(folder, f"{number}.{os.getpid()}.{time.monotonic_ns()}").touch()
    if number == 3:
        raise RuntimeError("three is bad")
    return number


def _say_what_memory_depends_on(number: int) -> tuple[str | None, bool]:
    import dask
    from distributed import get_worker

    collected = get_worker().profile_history or dask.config.get(
        "distributed.worker.profile.enabled"
    )
    return os.environ.get("MALLOC_ARENA_MAX"), bool(collected)


def _refuse(number: int) -> int:
    raise CubeError(f"Cannot use {number}.")


@pytest.mark.parametrize("execution", EXECUTIONS, ids=IDS)
def test_results_come_in_order_of_the_tasks(execution):
    seen = []
    results = run_tasks(
        _square,
        range(7),
        execution=execution,
        label="square",
        progress=lambda done, total, what: seen.append((done, total, what)),
    )
    assert [value for value, _ in results] == [number * number for number in range(7)]
    assert seen[0] == (0, 7, "square")
    assert seen[-1] == (7, 7, "square")
    own = {pid for _, pid in results} == {os.getpid()}
    assert own is (execution.workers == 0)


@pytest.mark.parametrize("execution", [EXECUTIONS[0], EXECUTIONS[2]], ids=[IDS[0], IDS[2]])
def test_a_failing_task_is_retried_then_named_and_the_rest_finishes(execution, tmp_path):
    tasks = [(number, str(tmp_path)) for number in range(6)]
    with pytest.raises(TaskError, match=r"1 of 6 number tasks failed.*three is bad"):
        run_tasks(_fail_on_three, tasks, execution=execution, label="number", retries=1)
    runs = [int(path.name.split(".")[0]) for path in tmp_path.iterdir()]
    assert sorted(runs) == [0, 1, 2, 3, 3, 4, 5]


def test_failed_tasks_are_named_in_words():
    """As the tasks of a build are, whose fields are of no use to people."""
    tasks = [
        BlockTask(
            cube="/c.zarr", season="2018-09-01", window=Window(-48, 96 * place, 96, 80),
            fingerprint="0" * 64, skip_failures=False, threads=1,
        )
        for place in range(2)
    ]  # fmt: skip
    with pytest.raises(TaskError) as caught:
        run_tasks(_spoil, tasks, execution=Execution(), label="block", retries=0)
    named = "season 2018-09-01, 96 x 80 px at row -48, column"
    assert f"Failed: {named} 0, {named} 96. Remove the cause" in str(caught.value)


def _spoil(_: BlockTask) -> None:
    raise RuntimeError("bad")


@pytest.mark.parametrize("execution", [EXECUTIONS[0], EXECUTIONS[2]], ids=[IDS[0], IDS[2]])
def test_a_failing_task_is_set_aside_where_the_caller_asks_for_it(execution, tmp_path):
    tasks = [(number, str(tmp_path)) for number in range(6)]
    failed: list[FailedTask] = []
    results = run_tasks(_fail_on_three, tasks, execution=execution, label="number", failed=failed)
    assert results == [0, 1, 2, 4, 5]
    assert failed == [FailedTask(index=3, error="RuntimeError: three is bad", attempts=2)]


def _unreadable_three(task: tuple[int, str]) -> int:
    try:
        return _fail_on_three(task)
    except RuntimeError as error:
        raise UnreadableError("Cannot read rows 3 to 4.") from error


def _no_room_for_three(task: tuple[int, str]) -> int:
    try:
        return _fail_on_three(task)
    except RuntimeError as error:
        raise OutputError("Cannot write to /full.") from error


@pytest.mark.parametrize("execution", [EXECUTIONS[0], EXECUTIONS[1]], ids=[IDS[0], IDS[1]])
def test_what_one_task_cannot_read_is_set_aside_and_what_stops_all_stops_at_once(
    execution, tmp_path
):
    (tmp_path / "one").mkdir()
    (tmp_path / "all").mkdir()
    failed: list[FailedTask] = []
    tasks = [(number, str(tmp_path / "one")) for number in range(6)]
    results = run_tasks(
        _unreadable_three, tasks, execution=execution, label="number", failed=failed
    )
    assert results == [0, 1, 2, 4, 5]
    error = "UnreadableError: Cannot read rows 3 to 4."
    assert failed == [FailedTask(index=3, error=error, attempts=2)]

    tasks = [(number, str(tmp_path / "all")) for number in range(40)]
    with pytest.raises(OutputError, match="Cannot write to /full"):
        run_tasks(_no_room_for_three, tasks, execution=execution, label="number", failed=[])
    runs = [int(path.name.split(".")[0]) for path in (tmp_path / "all").iterdir()]
    assert runs.count(3) == 1, "trying again is in vain"
    assert len(runs) < 10


def test_without_tasks_no_worker_is_started():
    nobody = Execution(scheduler="tcp://127.0.0.1:1")

    def progress(*_: object) -> None:
        raise AssertionError("there is no progress with nothing to do")

    assert run_tasks(_square, [], execution=nobody, label="square", progress=progress) == []


def _break_on_three(task: tuple[int, str]) -> int:
    try:
        return _fail_on_three(task)
    except RuntimeError as error:
        raise BrokenDeviceError("cuda:0: CUDA error: device-side assert triggered") from error


def test_a_device_that_breaks_in_this_process_ends_the_run(tmp_path):
    tasks = [(number, str(tmp_path)) for number in range(6)]
    with pytest.raises(TaskError, match=r"device-side assert.*continues from here"):
        run_tasks(_break_on_three, tasks, execution=Execution(), label="number", failed=[])
    runs = [int(path.name.split(".")[0]) for path in tmp_path.iterdir()]
    assert sorted(runs) == [0, 1, 2, 3], "nothing after it is tried on a device that is gone"


@pytest.mark.parametrize("execution", [EXECUTIONS[0], EXECUTIONS[1]], ids=[IDS[0], IDS[1]])
def test_a_user_mistake_is_raised_as_it_is(execution):
    with pytest.raises(CubeError, match="Cannot use 0"):
        run_tasks(_refuse, [0, 1], execution=execution, label="task")


def test_local_workers_leave_no_trace_in_this_process():
    before = dict(os.environ)
    run_tasks(_square, [1], execution=Execution(workers=1), label="square")
    assert dict(os.environ) == before


@pytest.mark.slow
def test_scheduler_that_does_not_answer():
    with pytest.raises(InputError, match="Cannot reach the Dask scheduler"):
        run_tasks(_square, [1], execution=Execution(scheduler="tcp://127.0.0.1:1"), label="square")


def test_workers_and_scheduler_exclude_each_other():
    with pytest.raises(InputError, match="--workers or --scheduler"):
        Execution(workers=2, scheduler="tcp://127.0.0.1:8786")


def test_local_workers_have_few_heaps_and_collect_no_profile(monkeypatch):
    """What made a worker grow with its tasks; this process is left as it is."""
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    told = run_tasks(
        _say_what_memory_depends_on, [1], execution=Execution(workers=1), label="memory"
    )
    assert told == [("2", False)]
    assert "MALLOC_ARENA_MAX" not in os.environ
