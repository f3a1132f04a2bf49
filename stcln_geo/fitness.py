"""Ask Dask workers whether they can do the work of a run, before they are trusted with it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import TYPE_CHECKING, Any

from .errors import InputError, StclnGeoWarning

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["send_away_unfit", "warn_of_memory"]

_ANSWER_SECONDS = 120.0
"""How long workers are waited for that are asked whether they can do the work."""


def send_away_unfit(client: Client, check: Callable[[], None]) -> None:
    """Ask all workers whether they can do the work, and close those that cannot.

    Parameters
    ----------
    check
        Called in each of them; raises where it cannot.

    Raises
    ------
    InputError
        If none is left.
    """
    answers = _ask(client, check)
    unfit = {name: answer for name, answer in answers.items() if isinstance(answer, Exception)}
    if not unfit:
        return
    named = "; ".join(f"{name}: {_why(error)}" for name, error in sorted(unfit.items())[:3])
    if len(unfit) == len(answers):
        raise InputError(
            f"Cannot run on the Dask workers: none of {len(unfit)} can do the work ({named}). "
            "Start workers with the same version of stcln-geo, that see the same files under the "
            "same paths."
        )
    warnings.warn(
        f"{len(unfit)} of {len(answers)} Dask workers cannot do the work and were sent away "
        f"({named}).",
        StclnGeoWarning,
        stacklevel=2,
    )
    client.retire_workers(list(unfit), close_workers=True)


def _ask(client: Client, check: Callable[[], None]) -> dict[str, Any]:
    """Return what the workers say of themselves; nothing where one of them hangs."""
    answers: futures.Future[dict[str, Any]] = futures.Future()

    def ask() -> None:
        try:
            answers.set_result(client.run(check, on_error="return"))
        except Exception as error:
            answers.set_exception(error)

    # In a thread, as there is no end to how long Dask waits for an answer.
    threading.Thread(target=ask, name="ask-workers", daemon=True).start()
    try:
        return answers.result(_ANSWER_SECONDS)
    except TimeoutError:
        if answers.done():
            raise
    warnings.warn(
        f"Not all Dask workers said within {_ANSWER_SECONDS:g} s whether they can do the work: one "
        "may hang. The run goes on; each worker is asked again before its first task.",
        StclnGeoWarning,
        stacklevel=2,
    )
    return {}


def warn_of_memory(
    workers: Mapping[str, Mapping[str, Any]], memory: Callable[[int], int], label: str
) -> None:
    """Say which workers have less memory than the tasks that they run at once may take."""
    small = {
        name: f"{one['nthreads']} thread{'s' if one['nthreads'] > 1 else ''}, "
        f"{one['memory_limit'] / 1e9:.1f} GB; {memory(one['nthreads']) / 1e9:.1f} GB needed"
        for name, one in workers.items()
        if 0 < one["memory_limit"] < memory(one["nthreads"])
    }
    if not small:
        return
    named = "; ".join(f"{name}: {text}" for name, text in sorted(small.items())[:3])
    warnings.warn(
        f"{len(small)} of {len(workers)} Dask workers have less memory than they may need with one "
        f"{label} for each thread at a time ({named}). Dask stops workers whose memory is full. "
        "Start them with fewer threads (--nthreads), or give a smaller --memory.",
        StclnGeoWarning,
        stacklevel=2,
    )


def _why(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"it has no stcln-geo, or not this version ({error})"
    return str(error)
