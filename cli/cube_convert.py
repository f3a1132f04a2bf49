"""``stcln-geo cube export`` and ``rechunk``: a cube in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from ._common import progress_bar, say
from ._cube_options import CubeArgument, SeasonOption

__all__ = ["export"]


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
    """Write a season as cloud-optimized GeoTIFFs, one per date, for GDAL and QGIS.

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
