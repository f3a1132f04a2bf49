"""Repair a cube: read the scenes that were left out again, from its own catalog or another.

Manifests name, per shard, the scenes that were left out because an asset could not be read. Only
those shards are built again, and in them only the dates of those scenes are read; all else is
taken over. A scene of another catalog keeps its place among the scenes of its date, so a repaired
cube equals one built from a perfect archive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..catalog import load_catalog
from ..errors import CubeError, NothingFoundError
from ..execution import Execution, ProgressHook
from ..progress import duration_text
from ..storage import Location, location
from .append import region_of, stored_plan
from .build import BuildReport, carry_out
from .cost import DEFAULT_MEMORY
from .granules import SAME_SCENE_SECONDS, Granule
from .lock import cube_lock
from .plan import plan_cube
from .planned import CubePlan, DatePlan, Scene, SeasonPlan, Substitute
from .read import LedgerEntry
from .replace import current_seasons, recover_swaps
from .scratch import check_scratch
from .search import DEFAULT_MARGIN, search_items
from .selection import plain_tile
from .snapshot import ItemSnapshot
from .store import list_seasons
from .stored import manifest_folder, read_manifest, store_plan
from .time_range import TimeRange

__all__ = ["LeftOut", "RepairReport", "find_left_out", "repair_cube", "same_granule"]

_DAY = np.timedelta64(1, "D")
_DATATAKE = np.timedelta64(30, "m")
"""Some catalogs give a granule's own time, others the start of its datatake."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A scene that lacks in some shards of a season."""

    season: str
    item: str
    shards: int

    def __str__(self) -> str:
        return f"Season {self.season}: {self.item} lacks in {self.shards} shards."


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What a repair did."""

    path: Location
    repaired: tuple[LeftOut, ...]
    remaining: tuple[LeftOut, ...]
    """Scenes that still lack somewhere."""
    substitutes: Mapping[str, str]
    """Item -> item of the other catalog that was read in its place."""
    failures: tuple[LedgerEntry, ...]
    """Assets that could not be read in this run."""
    build: BuildReport | None
    """None where there was nothing to repair."""

    def __str__(self) -> str:
        if self.build is None:
            return f"{self.path} lacks no scene: nothing to repair."
        more = f", {len(self.remaining)} still lack" if self.remaining else ""
        return (
            f"{self.path}: {len(self.repaired)} scenes repaired{more}; "
            f"{self.build.shards_written} shards written ({self.build.shards_taken} kept), "
            f"{self.build.windows_read} asset windows read; {duration_text(self.build.seconds)}."
        )


def find_left_out(path: str | Location) -> tuple[LeftOut, ...]:
    """Return the scenes that a cube's whole seasons lack, by season and item."""
    path = location(path)
    count: dict[tuple[str, str], int] = {}
    for season in list_seasons(path):
        for manifest in manifest_folder(path, season).glob("*.json"):
            for item in read_manifest(manifest).get("left_out", ()):
                count[season, item] = count.get((season, item), 0) + 1
    return tuple(
        LeftOut(season=season, item=item, shards=shards)
        for (season, item), shards in sorted(count.items())
    )


def repair_cube(
    path: str | Location,
    *,
    catalog: str | None = None,
    collection: str | None = None,
    execution: Execution | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: ProgressHook | None = None,
    scratch: Path | None = None,
) -> RepairReport:
    """Build the shards again that lack a scene; what still cannot be read stays left out.

    Parameters
    ----------
    catalog
        Where to read the lacking scenes instead: the same granules, found by tile, time and orbit.
    collection
        Of that catalog.
    scratch
        As in `build_cube`.

    Raises
    ------
    CubeError
        If a season is unfinished, or another process is writing the cube.
    SearchError
        If the other catalog has none of the scenes.
    """
    path, execution = location(path), execution or Execution()
    stored_plan(path)
    check_scratch(scratch)
    with cube_lock(path):
        recover_swaps(path)
        stored, request = stored_plan(path)
        _check_whole(path, stored)

        def build(plan: CubePlan, redo: Iterable[str] = ()) -> BuildReport:
            # A repair takes what it can get.
            spec = dataclasses.replace(plan.spec, on_error="skip", max_failed_fraction=None)
            return carry_out(
                dataclasses.replace(plan, spec=spec), path, execution=execution, memory=memory,
                progress=progress, redo=tuple(redo), scratch=scratch,
            )  # fmt: skip

        lacking = find_left_out(path)
        report, plan = None, stored
        if not {season.name for season in stored.seasons} <= current_seasons(path, stored):
            # An earlier repair or append was stopped: it comes first.
            report = build(stored)
        before = find_left_out(path)
        substitutes: dict[str, str] = {}
        if before:
            if catalog is not None:
                plan = _with_other_catalog(
                    stored, request, {entry.item for entry in before}, catalog, collection
                )
                store_plan(plan, path)
            report = build(plan, {entry.season for entry in before})
            substitutes = {
                scene.item: scene.substitute.item
                for scene in plan.scenes
                if scene.substitute is not None and scene.item in {entry.item for entry in before}
            }
        remaining = find_left_out(path)
    still = {(entry.season, entry.item) for entry in remaining}
    return RepairReport(
        path=path,
        repaired=tuple(one for one in lacking if (one.season, one.item) not in still),
        remaining=remaining,
        substitutes=substitutes,
        failures=report.failures if report is not None else (),
        build=report,
    )


