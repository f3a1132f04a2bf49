"""Build a cube: carry out a plan, block by block, so that it can be killed and run again.

A task owns a block of whole shards. It reads each asset window of the block once; then, shard by
shard, it harmonises, masks and fuses date by date, and writes the shard, followed by a small
manifest that holds the fingerprint of all that went into it. A season gets its name when all its
shards are there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TaskError
from ..execution import Execution, ProgressHook, run_tasks
from ..grid import tiles
from ..progress import duration_text
from ..storage import Location, location, read_files, writing
from .audit import SUSPECT, suspect_scenes
from .begin import open_or_create, prepare_folder
from .block import BlockResult, BlockTask, build_block
from .cost import DEFAULT_MEMORY, plan_blocks, task_share
from .lock import cube_lock
from .planned import CubePlan, SeasonPlan
from .read import LedgerEntry, entries_since, read_ledger
from .replace import current_seasons, finish_replacement, recover_swaps
from .scratch import check_scratch
from .sky import prepare_sky
from .store import finish_season, list_seasons, open_building, write_date_flags
from .stored import LEDGER_FILE, PLAN_FILE, manifest_paths, parse_manifest, read_plan_file

__all__ = ["BuildReport", "build_cube", "carry_out", "unfinished_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildReport:
    """What a build did."""

    path: Location
    seasons: tuple[str, ...]
    """Seasons of the plan, now complete."""
    dates: int
    shards_written: int
    shards_kept: int
    """Shards that an earlier run had finished."""
    shards_taken: int = 0
    """Shards taken over, as they are, from the season that was replaced."""
    windows_read: int
    """Asset windows read in this run."""
    failures: tuple[LedgerEntry, ...]
    """Assets left out in this run (only where the plan says to skip them)."""
    seconds: float
    suspects: tuple[str, ...] = ()
    """Items of this run whose darkest pixels contradict the offset applied to them."""

    def __str__(self) -> str:
        if not (self.shards_written or self.shards_taken):
            return f"{self.path} is complete ({', '.join(self.seasons)}): nothing to do."
        left_out = f"; {len(self.failures)} assets left out" if self.failures else ""
        untouched = self.shards_kept + self.shards_taken
        kept = f" ({untouched} kept)" if untouched else ""
        return (
            f"{self.path}: {self.dates} dates in {', '.join(self.seasons)}; "
            f"{self.shards_written} shards written{kept}, {self.windows_read} asset windows read"
            f"{left_out}; {duration_text(self.seconds)}."
        )


def build_cube(
    plan: CubePlan,
    path: str | Location,
    *,
    execution: Execution | None = None,
    memory: int = DEFAULT_MEMORY,
    overwrite: bool = False,
    progress: ProgressHook | None = None,
    scratch: Path | None = None,
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
    scratch
        Folder on a local disk, of every machine that works, for pixels that memory cannot hold;
        by default that for temporary files. Nothing stays there.

    Raises
    ------
    CubeError
        If the path holds a cube of another plan.
    OutputError
        If the path cannot be written.
    TaskError
        If assets could not be read; the other blocks are done, and the ledger names the assets.
    """
    path = location(path)
    execution = execution or Execution()
    # These checks come before anything is written.
    prepare_sky(plan.spec.clouds)
    for season in plan.seasons:
        plan_blocks(plan, season, memory=memory, workers=execution.workers)
    check_scratch(scratch)
    with cube_lock(path):
        prepare_folder(plan, path, overwrite=overwrite)
        return carry_out(
            plan, path, execution=execution, memory=memory, progress=progress, scratch=scratch
        )


