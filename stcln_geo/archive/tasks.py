"""What a worker does: build one shard of a stack, or one cube, from what lies in the archive."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cube.audit import SceneAudit
from ..cube.block import read_block
from ..cube.build import build_cube
from ..cube.contract import FILL
from ..cube.plan import crop_plan
from ..cube.planned import CubePlan
from ..cube.read import AssetReadError
from ..cube.scenes import Readers
from ..cube.spec import OnError
from ..cube.stack import Stack, open_building_stack
from ..cube.stack_store import write_sites
from ..cube.store import write_json
from ..cube.stored import manifest_folder, read_manifest, shard_fingerprint
from ..errors import CubeError, TaskError
from ..execution import Execution
from ..grid import Window
from ..storage import Location, location
from .plan import ARCHIVE_FILE, stack_folder
from .searches import group_items, load_group_plan, sha256
from .sites import Site

__all__ = [
    "CubeTask",
    "ShardTask",
    "TaskResult",
    "build_shard",
    "build_site_cube",
    "cube_folder",
    "shard_manifest",
    "site_plan",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """A shard of a stack to build; small, so that it travels well."""

    archive: str
    fingerprint: str
    """Of the archive's plan, which the task reads from the archive."""
    crs: str
    season: str
    first: int
    """Position of the shard's first site."""
    skip_failures: bool
    threads: int

    def __str__(self) -> str:
        return f"season {self.season} in {self.crs}, sites from number {self.first + 1} on"


@dataclass(frozen=True, slots=True, kw_only=True)
class CubeTask:
    """A site to build as a cube."""

    archive: str
    fingerprint: str
    site: int
    """Position among the archive's sites."""
    on_error: OnError
    max_failed_fraction: float | None
    memory: int
    threads: int

    def __str__(self) -> str:
        return f"site number {self.site + 1}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What became of a shard or cube."""

    sites: int
    """Site-seasons written."""
    reads: int
    problem: str | None = None
    """Why it is not finished."""
    failures: int = 0
    """Assets left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredArchive:
    """An archive's plan, as its tasks need it."""

    path: Location
    sites: tuple[Site, ...]
    by_id: Mapping[str, Site]
    groups: Mapping[tuple[str, str, str], tuple[str, str]]
    """Name and fingerprint of a group's plan by CRS, cell and season."""

    def group_plan(self, site: Site, season: str) -> CubePlan | None:
        """Return the plan of a site's group, or None where nothing was found."""
        name, fingerprint = self.groups.get((site.crs, site.cell, season), ("", ""))
        return load_group_plan(str(self.path), name, fingerprint) if fingerprint else None


@functools.lru_cache(maxsize=4)
def stored_archive(path: str, fingerprint: str) -> StoredArchive:
    """Read an archive's plan once per process."""
    content = read_manifest(location(path) / ARCHIVE_FILE)
    if content.get("fingerprint") != fingerprint:
        raise CubeError(
            f"Cannot go on with the archive {path}: another run has replaced its plan. Run one "
            "'archive create' per path at a time."
        )
    sites = tuple(Site(**{**site, "window": Window(**site["window"])}) for site in content["sites"])
    return StoredArchive(
        path=location(path),
        sites=sites,
        by_id={site.id: site for site in sites},
        groups={
            (group["crs"], group["cell"], group["season"]): (group["name"], group["fingerprint"])
            for group in content["groups"]
        },
    )


def site_plan(plan: CubePlan, site: Site) -> CubePlan:
    """Return a site's part of its group's plan."""
    return crop_plan(plan, site.window, region=f"site {site.id}")


def shard_manifest(stack: Location, season: str, first: int) -> Location:
    """Return where a stack shard's manifest lies."""
    return manifest_folder(stack, season) / f"{first}.json"


