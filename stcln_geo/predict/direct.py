"""Map a region directly from a search: what a cube would hold is fetched, labelled and forgotten.

The cube is planned as ``cube build`` plans it, once and for the whole region, so that dates,
grid, numbers and clouds are those of the cube; only its pixels are never together in one place.
The map is that of the cube, pixel for pixel.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..cube.cost import describe_search
from ..cube.request import plan_request, request_of
from ..cube.spec import CubeSpec
from ..errors import InputError
from ..execution import Execution
from ..model.checkpoint import CheckpointInfo, read_metadata
from ..region import Region
from .blocks import fetch_layout, plan_fetch
from .checks import legend_of
from .delivery import destination
from .plan import DEFAULT_MEMORY, PredictionPlan
from .planning import lattice_of, plan_prediction
from .run import Prediction, predict_to
from .source import SEARCH_FOLDER, PixelSource, one_season, planned_season, read_search
from .spec import PredictSpec

if TYPE_CHECKING:
    from ..cube.request import SearchRequest
    from ..execution import ProgressHook
    from ..storage import Location

__all__ = ["describe_source", "plan_search", "predict_search"]


def predict_search(
    search: SearchRequest,
    checkpoint: str | Location,
    out: str | Location,
    *,
    cube: CubeSpec | None = None,
    season: str | None = None,
    spec: PredictSpec | None = None,
    scratch: Path | None = None,
    execution: Execution | None = None,
    progress: ProgressHook | None = None,
    overwrite: bool = False,
    work: str | Path | None = None,
) -> Prediction:
    """Map a region, wall to wall, from the images that a search finds, without a cube.

    Parameters
    ----------
    search
        Where, when and what to search for.
    checkpoint
        Fine-tuned classifier: a file or a run directory.
    out
        Folder of the product, or an address such as ``s3://bucket/prefix/map``. A call that was
        cut short continues, with the images that it began with; a finished one is kept.
    cube
        What would be built of the images. Its windows are those of the prediction, and by
        default its bands are the checkpoint's.
    season
        Which season, by its first day, where the search is of several.
    scratch
        Folder, on a local disk of each worker, for pixels on their way to the network; None =
        the folder for temporary files.
    overwrite
        Search again, and replace the product of another run.
    work
        For a product in a bucket: the folder below which it is made; see ``destination``.

    Raises
    ------
    StclnGeoError
        If inputs do not fit together, nothing is found, or the folder holds another run.
    TaskError
        If shards failed for good, or more scenes were left out than ``cube`` allows.
    """
    place = destination(out, work)
    execution = execution or Execution()
    if not overwrite:
        place.recall()
    plan = plan_search(
        search, read_metadata(checkpoint), spec or PredictSpec(), out=place.folder, cube=cube,
        season=season, scratch=scratch, overwrite=overwrite, threads=execution.threads_per_task,
    )  # fmt: skip
    return predict_to(place, plan, execution=execution, progress=progress, overwrite=overwrite)


def plan_search(
    search: SearchRequest,
    checkpoint: CheckpointInfo,
    spec: PredictSpec,
    *,
    out: Path,
    cube: CubeSpec | None = None,
    season: str | None = None,
    scratch: Path | None = None,
    overwrite: bool = False,
    threads: int | None = None,
) -> PredictionPlan:
    """Plan a map from a search, or from the one that an earlier call keeps in ``out``.

    Nothing is written. For parameters and errors see ``predict_search``, and for ``threads``
    ``plan_prediction``.
    """
    legend_of(checkpoint)
    recipe = _recipe(cube, checkpoint, spec, search.region)
    folder = out.resolve() / SEARCH_FOLDER
    request = {**request_of(search, recipe), "season": season}
    found = before = None if overwrite else read_search(folder, request)
    if found is None:
        made = plan_request(search, recipe)
        found = dataclasses.replace(one_season(made, season), request=request)
    else:
        # What to do about broken files may be decided anew.
        policy = {name: getattr(recipe, name) for name in ("on_error", "max_failed_fraction")}
        found = dataclasses.replace(found, spec=dataclasses.replace(found.spec, **policy))
    source = PixelSource(
        plan=found,
        folder=folder,
        scratch=None if scratch is None else scratch.resolve(),
        memory=(spec.memory or DEFAULT_MEMORY) // 2,
        kept=before is not None,
    )
    plan = plan_prediction(planned_season(source), checkpoint, spec, source=source, threads=threads)
    _check_memory(plan, source)
    return plan


def describe_source(plan: PredictionPlan) -> str:
    """Return, for people, what the search of a plan found and what is made of it."""
    if plan.source is None:
        return ""
    found = plan.source.plan
    (season,) = found.seasons
    lines = describe_search(found)
    lines.append(
        f"Season      {season.name}: {len(season.dates)} dates, {plan.dates[0]} to "
        f"{plan.dates[1]}, from {len(found.scenes)} scenes"
    )
    if plan.source.kept:
        lines.insert(0, f"Continuing {plan.source.folder.parent} with the images it began with.")
    lines += [f"            no date for {days} days: {a} to {b}" for a, b, days in season.gaps]
    return "\n".join(lines)


def _check_memory(plan: PredictionPlan, source: PixelSource) -> None:
    """Raise InputError where a worker could not even fetch the smallest block."""
    grid = plan.lattice.cover(plan.shards[0]).intersection(source.plan.window)
    layout = fetch_layout(source.plan, grid.shape_yx)
    plan_fetch(source.plan, grid.shape_yx, layout=layout, memory=source.memory)


def season_start_for(checkpoint: CheckpointInfo, region: Region | None) -> str:
    """Return the day on which the seasons of a map start, where none is asked for."""
    latitude = None if region is None else region.centre[1]
    return checkpoint.season_start_at(latitude) or "09-01"


def _recipe(
    cube: CubeSpec | None, checkpoint: CheckpointInfo, spec: PredictSpec, region: Region | None
) -> CubeSpec:
    """Return what to make of the images: bands and windows are those of the prediction."""
    needed = tuple(checkpoint.config.bands)
    recipe = cube or CubeSpec(season_start=season_start_for(checkpoint, region))
    missing = [band for band in needed if recipe.bands is not None and band not in recipe.bands]
    if missing:
        raise InputError(
            f"Cannot map with the bands {', '.join(recipe.bands or ())}: the checkpoint "
            f"{checkpoint.path} needs {', '.join(missing)} too. Add them to --bands, or leave it "
            "out to take the checkpoint's."
        )
    return dataclasses.replace(
        recipe,
        bands=recipe.bands or needed,
        lattice=lattice_of(spec, checkpoint),
        keep_scl=False,
    )
