"""Predict a whole region: plan, label the shards, assemble, validate, describe.

Every step can be killed and run again: finished shards are kept by their manifests, the maps
appear under their names only when whole, ``run.json`` comes last.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import time
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..cog import Source, assemble_cog, check_cog, write_cog, write_names
from ..cube.store import Season, open_season, write_json, writing
from ..errors import OutputError, StclnGeoWarning
from ..execution import Execution, ProgressHook, run_tasks
from ..legend import CLASS_NODATA
from ..model.checkpoint import read_metadata
from ..region import Region
from ..storage import Location, location
from .plan import PredictionPlan, PredictSpec, crs_name, plan_prediction
from .product import write_item, write_legend, write_quicklook, write_style
from .segments import segment_of
from .shard import LAYERS, PLAN_FILE, ShardTask, predict_shard, shard_path

if TYPE_CHECKING:
    import xarray as xr
    from shapely.geometry.base import BaseGeometry

__all__ = ["Prediction", "predict_region", "run_prediction"]

_RUN_FILE = "run.json"
_CUBE = "cube.zarr"
_MAPS = ("classes.tif", "confidence.tif")
_COMPANIONS = (
    "classes.tif.aux.xml", "classes.qml", "quicklook.png", "legend.json", "legend.csv", "item.json",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A finished product."""

    out: Path
    classes: Path
    """COG of class codes, uint8, 255 = nodata."""
    confidence: Path
    """COG of the winning class's probability in percent, uint8, 255 = nodata."""
    item: Path
    """STAC item."""
    histogram: dict[int, int]
    """Pixels by class code; 255 counts those without a label."""
    pixels: int
    """Pixels with a label."""
    windows: int
    """Windows the network ran on."""
    seconds: float
    """Of the shards and the assembly, when they were made."""
    resumed_shards: int
    """Shards that an earlier call had finished."""


def predict_region(
    cube: str | Location | xr.Dataset,
    checkpoint: str | Path,
    out: str | Path,
    *,
    season: str | None = None,
    region: Region | BaseGeometry | str | Path | None = None,
    spec: PredictSpec | None = None,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
) -> Prediction:
    """Map a region, wall to wall, into a folder.

    Parameters
    ----------
    cube
        Path of a cube; or any dataset with a CRS and time whose bands have common names, which
        is first written as a cube into the folder.
    checkpoint
        Fine-tuned classifier: a file or a run directory.
    out
        Folder of the product. A call that was cut short continues; a finished one is kept.
    season
        Which of the cube's seasons; by default the only one.
    region
        A part of the cube's region: a region, a vector file, or a geometry in the cube's CRS.
    overwrite
        Replace the product of another run in the folder.

    Raises
    ------
    StclnGeoError
        If inputs do not fit together, or the folder holds another run.
    """
    out = Path(out)
    cube_path = _as_cube(cube, out)
    opened = open_season(cube_path, season)
    info = read_metadata(checkpoint)
    plan = plan_prediction(opened, info, spec or PredictSpec(), region=_as_region(region, opened))
    return run_prediction(plan, out, execution=execution, progress=progress, overwrite=overwrite)


def run_prediction(
    plan: PredictionPlan,
    out: str | Path,
    *,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
) -> Prediction:
    """Do what a plan says; see ``predict_region``."""
    out = Path(out).resolve()
    execution = execution or Execution()
    for text in plan.warnings:
        warnings.warn(text, StclnGeoWarning, stacklevel=2)
    _claim(plan, out, overwrite=overwrite)
    finished = _finished(plan, out)
    if finished is not None:
        return finished

    started = time.monotonic()
    threads = execution.threads
    if execution.scheduler is None:
        threads = execution.threads_per_worker
    elif threads is None:
        threads = 1  # a scheduler's worker runs as many tasks at once as it has threads
    tasks = [
        ShardTask(
            out=str(out),
            run=plan.run_hash,
            shard=(shard.row, shard.col, shard.height, shard.width),
            threads=threads,
        )
        for shard in plan.shards
    ]
    manifests = run_tasks(
        predict_shard, tasks, execution=execution, label="shard", progress=progress
    )
    labelled = time.monotonic()
    histograms = {name: _total(plan, manifests, name) for name in LAYERS}
    _assemble(plan, out, manifests, histograms)
    run = _describe(
        plan, manifests, histograms["classes"],
        label_seconds=labelled - started, assemble_seconds=time.monotonic() - labelled,
    )  # fmt: skip
    run["maps"] = {name: _identity(out / name) for name in _MAPS}
    _publish(plan, out, run)
    if not plan.spec.keep_shards:
        _remove_rasters(out)
    return _prediction(out, run, resumed=sum("reused" in one for one in manifests))


