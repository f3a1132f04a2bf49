"""``stcln-geo archive``: assemble archives of many sites and seasons, and look after them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from ._common import execution_from, parse_memory, progress_bar, say, warn

if TYPE_CHECKING:
    from ..archive.sample import Allocation
    from ..archive.spec import ArchiveSpec

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Assemble archives of many sites and seasons, and look after them.",
)

_ArchiveArgument = Annotated[
    Path, typer.Argument(metavar="ARCHIVE", help="Folder or s3:// address of the archive.")
]


@app.command()
def create(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder or s3:// address to write.")],
    sites: Annotated[
        Path,
        typer.Option("--sites", help="Points: GeoPackage, GeoJSON, GeoParquet, or CSV (lon, lat)."),
    ],
    seasons: Annotated[
        str,
        typer.Option("--seasons", metavar="YEARS", help="Years when seasons start: 2017..2024."),
    ],
    catalog: Annotated[
        str,
        typer.Option(
            "--catalog",
            help="Where to search: a name (stcln-geo catalogs list), a YAML file, a folder with "
            "catalog.json, or an address.",
        ),
    ],
    size: Annotated[
        int,
        typer.Option(
            "--size",
            help="Side of a site in pixels: rows of stacks up to 512, above it cubes.",
        ),
    ] = 128,
    id_column: Annotated[
        str | None,
        typer.Option("--id-column", help="Column of the site ids; by default id, or numbers."),
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option("--collection", help="Collection id; by default the only one that fits."),
    ] = None,
    tiles: Annotated[
        str | None, typer.Option("--tiles", help="MGRS tiles to take, by commas, such as 31UES.")
    ] = None,
    orbits: Annotated[
        str | None, typer.Option("--orbits", help="Relative orbits to take, by commas.")
    ] = None,
    max_cloud: Annotated[
        float | None,
        typer.Option("--max-cloud", help="Largest cloud cover of a scene in percent."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allow-host",
            help="A private host that assets may be on; can be repeated.",
        ),
    ] = None,
    bands: Annotated[
        str | None,
        typer.Option("--bands", help="Common names, by commas; by default the ten of 10 and 20 m."),
    ] = None,
    resolution: Annotated[float, typer.Option("--resolution", help="Pixel size in metres.")] = 10.0,
    season_start: Annotated[
        str, typer.Option("--season-start", metavar="MM-DD", help="The day a season begins.")
    ] = "09-01",
    composite: Annotated[
        str,
        typer.Option("--composite", help="none, median, medoid or least-cloudy, as of cube build."),
    ] = "none",
    period: Annotated[
        str | None, typer.Option("--period", help="Of a composite: P5D, P10D, P16D or P1M.")
    ] = None,
    on_error: Annotated[
        str,
        typer.Option("--on-error", help="fail, or skip scenes with an asset that cannot be read."),
    ] = "fail",
    max_failed_fraction: Annotated[
        float | None,
        typer.Option(
            "--max-failed-fraction",
            help="With --on-error skip: share of a season's scenes that may be left out, 0 to 1.",
        ),
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="Memory for all workers together, such as 8GB.")
    ] = "8GB",
    workers: Annotated[
        int, typer.Option("--workers", help="Local worker processes; 0 works in this process.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option("--scheduler", help="Address of a Dask scheduler (tcp://...).")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Search, print size and cost, and read no pixel."),
    ] = False,
) -> None:
    """Assemble an archive: a square around each point, in each season.

    One search per MGRS tile and season; what it found is kept. A run that was stopped continues
    when the same command runs again; a finished one has nothing to do.
    """
    from ..archive.create import create_archive
    from ..archive.plan import plan_archive
    from ..archive.sites import read_sites

    spec = _spec(
        catalog=catalog, seasons=seasons, size=size, collection=collection,
        selection=(tiles, orbits, max_cloud), allow_hosts=tuple(allow_host or ()), bands=bands,
        resolution=resolution, season_start=season_start, composite=composite, period=period,
        on_error=on_error, max_failed_fraction=max_failed_fraction,
    )  # fmt: skip
    execution = execution_from(workers, scheduler)
    budget = parse_memory(memory)
    points = read_sites(sites, size=size, resolution=resolution, id_column=id_column)
    with progress_bar("search") as progress:
        made = plan_archive(points, spec, out, progress=progress)
    say(made.describe(workers=workers))
    if dry_run:
        say(f"The searches are kept in {made.path / 'searches'}: the run repeats none of them.")
        return
    with progress_bar("archive") as progress:
        report = create_archive(made, execution=execution, memory=budget, progress=progress)
    if report.failures:
        warn(f"{report.failures} assets were left out; see {report.path / 'ledger.jsonl'}.")
    if report.suspects:
        warn(
            f"The darkest pixels of {len(report.suspects)} scenes contradict the offset applied "
            f"to them: {', '.join(report.suspects[:5])}. Their dates are marked in "
            "'offset_suspect'; no pixel was changed."
        )
    say(str(report))


@app.command()
def sample(
    out: Annotated[Path, typer.Argument(metavar="OUT.gpkg", help="Points to write.")],
    stratify: Annotated[
        Path,
        typer.Option("--stratify", help="Raster of class codes, or polygons."),
    ],
    count: Annotated[int, typer.Option("--count", help="Number of sites.")],
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same sites.")] = 0,
    column: Annotated[
        str | None, typer.Option("--column", help="Of polygons: the attribute to stratify by.")
    ] = None,
    region: Annotated[
        Path | None, typer.Option("--region", help="Polygons in which the sites must lie.")
    ] = None,
    size: Annotated[int, typer.Option("--size", help="Side of a site in pixels.")] = 128,
    resolution: Annotated[float, typer.Option("--resolution", help="Pixel size in metres.")] = 10.0,
    allocation: Annotated[
        str,
        typer.Option("--allocation", help="equal or proportional number of sites per stratum."),
    ] = "equal",
) -> None:
    """Propose sites, spread over land cover or other classes.

    Writes the points and a picture of them. Squares of one UTM zone do not overlap.
    """
    from ..archive.sample import sample_sites
    from ..region import Region

    report = sample_sites(
        stratify,
        out,
        count=count,
        seed=seed,
        column=column,
        region=Region.from_file(region) if region is not None else None,
        size=size,
        resolution=resolution,
        allocation=cast("Allocation", allocation),
    )
    for name, (found, wanted) in report.short.items():
        warn(f"Stratum {name} has room for {found} of {wanted} sites that do not overlap.")
    say(str(report))


@app.command()
def add(
    archive: _ArchiveArgument,
    members: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PATH...", help="Cubes and stacks; none makes the index anew."),
    ] = None,
) -> None:
    """Take existing cubes and stacks into an archive, by reference."""
    from ..archive.members import add_members

    report = add_members(archive, members or [])
    for note in report.notes:
        warn(note)
    say(str(report))


@app.command()
def info(archive: _ArchiveArgument) -> None:
    """Describe an archive, season by season.

    Sites, area, dates, clear fraction, labelled fields and bytes.
    """
    from ..archive.summary import describe_archive

    say(describe_archive(archive))


@app.command()
def validate(archive: _ArchiveArgument) -> None:
    """Check every member and every row of the index.

    Exits with 1 if something is broken.
    """
    from ..archive.validate import validate_archive
    from ..storage import location

    errors, warnings = validate_archive(archive)
    for text in warnings:
        warn(text)
    for text in errors:
        say(text)
    say(f"{location(archive)} {'is broken' if errors else 'is whole'}")
    if errors:
        raise typer.Exit(1)


def _spec(
    *,
    catalog: str,
    seasons: str,
    size: int,
    collection: str | None,
    selection: tuple[str | None, str | None, float | None],
    allow_hosts: tuple[str, ...],
    bands: str | None,
    **choices: object,
) -> ArchiveSpec:
    from typing import Any

    from ..archive.spec import ArchiveSpec, parse_seasons
    from ..cube.spec import CubeSpec
    from ._cube_request import make_selection

    named: dict[str, Any] = dict(choices)
    return ArchiveSpec(
        catalog=catalog,
        years=parse_seasons(seasons),
        size=size,
        collection=collection,
        selection=make_selection(*selection),
        allow_hosts=allow_hosts,
        cube=CubeSpec(
            bands=tuple(name.strip() for name in bands.split(",")) if bands is not None else None,
            **named,
        ),
    )
