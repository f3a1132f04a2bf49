"""Build one block of a cube: read each asset window once, then make shard after shard of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CubeError
from ..grid import Window, tiles
from ..heap import give_back_memory
from ..storage import Location, location
from .audit import audit_scene
from .fuse import harmonise_scene
from .merge import BlockArrays, make_merger
from .pixels import Pixels
from .planned import Asset, CubePlan, Scene, SeasonPlan
from .replace import OldSeason, open_old
from .scenes import Readers, Reading, SceneReader, classify_sky, wanted_scenes
from .sky import SKY_LATTICE, SkyModel, omnicloudmask
from .stage import Stage
from .store import Season, open_building, write_json, write_shard
from .stored import LEDGER_FILE, load_plan, manifest_path, read_manifest, shard_fingerprint

__all__ = ["BlockPixels", "BlockResult", "BlockTask", "build_block", "read_block"]

_SKY = "the sky"
"""Stands for the cloud model's classes among the keys of a scene's assets."""


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
    together: int = 1
    """Shards that are made at the same time."""
    keep: int = 0
    """Bytes of pixels, as they were read, that may wait in memory; the others wait in scratch."""
    scratch: str | None = None
    """Where scratch is made, on a local disk; None = the folder for temporary files."""
    replacing: bool = False
    """True where a whole season of this name is there, whose unchanged parts are taken over."""

    def __str__(self) -> str:
        return f"season {self.season}, {self.window}"


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
    # Only once are all scenes of a large region looked at: others than these meet no shard.
    near = season_plan.within(task.window.shift(plan.window.row, plan.window.col))
    prints = {shard: shard_fingerprint(plan, near, shard) for shard in shards}
    build = _Shards(task, season, prints)
    missing = [shard for shard in shards if not build.is_done(shard)]
    kept = len(shards) - len(missing)
    if old is not None:
        missing = [shard for shard in missing if not build.take_over(shard, old)]
    taken = len(shards) - kept - len(missing)
    if not missing:
        return BlockResult(written=0, kept=kept, reads=0, taken=taken)

    area = functools.reduce(Window.union, missing)
    reader = SceneReader(
        plan=plan,
        area=area.shift(plan.window.row, plan.window.col),
        readers=Readers(plan.access),
        ledger=path / LEDGER_FILE,
        skip_failures=task.skip_failures,
        threads=task.threads,
    )
    reused = old.same_dates(season_plan, area) if old is not None else {}
    wanted = wanted_scenes(season_plan, reader.area, reused)
    kept_items = {scene.item for index in reused for scene in season_plan.dates[index].scenes}
    scratch = Path(task.scratch) if task.scratch is not None else None
    with Stage([shard.relative_to(area) for shard in missing], scratch, memory=task.keep) as stage:
        left_out: set[str] = set()
        staged = _stage(reader, wanted, stage, left_out, model)

        def write(number: int) -> None:
            shard = missing[number]
            block = BlockArrays(plan, season_plan, shard)
            if old is not None and reused:
                old.take_dates(reused, shard, **block.part(shard))
            audit = _fuse(block, plan, season_plan, staged, stage, number)
            if old is not None:
                before = old.audits(shard)
                audit |= {item: before[item] for item in kept_items & set(before)}
            write_shard(season, shard, **block.part(shard))
            build.mark(
                shard,
                valid_fraction=float(block.valid.mean()),
                left_out=left_out & _scenes_in(plan, season_plan, shard),
                audit=audit,
            )

        _for_each(len(missing), write, together=task.together)
    return BlockResult(written=len(missing), kept=kept, reads=reader.readers.reads, taken=taken)


def _stage(
    reader: SceneReader,
    wanted: list[tuple[int, Scene]],
    stage: Stage,
    left_out: set[str],
    model: SkyModel | None,
) -> list[Reading[Any]]:
    """Read the assets of a block; return the scenes whose pixels now wait in the stage."""
    plan, padding = reader.plan, reader.plan.spec.clouds.padding
    model = model or omnicloudmask(plan.spec.clouds)
    seen = SKY_LATTICE.cover(reader.area.expand(padding)).relative_to(reader.area)

    def keep(reading: Reading[Any], asset: Asset, pixels: Pixels) -> np.ndarray | None:
        scene = reading.scene
        if asset == scene.scl:
            stage.put(reading.number, asset.key, pixels, padding=padding)
        elif asset in scene.bands:
            stage.put(reading.number, asset.key, pixels)
        return pixels.on_grid(seen) if asset in scene.sky else None

    staged = []
    for reading in reader.read(wanted, keep, left_out):
        if reading.scene.sky:
            bands = (reading.made[asset.key].result() for asset in reading.scene.sky)
            seen_bands = [band for band in bands if band is not None]
            sky = classify_sky(reading.scene, seen_bands, reader.area, plan, model)
            classes = Pixels(values=sky, row=-padding, col=-padding, nodata=0)
            stage.put(reading.number, _SKY, classes, padding=padding)
        # Nothing may hold on to the pixels of the sky.
        reading.made.clear()
        # Each thread's heap would else keep what it read last, beside all that comes.
        give_back_memory()
        staged.append(reading)
    return staged


def _fuse(
    block: BlockArrays,
    plan: CubePlan,
    season: SeasonPlan,
    staged: list[Reading[Any]],
    stage: Stage,
    number: int,
) -> dict[str, Any]:
    """Fill a shard's arrays, scene by scene; return what was counted of each, as JSON values."""
    area = block.area.shift(plan.window.row, plan.window.col)
    inner = stage.shards[number]
    near = inner.expand(plan.spec.clouds.padding)
    whole = Window(0, 0, *area.shape_yx)
    merger = make_merger(block, plan, season)
    audit: dict[str, Any] = {}
    for reading in staged:
        scene = reading.scene
        if not scene.meets(area):
            continue

        def take(key: str, around: Window, scene_number: int = reading.number) -> np.ndarray:
            return stage.take(scene_number, key, number).on_grid(around)

        pixels = harmonise_scene(
            scene,
            [take(asset.key, inner) for asset in scene.bands],
            take(scene.scl.key, near) if scene.scl is not None and plan.with_scl else None,
            plan.spec.clouds,
            take(_SKY, near) if scene.sky else None,
        )
        (counts,) = audit_scene(pixels, plan.bands, [whole])
        audit[scene.item] = counts.to_json()
        merger.add(reading.date, scene, pixels)
    merger.finish()
    return audit


