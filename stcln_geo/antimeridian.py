"""The line at 180 degrees: polygons in lon/lat that cross it become their two sides.

RFC 7946 asks for polygons that are split there. Not all providers and programs comply: some let
longitudes go on beyond 180, others let an edge jump from one side to the other, which in a plane
reads as an area around the rest of the Earth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["boxes_around", "cut_at_antimeridian", "split_at_antimeridian", "wrapped"]

_WIDEST_CROSSING = 180.0
"""What crosses the antimeridian spans less than this (degrees)."""

_WIDEST_JUMP = 90.0
"""What a polygon may span that is taken to cross because an edge jumps (degrees)."""

_FARTHEST = 360.0
"""Numbers beyond this, on either side, are no longitudes (degrees)."""


def split_at_antimeridian(geometry: BaseGeometry) -> BaseGeometry:
    """Return polygons in lon/lat (degrees) with those across the antimeridian cut in two there.

    They cross it where they go on beyond 180 degrees, up to 360, or where an edge spans more than
    180 and the polygon less than 90 the other way. Other geometries are returned as they are, also
    those around a pole or the whole Earth.

    Examples
    --------
    >>> from shapely import box
    >>> split_at_antimeridian(box(179.5, -17, 180.5, -16)).bounds
    (-180.0, -17.0, 180.0, -16.0)
    """
    import shapely

    parts = shapely.get_parts(geometry)
    split = [_split(part) for part in parts]
    if all(new is old for new, old in zip(split, parts, strict=True)):
        return geometry
    whole: BaseGeometry = shapely.union_all(split)
    return whole


def cut_at_antimeridian(polygon: BaseGeometry) -> BaseGeometry:
    """Return a polygon in lon/lat as its two sides where it is wider than a crossing can be."""
    from shapely import transform

    west, _, east, _ = polygon.bounds
    if east - west <= _WIDEST_CROSSING:
        return polygon
    return wrapped(
        transform(polygon, lambda points: np.column_stack([points[:, 0] % 360, points[:, 1]]))
    )


def wrapped(geometry: BaseGeometry) -> BaseGeometry:
    """Return a geometry in degrees with what lies beyond 180 at its place on the other side."""
    from shapely import affinity, box, intersection, union_all

    west, south, east, north = geometry.bounds
    if _on_the_globe(west, east) or not (west >= -_FARTHEST and east <= _FARTHEST):
        return geometry
    copies = [affinity.translate(geometry, xoff=turn) for turn in (0, 360, -360)]
    whole: BaseGeometry = union_all(intersection(copies, box(-180, south, 180, north)))
    return whole


def boxes_around(geometry: BaseGeometry) -> BaseGeometry:
    """Return the box around a geometry in lon/lat, to find what lies there.

    Of one that crosses the antimeridian, the boxes around its two sides, once more a turn to the
    east and to the west: what is sought may be drawn on beyond 180 degrees.
    """
    import shapely
    from shapely import affinity

    split = split_at_antimeridian(geometry)
    if split is geometry:
        return geometry.envelope
    sides = [side.envelope for side in shapely.get_parts(split)]
    whole: BaseGeometry = shapely.union_all(
        [affinity.translate(side, xoff=turn) for side in sides for turn in (0, 360, -360)]
    )
    return whole


def _split(part: BaseGeometry) -> BaseGeometry:
    """Return a polygon as its two sides; the same object where it does not cross."""
    import shapely

    west, _, east, _ = part.bounds
    within = _on_the_globe(west, east)
    if part.geom_type != "Polygon" or not (west >= -_FARTHEST and east <= _FARTHEST):
        return part
    if within and east - west <= _WIDEST_CROSSING:
        return part
    ring = _continuous(shapely.get_coordinates(shapely.get_exterior_ring(part)))[:, 0]
    width = float(np.ptp(ring))
    # A ring that does not close lies around a pole; without a width it was the whole Earth's.
    if ring[0] == ring[-1] and 0 < width < (_WIDEST_JUMP if within else east - west):
        part = shapely.transform(part, _continuous)
    elif within:
        return part
    return wrapped(shapely.make_valid(part))


def _continuous(points: np.ndarray) -> np.ndarray:
    """Return (N, 2) points in degrees, moved by whole turns so that none lies far from the last."""
    lon, lat = points[:, 0], points[:, 1]
    turns = np.round((np.unwrap(lon, period=360) - lon) / 360)
    return np.column_stack([lon + 360 * turns, lat])


def _on_the_globe(west: float, east: float) -> bool:
    return west >= -180 and east <= 180
