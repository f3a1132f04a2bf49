"""Map a region that lies in several UTM zones: one map per zone, and one mosaic over them.

``cube build --per-zone`` makes a cube for each zone, which reaches a little beyond the zone's line
so that every pixel near it gets a whole window. Here each map takes the pixels that touch what its
zone owns, as `stcln_geo.grid.utm_zone_at` has it. So every place is mapped, and twice only where
it lies in a pixel that the line cuts: the pixels of two zones lie askew there. Each map is a
product of its own, in its zone's CRS, made and resumed like any other. The mosaic shows them in the
CRS of the zone that holds most of the region.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cog import write_mosaic
from ..cube.store import Season, write_json
from ..errors import InputError, OutputError, TaskError
from ..execution import Execution, ProgressHook
from ..grid import utm_zone_bounds, utm_zones
from ..region import Region, footprint
from ..report.beside import remove_accuracy
from .folder import read_json
from .outputs import layers_for
from .plan import PredictionPlan
from .planning import crs_name, plan_prediction
from .qa import QA_LEGEND
from .run import Prediction, run_prediction
from .spec import PredictSpec
from .style import write_legend, write_style
from .windows import PLAN_FILE

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from ..model.checkpoint import CheckpointInfo

__all__ = ["ZoneMaps", "ZonesPlan", "find_zone_cubes", "plan_zone_maps", "run_zone_maps"]

COLLECTION_FILE = "collection.json"
WARPED = "warped"
"""Folder of the VRTs that the mosaic is made of."""

_UTM = re.compile(r"EPSG:32[67](0[1-9]|[1-5][0-9]|60)")
_VRT = "application/x-gdal-vrt"
_BEYOND = 0.01
"""Zones are cut out of a box this much larger than the cube (degrees)."""


@dataclass(frozen=True, kw_only=True)
class ZonesPlan:
    """What will be labelled in each zone."""

    plans: Mapping[str, PredictionPlan]
    """By the zone's EPSG code, such as ``32631``, the western first."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """Describe the plans for people."""
        lines = [
            f"Prediction of {len(self.plans)} UTM zone{'s' if len(self.plans) > 1 else ''} "
            f"({', '.join(self.plans)}), a map for each, and a mosaic in EPSG:{self.main}"
        ]
        lines += [f"  note        {text}" for text in self.notes]
        lines += [f"  warning     {text}" for text in self.warnings]
        return "\n".join([*lines, *(str(plan) for plan in self.plans.values())])

    @property
    def run_hash(self) -> str:
        """Identifies the runs of all zones together."""
        return "+".join(plan.run_hash for plan in self.plans.values())

    @property
    def main(self) -> str:
        """The zone that holds most of the region, whose CRS the mosaic has."""
        return max(self.plans, key=lambda zone: self.plans[zone].aoi.area)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneMaps:
    """A finished product of several zones."""

    out: Path
    zones: Mapping[str, Prediction]
    """By the zone's EPSG code; each in a folder of that name."""
    classes: Path
    """The mosaic of the class maps, a VRT."""
    collection: Path
    """STAC collection with an item for each zone."""


def find_zone_cubes(paths: Sequence[Path]) -> list[Path]:
    """Return cubes, where a name stands for what ``cube build --per-zone`` made of it.

    ``region.zarr`` that does not exist stands for ``region-32631.zarr`` and so on beside it.
    """
    found = []
    for path in paths:
        pattern = f"{path.stem}-32[67][0-9][0-9]{path.suffix}"
        made = [] if path.exists() else sorted(path.parent.glob(pattern))
        found += made or [path]
    return found


