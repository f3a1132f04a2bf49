"""Cloud-optimized GeoTIFFs: write maps and images, then validate the content of maps."""

from __future__ import annotations

from .image import OverviewResampling, write_image_cog
from .validate import check_cog, validate_cog
from .write import CONFIDENCE_NODATA, Source, read_legend, write_cog, write_names

__all__ = [
    "CONFIDENCE_NODATA",
    "OverviewResampling",
    "Source",
    "check_cog",
    "read_legend",
    "validate_cog",
    "write_cog",
    "write_image_cog",
    "write_names",
]
