"""One training command per run directory, however many processes it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from ..errors import InputError
from ..lock import LockHolder, hold_lock
from ..storage import Location
from .ranks import Ranks

__all__ = ["run_lock"]


@contextmanager
def run_lock(path: Location, ranks: Ranks) -> Iterator[None]:
    """Hold the lock of a run directory, ``RUN.lock`` beside it, in all ranks of a run together.

    Parameters
    ----------
    path
        Where the run is kept; need not exist.
    ranks
        Already joined; the first of them is named as the writer.

    Raises
    ------
    InputError
        In every rank, if another command is writing the run.
    """

    def refusal(holder: LockHolder, lock: Location) -> InputError:
        return InputError(
            f"Cannot train into {path}: process {holder.pid} on {holder.host} has been writing "
            f"this run since {holder.time}. A run has one command at a time. Wait until it has "
            f"ended, stop it, or choose another --out; if it runs no longer, remove {lock}."
        )

    with ExitStack() as stack:
        ranks.on_first(lambda: stack.enter_context(hold_lock(path, refusal=refusal, watched=True)))
        yield
