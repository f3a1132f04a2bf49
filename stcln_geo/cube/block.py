"""Build one block of a cube: read each asset window once, fuse date by date, write its shards."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..errors import CubeError
from ..grid import Window, crop_geobox, tiles
from .audit import SceneAudit, audit_scene
from .contract import FILL
from .cost import SCENES_AHEAD
from .fuse import fuse_scene, harmonise_scene
from .planned import Asset, CubePlan, Scene, SeasonPlan
from .read import AssetReader, AssetReadError, LedgerEntry, append_ledger
from .store import Season, open_building, write_json, write_shard
from .stored import LEDGER_FILE, load_plan, manifest_path, shard_fingerprint, shard_is_done

__all__ = ["BlockResult", "BlockTask", "build_block"]

_MIN_READERS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """A block of a season to build; small, so that it travels well."""

    cube: str
    season: str
    window: Window
    fingerprint: str
    """Of the plan, which the task reads from the cube."""
    skip_failures: bool
    """True leaves a scene out where one of its assets cannot be read."""
    threads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """What became of a block."""

    written: int
    kept: int
    reads: int


def build_block(task: BlockTask) -> BlockResult:
    """Build the shards of a block that are missing."""
    path = Path(task.cube)
    plan = load_plan(task.cube, task.fingerprint)
    season_plan = plan.season(task.season)
    season = open_building(path, task.season)
    if season is None:
        raise CubeError(
            f"Cannot build a block of season {task.season}: {path} has no such season under "
            "construction. Run 'cube build' again."
        )
    shards = [
        shard.shift(task.window.row, task.window.col)
        for shard in tiles(task.window.shape_yx, season.layout.shard)
    ]
    prints = {shard: shard_fingerprint(plan, season_plan, shard) for shard in shards}
    missing = [
        shard for shard in shards if not shard_is_done(path, task.season, shard, prints[shard])
    ]
    if not missing:
        return BlockResult(written=0, kept=len(shards), reads=0)

    area = functools.reduce(Window.union, missing)
    reader = AssetReader(plan.access)
    block = _Block(plan, season_plan, season, area)
    inner = [shard.relative_to(area) for shard in missing]
    audits: dict[str, list[SceneAudit]] = {}
    failed = _fill(block, plan, season_plan, reader, task, _Audit(inner, audits))
    for number, (shard, inside) in enumerate(zip(missing, inner, strict=True)):
        write_shard(
            season,
            shard,
            reflectance=block.reflectance[:, :, inside.rows, inside.cols],
            valid=block.valid[:, inside.rows, inside.cols],
            scl=block.scl[:, inside.rows, inside.cols] if block.scl is not None else None,
        )
        write_json(
            manifest_path(path, task.season, shard),
            {
                "fingerprint": prints[shard],
                "window": asdict(shard),
                "valid_fraction": float(block.valid[:, inside.rows, inside.cols].mean()),
                "left_out": sorted(failed),
                "audit": {item: counts[number].to_json() for item, counts in audits.items()},
            },
        )
    kept = len(shards) - len(missing)
    return BlockResult(written=len(missing), kept=kept, reads=reader.reads)


class _Block:
    """The arrays of a block, empty at first."""

    def __init__(
        self, plan: CubePlan, season_plan: SeasonPlan, season: Season, area: Window
    ) -> None:
        dates, bands = len(season_plan.dates), len(plan.bands)
        self.area = area
        self.geobox = crop_geobox(season.geobox, area)
        self.reflectance = np.full((dates, bands, *area.shape_yx), FILL, dtype=np.int16)
        self.valid = np.zeros((dates, *area.shape_yx), dtype=bool)
        self.scl = (
            np.zeros((dates, *area.shape_yx), dtype=np.uint8) if season.scl is not None else None
        )


@dataclass(frozen=True, slots=True)
class _Audit:
    """What is counted in passing: for every item, the dark pixels in each shard."""

    shards: list[Window]
    by_item: dict[str, list[SceneAudit]]


@dataclass(frozen=True, slots=True)
class _Reading:
    """A scene whose assets are being read."""

    date: int
    scene: Scene
    bands: list[Future[np.ndarray]]
    scl: Future[np.ndarray] | None


def _fill(
    block: _Block,
    plan: CubePlan,
    season_plan: SeasonPlan,
    reader: AssetReader,
    task: BlockTask,
    audit: _Audit,
) -> set[str]:
    """Fill a block's arrays, date by date; return the items left out."""
    path = Path(task.cube)
    clouds = plan.spec.clouds
    absolute = block.area.shift(plan.window.row, plan.window.col)
    wanted = [
        (index, scene)
        for index, date in enumerate(season_plan.dates)
        for scene in date.scenes
        if scene.meets(absolute)
    ]
    left_out: set[str] = set()
    rank = np.zeros(block.area.shape_yx, dtype=np.uint8)
    current = -1
    most = plan.access.max_connections or 64
    with ThreadPoolExecutor(min(max(task.threads, _MIN_READERS), most)) as pool:
        for reading in _read_ahead(pool, wanted, block, plan, reader):
            if reading.date != current:
                current = reading.date
                rank[:] = 0
            failures = _failures(reading, block.area)
            for entry in failures:
                append_ledger(path / LEDGER_FILE, entry)
            if failures and not task.skip_failures:
                pool.shutdown(wait=False, cancel_futures=True)
                raise AssetReadError(
                    f"{failures[0].item}, asset {failures[0].asset},",
                    failures[0].kind,
                    failures[0].attempts,
                    failures[0].error,
                )
            if failures:
                left_out.add(reading.scene.item)
                continue
            pixels = harmonise_scene(
                reading.scene,
                [future.result() for future in reading.bands],
                reading.scl.result() if reading.scl is not None else None,
                clouds,
            )
            audit.by_item[reading.scene.item] = audit_scene(pixels, plan.bands, audit.shards)
            fuse_scene(
                pixels,
                reflectance=block.reflectance[current],
                valid=block.valid[current],
                scl=block.scl[current] if block.scl is not None else None,
                rank=rank,
            )
    return left_out


