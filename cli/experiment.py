"""``stcln-geo experiment``: run the paper's experiments, with several seeds and intervals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ._common import check_baseline, progress_bar, say


def experiment(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="few-labels, mask-ratio, mask-strategy, sta, short-series, early-season, "
            "cross-year or protocol.",
        ),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help="A cube or stack with labels and a split (protocol: it splits by itself); may be "
            "repeated."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder of runs, tables and report, or an address s3://bucket/prefix."),
    ],
    pretrain_data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Cube, stack or archive to pre-train on; may be repeated. Default: --data; of "
            "protocol none."
        ),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="protocol: which one, all its rounds or one as pastis-official:fold-1; see "
            "`stcln-geo protocol list`.",
        ),
    ] = None,
    season: Annotated[
        str | None, typer.Option(help="Labelled season, by its first day. Default: the only one.")
    ] = None,
    pretrain_season: Annotated[
        str | None, typer.Option(help="Season to pre-train on. Default: all of each cube.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(help="Fine-tuning runs of each arm. Default: 5, or as a protocol says."),
    ] = None,
    first_seed: Annotated[int, typer.Option(help="Seed of the first of them.")] = 0,
    pretrain_seeds: Annotated[
        int, typer.Option(help="Pre-trainings of each kind, taken in turn.")
    ] = 1,
    fields: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]",
            help="Training fields of each class; few-labels compares several. Default: all; of "
            "few-labels 1,3,10.",
        ),
    ] = None,
    ratios: Annotated[
        str | None,
        typer.Option(
            metavar="R,R...", help="mask-ratio: shares to hide. Default: 0.15,0.2,0.4,0.6,0.8."
        ),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME...",
            help="mask-strategy: some of time, space, space-time, block, tube. Default: all.",
        ),
    ] = None,
    months: Annotated[
        str | None,
        typer.Option(
            metavar="N,N...",
            help="early-season: cut-offs, in months after the season's first day. Default: each.",
        ),
    ] = None,
    dates: Annotated[
        str | None,
        typer.Option(
            metavar="LONG,SHORT",
            help="short-series: dates of pre-training, and of fine-tuning. Default: 30,12.",
        ),
    ] = None,
    test_season: Annotated[
        str | None, typer.Option(help="cross-year: season to test on, by its first day.")
    ] = None,
    baseline: Annotated[
        str,
        typer.Option(
            metavar="none|forest",
            help="few-labels, early-season, cross-year: forest also trains a random forest on the "
            "same fields (pip install 'stcln-geo[forest]').",
        ),
    ] = "none",
    preset: Annotated[
        str | None, typer.Option(help="Size of the network: tiny, base or large.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of all runs, for trials. Else set each.")
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="PART.KEY=VALUE",
            help="Set an option of all runs: pretrain.steps=4000, finetune.batch_size=4, or for "
            "both data.chip=16.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Threads that read, of each run.")] = 2,
    jobs: Annotated[int, typer.Option(help="Runs at once, on the same device.")] = 1,
    device: Annotated[
        str,
        typer.Option(
            help="auto, cpu or cuda; with --dry-run also the name of a GPU that is not here, such "
            "as H100."
        ),
    ] = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a step of each kind, say what all of it takes.")
    ] = False,
) -> None:
    """Run an experiment: all arms with all seeds, judged on the test fields, in one table.

    OUT gets table.csv and table.md (means over seeds with deviations and 95 % intervals, and
    differences of paired arms), scores.csv (each run), plots and report.md, and each run its run
    directory. Run the same command again to go on where it stopped; more --seeds add runs.

    `protocol` follows --protocol in all its rounds, and leaves the split of the data as it is. Of
    folds, folds-summed.csv has the figures of their confusion matrices added up, folds-averaged.csv
    the mean of their figures, and table.csv those of each fold.
    """
    from ..experiments import Choices, Settings, plan_experiment, run_experiment
    from ..experiments.write import describe
    from ..storage import location
    from ..train.protocol import load_protocol

    check_baseline(baseline)
    followed = None if protocol is None else load_protocol(protocol)
    if seeds is None:
        seeds = 5 if followed is None else len(followed.seeds)
    named: dict[str, Any] = {
        "fields": _listed("--fields", fields, int),
        "months": _listed("--months", months, int),
        "ratios": _listed("--ratios", ratios, float),
        "strategies": _listed("--strategies", strategies, str),
        "test_season": test_season,
        "protocol": followed,
        "forest": baseline == "forest",
    }
    if dates is not None:
        named["long_dates"], named["short_dates"] = _two("--dates", _listed("--dates", dates, int))
    known = device in ("auto", "cpu", "cuda") or not dry_run
    planned = plan_experiment(
        name,
        Settings(
            data=tuple(data),
            out=location(out),
            pretrain_data=tuple(pretrain_data or ()),
            season=season,
            pretrain_season=pretrain_season,
            seeds=seeds,
            first_seed=first_seed,
            pretrain_seeds=pretrain_seeds,
            preset=preset,
            steps=steps,
            assignments=tuple(assignments or ()),
            device=device if known else "auto",  # type: ignore[arg-type]  # refused by name
            workers=workers,
            jobs=jobs,
        ),
        Choices(**{key: value for key, value in named.items() if value}),
    )
    for line in planned.lines():
        say(line)
    if dry_run:
        for line in planned.cost(named_device=None if known else device).lines():
            say(line)
        return
    with progress_bar(name) as progress:
        result = run_experiment(
            planned,
            progress=progress,
            on_done=lambda step, worked: say(f"{step.out}: {'done' if worked else 'was finished'}"),
        )
    for line in describe(result.tables):
        say(line)
    say(f"Report: {result.report}")


def _listed(option: str, text: str | None, kind: Callable[[str], Any]) -> tuple[Any, ...]:
    """Read values with commas between; nothing where the option was not given."""
    from ..errors import InputError

    if text is None:
        return ()
    try:
        return tuple(kind(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"Cannot use {option} {text!r}: it must be "
            f"{'whole numbers' if kind is int else 'numbers'} with commas between. Write for "
            f"example {option} {'1,3,10' if kind is int else '0.2,0.4'}."
        ) from error


def _two(option: str, values: tuple[Any, ...]) -> tuple[Any, Any]:
    from ..errors import InputError

    if len(values) != 2:
        raise InputError(
            f"Cannot use {option} {','.join(map(str, values))}: it must be two numbers with a "
            f"comma between. Write for example {option} 30,12."
        )
    return values[0], values[1]