def build_shard(task: ShardTask) -> TaskResult:
    """Build a shard of a stack, unless it is there from exactly these inputs."""
    path = location(task.archive)
    archive = stored_archive(task.archive, task.fingerprint)
    stack = open_building_stack(path / stack_folder(task.crs), task.season)
    if stack is None:
        raise CubeError(
            f"Cannot build a shard of {path / stack_folder(task.crs)}: it has no season "
            f"{task.season} under construction. Run 'archive create' again."
        )
    names = stack.site_id[task.first : task.first + stack.layout.sites]
    plans = [_part(archive, archive.by_id[name], task.season) for name in names]
    prints = [
        shard_fingerprint(plan, plan.season(task.season), Window(0, 0, *plan.window.shape_yx))
        for plan in plans
    ]
    manifest = shard_manifest(stack.path, task.season, task.first)
    fingerprint = sha256([list(names), prints, dataclasses.asdict(stack.layout)])
    before = read_manifest(manifest)
    if before.get("fingerprint") == fingerprint and (
        task.skip_failures or not any(site["left_out"] for site in before["sites"])
    ):
        return TaskResult(sites=0, reads=0)

    arrays = _empty(stack, len(names))
    readers: dict[str, Readers] = {}
    audit: dict[str, SceneAudit] = {}
    told: list[dict[str, Any]] = []
    for position, (name, plan) in enumerate(zip(names, plans, strict=True)):
        access = json.dumps(plan.access.model_dump(), sort_keys=True, default=str)
        reader = readers.setdefault(access, Readers(plan.access))
        try:
            pixels = read_block(
                plan, plan.season(task.season), reader, folder=path,
                skip_failures=task.skip_failures, threads=task.threads,
            )  # fmt: skip
        except AssetReadError as error:
            # The ledger names the asset; the other shards are built before it is reported.
            return TaskResult(
                sites=0, reads=sum(one.reads for one in readers.values()),
                problem=f"site {name}, {task.season}: {error}", failures=1,
            )  # fmt: skip
        here, dates = pixels.arrays, len(pixels.arrays.valid)
        for key in arrays:
            arrays[key][position, :dates] = getattr(here, key)
        for item, counts in pixels.audit.items():
            audit[item] = audit.get(item, SceneAudit()) + SceneAudit.from_json(counts)
        told.append(
            {
                "id": name,
                "dates": dates,
                "clear_fraction": float(here.valid.mean()),
                "left_out": list(pixels.left_out),
            }
        )
    write_sites(stack, task.first, **arrays)
    write_json(
        manifest,
        {
            "fingerprint": fingerprint,
            "first": task.first,
            "sites": told,
            "audit": {item: counts.to_json() for item, counts in audit.items()},
            "offsets": {
                scene.item: scene.bands[0].radiometry.offset
                for plan in plans
                for scene in plan.scenes
                if scene.item in audit
            },
        },
    )
    return TaskResult(
        sites=len(names),
        reads=sum(one.reads for one in readers.values()),
        failures=sum(len(site["left_out"]) for site in told),
    )


def build_site_cube(task: CubeTask) -> TaskResult:
    """Build the cube of a site, or what is missing of it."""
    path = location(task.archive)
    archive = stored_archive(task.archive, task.fingerprint)
    site = archive.sites[task.site]
    parts, items = [], {}
    for crs, cell, season in archive.groups:
        if (crs, cell) != (site.crs, site.cell):
            continue
        group = archive.group_plan(site, season)
        part = site_plan(group, site) if group is not None else None
        if part is None or not part.seasons:
            continue
        parts.append(part)
        used = {scene.item for scene in part.scenes}
        name = archive.groups[(crs, cell, season)][0]
        items.update({item["id"]: item for item in group_items(path, name) if item["id"] in used})
    seasons = tuple(season for part in parts for season in part.seasons)
    spec = dataclasses.replace(
        parts[0].spec, on_error=task.on_error, max_failed_fraction=task.max_failed_fraction
    )
    plan = dataclasses.replace(
        parts[0], spec=spec, seasons=seasons, dropped=(), items=tuple(items.values())
    )
    cube = path / cube_folder(site.id)
    try:
        report = build_cube(
            plan, cube, execution=Execution(threads=task.threads), memory=task.memory
        )
    except TaskError as error:
        return TaskResult(sites=0, reads=0, problem=str(error), failures=1)
    return TaskResult(
        sites=len(seasons) if report.shards_written else 0,
        reads=report.windows_read,
        failures=len(report.failures),
    )


def cube_folder(name: str) -> str:
    """Return the path of a site's cube in the archive."""
    from urllib.parse import quote

    return f"cubes/{quote(name, safe=' ')}.zarr"


def _part(archive: StoredArchive, site: Site, season: str) -> CubePlan:
    group = archive.group_plan(site, season)
    if group is None:
        raise CubeError(
            f"Cannot build site {site.id!r} in {season}: its search is gone from {archive.path}. "
            "Run 'archive create' again."
        )
    return site_plan(group, site)


def _empty(stack: Stack, sites: int) -> dict[str, Any]:
    """Return the arrays of a shard without any measurement."""
    _, dates, bands, height, width = stack.reflectance.shape
    arrays: dict[str, Any] = {
        "reflectance": np.full((sites, dates, bands, height, width), FILL, dtype=np.int16),
        "valid": np.zeros((sites, dates, height, width), dtype=bool),
    }
    for name in ("scl", "observations"):
        if getattr(stack, name) is not None:
            arrays[name] = np.zeros((sites, dates, height, width), dtype=np.uint8)
    return arrays
