"""The recipe of a cube: all choices that decide its numbers."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import InputError
from ..grid import SNAP_METRES, Lattice
from .calendar import Period
from .clouds import CloudSpec
from .composite import Composite
from .contract import check_bands, parse_season_start
from .layout import Layout
from .read import Resampling

__all__ = ["DEFAULT_BANDS", "Composite", "CubeSpec", "OnError", "Period"]

DEFAULT_BANDS = (
    "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22",
)  # fmt: skip
"""The ten bands of 10 and 20 m, in the cube's order."""

OnError = Literal["fail", "skip"]
"""What an asset that cannot be read does: stop the build, or leave its scene out there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CubeSpec:
    """What to build.

    Parameters
    ----------
    bands
        Common names, in the cube's order; None takes the ten bands of 10 and 20 m that the items
        have.
    resolution
        Pixel size (metres).
    crs
        Such as ``EPSG:32631``; ``auto`` takes the scenes' CRS if they share one, else the UTM
        zone of the region's centre.
    season_start
        ``MM-DD``: the day each season begins.
    resampling
        How reflectance is brought onto the grid where the file does not lie on it.
    lattice
        The windows around which the grid is padded.
    composite, period
        Merge the clear observations of each period of a fixed calendar into one date; ``none``
        keeps every solar day and has no period.
    keep_scl
        Also store the scene classes; composites have none.
    offset
        Reflectance to add to all items, in place of the rules (-0.1 for raw products since
        baseline 04.00).
    on_error
        ``fail`` stops after the failures are recorded; ``skip`` leaves a scene out where one of
        its assets cannot be read, and records it.
    max_failed_fraction
        With ``skip``: the share of a season's scenes, 0 to 1, that may be left out; with more the
        season stays unfinished. None allows any.
    layout
        Sides of chunk and shard; by default chosen for each season.
    """

    bands: tuple[str, ...] | None = None
    resolution: float = 10.0
    crs: str = "auto"
    season_start: str = "09-01"
    resampling: Resampling = "bilinear"
    clouds: CloudSpec = field(default_factory=CloudSpec)
    lattice: Lattice = field(default_factory=Lattice)
    composite: Composite = "none"
    period: Period | None = None
    keep_scl: bool = True
    offset: float | None = None
    on_error: OnError = "fail"
    max_failed_fraction: float | None = None
    layout: Layout | None = None

    def __post_init__(self) -> None:
        """Check each choice."""
        if self.bands is not None:
            check_bands(self.bands)
        if not 0 < self.resolution < 10_000:
            raise InputError(
                f"Cannot build at a resolution of {self.resolution} m: it must be above 0 and "
                "below 10000. Use for example --resolution 10."
            )
        parse_season_start(self.season_start)
        for name, choices in (
            ("resampling", Resampling), ("composite", Composite), ("on_error", OnError),
        ):  # fmt: skip
            allowed = typing.get_args(choices)
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"Cannot use {name}={getattr(self, name)!r}: it must be "
                    f"{' or '.join(allowed)}. Choose one of these."
                )
        self._check_period()
        if self.max_failed_fraction is not None:
            self._check_failed_fraction(self.max_failed_fraction)
        if self.offset is not None and not -1 <= self.offset <= 1:
            raise InputError(
                f"Cannot add an offset of {self.offset}: it is a reflectance, -1 to 1. "
                "Raw products since baseline 04.00 need -0.1."
            )

    def _check_period(self) -> None:
        periods = typing.get_args(Period)
        if self.period is not None and self.period not in periods:
            raise InputError(
                f"Cannot make composites over {self.period!r}: the period must be "
                f"{', '.join(periods)}. Choose one of these with --period."
            )
        if self.composite == "none" and self.period is not None:
            raise InputError(
                f"Cannot use the period {self.period} without a composite: it says which dates are "
                "merged. Add --composite median, or leave --period out."
            )
        if self.composite != "none" and self.period is None:
            raise InputError(
                f"Cannot make {self.composite} composites without a period: it says which dates "
                f"are merged. Give --period {', '.join(periods[:-1])} or {periods[-1]}."
            )

    def _check_failed_fraction(self, share: float) -> None:
        if not 0 <= share <= 1:
            raise InputError(
                f"Cannot allow max_failed_fraction={share:g}: it is a share of the scenes, 0 to 1. "
                "Use for example --max-failed-fraction 0.1."
            )
        if self.on_error != "skip":
            raise InputError(
                f"Cannot use max_failed_fraction={share:g} with on_error={self.on_error!r}: it "
                "limits how many scenes are left out, and only 'skip' leaves any out. Add "
                "--on-error skip."
            )

    @property
    def margin(self) -> float:
        """How far (metres) beyond the region the grid may reach."""
        return (self.lattice.window + self.lattice.stride) * self.resolution + 2 * SNAP_METRES

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values."""
        layout = self.layout.to_json() if self.layout is not None else None
        content = {**dataclasses.asdict(self), "layout": layout}
        if self.clouds.source == "scl":
            # As before there was a choice, so that cubes of that time are still complete.
            del content["clouds"]["source"], content["clouds"]["weights"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> CubeSpec:
        """Return the spec that ``to_json`` wrote."""
        clouds = {**content["clouds"], "clear": tuple(content["clouds"]["clear"])}
        return cls(
            **{
                **content,
                "bands": tuple(content["bands"]) if content["bands"] else None,
                "clouds": CloudSpec(**clouds),
                "lattice": Lattice(**content["lattice"]),
                "layout": Layout(**content["layout"]) if content["layout"] else None,
            }
        )
