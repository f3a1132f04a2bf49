"""Predict a whole region: plan, label the shards, assemble, validate, describe.

Every step can be killed and run again: finished shards are kept by their manifests, the maps
appear under their names only when whole, ``run.json`` comes last.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cube.sky import prepare_sky
from ..cube.store import Season, open_season, write_json, writing
from ..errors import InputError, OutputError, StclnGeoWarning, TaskError
from ..execution import Execution, FailedTask, ProgressHook, run_tasks
from ..grid import Window
from ..model.checkpoint import read_metadata
from ..region import Region
from ..report.prediction import write_prediction_report
from ..storage import Location, location
from .assemble import EMBEDDING_STORE, assemble, write_all_names
from .files import file_checksum, shard_path
from .outputs import EMBEDDINGS, OPTIONAL, layers_for
from .plan import PredictionPlan, crs_name, plan_prediction
from .product import write_item
from .qa import QA_LEGEND
from .record import describe_run
from .seam import audit_seams, seam_tasks, summarise_seams
from .shard import ShardTask, predict_shard, write_failed
from .sieved import sieve_shard, sieve_tasks
from .source import SEARCH_FOLDER, left_out_of, remove_search
from .spec import PredictSpec
from .style import write_legend, write_pictures, write_style
from .windows import PLAN_FILE, check_worker

if TYPE_CHECKING:
    import xarray as xr
    from shapely.geometry.base import BaseGeometry

    from .source import PixelSource

__all__ = ["Prediction", "predict_region", "run_prediction"]

_RUN_FILE = "run.json"
_CUBE = "cube.zarr"
_COMPANIONS = (
    "classes.tif.aux.xml", "classes.qml", "qa.tif.aux.xml", "qa.qml", "quicklook.png",
    "confidence.png", "qa.png", "legend.json", "legend.csv", "item.json", "report.html",
)  # fmt: skip
_SHARD_FILES = ("*.tif", "*.npy", "*.json")
_OWN = (*(f"{layer.name}.tif" for layer in layers_for(OPTIONAL)), *_COMPANIONS)


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
    quality: dict[str, int]
    """Pixels by the reason for which they have a class or none; see ``qa``."""
    seam_audit: dict[str, Any] | None
    """Share of labels that change with the lattice; None where nothing was compared."""


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
    TaskError
        If shards failed for good. The others are done and in the map; calling again tries
        those that failed.
    """
    out = _folder(out)
    cube_path = _as_cube(cube, out)
    opened = open_season(cube_path, season)
    info = read_metadata(checkpoint)
    execution = execution or Execution()
    plan = plan_prediction(
        opened,
        info,
        spec or PredictSpec(),
        region=_as_region(region, opened),
        threads=execution.threads_per_task,
    )
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
    out = _folder(out).resolve()
    execution = execution or Execution()
    for text in plan.warnings:
        warnings.warn(text, StclnGeoWarning, stacklevel=2)
    if plan.source is not None:
        prepare_sky(plan.source.plan.spec.clouds)
    _claim(plan, out, overwrite=overwrite)
    finished = _finished(plan, out)
    if finished is not None:
        return finished

    started = time.monotonic()
    threads = execution.threads_per_task
    tasks = [
        ShardTask(
            out=str(out),
            run=plan.run_hash,
            shard=(shard.row, shard.col, shard.height, shard.width),
            threads=threads,
        )
        for shard in plan.shards
    ]
    aside: list[FailedTask] = []
    check = partial(check_worker, str(out), plan.run_hash)
    manifests = run_tasks(
        predict_shard, tasks, execution=execution, label="shard", progress=progress,
        check=check, failed=aside,
        # Reading retries by itself; a whole shard read again would cost minutes.
        retries=1 if plan.source is None else 0,
    )  # fmt: skip
    if plan.source is not None:
        _check_left_out(plan.source, manifests, out)
    if plan.sieve is not None:
        sieved = run_tasks(
            sieve_shard,
            sieve_tasks(plan, str(out), manifests, threads=threads),
            execution=execution, label="sieved shard", progress=progress, check=check,
        )  # fmt: skip
        manifests = [{**one, **other} for one, other in zip(manifests, sieved, strict=True)]
    labelled = time.monotonic()
    if aside and not manifests:
        raise TaskError(
            f"None of {len(plan.shards)} shards could be labelled, so there is no map. The first "
            f"error was {aside[0].error}. Remove the cause and run the same command again."
        )
    audits = run_tasks(
        audit_seams,
        seam_tasks(plan, str(out), threads=threads),
        execution=execution,
        label="seam sample",
        progress=progress,
        check=check,
        failed=[],
    )
    audited = time.monotonic()
    failed = {
        plan.shards[one.index]: write_failed(str(out), plan.run_hash, plan.shards[one.index])
        for one in aside
    }
    histograms = assemble(plan, out, manifests, failed)
    run = describe_run(
        plan,
        manifests,
        histograms,
        failed=[
            {"shard": list(tasks[one.index].shard), "error": one.error, "attempts": one.attempts}
            for one in aside
        ],
        seams=summarise_seams(audits, plan),
        label_seconds=labelled - started,
        assemble_seconds=time.monotonic() - audited,
    )
    run["seconds"]["seam_audit"] = round(audited - labelled, 3)
    run["maps"] = {name: file_checksum(out / name) for name in _maps(plan)}
    _remove_leftovers(out)  # of workers that died while this process lived
    _publish(plan, out, run)
    if aside:
        raise TaskError(_failure(plan, aside, out))
    if not plan.spec.keep_shards:
        _remove_rasters(out)
    return _prediction(out, run, resumed=sum("reused" in one for one in manifests))


