"""Predict a whole region: plan, label the shards, assemble, validate, describe.

Every step can be killed and run again: finished shards are kept by their manifests, the maps
appear under their names only when whole, ``run.json`` comes last.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cube.sky import prepare_sky
from ..cube.store import Season, list_seasons, open_season, write_json, writing
from ..errors import CubeError, OutputError, StclnGeoError, StclnGeoWarning, TaskError
from ..execution import Execution, FailedTask, ProgressHook, run_tasks
from ..grid import Window
from ..model.checkpoint import read_metadata
from ..region import Region
from ..report.prediction import write_prediction_report
from ..storage import Location, location
from .assemble import EMBEDDING_STORE, assemble, write_all_names
from .checks import fingerprint
from .delivery import Destination, destination
from .files import file_checksum, shard_path
from .folder import (
    COMPANIONS,
    RUN_FILE,
    Prediction,
    claim_folder,
    folder_lock,
    prediction_of,
    read_json,
    remove_leftovers,
    remove_rasters,
)
from .outputs import EMBEDDINGS, layers_for
from .plan import PredictionPlan
from .planning import crs_name, plan_prediction
from .product import write_item
from .qa import QA_LEGEND
from .record import describe_run
from .seam import audit_seams, seam_tasks, summarise_seams
from .shard import ShardTask, predict_shard, write_failed
from .sieved import sieve_shard, sieve_tasks
from .source import left_out_of
from .spec import PredictSpec
from .style import write_legend, write_pictures, write_style
from .windows import PLAN_FILE, check_worker

if TYPE_CHECKING:
    import xarray as xr
    from shapely.geometry.base import BaseGeometry

    from .source import PixelSource

__all__ = ["Prediction", "predict_region", "predict_to", "run_prediction"]

_CUBE = "cube.zarr"


def predict_region(
    cube: str | Location | xr.Dataset,
    checkpoint: str | Location,
    out: str | Location,
    *,
    season: str | None = None,
    region: Region | BaseGeometry | str | Path | None = None,
    spec: PredictSpec | None = None,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
    work: str | Path | None = None,
) -> Prediction:
    """Map a region, wall to wall, into a folder or a bucket.

    Parameters
    ----------
    cube
        Path of a cube; or any dataset with a CRS and time whose bands have common names, which
        is first written as a cube into the folder.
    checkpoint
        Fine-tuned classifier: a file or a run directory, here or in a bucket.
    out
        Folder of the product, or an address such as ``s3://bucket/prefix/map``. A call that was
        cut short continues; a finished one is kept.
    season
        Which of the cube's seasons; by default the only one.
    region
        A part of the cube's region: a region, a vector file, or a geometry in the cube's CRS.
    overwrite
        Replace the product of another run.
    work
        For a product in a bucket: the folder below which it is made, which all workers must see;
        see ``destination``.

    Raises
    ------
    StclnGeoError
        If inputs do not fit together, or the folder holds another run.
    TaskError
        If shards failed for good. The others are done and in the map; calling again tries
        those that failed.
    """
    place = destination(out, work)
    cube_path = _as_cube(cube, place.folder, overwrite=overwrite)
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
    return predict_to(place, plan, execution=execution, progress=progress, overwrite=overwrite)


def predict_to(
    place: Destination,
    plan: PredictionPlan,
    *,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
) -> Prediction:
    """Do what a plan says where a product is made, and bring it where it goes."""
    if place.holds(plan.run_hash, overwrite=overwrite):
        run = read_json(place.where / RUN_FILE)
        if run is not None:
            place.leave()
            return prediction_of(place.where, run, resumed=len(plan.shards))
    product = run_prediction(
        plan, place.folder, execution=execution, progress=progress, overwrite=overwrite
    )
    run = read_json(place.folder / RUN_FILE)
    place.deliver(plan.run_hash, progress=progress)
    return (
        product if run is None else prediction_of(place.where, run, resumed=product.resumed_shards)
    )


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
    for text in plan.warnings:
        warnings.warn(text, StclnGeoWarning, stacklevel=2)
    with folder_lock(out):
        return _run(
            plan, out, execution=execution or Execution(), progress=progress, overwrite=overwrite
        )


def _run(
    plan: PredictionPlan,
    out: Path,
    *,
    execution: Execution,
    progress: ProgressHook | None,
    overwrite: bool,
) -> Prediction:
    if plan.source is not None:
        prepare_sky(plan.source.plan.spec.clouds)
    claim_folder(plan, out, overwrite=overwrite)
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
        check=check, failed=aside, memory=plan.worker_bytes,
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
    _check_unchanged(plan, manifests, out)
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
    for text in run["warnings"][len(plan.warnings) :]:
        warnings.warn(text, StclnGeoWarning, stacklevel=3)
    run["seconds"]["seam_audit"] = round(audited - labelled, 3)
    run["maps"] = {name: file_checksum(out / name) for name in _maps(plan)}
    remove_leftovers(out)  # of workers that died while this process lived
    _publish(plan, out, run)
    if aside:
        raise TaskError(_failure(plan, aside, out))
    if not plan.spec.keep_shards:
        remove_rasters(out)
    return prediction_of(out, run, resumed=sum("reused" in one for one in manifests))


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


def _check_unchanged(
    plan: PredictionPlan, manifests: Sequence[Mapping[str, Any]], out: Path
) -> None:
    """Raise CubeError where the cube was written meanwhile: the shards are of no one cube then."""
    if plan.source is not None:
        return
    # A cube that cannot be read is another error, and the shards stay: it may come back as it was.
    if fingerprint(open_season(plan.cube, plan.season)) == plan.fingerprint:
        return
    for one in manifests:
        if "reused" not in one:
            shard_path(out, Window(*one["shard"]), "json").unlink(missing_ok=True)
    raise CubeError(
        f"Cannot finish the map: season {plan.season} of {plan.cube} was changed while it was "
        "mapped, so that the shards would be of different cubes. When the cube is whole again, run "
        "the same command, with --overwrite where it holds other pixels than before."
    )


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


def _as_cube(cube: str | Location | xr.Dataset, out: Path, *, overwrite: bool) -> Location:
    """Return a cube's path; a dataset is written as a cube into the folder first."""
    if isinstance(cube, str | Location):
        return location(cube)
    from ..cube.dataset import write_cube

    target = out.resolve() / _CUBE
    if not overwrite and _is_foreign(target, out):
        raise OutputError(
            f"Cannot predict into {out}: a dataset is first written there as {_CUBE}, and the "
            "folder holds a cube of that name already, which no call of this kind wrote. Choose "
            "another folder, or pass overwrite=True to replace the cube."
        )
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    # A call that is making a map of it has the lock, and shall keep its cube.
    with folder_lock(out.resolve()):
        return write_cube(cube, target, overwrite=True)