def plan_zone_maps(
    seasons: Sequence[Season],
    checkpoint: CheckpointInfo,
    spec: PredictSpec,
    *,
    region: Region | None = None,
    threads: int | None = None,
) -> ZonesPlan:
    """Plan a map for each zone.

    Parameters
    ----------
    seasons
        One per UTM zone.
    region
        A part of the cubes' region; cubes that do not meet it are left out.
    threads
        Windows that a worker will run side by side; see ``plan_prediction``.

    Raises
    ------
    InputError
        If two cubes share a zone, one is in no UTM zone, their seasons differ, or none holds
        anything of the region that its zone owns.
    """
    by_zone = _by_zone(seasons)
    plans, notes = {}, []
    for zone, season in by_zone.items():
        owned = _owned(season, zone, region)
        if owned.area <= 0:
            notes.append(f"{season.cube} holds nothing of the region in its zone and is left out")
            continue
        part = Region.from_projected(owned, zone, source=f"what {zone} owns of the region")
        plans[zone.removeprefix("EPSG:")] = plan_prediction(
            season, checkpoint, spec, region=part, threads=threads
        )
    if not plans:
        raise InputError(
            f"Cannot predict over {region.source if region else 'the region of the cubes'}: none "
            f"of the cubes in {', '.join(by_zone)} holds a part of it that its zone owns. Give a "
            "region inside the cubes', or build cubes of this one with 'cube build --per-zone'."
        )
    missing = [] if region is None else set(utm_zones(region.geometry)) - set(by_zone)
    warnings = [
        f"The region reaches into {', '.join(sorted(missing))}, of which no cube was given: that "
        "part is not mapped. Build it with 'cube build --per-zone'."
    ] if missing else []  # fmt: skip
    return ZonesPlan(
        plans=plans,
        warnings=(*warnings, *dict.fromkeys(t for plan in plans.values() for t in plan.warnings)),
        notes=tuple(notes),
    )


def _by_zone(seasons: Sequence[Season]) -> dict[str, Season]:
    found: dict[str, Season] = {}
    for season in seasons:
        zone = crs_name(season)
        if not _UTM.fullmatch(zone):
            raise InputError(
                f"Cannot predict several cubes at once: {season.cube} is in {zone[:40]}, and "
                "together they must be one per UTM zone, as 'cube build --per-zone' makes them. "
                "Give one cube, or cubes of UTM zones."
            )
        if zone in found:
            raise InputError(
                f"Cannot predict several cubes at once: {found[zone].cube} and {season.cube} are "
                f"both in {zone}, and there is one for each UTM zone. Predict them one by one, or "
                "build one cube of the whole region."
            )
        found[zone] = season
    names = sorted({season.name for season in seasons})
    if len(names) > 1:
        raise InputError(
            f"Cannot predict seasons {', '.join(names)} into one map: all zones take the same. "
            "Choose one with --season."
        )
    west_first = sorted(found, key=lambda zone: (utm_zone_bounds(zone)[0], zone))
    return {zone: found[zone] for zone in west_first}


def _owned(season: Season, zone: str, region: Region | None) -> BaseGeometry:
    """Return where the centres lie of the pixels that a zone maps, in the zone's CRS."""
    import shapely
    from shapely.affinity import translate
    from shapely.geometry import Polygon, box

    west, south, east, north = utm_zone_bounds(zone)
    low_x, low_y, high_x, high_y = footprint(season.geobox).bounds
    west, east = max(west, low_x - _BEYOND), min(east, high_x + _BEYOND)
    south, north = max(south, low_y - _BEYOND), min(north, high_y + _BEYOND)
    if not (west < east and south < north):
        return Polygon()
    band = Region(geometry=box(west, south, east, north), source=zone).to_crs(zone)
    # A pixel touches the band where its centre lies in the band grown by half a pixel each way.
    half = season.resolution / 2
    grown = shapely.union_all([translate(band, x, y) for x in (-half, half) for y in (-half, half)])
    owned = season.aoi.intersection(grown)
    return owned if region is None else owned.intersection(region.to_crs(zone))


def run_zone_maps(
    plan: ZonesPlan,
    out: str | Path,
    *,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
) -> ZoneMaps:
    """Do what a plan says; zone by zone, each continued or kept as ``run_prediction`` does.

    Raises
    ------
    TaskError
        If shards failed for good. All other shards of all zones are done and shown.
    OutputError
        If the folder holds a map of one cube.
    """
    out = Path(out).resolve()
    if (out / PLAN_FILE).exists() or (out / "classes.tif").exists():
        raise OutputError(
            f"Cannot predict several zones into {out}: the folder holds the map of one cube, and "
            "it would be taken for the whole. Choose another --out."
        )
    replaced = [read_json(out / zone / PLAN_FILE) for zone in plan.plans]
    if overwrite and any(
        before is not None and before.get("run") != one.run_hash
        for before, one in zip(replaced, plan.plans.values(), strict=True)
    ):
        remove_accuracy(out)
    zones, failures = {}, []
    for zone, one in plan.plans.items():
        try:
            zones[zone] = run_prediction(
                one, out / zone, execution=execution, overwrite=overwrite,
                progress=None if progress is None else _named(progress, zone),
            )  # fmt: skip
        except TaskError as error:
            failures.append(f"EPSG:{zone}: {error}")
    if not failures or all((out / zone / "classes.tif").exists() for zone in plan.plans):
        _write_mosaics(plan, out)
        _write_collection(plan, out)
    if failures:
        raise TaskError(" ".join(failures))
    return ZoneMaps(
        out=out, zones=zones, classes=out / "classes.vrt", collection=out / COLLECTION_FILE
    )


