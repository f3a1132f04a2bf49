"""How far a long call is: a bar where one can be drawn, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from .execution import ProgressHook

__all__ = ["duration_text", "progress_bar"]


def duration_text(seconds: float) -> str:
    """Write a time for people: ``45 s``, ``12 min 05 s``, ``3 h 20 min`` or ``2 d 04 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours:02d} h"


@contextmanager
def progress_bar(label: str) -> Iterator[ProgressHook]:
    """Give a hook for ``progress=`` that shows what is done and what time is left.

    On a terminal, and in a notebook that has ipywidgets, it is a bar; elsewhere a line every few
    seconds. All of it goes to standard error.

    Parameters
    ----------
    label
        What stands before the bar.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    target = Console(stderr=True, highlight=False, soft_wrap=True)
    redraws = target.is_terminal or (target.is_jupyter and find_spec("ipywidgets") is not None)
    if not redraws:
        yield _line_progress(label, target)
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
        before: tuple[int, int] | None = None

        def advance(done: int, total: int, what: str) -> None:
            nonlocal before
            if done > 1 if before is None else _counts_anew(before, done, total):
                # Done by an earlier call, or of another count: no measure of the speed of this one.
                bars.reset(task, completed=done, total=total, what=what)
            bars.update(task, completed=done, total=total, what=what)
            before = (done, total)

        yield advance


def _counts_anew(before: tuple[int, int], done: int, total: int) -> bool:
    """Tell whether something else is counted than before: the next of several runs, a next part."""
    return done < before[0] or total != before[1]


def _line_progress(label: str, target: Console, *, every_s: float = 5.0) -> ProgressHook:
    """Return a hook that prints a line now and then: for logs."""
    started = time.monotonic()
    last = started
    begun: tuple[int, float] | None = None
    before = (0, 0)

    def advance(done: int, total: int, what: str) -> None:
        nonlocal last, begun, before
        now = time.monotonic()
        if begun is None:
            # What an earlier call has done says nothing about the speed of this one.
            begun = (0, started) if done <= 1 else (done, now)
        elif _counts_anew(before, done, total):
            begun = (done, now)
        before = (done, total)
        if now - last < every_s and done != total:
            return
        if done == total and now - started < every_s:
            return
        last = now
        elapsed = now - started
        since, then = begun
        left = ""
        if done > since:
            left = f", eta {duration_text((now - then) / (done - since) * (total - done))}"
        spent = duration_text(elapsed)
        target.print(f"{label}: {done}/{total} {what} ({spent}{left})", markup=False)

    return advance
