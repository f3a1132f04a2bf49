"""Workers and schedulers come, go and die; the work is done once all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distributed
import pytest

from stcln_geo.errors import (
    BrokenDeviceError,
    InputError,
    MissingFileError,
    StclnGeoWarning,
    TaskError,
)
from stcln_geo.execution import Execution, FailedTask, run_tasks

from .dask_cluster import Cluster, wait_for_workers

pytestmark = pytest.mark.slow


def run(cluster: Cluster, function: Callable[[Any], Any], count: int, **options: Any) -> list[Any]:
    tasks = [(number, str(cluster.folder)) for number in range(count)]
    return run_tasks(
        function, tasks, execution=Execution(scheduler=cluster.address), label="number", **options
    )


def note(task: tuple[int, str]) -> tuple[int, int]:
    """Leave a file that says which process did which task."""
    number, folder = task
    Path(folder, f"{number}.{os.getpid()}").touch()
    time.sleep(0.2)
    return number, os.getpid()


def done(cluster: Cluster) -> Counter[int]:
    """How often each task was begun."""
    return Counter(int(path.name.split(".")[0]) for path in cluster.folder.glob("[0-9]*.[0-9]*"))


def test_a_worker_that_joins_late_is_used(cluster):
    cluster.worker()
    late = threading.Timer(1.5, cluster.worker)
    late.start()
    results = run(cluster, note, 40)
    assert [number for number, _ in results] == list(range(40))
    assert len({pid for _, pid in results}) == 2
    assert set(done(cluster).values()) == {1}


def test_a_worker_that_is_killed_costs_only_what_it_had_in_hand(cluster):
    cluster.worker()
    doomed = cluster.worker()

    def kill() -> None:
        while not list(cluster.folder.glob(f"*.{doomed.pid}")):
            time.sleep(0.05)
        doomed.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    results = run(cluster, note, 20)
    killer.join()
    assert [number for number, _ in results] == list(range(20))
    assert sum(done(cluster).values()) <= 21


def poison(task: tuple[int, str]) -> int:
    note(task)
    if task[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return task[0]


def test_a_task_that_kills_its_workers_is_named_and_the_others_are_done(cluster):
    cluster.worker(nanny=True)
    with pytest.raises(TaskError, match=r"1 of 6 number tasks failed.*\(2, "):
        run(cluster, poison, 6, retries=0)
    assert set(done(cluster)) == set(range(6))


def test_a_task_that_kills_its_workers_can_be_set_aside(cluster):
    cluster.worker(nanny=True)
    failed: list[FailedTask] = []
    results = run(cluster, poison, 6, retries=0, failed=failed)
    assert results == [0, 1, 3, 4, 5]
    assert [one.index for one in failed] == [2]
    assert "KilledWorker" in failed[0].error


def broken_once(task: tuple[int, str]) -> int:
    number, folder = task
    note(task)
    if number == 1 and len(list(Path(folder).glob("1.*"))) == 1:
        raise BrokenDeviceError("CUDA error: an illegal memory access was encountered")
    return os.getpid()


def test_a_worker_with_a_broken_device_is_replaced(cluster):
    cluster.worker(nanny=True)
    results = run(cluster, broken_once, 4, retries=0)
    assert len(set(results)) == 2, "a new process takes over"
    assert done(cluster) == {0: 1, 1: 2, 2: 1, 3: 1}


OTHER_VERSION = "import stcln_geo; stcln_geo.__version__ = '0.0.1'"


def test_workers_of_another_version_are_sent_away(cluster):
    cluster.worker()
    cluster.worker(first=OTHER_VERSION)
    wait_for_workers(cluster, 2)
    late = threading.Timer(1.5, cluster.worker, kwargs={"first": OTHER_VERSION})
    late.start()
    with pytest.warns(StclnGeoWarning, match=r"cannot do the work.*stcln-geo 0\.0\.1"):
        results = run(cluster, note, 20)
    assert len({pid for _, pid in results}) == 1
    assert set(done(cluster).values()) == {1}


def test_only_unfit_workers_is_an_error_before_any_work(cluster):
    cluster.worker(first=OTHER_VERSION)
    wait_for_workers(cluster, 1)
    with pytest.raises(InputError, match=r"none of 1 can do the work.*same version"):
        run(cluster, note, 3)
    assert not done(cluster)


def sees_its_folder() -> None:
    if "ELSEWHERE" in os.environ:
        raise MissingFileError("Cannot read the plan /data/plan.json: no such file.")


def test_workers_that_lack_the_files_are_sent_away(cluster):
    cluster.worker()
    cluster.worker(first="import os; os.environ['ELSEWHERE'] = '1'")
    wait_for_workers(cluster, 2)
    with pytest.warns(StclnGeoWarning, match=r"1 of 2 Dask workers.*/data/plan\.json"):
        results = run(cluster, note, 5, check=sees_its_folder)
    assert len({pid for _, pid in results}) == 1


def test_the_check_also_guards_this_process(monkeypatch):
    monkeypatch.setenv("ELSEWHERE", "1")
    with pytest.raises(MissingFileError, match=r"/data/plan\.json"):
        run_tasks(str, [1], execution=Execution(), label="task", check=sees_its_folder)


def test_workers_with_too_little_memory_for_their_threads_are_named(cluster):
    """Also those that join late. Dask kills a worker whose memory is full, again and again."""
    cluster.worker("--memory-limit", "2 GB")
    wait_for_workers(cluster, 1)
    late = threading.Timer(1.5, cluster.worker, ("--nthreads", "3", "--memory-limit", "2 GB"))
    late.start()
    with pytest.warns(StclnGeoWarning, match="less memory") as said:
        results = run(cluster, note, 40, memory=lambda tasks: 700_000_000 * tasks)
    assert [number for number, _ in results] == list(range(40))
    (text,) = (str(one.message) for one in said)
    assert "1 of 1 Dask workers" in text
    assert "3 threads, 2.0 GB; 2.1 GB needed" in text


def test_a_worker_that_hangs_does_not_hold_up_the_others(cluster, monkeypatch):
    monkeypatch.setattr("stcln_geo.fitness._ANSWER_SECONDS", 2.0)
    cluster.worker()
    hangs = cluster.worker()
    wait_for_workers(cluster, 2)
    hangs.send_signal(signal.SIGSTOP)
    seen = []

    def wake() -> None:
        seen.append(len(done(cluster)))
        hangs.send_signal(signal.SIGCONT)

    threading.Timer(10, wake).start()
    with pytest.warns(StclnGeoWarning, match="Not all Dask workers said"):
        results = run(cluster, note, 12)
    assert [number for number, _ in results] == list(range(12))
    assert seen[0] > 0, "the other one worked meanwhile"


def test_a_scheduler_that_dies_is_one_sentence(cluster):
    cluster.worker()
    wait_for_workers(cluster, 1)
    threading.Timer(1.5, cluster.scheduler.kill).start()
    with pytest.raises(TaskError, match=r"Lost the Dask scheduler.*of 50 number tasks"):
        run(cluster, note, 50)


def test_a_scheduler_without_workers_is_waited_for(cluster, monkeypatch):
    monkeypatch.setattr("stcln_geo.workers._LONELY_SECONDS", 1.0)
    threading.Timer(3, cluster.worker).start()
    with pytest.warns(StclnGeoWarning, match="has no workers: waiting"):
        results = run(cluster, note, 2)
    assert [number for number, _ in results] == [0, 1]


def test_local_workers_that_are_killed_while_starting_are_started_again(monkeypatch):
    starts = []
    start = distributed.LocalCluster

    def killed_at_first(*arguments: Any, **options: Any) -> Any:
        starts.append(1)
        if len(starts) in fatal:
            raise RuntimeError("Nanny failed to start.")
        return start(*arguments, **options)

    monkeypatch.setattr(distributed, "LocalCluster", killed_at_first)
    execution = Execution(workers=1)
    fatal = {1}
    assert run_tasks(abs, [-1, 2], execution=execution, label="number") == [1, 2]
    assert len(starts) == 2
    fatal = set(range(100))
    with pytest.raises(TaskError, match=r"Cannot start 1 worker processes.*fewer --workers"):
        run_tasks(abs, [-1, 2], execution=execution, label="number")


def test_two_runs_on_one_machine_do_not_compete_for_a_port():
    """Dask's web server would take port 8787, on all addresses, and warn where it is taken."""
    execution = Execution(workers=1)
    with warnings.catch_warnings(), socket.socket() as taken:
        warnings.simplefilter("error")
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # another run may hold it already
            taken.bind(("127.0.0.1", 8787))
            taken.listen()
        assert run_tasks(abs, [-1, 2], execution=execution, label="number") == [1, 2]
