"""``stcln-geo cube``: plan, build, extend, repair, check and look at cubes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ._common import execution_from, parse_memory, progress_bar, say, warn

if TYPE_CHECKING:
    from ..cube.planned import CubePlan
    from ..cube.search import ItemSnapshot
    from ..cube.selection import Selection
    from ..cube.spec import CubeSpec, OnError
    from ..region import Region

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Plan, build, extend, repair, check and look at cubes.",
)

_CatalogOption = Annotated[
    str,
    typer.Option(
        "--catalog",
        help="Where to search: a name (stcln-geo catalogs list), a YAML file, a folder with "
        "catalog.json, or an address.",
    ),
]
_CollectionOption = Annotated[
    str | None,
    typer.Option("--collection", help="Collection id; by default the only one that fits."),
]
_BboxOption = Annotated[
    str | None, typer.Option("--bbox", metavar="W,S,E,N", help="Region in degrees.")
]
_RegionOption = Annotated[
    Path | None,
    typer.Option("--region", help="Region as polygons in a vector file (GeoJSON, GeoPackage)."),
]
_TimeOption = Annotated[
    str | None,
    typer.Option("--time", metavar="START/END", help="Dates, both included, as YYYY-MM-DD."),
]
_BandsOption = Annotated[
    str | None,
    typer.Option("--bands", help="Common names, by commas; by default the ten of 10 and 20 m."),
]
_ResolutionOption = Annotated[float, typer.Option("--resolution", help="Pixel size in metres.")]
_CrsOption = Annotated[
    str, typer.Option("--crs", help="Such as EPSG:32631; auto takes the scenes' or the UTM zone.")
]
_PerZoneOption = Annotated[
    bool,
    typer.Option(
        "--per-zone",
        help="One cube per UTM zone of the region: OUT-32631.zarr, OUT-32632.zarr.",
    ),
]
_SeasonStartOption = Annotated[
    str, typer.Option("--season-start", metavar="MM-DD", help="The day a season begins.")
]
_CompositeOption = Annotated[
    str,
    typer.Option(
        "--composite",
        help="Merge the clear observations of each period by median, medoid or least-cloudy; "
        "none keeps every solar day with a scene.",
    ),
]
_PeriodOption = Annotated[
    str | None,
    typer.Option(
        "--period",
        help="Of a composite: P5D, P10D, P16D (days from the season's first) or P1M (months).",
    ),
]
_ResamplingOption = Annotated[
    str,
    typer.Option("--resampling", help="nearest, bilinear, cubic or average; scl is by nearest."),
]
_CloudMarginOption = Annotated[
    int, typer.Option("--cloud-margin", help="Pixels around clouds that are not clear either.")
]
_ShadowMarginOption = Annotated[
    int, typer.Option("--shadow-margin", help="Pixels around cloud shadows, likewise.")
]
_OffsetOption = Annotated[
    float | None,
    typer.Option("--offset", help="Reflectance to add, in place of what the items declare."),
]
_WindowOption = Annotated[
    int, typer.Option("--window", help="Window of the network the grid is padded for, in pixels.")
]
_HaloOption = Annotated[int, typer.Option("--halo", help="Context pixels per side of a window.")]
_OnErrorOption = Annotated[
    str, typer.Option("--on-error", help="fail, or skip scenes with an asset that cannot be read.")
]
_FailedFractionOption = Annotated[
    float | None,
    typer.Option(
        "--max-failed-fraction",
        help="With --on-error skip: share of a season's scenes that may be left out, 0 to 1.",
    ),
]
_SchedulerOption = Annotated[
    str | None, typer.Option("--scheduler", help="Address of a Dask scheduler (tcp://...).")
]
_CubeArgument = Annotated[Path, typer.Argument(metavar="CUBE", help="Folder of the cube.")]
_MemoryOption = Annotated[
    str, typer.Option("--memory", help="Memory for all workers together, such as 8GB.")
]
_WorkersOption = Annotated[
    int, typer.Option("--workers", help="Local worker processes; 0 works in this process.")
]
_TilesOption = Annotated[
    str | None, typer.Option("--tiles", help="MGRS tiles to take, by commas, such as 31UES.")
]
_OrbitsOption = Annotated[
    str | None, typer.Option("--orbits", help="Relative orbits to take, by commas, such as 51,94.")
]
_MaxCloudOption = Annotated[
    float | None,
    typer.Option("--max-cloud", help="Largest cloud cover of a scene in percent; by default any."),
]
_AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        help="A private host (this machine, its network) that assets may be on; can be repeated.",
    ),
]
_SeasonOption = Annotated[
    str | None, typer.Option("--season", help="Season (YYYY-MM-DD); by default the only one.")
]


@app.command()
def plan(
    catalog: _CatalogOption,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.zarr", help="Ignored: so that build's arguments fit."),
    ] = None,
    collection: _CollectionOption = None,
    bbox: _BboxOption = None,
    region: _RegionOption = None,
    time: _TimeOption = None,
    tiles: _TilesOption = None,
    orbits: _OrbitsOption = None,
    max_cloud: _MaxCloudOption = None,
    allow_host: _AllowHostOption = None,
    bands: _BandsOption = None,
    resolution: _ResolutionOption = 10.0,
    crs: _CrsOption = "auto",
    per_zone: _PerZoneOption = False,
    season_start: _SeasonStartOption = "09-01",
    composite: _CompositeOption = "none",
    period: _PeriodOption = None,
    resampling: _ResamplingOption = "bilinear",
    cloud_margin: _CloudMarginOption = 2,
    shadow_margin: _ShadowMarginOption = 2,
    offset: _OffsetOption = None,
    window: _WindowOption = 32,
    halo: _HaloOption = 4,
    memory: _MemoryOption = "8GB",
    workers: _WorkersOption = 0,
) -> None:
    """Print what a build would do: grid, dates, blocks, reads, bytes; no pixel is read."""
    spec = _spec(
        bands=bands, resolution=resolution, crs=crs, season_start=season_start,
        composite=composite, period=period, resampling=resampling, cloud_margin=cloud_margin,
        shadow_margin=shadow_margin, offset=offset, window=window, halo=halo,
    )  # fmt: skip
    search = _Search(
        catalog=catalog, collection=collection, region=_region(bbox, region), time=time,
        selection=selection_from(tiles, orbits, max_cloud), allow_hosts=tuple(allow_host or ()),
    )  # fmt: skip
    for made in _plan_zones(search, spec).values() if per_zone else [_plan(search, spec)]:
        say(made.describe(memory=parse_memory(memory), workers=workers))


@app.command()
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="Folder of the cube.")],
    catalog: _CatalogOption,
    collection: _CollectionOption = None,
    bbox: _BboxOption = None,
    region: _RegionOption = None,
    time: _TimeOption = None,
    tiles: _TilesOption = None,
    orbits: _OrbitsOption = None,
    max_cloud: _MaxCloudOption = None,
    allow_host: _AllowHostOption = None,
    bands: _BandsOption = None,
    resolution: _ResolutionOption = 10.0,
    crs: _CrsOption = "auto",
    per_zone: _PerZoneOption = False,
    season_start: _SeasonStartOption = "09-01",
    composite: _CompositeOption = "none",
    period: _PeriodOption = None,
    resampling: _ResamplingOption = "bilinear",
    cloud_margin: _CloudMarginOption = 2,
    shadow_margin: _ShadowMarginOption = 2,
    offset: _OffsetOption = None,
    window: _WindowOption = 32,
    halo: _HaloOption = 4,
    on_error: _OnErrorOption = "fail",
    max_failed_fraction: _FailedFractionOption = None,
    memory: _MemoryOption = "8GB",
    workers: _WorkersOption = 0,
    scheduler: _SchedulerOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and read no pixel.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another cube at this path, with labels.")
    ] = False,
) -> None:
    """Build a cube of Sentinel-2 reflectance from a STAC catalog.

    One group per season, one date per solar day. A build that was stopped continues when the same
    command runs again; a finished one has nothing to do.
    """
    from ..cube.build import build_cube, unfinished_plan

    spec = _spec(
        bands=bands, resolution=resolution, crs=crs, season_start=season_start,
        composite=composite, period=period, resampling=resampling, cloud_margin=cloud_margin,
        shadow_margin=shadow_margin, offset=offset, window=window, halo=halo, on_error=on_error,
        max_failed_fraction=max_failed_fraction,
    )  # fmt: skip
    execution = execution_from(workers, scheduler)
    budget = parse_memory(memory)
    search = _Search(
        catalog=catalog, collection=collection, region=_region(bbox, region), time=time,
        selection=selection_from(tiles, orbits, max_cloud), allow_hosts=tuple(allow_host or ()),
    )  # fmt: skip

    def choose(path: Path, request: Mapping[str, Any], fresh: CubePlan | None) -> CubePlan:
        """Return the plan of the build that was stopped at a path, or make one."""
        begun = None if overwrite or dry_run else unfinished_plan(path, request)
        if begun is None:
            made = fresh or _plan(search, spec)
            say(made.describe(memory=budget, workers=workers))
            return made
        say(f"Continuing {path} with the {len(begun.scenes)} scenes it began with.")
        # What to do about broken assets may be decided anew: it is no part of the plan's identity.
        chosen = dataclasses.replace(
            begun.spec, on_error=spec.on_error, max_failed_fraction=spec.max_failed_fraction
        )
        return dataclasses.replace(begun, spec=chosen)

    jobs: dict[Path, CubePlan] = {}
    if per_zone:
        for zone, fresh in _plan_zones(search, spec).items():
            path = out.with_name(f"{out.stem}-{zone.removeprefix('EPSG:')}{out.suffix}")
            jobs[path] = choose(path, fresh.request, fresh)
    else:
        jobs[out] = choose(out, _request(search, spec), None)
    if dry_run:
        return
    for path, made in jobs.items():
        with progress_bar("build") as progress:
            report = build_cube(
                made,
                path,
                execution=execution,
                memory=budget,
                overwrite=overwrite,
                progress=progress,
            )
        if report.failures:
            warn(f"{len(report.failures)} assets were left out; see {path / 'ledger.jsonl'}.")
        _warn_of_suspects(report.suspects)
        say(str(report))


@app.command()
def append(
    cube: _CubeArgument,
    until: Annotated[
        str, typer.Option("--until", metavar="YYYY-MM-DD", help="Last day, included.")
    ],
    catalog: Annotated[
        str | None,
        typer.Option("--catalog", help="In place of the cube's own catalog, if that has moved."),
    ] = None,
    on_error: Annotated[
        str | None,
        typer.Option("--on-error", help="fail or skip; by default as the cube was built."),
    ] = None,
    max_failed_fraction: _FailedFractionOption = None,
    memory: _MemoryOption = "8GB",
    workers: _WorkersOption = 0,
    scheduler: _SchedulerOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what is new, and read no pixel.")
    ] = False,
) -> None:
    """Extend a cube up to a date: repeat its search, add what is new.

    Seasons that were complete are not touched. The current season gets its new dates; only their
    images are read. One that was stopped continues when the same command runs again.
    """
    from ..cube.append import append_cube, plan_append

    if dry_run:
        say(str(plan_append(cube, until, catalog=catalog)))
        return
    with progress_bar("append") as progress:
        report = append_cube(
            cube,
            until,
            catalog=catalog,
            on_error=_on_error(on_error),
            max_failed_fraction=max_failed_fraction,
            execution=execution_from(workers, scheduler),
            memory=parse_memory(memory),
            progress=progress,
        )
    if report.build is not None and report.build.failures:
        count = len(report.build.failures)
        warn(f"{count} assets were left out; see {cube / 'ledger.jsonl'}.")
    if report.build is not None:
        _warn_of_suspects(report.build.suspects)
    say(str(report))


def _warn_of_suspects(suspects: tuple[str, ...]) -> None:
    if suspects:
        warn(
            f"The darkest pixels of {len(suspects)} scenes contradict the offset applied to "
            f"them: {', '.join(suspects[:5])}{' ...' if len(suspects) > 5 else ''}. "
            "Their dates are marked in 'offset_suspect'; no pixel was changed. Compare them with "
            "their neighbours, and correct the catalog's rule or give --offset."
        )


@app.command()
def repair(
    cube: _CubeArgument,
    catalog: Annotated[
        str | None,
        typer.Option("--catalog", help="Read the lacking scenes from this catalog instead."),
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", help="Collection id of that catalog.")
    ] = None,
    memory: _MemoryOption = "8GB",
    workers: _WorkersOption = 0,
    scheduler: _SchedulerOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the lacking scenes, and read no pixel.")
    ] = False,
) -> None:
    """Read again the scenes that were left out of a cube; exits with 1 if some still lack.

    Only the shards that lack a scene are built again.
    """
    from ..cube.append import stored_plan
    from ..cube.repair import find_left_out, repair_cube

    if dry_run:
        stored_plan(cube)
        lines = [str(entry) for entry in find_left_out(cube)]
        say("\n".join(lines) or f"{cube} lacks no scene: nothing to repair.")
        return
    with progress_bar("repair") as progress:
        report = repair_cube(
            cube,
            catalog=catalog,
            collection=collection,
            execution=execution_from(workers, scheduler),
            memory=parse_memory(memory),
            progress=progress,
        )
    for item, other in report.substitutes.items():
        say(f"{item} is read from {other}")
    say(str(report))
    for entry in report.remaining:
        warn(str(entry))
    if report.remaining:
        raise typer.Exit(1)


@app.command()
def info(
    cube: Annotated[Path, typer.Argument(help="Folder of the cube.")],
) -> None:
    """Describe a cube: grid, bands, seasons, dates, labels."""
    from ..cube.audit import suspect_dates
    from ..cube.store import list_seasons, open_season

    for name in list_seasons(cube):
        season = open_season(cube, name)
        height, width = season.shape_yx
        days = season.time.astype("datetime64[D]")
        total = max(len(days) * height * width, 1)
        clear = float(season.coverage[:].sum()) / total
        say(f"Season {name}: {len(days)} dates, {days[0]} to {days[-1]}")
        crs: Any = season.geobox.crs
        code = crs.epsg
        say(
            f"  grid    {f'EPSG:{code}' if code else crs}, {season.resolution:g} m, "
            f"{width} x {height} px; chunks {season.layout.chunk} px, shards "
            f"{season.layout.shard} px"
        )
        say(f"  bands   {', '.join(season.bands)}")
        if season.observations is not None:
            say(f"  dates   {season.attrs['composite']} of each {season.attrs['period']}")
        say(f"  clear   {clear:.1%} of all pixels and dates")
        for key in ("catalog", "collection", "region"):
            if season.attrs.get(key):
                say(f"  {key:7} {season.attrs[key]}")
        suspect = suspect_dates(season)
        if suspect:
            named = f"{', '.join(suspect[:5])}{' ...' if len(suspect) > 5 else ''}"
            say(f"  suspect {len(suspect)} dates whose offset is in doubt: {named}")
        if season.fields is not None and season.legend is not None:
            names = ", ".join(season.legend.names)
            say(f"  labels  {len(season.fields)} fields of {len(season.legend)} classes: {names}")
    for name in sorted(folder.name for folder in cube.glob("*.building")):
        is_whole = (cube / name.removesuffix(".building")).is_dir()
        command = "cube append' or 'cube repair" if is_whole else "cube build"
        warn(f"{name} is unfinished: run the same '{command}' command again.")


@app.command()
def validate(
    cube: Annotated[Path, typer.Argument(help="Folder of the cube.")],
    season: _SeasonOption = None,
) -> None:
    """Check that every season of a cube keeps the cube contract; exits with 1 if one does not."""
    from ..cube.contract import validate_cube
    from ..cube.dataset import open_cube
    from ..cube.store import choose_season, list_seasons

    names = [choose_season(cube, season)] if season is not None else list_seasons(cube)
    if not names:
        choose_season(cube, None)
    broken = False
    for name in names:
        errors, warnings = validate_cube(open_cube(cube, name, mask_and_scale=False))
        for text in warnings:
            warn(f"{name}: {text}")
        for text in errors:
            say(f"{name}: {text}")
        say(f"{name}: {'breaks the contract' if errors else 'keeps the contract'}")
        broken = broken or bool(errors)
    if broken:
        raise typer.Exit(1)


@app.command()
def preview(
    cube: Annotated[Path, typer.Argument(help="Folder of the cube.")],
    out: Annotated[Path, typer.Argument(metavar="OUT.png", help="Picture to write.")],
    season: _SeasonOption = None,
    date: Annotated[
        str | None,
        typer.Option("--date", metavar="YYYY-MM-DD", help="One date; by default a sheet of all."),
    ] = None,
) -> None:
    """Write a picture of a season's dates from the cube's overview; no pixel is decoded."""
    from ..cube.preview import write_preview

    say(f"{write_preview(cube, out, season=season, date=date)}")


def _spec(
    *,
    bands: str | None,
    window: int,
    halo: int,
    cloud_margin: int,
    shadow_margin: int,
    **choices: Any,
) -> CubeSpec:
    from ..cube.clouds import CloudSpec
    from ..cube.spec import CubeSpec
    from ..grid import Lattice

    return CubeSpec(
        bands=tuple(name.strip() for name in bands.split(",")) if bands is not None else None,
        clouds=CloudSpec(cloud_margin=cloud_margin, shadow_margin=shadow_margin),
        lattice=Lattice(window=window, halo=halo),
        **choices,
    )


def _on_error(text: str | None) -> OnError | None:
    """Return the choice; whether it is one is checked where it is used."""
    return cast("OnError | None", text)


def _region(bbox: str | None, file: Path | None) -> Region | None:
    from ..errors import InputError
    from ..region import Region

    if bbox is not None and file is not None:
        raise InputError(
            f"Cannot use --bbox {bbox} and --region {file} together: a cube has one region. "
            "Give one of them."
        )
    if file is not None:
        return Region.from_file(file)
    return Region.from_bbox(bbox) if bbox is not None else None


def selection_from(tiles: str | None, orbits: str | None, max_cloud: float | None) -> Selection:
    """Return the conditions on scenes of --tiles, --orbits and --max-cloud."""
    from ..cube.selection import Selection
    from ..errors import InputError

    try:
        numbers = tuple(int(text) for text in _listed(orbits))
    except ValueError as error:
        raise InputError(
            f"Cannot read the orbits {orbits!r}: they must be whole numbers, by commas. "
            "Write for example --orbits 51,94."
        ) from error
    return Selection(tiles=_listed(tiles), orbits=numbers, max_cloud=max_cloud)


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",")) if text is not None else ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Search:
    """What to search for, as given on the command line."""

    catalog: str
    collection: str | None
    region: Region | None
    time: str | None
    selection: Selection
    allow_hosts: tuple[str, ...]


def _request(search: _Search, spec: CubeSpec) -> dict[str, Any]:
    """Return what was asked for, in a form that two runs can compare and that tells no secret."""
    from ..cube.addresses import redact

    catalog = search.catalog
    policy = {"on_error", "max_failed_fraction"}
    choices = {key: value for key, value in spec.to_json().items() if key not in policy}
    request: dict[str, Any] = {
        "catalog": str(Path(catalog).resolve()) if Path(catalog).exists() else redact(catalog),
        "collection": search.collection,
        "region": search.region.to_json() if search.region is not None else None,
        "time": search.time,
        "spec": choices,
    }
    if not search.selection.is_empty:
        request["selection"] = search.selection.to_json()
    if search.allow_hosts:
        request["allow_hosts"] = sorted(search.allow_hosts)
    return request


def _plan(search: _Search, spec: CubeSpec) -> CubePlan:
    from ..cube.plan import plan_cube

    made = plan_cube(_found(search, spec), search.region, spec)
    return dataclasses.replace(made, request=_request(search, spec))


def _plan_zones(search: _Search, spec: CubeSpec) -> dict[str, CubePlan]:
    from ..cube.plan import plan_zones

    request = _request(search, spec)
    plans = plan_zones(_found(search, spec), search.region, spec)
    return {
        zone: dataclasses.replace(made, request={**request, "zone": zone})
        for zone, made in plans.items()
    }


def _found(search: _Search, spec: CubeSpec) -> ItemSnapshot:
    from ..catalog import load_catalog
    from ..cube.search import DEFAULT_MARGIN, search_items

    return search_items(
        load_catalog(search.catalog).allowing(search.allow_hosts),
        search.collection,
        search.region,
        search.time,
        selection=search.selection,
        margin=max(DEFAULT_MARGIN, spec.margin),
    )
