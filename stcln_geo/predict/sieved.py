"""Sieve the shards of a map, once they are all labelled: small tasks that need no network.

A task reads its shard's classes and those around it, as far as the sieve reaches, and writes the
two layers that change: the classes, and ``qa`` where they did. A manifest keeps the checksums of
all that was read, so that after an interruption, or once a failed neighbour has been labelled,
only what is not up to date is made again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cube.store import write_json
from ..errors import InputError
from ..grid import Window
from ..legend import CLASS_NODATA
from .files import shard_path
from .outputs import layer_named
from .qa import Quality
from .shard import layer_whole, store_layer
from .sieve import SIEVED, Sieve, sieve
from .windows import open_job

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["SieveTask", "sieve_shard", "sieve_tasks"]

Place = tuple[int, int, int, int]
"""Row, column, height and width (absolute pixels)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SieveTask:
    """One labelled shard to sieve."""

    out: str
    run: str
    shard: Place
    around: tuple[tuple[Place, str], ...]
    """The shards within reach, itself among them, and the checksums of their classes."""
    quality: str
    """Checksum of its quality codes."""
    threads: int | None

    def __str__(self) -> str:
        return str(Window(*self.shard))

    @property
    def inputs(self) -> list[Any]:
        """What the result depends on, as plain values."""
        return [[list(place), digest] for place, digest in self.around] + [self.quality]


def sieve_tasks(
    plan: PredictionPlan,
    out: str,
    manifests: Sequence[dict[str, Any]],
    *,
    threads: int | None,
) -> list[SieveTask]:
    """Return a task for each shard that is labelled, in the order of their manifests."""
    import shapely

    if plan.sieve is None:
        return []
    places = [Window(*one["shard"]) for one in manifests]
    tree = shapely.STRtree([_outline(place) for place in places])
    tasks = []
    for window, manifest in zip(places, manifests, strict=True):
        area = window.expand(plan.sieve.reach)
        near = [
            index for index in sorted(tree.query(_outline(area)).tolist())
            if not places[index].intersection(area).is_empty
        ]  # fmt: skip
        tasks.append(
            SieveTask(
                out=out,
                run=plan.run_hash,
                shard=_place(window),
                around=tuple(
                    (_place(places[index]), manifests[index]["classes"]["sha256"]) for index in near
                ),
                quality=manifest["qa"]["sha256"],
                threads=threads,
            )
        )
    return tasks


def sieve_shard(task: SieveTask) -> dict[str, Any]:
    """Sieve a shard; return what its manifest says of the layers that may have changed."""
    window = Window(*task.shard)
    job = open_job(task.out, task.run)
    path = shard_path(task.out, window, "sieved")
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        if found["inputs"] == task.inputs and all(
            layer_whole(task.out, window, layer_named(name), found[name]) for name in SIEVED
        ):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: it is made again

    minimum = Sieve(
        hectares=job.identity["sieve"]["hectares"], pixels=job.identity["sieve"]["pixels"]
    )
    area = window.expand(minimum.reach)
    around = np.full(area.shape_yx, CLASS_NODATA, dtype=np.uint8)
    for place, _ in task.around:
        _paste(task.out, Window(*place), area, around)
    inside = window.relative_to(area)
    before = around[inside.rows, inside.cols]
    after = np.ascontiguousarray(sieve(around, minimum.pixels)[inside.rows, inside.cols])
    quality = _read(task.out, window, "qa", window)
    quality[after != before] = Quality.MERGED
    made: dict[str, Any] = {
        "inputs": task.inputs,
        "merged_pixels": int(np.count_nonzero(after != before)),
    }
    for name, values in (("classes", after), ("qa", quality)):
        made[name] = store_layer(
            job, layer_named(name), values, window,
            out=task.out, threads=task.threads or 1, file=f"sieved-{name}",
        )  # fmt: skip
    write_json(path, made)
    return made


def _paste(out: str, shard: Window, area: Window, target: np.ndarray) -> None:
    """Copy the classes of a shard to where they lie in an area (absolute pixels)."""
    part = shard.intersection(area)
    at = part.relative_to(area)
    target[at.rows, at.cols] = _read(out, shard, "classes", part)


def _read(out: str, shard: Window, layer: str, part: Window) -> np.ndarray:
    """Return a part (absolute pixels) of a shard's layer, (h, w) uint8."""
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.windows import Window as Part

    path = shard_path(out, shard, layer)
    inside = part.relative_to(shard)
    try:
        with rasterio.open(path) as source:
            values: np.ndarray = source.read(
                1, window=Part(inside.col, inside.row, inside.width, inside.height)
            )
    except (RasterioError, OSError) as error:
        raise InputError(
            f"Cannot merge small patches: the shard {path} cannot be read ({error}). All workers "
            "must see the output folder. Run the same command again: it labels damaged shards anew."
        ) from error
    return values


def _outline(window: Window) -> Any:
    from shapely.geometry import box

    return box(window.col, window.row, window.col + window.width, window.row + window.height)


def _place(window: Window) -> Place:
    return (window.row, window.col, window.height, window.width)
