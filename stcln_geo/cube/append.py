"""Append to a cube: repeat its search up to a later date, and build what is new.

Seasons that were complete are never touched. The current season is planned anew from what was
known and what the search finds now; where that changes its dates or a scene, it is built beside
the old one, takes over all that is unchanged, and replaces it when whole. New seasons are added.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..catalog import load_catalog
from ..errors import CubeError, InputError, MissingFileError, NothingFoundError
from ..execution import Execution, ProgressHook
from ..region import Region
from ..storage import Location, location, writing
from .build import BuildReport, carry_out
from .cost import DEFAULT_MEMORY
from .granules import describe_item, drop_duplicates
from .lock import cube_lock
from .plan import plan_cube
from .planned import CubePlan, DatePlan, Scene, SeasonPlan
from .replace import current_seasons, recover_swaps
from .scratch import check_scratch
from .search import DEFAULT_MARGIN, search_items
from .selection import Selection
from .snapshot import ItemSnapshot, read_items, read_queries, write_items
from .spec import OnError
from .stored import ITEMS_FILE, PLAN_FILE, read_plan_file, season_fingerprint, store_plan
from .time_range import TimeRange, parse_time_range

__all__ = [
    "AppendPlan",
    "AppendReport",
    "SeasonChange",
    "append_cube",
    "plan_append",
    "region_of",
    "stored_plan",
]

_DAY = np.timedelta64(1, "D")
_SECOND = np.timedelta64(1, "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeasonChange:
    """What an append does to a season."""

    name: str
    is_new: bool
    dates: int
    """Dates of the season afterwards."""
    new_dates: int
    changed_dates: int
    """Known dates on which a scene came, went, or was processed anew."""
    reads: int
    """Asset windows of the new and changed dates; each block of the season reads those it meets."""

    def __str__(self) -> str:
        if self.is_new:
            return f"Season {self.name}: new, {self.dates} dates; {self.reads} asset windows."
        return (
            f"Season {self.name}: {self.new_dates} new and {self.changed_dates} changed of "
            f"{self.dates} dates; {self.reads} asset windows. All else is taken over."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendPlan:
    """The cube's plan after an append; ``str`` is for people."""

    plan: CubePlan
    until: str
    changes: tuple[SeasonChange, ...]

    def __str__(self) -> str:
        if not self.changes:
            return f"Nothing new until {self.until}."
        return "\n".join(str(change) for change in self.changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendReport:
    """What an append did."""

    path: Location
    until: str
    changes: tuple[SeasonChange, ...]
    windows_read: int
    """Asset windows read in this run."""
    build: BuildReport | None
    """None where there was nothing to build."""

    def __str__(self) -> str:
        if self.build is None:
            return f"{self.path}: nothing new until {self.until}; no pixel read."
        return "\n".join([*(str(change) for change in self.changes), str(self.build)])


def append_cube(
    path: str | Location,
    until: str,
    *,
    catalog: str | None = None,
    on_error: OnError | None = None,
    max_failed_fraction: float | None = None,
    execution: Execution | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: ProgressHook | None = None,
    scratch: Path | None = None,
) -> AppendReport:
    """Extend a cube up to a date, as one build up to that date would have made it.

    Run again after an interruption, it goes on where it stopped.

    Parameters
    ----------
    until
        Last day, ``YYYY-MM-DD``, included.
    catalog
        In place of the catalog the cube was built from, where that has moved or is not recorded.
    on_error, max_failed_fraction
        In place of the cube's own choices; see `CubeSpec`.
    scratch
        As in `build_cube`.

    Raises
    ------
    CubeError
        If the path holds no cube of `build_cube`, or another process is writing it.
    InputError
        If the cube already reaches beyond the date.
    TaskError
        If assets could not be read; the seasons that were whole stay as they are.
    """
    path, execution = location(path), execution or Execution()
    stored_plan(path)
    check_scratch(scratch)
    with cube_lock(path):
        recover_swaps(path)
        policy: dict[str, Any] = {}
        if on_error is not None:
            policy = {"on_error": on_error, "max_failed_fraction": max_failed_fraction}
        elif max_failed_fraction is not None:
            policy = {"max_failed_fraction": max_failed_fraction}

        def build(plan: CubePlan) -> BuildReport:
            return carry_out(
                plan, path, execution=execution, memory=memory, progress=progress, scratch=scratch
            )

        _parse_until(until)
        stored, _ = stored_plan(path)
        chosen = _with_policy(stored, policy)
        report = None
        if not {season.name for season in stored.seasons} <= current_seasons(path, stored):
            # An earlier run was stopped: what it began comes first, with the items it found.
            report = build(chosen)
        todo = plan_append(path, until, catalog=catalog)
        before = 0 if report is None else report.windows_read
        if todo.changes:
            plan = _with_policy(todo.plan, policy)
            with writing(path):
                write_items(path / ITEMS_FILE, plan.items, plan.queries)
            store_plan(plan, path)
            report = build(plan)
            before += report.windows_read
        elif dict(todo.plan.request) != read_plan_file(path).get("request"):
            store_plan(todo.plan, path)
    return AppendReport(
        path=path, until=until, changes=todo.changes, windows_read=before, build=report
    )


def plan_append(path: str | Location, until: str, *, catalog: str | None = None) -> AppendPlan:
    """Search again and plan what an append would do; reads no pixel and writes nothing."""
    path = location(path)
    stored, request = stored_plan(path)
    last = _parse_until(until)
    asked = parse_time_range(request.get("time"))
    if asked.end is not None and last < asked.end:
        raise InputError(
            f"Cannot append until {until}: {path} was already searched until {asked.end}, and "
            "appending takes nothing away. Give a later date."
        )
    newest = max(np.datetime64(scene.time, "s") for scene in stored.scenes)
    if last < newest:
        raise InputError(
            f"Cannot append until {until}: {path} already holds scenes until {newest}, and "
            "appending takes nothing away. Give a later date."
        )
    where = catalog or request.get("catalog")
    if not where:
        raise CubeError(
            f"Cannot append to {path}: it was built from Python and does not say which catalog its "
            "items came from. Give it with --catalog (catalog= in Python)."
        )
    span = (request.get("time") or "../..").split("/")[0].strip() or ".."
    request = {**request, "catalog": str(where), "time": f"{span}/{until}"}

    first = _first_open_moment(stored, asked)
    found = None
    if last >= first:
        # A solar day may begin before the season does; what belongs before is put aside below.
        start = first - _DAY if asked.start is None else max(first - _DAY, asked.start)
        times = TimeRange(start=start, end=last)
        found = _plan_anew(path, stored, request, times, str(where))
    if found is None:
        return AppendPlan(
            plan=dataclasses.replace(stored, request=request), until=until, changes=()
        )
    cut = str(first.astype("datetime64[D]"))
    merged = _merged(stored, found, cut, request)
    items = {item["id"]: item for item in [*read_items(path / ITEMS_FILE), *found.items]}
    used = {scene.item for scene in merged.scenes}
    merged = dataclasses.replace(
        merged,
        items=tuple(item for name, item in items.items() if name in used),
        queries=(*read_queries(path / ITEMS_FILE), *found.queries),
    )
    changes = [_change(merged, season, stored) for season in merged.seasons if season.name >= cut]
    return AppendPlan(
        plan=merged,
        until=until,
        changes=tuple(change for change in changes if change is not None),
    )


def stored_plan(path: Location) -> tuple[CubePlan, dict[str, Any]]:
    """Return the plan and the request that a cube was built from.

    Raises
    ------
    MissingFileError
        If there is no cube.
    CubeError
        If it was not made by a build.
    """
    if not path.is_dir():
        raise MissingFileError(
            f"Cannot open the cube {path}: there is no such folder. Check the path, or build the "
            "cube with 'stcln-geo cube build'."
        )
    if not (path / PLAN_FILE).is_file():
        raise CubeError(
            f"Cannot go on with {path}: it holds no {PLAN_FILE}, so it was not made by 'cube "
            "build', and there is no search to repeat. Build a cube with 'stcln-geo cube build'."
        )
    content = read_plan_file(path)
    return CubePlan.from_json(content["plan"]), dict(content.get("request") or {})


def region_of(plan: CubePlan, request: Mapping[str, Any]) -> Region:
    """Return the region a cube was built for, exact in the cube's CRS.

    Of one cube per zone that is the zone's part: solar days follow from where its centre lies.
    """
    from shapely.geometry import shape

    if not request.get("region") or request.get("zone"):
        return Region.from_projected(plan.aoi, plan.crs, source=plan.region)
    return Region(
        geometry=shape(request["region"]),
        source=plan.region,
        native=plan.aoi,
        native_crs=plan.crs,
    )


def _parse_until(until: str) -> np.datetime64:
    try:
        end = parse_time_range(until).end if "/" not in until else None
    except InputError:
        end = None
    if end is None:
        raise InputError(
            f"Cannot append until {until!r}: it must be one date as YYYY-MM-DD. Write for example "
            "--until 2020-08-31."
        )
    return end


def _first_open_moment(stored: CubePlan, asked: TimeRange) -> np.datetime64:
    """Return from when on scenes may still come: the current season's start, or its end."""
    name = stored.seasons[-1].name
    following = np.datetime64(f"{int(name[:4]) + 1:04d}{name[4:]}", "s")
    if asked.end is not None and asked.end >= following - _SECOND:
        return following
    return np.datetime64(name, "s")


def _plan_anew(
    path: Location, stored: CubePlan, request: Mapping[str, Any], times: TimeRange, where: str
) -> CubePlan | None:
    """Search and plan the open seasons on the cube's grid; None where there is nothing."""
    region = region_of(stored, request)
    spec = dataclasses.replace(stored.spec, crs=stored.crs, bands=stored.bands)
    collection = request.get("collection") or stored.collection
    try:
        snapshot = search_items(
            load_catalog(where, allow_hosts=tuple(request.get("allow_hosts", ()))),
            collection,
            region,
            times,
            selection=Selection.from_json(request.get("selection", {})),
            margin=max(DEFAULT_MARGIN, spec.margin),
        )
        return plan_cube(_with_known(snapshot, path), region, spec)
    except NothingFoundError:
        return None


def _with_known(snapshot: ItemSnapshot, path: Location) -> ItemSnapshot:
    """Return the snapshot with the cube's own items of that time that the catalog lost."""
    items = {item["id"]: item for item in snapshot.items}
    known = [_plain(item) for item in read_items(path / ITEMS_FILE) if item["id"] not in items]
    granules = list(snapshot.granules)
    for item in known:
        granule = describe_item(item, snapshot.profile)
        if snapshot.time_range.holds(granule.time):
            granules.append(granule)
            items[granule.item] = item
    kept, older = drop_duplicates(granules)
    return dataclasses.replace(
        snapshot,
        items=tuple(items[granule.item] for granule in kept),
        granules=tuple(kept),
        dropped=(*snapshot.dropped, *older),
    )


def _plain(item: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item read from Parquet as it was: lists, and no entry for what it lacks."""

    def without_nothing(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: without_nothing(one) for key, one in value.items() if one is not None}
        return [without_nothing(one) for one in value] if isinstance(value, list) else value

    def as_plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    plain: dict[str, Any] = without_nothing(json.loads(json.dumps(dict(item), default=as_plain)))
    return plain


def _merged(stored: CubePlan, found: CubePlan, cut: str, request: Mapping[str, Any]) -> CubePlan:
    """Return the stored plan with its open seasons as they are found now."""
    kept = [season for season in stored.seasons if season.name < cut]
    known = {season.name: season for season in stored.seasons}
    scenes = {scene.item: scene for scene in stored.scenes}
    for season in found.seasons:
        if season.name < cut:
            continue
        fresh = _with_substitutes(season, scenes)
        old = known.get(season.name)
        same = old is not None and season_fingerprint(found, fresh) == season_fingerprint(
            dataclasses.replace(stored, spec=found.spec), old
        )
        kept.append(old if same and old is not None else fresh)
    merged = dataclasses.replace(
        stored,
        seasons=tuple(kept),
        access=found.access,
        dropped=tuple(dict.fromkeys([*stored.dropped, *found.dropped])),
        request=request,
    )
    if merged.with_scl != stored.with_scl:
        raise CubeError(
            f"Cannot append to the cube for {stored.region}: the items now "
            f"{'lack' if stored.with_scl else 'have'} scene classes and those before "
            f"{'had' if stored.with_scl else 'lacked'} them, so clouds would be masked in some "
            "seasons only. Build another cube of the new seasons with 'stcln-geo cube build'."
        )
    return merged


def _with_substitutes(season: SeasonPlan, known: Mapping[str, Scene]) -> SeasonPlan:
    """Keep the other catalog's assets of scenes that were repaired and are otherwise the same."""

    def choose(scene: Scene) -> Scene:
        before = known.get(scene.item)
        if before is None or before.substitute is None:
            return scene
        same = (before.baseline, before.processed) == (scene.baseline, scene.processed)
        return before if same else scene

    dates = [
        DatePlan(time=date.time, scenes=tuple(choose(scene) for scene in date.scenes))
        for date in season.dates
    ]
    return dataclasses.replace(season, dates=tuple(dates))


def _change(plan: CubePlan, season: SeasonPlan, stored: CubePlan) -> SeasonChange | None:
    """Return what becomes of a season, or None where it stays as it is."""
    old = next((one for one in stored.seasons if one.name == season.name), None)
    if old is season:
        return None
    # A scene processed anew may tell another second, but it is still that day's.
    before = {} if old is None else {_day(date): _identities(date) for date in old.dates}
    new = [date for date in season.dates if _day(date) not in before]
    changed = [
        date
        for date in season.dates
        if _day(date) in before and before[_day(date)] != _identities(date)
    ]
    return SeasonChange(
        name=season.name,
        is_new=old is None,
        dates=len(season.dates),
        new_dates=len(new),
        changed_dates=len(changed),
        reads=sum(
            len(scene.assets) - (scene.scl is not None and not plan.with_scl)
            for date in (*new, *changed)
            for scene in date.scenes
        ),
    )


def _day(date: DatePlan) -> np.datetime64:
    day: np.datetime64 = date.time.astype("datetime64[D]")
    return day


def _identities(date: DatePlan) -> list[dict[str, Any]]:
    return [scene.identity for scene in date.scenes]


def _with_policy(plan: CubePlan, policy: Mapping[str, Any]) -> CubePlan:
    return dataclasses.replace(plan, spec=dataclasses.replace(plan.spec, **policy))
