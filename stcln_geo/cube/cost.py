"""What a plan costs: blocks, reads, bytes and memory; and the plan as text for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from ..errors import InputError
from ..grid import Window, tiles
from .composite import STRIP_VALUES
from .granules import Dropped
from .planned import CubePlan, Scene, SeasonPlan
from .sky import SKY_BANDS, SKY_BYTES, SKY_LATTICE

__all__ = [
    "DEFAULT_MEMORY",
    "TaskShare",
    "count_reads",
    "cube_bytes",
    "describe_plan",
    "describe_search",
    "grid_bytes",
    "plan_blocks",
    "read_bytes",
    "shard_bytes",
    "summary",
    "task_bytes",
    "task_share",
    "waiting_bytes",
]

DEFAULT_MEMORY = 8_000_000_000
"""Memory of all tasks together (bytes), where none is given."""

MAX_BLOCK = 2048
"""Largest side of the square that is read at once where nothing else decides (pixels)."""

WIDEST_BLOCK = MAX_BLOCK + 512
"""Largest side of the rectangle one task owns (pixels): a little more, so that no sliver is
left."""

_EVEN_BLOCK = 1024
"""Blocks are not made smaller than this so that all workers have work."""

_TASKS_PER_WORKER = 2

READERS = 4
"""Assets that a task reads at a time, or more where it has more threads."""

SCENES_AHEAD = 2
"""Scenes that are read while another is being fused."""

_SHARE = 0.8
"""Part of the memory that the arrays may fill; Python, GDAL and its cache need the rest."""

_FIXED_BYTES = 200_000_000

_HEAP_BYTES = 150_000_000
"""GDAL's cache, and what the heaps of the threads that read for a block hold on to."""

MERGE_BYTES = 80
"""Per value that a composite works on at a time."""


