"""Score the runs of a folder of seeds, and say how much of a figure is chance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..execution import ProgressHook
from ..model.device import Device
from ..storage import Location, location, write_file
from .evaluate import evaluate_run
from .evaluation import Evaluation, SplitName
from .protocol import Protocol
from .run_directory import is_finished

__all__ = ["evaluate_seeds", "finished_runs_of", "runs_of"]


def runs_of(path: str | Location) -> list[Location]:
    """Return the runs of a folder of seeds, in order of the seeds; else the path itself."""
    folder = location(path)
    seeds = [child for child in folder.glob("seed-*") if (child / "run.json").is_file()]
    return sorted(seeds, key=lambda run: int(run.name.partition("-")[2])) or [folder]


def finished_runs_of(path: str | Location) -> list[Location]:
    """Return the finished runs of a folder of seeds, in order of the seeds; else the path itself.

    Raises
    ------
    InputError
        If no run is finished.
    """
    runs = runs_of(path)
    if runs == [location(path)]:
        return runs
    finished = [run for run in runs if is_finished(run)]
    if not finished:
        raise InputError(
            f"Cannot use the seeds of {path}: none of its {len(runs)} runs is finished, and only "
            "finished ones count. Run the same `stcln-geo finetune` again: it goes on where it "
            "stopped. Or use one of the runs by itself."
        )
    return finished


def evaluate_seeds(
    path: str | Location,
    cube: str | Path,
    *,
    season: str | None = None,
    split: SplitName = "test",
    device: Device = "auto",
    workers: int = 2,
    progress: ProgressHook | None = None,
    on_result: Callable[[Evaluation], None] | None = None,
    protocol: Protocol | None = None,
    forest: bool = False,
) -> dict[str, Any]:
    """Evaluate each run of a folder of seeds; return the mean and deviation of each figure.

    Runs that are not finished are left out, and named. With ``forest`` each is compared with a
    random forest on its own fields, and the differences are told under ``network_less_forest``:
    runs of a seed are a pair. Writes ``evaluation-<split>.json`` into the
    folder, with a protocol ``evaluation-<split>-<protocol>.json``, whose figures by a published
    rule are apart, under ``published``; on another cube or season the name ends with theirs, as
    the names of the runs' own folders do.

    Raises
    ------
    InputError
        If no run is finished.
    """
    folder = location(path)
    runs = runs_of(folder)
    finished = finished_runs_of(folder)
    evaluations = []
    for run in finished:
        evaluation = evaluate_run(
            run,
            cube,
            season=season,
            split=split,
            device=device,
            workers=workers,
            progress=progress,
            protocol=protocol,
            forest=forest,
        )
        evaluations.append(evaluation)
        if on_result is not None:
            on_result(evaluation)
    figures = [evaluation.figures() for evaluation in evaluations]
    first = evaluations[0]
    left_out = [run.name for run in runs if run not in finished]
    note = first.note
    if left_out:
        note += f" Left out, as they are not finished: {', '.join(left_out)}."
    told: dict[str, Any] = {
        "split": split, "cube": str(first.cube), "season": first.season, "runs": [], "note": note
    }  # fmt: skip
    told |= _over_runs(figures)
    published = [one.published for one in evaluations if one.published is not None]
    pairs = [(one.metrics, one.baseline) for one in evaluations if one.baseline is not None]
    if pairs:
        told["forest"] = _over_runs([baseline.metrics.summary() for _, baseline in pairs])
        apart = [baseline.differences(metrics) for metrics, baseline in pairs]
        told["network_less_forest"] = _over_runs(apart)
    if protocol is not None:
        told["protocol"] = protocol.name
    if published:
        summaries = [one.summary() for one in published]
        told["published"] = {"rule": published[0].rule, **_over_runs(summaries)}
    told["runs"] = [
        {"checkpoint": str(evaluation.checkpoint), **figure}
        for evaluation, figure in zip(evaluations, figures, strict=True)
    ]
    name = f"evaluation-{split}" if first.folder is None else first.folder.name
    write_file(folder / f"{name}.json", f"{json.dumps(told, indent=1)}\n".encode())
    return told


def _over_runs(figures: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Return the mean of each figure over runs, and its deviation (n - 1)."""
    told = {}
    for name in figures[0]:
        known = [value for figure in figures if (value := figure[name]) is not None]
        told[name] = {
            "mean": float(np.mean(known)) if known else None,
            "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None,
        }
    return told
