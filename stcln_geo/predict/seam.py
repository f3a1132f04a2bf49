"""Measure the seams: label sampled windows again on a shifted lattice and compare.

Where the map is right about the land, it does not matter where the lattice lies. The share of
labels that change when the lattice moves by half a core is therefore a measure of what the
windows, and not the land, decided. (Half a window would not do: where the halo is a quarter of
the window, that is a whole core, and the moved lattice is the same lattice.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..execution import available_cores
from ..grid import Window
from .blend import Accumulator
from .outputs import decide
from .stitch import Piece, pieces_of
from .windows import Job, Labelled, Tally, open_job, run_windows

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["SeamTask", "audit_seams", "seam_tasks", "summarise_seams"]

_SAMPLES = 16
_WINDOWS_EACH = 13  # with the usual halo: 9 that have a say in a core, and 4 shifted ones
_LARGEST_SHARE = 10  # of the run's windows, one in so many
_PER_TASK = 4
_CANDIDATES = 8
_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SeamTask:
    """Some cores to label twice; small, as it travels to workers."""

    out: str
    """Folder of the product; ``plan.json`` is there."""
    run: str
    """Hash of the plan."""
    cores: tuple[tuple[int, int], ...]
    """Row and column of candidates (absolute pixels)."""
    count: int
    """Cores with a mapped pixel that are wanted of them."""
    threads: int | None
    """Windows that run side by side on a CPU; None = all cores of the worker."""

    def __str__(self) -> str:
        row, col = self.cores[0]
        return f"{len(self.cores)} windows from row {row}, column {col} of the CRS"


def seam_tasks(plan: PredictionPlan, out: str, *, threads: int | None) -> list[SeamTask]:
    """Return the tasks of a plan's audit: the same cores for the same plan, whoever asks."""
    count = plan.spec.seam_audit
    if count is None:
        count = min(_SAMPLES, max(plan.window_count // (_LARGEST_SHARE * _WINDOWS_EACH), 1))
        if plan.source is not None:  # each core is a read of every image
            count = min(count, max(len(plan.shards) // 2, 1))
    cores = _sample(plan, count * _CANDIDATES)
    number = -(-count // _PER_TASK)
    tasks = []
    for index in range(number):
        mine = tuple(cores[index::number])
        share = count // number + (index < count % number)
        if mine:
            tasks.append(
                SeamTask(out=out, run=plan.run_hash, cores=mine, count=share, threads=threads)
            )
    return tasks


def _sample(plan: PredictionPlan, count: int) -> list[tuple[int, int]]:
    """Draw distinct cores that touch the region."""
    import shapely

    stride = plan.lattice.stride
    if count == 0 or stride == 1:  # a lattice of single pixels cannot be moved
        return []
    area = plan.lattice.cover(plan.extent).expand(-plan.lattice.halo)
    rows, cols = area.height // stride, area.width // stride
    generator = np.random.default_rng(_SEED)
    chosen = generator.choice(rows * cols, size=min(20 * count, rows * cols), replace=False)
    row = area.row + chosen // cols * stride
    col = area.col + chosen % cols * stride
    side = plan.resolution
    boxes = shapely.box(col * side, -(row + stride) * side, (col + stride) * side, -row * side)
    shapely.prepare(plan.aoi)
    found = np.flatnonzero(shapely.intersects(plan.aoi, boxes))[:count]
    return [(int(row[index]), int(col[index])) for index in found]


def audit_seams(task: SeamTask) -> dict[str, int]:
    """Label cores on the lattice and on the shifted one; count the labels that differ.

    Returns
    -------
    dict
        "cores" and "pixels" that were compared, and the pixels that differ with windows merged
        by "cores_differ" and by "blend_differ".
    """
    job = open_job(task.out, task.run)
    threads = task.threads or available_cores()
    total = {"cores": 0, "pixels": 0, "cores_differ": 0, "blend_differ": 0}
    for row, col in task.cores:
        if total["cores"] == task.count:
            break
        stride = job.lattice.stride
        found = _audit(job, Window(row, col, stride, stride), threads)
        for name, value in found.items():
            total[name] += value
    return total


def _audit(job: Job, core: Window, threads: int) -> dict[str, int]:
    wanted = job.inside(core)
    kept = job.kept(core)
    if kept is not None:
        wanted &= kept
    half = job.lattice.stride // 2
    everywhere = np.ones(core.shape_yx, dtype=bool)
    here = pieces_of(core, job.lattice, everywhere, blend=True)
    moved = [
        Piece(
            core=piece.core.shift(half, half),
            seen=piece.seen.shift(half, half),
            owned=piece.owned.shift(half, half),
        )
        for piece in pieces_of(core.shift(-half, -half), job.lattice, everywhere, blend=True)
    ]
    none = {"cores": 0, "pixels": 0, "cores_differ": 0, "blend_differ": 0}
    if not wanted.any():
        return none
    recipe = replace(job.recipe, layers=(), probability=True, embedding=False)
    labelled = run_windows(
        job, job.network(), [*here, *moved], recipe, threads=threads, tally=Tally()
    )
    with closing(labelled):
        found = {one.piece.seen: one for one in labelled}
    own = found.get(job.lattice.window_of(core))
    if own is None:
        return none
    inside = core.relative_to(own.piece.seen)
    wanted &= own.clear[inside.rows, inside.cols] >= job.min_clear
    pixels = int(np.count_nonzero(wanted))
    differ = {}
    for name, blend in (("cores_differ", False), ("blend_differ", True)):
        one, other = (_classes(job, core, pieces, found, blend=blend) for pieces in (here, moved))
        differ[name] = int(np.count_nonzero((one != other) & wanted))
    return {"cores": int(pixels > 0), "pixels": pixels, **differ}


def _classes(
    job: Job,
    target: Window,
    pieces: Sequence[Piece],
    found: Mapping[Window, Labelled],
    *,
    blend: bool,
) -> np.ndarray:
    """Return the classes of a target, (H, W) uint8, merged one way or the other."""
    classes = job.network().module.config.classes
    merged = np.zeros((classes, *target.shape_yx), dtype=np.float32)
    sums = Accumulator(target, job.lattice, rows=target.height, classes=classes)
    for piece in pieces:
        one = found.get(piece.seen)
        if one is None or one.answer.probability is None:
            continue
        sums.add(piece, one.answer.probability)
        owned = piece.core.intersection(target)
        if not owned.is_empty:
            at, inside = owned.relative_to(target), owned.relative_to(piece.seen)
            merged[:, at.rows, at.cols] = one.answer.probability[:, inside.rows, inside.cols]
    if blend:
        for window, probability in sums.finish():
            at = window.relative_to(target)
            merged[:, at.rows, at.cols] = probability
    decided: np.ndarray = decide(torch.from_numpy(merged)[None], ["classes"])["classes"][0].numpy()
    return decided


def summarise_seams(
    results: Sequence[dict[str, int]], plan: PredictionPlan
) -> dict[str, Any] | None:
    """Return the shares of labels that differ, or None where nothing was compared."""
    total = {name: sum(one[name] for one in results) for name in (results[0] if results else ())}
    if not total.get("pixels"):
        return None
    pixels = total["pixels"]
    return {
        "windows": total["cores"],
        "pixels": pixels,
        "shift": plan.lattice.stride // 2,
        "seed": _SEED,
        "differ_by_cores": round(total["cores_differ"] / pixels, 6),
        "differ_blended": round(total["blend_differ"] / pixels, 6),
        "merged_by": "blend" if plan.spec.blend else "cores",
    }
