"""Keep Dask workers busy: check them, feed them, outlive those that are lost.

The graph is never larger than what the workers can have in hand: the next task is submitted when
one ends, so workers that join late get work and the scheduler stays small. A task whose worker
dies runs again on another. A worker that cannot do the work (another version of the package, a
folder or a checkpoint that it does not see) is sent away before it has touched a task.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from . import __version__
from .errors import (
    BrokenDeviceError,
    InputError,
    StclnGeoError,
    StclnGeoWarning,
    TaskError,
    UnfitWorkerError,
    stops_all,
)
from .fitness import send_away_unfit, warn_of_memory
from .heap import give_back_memory

if TYPE_CHECKING:
    from distributed import Client, Future, LocalCluster

__all__ = ["Assignment", "run_on_dask"]

T = TypeVar("T")
R = TypeVar("R")

_WAITING_PER_WORKER = 1
"""Tasks a worker has at hand beside those it runs, so that it need not ask for the next."""

_LOOK_SECONDS = 1.0
"""How often workers that joined are looked for while all tasks are running."""

_LONELY_SECONDS = 10.0
"""After so long without any worker the user is told."""

_BROKEN_DEVICE_EXIT = 71

_STARTS = 3
"""How often local workers are started, if some are killed meanwhile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What workers do, and what they must fulfil to do it; travels with every task.

    Parameters
    ----------
    function
        A function of a module, so that workers can import it.
    check
        Called once in every worker process before its first task; raises where the worker does
        not see what it needs.
    run
        Name of the run, so that a worker is checked once per run.
    version
        Of the package, in the process that gives the work.
    """

    function: Callable[[Any], Any]
    check: Callable[[], None] | None
    run: str
    version: str = __version__

    def call(self, task: Any) -> Any:
        """Do one task, on a worker."""
        self.check_worker()
        try:
            return self.function(task)
        except BrokenDeviceError:
            # Nothing on this device works any more until the process that broke it is gone. The
            # nanny starts a new worker, and the scheduler gives it the task again.
            os._exit(_BROKEN_DEVICE_EXIT)
        finally:
            give_back_memory()

    def check_worker(self) -> None:
        """Raise unless this process can do the work.

        Raises
        ------
        UnfitWorkerError
            With what it lacks.
        """
        if self.run in _fit:
            return
        if self.version != __version__:
            raise UnfitWorkerError(
                f"it has stcln-geo {__version__}, and the run {self.version}: install the same"
            )
        if self.check is not None:
            try:
                self.check()
            except StclnGeoError as error:
                raise UnfitWorkerError(str(error)) from error
        _fit.add(self.run)


_fit: set[str] = set()
"""Runs that this worker process has been found fit for."""


def run_on_dask(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int,
    scheduler: str | None,
    label: str,
    retries: int,
    check: Callable[[], None] | None,
    memory: Callable[[int], int] | None = None,
) -> Generator[tuple[int, Any], None, None]:
    """Yield the index and the result, or the error, of every task as it ends.

    Parameters
    ----------
    workers
        Local worker processes to start, where no scheduler is given.
    scheduler
        Address of a running scheduler.
    label, retries, check, memory
        As in ``run_tasks``.

    Raises
    ------
    InputError
        If the scheduler does not answer, or no worker of it can do the work.
    TaskError
        If the scheduler is lost.
    """
    with _connect(scheduler, min(workers, len(tasks))) as client:
        assignment = Assignment(function=function, check=check, run=uuid.uuid4().hex)
        feeder = _Feeder(client, assignment, tasks, label, retries, memory)
        try:
            send_away_unfit(client, assignment.check_worker)
            yield from feeder.outcomes()
        except Exception as error:
            if isinstance(error, StclnGeoError) or not _is_lost(client, error):
                raise
            raise feeder.lost_scheduler() from error


class _Feeder:
    """Submits tasks as others end, and keeps account of them."""

    def __init__(
        self,
        client: Client,
        assignment: Assignment,
        tasks: Sequence[Any],
        label: str,
        retries: int,
        memory: Callable[[int], int] | None,
    ) -> None:
        self._client, self._assignment = client, assignment
        self._tasks, self._label = tasks, label
        self._retries, self._memory = retries, memory
        self._seen: set[str] = set()
        self._waiting = deque(range(len(tasks)))
        self._running: dict[Future[Any], int] = {}
        self._suspects: deque[int] = deque()
        self._failed = [0] * len(tasks)

    def outcomes(self) -> Generator[tuple[int, Any], None, None]:
        lonely = 0.0
        try:
            while self._waiting or self._running or self._suspects:
                workers = self._top_up()
                lonely = 0.0 if workers else self._wait_for_workers(lonely)
                for future in self._ended():
                    yield from self._settle(future)
        finally:
            if self._client.status == "running":
                # Where the run ends early, what is still queued is not to be worked on.
                self._client.cancel(list(self._running))

    def _top_up(self) -> int:
        """Submit tasks until all workers are busy; return the number of workers."""
        workers = self._client.scheduler_info(n_workers=-1)["workers"]
        new = {name: one for name, one in workers.items() if name not in self._seen}
        self._seen.update(new)
        if self._memory is not None:
            warn_of_memory(new, self._memory, self._label)
        slots = sum(int(one["nthreads"]) + _WAITING_PER_WORKER for one in workers.values())
        while self._waiting and len(self._running) < slots:
            self._submit(self._waiting.popleft())
        if workers and self._suspects and not self._running:
            self._submit(self._suspects.popleft())
        return len(workers)

    def _submit(self, index: int) -> None:
        future = self._client.submit(
            self._assignment.call,
            self._tasks[index],
            key=f"{self._label}-{self._assignment.run}-{index}-{self._failed[index]}",
            pure=False,
        )
        self._running[future] = index

    def _ended(self) -> list[Future[Any]]:
        """Wait a moment for tasks to end."""
        from distributed import wait

        if not self._running:
            time.sleep(_LOOK_SECONDS)
            return []
        try:
            return list(
                wait(list(self._running), timeout=_LOOK_SECONDS, return_when="FIRST_COMPLETED").done
            )
        except TimeoutError:
            return []

    def _settle(self, future: Future[Any]) -> Iterator[tuple[int, Any]]:
        """Yield what a task came to, unless it is to be tried again."""
        from distributed import KilledWorker

        index = self._running.pop(future)
        error = future.exception()
        if error is None:
            yield index, future.result()
        elif isinstance(error, UnfitWorkerError):
            # The task has not been begun; another worker does it.
            send_away_unfit(self._client, self._assignment.check_worker)
            self._waiting.append(index)
        elif isinstance(error, KilledWorker) and not self._failed[index]:
            # It killed its workers, or only waited behind the one that did: run alone, it shows.
            self._failed[index] += 1
            self._suspects.append(index)
        elif stops_all(error) or self._failed[index] >= self._retries:
            yield index, error
        else:
            self._failed[index] += 1
            self._waiting.append(index)
        future.release()

    def _wait_for_workers(self, lonely: float) -> float:
        """Tell the user once that there is nobody to do the work; return seconds without."""
        if self._client.status != "running":
            raise self.lost_scheduler()
        after = lonely + _LOOK_SECONDS
        if lonely < _LONELY_SECONDS <= after:
            address = self._client.scheduler.address if self._client.scheduler else "?"
            warnings.warn(
                f"The scheduler {address} has no workers: waiting for some. Start them with "
                f"'dask worker {address}'.",
                StclnGeoWarning,
                stacklevel=2,
            )
        return after

    def lost_scheduler(self) -> TaskError:
        """Return what to tell the user."""
        left = len(self._waiting) + len(self._running) + len(self._suspects)
        return TaskError(
            f"Lost the Dask scheduler: about {left} of {len(self._tasks)} {self._label} "
            "tasks were not done. What is finished is kept. Start the scheduler again and "
            "run the same command: it continues from here."
        )


def _is_lost(client: Client, error: Exception) -> bool:
    """Return True where an error says that the scheduler is gone: its tasks are, then, too."""
    from distributed.comm.core import CommClosedError

    return isinstance(error, CancelledError | CommClosedError) or client.status != "running"


@contextlib.contextmanager
def _connect(scheduler: str | None, workers: int) -> Iterator[Client]:
    """Connect to the scheduler given, or start local workers for the time of the run."""
    import dask
    from distributed import Client

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cannot reach the Dask scheduler {scheduler!r}: {error}. Its address "
                "looks like tcp://host:8786. Start it with 'dask scheduler', or use --workers."
            ) from error
        with _quiet(), client:
            yield client
        return
    settings = {
        "distributed.scheduler.work-stealing": False,
        "distributed.worker.daemon": False,
        # Nobody looks at its page, and it keeps more the longer a run lasts.
        "distributed.worker.profile.enabled": False,
        # Dask's default gives freed memory back after every 64 kB: large arrays are then paged in
        # anew each time, which made training steps three times slower.
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            # Each thread has a heap of its own otherwise, and each of them gaps of its own: a
            # worker grew by 60 MB over its first 40 shards.
            "MALLOC_ARENA_MAX": "2",
        },
    }
    with (
        _own_environment(),
        dask.config.set(settings),
        _start_cluster(max(workers, 1)) as cluster,
        Client(cluster) as client,
    ):
        yield client


def _start_cluster(workers: int) -> LocalCluster:
    """Start local workers; where one is killed before it is up, start all of them again."""
    import distributed

    failure: RuntimeError | None = None
    for _ in range(_STARTS):
        try:
            return distributed.LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                processes=True,
                memory_limit=0,
                # No page, but a server for probes all the same: on a port of its own, of this
                # machine alone, so that two runs do not compete for the default one.
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
                silence_logs=40,
            )
        except RuntimeError as error:
            failure = error
    raise TaskError(
        f"Cannot start {workers} worker processes: they ended while starting, {_STARTS} times "
        f"({failure}). Something kills them, such as a lack of memory. Free some or give fewer "
        "--workers, and run the same command again."
    ) from failure


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep distributed from logging tracebacks of a lost scheduler: it is said in one sentence."""
    log = logging.getLogger("distributed.client")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


@contextlib.contextmanager
def _own_environment() -> Iterator[None]:
    """Undo what Dask sets in this process's environment for the sake of its workers."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        for name, value in before.items():
            if os.environ.get(name) != value:
                os.environ[name] = value