def _is_foreign(target: Path, out: Path) -> bool:
    """Return True where a finished cube lies that no earlier call wrote for its map."""
    plan = read_json(out / PLAN_FILE)
    if plan is not None and plan.get("cube") == str(target):
        return False
    try:
        return bool(list_seasons(target))
    except StclnGeoError:
        return False  # nothing is there, or what a call that was cut short had begun


def _as_region(region: Any, season: Season) -> Region | None:
    if region is None or isinstance(region, Region):
        return region
    if isinstance(region, str | Path):
        return Region.from_file(region)
    return Region.from_projected(region, crs_name(season), source="the geometry given")


def _finished(plan: PredictionPlan, out: Path) -> Prediction | None:
    """Return the product if this run made its maps and they have not changed since."""
    run = read_json(out / RUN_FILE)
    if run is None or run.get("run") != plan.run_hash or run.get("failed_shards"):
        return None
    if plan.source is not None and not plan.source.forgives(run["source"]["left_out"]):
        return None
    if run.get("maps") != {name: file_checksum(out / name) for name in _maps(plan)}:
        return None
    if EMBEDDINGS in plan.spec.outputs and not (out / EMBEDDING_STORE).is_dir():
        return None
    if not all((out / name).is_file() for name in COMPANIONS):
        _publish(plan, out, run)
    return prediction_of(out, run, resumed=len(plan.shards))


def _publish(plan: PredictionPlan, out: Path, run: dict[str, Any]) -> None:
    """Write what accompanies the maps; ``run.json``, the mark of a whole product, comes last."""
    write_all_names(plan, out)
    write_legend(out, plan.legend)
    write_style(out / "classes.qml", plan.legend)
    write_style(out / "qa.qml", QA_LEGEND)
    write_pictures(out, plan.legend)
    write_item(out / "item.json", plan, run)
    write_prediction_report(out / "report.html", run, title=out.name)
    write_json(out / RUN_FILE, run)
