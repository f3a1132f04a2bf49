"""``metadata.geojson`` of PASTIS: which squares there are, where, and the date of each frame.

GDAL gives the mapping from frame to date as a mapping or as its JSON text, by its version. The file
is read as plain JSON here, and files that GDAL has written back are understood too.
"""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from .georeference import LAMBERT93
from .plan import Findings

__all__ = ["FIRST_DAY", "RADAR", "Feature", "order_dates", "read_metadata"]

FIRST_DAY = "2018-09-01"
"""The set's reference date."""

RADAR = {"ascending": "S1A", "descending": "S1D"}
"""What the set calls Sentinel-1, by direction of flight: A and D are no satellites."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """What ``metadata.geojson`` says of a square."""

    id: str
    dates: tuple[str, ...]
    """Of each frame, ``YYYYMMDD`` as written."""
    radar: dict[str, tuple[str, ...]]
    """Likewise of Sentinel-1, by direction of flight; empty in PASTIS without R."""
    corners: np.ndarray | None
    """(4, 2) of the footprint."""
    tile: str
    """Name of the Sentinel-2 tile, as ``T31TFM``; empty where there is none."""
    fold: int


def read_metadata(path: Path) -> tuple[list[Feature], str, Findings]:
    """Return the squares, in order of their ids, and the CRS of their footprints."""
    findings = Findings()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [(row["properties"], row.get("geometry")) for row in content["features"]]
        features: dict[str, Feature] = {}
        for properties, geometry in rows:
            feature = Feature(
                id=str(int(properties["ID_PATCH"])),
                dates=_frame_dates(properties.get("dates-S2")),
                radar={
                    orbit: dates
                    for orbit, name in RADAR.items()
                    if (dates := _frame_dates(properties.get(f"dates-{name}")))
                },
                corners=_corners(geometry),
                tile=_tile(properties.get("TILE")),
                fold=int(properties.get("Fold") or 0),
            )
            if feature.id in features:
                findings.add(
                    "repeated_id", feature.id,
                    "Squares that stand twice in metadata.geojson, of which the first is taken",
                )  # fmt: skip
            features.setdefault(feature.id, feature)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Cannot import PASTIS from {path.parent}: metadata.geojson is damaged "
            f"({type(error).__name__}: {error}). It is a GeoJSON file with one feature per square, "
            "with the properties ID_PATCH, Fold, TILE and dates-S2. Fetch it again."
        ) from error
    points = [feature.corners for feature in features.values() if feature.corners is not None]
    # GeoJSON says longitude and latitude; the published file has metres of Lambert-93 in it.
    degrees = bool(points) and all(
        np.abs(corners[:, 0]).max() <= 180 and np.abs(corners[:, 1]).max() <= 90
        for corners in points
    )
    ordered = sorted(features.values(), key=lambda feature: int(feature.id))
    return ordered, "OGC:CRS84" if degrees else LAMBERT93, findings


def _tile(column: Any) -> str:
    """Return a tile's name in one spelling of the several that are met."""
    name = str(column or "").strip().upper()
    return name if not name or name.startswith("T") else f"T{name}"


def _frame_dates(column: Any) -> tuple[str, ...]:
    """Return the date of each frame from a mapping, or its JSON, of frame to YYYYMMDD."""
    table = json.loads(column) if isinstance(column, str) else column
    if table is None:
        return ()
    if isinstance(table, list):
        return tuple(str(value) for value in table)
    return tuple(str(table[key]) for key in sorted(table, key=int))


def _corners(geometry: Any) -> np.ndarray | None:
    from shapely import get_coordinates, minimum_rotated_rectangle
    from shapely.geometry import shape

    if not geometry:
        return None
    outline = shape(geometry)
    if outline.is_empty or outline.area == 0:
        return None
    return np.asarray(get_coordinates(minimum_rotated_rectangle(outline))[:4], dtype=np.float64)


def order_dates(
    name: str, dates: tuple[str, ...], findings: Findings
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return dates in order of time, each once, and the frame of each.

    Parameters
    ----------
    name
        Of the square, or of one of its series.
    """
    first: dict[str, int] = {}
    for frame, text in enumerate(dates):
        try:
            date = datetime.datetime.strptime(text, "%Y%m%d").date().isoformat()
        except ValueError:
            findings.add(
                "bad_date", f"{name} frame {frame} ({text})",
                "Frames with a date that does not exist, left out",
            )  # fmt: skip
            continue
        if date < FIRST_DAY:
            findings.add(
                "early_date", f"{name} {date}",
                f"Frames from before {FIRST_DAY}, the first day, left out",
            )  # fmt: skip
            continue
        if date in first:
            findings.add(
                "repeated_date", f"{name} {date}",
                "Dates that stand twice in a series, of which the first frame is taken",
            )  # fmt: skip
        first.setdefault(date, frame)
    if list(first) != sorted(first):
        findings.add("unsorted_dates", name, "Series with unsorted dates, sorted with their frames")
    ordered = sorted(first.items())
    return tuple(date for date, _ in ordered), tuple(frame for _, frame in ordered)
