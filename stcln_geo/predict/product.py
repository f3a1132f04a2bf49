"""Write what people and catalogs open beside the maps: STAC item, quick-look, legends, style."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy as np

from .. import __version__
from ..cube.store import write_json, writing
from ..legend import CLASS_NODATA, Legend
from ..region import Region

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["write_item", "write_legend", "write_quicklook", "write_style"]

_QUICKLOOK_SIDE = 1024
_PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"


def write_legend(folder: Path, legend: Legend) -> None:
    """Write ``legend.json`` and ``legend.csv`` (code, value, name, color)."""
    _write_text(folder / "legend.json", legend.to_json() + "\n")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["code", "value", "name", "color"])
    table.writerows([entry.code, entry.value, entry.name, entry.color] for entry in legend.classes)
    _write_text(folder / "legend.csv", text.getvalue())


def write_style(path: Path, legend: Legend) -> None:
    """Write a QGIS style, which gives the map its colours and names."""
    entries = "".join(
        f'<paletteEntry value="{entry.code}" color="{entry.color}" alpha="255" '
        f"label={quoteattr(entry.name)}/>"
        for entry in legend.classes
    )
    _write_text(
        path,
        '<qgis styleCategories="Symbology"><pipe>'
        '<rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor="">'
        f"<colorPalette>{entries}</colorPalette></rasterrenderer></pipe></qgis>\n",
    )


def write_quicklook(path: Path, classes: Path, legend: Legend) -> None:
    """Write a small PNG of the class map: the legend's colours, clear where there is no label."""
    import rasterio

    with rasterio.open(classes) as source:
        shrink = max(max(source.shape) / _QUICKLOOK_SIDE, 1.0)
        height, width = (max(round(side / shrink), 1) for side in source.shape)
        codes = source.read(1, out_shape=(height, width))
    colors = np.zeros((256, 4), dtype=np.uint8)
    for code, color in legend.colormap().items():
        colors[code] = color
    picture = colors[codes].transpose(2, 0, 1)  # (H, W, 4) -> (4, H, W)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with (
            rasterio.MemoryFile() as memory,
            rasterio.Env(GDAL_PAM_ENABLED=False),
            _quiet_georeferencing(),
        ):
            with memory.open(
                driver="PNG", count=4, height=height, width=width, dtype="uint8"
            ) as target:
                target.write(picture)
            with writing(path.parent):
                part.write_bytes(memory.getbuffer())
                os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_item(path: Path, plan: PredictionPlan, run: dict[str, Any]) -> None:
    """Write the STAC item of the product, with hrefs relative to it.

    Parameters
    ----------
    run
        Content of ``run.json``.
    """
    import pystac
    from pystac.extensions.projection import ProjectionExtension
    from shapely.geometry import shape

    footprint = Region.from_projected(plan.aoi, plan.crs, source="the plan").to_json()
    first, last = (_moment(date) for date in plan.dates)
    item = pystac.Item(
        id=f"{path.resolve().parent.name}-{plan.season}",
        geometry=footprint,
        bbox=list(shape(footprint).bounds),
        datetime=None,
        start_datetime=first,
        end_datetime=last,
        properties={
            "created": run["finished"],
            "title": f"Crop map of the season from {plan.season}",
            "gsd": plan.resolution,
            "processing:software": {"stcln-geo": __version__},
            "processing:lineage": (
                f"STCLN classification of the cube season {plan.season} "
                f"({plan.date_count} dates), windows of {plan.lattice.window} px with a halo of "
                f"{plan.lattice.halo} px"
            ),
            "stcln_geo:checkpoint_sha256": plan.sha256,
            "stcln_geo:run": plan.run_hash,
        },
        stac_extensions=[_PROCESSING],
    )
    geobox = plan.geobox
    known = plan.crs.startswith("EPSG:")
    ProjectionExtension.ext(item, add_if_missing=True).apply(
        code=plan.crs if known else None,
        wkt2=None if known else plan.crs,
        shape=list(plan.extent.shape_yx),
        transform=[float(value) for value in tuple(geobox.affine)[:6]],
        bbox=[float(value) for value in geobox.boundingbox],
    )
    for key, asset in _assets().items():
        item.add_asset(key, asset)
    _describe_bands(item, plan, run)
    write_json(path, item.to_dict(include_self_link=False))


def _assets() -> dict[str, Any]:
    from pystac import Asset, MediaType

    rows = (
        ("classes", "classes.tif", MediaType.COG, "Crop classes", ["data"]),
        ("confidence", "confidence.tif", MediaType.COG, "Confidence in percent", ["data"]),
        ("legend", "legend.json", MediaType.JSON, "Legend", ["metadata"]),
        ("style", "classes.qml", MediaType.XML, "QGIS style", ["metadata"]),
        ("run", "run.json", MediaType.JSON, "How it was made", ["metadata"]),
        ("quicklook", "quicklook.png", MediaType.PNG, "Quick-look", ["overview", "thumbnail"]),
    )
    return {
        key: Asset(href=f"./{name}", media_type=kind, title=title, roles=roles)
        for key, name, kind, title, roles in rows
    }


def _describe_bands(item: Any, plan: PredictionPlan, run: dict[str, Any]) -> None:
    """Add data type, nodata and the meaning of the codes to the rasters."""
    from pystac.extensions.classification import Classification, ClassificationExtension
    from pystac.extensions.raster import DataType, RasterBand, RasterExtension

    histogram = {int(value): count for value, count in run["histogram"].items()}
    total = max(sum(count for value, count in histogram.items() if value != CLASS_NODATA), 1)
    classes = [
        Classification.create(
            value=entry.code,
            name=re.sub(r"[^0-9A-Za-z_-]+", "-", entry.name).strip("-") or f"class-{entry.code}",
            title=entry.name,
            color_hint=entry.color[1:].upper(),
            count=histogram.get(entry.code, 0),
            percentage=round(100 * histogram.get(entry.code, 0) / total, 4),
        )
        for entry in plan.legend.classes
    ]
    classes.append(
        Classification.create(value=CLASS_NODATA, name="nodata", title="No label", nodata=True)
    )
    ClassificationExtension.ext(item.assets["classes"], add_if_missing=True).apply(classes=classes)
    for key, unit in (("classes", None), ("confidence", "percent")):
        band = RasterBand.create(
            nodata=CLASS_NODATA,
            data_type=DataType.UINT8,
            spatial_resolution=plan.resolution,
            unit=unit,
        )
        RasterExtension.ext(item.assets[key], add_if_missing=True).apply(bands=[band])


def _moment(date: str) -> Any:
    import datetime

    return datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)


def _quiet_georeferencing() -> Any:
    """Silence the note that a PNG has no place on the globe."""
    import warnings

    from rasterio.errors import NotGeoreferencedWarning

    return warnings.catch_warnings(action="ignore", category=NotGeoreferencedWarning)


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path.parent):
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
