"""Create an archive: carry out a plan, shard by shard, so that it can be killed and run again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import __version__
from ..cube.audit import SUSPECT, merge_audits
from ..cube.begin import date_provenance
from ..cube.cost import DEFAULT_MEMORY
from ..cube.lock import cube_lock
from ..cube.replace import recover_swaps, stored_fingerprint
from ..cube.sky import prepare_sky
from ..cube.stack import Stack, open_building_stack
from ..cube.stack_store import create_stack, finish_stack, take_back_stack
from ..cube.store import list_seasons, write_json
from ..cube.stored import LEDGER_FILE, manifest_paths, read_manifest, read_manifests
from ..cube.zarr_store import zarr_store
from ..errors import InputError, TaskError
from ..execution import Execution, ProgressHook, run_tasks
from ..progress import duration_text
from ..storage import Location, writing
from .index import IndexRows
from .plan import ARCHIVE_FILE, ArchivePlan, StackPlan, check_folder, size_text
from .tasks import (
    CubeTask,
    ShardTask,
    TaskResult,
    build_shard,
    build_site_cube,
    cube_folder,
    site_plan,
    stored_archive,
)

__all__ = ["CreateReport", "create_archive"]

_PER_DATE = ("platform", "orbit", "baseline", "offset_rule", "offset_dn", "item_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateReport:
    """What a run did."""

    path: Location
    site_seasons: int
    """In the index now."""
    written: int
    """Site-seasons written in this run."""
    windows_read: int
    """Asset windows read in this run."""
    failures: int
    """Assets left out in this run (only where the policy is to skip them)."""
    suspects: tuple[str, ...]
    """Items of this run whose darkest pixels contradict the offset applied to them."""
    seconds: float

    def __str__(self) -> str:
        if not self.written:
            return f"{self.path} is complete ({self.site_seasons} site-seasons): nothing to do."
        left_out = f"; {self.failures} assets left out" if self.failures else ""
        return (
            f"{self.path}: {self.site_seasons} site-seasons, {self.written} written now; "
            f"{self.windows_read} asset windows read{left_out}; {duration_text(self.seconds)}."
        )


def create_archive(
    plan: ArchivePlan,
    *,
    execution: Execution | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: ProgressHook | None = None,
) -> CreateReport:
    """Build the stacks or cubes of a plan, or what is missing of them, and the index.

    Parameters
    ----------
    memory
        Bytes for all tasks of one machine together.

    Raises
    ------
    InputError
        If the memory does not suffice for one shard per worker.
    CubeError, OutputError
        If the folder holds another archive, or cannot be written.
    TaskError
        If assets could not be read; all else is done, and the ledger names the assets.
    """
    started = time.monotonic()
    execution = execution or Execution()
    check_folder(plan.path, plan.sites, plan.spec)
    prepare_sky(plan.spec.cube.clouds)
    for stack in plan.stacks:
        _check_memory(plan, stack, memory, execution)
    results: list[TaskResult] = []
    problems: list[str] = []
    suspects: set[str] = set()
    with cube_lock(plan.path):
        _store(plan)
        try:
            for folder in sorted({stack.folder for stack in plan.stacks}):
                # A run that was stopped may have been giving a stack its name.
                recover_swaps(plan.path / folder)
            run = _Run(plan, execution, memory, progress)
            for stack in run.missing_stacks:
                done, problem, doubtful = run.build_stack(stack)
                results += done
                problems += [problem] if problem else []
                suspects |= doubtful
            results += run.build_cubes()
        finally:
            index = IndexRows(plan.path).write()
    problems += [result.problem for result in results if result.problem]
    if problems:
        raise TaskError(
            f"Cannot finish the archive {plan.path}: {len(problems)} of its parts lack assets that "
            f"could not be read ({'; '.join(problems[:3])}); all are listed in "
            f"{plan.path / LEDGER_FILE} or in the ledger of the cube. The other parts are done. "
            "Run the same command again to retry, or with --on-error skip to leave these scenes "
            "out."
        )
    return CreateReport(
        path=plan.path,
        site_seasons=index,
        written=sum(result.sites for result in results),
        windows_read=sum(result.reads for result in results),
        failures=sum(result.failures for result in results),
        suspects=tuple(sorted(suspects)),
        seconds=time.monotonic() - started,
    )


def _store(plan: ArchivePlan) -> None:
    groups = [
        {"name": one.name, "crs": one.crs, "cell": one.cell, "season": one.season,
         "fingerprint": one.fingerprint if one.sites else ""}
        for one in plan.groups
    ]  # fmt: skip
    content = {"stcln_geo": __version__, "fingerprint": plan.fingerprint, **plan.to_json()}
    content["groups"] = groups
    if read_manifest(plan.path / ARCHIVE_FILE) != content:
        write_json(plan.path / ARCHIVE_FILE, content)


class _Run:
    """A run of a plan: what is there, what is missing, and how far it is."""

    def __init__(
        self,
        plan: ArchivePlan,
        execution: Execution,
        memory: int,
        progress: ProgressHook | None,
    ) -> None:
        self.plan, self.execution, self.memory = plan, execution, memory
        self.archive = str(plan.path.resolve())
        self.skip = plan.spec.cube.on_error == "skip"
        self.missing_stacks = [stack for stack in plan.stacks if not self._is_done(stack)]
        self._cube_prints: dict[str, list[str]] = {}
        for group in plan.groups:
            for name in group.sites:
                self._cube_prints.setdefault(name, []).append(group.fingerprint)
        cubes = {site.id for site in plan.cubes}
        self.missing_cubes = [
            number
            for number, site in enumerate(plan.sites)
            if site.id in cubes and not self._cube_is_done(site.id)
        ]
        self._total = sum(_shards(stack) for stack in self.missing_stacks)
        self._total += len(self.missing_cubes)
        self._before = 0
        self._progress = progress
        self._index = IndexRows(plan.path)

    def _is_done(self, stack: StackPlan) -> bool:
        path = self.plan.path / stack.folder
        if not (path / "zarr.json").is_file() or stack.season not in list_seasons(path):
            return False
        if stored_fingerprint(path, stack.season) != stack.fingerprint:
            return False
        return self.skip or not any(
            site["left_out"]
            for manifest in read_manifests(path, stack.season)
            for site in manifest["sites"]
        )

    def _cube_is_done(self, name: str) -> bool:
        marker = read_manifest(self._marker(name))
        whole = (self.plan.path / cube_folder(name) / "zarr.json").is_file()
        lacking = marker.get("left_out") and not self.skip
        return whole and marker.get("fingerprint") == self._cube_prints[name] and not lacking

    def _marker(self, name: str) -> Location:
        cube = self.plan.path / cube_folder(name)
        return cube.with_name(f"{cube.stem}.json")

    def _run(self, function: Any, tasks: Sequence[Any], label: str) -> list[TaskResult]:
        def advance(finished: int, _: int, what: str) -> None:
            if self._progress is not None:
                self._progress(self._before + finished, self._total, what)

        # Reading retries by itself; a whole shard read again would cost minutes.
        results: list[TaskResult] = run_tasks(
            function, tasks, execution=self.execution, label=label, progress=advance, retries=0
        )
        self._before += len(tasks)
        return results

    def build_stack(self, stack: StackPlan) -> tuple[list[TaskResult], str | None, set[str]]:
        """Build a stack's missing shards; return results, what is wrong, and suspect items."""
        path = self.plan.path / stack.folder
        opened = self._reopen(path, stack) or open_building_stack(path, stack.season)
        if opened is None or opened.attrs.get("fingerprint") != stack.fingerprint:
            opened = self._create(stack)
        results = self._run(
            build_shard,
            [
                ShardTask(
                    archive=self.archive, fingerprint=self.plan.fingerprint, crs=stack.crs,
                    season=stack.season, first=shard.start, skip_failures=self.skip,
                    threads=self.execution.threads_per_worker,
                )
                for shard in opened.shards
            ],
            "shard",
        )  # fmt: skip
        if any(result.problem for result in results):
            return results, None, set()
        problem = self._too_many_left_out(path, stack)
        if problem is not None:
            return results, problem, set()
        suspects = _mark_suspects(path, opened)
        finish_stack(path, stack.season)
        self._index.forget(stack.folder, stack.season)
        self._index.write()
        return results, None, suspects

    def _reopen(self, path: Location, stack: StackPlan) -> Stack | None:
        """Take a whole stack that lacks scenes back to work: only its lacking shards are redone."""
        if stored_fingerprint(path, stack.season) != stack.fingerprint:
            return None
        take_back_stack(path, stack.season)
        return open_building_stack(path, stack.season)

    def _create(self, stack: StackPlan) -> Stack:
        """Create a stack's empty arrays and the table of its sites."""
        archive = stored_archive(self.archive, self.plan.fingerprint)
        time = np.full((len(stack.sites), stack.dates), "NaT", dtype="datetime64[s]")
        columns = {name: np.full(time.shape, "", dtype=object) for name in _PER_DATE}
        masked, collection = True, None
        for number, site in enumerate(stack.sites):
            group = archive.group_plan(site, stack.season)
            if group is None:
                continue
            part = site_plan(group, site)
            season = part.season(stack.season)
            dates = slice(len(season.dates))
            time[number, dates] = season.time
            told = date_provenance(part, season)
            for name in _PER_DATE:
                columns[name][number, dates] = told[name]
            masked, collection = masked and part.cloud_mask != "none", part.collection
        cube = self.plan.spec.cube
        path = self.plan.path / stack.folder
        with writing(path):
            # Shards of other arrays are no longer there.
            for file in manifest_paths(path, stack.season):
                file.unlink()
        return create_stack(
            path,
            stack.season,
            site_id=[site.id for site in stack.sites],
            crs=[site.crs for site in stack.sites],
            transform=np.array([tuple(site.geobox.affine)[:6] for site in stack.sites]),
            shape_yx=(self.plan.spec.size, self.plan.spec.size),
            time=time,
            bands=self.plan.bands,
            layout=stack.layout,
            with_scl=stack.keeps_scl and cube.keep_scl and cube.composite == "none",
            with_observations=cube.composite != "none",
            attrs={
                "season_start": cube.season_start,
                "catalog": self.plan.spec.to_json()["catalog"],
                "collection": collection,
                "fingerprint": stack.fingerprint,
                "clouds_masked": masked,
                "composite": cube.composite,
                "period": cube.period,
            },
            date_attrs={
                **{
                    name: values.astype(np.dtypes.StringDType()) for name, values in columns.items()
                },
                SUSPECT: np.zeros(time.shape, dtype=bool),
            },
        )

    def _too_many_left_out(self, path: Location, stack: StackPlan) -> str | None:
        """Return why a stack may not be finished; its shards that lack scenes are then not done."""
        share = self.plan.spec.cube.max_failed_fraction
        if share is None:
            return None
        failed: set[str] = set()
        lacking = []
        files = manifest_paths(path, stack.season)
        for file, manifest in zip(files, read_manifests(path, stack.season), strict=True):
            items = {item for site in manifest["sites"] for item in site["left_out"]}
            failed |= items
            lacking += [file] if items else []
        scenes = sum(group.items for group in stack.groups)
        if len(failed) <= share * scenes:
            return None
        for file in lacking:
            file.unlink()
        return (
            f"{len(failed)} of {scenes} scenes of {stack.folder}, season {stack.season}, have an "
            f"asset that cannot be read, and the share of --max-failed-fraction is {share:g}"
        )

    def build_cubes(self) -> list[TaskResult]:
        """Build the cubes that are missing, one task each."""
        if not self.missing_cubes:
            return []
        spec = self.plan.spec.cube
        results = self._run(
            build_site_cube,
            [
                CubeTask(
                    archive=self.archive, fingerprint=self.plan.fingerprint, site=number,
                    on_error=spec.on_error, max_failed_fraction=spec.max_failed_fraction,
                    memory=self.memory // max(self.execution.workers, 1),
                    threads=self.execution.threads_per_worker,
                )
                for number in self.missing_cubes
            ],
            "cube",
        )  # fmt: skip
        for number, result in zip(self.missing_cubes, results, strict=True):
            name = self.plan.sites[number].id
            if not result.problem:
                write_json(
                    self._marker(name),
                    {"fingerprint": self._cube_prints[name], "left_out": result.failures},
                )
        return results


