"""What a cube is and holds, from its metadata and counts: no pixel is decoded."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..storage import Location, location
from .audit import suspect_dates
from .store import Season, list_seasons, open_season

__all__ = ["describe_cube", "longest_gap"]

_CLEAR = 0.5
"""Share of the clearest date's clear pixels from which a date counts as seen."""

_TOLD = ("cloud_mask", "cloud_mask_weights", "catalog", "collection", "region")


def describe_cube(path: str | Location) -> dict[str, Any]:
    """Describe a cube in plain JSON values: grid, bands, dates, how clear they are, and labels.

    Returns
    -------
    dict
        ``path``, ``seasons`` (oldest first), and ``unfinished``: seasons that are being built, or
        changed where ``change`` is True.
        Of each season ``bounds`` are west, south, east and north in its CRS, ``clear`` is the
        share of the grid's pixels that are valid (0 to 1), of all dates and, under ``dates``, of
        each.

    Raises
    ------
    MissingFileError, CubeError
        If there is no such cube, or a season of it cannot be opened.
    """
    where = location(path)
    return {
        "path": str(where),
        "seasons": [_describe(open_season(where, name)) for name in list_seasons(where)],
        "unfinished": [
            {"season": name, "change": (where / name).is_dir()}
            for name in sorted(
                folder.name.removesuffix(".building") for folder in where.glob("*.building")
            )
        ],
    }


def longest_gap(dates: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Return between which two dates nothing was seen for longest; None of fewer than two.

    Parameters
    ----------
    dates
        Of a season, as ``describe_cube`` gives them. One counts where it has at least half of
        the clearest one's clear pixels: a cube may reach beyond what was seen at all.
    """
    least = _CLEAR * max((date["clear"] for date in dates), default=0.0)
    seen = [str(date["time"])[:10] for date in dates if date["clear"] >= least]
    if len(seen) < 2 or least == 0.0:
        return None
    days = np.diff(np.array(seen, dtype="datetime64[D]"))
    place = int(np.argmax(days))
    return seen[place], seen[place + 1]


def _describe(season: Season) -> dict[str, Any]:
    height, width = season.shape_yx
    counts = season.coverage[:].sum(axis=(1, 2), dtype=np.int64)
    crs: Any = season.geobox.crs
    told = {
        "season": season.name,
        "crs": f"EPSG:{crs.epsg}" if crs.epsg else str(crs),
        "resolution": season.resolution,
        "width": width,
        "height": height,
        "bounds": [float(edge) for edge in season.geobox.boundingbox.bbox],
        "chunk": season.layout.chunk,
        "shard": season.layout.shard,
        "bands": list(season.bands),
        "level": season.level,
        "clear": float(counts.sum() / max(len(counts) * height * width, 1)),
        "dates": [
            {"time": f"{time}Z", "clear": float(count / (height * width))}
            for time, count in zip(season.time.astype("datetime64[s]"), counts, strict=True)
        ],
        "offset_suspect": suspect_dates(season),
        "composite": None,
        "period": None,
        "labels": None,
    }
    told |= {name: season.attrs.get(name) for name in _TOLD}
    if season.observations is not None:
        told |= {name: season.attrs[name] for name in ("composite", "period")}
    if season.fields is not None and season.legend is not None:
        told["labels"] = {"fields": len(season.fields), "classes": list(season.legend.names)}
    return told
