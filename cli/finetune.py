"""``stcln-geo finetune``: train a classifier on few labelled fields."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say, say_next
from ._training import OutOption, WorkOption


def finetune(
    context: typer.Context,
    cube: Annotated[
        Path, typer.Argument(metavar="CUBE", help="A cube or stack with labels and a split.")
    ],
    out: OutOption,
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
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS", help="Leave out a class, by name, value or code; may be repeated."
        ),
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
    batch_size: Annotated[
        str | None,
        typer.Option(help="Chips at a time on each device, or auto: as many as fit. Default: 8."),
    ] = None,
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
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Begin from the settings of a protocol; see `stcln-geo protocol list`.",
        ),
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
    devices: Annotated[
        int | None, typer.Option(help="GPUs of this machine (processes, on a CPU). Default: 1.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option(help="Machines, where torchrun or srun starts the command.")
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(help="Minutes between saves; each validation saves too. 0: each step."),
    ] = 10.0,
    track: Annotated[
        str, typer.Option(help="Where figures also go: tensorboard, wandb, mlflow, or none.")
    ] = "tensorboard",
    work: WorkOption = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin anew where --out holds another run.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Resolve all, try one step, say what it takes.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the options as TOML, and do no more.")
    ] = False,
) -> None:
    """Fine-tune the network on the training fields of a cube or stack.

    Loss and figures use only the pixels of their split. The weights with the best macro mIoU on
    the validation fields are kept. The same command again goes on where it stopped; a finished
    run is left alone.
    """
    from ..storage import location
    from ..train.config import FinetuneConfig, load_config, to_toml
    from ..train.finetune import finetune as train
    from ..train.finetune import plan_finetune
    from ..train.protocol import load_protocol
    from ..train.seeds import finetune_seeds
    from ._ranks import is_first_rank, share_out
    from ._training import common_options, ranks_planned, say_kept, say_result, trackers_from

    recipe = load_config(
        FinetuneConfig,
        base=None if protocol is None else load_protocol(protocol).recipe("finetune"),
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
            "init": str(location(init)) if init is not None else None,
            "labels.fields_per_class": fields_per_class,
            "labels.fraction": fraction,
            "labels.ignore": ignore or None,
        },
    )
    if print_config:
        say(to_toml(recipe).rstrip())
        return
    if dry_run:
        plan = plan_finetune(
            cube,
            recipe,
            device=device,  # type: ignore[arg-type]  # refused by name below if it is none
            workers=workers,
            ranks=ranks_planned(devices, nodes),
        )
        for line in plan.lines():
            say(line)
        return
    code = share_out(context.obj, devices=devices, nodes=nodes, device=device)
    if code is not None:
        raise typer.Exit(code)
    first = is_first_rank()
    kept = location(out)
    if first:
        say_kept(kept, work)
    with progress_bar("finetune") if first else nullcontext() as progress:
        if seeds is None:
            result = train(
                cube,
                kept,
                recipe,
                device=device,  # type: ignore[arg-type]
                workers=workers,
                overwrite=overwrite,
                save_every=save_every,
                trackers=trackers_from(track),
                progress=progress,
                work=work,
            )
            if first:
                say_result(result)
                say_next("evaluate", kept, location(cube), season=recipe.season)
            return
        summary = finetune_seeds(
            cube,
            kept,
            recipe,
            seeds=seeds,
            device=device,  # type: ignore[arg-type]
            workers=workers,
            overwrite=overwrite,
            save_every=save_every,
            trackers=trackers_from(track),
            progress=progress,
            on_result=say_result if first else None,
            work=work,
        )
    if not first:
        return
    if summary.mean is not None:
        deviation = "" if summary.deviation is None else f" (sd {summary.deviation:.4f})"
        say(f"{summary.monitor}, mean of {seeds} seeds: {summary.mean:.4f}{deviation}")
    say_next("evaluate", kept, location(cube), season=recipe.season)
