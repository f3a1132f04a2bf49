"""Build one block of a cube: read each asset window once, merge date by date, write its shards."""

from __future__ import annotations

import functools
import json
from collections import deque
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..catalog import Access
from ..errors import CubeError
from ..grid import Window, crop_geobox, tiles
from ..storage import Location, location
from .audit import SceneAudit, audit_scene
from .cost import SCENES_AHEAD
from .fuse import ScenePixels, harmonise_scene
from .merge import BlockArrays, make_merger
from .planned import Asset, CubePlan, Scene, SeasonPlan
from .read import AssetReader, AssetReadError, LedgerEntry, append_ledger
from .replace import OldSeason, open_old
from .sky import SKY_LATTICE, SkyModel, find_sky, omnicloudmask
from .store import Season, open_building, write_json, write_shard
from .stored import LEDGER_FILE, load_plan, manifest_path, read_manifest, shard_fingerprint

__all__ = ["BlockPixels", "BlockResult", "BlockTask", "Readers", "build_block", "read_block"]

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
    replacing: bool = False
    """True where a whole season of this name is there, whose unchanged parts are taken over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """What became of a block."""

    written: int
    kept: int
    reads: int
    taken: int = 0
    """Shards taken over from the season that is replaced."""


def build_block(task: BlockTask, *, model: SkyModel | None = None) -> BlockResult:
    """Build the shards of a block that are missing.

    Parameters
    ----------
    model
        In place of OmniCloudMask with its own weights.
    """
    path = location(task.cube)
    plan = load_plan(task.cube, task.fingerprint)
    season_plan = plan.season(task.season)
    season = open_building(path, task.season)
    if season is None:
        raise CubeError(
            f"Cannot build a block of season {task.season}: {path} has no such season under "
            "construction. Run 'cube build' again."
        )
    old = open_old(season, plan, season_plan) if task.replacing else None
    shards = [
        shard.shift(task.window.row, task.window.col)
        for shard in tiles(task.window.shape_yx, season.layout.shard)
    ]
    prints = {shard: shard_fingerprint(plan, season_plan, shard) for shard in shards}
    build = _Shards(task, season, prints)
    missing = [shard for shard in shards if not build.is_done(shard)]
    kept = len(shards) - len(missing)
    if old is not None:
        missing = [shard for shard in missing if not build.take_over(shard, old)]
    taken = len(shards) - kept - len(missing)
    if not missing:
        return BlockResult(written=0, kept=kept, reads=0, taken=taken)

    area = functools.reduce(Window.union, missing)
    readers = Readers(plan.access)
    block = BlockArrays(plan, season_plan, area)
    reused = old.same_dates(season_plan, area) if old is not None else {}
    audit = _Audit([shard.relative_to(area) for shard in missing], {})
    if old is not None and reused:
        for shard in missing:
            old.take_dates(reused, shard, **block.part(shard))
    failed = _fill(block, plan, season_plan, readers, task, audit, reused, model)
    kept_items = {scene.item for index in reused for scene in season_plan.dates[index].scenes}
    for number, shard in enumerate(missing):
        part = block.part(shard)
        write_shard(season, shard, **part)
        counts = {item: shards[number].to_json() for item, shards in audit.by_item.items()}
        if old is not None:
            before = old.audits(shard)
            counts |= {item: before[item] for item in kept_items & set(before)}
        build.mark(
            shard,
            valid_fraction=float(part["valid"].mean()),
            left_out=failed & _scenes_in(plan, season_plan, shard),
            audit=counts,
        )
    return BlockResult(written=len(missing), kept=kept, reads=readers.reads, taken=taken)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPixels:
    """The dates of a small grid, in memory."""

    arrays: BlockArrays
    left_out: tuple[str, ...]
    """Items of which an asset could not be read."""
    audit: dict[str, Any]
    """What was counted of each item's dark pixels, as JSON values."""


