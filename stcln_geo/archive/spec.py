"""The recipe of an archive: which catalog, which seasons, how large, and how cubes are made."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..cube.addresses import redact
from ..cube.contract import parse_season_start
from ..cube.selection import Selection
from ..cube.spec import CubeSpec
from ..cube.time_range import TimeRange
from ..errors import InputError
from .sites import check_size

__all__ = ["STACK_PIXELS", "ArchiveSpec", "parse_seasons"]

STACK_PIXELS = 512
"""Sites up to this size (pixels) become rows of stacks; larger ones a cube each."""

_POLICY = ("on_error", "max_failed_fraction")
_FIRST_YEAR = 1970


def parse_seasons(text: str) -> tuple[int, ...]:
    """Read ``2017..2024``, ``2019`` or ``2017,2019..2021``: the years in which seasons start.

    Examples
    --------
    >>> parse_seasons("2017,2019..2021")
    (2017, 2019, 2020, 2021)
    """
    years: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{4})(?:\s*\.\.\s*(\d{4}))?\s*", part)
        if match is None:
            raise InputError(
                f"Cannot read the seasons {text!r}: they must be years, or ranges of years, in "
                "which seasons start. Write for example --seasons 2017..2024."
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise InputError(
                f"Cannot use the seasons {part.strip()}: the range ends before it starts. Give "
                f"the earlier year first: --seasons {last}..{first}."
            )
        years.update(range(first, last + 1))
    return tuple(sorted(years))


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchiveSpec:
    """What to assemble.

    Parameters
    ----------
    catalog
        A name (``stcln-geo catalogs list``), a YAML file, a folder with ``catalog.json``, or an
        address.
    years
        Years in which the seasons start; the day is ``cube.season_start``.
    size
        Side of a site (pixels).
    collection, selection, allow_hosts
        As of a search for a cube.
    cube
        How pixels are read and merged; its CRS is left to each site's UTM zone.
    """

    catalog: str
    years: tuple[int, ...]
    size: int
    collection: str | None = None
    selection: Selection = field(default_factory=Selection)
    allow_hosts: tuple[str, ...] = ()
    cube: CubeSpec = field(default_factory=CubeSpec)

    def __post_init__(self) -> None:
        """Check each choice."""
        check_size(self.size, self.cube.resolution)
        if not self.years or min(self.years) < _FIRST_YEAR:
            raise InputError(
                f"Cannot make an archive of the seasons {self.years}: there must be at least one "
                "year, none before 1970. Write for example --seasons 2017..2024."
            )
        if self.cube.crs != "auto":
            raise InputError(
                f"Cannot make an archive in {self.cube.crs}: each site lies in its own UTM zone. "
                "Leave the CRS out."
            )

    @property
    def seasons(self) -> tuple[str, ...]:
        """First day of each season, ``YYYY-MM-DD``."""
        return tuple(f"{year:04d}-{self.cube.season_start}" for year in sorted(set(self.years)))

    @property
    def in_stacks(self) -> bool:
        """True where sites are rows of stacks, False where each is a cube."""
        return self.size <= STACK_PIXELS

    def time_range(self, season: str) -> TimeRange:
        """Return a season's first and last second."""
        month, day = parse_season_start(self.cube.season_start)
        following = np.datetime64(f"{int(season[:4]) + 1:04d}-{month:02d}-{day:02d}", "s")
        return TimeRange(start=np.datetime64(season, "s"), end=following - np.timedelta64(1, "s"))

    def to_json(self) -> dict[str, Any]:
        """Return all that decides the archive's content, as JSON values that tell no secret."""
        choices = self.cube.to_json()
        content: dict[str, Any] = {
            "catalog": catalog_identity(self.catalog),
            "years": sorted(set(self.years)),
            "size": self.size,
            "collection": self.collection,
            "selection": self.selection.to_json(),
            "allow_hosts": sorted(self.allow_hosts),
            "cube": {key: value for key, value in choices.items() if key not in _POLICY},
        }
        # Tuples are lists in JSON: the same recipe must read the same from the disk.
        content = json.loads(json.dumps(content))
        return content


def catalog_identity(catalog: str) -> str:
    """Return a catalog's name as it is compared between runs."""
    path = Path(catalog)
    return str(path.resolve()) if path.exists() else redact(catalog)
