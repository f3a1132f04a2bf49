"""Build a cube: carry out a plan, block by block, so that it can be killed and run again.

A task owns a block of whole shards. It reads each asset window of the block once, harmonises,
masks and fuses date by date, and writes its shards, each followed by a small manifest that holds
the fingerprint of all that went into it. A season gets its name when all its shards are there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CubeError, OutputError, TaskError
from ..execution import Execution, ProgressHook, run_tasks
from ..grid import tiles
from .audit import SUSPECT, suspect_scenes
from .block import BlockResult, BlockTask, build_block
from .cost import DEFAULT_MEMORY, plan_blocks
from .planned import CubePlan, SeasonPlan
from .read import LedgerEntry, read_ledger
from .search import write_items
from .store import (
    create_season,
    finish_season,
    list_seasons,
    open_building,
    write_date_flags,
    writing,
)
from .stored import ITEMS_FILE, LEDGER_FILE, MANIFESTS, PLAN_FILE, read_plan_file, store_plan

__all__ = ["BuildReport", "build_cube", "unfinished_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build did."""

    path: Path
    seasons: tuple[str, ...]
    """Seasons of the plan, now complete."""
    dates: int
    shards_written: int
    shards_kept: int
    """Shards that an earlier run had finished."""
    windows_read: int
    """Asset windows read in this run."""
    failures: tuple[LedgerEntry, ...]
    """Assets left out in this run (only where the plan says to skip them)."""
    seconds: float
    suspects: tuple[str, ...] = ()
    """Items of this run whose darkest pixels contradict the offset applied to them."""

    def __str__(self) -> str:
        if not self.shards_written:
            return f"{self.path} is complete ({', '.join(self.seasons)}): nothing to do."
        left_out = f"; {len(self.failures)} assets left out" if self.failures else ""
        kept = f" ({self.shards_kept} kept)" if self.shards_kept else ""
        return (
            f"{self.path}: {self.dates} dates in {', '.join(self.seasons)}; "
            f"{self.shards_written} shards written{kept}, {self.windows_read} asset windows read"
            f"{left_out}; {self.seconds:.1f} s."
        )


def build_cube(
    plan: CubePlan,
    path: str | Path,
    *,
    execution: Execution | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    progress: ProgressHook | None = None,
) -> BuildReport:
    """Build the cube of a plan, or the part of it that is missing.

    Parameters
    ----------
    path
        Folder of the cube, by custom ``NAME.zarr``.
    memory
        Bytes for all tasks of one machine together.
    overwrite
        Replace a cube of another plan at this path, with all its seasons and labels.

    Raises
    ------
    CubeError
        If the path holds a cube of another plan.
    OutputError
        If the path cannot be written.
    TaskError
        If assets could not be read; the other blocks are done, and the ledger names the assets.
    """
    started = time.monotonic()
    path = Path(path)
    execution = execution or Execution()
    # Both checks come before anything is written.
    blocks = {
        season.name: plan_blocks(plan, season, memory=memory, workers=execution.workers)
        for season in plan.seasons
    }
    _prepare(plan, path, overwrite=overwrite)
    complete = set(list_seasons(path)) if (path / "zarr.json").is_file() else set()

    results: list[BlockResult] = []
    kept = done = 0
    total = sum(len(blocks[season.name]) for season in plan.seasons if season.name not in complete)
    failed = False
    suspects: set[str] = set()
    recorded = len(read_ledger(path / LEDGER_FILE))
    for season in plan.seasons:
        if season.name in complete:
            kept += len(tiles(plan.window.shape_yx, season.layout.shard))
            continue
        _open_or_create(plan, season, path)
        tasks = [
            BlockTask(
                cube=str(path.resolve()),
                season=season.name,
                window=block,
                fingerprint=plan.fingerprint,
                skip_failures=plan.spec.on_error == "skip",
                threads=execution.threads_per_worker,
            )
            for block in blocks[season.name]
        ]
        try:
            results += _run(tasks, execution, progress, done=done, total=total)
        except TaskError:
            # The ledger names the assets; the other seasons are built before it is reported.
            if len(read_ledger(path / LEDGER_FILE)) == recorded:
                raise
            failed = True
        else:
            suspects |= _record_suspects(path, season)
            finish_season(path, season.name)
        done += len(tasks)
    failures = tuple(read_ledger(path / LEDGER_FILE)[recorded:])
    if failed:
        raise TaskError(_failure_message(path, failures))
    return BuildReport(
        path=path,
        seasons=tuple(season.name for season in plan.seasons),
        dates=sum(len(season.dates) for season in plan.seasons),
        shards_written=sum(result.written for result in results),
        shards_kept=kept + sum(result.kept for result in results),
        windows_read=sum(result.reads for result in results),
        failures=failures,
        suspects=tuple(sorted(suspects)),
        seconds=time.monotonic() - started,
    )


def unfinished_plan(path: str | Path, request: Mapping[str, Any]) -> CubePlan | None:
    """Return the plan of an unfinished build of the same request, so that it can go on.

    A search answers differently when items are reprocessed; a build that was killed goes on with
    the items it began with.
    """
    path = Path(path)
    if not (path / PLAN_FILE).is_file():
        return None
    content = read_plan_file(path)
    plan = CubePlan.from_json(content["plan"])
    names = {season.name for season in plan.seasons}
    complete = set(list_seasons(path)) if (path / "zarr.json").is_file() else set()
    same = content.get("request") == json.loads(json.dumps(request, default=str))
    return plan if same and not names <= complete else None


