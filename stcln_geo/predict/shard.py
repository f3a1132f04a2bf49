"""Label one prediction shard: the unit of work, of resuming and of Dask tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..cog.pyramid import count_values
from ..cube.store import write_json, writing
from ..errors import UnreadableError
from ..execution import available_cores
from ..grid import Window
from ..legend import CLASS_NODATA
from .blend import Accumulator
from .embeddings import EmbeddingFile
from .files import checksum, file_checksum, read_raster, shard_path, write_raster
from .forward import Network
from .outputs import EMBEDDINGS, Layer, decide, layer_named, layers_for
from .qa import COUNT_NODATA, LARGEST_COUNT, Quality, quality_of
from .segments import segment_whole, takes_segments, write_layer_segment
from .source import Supply
from .stitch import pieces_of
from .windows import Job, Labelled, Tally, open_job, read_plan, run_windows

__all__ = [
    "ShardTask",
    "layer_whole",
    "predict_shard",
    "read_manifest",
    "store_layer",
    "write_failed",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardTask:
    """One shard to label; small, as it travels to workers."""

    out: str
    """Folder of the product; ``plan.json`` is there."""
    run: str
    """Hash of the plan, so that a worker never follows another one."""
    shard: tuple[int, int, int, int]
    """Row, column, height and width (absolute pixels)."""
    threads: int | None
    """Windows that run side by side on a CPU; None = all cores of the worker."""


def predict_shard(task: ShardTask) -> dict[str, Any]:
    """Label a shard and return its manifest; a shard that is done already is only checked.

    The rasters are written under temporary names and renamed; the manifest comes last and says
    that they are whole.
    """
    window = Window(*task.shard)
    job = open_job(task.out, task.run)
    outputs = job.identity["outputs"]
    found = read_manifest(task.out, window, run=task.run, outputs=outputs)
    if found is not None and not _to_do_again(job, found):
        return {**found, "reused": True}
    _drop_manifest(task, window)
    started = time.monotonic()
    network = job.network()
    threads = task.threads or available_cores()
    work = _Shard(job, network, window, out=task.out)
    try:
        tally = work.label(threads=threads)
        labelled = time.monotonic()
        # Where a client was killed or a worker thought lost, another may have taken this shard, or
        # another run the folder, meanwhile.
        read_plan(task.out, task.run)
        found = read_manifest(task.out, window, run=task.run, outputs=outputs, rasters=False)
        if found is not None:
            return {**found, "reused": True}
        return _finish(work, task, tally, threads=threads, times=(started, labelled))
    finally:
        if work.embedding is not None:
            work.embedding.discard()


def _drop_manifest(task: ShardTask, window: Window) -> None:
    """Remove a manifest that is not true of the files beside it."""
    path = shard_path(task.out, window, "json")
    if path.exists():
        read_plan(task.out, task.run)
        with writing(path):
            path.unlink(missing_ok=True)


def _finish(
    work: _Shard, task: ShardTask, tally: Tally, *, threads: int, times: tuple[float, float]
) -> dict[str, Any]:
    """Write what was labelled, the manifest last, and return it.

    Parameters
    ----------
    times
        When the work began, and when the last window was labelled.
    """
    started, labelled = times
    job, window, network = work.job, work.window, work.network
    manifest: dict[str, Any] = {
        "run": task.run,
        "shard": list(task.shard),
        "region_pixels": int(np.count_nonzero(work.inside)),
        "labelled_pixels": int(np.count_nonzero(work.layers["classes"] != CLASS_NODATA)),
        "windows": tally.windows,
        "device": network.device,
        "precision": network.precision,
    }
    for name, values in work.layers.items():
        manifest[name] = store_layer(
            job, layer_named(name), values, window, out=task.out, threads=threads
        )
    if isinstance(job.source, Supply):
        manifest["fetched"] = tally.fetched.to_json()
    if work.embedding is not None:
        manifest[EMBEDDINGS] = {"sha256": work.embedding.finish()}
    ended = time.monotonic()
    manifest["seconds"] = {
        "total": round(ended - started, 3),
        "read": round(tally.read_seconds, 3),
        "wait": round(tally.wait_seconds, 3),
        "device": round(tally.device_seconds, 3),
        "write": round(ended - labelled, 3),
    }
    write_json(shard_path(task.out, window, "json"), manifest)
    return manifest


def _to_do_again(job: Job, manifest: Mapping[str, Any]) -> bool:
    """Return True where a shard lacks scenes that an earlier call was told to leave out."""
    if not isinstance(job.source, Supply) or job.source.skip_failures:
        return False
    return bool(manifest["fetched"]["left_out"])


def write_failed(out: str, run: str, window: Window) -> dict[str, Any]:
    """Write the quality codes of a shard that could not be labelled.

    Returns
    -------
    dict
        What a manifest would say of them: checksum, histogram and the like.
    """
    job = open_job(out, run)
    inside = job.inside(window)
    try:
        kept = job.kept(window)
    except UnreadableError:
        kept = None  # this may be why the shard failed
    codes = quality_of(inside, kept, np.ones(window.shape_yx), min_clear=1)
    codes[codes == Quality.MAPPED] = Quality.FAILED
    return store_layer(job, layer_named("qa"), codes, window, out=out, threads=1)


def read_manifest(
    out: str, window: Window, *, run: str, outputs: list[str], rasters: bool = True
) -> dict[str, Any] | None:
    """Return the manifest of a shard that this run has finished, or None.

    Parameters
    ----------
    outputs
        Further layers of the run.
    rasters
        Check the pixels too, against the checksums; False trusts the manifest.
    """
    try:
        manifest: dict[str, Any] = json.loads(shard_path(out, window, "json").read_text())
        if manifest["run"] != run or manifest["shard"] != [
            window.row, window.col, window.height, window.width,
        ]:  # fmt: skip
            return None
        for layer in layers_for(outputs) if rasters else ():
            if not layer_whole(out, window, layer, manifest[layer.name]):
                return None
        if rasters and EMBEDDINGS in outputs:
            path = shard_path(out, window, EMBEDDINGS)
            if file_checksum(path) != manifest[EMBEDDINGS]["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: the shard is labelled again
    return manifest


def layer_whole(out: str, window: Window, layer: Layer, stored: Mapping[str, Any]) -> bool:
    """Return True where a shard's layer is on disk as ``store_layer`` wrote it."""
    path = shard_path(out, window, stored.get("file", layer.name))
    if "levels" in stored:
        return segment_whole(stored, path, window, layer=layer)
    values = read_raster(path)
    return values is not None and checksum(values) == stored["sha256"]


