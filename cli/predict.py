"""``stcln-geo predict``: map a whole region."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import execution_from, parse_memory, progress_bar, say, told, warn
from ._companions import (
    check_companions,
    deliver,
    say_delivered,
    say_place,
    say_time,
    write_companions,
)
from ._cube_options import (
    AllowHostOption,
    BboxOption,
    CloudMarginOption,
    CloudMaskOption,
    CollectionOption,
    CompositeOption,
    CrsOption,
    FailedFractionOption,
    MaxCloudOption,
    OffsetOption,
    OnErrorOption,
    OrbitsOption,
    PeriodOption,
    ResamplingOption,
    ResolutionOption,
    ShadowMarginOption,
    TilesOption,
    TimeOption,
)
from ._predict_source import check_source, plan_source, tell_source

__all__ = ["predict"]


def predict(
    context: typer.Context,
    checkpoint: Annotated[
        Path, typer.Option(help="Fine-tuned network: a run directory or a checkpoint file.")
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the map, or s3://bucket/prefix/map; continues what it holds."),
    ],
    cubes: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="CUBE",
            help="Cube to map, or one for each UTM zone; or give --catalog.",
            show_default=False,
        ),
    ] = None,
    season: Annotated[
        str | None, typer.Option(help="First day of the season; default: the only one.")
    ] = None,
    region: Annotated[
        Path | None,
        typer.Option(help="Vector file: map this region, with a cube only this part of it."),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Side of a unit of work; default 4096, or less."),
    ] = None,
    halo: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Context per side; default: the checkpoint's, or 4."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="PX", help="What the network sees; default: its training chip."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What each worker may use; default 4GiB.")
    ] = None,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Local worker processes; 0: in this process.")
    ] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="A running Dask scheduler.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[
        str, typer.Option(help="auto, float32 or bf16; auto: bf16 where it is faster.")
    ] = "auto",
    min_clear: Annotated[
        int, typer.Option(metavar="N", help="Pixels with fewer clear dates get no class.")
    ] = 3,
    blend: Annotated[
        bool, typer.Option("--blend", help="Blend windows where they overlap, against seams.")
    ] = False,
    smooth: Annotated[
        str | None,
        typer.Option(metavar="METHOD", help="majority or bayesian: smooth the probabilities."),
    ] = None,
    smooth_window: Annotated[
        int | None,
        typer.Option(metavar="PX", help="Side of the neighbourhood, odd; default 7 or less."),
    ] = None,
    smoothness: Annotated[
        float, typer.Option(metavar="X", help="Bayesian: more smooths more.")
    ] = 20.0,
    min_mapping_unit: Annotated[
        float | None,
        typer.Option(metavar="HA", help="Merge smaller patches of a class (hectares)."),
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(metavar="RASTER", help="Map only where it holds a value, as of cropland."),
    ] = None,
    mask_values: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Values that are mapped; default: all but 0 and nodata."),
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", help="Further layers: probabilities, entropy, margin, embeddings."
        ),
    ] = None,
    seam_audit: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Windows labelled again on a shifted lattice; 0: none. Default: 16."
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Windows per batch on a GPU; default: auto.")
    ] = None,
    parcels: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write what the map says about these parcels."),
    ] = None,
    polygons: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Also write the map as polygons: .gpkg or .parquet."),
    ] = None,
    keep_shards: Annotated[
        bool, typer.Option("--keep-shards", help="Keep the shards' files beside the map.")
    ] = False,
    cog_writer: Annotated[
        str,
        typer.Option(
            help="parallel, gdal or auto; auto: parallel where shards are multiples of 4096 px."
        ),
    ] = "auto",
    catalog: Annotated[
        str | None,
        typer.Option(
            "--catalog",
            help="Map directly from a search, without a cube: a name (stcln-geo catalogs list), a "
            "YAML file, a folder with catalog.json, or an address. The options below it are of "
            "that search, and as in cube build.",
        ),
    ] = None,
    collection: CollectionOption = None,
    bbox: BboxOption = None,
    time: TimeOption = None,
    tiles: TilesOption = None,
    orbits: OrbitsOption = None,
    max_cloud: MaxCloudOption = None,
    allow_host: AllowHostOption = None,
    bands: Annotated[
        str | None,
        typer.Option("--bands", help="Common names, by commas; by default the checkpoint's."),
    ] = None,
    resolution: ResolutionOption = 10.0,
    crs: CrsOption = "auto",
    season_start: Annotated[
        str | None,
        typer.Option(
            "--season-start",
            metavar="MM-DD",
            help="The day a season begins; default: the checkpoint's (on the other hemisphere "
            "half a year later), or 09-01.",
        ),
    ] = None,
    composite: CompositeOption = "none",
    period: PeriodOption = None,
    resampling: ResamplingOption = "bilinear",
    cloud_mask: CloudMaskOption = "scl",
    cloud_margin: CloudMarginOption = 2,
    shadow_margin: ShadowMarginOption = 2,
    offset: OffsetOption = None,
    on_error: OnErrorOption = "fail",
    max_failed_fraction: FailedFractionOption = None,
    scratch: Annotated[
        Path | None,
        typer.Option(
            "--scratch",
            metavar="DIR",
            help="Local folder of each worker for pixels on their way; default: temporary files.",
        ),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="For a map in a bucket: folder in which it is made, which all workers see.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, then stop.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace another run's map that is there.")
    ] = False,
) -> None:
    """Map a whole region into cloud-optimized GeoTIFFs, from a cube or directly from a search.

    Writes classes.tif, confidence.tif, qa.tif (why a pixel has no class), observations.tif, a
    STAC item, a quick-look, legends, QGIS styles, report.html and run.json. The map is the same
    for any number of workers and any size of shard. Run the same command again after an
    interruption: finished shards are kept. Given the cubes of several UTM zones, it writes a map
    for each into a folder of its own, VRTs over all of them and a STAC collection.
    """
    from ..cube.store import open_season
    from ..model.checkpoint import read_metadata
    from ..predict.delivery import destination
    from ..predict.planning import plan_prediction
    from ..predict.qa import QA_LEGEND, Quality
    from ..predict.run import run_prediction
    from ..predict.spec import PredictSpec
    from ..predict.zones import find_zone_cubes, plan_zone_maps
    from ..region import Region
    from ._zones import predict_zones

    check_source(cubes, context)
    place = destination(out, work)
    spec = PredictSpec(
        window=window,
        halo=halo,
        min_clear=min_clear,
        blend=blend,
        smooth=smooth,  # type: ignore[arg-type]
        smooth_window=smooth_window,
        smoothness=smoothness,
        min_mapping_unit=min_mapping_unit,
        mask=mask,
        mask_values=None if mask_values is None else _codes(mask_values),
        outputs=() if outputs is None else tuple(part.strip() for part in outputs.split(",")),
        seam_audit=seam_audit,
        shard_size=shard_size,
        device=device,  # type: ignore[arg-type]  # PredictSpec checks the choice
        precision=precision,  # type: ignore[arg-type]
        batch_size=batch_size,
        memory=None if memory is None else parse_memory(memory),
        keep_shards=keep_shards,
        cog_writer=cog_writer,  # type: ignore[arg-type]
    )
    execution = execution_from(workers, scheduler)
    if cubes:
        seasons = [open_season(cube, season) for cube in find_zone_cubes(cubes)]
        wanted = None if region is None else Region.from_file(region)
        if len(seasons) > 1:
            predict_zones(
                plan_zone_maps(
                    seasons, read_metadata(checkpoint), spec, region=wanted,
                    threads=execution.threads_per_task,
                ),
                place, execution=execution, parcels=parcels, polygons=polygons,
                dry_run=dry_run, overwrite=overwrite,
            )  # fmt: skip
            return
        plan = plan_prediction(
            seasons[0], read_metadata(checkpoint), spec,
            region=wanted, threads=execution.threads_per_task,
        )  # fmt: skip
    else:
        if not overwrite:
            place.recall()
        plan = plan_source(
            context.params, read_metadata(checkpoint), spec,
            out=place.folder, region=region, season=season, scratch=scratch, new=overwrite,
            threads=execution.threads_per_task,
        )  # fmt: skip
    say(str(plan))
    say_place(place)
    check_companions(parcels, polygons)
    if dry_run:
        say_time([plan], [place.folder], execution)
        place.leave()
        return
    if place.holds(plan.run_hash, overwrite=overwrite):
        say_delivered(place, parcels=parcels, polygons=polygons)
        return
    for text in plan.warnings:
        warn(text)
    with progress_bar("predict") as progress, told(plan.warnings):
        product = run_prediction(
            plan,
            place.folder,
            execution=execution,
            progress=progress,
            overwrite=overwrite,
        )
    if product.resumed_shards:
        say(f"{product.resumed_shards} of {len(plan.shards)} shards were done before.")
    total = max(product.pixels, 1)
    for entry in plan.legend.classes:
        count = product.histogram.get(entry.code, 0)
        say(f"  {entry.name:24} {count:12,} px {100 * count / total:6.2f} %")
    for name, count in product.quality.items():
        if name != "mapped":
            without = "" if name == QA_LEGEND.names[Quality.MERGED] else " without a class"
            say(f"  {name:24} {count:12,} px{without}")
    seams = product.seam_audit
    if seams is not None:
        say(
            f"  seams: {100 * seams['differ_by_cores']:.2f} % of labels change on a shifted "
            f"lattice, {100 * seams['differ_blended']:.2f} % blended ({seams['pixels']:,} px)"
        )
    say(
        f"{place.where / product.classes.name}: {product.pixels:,} pixels labelled, "
        f"{product.windows:,} windows"
    )
    tell_source(plan, place.folder)
    write_companions(place.folder, plan.legend, parcels=parcels, polygons=polygons)
    deliver(place, plan.run_hash)


def _codes(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``1,2``."""
    from ..errors import InputError

    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(
            f"Cannot use --mask-values {text!r}: it must be whole numbers with commas between "
            "them. Write for example --mask-values 1,2."
        ) from error
