"""``stcln-geo simulate``: write a simulated Sentinel-2 archive."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from ._common import execution_from, progress_bar, say

__all__ = ["simulate"]


def simulate(
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder to write.")],
    size: Annotated[
        str, typer.Option(metavar="WxH", help="Width and height in pixels of 10 m.")
    ] = "301x203",
    dates: Annotated[int, typer.Option(help="Acquisitions per season.")] = 24,
    seasons: Annotated[
        int,
        typer.Option(help="Seasons of twelve months from 1 September, in the south from 1 March."),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    start_year: Annotated[int, typer.Option(help="Year in which the first season starts.")] = 2021,
    field_pixels: Annotated[int, typer.Option(help="Mean size of a field in pixels.")] = 190,
    clouds: Annotated[float, typer.Option(help="Mean share of the sky under cloud.")] = 0.35,
    crs: Annotated[
        str, typer.Option(help="A UTM zone, EPSG:326zz in the north or EPSG:327zz in the south.")
    ] = "EPSG:32631",
    workers: Annotated[int, typer.Option(help="Worker processes; 0 works in this one.")] = 0,
    scheduler: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Dask scheduler to use instead.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be written, and stop.")
    ] = False,
) -> None:
    """Write a simulated Sentinel-2 archive.

    OUT_DIR becomes a static STAC catalog (catalog.json) with one COG per band and date, laid out
    as Earth Search v1 does, with parcels.gpkg, legend.csv and region.geojson beside it. Search it
    with --catalog OUT_DIR/catalog.json --collection simulated-sentinel-2-l2a. Run again after an
    interruption: what is written is kept. Simulated data show that a path works; they say nothing
    about accuracy on real crops.

    In a zone of the south the year of crops, clouds and sun begins half a year earlier, and shadows
    fall to the south: build with --season-start 03-01.
    """
    from ..simulate import SimulationSpec, plan_archive, simulate_archive

    width, height = parse_size(size)
    spec = SimulationSpec(
        width=width,
        height=height,
        dates=dates,
        seasons=seasons,
        seed=seed,
        start_year=start_year,
        field_pixels=field_pixels,
        cloud_fraction=clouds,
        crs=crs,
    )
    say(str(plan_archive(out_dir, spec)))
    if dry_run:
        return
    with progress_bar("Simulating") as progress:
        archive = simulate_archive(
            out_dir, spec, execution=execution_from(workers, scheduler), progress=progress
        )
    say(f"catalog   {archive.catalog}")
    say(f"region    {archive.region}")
    say(f"parcels   {archive.parcels} (column crop_code; legend {archive.legend.name})")
    say(f"time      {archive.time_range}, with --season-start {archive.time_range[5:10]}")


def parse_size(text: str) -> tuple[int, int]:
    """Return width and height from ``WIDTHxHEIGHT``."""
    from ..errors import InputError

    match = re.fullmatch(r"\s*(\d+)\s*[xX]\s*(\d+)\s*", text)
    if match is None:
        raise InputError(
            f"Cannot use --size {text!r}: it must be WIDTHxHEIGHT in pixels of 10 m. "
            "Write for example --size 301x203."
        )
    return int(match[1]), int(match[2])
