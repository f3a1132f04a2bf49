"""``stcln-geo polygons``: a finished map as polygons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say


def polygons(
    class_map: Annotated[
        Path, typer.Argument(metavar="MAP", help="A product's folder, or a GeoTIFF of classes.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="To write: .gpkg, .parquet or .geoparquet.")
    ],
    minimum_area: Annotated[
        float,
        typer.Option(metavar="M2", help="Leave out patches smaller than this (square metres)."),
    ] = 0.0,
    legend: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="value,name,color of a GeoTIFF without a legend."),
    ] = None,
) -> None:
    """Write a map as polygons: one for each patch of pixels of a class that share sides.

    Pixels without a label are in no polygon.
    """
    from ..maps.classmap import open_class_map
    from ..maps.polygons import write_polygons

    opened = open_class_map(class_map, legend=legend)
    with progress_bar("polygons") as progress:
        report = write_polygons(opened, out, minimum_area=minimum_area, progress=progress)
    for line in report.lines():
        say(line)
