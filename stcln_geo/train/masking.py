"""The options of masking: how much is hidden, of what shape, and whether a run can do so."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..errors import InputError
from ..model.band_groups import group_numbers
from ..model.masking import SQUARE_STRATEGIES, MaskStrategy

__all__ = ["MaskingSection", "RatioSchedule", "check_masking", "groups_of"]

RatioSchedule = Literal["constant", "linear", "cosine"]
"""How the share that is hidden changes over a run."""

_BLOCK = 4
_REACH = 4
"""Pixels on each side that the convolutions see."""


class MaskingSection(BaseModel):
    """What pre-training hides."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mask_ratio: float = Field(default=0.5, gt=0, lt=1)
    """Chance of each draw; with a schedule, that of the last step. Validation uses it throughout,
    so that its figures compare."""
    mask_ratio_start: float | None = Field(default=None, gt=0, lt=1)
    """Chance in the first step, of a schedule."""
    schedule: RatioSchedule = "constant"
    """How the chance goes from ``mask_ratio_start`` to ``mask_ratio`` over the steps of the run:
    ``linear``, or ``cosine``, which leaves and arrives slowly."""
    strategy: MaskStrategy = "time"
    """What is hidden as a whole or not at all: a date of a chip (``time``), a pixel on a date
    (``space-time``, as published), a square on a date (``block``), a square on all dates
    (``tube``), a group of bands in a square on a date (``band-group``)."""
    block: int = Field(default=_BLOCK, ge=1)
    """Side of a square (pixels), of ``block``, ``tube`` and ``band-group``."""
    band_groups: dict[str, tuple[str, ...]] = {}
    """Bands by name of a group, of ``band-group``; bands in none are hidden by themselves. By
    default four groups by wavelength: visible, red edge, near and short-wave infrared."""
    gate: bool = False
    """Hide only on dates on which nearly the whole chip is green (needs red and nir), as
    published."""

    @model_validator(mode="after")
    def _agree(self) -> MaskingSection:
        """Refuse options that contradict one another."""
        if (self.schedule == "constant") != (self.mask_ratio_start is None):
            raise ValueError(
                f"schedule is {self.schedule} and mask_ratio_start is {self.mask_ratio_start}: "
                "linear and cosine begin at mask_ratio_start, constant has none; set both or none"
            )
        if self.band_groups and self.strategy != "band-group":
            raise ValueError(
                f"band_groups are given and strategy is {self.strategy}: only band-group uses "
                "them; set strategy to band-group, or leave the groups out"
            )
        return self

    def ratio_at(self, step: int, *, steps: int) -> float:
        """Return the chance of each draw in a step, counted from 0."""
        if self.mask_ratio_start is None:
            return self.mask_ratio
        done = min(step / (steps - 1), 1.0) if steps > 1 else 1.0
        if self.schedule == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return self.mask_ratio_start + done * (self.mask_ratio - self.mask_ratio_start)


def groups_of(options: MaskingSection, bands: tuple[str, ...]) -> tuple[int, ...] | None:
    """Return the number of each band's group; None where bands are hidden together.

    Raises
    ------
    InputError
        If the groups do not fit the bands.
    """
    if options.strategy != "band-group":
        return None
    return group_numbers(bands, options.band_groups)


def check_masking(options: MaskingSection, *, bands: tuple[str, ...], chip: int) -> tuple[str, ...]:
    """Check the options against the bands and the chips of a run; return what there is to say.

    Parameters
    ----------
    chip
        Side of a chip (pixels).

    Raises
    ------
    InputError
        If groups of bands do not fit the bands, or a square is no smaller than a chip.
    """
    groups_of(options, bands)
    notes = []
    if options.strategy in SQUARE_STRATEGIES and options.block >= chip:
        raise InputError(
            f"Cannot hide squares of {options.block} px in chips of {chip} px: a square must be "
            "smaller than a chip. Set masking.block lower, give a larger --chip, or use "
            "masking.strategy=time, which hides whole dates."
        )
    if options.strategy == "tube" and options.block > 2 * _REACH:
        notes.append(
            f"Tubes of {options.block} px: the network reaches {_REACH} px on each side, so pixels "
            "further inside are guessed from nothing but the date."
        )
    if options.block != _BLOCK and options.strategy not in SQUARE_STRATEGIES:
        notes.append(
            f"No squares of {options.block} px: masking.strategy is {options.strategy}. Squares "
            f"are drawn by {', '.join(SQUARE_STRATEGIES)}."
        )
    if options.gate and not {"red", "nir"} <= set(bands):
        notes.append(
            "No vegetation gate: the bands lack red or nir. Observations are hidden on all dates."
        )
    return tuple(notes)
