"""Describe a run for ``run.json``."""

from __future__ import annotations

import datetime
import json
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..legend import CLASS_NODATA
from ..storage import public_name
from .qa import reasons

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["describe_run"]


def describe_run(
    plan: PredictionPlan,
    manifests: Sequence[Mapping[str, Any]],
    histograms: Mapping[str, Mapping[int, int]],
    *,
    failed: Sequence[Mapping[str, Any]],
    seams: Mapping[str, Any] | None,
    label_seconds: float,
    assemble_seconds: float,
) -> dict[str, Any]:
    """Return the content of ``run.json``: what ran on what, how, how fast, and what came out.

    Parameters
    ----------
    manifests
        Of the shards that are done.
    histograms
        Pixels by value, by layer.
    failed
        Shards that were set aside.
    seams
        What the seam audit found.
    """
    fresh = [one for one in manifests if "reused" not in one]
    pixels = sum(one["labelled_pixels"] for one in manifests)
    fresh_km2 = sum(one["labelled_pixels"] for one in fresh) * plan.resolution**2 / 1e6
    spec = {key: value for key, value in asdict(plan.spec).items() if value is not None}
    if plan.smoothing is not None:
        spec["smooth_window"] = plan.smoothing.window
    return {
        "run": plan.run_hash,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cube": public_name(plan.cube),
        "season": plan.season,
        "checkpoint": public_name(plan.checkpoint),
        "checkpoint_sha256": plan.sha256,
        "spec": {
            **spec,
            "window": plan.lattice.window,
            "halo": plan.lattice.halo,
            "shard_size": plan.shard_size,
            "cog_writer": "parallel" if plan.parallel_cog else "gdal",
        },
        "devices": sorted({one["device"] for one in manifests}),
        "precisions": sorted({one["precision"] for one in manifests}),
        "crs": plan.crs,
        "shape": list(plan.extent.shape_yx),
        "transform": [float(value) for value in tuple(plan.geobox.affine)[:6]],
        "dates": list(plan.dates),
        "legend": json.loads(plan.legend.to_json()),
        "histogram": _plain(histograms["classes"]),
        "quality_codes": _plain(histograms["qa"]),
        "quality": reasons(histograms["qa"]),
        "layers": list(plan.layer_names),
        "confidence_mean": _mean(histograms["confidence"]),
        "sieve": None
        if plan.sieve is None
        else {
            **plan.sieve.to_json(),
            "reach": plan.sieve.reach,
            "merged_pixels": sum(one["merged_pixels"] for one in manifests),
        },
        "seam_audit": seams,
        "failed_shards": list(failed),
        "shards": len(plan.shards),
        "resumed_shards": len(manifests) - len(fresh),
        "windows": sum(one["windows"] for one in manifests),
        "owned_pixels": pixels,
        "owned_km2": round(pixels * plan.resolution**2 / 1e6, 6),
        "seconds": {
            "label": round(label_seconds, 3),
            "assemble": round(assemble_seconds, 3),
            "shards": _shard_seconds(fresh),
        },
        "km2_per_second": round(fresh_km2 / label_seconds, 6) if label_seconds > 0 else None,
        "warnings": [*plan.warnings, *_mixed(manifests)],
        "notes": list(plan.notes),
        **({} if plan.source is None else {"source": plan.source.describe(manifests)}),
        "versions": _versions(),
    }


def _shard_seconds(manifests: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return what the workers' time on shards went into; None where no shard was labelled.

    "read" runs beside the network; "wait" is what the network waited for it, "device" what the
    device was busy, "write" what the shards' files took. "idle" is the rest of the device's time.
    """
    if not manifests:
        return None
    names = ("total", "read", "wait", "device", "write")
    summed = {name: sum(one["seconds"][name] for one in manifests) for name in names}
    summed["idle"] = max(summed["total"] - summed["device"], 0.0)
    return {name: round(value, 3) for name, value in summed.items()}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "numpy", "zarr", "rasterio", "odc-geo", "rio-cogeo")
    found = {name: version(name) for name in names}
    return {"stcln-geo": __version__, "python": platform.python_version(), **found}


def _mixed(manifests: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say it where shards were not all labelled by one kind of device at one precision."""
    shards = Counter(f"{one['precision']} on {one['device']}" for one in manifests)
    if len(shards) < 2:
        return []
    found = ", ".join(f"{count} of {len(manifests)} in {how}" for how, count in shards.items())
    return [
        f"Shards were not all labelled alike ({found}), so classes that are almost equally likely "
        "may change from one shard to the next. Name --device and --precision for one way "
        "everywhere."
    ]


def _plain(histogram: Mapping[int, int]) -> dict[str, int]:
    return {str(value): count for value, count in histogram.items()}


def _mean(histogram: Mapping[int, int]) -> float | None:
    """Return the mean of the values of mapped pixels, or None where there are none."""
    mapped = {value: count for value, count in histogram.items() if value != CLASS_NODATA}
    total = sum(mapped.values())
    return round(sum(v * n for v, n in mapped.items()) / total, 2) if total else None
