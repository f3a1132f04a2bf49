"""Fine-tuning with several seeds: how much of a figure is chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..execution import ProgressHook
from ..model.device import Device, choose_device
from ..storage import Location, location, write_file
from .config import FinetuneConfig
from .finetune import finetune
from .plan import RunResult
from .ranks import find_ranks, join

__all__ = ["SeedsResult", "finetune_seeds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedsResult:
    """Several runs that differ in their seed: fields chosen, first weights, order."""

    path: Location
    runs: tuple[RunResult, ...]
    monitor: str
    mean: float | None
    """Mean of the runs' best figures; None where nothing was judged."""
    deviation: float | None
    """Standard deviation between the runs (n - 1); None for one run."""


def finetune_seeds(
    cube: str | Path,
    out: str | Location,
    config: FinetuneConfig,
    *,
    seeds: int,
    device: Device = "auto",
    workers: int = 2,
    overwrite: bool = False,
    save_every: float = 10.0,
    trackers: Sequence[str] = (),
    progress: ProgressHook | None = None,
    on_result: Callable[[RunResult], None] | None = None,
    work: str | Path | None = None,
) -> SeedsResult:
    """Fine-tune with several seeds, into ``out/seed-0``, ``out/seed-1`` and so on.

    The split stays; the choice of few fields, the first weights and the order differ. Writes
    ``out/summary.json``. Called again, it goes on where it stopped.

    Parameters
    ----------
    seeds
        Number of runs; their seeds count up from that of ``config``.
    on_result
        Told each run's result as it ends.
    work
        For runs in a bucket: the folder below which they are written.
    """
    if seeds < 1:
        raise InputError(
            f"Cannot train with --seeds {seeds}: it must be 1 or more. Use for example --seeds 5."
        )
    out = location(out)
    results = []
    ranks = find_ranks()
    with join(ranks, device=choose_device(device)):
        for place in range(seeds):
            one = config.model_copy(update={"seed": config.seed + place})
            result = finetune(
                cube,
                out / f"seed-{one.seed}",
                one,
                device=device,
                workers=workers,
                overwrite=overwrite,
                save_every=save_every,
                trackers=trackers,
                progress=None if progress is None else _within(progress, place, seeds),
                work=work,
            )
            results.append(result)
            if on_result is not None:
                on_result(result)
    best = [result.best for result in results if result.best is not None]
    summary = SeedsResult(
        path=out,
        runs=tuple(results),
        monitor=results[0].monitor,
        mean=float(np.mean(best)) if best else None,
        deviation=float(np.std(best, ddof=1)) if len(best) > 1 else None,
    )
    if ranks.first:
        _write_summary(summary)
    return summary


def _within(progress: ProgressHook, place: int, seeds: int) -> ProgressHook:
    """Count the steps of one run among those of all."""

    def advance(done: int, total: int, what: str) -> None:
        progress(place * total + done, seeds * total, f"seed {place + 1} of {seeds}, {what}")

    return advance


def _write_summary(summary: SeedsResult) -> None:
    told = {
        "monitor": summary.monitor,
        "mean": summary.mean,
        "deviation": summary.deviation,
        "runs": [
            {"run": result.path.name, "best": result.best, "best_step": result.best_step}
            for result in summary.runs
        ],
    }
    write_file(summary.path / "summary.json", f"{json.dumps(told, indent=1)}\n".encode())