def plan_blocks(
    plan: CubePlan, season: SeasonPlan, *, memory: int = DEFAULT_MEMORY, workers: int = 0
) -> list[Window]:
    """Return the rectangles of whole shards that tasks own, counted from the first pixel.

    They are about equal, and as large as may be: the larger, the fewer blocks of the files lie
    under two of them and are read twice.

    Raises
    ------
    InputError
        If the memory does not suffice for one shard per worker.
    """
    share = memory / max(workers, 1)
    shard = season.layout.shard
    if task_bytes(plan, season, shard) > share:
        need = task_bytes(plan, season, shard) * max(workers, 1) / 1e9
        raise InputError(
            f"Cannot build with {memory / 1e9:.2g} GB for {max(workers, 1)} workers: season "
            f"{season.name} needs {need:.2g} GB for one shard of {shard} px each. Give more "
            "--memory, or fewer --workers."
        )
    most = max(WIDEST_BLOCK // shard, 1)
    while True:
        blocks = _even_blocks(plan.window.shape_yx, shard, most)
        side = max(max(block.shape_yx) for block in blocks)
        idle = side > _EVEN_BLOCK and len(blocks) < _TASKS_PER_WORKER * workers
        if most == 1 or not (idle or task_bytes(plan, season, side) > share):
            return blocks
        most -= 1


def _even_blocks(shape_yx: tuple[int, int], shard: int, most: int) -> list[Window]:
    """Cut a grid into rectangles of at most so many shards along each side."""
    starts = []
    for size in shape_yx:
        shards = -(-size // shard)
        parts = -(-shards // most)
        edges = [part * shards // parts * shard for part in range(parts)]
        starts.append(list(zip(edges, [*edges[1:], size], strict=True)))
    return [
        Window(top, left, bottom - top, right - left)
        for top, bottom in starts[0]
        for left, right in starts[1]
    ]


def task_bytes(plan: CubePlan, season: SeasonPlan, side: int) -> int:
    """Return the memory (bytes) that building a block of some side takes, at least.

    That is one shard's arrays, and what is read of the block at a time. The other pixels of the
    block wait in scratch.
    """
    height, width = (min(side, size) for size in plan.window.shape_yx)
    padding = 2 * plan.spec.clouds.padding
    # The pixels of an asset, and the part of a shard on its way to where it waits.
    reading = READERS * 2 * 2 * (height + padding) * (width + padding)
    extra, sky = _sky_bytes(plan, height, width)
    arrays = shard_bytes(plan, season) + reading + extra
    return round(arrays / _SHARE) + _FIXED_BYTES + _HEAP_BYTES + sky


def shard_bytes(plan: CubePlan, season: SeasonPlan) -> float:
    """Return the bytes of the arrays with which one shard is made."""
    side = season.layout.shard
    height, width = (min(side, size) for size in plan.window.shape_yx)
    bands = len(plan.bands)
    # Raw and harmonised numbers of a scene, and what interpolating and fusing allocate.
    passing = 4 * bands + 40
    return height * width * (_kept_bytes(plan, season) + passing) + _written_bytes(
        plan, season, side
    )


def grid_bytes(plan: CubePlan, season: SeasonPlan, side: int) -> int:
    """Return the memory (bytes) that all dates of a square of some side take, read at once."""
    height, width = (min(side, size) for size in plan.window.shape_yx)
    bands = len(plan.bands)
    # Raw and harmonised numbers of the scenes in flight, and what fusing one allocates.
    passing = (SCENES_AHEAD + 1) * (2 * bands + 1) + 4 * bands + 24
    arrays: float = height * width * (_kept_bytes(plan, season) + passing)
    arrays += _written_bytes(plan, season, min(side, season.layout.shard))
    extra, sky = _sky_bytes(plan, height, width)
    return round((arrays + extra) / _SHARE) + _FIXED_BYTES + sky


def _kept_bytes(plan: CubePlan, season: SeasonPlan) -> int:
    """Return the bytes that all dates of a pixel take until they are written."""
    bands, dates = len(plan.bands), len(season.dates)
    kept = dates * (2 * bands + 1 + _extra_bytes(plan))
    if plan.spec.composite != "none":
        # The days of one period, and their cloud cover.
        kept += max(len(date.days()) for date in season.dates) * (2 * bands + 3)
    return kept


def _written_bytes(plan: CubePlan, season: SeasonPlan, side: int) -> float:
    """Return the bytes that writing a shard, and merging its periods, allocates."""
    merging = MERGE_BYTES * STRIP_VALUES if plan.spec.composite != "none" else 0
    return 1.5 * side**2 * len(season.dates) * 2 * len(plan.bands) + merging


def _sky_bytes(plan: CubePlan, height: int, width: int) -> tuple[int, int]:
    """Return the bytes of arrays around the cloud model in an area, and of the model itself."""
    if not _has_sky(plan):
        return 0, 0
    # Three bands, at the worst place on the model's lattice, of the scenes in flight, and of one
    # without what is no data; its classes.
    wide = _seen_side(height, plan) * _seen_side(width, plan)
    return wide * 3 * 2 * (SCENES_AHEAD + 2) + 2 * height * width, SKY_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskShare:
    """What a build task may do with its share of the memory."""

    together: int
    """Shards that it makes at a time."""
    keep: int
    """Bytes of pixels, as they were read, that may wait in memory."""


def task_share(
    plan: CubePlan,
    season: SeasonPlan,
    blocks: Sequence[Window],
    *,
    memory: int,
    workers: int,
    threads: int,
) -> TaskShare:
    """Return what each of the tasks of a season may do, which have some threads each."""
    side = max(max(block.shape_yx) for block in blocks)
    free = memory / max(workers, 1) - task_bytes(plan, season, side)
    one = shard_bytes(plan, season)
    more = max(min(int(free / one), threads - 1), 0)
    # Scratch costs little more than memory: half of the rest is left to what is not counted.
    return TaskShare(together=1 + more, keep=max(int(free - more * one) // 2, 0))


def waiting_bytes(plan: CubePlan, season: SeasonPlan, blocks: Sequence[Window]) -> int:
    """Return about how many bytes of pixels, as they were read, wait in one task, at most."""
    resolution = plan.spec.resolution
    each = sum(2 * min(resolution / _native(band), 1) ** 2 for band in plan.bands)
    # The scenes of a tile all lie at one place: a region has few, however many its dates.
    at_place: dict[tuple[int, int, int, int], float] = {}
    for scene in (scene for date in season.dates for scene in date.scenes):
        place = scene.place if scene.place is not None else astuple(plan.window)
        # Scenes of another zone wait as they were warped.
        pixel = each if scene.crs == plan.crs else 2 * len(plan.bands)
        at_place[place] = at_place.get(place, 0.0) + pixel
    corners = np.array([
        (one.row, one.row + one.height, one.col, one.col + one.width)
        for one in (block.shift(plan.window.row, plan.window.col) for block in blocks)
    ]).reshape(-1, 4)  # fmt: skip
    top, bottom, left, right = corners.T
    total = np.zeros(len(blocks))
    for (row, col, height, width), pixel in at_place.items():
        rows = np.minimum(bottom, row + height) - np.maximum(top, row)
        cols = np.minimum(right, col + width) - np.maximum(left, col)
        total += np.maximum(rows, 0) * np.maximum(cols, 0) * pixel
    return round(float(total.max(initial=0)))


def _has_sky(plan: CubePlan) -> bool:
    return plan.cloud_mask == "omnicloudmask"


def _seen_side(side: int, plan: CubePlan) -> int:
    """Return how many pixels, at most, are read along an axis for a block of some side."""
    stride = SKY_LATTICE.stride
    cores = -(-(side + 2 * plan.spec.clouds.padding - 1) // stride) + 1
    return cores * stride + 2 * SKY_LATTICE.halo


def count_reads(plan: CubePlan, season: SeasonPlan, blocks: Sequence[Window]) -> int:
    """Return the number of asset windows that a season's blocks read."""
    areas = [block.shift(plan.window.row, plan.window.col) for block in blocks]
    # The scenes of a tile all lie at one place.
    reads: Counter[tuple[int, int, int, int] | None] = Counter()
    example: dict[tuple[int, int, int, int] | None, Scene] = {}
    for scene in (scene for date in season.dates for scene in date.scenes):
        reads[scene.place] += len(scene.assets)
        example[scene.place] = scene
    return sum(
        count * sum(example[place].meets(area) for area in areas) for place, count in reads.items()
    )


def read_bytes(plan: CubePlan, season: SeasonPlan) -> int:
    """Return about how many bytes of pixels, uncompressed, a season reads."""
    total = 0.0
    for scene in (scene for date in season.dates for scene in date.scenes):
        place = Window(*scene.place) if scene.place is not None else plan.window
        pixels = place.intersection(plan.window).area * plan.spec.resolution**2
        names = {*plan.bands, *(SKY_BANDS if scene.sky else ())}
        total += sum(2 * pixels / _native(band) ** 2 for band in sorted(names))
        total += pixels / 400 if scene.scl is not None else 0
    return round(total)


def cube_bytes(plan: CubePlan, season: SeasonPlan) -> int:
    """Return the size of a season before compression."""
    per_pixel = 2 * len(plan.bands) + 1 + _extra_bytes(plan)
    return plan.window.area * len(season.dates) * per_pixel


def _extra_bytes(plan: CubePlan) -> int:
    """Return the bytes a pixel takes beside reflectance and validity: classes, or count and day."""
    return 2 if plan.spec.composite != "none" else int(plan.keeps_scl)


def describe_plan(plan: CubePlan, *, memory: int, workers: int) -> str:
    """Return the plan as text, for some memory and number of workers."""
    lines = describe_search(plan)
    left_out = lines.pop() if plan.dropped else None
    for season in plan.seasons:
        lines += _describe_season(plan, season, memory, workers)
    return "\n".join([*lines, left_out] if left_out else lines)


def describe_search(plan: CubePlan) -> list[str]:
    """Return lines of text: what was found where, and what is made of it."""
    height, width = plan.window.shape_yx
    box = plan.geobox.boundingbox
    lines = [
        f"Catalog     {plan.catalog}{f', collection {plan.collection}' if plan.collection else ''}",
        f"Region      {plan.region}",
        f"Grid        {plan.crs}, {plan.spec.resolution:g} m, {width} x {height} px, x "
        f"{box.left:.0f} to {box.right:.0f}, y {box.bottom:.0f} to {box.top:.0f} (region padded "
        f"to whole windows of {plan.spec.lattice.window} px)",
        f"Bands       {', '.join(plan.bands)}"
        + (f" (lacking: {', '.join(plan.lacking)})" if plan.lacking else ""),
        *(
            ["Level       top of atmosphere: not corrected for the atmosphere"]
            if plan.level != "surface"
            else []
        ),
        f"Sky         {_sky(plan)}",
        f"Offsets     {_offsets(plan.scenes)}",
    ]
    if plan.spec.composite != "none":
        lines.append(
            f"Composite   {plan.spec.composite} of the clear observations in each period "
            f"({plan.spec.period}, counted from the season's first day)"
        )
    if plan.dropped:
        lines.append(f"Left out    {summary(plan.dropped)}")
    return lines


def _native(band: str) -> int:
    if band in {"blue", "green", "red", "nir"}:
        return 10
    return 60 if band in {"coastal", "nir09", "cirrus"} else 20


def _sky(plan: CubePlan) -> str:
    clouds = plan.spec.clouds
    margins = f"{clouds.cloud_margin} px from clouds, {clouds.shadow_margin} px from shadows"
    if _has_sky(plan):
        codes = ", ".join(map(str, clouds.clear))
        scl = f"; scene classes {codes} of the ground" if plan.with_scl else "; no scene classes"
        return (
            f"clear = neither cloud nor shadow by OmniCloudMask (weights {clouds.weights:g}), "
            f"{margins}{scl}; it reads {', '.join(SKY_BANDS)} up to "
            f"{SKY_LATTICE.stride + SKY_LATTICE.halo} px beyond each block"
        )
    if not plan.with_scl:
        return "no scene classes: clouds are NOT masked, valid says only that there is data"
    return f"clear = scene classes {', '.join(map(str, clouds.clear))}, {margins}"


def _offsets(scenes: Sequence[Scene]) -> str:
    count = Counter(
        (scene.bands[0].radiometry.offset, scene.bands[0].radiometry.source) for scene in scenes
    )
    return "; ".join(f"{dn:+d} ({source}): {n} scenes" for (dn, source), n in sorted(count.items()))


def _describe_season(plan: CubePlan, season: SeasonPlan, memory: int, workers: int) -> list[str]:
    blocks = plan_blocks(plan, season, memory=memory, workers=workers)
    side = max(max(block.shape_yx) for block in blocks)
    days = season.time.astype("datetime64[D]")
    scenes = sum(len(date.scenes) for date in season.dates)
    lines = [
        f"Season      {season.name}: {len(days)} dates, {days[0]} to {days[-1]}, from "
        f"{scenes} scenes",
        f"            {len(blocks)} blocks of at most {side} px, "
        f"{len(tiles(plan.window.shape_yx, season.layout.shard))} shards of "
        f"{season.layout.shard} px, chunks of {season.layout.chunk} px",
        f"            {count_reads(plan, season, blocks)} asset windows to read, about "
        f"{_size(read_bytes(plan, season))} of pixels; {_size(cube_bytes(plan, season))} before "
        f"compression; {_size(task_bytes(plan, season, side))} of memory per task",
        f"            {_size(waiting_bytes(plan, season, blocks))} of pixels per task wait in "
        "further memory, or in scratch",
    ]
    empty = sum(not date.scenes for date in season.dates)
    if empty:
        lines.append(f"            {empty} of {len(days)} periods have no scene")
    lines += [f"            no date for {n} days: {a} to {b}" for a, b, n in season.gaps]
    return lines


def summary(dropped: Sequence[Dropped]) -> str:
    """Return the reasons with their number of items; ids of older processings are not repeated."""
    count = Counter(
        "are older processings" if entry.reason.startswith("older") else entry.reason
        for entry in dropped
    )
    return "; ".join(f"{n} items: {reason}" for reason, n in count.most_common())


def _size(size: int) -> str:
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
