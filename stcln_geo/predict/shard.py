"""Label one prediction shard: the unit of work, of resuming and of Dask tasks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..cube.store import Season, open_season, write_json, writing
from ..data.reader import read_block
from ..errors import CubeError, MissingFileError
from ..execution import available_cores
from ..grid import Lattice, Window, geobox_from_window
from ..legend import CLASS_NODATA
from .forward import Network, Sample, load_network
from .segments import SEGMENT_SIDE, segment_whole, write_layer_segment
from .stitch import Piece, group_pieces, pieces_of, region_mask

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

__all__ = ["LAYERS", "PLAN_FILE", "ShardTask", "predict_shard", "read_manifest", "shard_path"]

PLAN_FILE = "plan.json"
"""Name of the plan that workers read, in the output folder."""

LAYERS = ("classes", "confidence")
"""The rasters of a shard."""

T = TypeVar("T")
R = TypeVar("R")


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


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A plan as a worker has read it."""

    season: Season
    checkpoint: str
    identity: dict[str, Any]
    aoi: BaseGeometry
    lattice: Lattice
    crs: str
    resolution: float
    block_size: int
    batch_size: int | None


def predict_shard(task: ShardTask) -> dict[str, Any]:
    """Label a shard and return its manifest; a shard that is done already is only checked.

    The rasters are written under temporary names and renamed; the manifest comes last and says
    that they are whole.
    """
    window = Window(*task.shard)
    found = read_manifest(task.out, window, run=task.run)
    if found is not None:
        return {**found, "reused": True}
    job = _job(task.out, task.run)
    started = time.monotonic()
    network = load_network(
        job.checkpoint,
        sha256=job.identity["checkpoint"],
        device=job.identity["device"],
        precision=job.identity["precision"],
    )
    threads = task.threads or available_cores()
    mask = region_mask(job.aoi, window, resolution=job.resolution)
    layers, tally = _label(job, network, window, mask, threads)
    manifest: dict[str, Any] = {
        "run": task.run,
        "shard": list(task.shard),
        "region_pixels": int(np.count_nonzero(mask)),
        "labelled_pixels": int(np.count_nonzero(layers["classes"] != CLASS_NODATA)),
        "windows": tally.windows,
        "seconds": round(time.monotonic() - started, 3),
        "read_seconds": round(tally.read_seconds, 3),
        "device": network.device,
        "precision": network.precision,
        **{name: _summary(values) for name, values in layers.items()},
    }
    for name, values in layers.items():
        path = shard_path(task.out, window, name)
        if job.identity["shard_size"] % SEGMENT_SIDE:
            _write_raster(path, values, window, job)
            continue
        manifest[name] |= write_layer_segment(
            path, values, window, layer=name, extent=Window(*job.identity["extent"]),
            crs=job.crs, resolution=job.resolution, threads=threads,
        )  # fmt: skip
    write_json(shard_path(task.out, window, "json"), manifest)
    return manifest


def shard_path(out: str | Path, window: Window, what: str) -> Path:
    """Return the file of a shard: its manifest ("json") or one of its rasters."""
    stem = f"{window.row}_{window.col}_{window.height}x{window.width}"
    name = f"{stem}.json" if what == "json" else f"{stem}.{what}.tif"
    return Path(out) / "shards" / name


