"""What is derived from a finished class map: parcels and polygons, read window by window.

Importing it loads no torch: a map can be used where no network is.
"""

from __future__ import annotations

from .classmap import ClassMap, open_class_map
from .parcels import ParcelReport, ParcelTable, read_parcels, write_parcels
from .polygons import PolygonReport, write_polygons
from .vector import check_target

__all__ = [
    "ClassMap",
    "ParcelReport",
    "ParcelTable",
    "PolygonReport",
    "check_target",
    "open_class_map",
    "read_parcels",
    "write_parcels",
    "write_polygons",
]
