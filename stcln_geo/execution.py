"""Run many idempotent tasks: in this process, on local Dask workers, or on a Dask cluster.

A task is a small picklable value; the function that runs it opens what it needs itself and
returns about a kilobyte. How Dask workers are fed and watched is the business of ``workers``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .errors import BrokenDeviceError, InputError, TaskError, stops_all

__all__ = ["Execution", "FailedTask", "ProgressHook", "available_cores", "run_tasks"]

T = TypeVar("T")
R = TypeVar("R")

ProgressHook = Callable[[int, int, str], None]
"""Called with the tasks done, the tasks in all, and what is being done."""


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

    @property
    def threads_per_task(self) -> int:
        """As ``threads_per_worker``; 1 by default for a scheduler's workers.

        These run as many tasks at once as they have threads.
        """
        if self.scheduler is not None and self.threads is None:
            return 1
        return self.threads_per_worker


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
    check: Callable[[], None] | None = None,
    failed: list[FailedTask] | None = None,
    memory: Callable[[int], int] | None = None,
) -> list[R]:
    """Run ``function`` on every task and return the results in order of the tasks.

    Parameters
    ----------
    function
        A function of a module, so that workers can import it.
    tasks
        What it is called with; ``str`` of one names it for people.
    label
        What a task is called in progress and errors, in the singular: "block", "shard".
    retries
        How often a failed task is tried again, after the others. Errors that every task would
        meet (a ``StclnGeoError``, unless it is ``of_one_task``) are not retried.
    check
        Called once in every process that runs tasks, before its first; raises a ``StclnGeoError``
        where something is missing there. Dask workers that fail it are sent away.
    failed
        Where given, tasks that fail for good are put here, and the results are those of the
        others; else they raise.
    memory
        Gives what a worker may hold (bytes) that runs so many tasks at once. Where that is more
        than Dask workers have, a `StclnGeoWarning` says so: they would be killed.

    Raises
    ------
    StclnGeoError
        The first error that every task would meet, as it was raised.
    TaskError
        If tasks failed otherwise; all other tasks have finished then.
    """
    results: dict[int, R] = {}
    failures: dict[int, BaseException] = {}
    if not tasks:
        return []
    if progress is not None:
        progress(0, len(tasks), label)
    if execution.workers == 0 and execution.scheduler is None:
        runner = _run_here(function, tasks, retries=retries, check=check)
    else:
        from .workers import run_on_dask

        runner = run_on_dask(
            function, tasks, workers=execution.workers, scheduler=execution.scheduler,
            label=label, retries=retries, check=check, memory=memory,
        )  # fmt: skip
    with contextlib.closing(runner) as outcomes:
        for index, outcome in outcomes:
            if isinstance(outcome, BaseException):
                if stops_all(outcome):
                    raise outcome
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
        named = ", ".join(str(tasks[key]) for key in sorted(failures)[:5])
        raise TaskError(
            f"{len(failures)} of {len(tasks)} {label} tasks failed after {retries + 1} attempts "
            f"(the others are done). The first error was {type(error).__name__}: {error}. Failed: "
            f"{named}. Remove the cause and run the same command again: it continues from here."
        ) from error
    return [results[index] for index in range(len(tasks))]


def _run_here(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    retries: int,
    check: Callable[[], None] | None,
) -> Generator[tuple[int, Any], None, None]:
    if check is not None:
        check()
    for index, task in enumerate(tasks):
        for attempt in range(retries + 1):
            try:
                outcome: Any = function(task)
            except BrokenDeviceError as error:
                # It fails until this process ends: to go on would only set all the rest aside.
                outcome = _broken_device(error)
            except Exception as error:
                outcome = error
                if attempt < retries and not stops_all(error):
                    continue
            break
        yield index, outcome


def _broken_device(error: BrokenDeviceError) -> TaskError:
    return TaskError(
        f"The device stopped working: {error}. A process cannot use it again after that. What is "
        "finished is kept: run the same command again, and it continues from here. If it happens "
        "often, look for the cause in the driver's log, or choose --device cpu."
    )
