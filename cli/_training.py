"""What pretrain and finetune share: the reading of common options, the telling of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import parse_memory, say

if TYPE_CHECKING:
    from ..storage import Location
    from ..train.plan import RunResult

__all__ = [
    "OutOption",
    "WorkOption",
    "common_options",
    "folds_from",
    "ranks_planned",
    "say_kept",
    "say_result",
    "trackers_from",
]


OutOption = Annotated[
    Path, typer.Option(help="The run directory, or an address as s3://bucket/runs/x.")
]
WorkOption = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="For a bucket: folder below which it is written. Default: stcln-geo-work.",
    ),
]


def common_options(
    *,
    preset: str | None,
    steps: int | None,
    epochs: float | None,
    batch_size: str | None,
    chip: int | None,
    max_dates: int | None,
    seed: int | None,
    season: str | None,
    memory: str | None,
) -> dict[str, Any]:
    """Return the options that were given, by their dotted keys; None was not given."""
    return {
        "model.preset": preset,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "data.chip": chip,
        "data.max_dates": max_dates,
        "seed": seed,
        "season": season,
        "data.memory_gb": None if memory is None else parse_memory(memory) / 1e9,
    }


def folds_from(text: str, option: str) -> tuple[int, ...]:
    """Read numbers of folds between commas."""
    from ..errors import InputError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"Cannot use {option} {text!r}: it must be numbers of folds, such as 1,2,3."
        ) from error


def ranks_planned(devices: int | None, nodes: int | None) -> int:
    """Return the processes that a run shall have: those started, else those asked for."""
    from ..train.ranks import find_ranks

    started = find_ranks().size
    return started if started > 1 else (devices or 1) * (nodes or 1)


def trackers_from(track: str) -> tuple[str, ...]:
    """Return the names in a comma-separated list; ``none`` is none."""
    names = (name.strip() for name in track.split(","))
    return tuple(name for name in names if name and name != "none")


def say_kept(out: Location, work: Path | None) -> None:
    """Tell where a run for a bucket is written meanwhile."""
    from ..saves import WORK_FOLDER
    from ..storage import S3Path

    if isinstance(out, S3Path):
        say(f"Kept in {out} after each save; written below {work or WORK_FOLDER}")


def say_result(result: RunResult) -> None:
    """Tell where a run ended and how good it is."""
    from ..progress import duration_text

    best = "not judged" if result.best is None else f"{result.monitor} {result.best:.4f}"
    if result.already:
        say(f"{result.path} is finished: {best} at step {result.best_step}. Nothing to do.")
        return
    for note in result.notes:
        say(note)
    early = ", stopped early" if result.stopped_early else ""
    say(
        f"{result.path}: {result.steps} steps in {duration_text(result.seconds)}{early}; {best} at "
        f"step {result.best_step}. Weights: {result.checkpoint}"
    )
