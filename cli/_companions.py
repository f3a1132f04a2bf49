"""What ``predict`` writes beside a map when asked: a table of parcels, and polygons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._common import say

if TYPE_CHECKING:
    from ..legend import Legend

__all__ = ["check_companions", "write_companions"]


def check_companions(parcels: Path | None, polygons: Path | None) -> None:
    """Raise for mistakes that are better known before the map is made."""
    from ..maps import check_target, read_parcels

    if parcels is not None:
        read_parcels(parcels)
    if polygons is not None:
        check_target(polygons)


def write_companions(
    out: Path, legend: Legend, *, parcels: Path | None, polygons: Path | None
) -> None:
    """Write what was asked for from the product in a folder, and say what it holds."""
    from ..maps import write_parcels, write_polygons

    if parcels is not None:
        suffix = ".parquet" if parcels.suffix in (".parquet", ".geoparquet") else ".gpkg"
        table = write_parcels(out, parcels, out / f"parcels{suffix}")
        for line in table.lines(legend):
            say(line)
    if polygons is not None:
        for line in write_polygons(out, polygons).lines():
            say(line)
