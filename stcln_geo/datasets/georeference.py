"""Where a site lies: a north-up grid of square pixels from a footprint that may be rotated.

PASTIS publishes footprints in Lambert-93 (EPSG:2154) while its pixels are those of Sentinel-2, in
the UTM zone of the tile. The rules, each named in the stack's ``georeference``:

``utm``
    Projected to the tile's UTM zone, the corners lie within a pixel of a square on the zone's
    grid of whole pixels: the grid is that square.
``lambert93``
    The footprint is, to a metre, a square of the nominal size along the axes of Lambert-93, and
    fits it better than the one in UTM: the grid is that square. Near 3 degrees east the axes of
    both are almost parallel, so the better fit decides.
``utm-centre``
    Neither: the square of the nominal size around the footprint's centre, on whole pixels of
    the zone. Its place is uncertain by the distance that ``offset_m`` tells.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["LAMBERT93", "Placement", "place_square", "utm_of_tile"]

LAMBERT93 = "EPSG:2154"
_TOLERANCE_M = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The grid of a site."""

    crs: str
    transform: tuple[float, float, float, float, float, float]
    rule: str
    offset_m: float
    """Largest distance of a corner of the footprint from the grid's nearest corner (metres)."""


def place_square(
    corners: np.ndarray, *, side: int, tile: str, crs: str = LAMBERT93, resolution: float = 10.0
) -> Placement:
    """Return the grid of a square site from the vertices of its footprint.

    Parameters
    ----------
    corners : (N, 2) x and y in ``crs``, of which the first four or more span the square.
    side
        Pixels along an edge.
    tile
        Name of the Sentinel-2 tile, such as ``t31tfm``; without one, the UTM zone of the centre.
    """
    edge = side * resolution
    utm = utm_of_tile(tile) or _utm_of_place(corners, crs)
    moved = _project(corners, crs, utm)
    middle = (moved.min(axis=0) + moved.max(axis=0)) / 2
    west, north = np.round((middle + np.array([-edge, edge]) / 2) / resolution) * resolution
    square = _corners_of(float(west), float(north), edge)
    offset = _offset(moved, square)
    if crs == LAMBERT93:
        aligned = _corners_of(float(corners[:, 0].min()), float(corners[:, 1].max()), edge)
        distance = _offset(corners, aligned)
        if distance <= _TOLERANCE_M and distance < offset:
            return _placed(crs, aligned, resolution, "lambert93", distance)
    return _placed(utm, square, resolution, "utm" if offset <= resolution else "utm-centre", offset)


def utm_of_tile(tile: str) -> str | None:
    """Return the UTM zone of a Sentinel-2 tile such as ``T31TFM`` or ``t31tfm``, None if unclear.

    Examples
    --------
    >>> utm_of_tile("t30uxv")
    'EPSG:32630'
    """
    match = re.fullmatch(r"T?(\d{2})([C-HJ-NP-X])[A-Z]{2}", tile.strip().upper())
    if match is None or not 1 <= int(match[1]) <= 60:
        return None
    return f"EPSG:{326 if match[2] >= 'N' else 327}{match[1]}"


def _utm_of_place(corners: np.ndarray, crs: str) -> str:
    longitude, latitude = _project(corners, crs, "OGC:CRS84").mean(axis=0)
    zone = int((longitude + 180) // 6) % 60 + 1
    return f"EPSG:{326 if latitude >= 0 else 327}{zone:02d}"


def _project(points: np.ndarray, source: str, target: str) -> np.ndarray:
    from pyproj import Transformer

    transformer: Any = Transformer.from_crs(source, target, always_xy=True)
    return np.column_stack(transformer.transform(points[:, 0], points[:, 1]))


def _corners_of(west: float, north: float, edge: float) -> np.ndarray:
    return np.array(
        [[west, north], [west + edge, north], [west + edge, north - edge], [west, north - edge]]
    )


def _offset(points: np.ndarray, square: np.ndarray) -> float:
    """Return how far the footprint and a square are apart, corner by corner, both ways."""
    distance = np.linalg.norm(points[:, None] - square[None], axis=-1)
    return float(max(distance.min(axis=1).max(), distance.min(axis=0).max()))


def _placed(crs: str, square: np.ndarray, resolution: float, rule: str, offset: float) -> Placement:
    return Placement(
        crs=crs,
        transform=(resolution, 0.0, float(square[0, 0]), 0.0, -resolution, float(square[0, 1])),
        rule=rule,
        offset_m=round(offset, 3),
    )
