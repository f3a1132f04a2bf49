"""Write the final rasters: shard files -> VRT -> GDAL's COG driver.

Class maps carry their palette, nodata, legend and names inside the file. Names also go to the
``.aux.xml`` sidecar, where GDAL before 3.12 (and so most of QGIS) looks for them; GDAL 3.12
and later read them from the attribute table that is stored in the TIFF itself.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape, quoteattr

from ..errors import OutputError
from ..grid import Window
from ..legend import CLASS_NODATA, Legend

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "CONFIDENCE_NODATA",
    "KIND_TAG",
    "LEGEND_TAG",
    "Bands",
    "Source",
    "read_legend",
    "write_cog",
    "write_names",
]

CONFIDENCE_NODATA = 255
"""Nodata of confidence maps; confidences are 0 to 100 percent."""

KIND_TAG = "STCLN_GEO_KIND"
"""TIFF tag: ``classes``, ``confidence``, ``scaled`` or ``counts``; see ``validate_cog``."""

LEGEND_TAG = "STCLN_GEO_LEGEND"
"""TIFF tag with the legend as JSON."""

_BLOCK = 512
_HEADER_BYTES = 1 << 24  # the metadata stands before the first pixel
_PLACEHOLDER = "STCLN_GEO_RESERVED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One file of a mosaic and where it lies in the final raster."""

    path: Path
    """GeoTIFF of uint8, with the bands of the final raster."""

    window: Window
    """Its place, counted from the final raster's first pixel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """The bands of a raster of numbers, and what they mean."""

    kind: str = "confidence"
    """``confidence`` (percent), ``scaled`` (0 to 250, times ``scale``) or ``counts``."""
    names: tuple[str, ...] = ("confidence",)
    scale: float | None = None
    """What a value is multiplied by, written into the file."""
    unit: str | None = None
    description: str | None = None
    """A sentence for the file's metadata."""


