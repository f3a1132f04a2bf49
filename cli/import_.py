"""``stcln-geo import``: published sets as stacks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ._common import execution_from, progress_bar, say, warn

if TYPE_CHECKING:
    from ..datasets.plan import ImportPlan
    from ..execution import Execution

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Import published sets as stacks."
)

_Out = Annotated[
    Path, typer.Argument(metavar="OUT.zarr", help="Folder or s3:// address of the stack to write.")
]
_Workers = Annotated[
    int, typer.Option("--workers", help="Local worker processes; 0 works in this process.")
]
_Scheduler = Annotated[
    str | None, typer.Option("--scheduler", help="Address of a Dask scheduler (tcp://...).")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be imported and what is missing.")
]
_Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace seasons imported from other files.")
]


@app.command()
def pastis(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Unzipped folder that holds metadata.geojson."),
    ],
    out: _Out,
    workers: _Workers = 0,
    scheduler: _Scheduler = None,
    dry_run: _DryRun = False,
    overwrite: _Overwrite = False,
) -> None:
    """Import PASTIS, with labels, parcels and folds.

    The stack has one season, from 2018-09-01.

    A run that was stopped continues when the same command runs again; a finished one has nothing
    to do.
    """
    from ..datasets.pastis import plan_pastis
    from ..datasets.run import check_target

    check_target("pastis", out)
    execution = execution_from(workers, scheduler)
    with progress_bar("look") as progress:
        plan = plan_pastis(source, execution=execution, progress=progress)
    _carry_out(plan, out, execution, dry_run=dry_run, overwrite=overwrite)


@app.command()
def mtlcc(
    source: Annotated[
        Path,
        typer.Argument(metavar="SRC", help="Folder that holds data16, data17, or one of them."),
    ],
    out: _Out,
    years: Annotated[
        str | None,
        typer.Option("--years", help="Years to take, by commas, such as 2016; by default all."),
    ] = None,
    workers: _Workers = 0,
    scheduler: _Scheduler = None,
    dry_run: _DryRun = False,
    overwrite: _Overwrite = False,
) -> None:
    """Import MTLCC, from TFRecords or GeoTIFFs, with labels.

    The stack has one season per calendar year.

    A run that was stopped continues when the same command runs again; a finished one has nothing
    to do.
    """
    from ..datasets.mtlcc import plan_mtlcc
    from ..datasets.run import check_target

    check_target("mtlcc", out)
    wanted = _parse_years(years)
    execution = execution_from(workers, scheduler)
    with progress_bar("look") as progress:
        plan = plan_mtlcc(source, years=wanted, execution=execution, progress=progress)
    _carry_out(plan, out, execution, dry_run=dry_run, overwrite=overwrite)


def _parse_years(text: str | None) -> list[int] | None:
    from ..errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and len(part) == 4 for part in parts):
        raise InputError(
            f"Cannot take the years {text!r}: they are four digits each, by commas. Write for "
            "example --years 2016,2017."
        )
    return [int(part) for part in parts]


def _carry_out(
    plan: ImportPlan, out: Path, execution: Execution, *, dry_run: bool, overwrite: bool
) -> None:
    from ..datasets.run import import_dataset

    for season in plan.seasons:
        say(season.describe())
        for finding in season.findings:
            warn(f"{finding}.")
    for note in plan.notes:
        say(note)
    if dry_run:
        say("Dry run: nothing was written.")
        return
    with progress_bar("import") as progress:
        report = import_dataset(
            plan, out, execution=execution, progress=progress, overwrite=overwrite
        )
    say(str(report))