def same_granule(scene: Scene, granule: Granule) -> bool:
    """Return True where a granule of any catalog is the scene: by tile, orbit and time.

    Zones below 10 are written with a zero before them or without, by the provider.
    Where both name the start of the datastrip it decides, so that the halves of a tile that two
    datastrips share are not confused.
    """
    if plain_tile(scene.tile) != plain_tile(granule.tile) or not scene.tile:
        return False
    if None not in (scene.orbit, granule.orbit) and scene.orbit != granule.orbit:
        return False
    if scene.platform and granule.platform and scene.platform != granule.platform:
        return False
    ours = np.datetime64(scene.time).astype("datetime64[s]")
    theirs = granule.time.astype("datetime64[s]")
    if abs(ours - theirs) > _DATATAKE:
        return False
    strips = np.datetime64(scene.sensing, "s"), granule.sensing.astype("datetime64[s]")
    if strips[0] == ours or strips[1] == theirs:
        return True
    return bool(abs(strips[0] - strips[1]) <= np.timedelta64(SAME_SCENE_SECONDS, "s"))


def _check_whole(path: Location, plan: CubePlan) -> None:
    whole = set(list_seasons(path)) if (path / "zarr.json").is_file() else set()
    unfinished = [season.name for season in plan.seasons if season.name not in whole]
    if unfinished:
        raise CubeError(
            f"Cannot repair {path}: its season {unfinished[0]} is unfinished, and a repair needs "
            "whole seasons. Run the command that builds it again; with --on-error skip it "
            "finishes without the scenes that cannot be read, and then repair adds them."
        )


def _with_other_catalog(
    plan: CubePlan,
    request: Mapping[str, object],
    items: set[str],
    catalog: str,
    collection: str | None,
) -> CubePlan:
    """Return the plan with some scenes' assets taken from another catalog, where it has them."""
    wanted = [scene for scene in plan.scenes if scene.item in items]
    times = [np.datetime64(scene.time) for scene in wanted]
    region = region_of(plan, request)
    spec = dataclasses.replace(
        plan.spec, crs=plan.crs, bands=plan.bands, on_error="skip", max_failed_fraction=None
    )
    hosts = request.get("allow_hosts", ())
    source = load_catalog(catalog, allow_hosts=tuple(hosts) if isinstance(hosts, list) else ())
    snapshot = search_items(
        source,
        collection,
        region,
        TimeRange(start=min(times) - _DAY, end=max(times) + _DAY),
        margin=max(DEFAULT_MARGIN, spec.margin),
    )
    offered = plan_cube(snapshot, region, spec)
    scenes = {scene.item: scene for scene in offered.scenes}
    replaced: dict[str, Scene] = {}
    for scene in wanted:
        best = _best(scene, snapshot, scenes)
        if best is not None:
            replaced[scene.item] = _substituted(scene, best, offered, plan)
    if not replaced:
        raise NothingFoundError(
            f"Cannot repair from '{source.name}': it has none of the {len(wanted)} scenes that "
            f"lack ({', '.join(sorted(items)[:3])}); a scene is found by its tile, orbit and time. "
            "Give another --catalog or --collection."
        )
    return dataclasses.replace(
        plan, seasons=tuple(_replace_scenes(season, replaced) for season in plan.seasons)
    )


def _best(scene: Scene, snapshot: ItemSnapshot, scenes: Mapping[str, Scene]) -> Scene | None:
    """Return the same granule of another catalog: of the same baseline if it can be."""
    found = [
        granule
        for granule in snapshot.granules
        if granule.item in scenes and same_granule(scene, granule)
    ]
    if not found:
        return None
    found.sort(key=lambda granule: (granule.baseline == scene.baseline, granule.rank))
    best = scenes[found[-1].item]
    # Without scene classes it would be clear where the other scenes are not.
    return best if (best.scl is None) == (scene.scl is None) else None


def _substituted(scene: Scene, best: Scene, offered: CubePlan, plan: CubePlan) -> Scene:
    """Return the scene with the assets of its other product."""
    same = best.identity == dataclasses.replace(scene, substitute=None).identity
    if same and offered.access == plan.access:
        return best
    return dataclasses.replace(
        scene,
        bands=best.bands,
        scl=best.scl,
        sky=best.sky,
        substitute=Substitute(
            catalog=offered.catalog,
            item=best.item,
            baseline=best.baseline,
            access=offered.access.model_dump(),
        ),
    )


def _replace_scenes(season: SeasonPlan, replaced: Mapping[str, Scene]) -> SeasonPlan:
    dates = [
        DatePlan(
            time=date.time,
            scenes=tuple(replaced.get(scene.item, scene) for scene in date.scenes),
        )
        for date in season.dates
    ]
    return dataclasses.replace(season, dates=tuple(dates))
