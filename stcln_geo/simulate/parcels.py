"""Write the fields of a simulated region, and the legend of their crops."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .fields import choose_crops, is_declared, make_parish, parishes_in
from .noise import make_key
from .phenology import CROPS
from .spec import SimulationSpec

__all__ = ["write_legend", "write_parcels"]

_PARISH_ROWS = 64
# Square metres; less is left of a field that only touches the region.
_SLIVER = 1.0


def write_parcels(folder: Path, spec: SimulationSpec) -> None:
    """Write the fields with a known crop, cut at the region's edge, in bounded memory."""
    target = folder / "parcels.gpkg"
    if target.exists():
        return
    partial = folder / ".parcels.gpkg"
    partial.unlink(missing_ok=True)
    try:
        for number, frame in enumerate(_parcel_frames(spec)):
            frame.to_file(partial, layer="parcels", driver="GPKG", mode="a" if number else "w")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _parcel_frames(spec: SimulationSpec) -> Iterator[Any]:
    import geopandas
    import shapely

    region = shapely.box(*spec.bounds)
    wanted = parishes_in(spec, spec.bounds)
    rows = sorted({row for row, _ in wanted})
    for start in range(0, len(rows), _PARISH_ROWS):
        chosen = set(rows[start : start + _PARISH_ROWS])
        shapes: list[Any] = []
        columns: dict[str, list[str]] = {"field_id": [], "crop_code": [], "crop_name": []}
        extra: dict[str, list[str]] = {
            f"crop_code_{spec.start_year + season}": [] for season in range(spec.seasons)
        }
        for row, col in (index for index in wanted if index[0] in chosen):
            parish = make_parish(spec, row, col)
            if not len(parish.fields):
                continue
            keys = np.array(
                [make_key(parish.key, 43, number + 1) for number in range(len(parish.fields))],
                dtype=np.uint32,
            )
            cut = shapely.intersection(parish.fields, region)
            kept = is_declared(keys) & (shapely.area(cut) > _SLIVER)
            by_season = [
                choose_crops(parish.ranks, keys, season=spec.start_year + season)
                for season in range(spec.seasons)
            ]
            for number in np.flatnonzero(kept):
                shapes.append(cut[number])
                crop = CROPS[by_season[0][number]]
                columns["field_id"].append(f"{row}-{col}-{number}")
                columns["crop_code"].append(crop.code)
                columns["crop_name"].append(crop.name)
                for column, chosen_crops in zip(extra.values(), by_season, strict=True):
                    column.append(CROPS[chosen_crops[number]].code)
        if spec.seasons > 1:
            columns.update(extra)
        if shapes:
            yield geopandas.GeoDataFrame(columns, geometry=shapes, crs=spec.crs)


def write_legend(path: Path) -> None:
    """Write the crops that are simulated: value, name, color."""
    partial = path.with_name(f".{path.name}.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("value", "name", "color"))
        writer.writerows((crop.code, crop.name, crop.color) for crop in CROPS)
    os.replace(partial, path)