def _named(progress: ProgressHook, zone: str) -> ProgressHook:
    return lambda done, total, what: progress(done, total, f"{what} of {zone}")


def _write_mosaics(plan: ZonesPlan, out: Path) -> None:
    """Write a VRT for each layer, with legends and styles beside them."""
    main = plan.plans[plan.main]
    order = [plan.main, *(zone for zone in plan.plans if zone != plan.main)]
    for layer in layers_for(main.spec.outputs):
        write_mosaic(
            [(out / zone / f"{layer.name}.tif", plan.plans[zone].geobox) for zone in order],
            out / f"{layer.name}.vrt",
            warped=out / WARPED,
            legend=layer.legend(main.legend),
            bands=layer.bands(main.legend),
            absent=layer.absent,
            tags={"STCLN_GEO_CHECKPOINT_SHA256": main.sha256},
        )
    write_legend(out, main.legend)
    write_style(out / "classes.qml", main.legend)
    write_style(out / "qa.qml", QA_LEGEND)


def _write_collection(plan: ZonesPlan, out: Path) -> None:
    """Write the STAC collection, and link the zones' items with it."""
    import pystac
    from pystac.layout import CustomLayoutStrategy
    from shapely import union_all
    from shapely.geometry import shape

    main = plan.plans[plan.main]
    name = f"{out.name}-{main.season}"
    items = {}
    for zone in plan.plans:
        item = pystac.Item.from_dict(json.loads((out / zone / "item.json").read_text("utf-8")))
        item.clear_links()
        item.id = f"{out.name}-{zone}-{main.season}"
        items[item.id] = zone, item
    boxes = [item.bbox for _, item in items.values() if item.bbox is not None]
    parts = [shape(item.geometry) for _, item in items.values() if item.geometry is not None]
    whole = Region(geometry=union_all(parts), source="the zones").bbox
    moments = [item.common_metadata for _, item in items.values()]
    first = min(one.start_datetime or _NEVER for one in moments)
    last = max(one.end_datetime or _NEVER for one in moments)
    collection = pystac.Collection(
        id=name,
        title=f"Crop map of the season from {main.season}",
        description=(
            f"Crop map of the season from {main.season}, one cloud-optimized GeoTIFF per layer "
            f"and UTM zone ({', '.join(plan.plans)}), made by stcln-geo. The VRTs show all zones "
            f"in EPSG:{plan.main}."
        ),
        extent=pystac.Extent(
            pystac.SpatialExtent([whole, *boxes] if len(boxes) > 1 else [whole]),
            pystac.TemporalExtent([[first, last]]),
        ),
        license="other",
        catalog_type=pystac.CatalogType.SELF_CONTAINED,
    )
    for layer in layers_for(main.spec.outputs):
        collection.add_asset(
            layer.name,
            pystac.Asset(
                href=f"./{layer.name}.vrt", media_type=_VRT, roles=["overview"],
                title=f"{layer.title}, all zones", description=layer.description,
            ),
        )  # fmt: skip
    # Links are relative. A name of ours, as pystac takes a "#" in a path for part of an address.
    collection.set_self_href(f"/map/{COLLECTION_FILE}")

    def place(item: Any, folder: str) -> str:
        return os.path.join(folder, items[item.id][0], "item.json")

    collection.add_items(
        [item for _, item in items.values()], strategy=CustomLayoutStrategy(item_func=place)
    )
    for zone, item in items.values():
        write_json(out / zone / "item.json", item.to_dict(include_self_link=False))
    write_json(out / COLLECTION_FILE, collection.to_dict(include_self_link=False))


_NEVER = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
