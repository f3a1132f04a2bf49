"""``stcln-geo labels``: choose fields to visit; burn, split and draw their labels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say, say_next

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Choose fields to visit; burn their labels into a cube, split and draw them.",
)

Season = Annotated[
    str | None, typer.Option(help="Season of the cube, by its first day. Default: the only one.")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be written; write nothing.")
]


@app.command()
def choose(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="The cube.")],
    parcels: Annotated[
        Path, typer.Argument(metavar="FILE", help="Outlines of fields, in any CRS.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="To write: .gpkg, .parquet or .geoparquet.")
    ],
    count: Annotated[int, typer.Option(metavar="N", help="Fields to visit.")],
    column: Annotated[
        str | None,
        typer.Option(
            help="Column of the crops: fields with a value in it have been visited. Default: "
            "none has, and a column `crop` is added to be filled in."
        ),
    ] = None,
    min_pixels: Annotated[int, typer.Option(help="Pixels that a field to visit has at least.")] = 8,
    seed: Annotated[int, typer.Option(help="Another seed may choose others.")] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png", help="Also draw how green the first 24 groups are."),
    ] = None,
    season: Season = None,
    layer: Annotated[
        str | None, typer.Option(help="Layer of a file with several. Default: the first.")
    ] = None,
    dry_run: DryRun = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, filled in or not.")
    ] = False,
) -> None:
    """Choose which fields to visit, before any label is known.

    Fields are grouped by how green they are through the season, and of each group the most
    typical one is visited. OUT holds all fields: those to visit are numbered in `visit`, the one
    that stands for most others first. Fill in their crops, then run `stcln-geo labels burn`, or
    this again with --column for more visits.
    """
    from ..report.profiles import plot_profiles
    from ..report.visits import VisitSpec, choose_visits

    spec = VisitSpec(count=count, column=column, min_pixels=min_pixels, seed=seed)
    with progress_bar("fields") as progress:
        report = choose_visits(
            cube, parcels, out, spec,
            season=season, layer=layer, overwrite=overwrite, dry_run=dry_run, progress=progress,
        )  # fmt: skip
    for line in report.lines():
        say(line)
    if dry_run:
        say("Nothing was written (--dry-run).")
        return
    if plot is not None:
        say(f"{plot_profiles(report.groups, plot, others='the other groups')}")
    say(f"{out}: fill in {report.column!r} where `visit` has a number")


@app.command()
def burn(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="The cube.")],
    vector: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="Polygons with a crop column: GeoPackage, GeoJSON, GeoParquet..."
        ),
    ],
    column: Annotated[str, typer.Option(help="Column that names the crop.")],
    legend: Annotated[
        Path | None,
        typer.Option(
            help="Classes to keep, as .csv or .json with value, name, color; values of one name "
            "are one class. Default: all values."
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
        say_next("labels", "split", location(cube), season=season)


@app.command()
def split(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="The cube, or a stack with labels.")],
    by: Annotated[
        str | None,
        typer.Option(
            help="field: deal out fields. block: squares of fields, kept together. Of a stack also "
            "site: whole sites; fold: the folds named. Default: field."
        ),
    ] = None,
    train: Annotated[
        str | None, typer.Option(metavar="FOLDS", help="With --by fold: as 1,2,3.")
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|FOLDS",
            help="Share of each class's fields to choose weights by, default 0.2; or folds.",
        ),
    ] = None,
    test: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE|FOLDS",
            help="Share of each class's fields to test on, default 0.3; or folds.",
        ),
    ] = None,
    sites: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Site ids by split, as .json, .toml or .csv: where they go, before all else.",
        ),
    ] = None,
    missing_sites: Annotated[
        str | None,
        typer.Option(
            help="Listed sites that the stack lacks: error, or skip and count. Default: error."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Another seed gives another split. Default: 0.")
    ] = None,
    block: Annotated[
        int | None,
        typer.Option(help="Side of a block (pixels), with --by block. Default: 128."),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Instead: split as a protocol says; see `stcln-geo protocol list`."
        ),
    ] = None,
    season: Season = None,
    dry_run: DryRun = False,
) -> None:
    """Divide the fields among training, validation and test.

    By field or block, each class is divided by itself and has at least one field to train on and
    one to test on. Sites of a stack are dealt out as a whole: at random, by fold or by name.
    Pixels of one field never fall into two splits.
    """
    from ..data.site_split import read_site_lists
    from ..data.split_labels import SplitSpec, split_labels
    from ..errors import InputError
    from ._training import folds_from

    given = {"train": train, "validation": validation, "test": test}
    if protocol is not None:
        others = {
            "by": by, **given, "sites": sites, "missing-sites": missing_sites, "seed": seed,
            "block": block,
        }  # fmt: skip
        _split_by_protocol(cube, protocol, others, season=season, dry_run=dry_run)
        return
    _check_use(given, by=by, listed=sites is not None)
    if block is not None and by != "block":
        raise InputError(
            f"Cannot use --block {block} with --by {by or 'field'}: it is the side of the blocks "
            "of --by block. Add --by block, or leave --block out."
        )
    if missing_sites is not None and sites is None:
        raise InputError(
            f"Cannot use --missing-sites {missing_sites} without --sites: it is about the sites of "
            "that file. Add --sites, or leave --missing-sites out."
        )
    shares = (
        {} if by == "fold" else {name: _share(name, text) for name, text in given.items() if text}
    )
    spec = SplitSpec(
        by=by,  # type: ignore[arg-type]  # refused by name where it is none
        seed=seed or 0,
        block_pixels=128 if block is None else block,
        folds={
            name: folds_from(text, f"--{name}")
            for name, text in given.items()
            if text and by == "fold"
        },
        lists=read_site_lists(sites) if sites is not None else None,
        missing=missing_sites or "error",  # type: ignore[arg-type]
        **shares,
    )
    for line in split_labels(cube, spec, season=season, dry_run=dry_run).lines():
        say(line)
    if dry_run:
        say("Nothing was written (--dry-run).")


@app.command()
def profile(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="The cube, or a stack with labels.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.png", help="Picture to write.")],
    season: Season = None,
    fields_per_class: Annotated[
        int, typer.Option(help="Most fields of a class, chosen at random.")
    ] = 100,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Also write the numbers.")
    ] = None,
) -> None:
    """Draw how green the fields of each class are through the season.

    NDVI of fields, averaged over clear pixels in periods of ten days: median and quartiles of a
    class. Labels of another year, or of another column, show at once.
    """
    from ..data.profiles import field_profiles
    from ..data.source import open_source
    from ..errors import InputError
    from ..report.profiles import plot_profiles, write_profiles

    if fields_per_class < 1:
        raise InputError(
            f"Cannot draw with --fields-per-class {fields_per_class}: it must be 1 or more."
        )
    with progress_bar("profile") as progress:
        found = field_profiles(open_source(cube, season), most=fields_per_class, progress=progress)
    for entry in found.legend.classes:
        own = found.of_class(entry.code)
        peak = own.peak
        said = (
            "never clear"
            if peak is None
            else f"greenest from {found.first[peak]}, NDVI {own.median[peak]:.2f}"
        )
        say(f"  {entry.name}: {own.fields} fields, {said}")
    say(f"{plot_profiles(found, out)}")
    if table is not None:
        say(f"{write_profiles(found, table)}")


def _split_by_protocol(
    cube: Path, name: str, others: Mapping[str, object], *, season: str | None, dry_run: bool
) -> None:
    from ..data.split_labels import split_labels
    from ..errors import InputError
    from ..train.protocol import load_protocol

    also = [f"--{option}" for option, value in others.items() if value is not None]
    if also:
        raise InputError(
            f"Cannot use {', '.join(also)} with --protocol {name}: the protocol says where all "
            "goes. Leave one of them out."
        )
    protocol = load_protocol(name)
    spec = protocol.split_spec(cube, season=season)
    if spec is None:
        say(f"The protocol {protocol.name} leaves the split as it is: nothing was written.")
        return
    chosen = season or protocol.season
    for line in split_labels(cube, spec, season=chosen, dry_run=dry_run).lines():
        say(line)
    if dry_run:
        say("Nothing was written (--dry-run).")


def _check_use(given: dict[str, str | None], *, by: str | None, listed: bool) -> None:
    """Refuse options that would say nothing."""
    from ..errors import InputError

    named = [name for name, text in given.items() if text is not None]
    if by != "fold" and ("train" in named or (listed and named)):
        raise InputError(
            f"Cannot use --{named[0]} {given[named[0]]!r} here: --train is for folds, and with "
            "--sites the file says where sites go. Use --by fold for folds, also besides --sites."
        )


def _share(name: str, text: str) -> float:
    from ..errors import InputError

    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"Cannot use --{name} {text!r}: it must be a share such as 0.3. Folds are named with "
            "--by fold."
        ) from error
