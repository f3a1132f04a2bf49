"""``stcln-geo finetune``: train a classifier on few labelled fields."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say


def finetune(
    cube: Annotated[Path, typer.Argument(help="A cube with burnt labels and a split.")],
    out: Annotated[Path, typer.Option(help="The run directory.")],
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint or run to begin from. Default: from scratch."),
    ] = None,
    fields_per_class: Annotated[
        int | None, typer.Option(help="Train on so many fields of each class. Default: all.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Train on this share of each class's training fields.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Train with so many seeds, into OUT/seed-0 and so on; mean and sd."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size of the network: tiny, base or large.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train. Default: 2000.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Instead of steps: passes over the chips.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Chips a step. Default: 8.")] = None,
    chip: Annotated[int | None, typer.Option(help="Side of a chip (pixels). Default: 32.")] = None,
    max_dates: Annotated[
        int | None, typer.Option(help="Dates a chip is thinned to; 0 keeps all. Default: 30.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the fields chosen, weights and order.")
    ] = None,
    season: Annotated[
        str | None, typer.Option(help="Season, by its first day. Default: the only one.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML with options, such as a run's config.toml.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set any option, as loss.label_smoothing=0.1."
        ),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for chips, such as 4GB. Default: 2GB.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads that read.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where --out holds another run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve all, try one batch, say what it takes.")
    ] = False,
) -> None:
    """Fine-tune the network on the training fields of a cube.

    Loss and figures use only the pixels of their split. The weights with the best macro mIoU on
    the validation fields are kept. The same command again goes on where it stopped; a finished
    run is left alone.
    """
    from ..train.config import FinetuneConfig, load_config
    from ..train.finetune import finetune as train
    from ..train.finetune import finetune_seeds, plan_finetune
    from ._training import common_options, say_result

    recipe = load_config(
        FinetuneConfig,
        file=config,
        assignments=assignments or (),
        overrides={
            **common_options(
                preset=preset,
                steps=steps,
                epochs=epochs,
                batch_size=batch_size,
                chip=chip,
                max_dates=max_dates,
                seed=seed,
                season=season,
                memory=memory,
            ),
            "init": str(init) if init is not None else None,
            "labels.fields_per_class": fields_per_class,
            "labels.fraction": fraction,
        },
    )
    if dry_run:
        plan = plan_finetune(cube, recipe, device=device, workers=workers)  # type: ignore[arg-type]
        for line in plan.lines():
            say(line)
        return
    with progress_bar("finetune") as progress:
        if seeds is None:
            result = train(
                cube,
                out,
                recipe,
                device=device,  # type: ignore[arg-type]
                workers=workers,
                overwrite=overwrite,
                progress=progress,
            )
            say_result(result)
            say(f"Next: stcln-geo evaluate {out} {cube}")
            return
        summary = finetune_seeds(
            cube,
            out,
            recipe,
            seeds=seeds,
            device=device,  # type: ignore[arg-type]
            workers=workers,
            overwrite=overwrite,
            progress=progress,
            on_result=say_result,
        )
    if summary.mean is not None:
        deviation = "" if summary.deviation is None else f" (sd {summary.deviation:.4f})"
        say(f"{summary.monitor}, mean of {seeds} seeds: {summary.mean:.4f}{deviation}")
    say(f"Next: stcln-geo evaluate {out} {cube}")