def read_block(
    plan: CubePlan,
    season: SeasonPlan,
    readers: Readers,
    *,
    folder: Location,
    skip_failures: bool,
    threads: int,
    model: SkyModel | None = None,
) -> BlockPixels:
    """Read the whole grid of a plan, small enough for the memory, exactly as a cube's block.

    Parameters
    ----------
    folder
        Where the ledger of failures lies.
    skip_failures
        True leaves a scene out where one of its assets cannot be read.
    model
        In place of OmniCloudMask with its own weights.

    Raises
    ------
    AssetReadError
        If an asset cannot be read and ``skip_failures`` is False.
    """
    whole = Window(0, 0, *plan.window.shape_yx)
    task = BlockTask(
        cube=str(folder), season=season.name, window=whole, fingerprint="",
        skip_failures=skip_failures, threads=threads,
    )  # fmt: skip
    arrays = BlockArrays(plan, season, whole)
    audit = _Audit([whole], {})
    failed = _fill(arrays, plan, season, readers, task, audit, (), model)
    counts = {item: audits[0].to_json() for item, audits in audit.by_item.items()}
    return BlockPixels(arrays=arrays, left_out=tuple(sorted(failed)), audit=counts)


@dataclass(frozen=True, slots=True)
class _Shards:
    """What is known of a block's shards by their manifests."""

    task: BlockTask
    season: Season
    prints: Mapping[Window, str]

    def is_done(self, shard: Window) -> bool:
        """Return True where the shard was written from exactly these inputs."""
        manifest = read_manifest(self._manifest(shard))
        if manifest.get("fingerprint") != self.prints[shard]:
            return False
        return self.task.skip_failures or not manifest.get("left_out")

    def take_over(self, shard: Window, old: OldSeason) -> bool:
        """Take a shard of the old season as it is, if it can serve; return True where it does."""
        if not old.has_shard(shard, self.prints[shard], self.season):
            return False
        old.take_shard(shard, self.season)
        before = read_manifest(manifest_path(self.season.cube, self.task.season, shard))
        self.mark(
            shard,
            valid_fraction=before["valid_fraction"],
            left_out=set(),
            audit=before.get("audit", {}),
            taken=True,
        )
        return True

    def mark(
        self,
        shard: Window,
        *,
        valid_fraction: float,
        left_out: set[str],
        audit: Mapping[str, Any],
        taken: bool = False,
    ) -> None:
        """Write the shard's manifest: from now on it is done."""
        write_json(
            self._manifest(shard),
            {
                "fingerprint": self.prints[shard],
                "window": asdict(shard),
                "valid_fraction": valid_fraction,
                "left_out": sorted(left_out),
                "taken_over": taken,
                "audit": dict(audit),
            },
        )

    def _manifest(self, shard: Window) -> Location:
        return manifest_path(
            self.season.cube, self.task.season, shard, replacing=self.task.replacing
        )


def _scenes_in(plan: CubePlan, season: SeasonPlan, shard: Window) -> set[str]:
    """Return the ids of the scenes that may have pixels in a shard."""
    area = shard.shift(plan.window.row, plan.window.col)
    scenes = [scene for date in season.dates for scene in date.scenes]
    return {scene.item for scene in scenes if scene.meets(area)}


class Readers:
    """One reader per way of access: the catalog's, and those of substitutes."""

    def __init__(self, access: Access) -> None:
        """Prepare; nothing is opened yet."""
        self._own = AssetReader(access)
        self._others: dict[str, AssetReader] = {}

    def of(self, scene: Scene) -> AssetReader:
        """Return the reader of a scene's assets."""
        if scene.substitute is None:
            return self._own
        key = json.dumps(dict(scene.substitute.access), sort_keys=True)
        if key not in self._others:
            self._others[key] = AssetReader(Access.model_validate(scene.substitute.access))
        return self._others[key]

    @property
    def reads(self) -> int:
        """Asset windows read so far."""
        return self._own.reads + sum(reader.reads for reader in self._others.values())


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
    pixels: dict[str, Future[np.ndarray]]
    """By asset key."""


