"""Cloud-optimized GeoTIFFs: write maps and images, then validate the content of maps.

Two writers make the same map. ``write_cog`` gives files of any size to GDAL; ``write_segment`` and
``assemble_cog`` let the workers compress the tiles and then only copy their bytes. ``write_mosaic``
shows maps of several CRSs as one.
"""

from __future__ import annotations

from .assemble import assemble_cog
from .image import OverviewResampling, write_image_cog
from .mosaic import mosaic_grid, write_mosaic
from .names import CONFIDENCE_NODATA, Bands, read_legend, write_names
from .segment import Segment, write_segment
from .tiles import Compression, TileCodec
from .validate import check_cog, validate_cog
from .write import Source, write_cog

__all__ = [
    "CONFIDENCE_NODATA",
    "Bands",
    "Compression",
    "OverviewResampling",
    "Segment",
    "Source",
    "TileCodec",
    "assemble_cog",
    "check_cog",
    "mosaic_grid",
    "read_legend",
    "validate_cog",
    "write_cog",
    "write_image_cog",
    "write_mosaic",
    "write_names",
    "write_segment",
]