def _as_cube(cube: str | Location | xr.Dataset, out: Path) -> Location:
    """Return a cube's path; a dataset is written as a cube into the folder first."""
    if isinstance(cube, str | Location):
        return location(cube)
    from ..cube.dataset import write_cube

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return write_cube(cube, out / _CUBE, overwrite=True)


def _as_region(region: Any, season: Season) -> Region | None:
    if region is None or isinstance(region, Region):
        return region
    if isinstance(region, str | Path):
        return Region.from_file(region)
    return Region.from_projected(region, crs_name(season), source="the geometry given")


def _claim(plan: PredictionPlan, out: Path, *, overwrite: bool) -> None:
    """Make the folder this run's: empty, or left by an earlier call of it."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    path = out / PLAN_FILE
    before = _read_json(path)
    same = before is not None and before.get("run") == plan.run_hash
    foreign = before is None and (path.exists() or (out / "classes.tif").exists())
    if not same and not overwrite and (before is not None or foreign):
        changed = "its plan cannot be read"
        if before is not None:
            old, new = before.get("identity", {}), plan.to_json()["identity"]
            names = [name for name in new if old.get(name) != new[name]]
            changed = f"different: {', '.join(names)}"
        raise OutputError(
            f"Cannot predict into {out}: the folder holds another run ({changed}), and a run is "
            "never mixed with another. Choose another --out, or pass --overwrite to replace it."
        )
    if overwrite and not same:
        _remove_run(out)
    _remove_leftovers(out)
    write_json(path, plan.to_json())


def _finished(plan: PredictionPlan, out: Path) -> Prediction | None:
    """Return the product if this run made its maps and they have not changed since."""
    run = _read_json(out / _RUN_FILE)
    if run is None or run.get("run") != plan.run_hash:
        return None
    if run.get("maps") != {name: _identity(out / name) for name in _MAPS}:
        return None
    if not all((out / name).is_file() for name in _COMPANIONS):
        _publish(plan, out, run)
    return _prediction(out, run, resumed=len(plan.shards))


def _publish(plan: PredictionPlan, out: Path, run: dict[str, Any]) -> None:
    """Write what accompanies the maps; ``run.json``, the mark of a whole product, comes last."""
    with writing(out):
        write_names(out / "classes.tif", plan.legend)
    write_legend(out, plan.legend)
    write_style(out / "classes.qml", plan.legend)
    write_quicklook(out / "quicklook.png", out / "classes.tif", plan.legend)
    write_item(out / "item.json", plan, run)
    write_json(out / _RUN_FILE, run)


def _total(plan: PredictionPlan, manifests: list[dict[str, Any]], layer: str) -> dict[int, int]:
    """Return the pixels by value of all shards, and of the extent beyond them."""
    total: Counter[int] = Counter()
    for manifest in manifests:
        counts = manifest[layer]["histogram"]
        total.update({int(value): int(count) for value, count in counts.items()})
    beyond = plan.extent.area - sum(total.values())
    if beyond:
        total[CLASS_NODATA] += beyond
    return dict(sorted(total.items()))


def _assemble(
    plan: PredictionPlan,
    out: Path,
    manifests: list[dict[str, Any]],
    histograms: Mapping[str, Mapping[int, int]],
) -> None:
    """Write both COGs from the shards and check every pixel of them."""
    for layer in LAYERS:
        path = out / f"{layer}.tif"
        legend = plan.legend if layer == "classes" else None
        tags = {"STCLN_GEO_RUN": plan.run_hash, "STCLN_GEO_CHECKPOINT_SHA256": plan.sha256}
        files = [(shard_path(out, shard, layer), shard) for shard in plan.shards]
        if plan.parallel_cog:
            segments = [
                segment_of(manifest[layer], file, shard, plan)
                for manifest, (file, shard) in zip(manifests, files, strict=True)
            ]
            assemble_cog(segments, path, geobox=plan.geobox, legend=legend, tags=tags)
        else:
            sources = [
                Source(path=file, window=shard.relative_to(plan.extent)) for file, shard in files
            ]
            write_cog(sources, path, geobox=plan.geobox, legend=legend, tags=tags)
        check_cog(
            path,
            kind="classes" if layer == "classes" else "confidence",
            legend=legend,
            histogram=histograms[layer],
            geobox=plan.geobox,
        )


def _describe(
    plan: PredictionPlan,
    manifests: list[dict[str, Any]],
    histogram: Mapping[int, int],
    *,
    label_seconds: float,
    assemble_seconds: float,
) -> dict[str, Any]:
    """Return the content of ``run.json``: what ran on what, how, how fast, and what came out."""
    fresh = [one for one in manifests if "reused" not in one]
    pixels = sum(one["labelled_pixels"] for one in manifests)
    worked = sum(one["seconds"] for one in fresh)
    fresh_km2 = sum(one["labelled_pixels"] for one in fresh) * plan.resolution**2 / 1e6
    spec = {key: value for key, value in asdict(plan.spec).items() if value is not None}
    return {
        "run": plan.run_hash,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cube": str(plan.cube),
        "season": plan.season,
        "checkpoint": str(plan.checkpoint),
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
        "histogram": {str(value): count for value, count in histogram.items()},
        "shards": len(manifests),
        "resumed_shards": len(manifests) - len(fresh),
        "windows": sum(one["windows"] for one in manifests),
        "owned_pixels": pixels,
        "owned_km2": round(pixels * plan.resolution**2 / 1e6, 6),
        "seconds": {
            "label": round(label_seconds, 3),
            "assemble": round(assemble_seconds, 3),
            "shards_total": round(worked, 3),
            "read_total": round(sum(one["read_seconds"] for one in fresh), 3),
        },
        "km2_per_second": round(fresh_km2 / label_seconds, 6) if label_seconds > 0 else None,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "numpy", "zarr", "rasterio", "odc-geo", "rio-cogeo")
    found = {name: version(name) for name in names}
    return {"stcln-geo": __version__, "python": platform.python_version(), **found}


def _prediction(out: Path, run: Mapping[str, Any], *, resumed: int) -> Prediction:
    return Prediction(
        out=out,
        classes=out / "classes.tif",
        confidence=out / "confidence.tif",
        item=out / "item.json",
        histogram={int(value): int(count) for value, count in run["histogram"].items()},
        pixels=int(run["owned_pixels"]),
        windows=int(run["windows"]),
        seconds=float(run["seconds"]["label"] + run["seconds"]["assemble"]),
        resumed_shards=resumed,
    )


def _identity(path: Path) -> str | None:
    """Return the checksum of a file, or None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _remove_rasters(out: Path) -> None:
    """Remove the shards' rasters; their manifests stay as the record of the run."""
    with writing(out):
        for path in (out / "shards").glob("*.tif"):
            path.unlink()


def _remove_run(out: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    with writing(out):
        for name in (_RUN_FILE, PLAN_FILE, *_MAPS, *_COMPANIONS):
            (out / name).unlink(missing_ok=True)
        for pattern in ("*.tif", "*.json"):
            for path in (out / "shards").glob(pattern):
                path.unlink()


def _remove_leftovers(out: Path) -> None:
    """Remove temporary files of a call that was killed."""
    with writing(out):
        for folder in (out, out / "shards"):
            for name in (PLAN_FILE, _RUN_FILE, *_MAPS, *_COMPANIONS, "*.tif", "*.json"):
                for path in folder.glob(f".{name}.*"):
                    path.unlink()
