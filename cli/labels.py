"""``stcln-geo labels``: burn field labels into a cube and split them by field."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from ._common import say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Burn field labels into a cube and split them by field.",
)

Season = Annotated[
    str | None, typer.Option(help="Season of the cube, by its first day. Default: the only one.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
]


@app.command()
def burn(
    cube: Annotated[Path, typer.Argument(help="The cube.")],
    vector: Annotated[
        Path, typer.Argument(help="Polygons with a crop column: GeoPackage, GeoJSON, GeoParquet...")
    ],
    column: Annotated[str, typer.Option(help="Column that names the crop.")],
    legend: Annotated[
        Path | None,
        typer.Option(
            help="Classes to keep, as .csv or .json with value, name, color. Default: all values."
        ),
    ] = None,
    min_fields: Annotated[
        int, typer.Option(help="Drop classes with fewer fields: they cannot be trained and tested.")
    ] = 3,
    season: Season = None,
    erode: Annotated[int, typer.Option(help="Pixels to take off each field's border.")] = 0,
    all_touched: Annotated[
        bool,
        typer.Option("--all-touched", help="Burn every pixel a field touches, not only centres."),
    ] = False,
    layer: Annotated[
        str | None, typer.Option(help="Layer of a file with several. Default: the first.")
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Burn a vector file of fields into a cube.

    A pixel belongs to the field that holds its centre. Labels that the season had are replaced,
    and with them the split.
    """
    from ..cube.labels import burn_labels
    from ..legend import Legend
    from ..storage import location

    report = burn_labels(
        cube,
        vector,
        column=column,
        season=season,
        legend=Legend.read(legend) if legend is not None else None,
        min_fields=min_fields,
        all_touched=all_touched,
        erode=erode,
        layer=layer,
        dry_run=dry_run,
    )
    for line in report.lines():
        say(line)
    if dry_run:
        say("Nothing was written (--dry-run).")
    else:
        say(f"Next: stcln-geo labels split {location(cube)}")


@app.command()
def split(
    cube: Annotated[Path, typer.Argument(help="The cube.")],
    by: Annotated[
        str, typer.Option(help="field: deal out fields. block: squares of fields, kept together.")
    ] = "field",
    test: Annotated[float, typer.Option(help="Share of each class's fields to test on.")] = 0.3,
    validation: Annotated[
        float, typer.Option(help="Share of each class's fields to choose weights by.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(help="Another seed gives another split.")] = 0,
    block: Annotated[int, typer.Option(help="Side of a block (pixels), with --by block.")] = 128,
    season: Season = None,
    dry_run: DryRun = False,
) -> None:
    """Divide the fields of a cube among training, validation and test.

    Each class is divided by itself and has at least one field to train on and one to test on.
    Pixels of one field never fall into two splits.
    """
    from ..cube.contract import SPLITS
    from ..cube.lock import cube_lock
    from ..cube.store import choose_season, open_season, write_split
    from ..data.split import check_labelled, field_positions, split_fields

    name = choose_season(cube, season)
    with contextlib.nullcontext() if dry_run else cube_lock(cube):
        opened = open_season(cube, name, mode="r" if dry_run else "r+")
        fields, legend = check_labelled(opened)
        chosen = split_fields(
            fields,
            test=test,
            validation=validation,
            seed=seed,
            by=by,  # type: ignore[arg-type]  # split_fields names the choices in its error
            positions=field_positions(opened) if by == "block" else None,
            block_pixels=block,
        )
        if not dry_run:
            write_split(opened, chosen)
    names = [name for name in SPLITS if name != "unused"]
    say(f"{'fields (pixels)':<28}" + "".join(f"{name:>18}" for name in names))
    for entry in legend.classes:
        cells = []
        for name in names:
            mine = (fields.code == entry.code) & (chosen == SPLITS[name])
            cells.append(f"{int(mine.sum())} ({int(fields.pixels[mine].sum())})")
        say(f"{entry.name[:27]:<28}" + "".join(f"{cell:>18}" for cell in cells))
    if dry_run:
        say("Nothing was written (--dry-run).")
