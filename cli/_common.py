"""What all commands share: printing, progress bars, and the reading of common options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from ..execution import Execution, ProgressHook

__all__ = [
    "console",
    "execution_from",
    "parse_memory",
    "progress_bar",
    "say",
    "warn",
]


def console(*, stderr: bool = False) -> Console:
    """Return a console for the current standard output (or error)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Print a line for the user, without interpreting markup."""
    console().print(text, markup=False)


def warn(text: str) -> None:
    """Print a warning on standard error."""
    console(stderr=True).print(f"Warning: {text}", style="yellow", markup=False)


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressHook]:
    """Show a bar with an ETA on a terminal, or a line every few seconds elsewhere."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    target = console(stderr=True)
    if not target.is_terminal:
        yield _line_progress(label)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=target, transient=False) as bars:
        task = bars.add_task(label, total=None, what="")
        told = False

        def advance(done: int, total: int, what: str) -> None:
            nonlocal told
            if not told and done > 1:
                # Done by an earlier call: it says nothing about the speed of this one.
                bars.reset(task, completed=done, total=total, what=what)
            bars.update(task, completed=done, total=total, what=what)
            told = True

        yield advance


def _line_progress(label: str, *, every_s: float = 5.0) -> ProgressHook:
    """Return a hook that prints a line now and then: for logs."""
    import time

    started = time.monotonic()
    last = started
    begun: tuple[int, float] | None = None

    def advance(done: int, total: int, what: str) -> None:
        nonlocal last, begun
        now = time.monotonic()
        if begun is None:
            # What an earlier call has done says nothing about the speed of this one.
            begun = (0, started) if done <= 1 else (done, now)
        if now - last < every_s and done != total:
            return
        if done == total and now - started < every_s:
            return
        last = now
        elapsed = now - started
        since, then = begun
        left = ""
        if done > since:
            left = f", eta {(now - then) / (done - since) * (total - done):.0f} s"
        console(stderr=True).print(
            f"{label}: {done}/{total} {what} ({elapsed:.0f} s{left})", markup=False
        )

    return advance


def execution_from(workers: int, scheduler: str | None, threads: int | None = None) -> Execution:
    """Return where tasks run, from --workers and --scheduler."""
    from ..execution import Execution

    return Execution(workers=workers, scheduler=scheduler, threads=threads)


_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as ``8GB``, ``500MiB`` or ``0.5GB``."""
    from ..errors import InputError

    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    if match is None or match[2].lower() not in _UNITS or float(match[1]) <= 0:
        raise InputError(
            f"Cannot use {text!r} as an amount of memory: it must be a positive number with a "
            "unit. Write for example --memory 8GB."
        )
    return int(float(match[1]) * _UNITS[match[2].lower()])