def _shards(stack: StackPlan) -> int:
    return -(-len(stack.sites) // stack.layout.sites)


def _check_memory(plan: ArchivePlan, stack: StackPlan, memory: int, execution: Execution) -> None:
    pixels, bands = plan.spec.size**2, len(plan.bands)
    sites = min(stack.layout.sites, len(stack.sites))
    raw = pixels * stack.dates * (2 * bands + 2)
    # The shard, its compressed copy, one site more, and what Python and GDAL take.
    need = round(1.5 * sites * raw + 2 * raw + 250_000_000)
    workers = max(execution.workers, 1)
    if need * workers > memory:
        raise InputError(
            f"Cannot create the archive with {size_text(memory)} for {workers} workers: a shard of "
            f"{sites} sites needs {size_text(need)} each. Give more --memory, or fewer --workers."
        )


def _mark_suspects(path: Location, stack: Stack) -> set[str]:
    """Mark the dates that hold a suspect scene; a scene is judged by all sites that it shows."""
    import zarr

    manifests = read_manifests(path, stack.name)
    offsets = {item: dn for manifest in manifests for item, dn in manifest["offsets"].items()}
    suspects = {
        item
        for item, counts in merge_audits(manifests).items()
        if counts.contradicts(offsets[item])
    }
    if suspects:
        with writing(path):
            group: Any = zarr.open_group(
                zarr_store(path / stack.folder), mode="r+", use_consolidated=False
            )
            held = [[not suspects.isdisjoint(str(ids).split()) for ids in row]
                    for row in group["item_ids"][:]]  # fmt: skip
            group[SUSPECT][:] = np.array(held)
    return suspects
