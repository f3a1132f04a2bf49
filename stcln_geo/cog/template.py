"""The TIFF tags of a map that do not depend on its pixels: grid, palette, nodata, metadata.

GDAL encodes them: it writes a template of one tile into memory, and its tags are copied. So every
CRS that GDAL knows is stored as GDAL stores it.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..legend import Legend
from .names import Bands, palette, table_item
from .pyramid import NODATA
from .tiff import Field, read_directories
from .tiles import TileCodec

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["COMPRESSION", "PREDICTOR", "map_fields", "overview_fields"]

COMPRESSION, PREDICTOR = 259, 317
_METADATA, _NODATA = 42112, 42113
# Bits, compression, photometric, samples, planes, predictor, palette, sample format, nodata.
_OF_ALL_LEVELS = {258, COMPRESSION, 262, 277, 284, PREDICTOR, 320, 339, _NODATA}
_SHORT, _ASCII = 3, 2
_TEMPLATE_SIDE = 16


def map_fields(
    geobox: GeoBox | None,
    codec: TileCodec,
    *,
    legend: Legend | None = None,
    tags: Mapping[str, str] | None = None,
    bands: Bands | None = None,
    nodata: int = NODATA,
) -> dict[int, Field]:
    """Return the tags of a map's full resolution.

    Parameters
    ----------
    geobox
        None leaves the file without a place.
    legend
        Gives a palette and an attribute table.
    tags
        Text metadata.
    bands
        Name, scale and unit of the one band.
    nodata
        The value without meaning; GDAL also reads it where a tile has no bytes.
    """
    import rasterio

    options: dict[str, Any] = {} if geobox is None else {"transform": geobox.affine}
    if geobox is not None and geobox.crs is not None:
        options["crs"] = geobox.crs.to_wkt()
    with _quiet_georeferencing(), rasterio.MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=_TEMPLATE_SIDE, height=_TEMPLATE_SIDE, count=1, dtype="uint8",
            nodata=nodata, tiled=True, blockxsize=_TEMPLATE_SIDE, blockysize=_TEMPLATE_SIDE,
            bigtiff="NO", **options,
        ) as template:  # fmt: skip
            if legend is not None:
                template.write_colormap(1, dict(enumerate(palette(legend))))
            if tags:
                template.update_tags(**tags)
            if bands is not None:
                template.set_band_description(1, bands.names[0])
                if bands.scale is not None:
                    template.scales = (bands.scale,)
                if bands.unit is not None:
                    template.units = (bands.unit,)
        fields = dict(read_directories(io.BytesIO(memory.read()))[0].fields)
    fields[COMPRESSION] = (_SHORT, 1, struct.pack("<H", codec.tiff_compression))
    fields[PREDICTOR] = (_SHORT, 1, struct.pack("<H", codec.tiff_predictor))
    if legend is not None:
        fields[_METADATA] = _with_item(fields.get(_METADATA), table_item(legend))
    return fields


def overview_fields(fields: Mapping[int, Field]) -> dict[int, Field]:
    """Return those of a map's tags that its overviews repeat."""
    return {tag: field for tag, field in fields.items() if tag in _OF_ALL_LEVELS}


def _with_item(metadata: Field | None, item: str) -> Field:
    """Return GDAL's metadata tag with one more item."""
    text = b"<GDALMetadata>\n</GDALMetadata>" if metadata is None else metadata[2].rstrip(b"\0")
    body, end, rest = text.rpartition(b"</GDALMetadata>")
    data = b"".join([body, b"  ", item.encode(), b"\n", end, rest, b"\0"])
    return (_ASCII, len(data), data)


def _quiet_georeferencing() -> Any:
    """Silence the note that a template has no place on the globe."""
    import warnings

    from rasterio.errors import NotGeoreferencedWarning

    return warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning)