def _run(
    tasks: list[BlockTask],
    execution: Execution,
    progress: ProgressHook | None,
    *,
    done: int,
    total: int,
) -> list[BlockResult]:
    """Run a season's tasks, counting progress over all seasons."""

    def advance(finished: int, _: int, what: str) -> None:
        if progress is not None:
            progress(done + finished, total, what)

    # Reading retries by itself; a whole block read again would cost minutes.
    return run_tasks(
        build_block, tasks, execution=execution, label="block", progress=advance, retries=0
    )


def _failure_message(path: Path, failures: tuple[LedgerEntry, ...]) -> str:
    named = "; ".join(
        f"{entry.item} {entry.asset}: {entry.kind} after {entry.attempts} attempts ({entry.error})"
        for entry in failures[:3]
    )
    return (
        f"Cannot finish {path}: {len(failures)} assets could not be read ({named}); all are listed "
        f"in {path / LEDGER_FILE}. Blocks without them are done. Run the same command again to "
        "retry, or with --on-error skip to leave these scenes out."
    )


def _prepare(plan: CubePlan, path: Path, *, overwrite: bool) -> None:
    """Make the folder ready: new, or holding an earlier run of the same plan."""
    is_cube = (path / PLAN_FILE).is_file() or (path / "zarr.json").is_file()
    if path.exists() and not path.is_dir():
        raise OutputError(
            f"Cannot write the cube {path}: it is a file, but a cube is a folder. "
            "Choose another path."
        )
    if path.is_dir() and any(path.iterdir()) and not is_cube:
        raise OutputError(
            f"Cannot write the cube {path}: the folder holds other files, and a cube needs a "
            "folder of its own. Choose a new path such as region.zarr."
        )
    if is_cube and not overwrite:
        if (path / PLAN_FILE).is_file():
            stored = CubePlan.from_json(read_plan_file(path)["plan"])
            if stored.fingerprint == plan.fingerprint:
                store_plan(plan, path)
                return
            why = _difference(stored, plan)
        else:
            why = "it was not made by 'cube build'"
        raise CubeError(
            f"Cannot build into {path}: it holds another cube ({why}). Choose another path, or "
            "replace the cube and its labels with --overwrite."
        )
    with writing(path):
        if is_cube:
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        write_items(path / ITEMS_FILE, plan.items)
    store_plan(plan, path)


def _open_or_create(plan: CubePlan, season: SeasonPlan, path: Path) -> None:
    """Create the season's empty arrays, unless an earlier run of the plan has."""
    if open_building(path, season.name) is not None:
        return
    with writing(path):
        shutil.rmtree(path / MANIFESTS / season.name, ignore_errors=True)
    create_season(
        path,
        season.name,
        geobox=plan.geobox,
        time=season.time,
        bands=plan.bands,
        aoi=plan.aoi,
        layout=season.layout,
        lattice=plan.spec.lattice,
        with_scl=plan.with_scl and plan.spec.keep_scl,
        attrs={
            "season_start": plan.spec.season_start,
            "catalog": plan.catalog,
            "collection": plan.collection,
            "region": plan.region,
            "fingerprint": plan.fingerprint,
            "clouds_masked": plan.with_scl,
        },
        date_attrs={**_provenance(season), SUSPECT: [False] * len(season.dates)},
    )


def _record_suspects(path: Path, season: SeasonPlan) -> set[str]:
    """Mark the dates of a season, all of whose shards are written, that hold a suspect scene."""
    found = suspect_scenes(path, season)
    opened = open_building(path, season.name)
    if opened is not None:
        with writing(path):
            write_date_flags(opened, SUSPECT, np.array([bool(items) for items in found]))
    return set().union(*found)


def _provenance(season: SeasonPlan) -> dict[str, list[str]]:
    """Return, per date, what its scenes are; several scenes are joined by a space."""

    def joined(values: list[str]) -> str:
        return " ".join(dict.fromkeys(value.replace(" ", "_") for value in values if value))

    columns: dict[str, list[str]] = {
        name: []
        for name in ("platform", "orbit", "baseline", "offset_rule", "offset_dn", "item_ids")
    }
    for date in season.dates:
        scenes = date.scenes
        rules = [asset.radiometry for scene in scenes for asset in scene.bands]
        columns["platform"].append(joined([scene.platform for scene in scenes]))
        columns["orbit"].append(
            joined([f"{scene.orbit:03d}" for scene in scenes if scene.orbit is not None])
        )
        columns["baseline"].append(joined([scene.baseline for scene in scenes]))
        columns["offset_rule"].append(joined([rule.source for rule in rules]))
        columns["offset_dn"].append(joined([str(rule.offset) for rule in rules]))
        columns["item_ids"].append(joined([scene.item for scene in scenes]))
    return columns


def _difference(stored: CubePlan, asked: CubePlan) -> str:
    """Say in what two plans differ, the most telling first."""
    if stored.bands != asked.bands:
        return f"its bands are {', '.join(stored.bands)}"
    if (stored.crs, stored.window, stored.spec.resolution) != (
        asked.crs, asked.window, asked.spec.resolution,
    ):  # fmt: skip
        height, width = stored.window.shape_yx
        return (
            f"its grid is {width} x {height} px of {stored.spec.resolution:g} m in {stored.crs}, "
            f"for {stored.region}"
        )
    before, now = ({scene.item for scene in plan.scenes} for plan in (stored, asked))
    if before != now:
        return f"{len(now - before)} items are new and {len(before - now)} are gone"
    ours, theirs = stored.spec.to_json(), asked.spec.to_json()
    differing = [name for name in ours if ours[name] != theirs[name] and name != "on_error"]
    if differing:
        return ", ".join(f"its {name} is {ours[name]}" for name in differing)
    return "the same items now have other addresses or other metadata"