def read_manifest(
    out: str | Path, window: Window, *, run: str, rasters: bool = True
) -> dict[str, Any] | None:
    """Return the manifest of a shard that this run has finished, or None.

    Parameters
    ----------
    rasters
        Check the pixels too, against the checksums; False trusts the manifest.
    """
    try:
        manifest: dict[str, Any] = json.loads(shard_path(out, window, "json").read_text())
        if manifest["run"] != run or manifest["shard"] != [
            window.row, window.col, window.height, window.width,
        ]:  # fmt: skip
            return None
        for name in LAYERS if rasters else ():
            path = shard_path(out, window, name)
            if "levels" in manifest[name]:
                if not segment_whole(manifest[name], path, window, layer=name):
                    return None
                continue
            values = _read_raster(path)
            if values is None or _checksum(values) != manifest[name]["sha256"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # absent or damaged: the shard is labelled again
    return manifest


@dataclass(slots=True)
class _Tally:
    windows: int = 0
    read_seconds: float = 0.0


def _label(
    job: _Job, network: Network, shard: Window, mask: np.ndarray, threads: int
) -> tuple[dict[str, np.ndarray], _Tally]:
    """Return the shard's rasters, (H, W) uint8 with 255 where there is no label."""
    layers = {name: np.full(shard.shape_yx, CLASS_NODATA, dtype=np.uint8) for name in LAYERS}
    tally = _Tally()
    min_dates = int(job.identity["min_dates"])
    pieces = pieces_of(shard, job.lattice, mask)
    groups = group_pieces(pieces, size=job.block_size, stride=job.lattice.stride)

    def read(group: tuple[Window, list[Piece]]) -> tuple[list[Piece], list[Sample | None]]:
        started = time.monotonic()
        samples = _read_samples(job, *group)
        tally.read_seconds += time.monotonic() - started
        return group[1], samples

    with closing(_read_ahead(read, groups)) as blocks:
        for members, samples in blocks:
            seen = [
                (piece, one) for piece, one in zip(members, samples, strict=True) if one is not None
            ]
            labels = network.label(
                [sample for _, sample in seen], threads=threads, batch_size=job.batch_size
            )
            with closing(labels):
                for (piece, sample), label in zip(seen, labels, strict=True):
                    inside = piece.owned.relative_to(piece.seen)
                    target = piece.owned.relative_to(shard)
                    dates = np.count_nonzero(sample.valid[:, inside.rows, inside.cols], axis=0)
                    wanted = mask[target.rows, target.cols] & (dates >= min_dates)
                    for name in LAYERS:
                        values = getattr(label, name)[inside.rows, inside.cols]
                        layers[name][target.rows, target.cols][wanted] = values[wanted]
            tally.windows += len(seen)
    return layers, tally


def _read_samples(job: _Job, area: Window, pieces: Sequence[Piece]) -> list[Sample | None]:
    """Read a rectangle once and cut its windows; None for a window without any valid pixel."""
    season = job.season
    origin = season.window
    block = read_block(
        season,
        area.relative_to(origin),
        bands=tuple(job.identity["bands"]),
        dates=_dates_with_pixels(season, area.relative_to(origin)),
    )
    samples: list[Sample | None] = []
    for piece in pieces:
        part = piece.seen.relative_to(area)
        valid = block.valid[:, part.rows, part.cols]
        dates = np.flatnonzero(valid.any(axis=(1, 2)))
        reflectance = block.reflectance[:, :, part.rows, part.cols]
        sample = Sample(reflectance=reflectance, valid=valid, days=block.days, dates=dates)
        samples.append(sample if dates.size else None)
    return samples


def _dates_with_pixels(season: Season, area: Window) -> np.ndarray:
    """Return the dates with a valid pixel in the chunks that a rectangle touches, (N,) int."""
    inside = area.intersection(Window(0, 0, *season.shape_yx))
    chunk = season.layout.chunk
    rows = slice(inside.row // chunk, -(-(inside.row + inside.height) // chunk))
    cols = slice(inside.col // chunk, -(-(inside.col + inside.width) // chunk))
    counts = season.coverage[:, rows, cols]
    return np.flatnonzero(counts.reshape(len(counts), -1).any(axis=1))


def _read_ahead(function: Callable[[T], R], items: Sequence[T]) -> Generator[R]:
    """Yield ``function(item)`` in order; a thread makes the next while the caller uses one."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 1:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


@lru_cache(maxsize=4)
def _job(out: str, run: str) -> _Job:
    """Read the plan and open the season, once per worker."""
    import shapely

    path = Path(out) / PLAN_FILE
    try:
        plan = json.loads(path.read_text())
    except OSError as error:
        raise MissingFileError(
            f"Cannot read the plan {path}: {error.strerror}. Workers must see the output folder "
            "under the same path. Choose a folder that all of them share."
        ) from error
    if plan["run"] != run:
        raise CubeError(
            f"Cannot follow {path}: it is the plan of another run. Do not run two predictions "
            "into one folder at the same time; choose another --out."
        )
    identity = plan["identity"]
    return _Job(
        season=open_season(plan["cube"], identity["season"]),
        checkpoint=plan["checkpoint"],
        identity=identity,
        aoi=shapely.from_wkb(identity["aoi"]),
        lattice=Lattice(window=identity["window"], halo=identity["halo"]),
        crs=plan["crs"],
        resolution=plan["resolution"],
        block_size=plan["block_size"],
        batch_size=plan["batch_size"],
    )


def _summary(values: np.ndarray) -> dict[str, Any]:
    """Return the checksum and the histogram of a raster."""
    counts = np.bincount(values.ravel(), minlength=256)
    return {
        "sha256": _checksum(values),
        "histogram": {str(value): int(counts[value]) for value in np.flatnonzero(counts)},
    }


def _checksum(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def _write_raster(path: Path, values: np.ndarray, window: Window, job: _Job) -> None:
    import rasterio

    geobox = geobox_from_window(window, crs=job.crs, resolution=job.resolution)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with rasterio.open(
                part,
                "w",
                driver="GTiff",
                height=window.height,
                width=window.width,
                count=1,
                dtype="uint8",
                nodata=CLASS_NODATA,
                crs=geobox.crs.to_wkt() if geobox.crs is not None else None,
                transform=geobox.affine,
                tiled=True,
                blockxsize=256,
                blockysize=256,
                compress="deflate",
                zlevel=1,
            ) as target:
                target.write(values, 1)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def _read_raster(path: Path) -> np.ndarray | None:
    """Return a shard's pixels, (H, W) uint8, or None where they cannot be read."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(path) as source:
            values: np.ndarray = source.read(1)
    except (RasterioError, OSError):
        return None
    return values
