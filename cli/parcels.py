"""``stcln-geo parcels``: what a finished map says about each parcel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import progress_bar, say


def parcels(
    class_map: Annotated[
        Path, typer.Argument(metavar="MAP", help="A product's folder, or a GeoTIFF of classes.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Polygons, in any CRS.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="To write: .gpkg, .parquet or .geoparquet.")
    ],
    layer: Annotated[
        str | None, typer.Option(help="Layer of a file with several. Default: the first.")
    ] = None,
    legend: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="value,name,color of a GeoTIFF without a legend."),
    ] = None,
) -> None:
    """Write what a map says about each parcel.

    Adds to each parcel its majority class, the fraction of each class, the mean confidence, and
    how many pixels had a label. A pixel belongs to the parcels that hold its centre; a parcel
    that holds none takes the pixels it touches and is marked.
    """
    from ..maps.classmap import open_class_map
    from ..maps.parcels import write_parcels

    opened = open_class_map(class_map, legend=legend)
    with progress_bar("parcels") as progress:
        report = write_parcels(opened, file, out, layer=layer, progress=progress)
    for line in report.lines(opened.legend):
        say(line)
