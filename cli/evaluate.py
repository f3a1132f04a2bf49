"""``stcln-geo evaluate``: score a fine-tuned network on held-out fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ._common import progress_bar, say


def evaluate(
    run: Annotated[
        Path, typer.Argument(help="Run directory, folder of seeds, or checkpoint file.")
    ],
    cube: Annotated[Path, typer.Argument(help="A cube with the labels and split to score on.")],
    split: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    season: Annotated[
        str | None, typer.Option(help="Season, by its first day. Default: the only one.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    workers: Annotated[int, typer.Option(help="Threads that read.")] = 2,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and count; run no network.")
    ] = False,
) -> None:
    """Score a fine-tuned network on the fields of one split.

    Uses the windows of prediction and counts only the pixels of that split. Writes
    RUN/evaluation-SPLIT/ with metrics.json, confusion.csv and confusion.png.
    """
    import json

    from ..train.evaluate import Evaluation, evaluate_run, evaluate_seeds, plan_evaluation, runs_of
    from ..train.run_directory import write_text

    options: dict[str, Any] = {"season": season, "split": split}
    runs = runs_of(run)
    if dry_run:
        for one in runs:
            for line in plan_evaluation(one, cube, **options).lines():
                say(line)
        return
    options |= {"device": device, "workers": workers}
    several = runs != [run]

    def say_short(evaluation: Evaluation) -> None:
        figures = evaluation.metrics.summary()
        shown = ", ".join(f"{name} {_figure(value)}" for name, value in figures.items())
        say(f"{evaluation.checkpoint.parent.parent.name}: {shown}")

    with progress_bar("evaluate") as progress:
        if several:
            told = evaluate_seeds(run, cube, progress=progress, on_result=say_short, **options)
        else:
            evaluation = evaluate_run(run, cube, progress=progress, **options)
            told = evaluation.to_json()
    if several:
        for name in ("overall_accuracy", "macro_miou", "macro_f1", "kappa"):
            figure = told[name]
            say(f"{name}: mean {_figure(figure['mean'])}, sd {_figure(figure['deviation'])}")
        say(told["note"])
    else:
        for line in evaluation.lines():
            say(line)
    if json_file is not None:
        write_text(json_file, json.dumps(told, indent=1) + "\n")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
