"""What the pixels of a map mean, as GIS programs read it: names, colours, kind.

Names stand in three places. The tag ``STCLN_GEO_LEGEND`` holds the legend as JSON. An attribute
table in the TIFF's metadata is read by GDAL 3.12 and later, and the ``.aux.xml`` sidecar by GDAL
before that, and so by most of QGIS.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from ..legend import CLASS_NODATA, Legend

__all__ = [
    "CLASS_BANDS",
    "CONFIDENCE_NODATA",
    "KIND_TAG",
    "LEGEND_TAG",
    "Bands",
    "map_tags",
    "names_xml",
    "palette",
    "read_legend",
    "removed",
    "table_item",
    "write_names",
]

CONFIDENCE_NODATA = 255
"""Nodata of confidence maps; confidences are 0 to 100 percent."""

KIND_TAG = "STCLN_GEO_KIND"
"""TIFF tag: ``classes``, ``confidence``, ``scaled`` or ``counts``; see ``validate_cog``."""

LEGEND_TAG = "STCLN_GEO_LEGEND"
"""TIFF tag with the legend as JSON."""


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


CLASS_BANDS = Bands(kind="classes", names=("class",))
"""The one band of a map of categories."""


def map_tags(legend: Legend | None, bands: Bands, tags: Mapping[str, str] | None) -> dict[str, str]:
    """Return all text tags of a map."""
    found = {KIND_TAG: bands.kind, **(tags or {})}
    if bands.description is not None:
        found["TIFFTAG_IMAGEDESCRIPTION"] = bands.description
    if legend is not None:
        found[LEGEND_TAG] = legend.to_json()
    return found


def write_names(path: str | Path, legend: Legend) -> Path:
    """Write the sidecar ``<name>.aux.xml`` that gives a class map's names to GIS programs."""
    sidecar = Path(path).with_name(f"{Path(path).name}.aux.xml")
    part = sidecar.with_name(f".{sidecar.name}.{os.getpid()}.part")
    with removed(part):
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
def removed(*paths: Path) -> Iterator[None]:
    """Remove temporary files on the way out, whatever happens."""
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def palette(legend: Legend) -> list[tuple[int, int, int, int]]:
    """Return 256 colours: the classes', black for codes without one, clear for nodata."""
    colors = legend.colormap()
    listed = [colors.get(code, (0, 0, 0, 255)) for code in range(256)]
    listed[CLASS_NODATA] = (0, 0, 0, 0)
    return listed


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


def names_xml(legend: Legend) -> str:
    """Return category names and attribute table as GDAL's XML has them in a band."""
    names = "".join(f"<Category>{escape(name)}</Category>" for name in legend.names)
    return f"<CategoryNames>{names}</CategoryNames>\n{_attribute_table(legend)}"


def _sidecar_xml(legend: Legend) -> str:
    """Return the ``.aux.xml`` with category names and attribute table."""
    return (
        f'<PAMDataset>\n<PAMRasterBand band="1">\n{names_xml(legend)}\n'
        "</PAMRasterBand>\n</PAMDataset>\n"
    )


def table_item(legend: Legend) -> str:
    """Return the attribute table as GDAL >= 3.12 stores it in a TIFF's metadata."""
    return (
        '<Item name="DEFAULT_RASTER_ATTRIBUTE_TABLE" sample="0" role="rat">'
        f"{_attribute_table(legend)}</Item>"
    )
