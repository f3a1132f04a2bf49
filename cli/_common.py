"""What all commands share: printing, and the reading of common options."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import typer
    from rich.console import Console

    from ..execution import Execution

__all__ = [
    "ToldToEnd",
    "check_baseline",
    "console",
    "ending_on_signals",
    "execution_from",
    "given_options",
    "parse_memory",
    "progress_bar",
    "say",
    "say_next",
    "told",
    "visible",
    "warn",
]


def console(*, stderr: bool = False) -> Console:
    """Return a console for the current standard output (or error)."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def visible(text: str) -> str:
    """Return a text that no terminal obeys: control characters of others' names are spelt out."""
    return _OBEYED.sub(lambda sign: ascii(sign[0])[1:-1], text)


# All control characters but tab and line feed, and those that turn the direction of writing.
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def say(text: str) -> None:
    """Print a line for the user, without interpreting markup."""
    console().print(visible(text), markup=False)


def say_next(*words: object, season: str | None = None, first: str = "") -> None:
    """Print the command that usually comes next, as a shell takes it."""
    import shlex

    named = () if season is None else ("--season", season)
    say(f"Next: {first}{shlex.join(['stcln-geo', *map(str, words), *named])}")


def warn(text: str) -> None:
    """Print a warning on standard error."""
    console(stderr=True).print(f"Warning: {visible(text)}", style="yellow", markup=False)


@contextmanager
def told(texts: Iterable[str]) -> Iterator[None]:
    """Keep warnings that were printed already from being shown again; others are shown."""
    import warnings

    from ..errors import StclnGeoWarning

    with warnings.catch_warnings():
        for text in texts:
            warnings.filterwarnings("ignore", re.escape(text), StclnGeoWarning)
        yield


class ToldToEnd(KeyboardInterrupt):
    """A signal came to this process alone; Ctrl-C comes to all that the terminal runs."""


@contextmanager
def ending_on_signals() -> Iterator[list[int]]:
    """End as on Ctrl-C on SIGTERM and SIGHUP, so that locks, workers and scratch are given up.

    Gives the list of the signals that came. Signals that are ignored (as by ``nohup``) or taken by
    others stay as they are, and so does all but the main thread.
    """
    import signal
    import threading

    got: list[int] = []

    def end(number: int, _: object) -> None:
        got.append(number)
        raise ToldToEnd

    numbers = (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [one for one in {*numbers} if signal.getsignal(one) is signal.SIG_DFL]
    try:
        for one in taken:
            signal.signal(one, end)
        yield got
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


def execution_from(workers: int, scheduler: str | None, threads: int | None = None) -> Execution:
    """Return where tasks run, from --workers and --scheduler."""
    from ..execution import Execution

    return Execution(workers=workers, scheduler=scheduler, threads=threads)


def given_options(context: typer.Context, names: Iterable[str]) -> list[str]:
    """Return those of some options that stand on the command line, as they are written there."""
    return [
        f"--{name}".replace("_", "-")
        for name in names
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]


_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
          "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}  # fmt: skip
_LEAST = 10_000
"""Nobody gives less than this many bytes of memory: 8 without a unit means gigabytes."""


def check_baseline(name: str) -> None:
    """Refuse what --baseline does not know."""
    from ..errors import InputError

    if name not in ("none", "forest"):
        raise InputError(f"Cannot compare with --baseline {name!r}: it must be none or forest.")


def parse_memory(text: str) -> int:
    """Return the bytes of a size such as ``8GB``, ``500MiB`` or ``8G``; bare numbers are bytes."""
    from ..errors import InputError

    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = "" if match is None else match[2].lower().removesuffix("b") + "b"
    size = 0 if match is None else int(float(match[1]) * _UNITS.get(unit, 0))
    if size < _LEAST:
        raise InputError(
            f"Cannot use {text!r} as an amount of memory: it must be a number with a unit, "
            "since without one it counts bytes. Write for example --memory 8GB."
        )
    return size
