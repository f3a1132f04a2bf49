"""Cloud-optimized GeoTIFFs of classes and confidences: write, then validate the content."""

from __future__ import annotations

from .validate import check_cog, validate_cog
from .write import CONFIDENCE_NODATA, Bands, Source, read_legend, write_cog, write_names

__all__ = [
    "CONFIDENCE_NODATA",
    "Bands",
    "Source",
    "check_cog",
    "read_legend",
    "validate_cog",
    "write_cog",
    "write_names",
]