def write_cog(
    sources: Sequence[Source],
    path: str | Path,
    *,
    geobox: GeoBox,
    legend: Legend | None,
    bands: Bands | None = None,
    tags: Mapping[str, str] | None = None,
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
    table = None if legend is None else _table_item(legend)
    bands = bands or Bands()
    all_tags = {KIND_TAG: bands.kind if legend is None else "classes", **(tags or {})}
    if legend is None and bands.description is not None:
        all_tags["TIFFTAG_IMAGEDESCRIPTION"] = bands.description
    if legend is not None:
        all_tags[LEGEND_TAG] = legend.to_json()
    options = {
        "COMPRESS": "DEFLATE",
        "LEVEL": "6",
        "PREDICTOR": "NO" if legend is not None else "YES",
        "BLOCKSIZE": str(_BLOCK),
        "BIGTIFF": "IF_SAFER",
        "OVERVIEW_RESAMPLING": "AVERAGE" if legend is None else "MODE",
        "NUM_THREADS": "ALL_CPUS" if threads is None else str(threads),
        "STATISTICS": "NO",
        "OVERVIEWS": "IGNORE_EXISTING",
    }
    with _removed(vrt, part, part.with_name(f"{part.name}.aux.xml")):
        vrt.write_text(
            _mosaic_xml(
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


def write_names(path: str | Path, legend: Legend) -> Path:
    """Write the sidecar ``<name>.aux.xml`` that gives a class map's names to GIS programs."""
    sidecar = Path(path).with_name(f"{Path(path).name}.aux.xml")
    part = sidecar.with_name(f".{sidecar.name}.{os.getpid()}.part")
    with _removed(part):
        part.write_text(_sidecar_xml(legend), encoding="utf-8")
        os.replace(part, sidecar)
    return sidecar


def read_legend(path: str | Path) -> Legend | None:
    """Return the legend stored in a class map, or None where it has none."""
    import rasterio

    with rasterio.open(path) as source:
        text = source.tags().get(LEGEND_TAG)
    return None if text is None else Legend.from_json(text)


@contextlib.contextmanager
def _removed(*paths: Path) -> Iterator[None]:
    """Remove temporary files on the way out, whatever happens."""
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _mosaic_xml(
    sources: Sequence[Source],
    folder: Path,
    geobox: GeoBox,
    *,
    legend: Legend | None,
    bands: Bands,
    tags: Mapping[str, str],
    reserve: str | None,
) -> str:
    """Return a VRT of the sources, with paths relative to the VRT's folder.

    ``reserve`` is text for which the TIFF's metadata must leave room.
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
    names = bands.names if legend is None else ("class",)
    for band, name in enumerate(names, 1):
        lines += _band_xml(sources, folder, band, name, legend=legend, bands=bands, reserve=reserve)
    lines.append("</VRTDataset>")
    return "\n".join(lines)


def _band_xml(
    sources: Sequence[Source],
    folder: Path,
    band: int,
    name: str,
    *,
    legend: Legend | None,
    bands: Bands,
    reserve: str | None,
) -> list[str]:
    """Return one band of a VRT, line by line."""
    lines = [
        f'<VRTRasterBand dataType="Byte" band="{band}">',
        f"<Description>{escape(name)}</Description>",
        f"<NoDataValue>{CLASS_NODATA if legend is not None else CONFIDENCE_NODATA}</NoDataValue>",
    ]
    if reserve is not None:
        room = "x" * len(reserve.encode())
        lines.append(f'<Metadata><MDI key="{_PLACEHOLDER}">{room}</MDI></Metadata>')
    if legend is None:
        if bands.unit is not None:
            lines.append(f"<UnitType>{escape(bands.unit)}</UnitType>")
        if bands.scale is not None:
            lines.append(f"<Offset>0</Offset><Scale>{bands.scale!r}</Scale>")
        lines.append("<ColorInterp>Gray</ColorInterp>")
    else:
        lines += ["<ColorInterp>Palette</ColorInterp>", "<ColorTable>"]
        lines += [
            f'<Entry c1="{red}" c2="{green}" c3="{blue}" c4="{alpha}"/>'
            for red, green, blue, alpha in _palette(legend)
        ]
        lines.append("</ColorTable>")
    for source in sources:
        file = os.path.relpath(source.path.resolve(), folder.resolve())
        size = f'xSize="{source.window.width}" ySize="{source.window.height}"'
        lines += [
            "<SimpleSource>",
            f'<SourceFilename relativeToVRT="1">{escape(file)}</SourceFilename>',
            f"<SourceBand>{band}</SourceBand>",
            f'<SourceProperties RasterXSize="{source.window.width}" '
            f'RasterYSize="{source.window.height}" DataType="Byte"/>',
            f'<SrcRect xOff="0" yOff="0" {size}/>',
            f'<DstRect xOff="{source.window.col}" yOff="{source.window.row}" {size}/>',
            "</SimpleSource>",
        ]
    lines.append("</VRTRasterBand>")
    return lines


def _palette(legend: Legend) -> list[tuple[int, int, int, int]]:
    """Return 256 colours: the classes', black for codes without one, clear for nodata."""
    colors = legend.colormap()
    palette = [colors.get(code, (0, 0, 0, 255)) for code in range(256)]
    palette[CLASS_NODATA] = (0, 0, 0, 0)
    return palette


def _attribute_table(legend: Legend) -> str:
    """Return GDAL's XML of a thematic table: value, class name, colour."""
    columns = (
        ("Value", "Integer", 0, "MinMax", 5),
        ("Class", "String", 2, "Name", 2),
        ("Red", "Integer", 0, "Red", 6),
        ("Green", "Integer", 0, "Green", 7),
        ("Blue", "Integer", 0, "Blue", 8),
    )
    parts = ['<GDALRasterAttributeTable tableType="thematic">']
    parts += [
        f'<FieldDefn index="{index}"><Name>{name}</Name>'
        f'<Type typeAsString="{kind}">{kind_code}</Type>'
        f'<Usage usageAsString="{usage}">{usage_code}</Usage></FieldDefn>'
        for index, (name, kind, kind_code, usage, usage_code) in enumerate(columns)
    ]
    colors = legend.colormap()
    for row, entry in enumerate(legend.classes):
        cells = (entry.code, escape(entry.name), *colors[entry.code][:3])
        parts.append(f'<Row index="{row}">{"".join(f"<F>{cell}</F>" for cell in cells)}</Row>')
    parts.append("</GDALRasterAttributeTable>")
    return "".join(parts)


def _sidecar_xml(legend: Legend) -> str:
    """Return the ``.aux.xml`` with category names and attribute table."""
    names = "".join(f"<Category>{escape(name)}</Category>" for name in legend.names)
    return (
        '<PAMDataset>\n<PAMRasterBand band="1">\n'
        f"<CategoryNames>{names}</CategoryNames>\n{_attribute_table(legend)}\n"
        "</PAMRasterBand>\n</PAMDataset>\n"
    )


def _table_item(legend: Legend) -> str:
    """Return the attribute table as GDAL >= 3.12 stores it in a TIFF's metadata."""
    return (
        '<Item name="DEFAULT_RASTER_ATTRIBUTE_TABLE" sample="0" role="rat">'
        f"{_attribute_table(legend)}</Item>"
    )


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
