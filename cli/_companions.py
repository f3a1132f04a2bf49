"""What ``predict`` does once there is a map: a table of parcels, polygons, the way to a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ._common import progress_bar, say

if TYPE_CHECKING:
    from ..execution import Execution
    from ..legend import Legend
    from ..predict.delivery import Destination
    from ..predict.plan import PredictionPlan

__all__ = ["check_companions", "deliver", "say_delivered", "say_place", "write_companions"]


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


def say_place(place: Destination) -> None:
    """Say where a map for a bucket is made."""
    if place.bucket is not None:
        kept = "removed" if place.own else "kept"
        say(f"Made in {place.folder} ({kept} afterwards), then copied to {place.bucket}.")


def say_time(
    plans: Sequence[PredictionPlan], folders: Sequence[Path], execution: Execution
) -> None:
    """Say how long plans take, each of which makes a map in a folder of its own."""
    from ..predict.estimate import estimate_time

    for plan, folder in zip(plans, folders, strict=True):
        found = estimate_time(plan, execution=execution, out=folder)
        of_one = f" (season {plan.season}, {plan.crs_name})" if len(plans) > 1 else ""
        unknown = "not known before the first shards are done"
        say(f"  time        {found or unknown}{of_one}")


def deliver(place: Destination, run: str) -> None:
    """Bring a finished product into its bucket, if it goes to one, and say so."""
    if place.bucket is None:
        return
    with progress_bar("deliver") as progress:
        place.deliver(run, progress=progress)
    say(f"{place.bucket}: the whole map")


def say_delivered(place: Destination, *, parcels: Path | None, polygons: Path | None) -> None:
    """Say that a bucket has the map already.

    Raises
    ------
    InputError
        If something is to be made from the map, which is no longer here.
    """
    from ..errors import InputError

    asked = [name for name, given in (("--parcels", parcels), ("--polygons", polygons)) if given]
    if asked:
        raise InputError(
            f"Cannot write {' and '.join(asked)} now: the finished map is in {place.bucket}, and "
            "they are made from a map in a folder. Copy it, for example with 'aws s3 sync', and "
            "use 'stcln-geo parcels' or 'stcln-geo polygons', or pass --overwrite --work DIR."
        )
    place.leave()
    say(f"{place.bucket} holds this map already: nothing to do.")
