"""Assemble the shards' files into the maps, and check every pixel of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cog import Source, assemble_cog, check_cog, write_cog, write_names
from ..cube.store import writing
from ..grid import Window
from ..legend import CLASS_NODATA
from .embeddings import write_embeddings
from .files import shard_path, write_raster
from .outputs import EMBEDDINGS, Layer, layers_for
from .qa import QA_LEGEND
from .segments import codec_of, segment_of, takes_segments

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["EMBEDDING_STORE", "assemble", "layer_histogram", "write_all_names"]

EMBEDDING_STORE = "embeddings.zarr"


def assemble(
    plan: PredictionPlan,
    out: Path,
    manifests: Sequence[Mapping[str, Any]],
    failed: Mapping[Window, Mapping[str, Any]],
) -> dict[str, dict[int, int]]:
    """Write a cloud-optimized GeoTIFF for each layer, and the embeddings if asked for.

    Parameters
    ----------
    manifests
        Of the shards that are done.
    failed
        Shards that were set aside, and what ``write_failed`` said of their quality codes.

    Returns
    -------
    dict
        Pixels by value of each layer, which the files were checked against.
    """
    done = [shard for shard in plan.shards if shard not in failed]
    tags = {"STCLN_GEO_RUN": plan.run_hash, "STCLN_GEO_CHECKPOINT_SHA256": plan.sha256}
    histograms = {}
    for layer in layers_for(plan.spec.outputs):
        written = {shard: one[layer.name] for shard, one in zip(done, manifests, strict=True)}
        if layer.name == "qa":
            written |= failed
        histogram = layer_histogram(plan, layer, [_counts(one) for one in written.values()])
        legend = layer.legend(plan.legend)
        path = out / f"{layer.name}.tif"
        common: dict[str, Any] = {
            "geobox": plan.geobox,
            "legend": legend,
            "bands": layer.bands(plan.legend),
            "tags": tags,
        }
        if plan.parallel_cog and takes_segments(layer, plan.shard_size):
            segments = [
                segment_of(one, _file(out, shard, layer, one), shard, plan)
                for shard, one in written.items()
            ]
            assemble_cog(segments, path, absent=layer.absent, codec=codec_of(layer), **common)
        else:
            sources = [
                Source(path=_file(out, shard, layer, one), window=shard.relative_to(plan.extent))
                for shard, one in written.items()
            ]
            if layer.absent != CLASS_NODATA:
                sources += _blank_sources(plan, out, layer)
            write_cog(sources, path, **common)
        check_cog(path, kind=layer.kind, legend=legend, histogram=histogram, geobox=plan.geobox)
        histograms[layer.name] = histogram
    if EMBEDDINGS in plan.spec.outputs:
        write_embeddings(
            [
                (shard_path(out, shard, EMBEDDINGS), shard.relative_to(plan.extent))
                for shard in done
            ],
            out / EMBEDDING_STORE,
            geobox=plan.geobox,
            dim=plan.embedding_dim,
            attrs={
                "stcln_geo:run": plan.run_hash,
                "stcln_geo:checkpoint_sha256": plan.sha256,
            },
        )
    return histograms


def layer_histogram(
    plan: PredictionPlan, layer: Layer, counted: Sequence[Counter[int]]
) -> dict[int, int]:
    """Return the pixels by value of all shards, and of the extent beyond them."""
    total: Counter[int] = Counter()
    for counts in counted:
        total.update(counts)
    bands = len(plan.legend) if layer.per_class else 1
    beyond = plan.extent.area * bands - sum(total.values())
    if beyond:
        total[layer.absent] += beyond
    return dict(sorted(total.items()))


def write_all_names(plan: PredictionPlan, out: Path) -> None:
    """Write the sidecars with the names of classes and quality codes."""
    with writing(out):
        write_names(out / "classes.tif", plan.legend)
        write_names(out / "qa.tif", QA_LEGEND)


def _file(out: Path, shard: Window, layer: Layer, written: Mapping[str, Any]) -> Path:
    return shard_path(out, shard, written.get("file", layer.name))


def _blank_sources(plan: PredictionPlan, out: Path, layer: Layer) -> list[Source]:
    """Return sources for the shards beyond the region: one file for each size of them."""
    labelled = set(plan.shards)
    sources = []
    for shard in plan.all_shards:
        if shard in labelled:
            continue
        path = out / "shards" / f"blank.{shard.height}x{shard.width}.{layer.name}.tif"
        if not path.exists():
            values = np.full(shard.shape_yx, layer.absent, dtype=np.uint8)
            write_raster(path, values, shard, crs=plan.crs, resolution=plan.resolution)
        sources.append(Source(path=path, window=shard.relative_to(plan.extent)))
    return sources


def _counts(written: Mapping[str, Any]) -> Counter[int]:
    return Counter({int(value): int(count) for value, count in written["histogram"].items()})
