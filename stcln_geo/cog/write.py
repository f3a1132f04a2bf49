"""Write the final rasters: shard files -> VRT -> GDAL's COG driver.

This writer takes shards of any size. Where they are multiples of 4096 px, ``assemble`` makes the
same map from their bytes, without decoding them again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from ..errors import OutputError
from ..grid import Window
from ..legend import CLASS_NODATA, Legend
from .names import (
    CLASS_BANDS,
    CONFIDENCE_NODATA,
    Bands,
    map_tags,
    names_xml,
    palette,
    removed,
    table_item,
    write_names,
)
from .tiles import Compression, TileCodec

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["Source", "mosaic_xml", "write_cog"]

_HEADER_BYTES = 1 << 24  # the metadata stands before the first pixel
_PLACEHOLDER = "STCLN_GEO_RESERVED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a mosaic and where it lies in the final raster."""

    path: Path
    """GeoTIFF of uint8, with the bands of the final raster."""

    window: Window
    """Its place, counted from the final raster's first pixel."""


def write_cog(
    sources: Sequence[Source],
    path: str | Path,
    *,
    geobox: GeoBox,
    legend: Legend | None,
    bands: Bands | None = None,
    tags: Mapping[str, str] | None = None,
    compression: Compression = "zstd",
    threads: int | None = None,
) -> Path:
    """Assemble uint8 files into one cloud-optimized GeoTIFF.

    Parameters
    ----------
    sources
        Files that do not overlap; pixels without a file become nodata (255).
    path
        The COG; it appears under this name only when it is whole.
    geobox
        Grid of the COG.
    legend
        The classes of a class map, whose overviews take the most frequent class. None for a
        raster of numbers, whose overviews average.
    bands
        Bands of a raster of numbers; None: one of confidences (percent).
    tags
        More text tags for the TIFF.
    threads
        Threads that compress; None = all cores.

    Returns
    -------
    Path
        The COG. A class map has a sidecar ``<name>.aux.xml`` beside it.

    Raises
    ------
    OutputError
        If GDAL cannot write it (disk full, folder not writable).
    """
    import rasterio
    import rasterio.shutil
    from rasterio._err import CPLE_BaseError  # what copy raises for most of GDAL's errors
    from rasterio.errors import RasterioError

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    vrt = path.with_name(f".{path.name}.{os.getpid()}.vrt")
    part = path.with_name(f".{path.name}.{os.getpid()}.part.tif")
    table = None if legend is None else table_item(legend)
    bands = bands or (Bands() if legend is None else CLASS_BANDS)
    all_tags = map_tags(legend, bands, tags)
    codec = TileCodec(compression=compression, predictor=legend is None)
    options = {
        "COMPRESS": compression.upper(),
        "LEVEL": str(codec.effort),
        "PREDICTOR": "YES" if codec.predictor else "NO",
        "BLOCKSIZE": str(codec.size),
        "BIGTIFF": "IF_SAFER",
        "OVERVIEW_RESAMPLING": "AVERAGE" if legend is None else "MODE",
        "NUM_THREADS": "ALL_CPUS" if threads is None else str(threads),
        "STATISTICS": "NO",
        "OVERVIEWS": "IGNORE_EXISTING",
    }
    with removed(vrt, part, part.with_name(f"{part.name}.aux.xml")):
        vrt.write_text(
            mosaic_xml(
                sources,
                vrt.parent,
                geobox,
                legend=legend,
                bands=bands,
                tags=all_tags,
                reserve=table,
            ),
            encoding="utf-8",
        )
        try:
            with rasterio.Env(GDAL_PAM_ENABLED=False):
                rasterio.shutil.copy(str(vrt), str(part), driver="COG", **options)
        except (RasterioError, CPLE_BaseError, OSError) as error:
            raise OutputError(
                f"Cannot write {path}: {error}. The folder must be writable and have room for the "
                "map and its overviews. Free some space or choose another folder; finished shards "
                "are kept."
            ) from error
        if table is not None:
            _fill_reserved(part, table)
        if legend is not None:
            write_names(path, legend)
        os.replace(part, path)
    return path


