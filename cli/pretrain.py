"""``stcln-geo pretrain``: masked pre-training without labels."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say
from ._training import OutOption, WorkOption


def pretrain(
    context: typer.Context,
    cubes: Annotated[
        list[Path],
        typer.Argument(metavar="CUBE_OR_ARCHIVE...", help="Cubes, stacks and archives, mixed."),
    ],
    out: OutOption,
    init: Annotated[
        Path | None,
        typer.Option(help="Checkpoint or run to go on from. Default: random weights."),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size of the network: tiny, base (default) or large.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps to train. Default: 5000.")] = None,
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
    seed: Annotated[int | None, typer.Option(help="Seed of weights, order and masks.")] = None,
    season: Annotated[
        str | None, typer.Option(help="Season, by its first day. Default: all of each cube.")
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(metavar="FOLDS", help="Only sites of these folds of stacks, as 5 or 1,2,3."),
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only these sites of stacks: a file with an id a line."),
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
        typer.Option("--set", metavar="KEY=VALUE", help="Set any option, as model.layers=2."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for chips, such as 4GB. Default: 2GB.")
    ] = None,
    bad_chunks: Annotated[
        str | None,
        typer.Option(help="Where stored bytes are damaged: fail (default), or skip the chunk."),
    ] = None,
    max_bad_fraction: Annotated[
        float | None,
        typer.Option(help="Share of damaged chunks above which skip fails too. Default: 0.01."),
    ] = None,
    allow_amplification: Annotated[
        bool | None,
        typer.Option(
            "--allow-amplification", help="Read layouts that decode chunks more than 8 times."
        ),
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
    """Pre-train the network on cubes, stacks and archives, without labels.

    Part of the clear observations is hidden, and the network learns to fill them in. The same
    command again goes on where it stopped; a finished run is left alone.
    """
    from ..data.site_choice import read_site_ids
    from ..storage import location
    from ..train.config import PretrainConfig, load_config, to_toml
    from ..train.pretrain import plan_pretrain
    from ..train.pretrain import pretrain as train
    from ..train.protocol import load_protocol
    from ._ranks import is_first_rank, share_out
    from ._training import (
        common_options,
        folds_from,
        ranks_planned,
        say_kept,
        say_result,
        trackers_from,
    )

    recipe = load_config(
        PretrainConfig,
        base=None if protocol is None else load_protocol(protocol).recipe("pretrain"),
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
            "data.bad_chunks": bad_chunks,
            "data.max_bad_fraction": max_bad_fraction,
            "data.allow_amplification": allow_amplification,
            "data.folds": None if fold is None else folds_from(fold, "--fold"),
            "data.sites": None if sites is None else read_site_ids(sites),
        },
    )
    if print_config:
        say(to_toml(recipe).rstrip())
        return
    if dry_run:
        plan = plan_pretrain(
            cubes,
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
    with progress_bar("pretrain") if first else nullcontext() as progress:
        result = train(
            cubes,
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
        say(f"Report: {result.path / 'report.html'}")
