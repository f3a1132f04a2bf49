"""Replace a whole season by a newer one: take over what is unchanged, keep labels, swap.

While ``<season>.building`` grows beside the whole season of that name, shards whose inputs are
unchanged are taken over as files, and dates whose scenes are unchanged as pixels, so that only
what is new is read from the archive. The old season stays readable until the new one is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..grid import Window, tiles
from ..storage import Location, S3Path, copy_file, remove_tree, writing
from .planned import CubePlan, SeasonPlan
from .publish import recover_publications
from .store import (
    Season,
    finish_season,
    list_seasons,
    open_building,
    open_season,
    write_fields,
    write_json,
)
from .stored import (
    MANIFESTS,
    manifest_folder,
    manifest_path,
    read_manifest,
    season_fingerprint,
    shard_fingerprint,
)

__all__ = [
    "OldSeason",
    "current_seasons",
    "finish_replacement",
    "open_old",
    "recover_swaps",
    "store_season_plan",
    "stored_fingerprint",
]

SEASON_FILE = "season.plan"
"""Beside a season's manifests (the ``*.json`` there): the plan it was built from, as JSON."""

_SHARDED = (
    "reflectance", "valid", "scl", "observations", "day_offset", "coverage", "overview",
)  # fmt: skip
"""Arrays with one file per shard."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OldSeason:
    """A whole season that another is about to replace."""

    season: Season
    plan: CubePlan
    """The plan it was built from; of this season alone."""

    def has_shard(self, shard: Window, fingerprint: str, new: Season) -> bool:
        """Return True where a shard's file can serve the new season as it is."""
        if self.season.layout != new.layout:
            return False
        manifest = read_manifest(manifest_path(self.season.cube, self.season.name, shard))
        return manifest.get("fingerprint") == fingerprint and not manifest.get("left_out")

    def audits(self, shard: Window) -> dict[str, Any]:
        """Return what was counted in a shard of the old season, by item."""
        manifest = read_manifest(manifest_path(self.season.cube, self.season.name, shard))
        counted: dict[str, Any] = manifest.get("audit", {})
        return counted

    def take_shard(self, shard: Window, new: Season) -> None:
        """Give the new season a shard's files: linked, or copied where links are not possible."""
        side = self.season.layout.shard
        place = (shard.row // side, shard.col // side)
        with writing(new.cube):
            for name in _SHARDED:
                array = getattr(self.season, name)
                if array is None:
                    continue
                key = array.metadata.encode_chunk_key((0,) * (array.ndim - 2) + place)
                source = self.season.cube / self.season.folder / name / key
                target = new.cube / new.folder / name / key
                target.unlink(missing_ok=True)
                # A chunk that holds nothing has no file.
                if not source.is_file():
                    continue
                copy_file(source, target)

    def same_dates(self, new: SeasonPlan, area: Window) -> dict[int, int]:
        """Return the dates whose pixels in an area are unchanged, as new index -> old index.

        Those of which a scene was left out there are not among them: they are read again.

        Parameters
        ----------
        area
            Counted from the season's first pixel.
        """
        missing: set[str] = set()
        for shard in tiles(self.season.shape_yx, self.season.layout.shard):
            if shard.intersection(area).is_empty:
                continue
            manifest = read_manifest(manifest_path(self.season.cube, self.season.name, shard))
            if not manifest:
                return {}
            missing.update(manifest.get("left_out", ()))
        absolute = area.shift(self.plan.window.row, self.plan.window.col)
        old = self.plan.season(self.season.name)
        known = {_scenes_in(old, index, absolute): index for index in range(len(old.dates))}
        found = {}
        for index, date in enumerate(new.dates):
            key = _scenes_in(new, index, absolute)
            if key in known and not missing & {scene.item for scene in date.scenes}:
                found[index] = known[key]
        return found

    def take_dates(
        self,
        dates: dict[int, int],
        area: Window,
        *,
        reflectance: np.ndarray,
        valid: np.ndarray,
        scl: np.ndarray | None,
        observations: np.ndarray | None,
        day_offset: np.ndarray | None,
    ) -> None:
        """Copy dates of an area into the arrays of the new season.

        Parameters
        ----------
        dates
            New index -> old index.
        reflectance : (T, C, H, W) int16, of the area; written in place.
        valid : (T, H, W) bool.
        scl : (T, H, W) uint8, if the season keeps scene classes.
        observations : (T, H, W) uint8, if its dates are composites.
        day_offset : (T, H, W) int8, likewise.
        """
        pairs = [(reflectance, self.season.reflectance), (valid, self.season.valid)]
        if scl is not None:
            pairs.append((scl, self.season.scl))
        if observations is not None:
            pairs.append((observations, self.season.observations))
        if day_offset is not None:
            pairs.append((day_offset, self.season.day_offset))
        for target, source in pairs:
            whole = source[..., area.rows, area.cols]
            for new, old in dates.items():
                target[new] = whole[old]


def open_old(new: Season, plan: CubePlan, season: SeasonPlan) -> OldSeason | None:
    """Return the whole season that a season under construction replaces, if it can serve it."""
    path = new.cube
    file = manifest_folder(path, season.name) / SEASON_FILE
    if season.name not in list_seasons(path) or not file.is_file():
        return None
    old = open_season(path, season.name)
    stored = CubePlan.from_json(json.loads(file.read_text(encoding="utf-8")))
    before = stored.season(season.name)
    # What lies there must be what the file says, and made by the same recipe.
    if old.attrs.get("fingerprint") != season_fingerprint(stored, before):
        return None
    if _recipe(stored, before) != _recipe(plan, season):
        return None
    for name in ("scl", "observations", "day_offset"):
        if (getattr(old, name) is None) != (getattr(new, name) is None):
            return None
    return OldSeason(season=old, plan=stored)


def store_season_plan(path: Location, plan: CubePlan, name: str, *, replacing: bool) -> None:
    """Keep with a season's manifests the plan it is built from."""
    alone = dataclasses.replace(plan, seasons=(plan.season(name),), dropped=())
    write_json(manifest_folder(path, name, replacing=replacing) / SEASON_FILE, alone.to_json())


def current_seasons(path: Location, plan: CubePlan) -> set[str]:
    """Return the seasons of a plan that are whole and were built from just these inputs."""
    if not (path / "zarr.json").is_file():
        return set()
    whole = set(list_seasons(path))
    return {
        season.name
        for season in plan.seasons
        if season.name in whole
        and stored_fingerprint(path, season.name) == season_fingerprint(plan, season)
    }


def finish_replacement(path: Location, name: str) -> None:
    """Give a wholly written season the labels and the name of the season it replaces."""
    building, old = open_building(path, name), open_season(path, name)
    if building is not None and old.fields is not None and old.legend is not None:
        write_fields(
            building,
            labels=old.labels,  # type: ignore[arg-type]
            parcels=old.parcels,  # type: ignore[arg-type]
            fields=old.fields,
            legend=old.legend,
        )
    finish_season(path, name)
    if not isinstance(path, S3Path):
        _swap_manifests(path, name)


def recover_swaps(path: Location) -> None:
    """Complete the swaps that an interruption cut short."""
    if isinstance(path, S3Path):
        recover_publications(path)
        return
    with writing(path):
        for aside in path.glob("*.replaced"):
            name = aside.name.removesuffix(".replaced")
            # The old season is put aside only when the new one is whole.
            if not (path / name).exists():
                (path / f"{name}.building").rename(path / name)
            remove_tree(aside)
    for folder in (path / MANIFESTS).glob("*.building"):
        name = folder.name.removesuffix(".building")
        if (path / folder.name).exists() or not (folder / SEASON_FILE).is_file():
            continue
        plan = CubePlan.from_json(json.loads((folder / SEASON_FILE).read_text(encoding="utf-8")))
        if stored_fingerprint(path, name) == season_fingerprint(plan, plan.season(name)):
            _swap_manifests(path, name)


def _swap_manifests(path: Path, name: str) -> None:
    new, old = path / MANIFESTS / f"{name}.building", path / MANIFESTS / name
    with writing(path):
        remove_tree(old)
        new.rename(old)


def stored_fingerprint(path: Location, name: str) -> str | None:
    """Return the fingerprint that a whole season was built with, or None where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        attributes = json.loads((path / name / "zarr.json").read_text())["attributes"]
        return str(attributes["fingerprint"])
    return None


def _recipe(plan: CubePlan, season: SeasonPlan) -> str:
    """Return the fingerprint of a season without dates: of grid, bands and spec."""
    whole = Window(0, 0, *plan.window.shape_yx)
    return shard_fingerprint(plan, dataclasses.replace(season, dates=()), whole)


def _scenes_in(season: SeasonPlan, index: int, area: Window) -> str:
    """Return what a date's scenes in an absolute area are, as text."""
    scenes = season.dates[index].scenes
    return json.dumps([scene.identity for scene in scenes if scene.meets(area)], sort_keys=True)