class _Shard:
    """A shard's rasters while they are filled."""

    def __init__(self, job: Job, network: Network, window: Window, *, out: str) -> None:
        self.job = job
        self.network = network
        self.window = window
        self.inside = job.inside(window)
        self.kept = job.kept(window)
        self.wanted = self.inside if self.kept is None else self.inside & self.kept
        self.counts = np.zeros(window.shape_yx, dtype=np.int32)
        self.decided = tuple(layer.name for layer in job.layers if layer.decided)
        self.classes = network.module.config.classes
        self.layers = {
            layer.name: np.full(
                (self.classes, *window.shape_yx) if layer.per_class else window.shape_yx,
                CLASS_NODATA,
                dtype=np.uint8,
            )
            for layer in job.layers
            if layer.decided
        }
        self.embedding = None
        if job.recipe.embedding:
            path = shard_path(out, window, EMBEDDINGS)
            self.embedding = EmbeddingFile(path, (network.module.embedding_dim, *window.shape_yx))

    def label(self, *, threads: int) -> Tally:
        """Run the windows and fill the rasters."""
        job, tally = self.job, Tally()
        pieces = pieces_of(self.window, job.lattice, self.wanted, blend=job.blend)
        labelled = run_windows(job, self.network, pieces, job.recipe, threads=threads, tally=tally)
        with closing(labelled):
            if job.blend:
                self._blend(labelled)
            else:
                for one in labelled:
                    self._count(one)
                    inside = one.piece.owned.relative_to(one.piece.seen)
                    self._put(
                        one.piece.owned,
                        {
                            name: values[..., inside.rows, inside.cols]
                            for name, values in one.answer.layers.items()
                        },
                    )
        self.layers["qa"] = quality_of(self.inside, self.kept, self.counts, min_clear=job.min_clear)
        counts = np.minimum(self.counts, LARGEST_COUNT).astype(np.uint8)
        counts[~self.wanted] = COUNT_NODATA
        self.layers["observations"] = counts
        return tally

    def _blend(self, labelled: Any) -> None:
        """Merge windows by weights; rows are decided as soon as no window can change them."""
        lattice = self.job.lattice
        side = max(self.job.block_size // lattice.stride, 1) * lattice.stride
        sums = Accumulator(self.window, lattice, rows=side + 2 * lattice.halo, classes=self.classes)
        for one in labelled:
            self._decide(sums, one.cell.row - lattice.halo)
            self._count(one)
            sums.add(one.piece, one.answer.probability)
        self._decide(sums, None)

    def _decide(self, sums: Accumulator, row: int | None) -> None:
        for window, probability in sums.finish(row):
            made = decide(torch.from_numpy(probability)[None], self.decided)
            self._put(window, {name: value[0].numpy() for name, value in made.items()})

    def _count(self, one: Labelled) -> None:
        """Note the clear dates of the core's pixels, and their embeddings."""
        core = one.piece.core.intersection(self.window)
        if core.is_empty:
            return
        inside, at = core.relative_to(one.piece.seen), core.relative_to(self.window)
        self.counts[at.rows, at.cols] = one.clear[inside.rows, inside.cols]
        if self.embedding is not None and one.answer.embedding is not None:
            self.embedding.put(
                at,
                one.answer.embedding[:, inside.rows, inside.cols],
                where=self._mapped(at),
            )

    def _mapped(self, at: Window) -> np.ndarray:
        enough: np.ndarray = self.counts[at.rows, at.cols] >= self.job.min_clear
        mapped: np.ndarray = self.wanted[at.rows, at.cols] & enough
        return mapped

    def _put(self, place: Window, values: Mapping[str, np.ndarray]) -> None:
        """Write the layers of an absolute rectangle, where its pixels are mapped."""
        at = place.relative_to(self.window)
        where = self._mapped(at)
        for name, value in values.items():
            np.copyto(self.layers[name][..., at.rows, at.cols], value, where=where)


def store_layer(
    job: Job,
    layer: Layer,
    values: np.ndarray,
    window: Window,
    *,
    out: str,
    threads: int,
    file: str | None = None,
) -> dict[str, Any]:
    """Write a layer of a shard, and return what its manifest keeps.

    Parameters
    ----------
    file
        What the file is called instead of by the layer's name.
    """
    path = shard_path(out, window, file or layer.name)
    found = _summary(values) | ({} if file is None else {"file": file})
    if not takes_segments(layer, job.identity["shard_size"]):
        write_raster(path, values, window, crs=job.crs, resolution=job.resolution)
        return found
    return found | write_layer_segment(
        path, values, window, layer=layer, extent=Window(*job.identity["extent"]),
        crs=job.crs, resolution=job.resolution, threads=threads,
    )  # fmt: skip


def _summary(values: np.ndarray) -> dict[str, Any]:
    """Return the checksum and the histogram of a raster, all bands together."""
    counts = count_values(values.reshape(-1, values.shape[-1]))
    return {
        "sha256": checksum(values),
        "histogram": {str(value): count for value, count in counts.items()},
    }
