"""Write the STAC item that describes a map to catalogs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..cube.store import write_json
from ..cube.stored import ITEMS_FILE
from ..legend import CLASS_NODATA, Legend, plain_names
from ..region import Region
from .assemble import EMBEDDING_STORE
from .outputs import EMBEDDINGS, Layer, layers_for
from .source import SEARCH_FOLDER

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["write_item"]

_ZARR = "application/vnd+zarr"
_PARQUET = "application/vnd.apache.parquet"
_PROCESSING = "https://stac-extensions.github.io/processing/v1.2.0/schema.json"


def write_item(path: Path, plan: PredictionPlan, run: dict[str, Any]) -> None:
    """Write the STAC item of the product, with hrefs relative to it.

    Parameters
    ----------
    run
        Content of ``run.json``.
    """
    import pystac
    from pystac.extensions.projection import ProjectionExtension

    region = Region.from_projected(plan.aoi, plan.crs, source="the plan")
    first, last = (_moment(date) for date in plan.dates)
    item = pystac.Item(
        id=f"{path.resolve().parent.name}-{plan.season}",
        geometry=region.to_json(),
        bbox=region.bbox,
        datetime=None,
        start_datetime=first,
        end_datetime=last,
        properties={
            "created": run["finished"],
            "title": f"Crop map of the season from {plan.season}",
            "gsd": plan.resolution,
            "processing:software": {"stcln-geo": __version__},
            "processing:lineage": (
                f"STCLN classification of {_pixels(plan)} ({plan.date_count} dates), windows of "
                f"{plan.lattice.window} px with a halo of {plan.lattice.halo} px, "
                + ("blended where they overlap" if plan.spec.blend else "merged by their cores")
                + ("" if plan.smoothing is None else f", {plan.smoothing.method} smoothing")
                + (
                    ""
                    if plan.sieve is None
                    else f", patches below {plan.sieve.hectares:g} ha merged"
                )
            ),
            "stcln_geo:checkpoint_sha256": plan.sha256,
            "stcln_geo:run": plan.run_hash,
            **_found(run),
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
    for key, asset in _assets(plan).items():
        item.add_asset(key, asset)
    _describe_bands(item, plan, run)
    write_json(path, item.to_dict(include_self_link=False))


def _assets(plan: PredictionPlan) -> dict[str, Any]:
    from pystac import Asset, MediaType

    rows: list[tuple[str, str, str, str, list[str]]] = [
        (layer.name, f"{layer.name}.tif", MediaType.COG, layer.title, [_role(layer)])
        for layer in layers_for(plan.spec.outputs)
    ]
    if EMBEDDINGS in plan.spec.outputs:
        rows.append(
            (EMBEDDINGS, EMBEDDING_STORE, _ZARR, "Features before the classifier", ["data"])
        )
    rows += [
        ("legend", "legend.json", MediaType.JSON, "Legend", ["metadata"]),
        ("style", "classes.qml", MediaType.XML, "QGIS style", ["metadata"]),
        ("run", "run.json", MediaType.JSON, "How it was made", ["metadata"]),
        ("report", "report.html", MediaType.HTML, "Report of the run", ["metadata"]),
        ("quicklook", "quicklook.png", MediaType.PNG, "Quick-look", ["overview", "thumbnail"]),
    ]
    if plan.source is not None:
        name = f"{SEARCH_FOLDER}/{ITEMS_FILE}"
        rows.append(("items", name, _PARQUET, "The images it was made from", ["metadata"]))
    return {
        key: Asset(href=f"./{name}", media_type=kind, title=title, roles=roles)
        for key, name, kind, title, roles in rows
    }


def _pixels(plan: PredictionPlan) -> str:
    """Say what was classified."""
    if plan.source is None:
        return f"the cube season {plan.season}"
    return f"{len(plan.source.plan.scenes)} scenes of {plan.source.plan.catalog}"


def _found(run: dict[str, Any]) -> dict[str, Any]:
    """Return what the item tells of a search, where there is no cube that would."""
    source = run.get("source")
    if source is None:
        return {}
    return {
        "stcln_geo:catalog": source["catalog"],
        "stcln_geo:collection": source["collection"],
        "stcln_geo:items": source["items"],
        "stcln_geo:left_out": source["left_out"],
        "stcln_geo:offsets": source["offsets"],
    }


def _role(layer: Layer) -> str:
    return "data" if layer.decided else "metadata"


def _describe_bands(item: Any, plan: PredictionPlan, run: dict[str, Any]) -> None:
    """Add data type, nodata, scale and the meaning of the codes to the rasters."""
    from pystac.extensions.classification import ClassificationExtension
    from pystac.extensions.raster import DataType, RasterBand, RasterExtension

    for layer in layers_for(plan.spec.outputs):
        asset = item.assets[layer.name]
        asset.description = layer.description
        bands = layer.bands(plan.legend)
        names = plan.legend.names if layer.per_class else (None,)
        RasterExtension.ext(asset, add_if_missing=True).apply(
            bands=[
                RasterBand.create(
                    nodata=CLASS_NODATA,
                    data_type=DataType.UINT8,
                    spatial_resolution=plan.resolution,
                    unit=layer.unit,
                    scale=None if bands is None else bands.scale,
                    offset=0 if bands is not None and bands.scale is not None else None,
                )
                for _ in names
            ]
        )
        if layer.per_class:
            for band, name in zip(asset.extra_fields["raster:bands"], names, strict=True):
                band["name"] = name
        legend = layer.legend(plan.legend)
        if legend is not None:
            counts = run["histogram"] if layer.name == "classes" else run["quality_codes"]
            nodata = layer.name == "classes"
            ClassificationExtension.ext(asset, add_if_missing=True).apply(
                classes=_classes(legend, counts, nodata=nodata)
            )


def _classes(legend: Legend, counts: dict[str, int], *, nodata: bool) -> list[Any]:
    """Return what the codes of a raster of categories mean, and how often they occur."""
    from pystac.extensions.classification import Classification

    numbers = {int(value): count for value, count in counts.items()}
    plain = plain_names({entry.code: entry.name for entry in legend.classes})
    total = max(sum(count for value, count in numbers.items() if value != CLASS_NODATA), 1)
    classes = [
        Classification.create(
            value=entry.code,
            name=plain[entry.code],
            title=entry.name,
            color_hint=entry.color[1:].upper(),
            count=numbers.get(entry.code, 0),
            percentage=round(100 * numbers.get(entry.code, 0) / total, 4),
        )
        for entry in legend.classes
    ]
    if nodata:
        classes.append(
            Classification.create(value=CLASS_NODATA, name="nodata", title="No label", nodata=True)
        )
    return classes


def _moment(date: str) -> Any:
    import datetime

    return datetime.datetime.fromisoformat(date).replace(tzinfo=datetime.UTC)
