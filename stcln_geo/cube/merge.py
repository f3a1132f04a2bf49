"""From scenes, one after another, to a block's dates: fuse each day, merge each period."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..grid import Window, crop_geobox
from .composite import UNKNOWN_COVER, compose
from .contract import FILL, NO_DAY
from .fuse import ScenePixels, fuse_scene
from .planned import CubePlan, DatePlan, Scene, SeasonPlan

__all__ = ["BlockArrays", "Merger", "days_after", "make_merger", "nearest_to"]

_NOON = np.timedelta64(12, "h")


class BlockArrays:
    """The arrays of a block, empty at first."""

    def __init__(self, plan: CubePlan, season_plan: SeasonPlan, area: Window) -> None:
        """Allocate them for an area counted from the plan's first pixel."""
        shape = (len(season_plan.dates), *area.shape_yx)
        self.area = area
        self.geobox = crop_geobox(plan.geobox, area)
        self.reflectance = np.full((shape[0], len(plan.bands), *shape[1:]), FILL, dtype=np.int16)
        self.valid = np.zeros(shape, dtype=bool)
        self.scl = np.zeros(shape, dtype=np.uint8) if plan.keeps_scl else None
        self.observations = (
            np.zeros(shape, dtype=np.uint8) if plan.spec.composite != "none" else None
        )
        self.day_offset = (
            np.full(shape, NO_DAY, dtype=np.int8) if plan.spec.composite != "none" else None
        )

    def part(self, shard: Window) -> dict[str, Any]:
        """Return the arrays of one of the block's shards, as views."""
        inside = shard.relative_to(self.area)
        here = (..., inside.rows, inside.cols)
        return {
            "reflectance": self.reflectance[here],
            "valid": self.valid[here],
            "scl": self.scl[here] if self.scl is not None else None,
            "observations": self.observations[here] if self.observations is not None else None,
            "day_offset": self.day_offset[here] if self.day_offset is not None else None,
        }


class Merger(Protocol):
    """Puts scenes, in the order of the plan, into a block."""

    def add(self, date: int, scene: Scene, pixels: ScenePixels) -> None:
        """Add a scene to a date, given by its position."""

    def finish(self) -> None:
        """Complete the last date."""


def make_merger(block: BlockArrays, plan: CubePlan, season: SeasonPlan) -> Merger:
    """Return what turns a season's scenes into its dates."""
    if plan.spec.composite == "none":
        return _DayFuser(block)
    return _PeriodMerger(block, plan, season)


class _DayFuser:
    """Each solar day is a date."""

    def __init__(self, block: BlockArrays) -> None:
        self._block = block
        self._rank = np.zeros(block.area.shape_yx, dtype=np.uint8)
        self._current = -1

    def add(self, date: int, scene: Scene, pixels: ScenePixels) -> None:
        if date != self._current:
            self._current = date
            self._rank[:] = 0
        block = self._block
        fuse_scene(
            pixels,
            reflectance=block.reflectance[date],
            valid=block.valid[date],
            scl=block.scl[date] if block.scl is not None else None,
            rank=self._rank,
        )

    def finish(self) -> None:
        """Nothing is left to do: each scene goes straight into the block."""


class _PeriodMerger:
    """The solar days of a period, the only ones in memory, are merged into a date."""

    def __init__(self, block: BlockArrays, plan: CubePlan, season: SeasonPlan) -> None:
        self._block, self._method, self._dates = block, plan.spec.composite, season.dates
        absolute = block.area.shift(plan.window.row, plan.window.col)
        most = max(len(date.days(absolute)) for date in season.dates)
        shape = block.area.shape_yx
        self._reflectance = np.empty((most, len(plan.bands), *shape), dtype=np.int16)
        self._valid = np.empty((most, *shape), dtype=bool)
        self._cover = (
            np.empty((most, *shape), dtype=np.uint16) if self._method == "least-cloudy" else None
        )
        self._rank = np.zeros(shape, dtype=np.uint8)
        self._date = -1
        self._days: list[str] = []

    def add(self, date: int, scene: Scene, pixels: ScenePixels) -> None:
        if date != self._date:
            self.finish()
            self._date, self._days = date, []
        if scene.day not in self._days:
            self._days.append(scene.day)
            slot = len(self._days) - 1
            self._reflectance[slot], self._valid[slot], self._rank[:] = FILL, False, 0
        slot = len(self._days) - 1
        taken = fuse_scene(
            pixels,
            reflectance=self._reflectance[slot],
            valid=self._valid[slot],
            scl=None,
            rank=self._rank,
        )
        if self._cover is not None:
            told = UNKNOWN_COVER if scene.cloud_cover is None else scene.cloud_cover
            self._cover[slot][taken] = told

    def finish(self) -> None:
        if not self._days:
            return
        block, used = self._block, slice(len(self._days))
        merged = compose(
            self._method,
            self._reflectance[used],
            self._valid[used],
            days=days_after(self._dates[self._date], self._days),
            cover=self._cover[used] if self._cover is not None else None,
            preference=nearest_to(self._dates[self._date], self._days),
        )
        block.reflectance[self._date] = merged.reflectance
        block.valid[self._date] = merged.observations > 0
        if block.observations is not None:
            block.observations[self._date] = merged.observations
        if block.day_offset is not None:
            block.day_offset[self._date] = merged.day


def nearest_to(date: DatePlan, days: list[str]) -> list[int]:
    """Return the positions of days, those whose noon is nearest to a date first, then by time."""
    moments = np.array(days, dtype="datetime64[s]") + _NOON
    distance = np.abs(moments - np.array(date.time))
    return [int(index) for index in np.lexsort((moments, distance))]


def days_after(date: DatePlan, days: list[str]) -> list[int]:
    """Return how many days after a date's own day each solar day lies; negative before it."""
    apart = np.array(days, dtype="datetime64[D]") - date.time.astype("datetime64[D]")
    return [int(count) for count in apart.astype(np.int64)]