def _read_ahead(
    pool: ThreadPoolExecutor,
    wanted: list[tuple[int, Scene]],
    block: _Block,
    plan: CubePlan,
    reader: AssetReader,
) -> Iterator[_Reading]:
    """Yield scenes in order, while the next ones are already being read."""
    pad = plan.spec.clouds.padding
    height, width = block.area.shape_yx
    padded = crop_geobox(block.geobox, Window(0, 0, height, width).expand(pad))

    def start(asset: Asset, *, is_scl: bool) -> Future[np.ndarray]:
        return pool.submit(
            reader.read,
            asset.href,
            padded if is_scl else block.geobox,
            resampling="nearest" if is_scl else plan.spec.resampling,
            nodata=asset.radiometry.nodata,
        )

    ahead: deque[_Reading] = deque()
    for date, scene in wanted:
        bands = [start(asset, is_scl=False) for asset in scene.bands]
        use_scl = scene.scl is not None and plan.with_scl
        scl = start(scene.scl, is_scl=True) if use_scl and scene.scl is not None else None
        ahead.append(_Reading(date, scene, bands, scl))
        if len(ahead) > SCENES_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _failures(reading: _Reading, area: Window) -> list[LedgerEntry]:
    """Wait for a scene's assets and return those that could not be read."""
    futures = list(zip(reading.scene.bands, reading.bands, strict=True))
    if reading.scl is not None and reading.scene.scl is not None:
        futures.append((reading.scene.scl, reading.scl))
    entries = []
    for asset, future in futures:
        error = future.exception()
        if isinstance(error, AssetReadError):
            entries.append(
                LedgerEntry(
                    item=reading.scene.item,
                    asset=asset.key,
                    href=asset.href,
                    kind=error.kind,
                    error=error.reason,
                    attempts=error.attempts,
                    window=(area.row, area.col, area.height, area.width),
                )
            )
        elif error is not None:
            raise error
    return entries
