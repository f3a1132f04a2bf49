"""What is derived from a finished class map: parcels and polygons, read window by window.

Importing it loads no torch: a map can be used where no network is.
"""

from __future__ import annotations

from .classmap import ClassMap, open_class_map
from .parcels import ParcelReport, ParcelTable, write_parcels
from .polygons import PolygonReport, write_polygons

__all__ = [
    "ClassMap",
    "ParcelReport",
    "ParcelTable",
    "PolygonReport",
    "open_class_map",
    "write_parcels",
    "write_polygons",
]
