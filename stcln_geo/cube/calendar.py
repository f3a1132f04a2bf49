"""The fixed calendar of composites: the periods into which every season is cut.

Periods follow from the season's first day alone, so they are the same for all regions, catalogs
and layouts, and there are equally many in every year. Periods of some days are counted from the
first day; ``P1M`` are calendar months. The last period ends with the season: the days that are
left, among them the leap day, make it shorter or one day longer than the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Period", "Span", "period_index", "season_periods"]

Period = Literal["P5D", "P10D", "P16D", "P1M"]
"""Length of a composite's period: 5, 10 or 16 days, or a calendar month (ISO 8601)."""

_COMMON_YEAR = 365
_DAY = np.timedelta64(1, "D")


@dataclass(frozen=True, slots=True)
class Span:
    """A period: its first day, and the first day after it (datetime64[D])."""

    start: np.datetime64
    end: np.datetime64

    @property
    def middle(self) -> np.datetime64:
        """The moment half-way (datetime64[s], UTC): noon where the number of days is odd."""
        seconds = (self.end - self.start).astype("timedelta64[s]")
        half: np.datetime64 = self.start.astype("datetime64[s]") + seconds // 2
        return half

    @property
    def last(self) -> np.datetime64:
        """The last day that belongs to the period."""
        day: np.datetime64 = self.end - _DAY
        return day


def season_periods(season: str, period: Period) -> tuple[Span, ...]:
    """Return all periods of a season, in order; they cover it without gaps.

    Parameters
    ----------
    season
        First day of the season, ``YYYY-MM-DD``.

    Examples
    --------
    >>> [len(season_periods(year, "P16D")) for year in ("2018-09-01", "2019-09-01")]
    [23, 23]
    >>> str(season_periods("2018-09-01", "P10D")[0].middle)
    '2018-09-06T00:00:00'
    """
    first = np.datetime64(season, "D")
    month = first.astype("datetime64[M]")
    after = (month + 12).astype("datetime64[D]") + (first - month.astype("datetime64[D]"))
    if period == "P1M":
        starts = (month + np.arange(1, 13)).astype("datetime64[D]")
        edges = np.unique(np.concatenate([[first], starts[starts < after], [after]]))
    else:
        length = int(period[1:-1])
        count = -(-_COMMON_YEAR // length)
        edges = np.append(first + length * np.arange(count), after)
    return tuple(Span(start, end) for start, end in itertools.pairwise(edges))


def period_index(periods: Sequence[Span], day: np.datetime64) -> int:
    """Return the position of the period that holds a day; a day outside goes to the nearest."""
    starts = np.array([span.start for span in periods])
    found = int(np.searchsorted(starts, day, side="right")) - 1
    return min(max(found, 0), len(periods) - 1)
