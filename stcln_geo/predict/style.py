"""Write what makes a map readable: legends, QGIS styles, quick-look pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.sax.saxutils import quoteattr

import numpy as np

from ..cube.store import writing
from ..legend import Legend
from ..spreadsheet import csv_text
from .qa import QA_LEGEND

if TYPE_CHECKING:
    from PIL import Image
    from PIL.ImageFont import FreeTypeFont

__all__ = ["CONFIDENCE_STEPS", "write_legend", "write_pictures", "write_quicklook", "write_style"]

CONFIDENCE_STEPS = (
    (0, "#3b0f52", "below 20 %"),
    (20, "#414287", "20 to 39 %"),
    (40, "#2a788e", "40 to 59 %"),
    (60, "#45b36b", "60 to 79 %"),
    (80, "#f2e126", "80 to 100 %"),
)
"""Lowest percent, colour and name of the steps that confidence is drawn in."""

_SIDE = 1024
_SMALLEST = 512
_NARROWEST = 360
_TEXT = 14
_LINE = 24
_SWATCH = 14
_MARGIN = 12
_INK = (31, 42, 55, 255)


def write_legend(folder: Path, legend: Legend) -> None:
    """Write ``legend.json`` and ``legend.csv`` (code, value, name, color)."""
    _write_text(folder / "legend.json", legend.to_json() + "\n")
    head = ("code", "value", "name", "color")
    rows = ((entry.code, entry.value, entry.name, entry.color) for entry in legend.classes)
    _write_text(folder / "legend.csv", csv_text([head, *rows]))


def write_style(path: Path, legend: Legend) -> None:
    """Write a QGIS style that gives a raster of categories its colours and names."""
    entries = "\n".join(
        f'        <paletteEntry value="{entry.code}" color="{entry.color}" alpha="255" '
        f"label={quoteattr(entry.name)}/>"
        for entry in legend.classes
    )
    _write_text(
        path,
        f"""<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>
<qgis version="3.28.0" styleCategories="Symbology">
  <pipe>
    <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor="">
      <rasterTransparency/>
      <colorPalette>
{entries}
      </colorPalette>
    </rasterrenderer>
    <brightnesscontrast brightness="0" contrast="0" gamma="1"/>
    <huesaturation saturation="0" grayscaleMode="0" colorizeOn="0"/>
    <rasterresampler maxOversampling="2"/>
    <resamplingStage>resamplingFilter</resamplingStage>
  </pipe>
  <blendMode>0</blendMode>
</qgis>
""",
    )


def write_pictures(folder: Path, legend: Legend) -> None:
    """Write ``quicklook.png``, ``confidence.png`` and ``qa.png`` of the maps in a folder."""
    for picture, raster, names in (
        ("quicklook", "classes", legend),
        ("qa", "qa", QA_LEGEND),
    ):
        write_quicklook(
            folder / f"{picture}.png",
            folder / f"{raster}.tif",
            {entry.code: entry.color for entry in names.classes},
            [(entry.color, entry.name) for entry in names.classes],
        )
    write_quicklook(
        folder / "confidence.png",
        folder / "confidence.tif",
        {percent: color for low, color, _ in CONFIDENCE_STEPS for percent in range(low, 101)},
        [(color, name) for _, color, name in CONFIDENCE_STEPS],
    )


def write_quicklook(
    path: Path, raster: Path, colors: Mapping[int, str], entries: Sequence[tuple[str, str]]
) -> None:
    """Write a picture of a raster with its legend below.

    Parameters
    ----------
    raster
        uint8; a large one is read from its overviews, a small one enlarged by a whole number.
    colors
        ``#rrggbb`` by value; other values stay clear.
    entries
        Colour and name of each line of the legend.
    """
    import rasterio
    from PIL import Image

    with rasterio.open(raster) as source:
        shrink = max(max(source.shape) / _SIDE, 1.0)
        height, width = (max(round(side / shrink), 1) for side in source.shape)
        values = source.read(1, out_shape=(height, width))
    table = np.zeros((256, 4), dtype=np.uint8)
    for value, color in colors.items():
        table[value] = (*bytes.fromhex(color[1:]), 255)
    enlarged = max(_SMALLEST // max(values.shape), 1)
    pixels = table[values].repeat(enlarged, axis=0).repeat(enlarged, axis=1)
    legend = _legend_picture(entries, max(pixels.shape[1], _NARROWEST))
    picture = Image.new("RGBA", (legend.width, pixels.shape[0] + legend.height))
    picture.paste(Image.fromarray(pixels), (0, 0))
    picture.paste(legend, (0, pixels.shape[0]))
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path.parent):
        try:
            picture.save(part, format="PNG", optimize=True)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _legend_picture(entries: Sequence[tuple[str, str]], width: int) -> Image.Image:
    """Draw a legend on white, in as many columns as its names and the width allow."""
    from PIL import Image, ImageDraw

    font = _font()
    gap = _SWATCH + _MARGIN
    cell = max((gap + int(font.getlength(name)) + _MARGIN for _, name in entries), default=gap)
    columns = max((width - _MARGIN) // cell, 1)
    rows = -(-len(entries) // columns)
    size = (max(width, cell + _MARGIN), rows * _LINE + _MARGIN)
    picture = Image.new("RGBA", size, (255, 255, 255, 255))
    draw = ImageDraw.Draw(picture)
    for index, (color, name) in enumerate(entries):
        left = _MARGIN + index % columns * cell
        top = _MARGIN // 2 + index // columns * _LINE
        box = (left, top + 5, left + _SWATCH, top + 5 + _SWATCH)
        draw.rectangle(box, fill=color, outline=_INK)
        draw.text((left + gap - 4, top + 3), name, fill=_INK, font=font)
    return picture


def _font() -> FreeTypeFont:
    """Return the font that comes with matplotlib: it knows more letters than Pillow's own."""
    import matplotlib
    from PIL import ImageFont

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(file), _TEXT)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path.parent):
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
