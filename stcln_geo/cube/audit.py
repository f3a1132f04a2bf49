"""Compare the darkest pixels of a scene with the offset that was applied to it.

Some providers say wrongly whether the offset of newer products is still in the pixels. If it was
taken off twice, dark ground comes out far below zero; if never, vegetation and water have no dark
pixel left. Both are counted from pixels that a build reads anyway, per shard and scene, so that
neither blocks nor interruptions change the verdict. No pixel is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..grid import Window
from ..storage import Location
from .fuse import ScenePixels
from .planned import Scene, SeasonPlan
from .store import Season
from .stored import read_manifests
from .zarr_store import zarr_store

__all__ = [
    "AUDITED_BANDS",
    "SUSPECT",
    "SceneAudit",
    "audit_scene",
    "merge_audits",
    "suspect_dates",
    "suspect_scenes",
]

SUSPECT = "offset_suspect"
"""Name of the coordinate that marks dates with a scene whose offset is in doubt."""

AUDITED_BANDS = ("blue", "green", "red")
"""Where vegetation and water are dark."""

_DARK_CLASSES = (4, 6)
"""Scene classes whose ground is dark in these bands: vegetation and water."""

_TOO_DARK = -100
"""Cube numbers below this are no reflectance of anything (1000 raw numbers stand for zero)."""

_NOT_DARK = 900
"""Vegetation and water all above this are too bright by an offset."""

_FULL_OFFSET = -500
"""Offsets below this (cube numbers) are taken for the -1000 of newer products."""

_SHARE = 0.01
_FEWEST = 200
"""Pixels of a scene from which a share says something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneAudit:
    """Counts of a scene's pixels; they add up over shards."""

    clear: int = 0
    """Clear pixels with all bands."""
    too_dark: tuple[int, ...] = ()
    """Clear pixels far below zero, per audited band."""
    dark_ground: int = 0
    """Clear pixels of vegetation and water."""
    dark: tuple[int, ...] = ()
    """Those that are as dark as such ground is, per audited band."""

    def __add__(self, other: SceneAudit) -> SceneAudit:
        """Return the counts of two areas together."""
        return SceneAudit(
            clear=self.clear + other.clear,
            too_dark=_sum(self.too_dark, other.too_dark),
            dark_ground=self.dark_ground + other.dark_ground,
            dark=_sum(self.dark, other.dark),
        )

    def contradicts(self, offset: int) -> bool:
        """Return True where the darkest pixels contradict the offset that was added.

        Parameters
        ----------
        offset
            In cube numbers; -1000 where the offset of newer products was taken off.
        """
        if offset < _FULL_OFFSET:
            share = max(self.too_dark, default=0) / max(self.clear, 1)
            return self.clear >= _FEWEST and share > _SHARE
        share = max(self.dark, default=0) / max(self.dark_ground, 1)
        return self.dark_ground >= _FEWEST and bool(self.dark) and share < _SHARE

    def to_json(self) -> list[Any]:
        """Return the counts as JSON values."""
        return [self.clear, list(self.too_dark), self.dark_ground, list(self.dark)]

    @classmethod
    def from_json(cls, content: Sequence[Any]) -> SceneAudit:
        """Return the counts that ``to_json`` wrote."""
        clear, too_dark, ground, dark = content
        return cls(clear=clear, too_dark=tuple(too_dark), dark_ground=ground, dark=tuple(dark))


def audit_scene(
    pixels: ScenePixels, bands: Sequence[str], shards: Iterable[Window]
) -> list[SceneAudit]:
    """Count a scene's dark pixels in each of some shards.

    Parameters
    ----------
    bands
        Names of ``pixels.values``.
    shards
        Counted from the first pixel of the arrays.
    """
    values = [pixels.values[list(bands).index(band)] for band in AUDITED_BANDS if band in bands]
    clear = pixels.is_clear
    ground = clear & np.isin(pixels.scl, _DARK_CLASSES) if pixels.scl is not None else None
    found = []
    for shard in shards:
        inside = (shard.rows, shard.cols)
        here = clear[inside]
        below = [_count(here & (value[inside] < _TOO_DARK)) for value in values]
        dark = []
        if ground is not None:
            there = ground[inside]
            dark = [_count(there & (value[inside] < _NOT_DARK)) for value in values]
        found.append(
            SceneAudit(
                clear=_count(here),
                too_dark=tuple(below),
                dark_ground=_count(ground[inside]) if ground is not None else 0,
                dark=tuple(dark),
            )
        )
    return found


def merge_audits(manifests: Iterable[Mapping[str, Any]]) -> dict[str, SceneAudit]:
    """Add up what the manifests of a season's shards hold, by item."""
    total: dict[str, SceneAudit] = defaultdict(SceneAudit)
    for manifest in manifests:
        for item, counts in (manifest.get("audit") or {}).items():
            total[item] = total[item] + SceneAudit.from_json(counts)
    return dict(total)


def suspect_scenes(
    path: Location, season: SeasonPlan, *, replacing: bool = False
) -> list[set[str]]:
    """Return, per date of a season whose shards are written, the items that are suspect."""
    audits = merge_audits(read_manifests(path, season.name, replacing=replacing))
    return [
        {
            scene.item
            for scene in date.scenes
            if scene.item in audits and audits[scene.item].contradicts(_offset(scene))
        }
        for date in season.dates
    ]


def suspect_dates(season: Season) -> list[str]:
    """Return the dates (``YYYY-MM-DD``) of a season that were marked; none in older cubes."""
    import zarr

    group: Any = zarr.open_group(
        zarr_store(season.cube / season.name), mode="r", use_consolidated=False
    )
    if SUSPECT not in group:
        return []
    flags = np.asarray(group[SUSPECT][:], dtype=bool)
    return [str(day) for day in season.time[flags].astype("datetime64[D]")]


def _count(pixels: np.ndarray) -> int:
    return int(np.count_nonzero(pixels))


def _offset(scene: Scene) -> int:
    return scene.bands[0].radiometry.offset


def _sum(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...]:
    if not first or not second:
        return first or second
    return tuple(a + b for a, b in zip(first, second, strict=True))