def mosaic_xml(
    sources: Sequence[Source],
    folder: Path,
    geobox: GeoBox,
    *,
    legend: Legend | None,
    bands: Bands,
    tags: Mapping[str, str],
    reserve: str | None = None,
    absent: int | None = None,
) -> str:
    """Return a VRT of the sources, with paths relative to the VRT's folder.

    Parameters
    ----------
    reserve
        Text for which the TIFF's metadata must leave room.
    absent
        For sources that overlap: the value that leaves what another source shows, and the
        mosaic's nodata. None: they do not overlap.
    """
    height, width = (int(side) for side in geobox.shape)
    affine = geobox.affine
    transform = (affine.c, affine.a, affine.b, affine.f, affine.d, affine.e)
    lines = [
        f'<VRTDataset rasterXSize="{width}" rasterYSize="{height}">',
        f"<SRS>{escape(str(geobox.crs.to_wkt()) if geobox.crs else '')}</SRS>",
        f"<GeoTransform>{', '.join(repr(float(value)) for value in transform)}</GeoTransform>",
        "<Metadata>",
        *(f"<MDI key={quoteattr(key)}>{escape(value)}</MDI>" for key, value in tags.items()),
        "</Metadata>",
    ]
    for band in range(1, len(bands.names) + 1):
        lines += _band_xml(
            sources, folder, band, legend=legend, bands=bands, reserve=reserve, absent=absent
        )
    lines.append("</VRTDataset>")
    return "\n".join(lines)


def _band_xml(
    sources: Sequence[Source],
    folder: Path,
    band: int,
    *,
    legend: Legend | None,
    bands: Bands,
    reserve: str | None,
    absent: int | None,
) -> list[str]:
    """Return one band of a VRT, line by line."""
    nodata = CLASS_NODATA if legend is not None else CONFIDENCE_NODATA
    lines = [
        f'<VRTRasterBand dataType="Byte" band="{band}">',
        f"<Description>{escape(bands.names[band - 1])}</Description>",
        f"<NoDataValue>{nodata if absent is None else absent}</NoDataValue>",
    ]
    if reserve is not None:
        room = "x" * len(reserve.encode())
        lines.append(f'<Metadata><MDI key="{_PLACEHOLDER}">{room}</MDI></Metadata>')
    if bands.unit is not None:
        lines.append(f"<UnitType>{escape(bands.unit)}</UnitType>")
    if bands.scale is not None:
        lines.append(f"<Offset>0</Offset><Scale>{bands.scale!r}</Scale>")
    if legend is None:
        lines.append("<ColorInterp>Gray</ColorInterp>")
    else:
        lines += ["<ColorInterp>Palette</ColorInterp>", "<ColorTable>"]
        lines += [
            f'<Entry c1="{red}" c2="{green}" c3="{blue}" c4="{alpha}"/>'
            for red, green, blue, alpha in palette(legend)
        ]
        lines.append("</ColorTable>")
        if absent is not None:
            lines.append(names_xml(legend))
    kind = "SimpleSource" if absent is None else "ComplexSource"
    for source in sources:
        name = os.path.relpath(source.path.resolve(), folder.resolve())
        size = f'xSize="{source.window.width}" ySize="{source.window.height}"'
        lines += [
            f"<{kind}>",
            f'<SourceFilename relativeToVRT="1">{escape(name)}</SourceFilename>',
            f"<SourceBand>{band}</SourceBand>",
            f'<SourceProperties RasterXSize="{source.window.width}" '
            f'RasterYSize="{source.window.height}" DataType="Byte"/>',
            f'<SrcRect xOff="0" yOff="0" {size}/>',
            f'<DstRect xOff="{source.window.col}" yOff="{source.window.row}" {size}/>',
            *([] if absent is None else [f"<NODATA>{absent}</NODATA>"]),
            f"</{kind}>",
        ]
    lines.append("</VRTRasterBand>")
    return lines


def _fill_reserved(path: Path, item: str) -> None:
    """Put a metadata item where the TIFF's metadata left room for it.

    The bytes are replaced one for one before the file gets its name, so that no offset and
    nothing of the COG layout changes (opening it in update mode would move the header).
    """
    wanted = item.encode()
    pattern = re.compile(rb'<Item name="%s" sample="0">x+</Item>' % _PLACEHOLDER.encode())
    with path.open("r+b") as file:
        found = pattern.search(file.read(_HEADER_BYTES))
        if found is None or found.end() - found.start() < len(wanted):
            raise OutputError(
                f"Cannot store class names in {path}: GDAL laid out the TIFF metadata in an "
                "unexpected way. Report the GDAL version, and use another one meanwhile."
            )
        file.seek(found.start())
        file.write(wanted.ljust(found.end() - found.start()))
