"""``stcln-geo cube``: plan, build, extend, repair, check and look at cubes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._common import execution_from, parse_memory, progress_bar, say, warn
from ._cube_options import (
    AllowHostOption,
    BandsOption,
    BboxOption,
    CatalogOption,
    CloudMarginOption,
    CloudMaskOption,
    CollectionOption,
    CompositeOption,
    CrsOption,
    CubeArgument,
    FailedFractionOption,
    HaloOption,
    MaxCloudOption,
    MemoryOption,
    OffsetOption,
    OnErrorOption,
    OrbitsOption,
    PeriodOption,
    PerZoneOption,
    RegionOption,
    ResamplingOption,
    ResolutionOption,
    SchedulerOption,
    ScratchOption,
    SeasonStartOption,
    ShadowMarginOption,
    TilesOption,
    TimeOption,
    WindowOption,
    WorkersOption,
)
from ._cube_request import (
    error_policy,
    make_region,
    make_selection,
    make_spec,
    plan_by_zone,
)
from .cube_convert import export, rechunk
from .cube_look import info, preview, validate

if TYPE_CHECKING:
    from ..cube.planned import CubePlan
    from ..storage import Location

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Plan, build, extend, repair, check and look at cubes.",
)


@app.command()
def plan(
    catalog: CatalogOption,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT.zarr", help="Ignored: so that build's arguments fit."),
    ] = None,
    collection: CollectionOption = None,
    bbox: BboxOption = None,
    region: RegionOption = None,
    time: TimeOption = None,
    tiles: TilesOption = None,
    orbits: OrbitsOption = None,
    max_cloud: MaxCloudOption = None,
    allow_host: AllowHostOption = None,
    bands: BandsOption = None,
    resolution: ResolutionOption = 10.0,
    crs: CrsOption = "auto",
    per_zone: PerZoneOption = False,
    season_start: SeasonStartOption = "09-01",
    composite: CompositeOption = "none",
    period: PeriodOption = None,
    resampling: ResamplingOption = "bilinear",
    cloud_mask: CloudMaskOption = "scl",
    cloud_margin: CloudMarginOption = 2,
    shadow_margin: ShadowMarginOption = 2,
    offset: OffsetOption = None,
    window: WindowOption = 32,
    halo: HaloOption = 4,
    memory: MemoryOption = "8GB",
    workers: WorkersOption = 0,
) -> None:
    """Print what a build would do, before a pixel is read.

    Grid, dates, gaps, offsets, blocks, reads, bytes and memory.
    """
    from ..cube.request import SearchRequest, plan_request

    execution, budget = execution_from(workers, None), parse_memory(memory)
    spec = make_spec(
        bands=bands, resolution=resolution, crs=crs, season_start=season_start,
        composite=composite, period=period, resampling=resampling, cloud_mask=cloud_mask,
        cloud_margin=cloud_margin, shadow_margin=shadow_margin, offset=offset, window=window,
        halo=halo,
    )  # fmt: skip
    search = SearchRequest(
        catalog=catalog, collection=collection, region=make_region(bbox, region), time=time,
        selection=make_selection(tiles, orbits, max_cloud), allow_hosts=tuple(allow_host or ()),
    )  # fmt: skip
    for made in plan_by_zone(search, spec).values() if per_zone else [plan_request(search, spec)]:
        say(made.describe(memory=budget, workers=execution.workers))


@app.command()
def build(
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="Folder of the cube.")],
    catalog: CatalogOption,
    collection: CollectionOption = None,
    bbox: BboxOption = None,
    region: RegionOption = None,
    time: TimeOption = None,
    tiles: TilesOption = None,
    orbits: OrbitsOption = None,
    max_cloud: MaxCloudOption = None,
    allow_host: AllowHostOption = None,
    bands: BandsOption = None,
    resolution: ResolutionOption = 10.0,
    crs: CrsOption = "auto",
    per_zone: PerZoneOption = False,
    season_start: SeasonStartOption = "09-01",
    composite: CompositeOption = "none",
    period: PeriodOption = None,
    resampling: ResamplingOption = "bilinear",
    cloud_mask: CloudMaskOption = "scl",
    cloud_margin: CloudMarginOption = 2,
    shadow_margin: ShadowMarginOption = 2,
    offset: OffsetOption = None,
    window: WindowOption = 32,
    halo: HaloOption = 4,
    on_error: OnErrorOption = "fail",
    max_failed_fraction: FailedFractionOption = None,
    memory: MemoryOption = "8GB",
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    scratch: ScratchOption = None,
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
    from ..cube.request import SearchRequest, plan_request, request_of
    from ..storage import location

    spec = make_spec(
        bands=bands, resolution=resolution, crs=crs, season_start=season_start,
        composite=composite, period=period, resampling=resampling, cloud_mask=cloud_mask,
        cloud_margin=cloud_margin, shadow_margin=shadow_margin, offset=offset, window=window,
        halo=halo, on_error=on_error, max_failed_fraction=max_failed_fraction,
    )  # fmt: skip
    execution = execution_from(workers, scheduler)
    budget = parse_memory(memory)
    search = SearchRequest(
        catalog=catalog, collection=collection, region=make_region(bbox, region), time=time,
        selection=make_selection(tiles, orbits, max_cloud), allow_hosts=tuple(allow_host or ()),
    )  # fmt: skip

    def choose(path: Location, request: Mapping[str, Any], fresh: CubePlan | None) -> CubePlan:
        """Return the plan of the build that was stopped at a path, or make one."""
        begun = None if overwrite or dry_run else unfinished_plan(path, request)
        if begun is None:
            made = fresh or plan_request(search, spec)
            say(made.describe(memory=budget, workers=workers))
            return made
        say(f"Continuing {path} with the {len(begun.scenes)} scenes it began with.")
        # What to do about broken assets may be decided anew: it is no part of the plan's identity.
        chosen = dataclasses.replace(
            begun.spec, on_error=spec.on_error, max_failed_fraction=spec.max_failed_fraction
        )
        return dataclasses.replace(begun, spec=chosen)

    target = location(out)
    jobs: dict[Location, CubePlan] = {}
    if per_zone:
        for zone, fresh in plan_by_zone(search, spec).items():
            name = f"{target.stem}-{zone.removeprefix('EPSG:')}{target.suffix}"
            path = target.with_name(name)
            jobs[path] = choose(path, fresh.request, fresh)
    else:
        jobs[target] = choose(target, request_of(search, spec), None)
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
                scratch=scratch,
            )
        if report.failures:
            warn(f"{len(report.failures)} assets were left out; see {path / 'ledger.jsonl'}.")
        _warn_of_suspects(report.suspects)
        say(str(report))


@app.command()
def append(
    cube: CubeArgument,
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
    max_failed_fraction: FailedFractionOption = None,
    memory: MemoryOption = "8GB",
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    scratch: ScratchOption = None,
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
            on_error=error_policy(on_error),
            max_failed_fraction=max_failed_fraction,
            execution=execution_from(workers, scheduler),
            memory=parse_memory(memory),
            progress=progress,
            scratch=scratch,
        )
    if report.build is not None and report.build.failures:
        count = len(report.build.failures)
        warn(f"{count} assets were left out; see {report.path / 'ledger.jsonl'}.")
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
    cube: CubeArgument,
    catalog: Annotated[
        str | None,
        typer.Option("--catalog", help="Read the lacking scenes from this catalog instead."),
    ] = None,
    collection: Annotated[
        str | None, typer.Option("--collection", help="Collection id of that catalog.")
    ] = None,
    memory: MemoryOption = "8GB",
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    scratch: ScratchOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the lacking scenes, and read no pixel.")
    ] = False,
) -> None:
    """Read again the scenes that were left out of a cube.

    Only the shards that lack a scene are built again. Exits with 1 if scenes still lack.
    """
    from ..cube.append import stored_plan
    from ..cube.repair import find_left_out, repair_cube
    from ..storage import location

    if dry_run:
        stored_plan(location(cube))
        lines = [str(entry) for entry in find_left_out(cube)]
        say("\n".join(lines) or f"{location(cube)} lacks no scene: nothing to repair.")
        return
    with progress_bar("repair") as progress:
        report = repair_cube(
            cube,
            catalog=catalog,
            collection=collection,
            execution=execution_from(workers, scheduler),
            memory=parse_memory(memory),
            progress=progress,
            scratch=scratch,
        )
    for item, other in report.substitutes.items():
        say(f"{item} is read from {other}")
    say(str(report))
    for entry in report.remaining:
        warn(str(entry))
    if report.remaining:
        raise typer.Exit(1)


for command in (info, validate, preview, export, rechunk):
    app.command()(command)