def _for_each(count: int, write: Callable[[int], None], *, together: int) -> None:
    """Write shards one after another, or some at a time."""
    if min(together, count) <= 1:
        for number in range(count):
            write(number)
        return
    with ThreadPoolExecutor(together) as pool:
        futures = [pool.submit(write, number) for number in range(count)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


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
    near = whole.expand(plan.spec.clouds.padding)
    seen = SKY_LATTICE.cover(plan.window.expand(plan.spec.clouds.padding)).relative_to(plan.window)
    model = model or omnicloudmask(plan.spec.clouds)
    reader = SceneReader(
        plan=plan, area=plan.window, readers=readers, ledger=folder / LEDGER_FILE,
        skip_failures=skip_failures, threads=threads,
    )  # fmt: skip

    def place(reading: Reading[Any], asset: Asset, pixels: Pixels) -> np.ndarray:
        if asset in reading.scene.sky:
            return pixels.on_grid(seen)
        return pixels.on_grid(near if asset == reading.scene.scl else whole)

    arrays = BlockArrays(plan, season, whole)
    merger = make_merger(arrays, plan, season)
    left_out: set[str] = set()
    audit: dict[str, Any] = {}
    inside = whole.relative_to(seen)
    for reading in reader.read(wanted_scenes(season, plan.window), place, left_out):
        scene = reading.scene
        found = {key: future.result() for key, future in reading.made.items()}
        sky = None
        if scene.sky:
            bands = [found[asset.key] for asset in scene.sky]
            sky = classify_sky(scene, bands, plan.window, plan, model)
            found |= {asset.key: found[asset.key][inside.rows, inside.cols] for asset in scene.sky}
        pixels = harmonise_scene(
            scene,
            [found[asset.key] for asset in scene.bands],
            found.get(scene.scl.key) if scene.scl is not None else None,
            plan.spec.clouds,
            sky,
        )
        (counts,) = audit_scene(pixels, plan.bands, [whole])
        audit[scene.item] = counts.to_json()
        merger.add(reading.date, scene, pixels)
    merger.finish()
    return BlockPixels(arrays=arrays, left_out=tuple(sorted(left_out)), audit=audit)


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
