"""Which dates of a series are used: those until a day, or a few spread evenly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError

__all__ = ["DateChoice"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DateChoice:
    """A rule by which dates are left out, the same wherever and in whatever order it is applied."""

    until: int | None = None
    """Days since the season's first day; dates on and after it are left out."""
    most: int | None = None
    """Most dates that are left, spread evenly over the ranks of those there are; one is the middle
    one, or the earlier of two."""

    def __post_init__(self) -> None:
        """Refuse a rule that leaves no date."""
        for name, value in (("until", self.until), ("most", self.most)):
            if value is not None and value < 1:
                raise InputError(
                    f"Cannot use dates with {name}={value}: it must be 1 or more, so that a date "
                    "can be left. Leave it out to use all dates."
                )

    def positions(self, days: np.ndarray) -> np.ndarray:
        """Return the positions of the dates that are used, increasing.

        Parameters
        ----------
        days : (T,) int, increasing days since the season's first day.

        Returns
        -------
        (N,) int64, N <= T; empty where no date comes before ``until``.
        """
        kept = np.arange(len(days))
        if self.until is not None:
            kept = kept[np.asarray(days) < self.until]
        if self.most == 1:
            return kept[(len(kept) - 1) // 2 :][:1]
        if self.most is not None and len(kept) > self.most:
            kept = kept[np.linspace(0, len(kept) - 1, self.most).round().astype(np.int64)]
        return kept

    def describe(self, season: str) -> str:
        """Say what is used, for people.

        Parameters
        ----------
        season
            First day of the season, ``YYYY-MM-DD``.
        """
        parts = []
        if self.until is not None:
            parts.append(f"dates before {np.datetime64(season) + np.timedelta64(self.until, 'D')}")
        if self.most is not None:
            parts.append(f"at most {self.most} dates, spread evenly")
        return ", ".join(parts) or "all dates"

    def suffix(self, season: str) -> str:
        """Return what names of folders end with; nothing for all dates."""
        ends = []
        if self.until is not None:
            ends.append(f"-until-{np.datetime64(season) + np.timedelta64(self.until, 'D')}")
        if self.most is not None:
            ends.append(f"-{self.most}-dates")
        return "".join(ends)
