"""``stcln-geo cube export`` and ``rechunk``: a cube in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from ._common import execution_from, parse_memory, progress_bar, say
from ._cube_options import (
    CubeArgument,
    MemoryOption,
    SchedulerOption,
    SeasonOption,
    WorkersOption,
)

__all__ = ["export", "rechunk"]


def export(
    cube: CubeArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the files.")],
    season: SeasonOption = None,
    bands: Annotated[
        str | None, typer.Option("--bands", help="Bands to write, by commas; by default all.")
    ] = None,
    dates: Annotated[
        str | None,
        typer.Option("--dates", metavar="START/END", help="Dates, both included; by default all."),
    ] = None,
    what: Annotated[
        str,
        typer.Option("--what", help="reflectance, valid, scl or labels; several by commas."),
    ] = "reflectance",
    clear_only: Annotated[
        bool, typer.Option("--clear-only", help="Write no data where the sky is not clear.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that are there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and its size.")
    ] = False,
) -> None:
    """Write a GeoTIFF (COG) per date, for GDAL and QGIS.

    A STAC collection beside them describes the folder. Files that are there are skipped, so an
    export that was stopped continues when the same command runs again.
    """
    from ..export import What, export_cube, plan_export

    kinds = tuple(cast("What", part.strip()) for part in what.split(","))
    chosen = None if bands is None else tuple(part.strip() for part in bands.split(","))
    if dry_run:
        say(
            str(
                plan_export(
                    cube, out, season=season, what=kinds, bands=chosen, dates=dates,
                    clear_only=clear_only, overwrite=overwrite,
                )
            )
        )  # fmt: skip
        return
    with progress_bar("export") as progress:
        report = export_cube(
            cube, out, season=season, what=kinds, bands=chosen, dates=dates,
            clear_only=clear_only, overwrite=overwrite, progress=progress,
        )  # fmt: skip
    say(str(report))


def rechunk(
    cube: CubeArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT.zarr", help="Path of the new cube.")],
    chunk: Annotated[
        int | None,
        typer.Option("--chunk", help="Side of a chunk in pixels, what is decoded at once."),
    ] = None,
    shard: Annotated[
        int | None, typer.Option("--shard", help="Side of a shard in pixels, what is one file.")
    ] = None,
    dates: Annotated[
        int | None,
        typer.Option("--dates-per-chunk", help="By default all: 1 suits looking at single dates."),
    ] = None,
    codec: Annotated[
        str, typer.Option("--codec", help="zstd is smaller, lz4 is faster to read.")
    ] = "zstd",
    memory: MemoryOption = "8GB",
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and its size.")
    ] = False,
) -> None:
    """Copy a cube into other chunks, shards or codec.

    The numbers are the same. Labels and all that append and repair need come along. One that was
    stopped continues when the same command runs again.
    """
    from ..cube.layout import Codec
    from ..cube.rechunk import rechunk_cube
    from ..cube.rechunk_plan import plan_rechunk

    chosen = cast("Codec", codec)
    if dry_run:
        plan = plan_rechunk(cube, out, chunk=chunk, shard=shard, dates=dates, codec=chosen)
        say(str(plan))
        return
    with progress_bar("rechunk") as progress:
        report = rechunk_cube(
            cube,
            out,
            chunk=chunk,
            shard=shard,
            dates=dates,
            codec=chosen,
            execution=execution_from(workers, scheduler),
            memory=parse_memory(memory),
            progress=progress,
        )
    say(str(report))
