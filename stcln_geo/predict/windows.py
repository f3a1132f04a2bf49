"""Read windows of a cube and run the network on them, the next while one is at work."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..cube.store import Season, open_season
from ..data.reader import read_block
from ..errors import CheckpointError, CubeError, MissingFileError, StclnGeoError, UnreadableError
from ..grid import Lattice, Window
from ..model.checkpoint import read_metadata
from ..model.device import choose_device
from ..storage import part_path, writing
from .checks import fingerprint
from .files import shard_path
from .forward import Answer, Network, Recipe, Sample, load_network
from .mask import SkipMask
from .outputs import EMBEDDINGS, Layer, layers_for
from .smooth import Smoothing
from .source import Fetched, StoredPixels, Supply, open_supply
from .stitch import Group, Piece, group_pieces, region_mask

if TYPE_CHECKING:
    from shapely.geometry.base import BaseGeometry

    from .fetch import Feed

__all__ = [
    "PLAN_FILE",
    "Job",
    "Labelled",
    "Tally",
    "check_worker",
    "job_of",
    "open_job",
    "read_plan",
    "read_samples",
    "run_windows",
]

PLAN_FILE = "plan.json"
"""Name of the plan that workers read, in the output folder."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A plan as a worker has read it."""

    source: Season | Supply
    """Where pixels come from: a cube's season, or the files that a search found."""
    checkpoint: str
    identity: dict[str, Any]
    aoi: BaseGeometry
    lattice: Lattice
    crs: str
    resolution: float
    block_size: int
    batch_size: int | None

    @property
    def min_clear(self) -> int:
        """Clear dates that a class needs."""
        return int(self.identity["min_clear"])

    @property
    def blend(self) -> bool:
        """True where windows are merged by weights."""
        return bool(self.identity["blend"])

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The rasters of each shard."""
        return layers_for(self.identity["outputs"])

    @cached_property
    def recipe(self) -> Recipe:
        """What to make of each window."""
        decided = tuple(layer.name for layer in self.layers if layer.decided)
        smoothing = self.identity["smoothing"]
        return Recipe(
            layers=() if self.blend else decided,
            probability=self.blend,
            embedding=EMBEDDINGS in self.identity["outputs"],
            smoothing=None if smoothing is None else Smoothing(**smoothing),
            min_clear=self.min_clear,
        )

    def network(self) -> Network:
        """Return the checkpoint's network, loaded once per process."""
        return load_network(
            self.checkpoint,
            sha256=self.identity["checkpoint"],
            device=self.identity["device"],
            precision=self.identity["precision"],
        )

    def pixels(
        self, groups: Sequence[Group], *, threads: int, fetched: Fetched
    ) -> Feed | StoredPixels:
        """Return what the pixels of groups are read from; what is fetched is counted."""
        if isinstance(self.source, Season):
            return StoredPixels(self.source)
        from .fetch import Feed

        return Feed(self.source, groups, threads=threads, fetched=fetched)

    def inside(self, window: Window) -> np.ndarray:
        """Return which pixels of an absolute window lie in the region, (H, W) bool."""
        return region_mask(self.aoi, window, resolution=self.resolution)

    def kept(self, window: Window) -> np.ndarray | None:
        """Return which pixels the mask asks for, (H, W) bool; None without a mask."""
        mask = self.mask
        return None if mask is None else mask.read(window, crs=self.crs, resolution=self.resolution)

    @cached_property
    def mask(self) -> SkipMask | None:
        """What says which pixels are mapped, as it was planned with."""
        mask = self.identity["mask"]
        if mask is None:
            return None
        values = mask["values"]
        return SkipMask(
            path=Path(mask["path"]),
            values=None if values is None else tuple(values),
            fingerprint=mask["fingerprint"],
        )

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Those of season and mask that hold other data here than where the run was planned."""
        found = []
        if isinstance(self.source, Season) and (
            fingerprint(self.source) != self.identity["fingerprint"]
        ):
            found.append(f"season {self.source.name} of {self.source.cube}")
        if self.mask is not None and not self.mask.is_as_planned:
            found.append(f"the mask {self.mask.path}")
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """A window on which the network ran."""

    piece: Piece
    cell: Window
    """The group it was read with: groups come row by row (absolute pixels)."""
    clear: np.ndarray
    """(H, W) int: clear dates of the pixels it saw. No view, so that what was read is freed."""
    answer: Answer


@dataclass(slots=True)
class Tally:
    """What running cost."""

    windows: int = 0
    read_seconds: float = 0.0
    """In the thread that reads, beside the network."""
    wait_seconds: float = 0.0
    """In which the network waited for what was being read."""
    device_seconds: float = 0.0
    """In which the device was busy; on a CPU the mean of its threads."""
    fetched: Fetched = field(default_factory=Fetched)
    """All zero where there is a cube."""


def run_windows(
    job: Job,
    network: Network,
    pieces: Sequence[Piece],
    recipe: Recipe,
    *,
    threads: int,
    tally: Tally,
) -> Generator[Labelled]:
    """Yield what the network says of windows; those without any clear pixel are left out."""

    def read(group: Group) -> tuple[Group, list[Sample | None]]:
        with pixels.pixels_of(group) as season:
            started = time.monotonic()
            samples = read_samples(season, group, tuple(job.identity["bands"]))
        tally.read_seconds += time.monotonic() - started
        return group, samples

    groups = group_pieces(pieces, size=job.block_size, stride=job.lattice.stride)
    if not groups:
        return
    with (
        job.pixels(groups, threads=threads, fetched=tally.fetched) as pixels,
        closing(_read_ahead(read, groups)) as blocks,
        pixels.stopping(),
    ):
        while True:
            started = time.monotonic()
            block = next(blocks, None)
            tally.wait_seconds += time.monotonic() - started
            if block is None:
                break
            yield from _label(job, network, *block, recipe, threads=threads, tally=tally)
            del block  # the next one is read into its place


def _label(
    job: Job,
    network: Network,
    group: Group,
    samples: Sequence[Sample | None],
    recipe: Recipe,
    *,
    threads: int,
    tally: Tally,
) -> Generator[Labelled]:
    """Run the network on the windows of one group."""
    seen = [
        (piece, one) for piece, one in zip(group.pieces, samples, strict=True) if one is not None
    ]
    answers = network.label(
        [sample for _, sample in seen], recipe, threads=threads, batch_size=job.batch_size
    )
    lanes = threads if network.device == "cpu" else 1
    with closing(answers):
        for (piece, sample), answer in zip(seen, answers, strict=True):
            tally.device_seconds += answer.seconds / lanes
            clear = np.count_nonzero(sample.valid, axis=0)
            yield Labelled(piece=piece, cell=group.cell, clear=clear, answer=answer)
    tally.windows += len(seen)


def read_samples(season: Season, group: Group, bands: tuple[str, ...]) -> list[Sample | None]:
    """Read a rectangle once and cut its windows; None for a window without any valid pixel."""
    area = group.area.relative_to(season.window)
    try:
        dates = _dates_with_pixels(season, area)
        if not dates.size:
            return [None] * len(group.pieces)
        block = read_block(season, area, bands=bands, dates=dates)
    except StclnGeoError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # as Zarr's codecs raise
        raise UnreadableError(
            f"Cannot read rows {area.row} to {area.row + area.height} and columns {area.col} to "
            f"{area.col + area.width} of season {season.name} of {season.cube} "
            f"({type(error).__name__}: {error}). A chunk there is damaged. Mend the cube with "
            "'stcln-geo cube repair', or copy it anew."
        ) from error
    samples: list[Sample | None] = []
    for piece in group.pieces:
        part = piece.seen.relative_to(group.area)
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


def check_worker(out: str, run: str) -> None:
    """Raise unless this process can label shards of a run.

    Raises
    ------
    StclnGeoError
        If it does not see the plan of this run, or the planned season, mask or checkpoint, cannot
        write shards, lacks the device, or has no room for pixels that are fetched.
    """
    job = open_job(out, run)
    probe = part_path(shard_path(out, Window(*job.identity["extent"]), "json"))
    with writing(probe.parent):
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    planned = job.identity["checkpoint"]
    found = read_metadata(job.checkpoint).sha256
    if found != planned:
        raise CheckpointError(
            f"Cannot use {job.checkpoint}: it has sha256 {found[:12]}..., and the run was planned "
            f"with {planned[:12]}... Give all workers the same file, or plan again."
        )
    choose_device(job.identity["device"])
    if job.others:
        raise CubeError(
            f"Cannot use {' and '.join(job.others)}: under this path lie other data than where the "
            "run was planned. Give all workers the same files, or plan again."
        )
    if isinstance(job.source, Supply):
        from ..cube.scratch import check_scratch

        check_scratch(job.source.scratch)


def read_plan(out: str, run: str) -> dict[str, Any]:
    """Read the plan of a run.

    Raises
    ------
    MissingFileError
        If this process does not see it.
    CubeError
        If by now the folder is another run's.
    """
    path = Path(out) / PLAN_FILE
    try:
        plan: dict[str, Any] = json.loads(path.read_text())
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
    return plan


def open_job(out: str, run: str) -> Job:
    """Read the plan, and open the season once per worker."""
    return job_of(read_plan(out, run))


def job_of(plan: Mapping[str, Any]) -> Job:
    """Return what ``PredictionPlan.to_json`` told, with the season opened once per process."""
    return _job(json.dumps(plan))


@lru_cache(maxsize=4)
def _job(text: str) -> Job:
    import shapely

    plan = json.loads(text)
    identity = plan["identity"]
    told = plan.get("source")
    return Job(
        source=open_season(plan["cube"], identity["season"]) if told is None else open_supply(told),
        checkpoint=plan["checkpoint"],
        identity=identity,
        aoi=shapely.from_wkb(identity["aoi"]),
        lattice=Lattice(window=identity["window"], halo=identity["halo"]),
        crs=plan["crs"],
        resolution=plan["resolution"],
        block_size=plan["block_size"],
        batch_size=plan["batch_size"],
    )