def _folder(out: str | Path) -> Path:
    """Return the folder of a product; maps are not written to object storage."""
    found = location(out)
    if not isinstance(found, Path):
        raise InputError(
            f"Cannot write a map to {found}: a map is written to a folder, which all workers "
            "share. Choose a folder for --out (on a cluster one of a shared file system), and "
            "copy the finished map, for example with 'aws s3 sync'."
        )
    return found


def _maps(plan: PredictionPlan) -> list[str]:
    return [f"{layer.name}.tif" for layer in layers_for(plan.spec.outputs)]


def _check_left_out(source: PixelSource, manifests: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Raise TaskError where more scenes were left out than the plan allows."""
    left_out = left_out_of(manifests)
    if source.forgives(left_out):
        return
    # The next call tries them again.
    for one in manifests:
        if one["fetched"]["left_out"]:
            shard_path(out, Window(*one["shard"]), "json").unlink(missing_ok=True)
    raise TaskError(source.excess(left_out))


def _failure(plan: PredictionPlan, aside: Sequence[FailedTask], out: Path) -> str:
    """Say which shards were set aside, where they lie, and what to do."""
    first = aside[0]
    named = "; ".join(
        f"row {shard.row - plan.extent.row}, column {shard.col - plan.extent.col} of the map "
        f"({shard.height} x {shard.width} px)"
        for shard in (plan.shards[one.index] for one in aside[:5])
    )
    more = "" if len(aside) <= 5 else f" and {len(aside) - 5} more, in run.json"
    remedy = (
        "Repair the cube, for example with 'stcln-geo cube repair', and run the same command again:"
        if plan.source is None
        else f"Files that could not be read are listed in {plan.source.ledger}. Run the same "
        "command again to retry, or with --on-error skip to leave their scenes out:"
    )
    return (
        f"{len(aside)} of {len(plan.shards)} shards failed after {first.attempts} attempts: "
        f"{named}{more}. The first error was {first.error}. The others are done: {out} holds a "
        f"map in which these shards have no class (quality code 5). {remedy} it labels only these."
    )


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
    maps = (out / "classes.tif", out / "classes.vrt")  # of one cube, or of several zones
    foreign = before is None and any(one.exists() for one in (path, *maps))
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
    if plan.source is not None:
        plan.source.store()
    write_json(path, plan.to_json())


def _finished(plan: PredictionPlan, out: Path) -> Prediction | None:
    """Return the product if this run made its maps and they have not changed since."""
    run = _read_json(out / _RUN_FILE)
    if run is None or run.get("run") != plan.run_hash or run.get("failed_shards"):
        return None
    if plan.source is not None and not plan.source.forgives(run["source"]["left_out"]):
        return None
    if run.get("maps") != {name: file_checksum(out / name) for name in _maps(plan)}:
        return None
    if EMBEDDINGS in plan.spec.outputs and not (out / EMBEDDING_STORE).is_dir():
        return None
    if not all((out / name).is_file() for name in _COMPANIONS):
        _publish(plan, out, run)
    return _prediction(out, run, resumed=len(plan.shards))


def _publish(plan: PredictionPlan, out: Path, run: dict[str, Any]) -> None:
    """Write what accompanies the maps; ``run.json``, the mark of a whole product, comes last."""
    write_all_names(plan, out)
    write_legend(out, plan.legend)
    write_style(out / "classes.qml", plan.legend)
    write_style(out / "qa.qml", QA_LEGEND)
    write_pictures(out, plan.legend)
    write_item(out / "item.json", plan, run)
    write_prediction_report(out / "report.html", run, title=out.name)
    write_json(out / _RUN_FILE, run)


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
        quality=dict(run["quality"]),
        seam_audit=run["seam_audit"],
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _remove_rasters(out: Path) -> None:
    """Remove the shards' rasters; their manifests stay as the record of the run."""
    with writing(out):
        for pattern in _SHARD_FILES[:-1]:
            for path in (out / "shards").glob(pattern):
                path.unlink(missing_ok=True)


def _remove_run(out: Path) -> None:
    """Remove what an earlier run wrote, and nothing else."""
    with writing(out):
        for name in (_RUN_FILE, PLAN_FILE, *_OWN):
            (out / name).unlink(missing_ok=True)
        if (out / EMBEDDING_STORE).is_dir():
            shutil.rmtree(out / EMBEDDING_STORE)
        remove_search(out / SEARCH_FOLDER)
        for pattern in _SHARD_FILES:
            for path in (out / "shards").glob(pattern):
                path.unlink()


def _remove_leftovers(out: Path) -> None:
    """Remove temporary files of a call that was killed."""
    with writing(out):
        for folder in (out, out / "shards"):
            for name in (PLAN_FILE, _RUN_FILE, *_OWN, EMBEDDING_STORE, *_SHARD_FILES):
                for path in folder.glob(f".{name}.*"):
                    # A worker that is still at it may be faster.
                    if path.is_dir():
                        shutil.rmtree(path, ignore_errors=True)
                    else:
                        path.unlink(missing_ok=True)
