"""Run many idempotent tasks: in this process, on local Dask workers, or on a Dask cluster.

A task is a small picklable value; the function that runs it opens what it needs itself and
returns about a kilobyte. On Dask, about two tasks per worker are in flight at any moment, so
neither the scheduler nor the memory grows with the number of tasks, and workers that join
late get work.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import InputError, StclnGeoError, TaskError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Execution", "FailedTask", "ProgressHook", "available_cores", "run_tasks"]

T = TypeVar("T")
R = TypeVar("R")

ProgressHook = Callable[[int, int, str], None]
"""Called with the tasks done, the tasks in all, and what is being done."""

_IN_FLIGHT_PER_WORKER = 2


def available_cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Execution:
    """Where tasks run.

    Parameters
    ----------
    workers
        Local worker processes; 0 runs the tasks in this process.
    scheduler
        Address of a running Dask scheduler, such as ``tcp://host:8786``; excludes ``workers``.
    threads
        Threads each task may use; by default the cores are shared out among the workers.
    """

    workers: int = 0
    scheduler: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check the combination."""
        if self.workers < 0 or (self.threads is not None and self.threads < 1):
            raise InputError(
                f"Cannot run with workers={self.workers} and threads={self.threads}: workers is 0 "
                "(this process) or more, threads 1 or more. Correct --workers."
            )
        if self.scheduler is not None and self.workers:
            raise InputError(
                f"Cannot use workers={self.workers} and scheduler={self.scheduler!r} together: the "
                "workers of a running scheduler are its own. Give --workers or --scheduler."
            )

    @property
    def threads_per_worker(self) -> int:
        """Threads a task may use."""
        if self.threads is not None:
            return self.threads
        return max(available_cores() // max(self.workers, 1), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedTask:
    """A task that was set aside."""

    index: int
    """Its place among the tasks."""
    error: str
    """Type and words of the last error."""
    attempts: int


def run_tasks(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    execution: Execution,
    label: str,
    progress: ProgressHook | None = None,
    retries: int = 1,
    failed: list[FailedTask] | None = None,
) -> list[R]:
    """Run ``function`` on every task and return the results in order of the tasks.

    Parameters
    ----------
    function
        A function of a module, so that workers can import it.
    label
        What a task is called in progress and errors, in the singular: "block", "shard".
    retries
        How often a failed task is tried again. Errors of the user's making are not retried.
    failed
        Where given, tasks that fail for good are put here, and the results are those of the
        others; else they raise.

    Raises
    ------
    StclnGeoError
        The first error of the user's making, as it was raised.
    TaskError
        If tasks failed otherwise; all other tasks have finished then.
    """
    results: dict[int, R] = {}
    failures: dict[int, BaseException] = {}
    if progress is not None:
        progress(0, len(tasks), label)
    runner = _run_here if execution.workers == 0 and execution.scheduler is None else _run_on_dask
    with contextlib.closing(runner(function, tasks, execution, retries)) as outcomes:
        for index, outcome in outcomes:
            if isinstance(outcome, StclnGeoError):
                raise outcome
            if isinstance(outcome, BaseException):
                failures[index] = outcome
            else:
                results[index] = outcome
            if progress is not None:
                progress(len(results) + len(failures), len(tasks), label)
    if failed is not None:
        failed += [
            FailedTask(index=index, error=f"{type(error).__name__}: {error}", attempts=retries + 1)
            for index, error in sorted(failures.items())
        ]
        return [results[index] for index in sorted(results)]
    if failures:
        index, error = next(iter(sorted(failures.items())))
        named = ", ".join(repr(tasks[key]) for key in sorted(failures)[:5])
        raise TaskError(
            f"{len(failures)} of {len(tasks)} {label} tasks failed after {retries + 1} attempts "
            f"(the others are done). The first error was {type(error).__name__}: {error}. Failed: "
            f"{named}. Remove the cause and run the same command again: it continues from here."
        ) from error
    return [results[index] for index in range(len(tasks))]


def _run_here(
    function: Callable[[T], R], tasks: Sequence[T], execution: Execution, retries: int
) -> Generator[tuple[int, Any], None, None]:
    for index, task in enumerate(tasks):
        for attempt in range(retries + 1):
            try:
                outcome: Any = function(task)
            except StclnGeoError as error:
                outcome = error
            except Exception as error:
                outcome = error
                if attempt < retries:
                    continue
            break
        yield index, outcome


def _run_on_dask(
    function: Callable[[T], R], tasks: Sequence[T], execution: Execution, retries: int
) -> Generator[tuple[int, Any], None, None]:
    from distributed import as_completed

    with _client(execution, len(tasks)) as client:
        waiting = iter(enumerate(tasks))
        indices: dict[Any, int] = {}

        def submit_next() -> Any | None:
            for index, task in waiting:
                future = client.submit(function, task, pure=False, retries=retries)
                indices[future.key] = index
                return future
            return None

        slots = _IN_FLIGHT_PER_WORKER * max(len(client.scheduler_info(n_workers=-1)["workers"]), 1)
        first = [future for _ in range(slots) if (future := submit_next()) is not None]
        running = as_completed(first)
        for future in running:
            index = indices.pop(future.key)
            error = future.exception()
            yield index, error if error is not None else future.result()
            future.release()
            following = submit_next()
            if following is not None:
                running.add(following)


@contextlib.contextmanager
def _client(execution: Execution, tasks: int) -> Iterator[Client]:
    """Connect to the scheduler given, or start local workers for the time of the run."""
    import dask
    from distributed import Client, LocalCluster

    if execution.scheduler is not None:
        try:
            client = Client(execution.scheduler, timeout="10s")
        except (OSError, ValueError) as error:
            raise InputError(
                f"Cannot reach the Dask scheduler {execution.scheduler!r}: {error}. Its address "
                "looks like tcp://host:8786. Start it with 'dask scheduler', or use --workers."
            ) from error
        with client:
            yield client
        return
    settings = {
        "distributed.scheduler.work-stealing": False,
        "distributed.worker.daemon": False,
        # Dask's default gives freed memory back after every 64 kB: large arrays are then paged in
        # anew each time, which made training steps three times slower.
        "distributed.nanny.pre-spawn-environ": {
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        },
    }
    with (
        _own_environment(),
        dask.config.set(settings),
        LocalCluster(
            n_workers=max(min(execution.workers, tasks), 1),
            threads_per_worker=1,
            processes=True,
            memory_limit=0,
            dashboard_address=None,
            silence_logs=40,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


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
