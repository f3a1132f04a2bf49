"""Why a pixel has a class or none: the codes of ``qa.tif``, in one place."""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from ..legend import Legend

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["COUNT_NODATA", "LARGEST_COUNT", "QA_LEGEND", "Quality", "quality_of", "reasons"]

COUNT_NODATA = 255
"""Nodata of ``observations.tif``: pixels that were not looked at."""

LARGEST_COUNT = 254
"""Clear dates beyond this are written as this."""


class Quality(IntEnum):
    """Pixel values of ``qa.tif``."""

    MAPPED = 0
    """It has a class."""
    OUTSIDE = 1
    """Its centre lies outside the region."""
    NO_DATA = 2
    """No date is clear: never seen, or always cloudy."""
    FEW_DATES = 3
    """Some dates are clear, but fewer than ``min_clear``."""
    SKIPPED = 4
    """The mask leaves it out."""
    FAILED = 5
    """Its shard could not be labelled; running the command again tries it again."""
    MERGED = 6
    """It has the class of its surroundings: its patch was smaller than ``min_mapping_unit``."""


QA_LEGEND = Legend.from_rows(
    [
        {"value": quality.value, "name": name, "color": color}
        for quality, name, color in (
            (Quality.MAPPED, "mapped", "#2f7d4f"),
            (Quality.OUTSIDE, "outside the region", "#d9dee3"),
            (Quality.NO_DATA, "no clear date", "#1f2a37"),
            (Quality.FEW_DATES, "too few clear dates", "#d98a2b"),
            (Quality.SKIPPED, "skipped by the mask", "#9fb3c8"),
            (Quality.FAILED, "failed shard", "#c0262d"),
            (Quality.MERGED, "merged into its surroundings", "#7fb08f"),
        )
    ],
    source="the quality codes",
)
"""Names and colours of the codes."""


def quality_of(
    inside: np.ndarray, kept: np.ndarray | None, counts: np.ndarray, *, min_clear: int
) -> np.ndarray:
    """Return the quality codes of a rectangle.

    Parameters
    ----------
    inside : (H, W) bool. True where the pixel's centre lies in the region.
    kept : (H, W) bool. True where the mask asks for a class; None: no mask.
    counts : (H, W) int. Clear dates; anything where no class is asked for.
    min_clear
        Clear dates that a class needs.

    Returns
    -------
    (H, W) uint8.
    """
    codes = np.full(inside.shape, Quality.MAPPED, dtype=np.uint8)
    codes[counts < min_clear] = Quality.FEW_DATES
    codes[counts == 0] = Quality.NO_DATA
    if kept is not None:
        codes[~kept] = Quality.SKIPPED
    codes[~inside] = Quality.OUTSIDE
    return codes


def reasons(histogram: Mapping[int, int]) -> dict[str, int]:
    """Return the pixels by the name of their quality code, those that occur."""
    return {
        QA_LEGEND.names[int(code)]: int(count) for code, count in histogram.items() if int(count)
    }
