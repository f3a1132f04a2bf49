"""Say what archive to simulate: its place, its size, its seasons, and when the satellite passes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import InputError
from ..grid import Window
from .noise import make_key, make_uniform

RESOLUTION = 10
"""Metres per pixel of the finest bands."""

BASELINE_CHANGE = datetime(2022, 1, 25, tzinfo=UTC)
"""Acquisitions from this day on carry 1000 more digital numbers, and declare an offset of -0.1."""

_REVISIT_DAYS = 5
_SLOTS = 73
_MAX_DATES = 2 * _SLOTS
_ORBITS = (51, 8)
_ORIGIN_STEP = 60
_SOUTH = 32700
_HALF_YEAR = 182.625


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquisition:
    """One pass of the satellite over the region."""

    season: int
    """Index of the season, from 0."""
    when: datetime
    """Time of the pass, UTC."""
    day: int
    """Days since the start of the season."""
    orbit: int
    """Relative orbit; the second of the two sees only the west of the region."""
    partial: bool
    """True where the swath covers only a part of the region."""
    platform: str
    """One letter: A or B."""
    baseline: str
    """Processing baseline, such as 03.01."""
    offset: int
    """Digital numbers added to every valid pixel: 0 or 1000."""
    cloud_amount: float
    """Share of the sky meant to be under cloud, 0 to 1; that of a small region strays from it."""
    year_day: float
    """Day of the year; south of the equator the one with as much sun in the north."""
    south: bool
    """True south of the equator, where the sun stands in the north."""
    key: int
    """Key of all that is random on this date."""


@dataclass(frozen=True, kw_only=True)
class SimulationSpec:
    """The recipe of a simulated archive; equal recipes give equal files."""

    width: int = 301
    """Pixels of 10 m, west to east."""
    height: int = 203
    """Pixels of 10 m, north to south."""
    dates: int = 24
    """Acquisitions per season."""
    seasons: int = 1
    """Seasons of twelve months, each from 1 September; in zones of the south, from 1 March."""
    seed: int = 0
    """Everything random follows from it."""
    start_year: int = 2021
    """Year in which the first season starts."""
    field_pixels: int = 190
    """Mean size of a field in pixels of 10 m."""
    cloud_fraction: float = 0.35
    """Mean share of the sky under cloud, 0 to 0.9."""
    field_variation: float = 1.0
    """Factor on how far fields of a crop stray from one another: in calendar, growth and colour."""
    year_days: float = 4.0
    """Days by which the calendar of a year strays at most, earlier or later."""
    late_days: float = 0.0
    """Days by which all calendars of the region are later than usual; negative: earlier."""
    crs: str = "EPSG:32631"
    """A UTM zone as EPSG:326zz, or EPSG:327zz, whose seasons begin half a year earlier."""
    origin_x: int = 573_000
    """Easting of the west edge in metres, a multiple of 60."""
    origin_y: int = 5_625_000
    """Northing of the north edge in metres, a multiple of 60."""

    def __post_init__(self) -> None:
        """Refuse what cannot be simulated, all problems in one message."""
        limits: dict[str, tuple[float, float]] = {
            "width": (16, 109_800),
            "height": (16, 109_800),
            "dates": (2, _MAX_DATES),
            "seasons": (1, 12),
            "start_year": (1990, 2100),
            "field_pixels": (40, 5000),
            "cloud_fraction": (0.0, 0.9),
            "field_variation": (0.0, 4.0),
            "year_days": (0.0, 30.0),
            "late_days": (-45.0, 45.0),
        }
        problems = [
            f"{name}={getattr(self, name)} must be from {low:g} to {high:g}"
            for name, (low, high) in limits.items()
            if not low <= getattr(self, name) <= high
        ]
        problems += [
            f"{name}={getattr(self, name)} must be a multiple of {_ORIGIN_STEP} m"
            for name in ("origin_x", "origin_y")
            if getattr(self, name) % _ORIGIN_STEP
        ]
        digits = self.crs.removeprefix("EPSG:")
        if not (
            digits.isdigit() and digits[:3] in ("326", "327") and 1 <= int(digits[3:] or 0) <= 60
        ):
            problems.append(f"crs={self.crs!r} must be a UTM zone, such as 'EPSG:32631'")
        if problems:
            raise InputError(
                f"Cannot simulate an archive: {'; '.join(problems)}. Change these values."
            )

    @property
    def epsg(self) -> int:
        """The number of the coordinate system."""
        return int(self.crs.removeprefix("EPSG:"))

    @property
    def south(self) -> bool:
        """True where the zone is one of the southern hemisphere."""
        return self.epsg > _SOUTH

    @property
    def window(self) -> Window:
        """The region in absolute pixels of 10 m."""
        return Window(
            row=-self.origin_y // RESOLUTION,
            col=self.origin_x // RESOLUTION,
            height=self.height,
            width=self.width,
        )

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """West, south, east and north of the region in metres."""
        return (
            float(self.origin_x),
            float(self.origin_y - self.height * RESOLUTION),
            float(self.origin_x + self.width * RESOLUTION),
            float(self.origin_y),
        )

    @cached_property
    def acquisitions(self) -> tuple[Acquisition, ...]:
        """All passes of all seasons, in the order of time."""
        return tuple(
            pass_ for season in range(self.seasons) for pass_ in self._season_passes(season)
        )

    def season_start(self, season: int) -> datetime:
        """Give the first day of a season."""
        return datetime(self.start_year + season, 3 if self.south else 9, 1, tzinfo=UTC)

    @property
    def time_range(self) -> str:
        """START/END of all seasons, as a search takes it."""
        last = self.season_start(self.seasons) - timedelta(days=1)
        return f"{self.season_start(0).date()}/{last.date()}"

    def to_dict(self) -> dict[str, Any]:
        """Give the recipe as plain values."""
        return asdict(self)

    def _season_passes(self, season: int) -> list[Acquisition]:
        # Two orbits pass every five days each, two days apart; each of `dates` spans keeps one.
        edges = np.linspace(0, _MAX_DATES, self.dates + 1)
        passes = []
        for index in range(self.dates):
            slots = range(int(np.ceil(edges[index])), int(np.ceil(edges[index + 1])))
            partial = [slot for slot in slots if slot % 2]
            full = [slot for slot in slots if not slot % 2]
            key = make_key(self.seed, 17, self.start_year + season, index)
            wanted = partial if partial and (not full or make_uniform(key, 1) < 0.3) else full
            slot = wanted[int(make_uniform(key, 2) * len(wanted))]
            passes.append(self._make_pass(season, slot))
        return passes

    def _make_pass(self, season: int, slot: int) -> Acquisition:
        partial = bool(slot % 2)
        day = (slot // 2) * _REVISIT_DAYS + (2 if partial else 0)
        key = make_key(self.seed, 23, self.start_year + season, slot)
        minute = 46 if partial else 56
        when = self.season_start(season) + timedelta(
            days=day, hours=10, minutes=minute, seconds=int(make_uniform(key, 1) * 60)
        )
        late = when >= BASELINE_CHANGE
        year_day = when.timetuple().tm_yday + (_HALF_YEAR if self.south else 0.0)
        return Acquisition(
            season=season,
            when=when,
            day=day,
            orbit=_ORBITS[partial],
            partial=partial,
            platform="AB"[(slot // 2) % 2],
            baseline="05.10" if late else "03.01",
            offset=1000 if late else 0,
            cloud_amount=self._cloud_amount(key, year_day),
            year_day=year_day,
            south=self.south,
            key=key,
        )

    def _cloud_amount(self, key: int, year_day: float) -> float:
        # Many dates are nearly clear or nearly overcast; winter has more cloud than summer.
        if self.cloud_fraction == 0:
            return 0.0
        winter = 0.2 * np.cos((year_day - 10) / 365.25 * 2 * np.pi)
        mean = float(np.clip(self.cloud_fraction + winter, 0.02, 0.95))
        amount = make_uniform(key, 5) ** ((1 - mean) / mean)
        return 0.0 if amount < 0.015 else float(min(amount, 0.97))
