"""From the options of ``predict --catalog`` to a plan of a map without a cube."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ._common import given_options, say, warn
from ._cube_request import make_region, make_selection, make_spec

if TYPE_CHECKING:
    from ..model.checkpoint import CheckpointInfo
    from ..predict.plan import PredictionPlan
    from ..predict.spec import PredictSpec

__all__ = ["check_source", "plan_source", "tell_source"]

_SEARCH = (
    "catalog", "collection", "bbox", "time", "tiles", "orbits", "max_cloud", "allow_host",
)  # fmt: skip
_RECIPE = (
    "bands", "resolution", "crs", "season_start", "composite", "period", "resampling",
    "cloud_mask", "cloud_margin", "shadow_margin", "offset", "on_error", "max_failed_fraction",
)  # fmt: skip


def check_source(cubes: Sequence[Path] | None, context: typer.Context) -> None:
    """Refuse a map of nothing, of two things, or options that nothing would use."""
    from ..errors import InputError

    given = given_options(context, (*_SEARCH, *_RECIPE, "scratch"))
    if not cubes and "--catalog" not in given:
        raise InputError(
            "Cannot predict without pixels: there is neither a cube nor a catalog. Name a cube, as "
            "in 'stcln-geo predict region.zarr', or search with --catalog, --bbox and --time."
        )
    if cubes and given:
        raise InputError(
            f"Cannot use {', '.join(given)} with the cube {cubes[0]}: its pixels were decided when "
            "it was built. Leave the cube out to map directly from a search, or leave out these "
            "options."
        )


def plan_source(
    options: Mapping[str, Any],
    checkpoint: CheckpointInfo,
    spec: PredictSpec,
    *,
    out: Path,
    region: Path | None,
    season: str | None,
    scratch: Path | None,
    new: bool,
    threads: int,
) -> PredictionPlan:
    """Search, or take the search that a folder keeps, and plan the map; say what was found."""
    from ..cube.request import SearchRequest
    from ..predict.direct import describe_source, plan_search, season_start_for
    from ..predict.planning import lattice_of

    search = SearchRequest(
        catalog=options["catalog"],
        collection=options["collection"],
        region=make_region(options["bbox"], region),
        time=options["time"],
        selection=make_selection(options["tiles"], options["orbits"], options["max_cloud"]),
        allow_hosts=tuple(options["allow_host"] or ()),
    )
    recipe = {name: options[name] for name in _RECIPE}
    recipe["season_start"] = recipe["season_start"] or season_start_for(checkpoint, search.region)
    lattice = lattice_of(spec, checkpoint)
    plan = plan_search(
        search, checkpoint, spec, out=out, season=season, scratch=scratch, overwrite=new,
        threads=threads, cube=make_spec(window=lattice.window, halo=lattice.halo, **recipe),
    )  # fmt: skip
    say(describe_source(plan))
    return plan


def tell_source(plan: PredictionPlan, out: Path) -> None:
    """Say what was left out of a map, and which offsets are in doubt."""
    if plan.source is None:
        return
    source = json.loads((out / "run.json").read_text(encoding="utf-8"))["source"]
    if source["left_out"]:
        count = len(source["left_out"])
        warn(f"{count} scenes were left out somewhere; see {plan.source.ledger}.")
    suspects = source["offset_suspects"]
    if suspects:
        warn(
            f"The darkest pixels of {len(suspects)} scenes contradict the offset applied to them: "
            f"{', '.join(suspects[:5])}{' ...' if len(suspects) > 5 else ''}. No pixel was "
            "changed. Correct the catalog's rule or give --offset."
        )
