"""Predict several zones: print the plan, run it, say what came out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ._common import progress_bar, say, told, warn
from ._companions import (
    check_companions,
    deliver,
    say_delivered,
    say_place,
    say_time,
    write_companions,
)

if TYPE_CHECKING:
    from ..execution import Execution
    from ..predict.delivery import Destination
    from ..predict.zones import ZonesPlan

__all__ = ["predict_zones"]


def predict_zones(
    plan: ZonesPlan,
    place: Destination,
    *,
    execution: Execution,
    parcels: Path | None,
    polygons: Path | None,
    dry_run: bool,
    overwrite: bool,
) -> None:
    from ..predict.zones import run_zone_maps

    say(str(plan))
    say_place(place)
    check_companions(parcels, polygons)
    if dry_run:
        folders = [place.folder / zone for zone in plan.plans]
        say_time(list(plan.plans.values()), folders, execution)
        return
    if place.holds(plan.run_hash, overwrite=overwrite):
        say_delivered(place, parcels=parcels, polygons=polygons)
        return
    for text in plan.warnings:
        warn(text)
    with progress_bar("predict") as progress, told(plan.warnings):
        made = run_zone_maps(
            plan, place.folder, execution=execution, progress=progress, overwrite=overwrite
        )
    for zone, product in made.zones.items():
        if product.resumed_shards:
            say(f"{product.resumed_shards} of the shards in EPSG:{zone} were done before.")
    legend = next(iter(plan.plans.values())).legend
    total = max(sum(product.pixels for product in made.zones.values()), 1)
    for entry in legend.classes:
        counts = [product.histogram.get(entry.code, 0) for product in made.zones.values()]
        say(f"  {entry.name:24} {sum(counts):12,} px {100 * sum(counts) / total:6.2f} %")
    for zone, product in made.zones.items():
        say(f"{product.classes}: {product.pixels:,} pixels labelled in EPSG:{zone}")
    say(f"{made.classes}: all zones in EPSG:{plan.main}; {made.collection}: the STAC collection")
    write_companions(place.folder, legend, parcels=parcels, polygons=polygons)
    deliver(place, plan.run_hash)