def _fill(
    block: BlockArrays,
    plan: CubePlan,
    season_plan: SeasonPlan,
    readers: Readers,
    task: BlockTask,
    audit: _Audit,
    reused: Collection[int],
    model: SkyModel | None,
) -> set[str]:
    """Fill a block's arrays, date by date but for those reused; return the items left out."""
    path = location(task.cube)
    model = model or omnicloudmask(plan.spec.clouds)
    absolute = block.area.shift(plan.window.row, plan.window.col)
    wanted = [
        (index, scene)
        for index, date in enumerate(season_plan.dates)
        for scene in date.scenes
        if index not in reused and scene.meets(absolute)
    ]
    left_out: set[str] = set()
    merger = make_merger(block, plan, season_plan)
    most = plan.access.max_connections or 64
    with ThreadPoolExecutor(min(max(task.threads, _MIN_READERS), most)) as pool:
        for reading in _read_ahead(pool, wanted, block, plan, readers):
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
            pixels = _harmonised(reading, absolute, plan, model)
            audit.by_item[reading.scene.item] = audit_scene(pixels, plan.bands, audit.shards)
            merger.add(reading.date, reading.scene, pixels)
    merger.finish()
    return left_out


def _read_ahead(
    pool: ThreadPoolExecutor,
    wanted: list[tuple[int, Scene]],
    block: BlockArrays,
    plan: CubePlan,
    readers: Readers,
) -> Iterator[_Reading]:
    """Yield scenes in order, while the next ones are already being read."""
    absolute = block.area.shift(plan.window.row, plan.window.col)

    def start(scene: Scene, asset: Asset) -> Future[np.ndarray]:
        around = _around(scene, asset, absolute, plan)
        return pool.submit(
            readers.of(scene).read,
            asset.href,
            crop_geobox(block.geobox, around.relative_to(absolute)),
            resampling="nearest" if asset == scene.scl else plan.spec.resampling,
            nodata=asset.radiometry.nodata,
        )

    ahead: deque[_Reading] = deque()
    for date, scene in wanted:
        used = [asset for asset in scene.assets if asset != scene.scl or plan.with_scl]
        ahead.append(_Reading(date, scene, {asset.key: start(scene, asset) for asset in used}))
        if len(ahead) > SCENES_AHEAD:
            yield ahead.popleft()
    yield from ahead


def _around(scene: Scene, asset: Asset, area: Window, plan: CubePlan) -> Window:
    """Return what is read of an asset for an absolute area."""
    near = area.expand(plan.spec.clouds.padding)
    if asset in scene.sky:
        return SKY_LATTICE.cover(near)
    return near if asset == scene.scl else area


def _harmonised(reading: _Reading, area: Window, plan: CubePlan, model: SkyModel) -> ScenePixels:
    """Bring a scene that was read to the cube's numbers, in an absolute area."""
    scene, clouds = reading.scene, plan.spec.clouds

    def inner(asset: Asset) -> np.ndarray:
        inside = area.relative_to(_around(scene, asset, area, plan))
        return reading.pixels[asset.key].result()[inside.rows, inside.cols]

    sky = None
    if scene.sky:
        near = area.expand(clouds.padding)
        bands = []
        for asset in scene.sky:
            band = reading.pixels[asset.key].result()
            bands.append(np.where(band == asset.radiometry.nodata, 0, band))
        sky = find_sky(bands, SKY_LATTICE.cover(near), near, model)
    scl = None
    if scene.scl is not None and scene.scl.key in reading.pixels:
        scl = reading.pixels[scene.scl.key].result()
    return harmonise_scene(scene, [inner(asset) for asset in scene.bands], scl, clouds, sky)


def _failures(reading: _Reading, area: Window) -> list[LedgerEntry]:
    """Wait for a scene's assets and return those that could not be read."""
    entries = []
    for asset in reading.scene.assets:
        future = reading.pixels.get(asset.key)
        error = future.exception() if future is not None else None
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
