"""Ranges of time, as users and STAC APIs write them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

__all__ = ["TimeRange", "parse_time_range"]

_NONE = np.timedelta64(0, "s")


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRange:
    """From ``start`` to ``end``, both included, UTC; None is open."""

    start: np.datetime64 | None = None
    end: np.datetime64 | None = None

    def holds(self, time: np.datetime64) -> bool:
        """Return True where the time lies in the range."""
        second = time.astype("datetime64[s]")
        after = self.start is None or bool(second >= self.start)
        return after and (self.end is None or bool(second <= self.end))

    def to_stac(self, *, later: np.timedelta64 = _NONE) -> str | None:
        """Return the range as a STAC API writes it, or None if it is open on both sides.

        Parameters
        ----------
        later
            How much longer than asked for the range is made.
        """
        if self.start is None and self.end is None:
            return None
        start = ".." if self.start is None else f"{self.start}Z"
        # The last second is included whole.
        end = ".." if self.end is None else f"{self.end + later}.999999Z"
        return f"{start}/{end}"


def parse_time_range(text: str | None) -> TimeRange:
    """Read ``START/END``: dates or UTC times, both included; ``..`` or nothing is open.

    An end without a time of day includes the whole day; a single date is that day.
    """
    if text is None:
        return TimeRange()
    parts = text.split("/")
    if len(parts) == 1:
        parts = [text, text]
    try:
        if len(parts) != 2:
            raise ValueError(text)
        start = _moment(parts[0], last=False)
        end = _moment(parts[1], last=True)
    except ValueError as error:
        raise InputError(
            f"Cannot read the time range {text!r}: it must be START/END with dates as YYYY-MM-DD, "
            "as in --time 2018-09-01/2019-08-31."
        ) from error
    if start is not None and end is not None and start > end:
        raise InputError(
            f"Cannot use the time range {text!r}: it ends before it starts. "
            "Give the earlier date first."
        )
    return TimeRange(start=start, end=end)


def _moment(text: str, *, last: bool) -> np.datetime64 | None:
    text = text.strip()
    if text in {"", ".."}:
        return None
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text):
        day = np.datetime64(text, "s")
        return day + np.timedelta64(86399, "s") if last else day
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2})?Z?", text):
        return np.datetime64(text.removesuffix("Z"), "s")
    raise ValueError(text)
