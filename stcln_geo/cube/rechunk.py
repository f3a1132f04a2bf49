"""Write a cube in another layout: other chunks, other shards, another codec, the same content.

Small chunks suit training, chunks of one date suit looking at dates. Every array with pixels is
copied shard by shard; coordinates, attributes, labels, the item snapshot and the ledger come
along, and the plan and the manifests are brought to the new shards, so that append and repair
go on in the new layout.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import zarr

from ..errors import CubeError, InputError, OutputError
from ..execution import Execution, ProgressHook, run_tasks
from ..grid import Window, tiles
from ..storage import (
    Location,
    list_files,
    location,
    make_folder,
    remove_tree,
    version_of,
    write_file,
    writing,
)
from .audit import merge_audits
from .cost import DEFAULT_MEMORY
from .layout import Codec, block_sum, coverage_dtype, create_array
from .lock import cube_lock
from .planned import CubePlan, SeasonPlan
from .read import append_ledger, read_ledger
from .rechunk_plan import RechunkPlan, plan_rechunk
from .replace import current_seasons, store_season_plan
from .store import Season, finish_season, list_seasons, open_building, quiet_zarr, write_json
from .stored import (
    ITEMS_FILE,
    LEDGER_FILE,
    PLAN_FILE,
    manifest_path,
    read_manifests,
    read_plan_file,
    season_fingerprint,
    shard_fingerprint,
    store_plan,
)
from .zarr_store import zarr_store

__all__ = ["RechunkReport", "rechunk_cube"]

RECORD_FILE = "rechunk.json"
_MARKS = "rechunk.shards"


@dataclass(frozen=True, slots=True, kw_only=True)
class RechunkReport:
    """What a rechunk did."""

    out: Location
    shards_written: int
    shards_kept: int
    """Shards that an earlier run had copied."""

    def __str__(self) -> str:
        if not self.shards_written:
            return f"{self.out} is complete: nothing to do."
        kept = f" ({self.shards_kept} kept)" if self.shards_kept else ""
        return f"{self.out}: {self.shards_written} shards written{kept}."


@dataclass(frozen=True, slots=True, kw_only=True)
class _CopyTask:
    """A shard to copy; small, so that it travels well."""

    source: str
    out: str
    season: str
    window: Window
    chunk: int

    def __str__(self) -> str:
        return f"season {self.season}, {self.window}"


def rechunk_cube(
    cube: str | Location,
    out: str | Location,
    *,
    chunk: int | None = None,
    shard: int | None = None,
    dates: int | None = None,
    codec: Codec = "zstd",
    execution: Execution | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: ProgressHook | None = None,
) -> RechunkReport:
    """Write a cube in another layout, array for array equal.

    Run again after an interruption, it goes on where it stopped. Append and repair work on the
    new cube, and new seasons get its layout.

    Parameters
    ----------
    out
        Path of the new cube.
    chunk, shard
        Sides (pixels) of inner chunks and shards; by default those of the first season.
    dates
        Dates per inner chunk; by default all.
    memory
        Bytes for all workers of one machine together.

    Raises
    ------
    CubeError
        If the cube is unfinished or changes meanwhile.
    InputError
        If the layout is not possible, or the memory does not suffice for a shard.
    OutputError
        If the path holds something else, or cannot be written.
    """
    execution = execution or Execution()
    plan = plan_rechunk(cube, out, chunk=chunk, shard=shard, dates=dates, codec=codec)
    need = max(plan.shard_bytes(season) for season in plan.seasons) * max(execution.workers, 1)
    if need > memory:
        raise InputError(
            f"Cannot rechunk with {memory / 1e9:.2g} GB: shards of {plan.layout.shard} px need "
            f"{need / 1e9:.2g} GB for {max(execution.workers, 1)} workers. Give more --memory, a "
            "smaller --shard, or fewer --workers."
        )
    with cube_lock(plan.out):
        record = {
            "source": str(plan.source.resolve()),
            "layout": plan.layout.to_json(),
            "seasons": {season.name: _identity(season) for season in plan.seasons},
        }
        if _begin(plan, record):
            return RechunkReport(out=plan.out, shards_written=0, shards_kept=0)
        moved = _moved_plan(plan)
        written = kept = 0
        total = sum(len(tiles(season.shape_yx, plan.layout.shard)) for season in plan.seasons)
        for season in plan.seasons:
            shards = tiles(season.shape_yx, plan.layout.shard)
            if season.name in list_seasons(plan.out):
                kept += len(shards)
                continue
            done = _copy_season(
                plan, season, moved, execution, progress, before=kept + written, total=total
            )
            written, kept = written + len(shards) - done, kept + done
        if {season.name: _identity(season) for season in plan.seasons} != record["seasons"]:
            raise CubeError(
                f"Cannot finish {plan.out}: {plan.source} was changed meanwhile, so the copy may "
                f"be half old and half new. Remove {plan.out} and run the command again."
            )
        _carry_files(plan, moved)
        with writing(plan.out):
            remove_tree(plan.out / _MARKS)
        write_json(plan.out / RECORD_FILE, {**record, "is_complete": True})
    return RechunkReport(out=plan.out, shards_written=written, shards_kept=kept)


def _identity(season: Season) -> str:
    """Return what tells whether a season was rebuilt: its metadata and when it was created."""
    metadata = season.cube / season.name / "zarr.json"
    created = version_of(season.cube / season.name / "time" / "zarr.json")
    return hashlib.sha256(metadata.read_bytes() + created.encode()).hexdigest()


def _begin(plan: RechunkPlan, record: Mapping[str, Any]) -> bool:
    """Make the folder ready; return True where an earlier run has done all."""
    out = plan.out
    try:
        before = json.loads((out / RECORD_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before is None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(
                f"Cannot write the cube {out}: something else is there. Choose a new path such as "
                "other.zarr."
            )
        root: Any = zarr.open_group(zarr_store(plan.source), mode="r", use_consolidated=False)
        with writing(out):
            make_folder(out)
            write_json(out / RECORD_FILE, record)
            zarr.open_group(zarr_store(out), mode="a", zarr_format=3, attributes=dict(root.attrs))
        return False
    if {key: before.get(key) for key in record} != dict(record):
        raise OutputError(
            f"Cannot go on with {out}: it was begun from {before.get('source')} with "
            f"{before.get('layout')}, and the cube or the layout is another now. Choose another "
            f"path, or remove {out}."
        )
    return bool(before.get("is_complete"))


def _moved_plan(plan: RechunkPlan) -> CubePlan | None:
    """Return the plan a built cube would have in the new layout; None for cubes of other tools."""
    if not (plan.source / PLAN_FILE).is_file():
        return None
    content = read_plan_file(plan.source)
    old = CubePlan.from_json(content["plan"])
    names = {season.name for season in old.seasons}
    if current_seasons(plan.source, old) != names:
        raise CubeError(
            f"Cannot rechunk {plan.source}: it is not what its plan says, as after a build or an "
            "append that was stopped. Run that command again first."
        )
    return replace(
        old,
        seasons=tuple(replace(season, layout=plan.layout) for season in old.seasons),
        spec=replace(old.spec, layout=plan.layout),
        request=content.get("request") or {},
    )


def _copy_season(
    plan: RechunkPlan,
    season: Season,
    moved: CubePlan | None,
    execution: Execution,
    progress: ProgressHook | None,
    *,
    before: int,
    total: int,
) -> int:
    """Copy a season and give it its name; return how many shards an earlier run had copied."""
    if open_building(plan.out, season.name) is None:
        with writing(plan.out):
            remove_tree(plan.out / _MARKS / season.name)
        fingerprint = None
        if moved is not None:
            fingerprint = season_fingerprint(moved, moved.season(season.name))
        _create(plan, season, fingerprint)
    shards = tiles(season.shape_yx, plan.layout.shard)
    marks = set(list_files(plan.out / _MARKS / season.name))
    todo = [shard for shard in shards if _mark_name(shard) not in marks]
    kept = len(shards) - len(todo)
    tasks = [
        _CopyTask(
            source=str(plan.source.resolve()),
            out=str(plan.out.resolve()),
            season=season.name,
            window=shard,
            chunk=plan.layout.chunk,
        )
        for shard in todo
    ]

    def advance(done: int, _: int, what: str) -> None:
        if progress is not None:
            progress(before + kept + done, total, what)

    run_tasks(_copy_shard, tasks, execution=execution, label="shard", progress=advance)
    if moved is not None:
        _carry_manifests(plan, season, moved, moved.season(season.name))
    finish_season(plan.out, season.name)
    return kept


def _mark_name(shard: Window) -> str:
    return f"{shard.row}_{shard.col}"


def _create(plan: RechunkPlan, season: Season, fingerprint: str | None) -> None:
    """Create all arrays of a season: with pixels empty, all others with their content."""
    old: Any = zarr.open_group(
        zarr_store(season.cube / season.folder), mode="r", use_consolidated=False
    )
    layout = plan.layout
    folder = plan.out / f"{season.name}.building"
    height, width = season.shape_yx
    per_shard = layout.shard // layout.chunk
    with writing(plan.out), quiet_zarr():
        remove_tree(folder)
        new: Any = zarr.create_group(zarr_store(folder), zarr_format=3)
        for name, array in sorted(old.arrays()):
            dims = tuple(array.metadata.dimension_names or ())
            shape, chunks, shards = array.shape, array.chunks, None
            dtype = array.dtype.name
            if dims[-2:] == ("y", "x"):
                chunks = layout.chunks(shape[:-2], dims[:-2])
                shards = layout.shards(shape[:-2], dims[:-2])
            elif name == "coverage":
                shape = (shape[0], -(-height // layout.chunk), -(-width // layout.chunk))
                chunks = (shape[0], per_shard, per_shard)
                dtype = coverage_dtype(layout.chunk)
            elif name == "overview":
                chunks = (*shape[:2], layout.shard // 16, layout.shard // 16)
            else:
                _copy_small(new, name, array)
                continue
            create_array(
                new, name, shape, chunks, shards, dtype=dtype,
                fill=array.fill_value, dims=dims, attrs=dict(array.attrs), codec=layout.codec,
            )  # fmt: skip
        attributes = {**dict(old.attrs), "layout": layout.to_json()}
        if fingerprint is not None:
            attributes["fingerprint"] = fingerprint
        new.attrs.put(attributes)


def _copy_small(group: Any, name: str, array: Any) -> None:
    """Copy an array as it is: coordinates, and the table of fields."""
    copy = group.create_array(
        name,
        shape=array.shape,
        chunks=array.chunks,
        dtype=array.dtype,
        fill_value=array.fill_value,
        dimension_names=array.metadata.dimension_names,
        attributes=dict(array.attrs),
    )
    if array.size:
        copy[...] = array[...]


def _copy_shard(task: _CopyTask) -> None:
    """Copy the pixels of one shard, count its coverage, and mark it as done."""
    out = location(task.out)
    source = zarr_store(location(task.source) / task.season)
    target = zarr_store(out / f"{task.season}.building")
    old: Any = zarr.open_group(source, mode="r", use_consolidated=False)
    new: Any = zarr.open_group(target, mode="r+", use_consolidated=False)
    window, chunk = task.window, task.chunk
    with writing(out):
        for name, array in old.arrays():
            if tuple(array.metadata.dimension_names or ())[-2:] != ("y", "x"):
                continue
            if not _is_written(array, location(task.source) / task.season / name, window):
                continue
            pixels = array[..., window.rows, window.cols]
            new[name][..., window.rows, window.cols] = pixels
            if name == "valid" and "coverage" in new:
                new["coverage"][(..., *_cells(window, chunk))] = block_sum(pixels, chunk)
        if "overview" in new:
            small = (..., *_cells(window, 16))
            new["overview"][small] = old["overview"][small]
        write_file(out / _MARKS / task.season / _mark_name(window), b"")


def _is_written(array: Any, place: Location, window: Window) -> bool:
    """Return True where a file of an array lies under a window; all else is its fill value."""
    extent = array.shards or array.chunks
    ends = (window.row + window.height, window.col + window.width)
    starts = (*(0 for _ in array.shape[:-2]), window.row, window.col)
    parts = [
        range(start // side, -(-end // side))
        for start, end, side in zip(starts, (*array.shape[:-2], *ends), extent, strict=True)
    ]
    return any(
        (place / array.metadata.encode_chunk_key(key)).is_file()
        for key in itertools.product(*parts)
    )


def _cells(window: Window, step: int) -> tuple[slice, slice]:
    """Return the cells of some side that a window covers, as slices."""
    return (
        slice(window.row // step, -(-(window.row + window.height) // step)),
        slice(window.col // step, -(-(window.col + window.width) // step)),
    )


def _corners_under(window: Window, side: int) -> list[tuple[int, int]]:
    """Return row and column of the squares of a grid that a window meets."""
    last_row, last_col = window.row + window.height, window.col + window.width
    return [
        (row, col)
        for row in range(window.row // side * side, last_row, side)
        for col in range(window.col // side * side, last_col, side)
    ]


def _carry_manifests(
    plan: RechunkPlan, season: Season, moved: CubePlan, season_plan: SeasonPlan
) -> None:
    """Write manifests of the new shards from those of the old ones."""
    old = {
        (one["window"]["row"], one["window"]["col"]): one
        for one in read_manifests(plan.source, season.name)
    }
    place = {corner: number for number, corner in enumerate(old)}
    building = open_building(plan.out, season.name)
    coverage = np.zeros((1, 1, 1)) if building is None else building.coverage[:]
    for shard in tiles(season.shape_yx, plan.layout.shard):
        under = [corner for corner in _corners_under(shard, season.layout.shard) if corner in old]
        met = [old[corner] for corner in sorted(under, key=place.__getitem__)]
        # What was counted in an old shard goes to the one that holds its first pixel: sums stay.
        first = [
            one
            for one in met
            if shard.contains(Window(one["window"]["row"], one["window"]["col"], 1, 1))
        ]
        clear = coverage[(..., *_cells(shard, plan.layout.chunk))].sum()
        write_json(
            manifest_path(plan.out, season.name, shard),
            {
                "fingerprint": shard_fingerprint(moved, season_plan, shard),
                "window": asdict(shard),
                "valid_fraction": float(clear) / max(len(season.time) * shard.area, 1),
                "left_out": sorted({item for one in met for item in one.get("left_out", ())}),
                "taken_over": True,
                "audit": {item: audit.to_json() for item, audit in merge_audits(first).items()},
            },
        )
    store_season_plan(plan.out, moved, season.name, replacing=False)


def _carry_files(plan: RechunkPlan, moved: CubePlan | None) -> None:
    """Copy what a build keeps beside the seasons."""
    if (plan.source / ITEMS_FILE).is_file():
        write_file(plan.out / ITEMS_FILE, (plan.source / ITEMS_FILE).read_bytes())
    if not read_ledger(plan.out / LEDGER_FILE):
        for entry in read_ledger(plan.source / LEDGER_FILE):
            append_ledger(plan.out / LEDGER_FILE, entry)
    if moved is not None:
        store_plan(moved, plan.out)