def carry_out(
    plan: CubePlan,
    path: Location,
    *,
    execution: Execution,
    memory: int = DEFAULT_MEMORY,
    progress: ProgressHook | None = None,
    redo: Collection[str] = (),
    scratch: Path | None = None,
) -> BuildReport:
    """Build what is missing of the plan stored in a cube; the caller holds the cube's lock.

    Parameters
    ----------
    redo
        Seasons whose shards with left-out scenes are built again.
    scratch
        As in ``build_cube``.

    Raises
    ------
    TaskError
        If assets could not be read, or more scenes were left out than the plan allows.
    """
    started = time.monotonic()
    prepare_sky(plan.spec.clouds)
    recover_swaps(path)
    current = current_seasons(path, plan) - set(redo)
    whole = set(list_seasons(path)) if (path / "zarr.json").is_file() else set()
    blocks = {
        season.name: plan_blocks(plan, season, memory=memory, workers=execution.workers)
        for season in plan.seasons
    }
    results: list[BlockResult] = []
    kept = done = 0
    total = sum(len(blocks[season.name]) for season in plan.seasons if season.name not in current)
    failed = False
    excess: list[str] = []
    suspects: set[str] = set()
    recorded = read_ledger(path / LEDGER_FILE)
    for season in plan.seasons:
        if season.name in current:
            kept += len(tiles(plan.window.shape_yx, season.layout.shard))
            continue
        replacing = season.name in whole
        open_or_create(plan, season, path, replacing=replacing)
        share = task_share(
            plan, season, blocks[season.name], memory=memory, workers=execution.workers,
            threads=execution.threads_per_worker,
        )  # fmt: skip
        tasks = [
            BlockTask(
                cube=str(path.resolve()),
                season=season.name,
                window=block,
                fingerprint=plan.fingerprint,
                skip_failures=plan.spec.on_error == "skip",
                threads=execution.threads_per_worker,
                together=share.together,
                keep=share.keep,
                scratch=str(scratch.resolve()) if scratch is not None else None,
                replacing=replacing,
            )
            for block in blocks[season.name]
        ]
        try:
            results += _run(tasks, execution, progress, done=done, total=total)
        except TaskError:
            # The ledger names the assets; the other seasons are built before it is reported.
            if not entries_since(recorded, read_ledger(path / LEDGER_FILE)):
                raise
            failed = True
        else:
            problem = _too_many_left_out(plan, season, path, replacing=replacing)
            if problem is not None:
                excess.append(problem)
                done += len(tasks)
                continue
            suspects |= _record_suspects(path, season, replacing=replacing)
            if replacing:
                finish_replacement(path, season.name)
            else:
                finish_season(path, season.name)
        done += len(tasks)
    failures = entries_since(recorded, read_ledger(path / LEDGER_FILE))
    if failed:
        raise TaskError(_failure_message(path, failures))
    if excess:
        raise TaskError(" ".join(excess))
    return BuildReport(
        path=path,
        seasons=tuple(season.name for season in plan.seasons),
        dates=sum(len(season.dates) for season in plan.seasons),
        shards_written=sum(result.written for result in results),
        shards_kept=kept + sum(result.kept for result in results),
        shards_taken=sum(result.taken for result in results),
        windows_read=sum(result.reads for result in results),
        failures=failures,
        suspects=tuple(sorted(suspects)),
        seconds=time.monotonic() - started,
    )


def unfinished_plan(path: str | Location, request: Mapping[str, Any]) -> CubePlan | None:
    """Return the plan of an unfinished build of the same request, so that it can go on.

    A search answers differently when items are reprocessed; a build that was killed goes on with
    the items it began with.
    """
    path = location(path)
    if not (path / PLAN_FILE).is_file():
        return None
    content = read_plan_file(path)
    plan = CubePlan.from_json(content["plan"])
    names = {season.name for season in plan.seasons}
    same = content.get("request") == json.loads(json.dumps(request, default=str))
    return plan if same and not names <= current_seasons(path, plan) else None


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


def _too_many_left_out(
    plan: CubePlan, season: SeasonPlan, path: Location, *, replacing: bool
) -> str | None:
    """Return why a season may not be finished; its shards that lack scenes are then not done."""
    share = plan.spec.max_failed_fraction
    if share is None:
        return None
    lacking: dict[Location, list[str]] = {}
    files = manifest_paths(path, season.name, replacing=replacing)
    for manifest, text in zip(files, read_files(files), strict=True):
        left_out = parse_manifest(text).get("left_out")
        if left_out:
            lacking[manifest] = left_out
    failed = sorted({item for items in lacking.values() for item in items})
    scenes = sum(len(date.scenes) for date in season.dates)
    if len(failed) <= share * scenes:
        return None
    # The next run tries them again.
    for manifest in lacking:
        manifest.unlink()
    return (
        f"Cannot finish season {season.name} of {path}: {len(failed)} of {scenes} scenes have an "
        f"asset that cannot be read ({', '.join(failed)}), and the share of --max-failed-fraction "
        f"is {share:g}. The assets are listed in {path / LEDGER_FILE}. Run the same command again "
        "to retry them, or allow a larger share."
    )


def _failure_message(path: Location, failures: tuple[LedgerEntry, ...]) -> str:
    named = "; ".join(
        f"{entry.item} {entry.asset}: {entry.kind} after {entry.attempts} attempts ({entry.error})"
        for entry in failures[:3]
    )
    return (
        f"Cannot finish {path}: {len(failures)} assets could not be read ({named}); all are listed "
        f"in {path / LEDGER_FILE}. Blocks without them are done. Run the same command again to "
        "retry, or with --on-error skip to leave these scenes out."
    )


def _record_suspects(path: Location, season: SeasonPlan, *, replacing: bool) -> set[str]:
    """Mark the dates of a season, all of whose shards are written, that hold a suspect scene."""
    found = suspect_scenes(path, season, replacing=replacing)
    opened = open_building(path, season.name)
    if opened is not None:
        with writing(path):
            write_date_flags(opened, SUSPECT, np.array([bool(items) for items in found]))
    return set().union(*found)
