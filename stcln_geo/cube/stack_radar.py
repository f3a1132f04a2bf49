"""Sentinel-1 of a stack: backscatter on a time axis of its own, both orbit directions together.

``backscatter (site, time_s1, pol, y, x)`` float32 in decibels, NaN where nothing was measured. A
site's images are sorted by time; ``orbit_s1 (site, time_s1)`` tells ascending from descending, so
two images of one day and different directions both stand. ``time_s1`` ends with NaT where a site
has fewer images than others; a site may have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CubeError
from .contract import days_since
from .layout import create_array

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ORBITS", "RadarAxis", "StackRadar", "check_radar", "create_radar", "open_radar"]

ORBITS = ("ascending", "descending")
"""Directions of flight: in the evening, and in the morning, local time."""

_NO_DAY = -1
_COLUMNS = ("time_s1", "days_s1", "orbit_s1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RadarAxis:
    """When each site was seen by radar, and how."""

    time: np.ndarray
    """(S, T1) datetime64, UTC, not decreasing; NaT after a site's last image."""
    orbit: np.ndarray
    """(S, T1) text of ``ORBITS``, empty where ``time`` is NaT."""
    pols: tuple[str, ...]
    """Polarisations, such as vv and vh."""

    def __post_init__(self) -> None:
        """Check that times are in order and directions known."""
        absent = np.isnat(self.time)
        known = _known(self.orbit)
        if self.time.shape != self.orbit.shape or (known == absent).any() or not self.pols:
            raise CubeError(
                f"Cannot use radar times of shape {self.time.shape} with directions of shape "
                f"{self.orbit.shape} and {len(self.pols)} polarisations: each image has a time and "
                f"one of {', '.join(ORBITS)}, and there is at least one polarisation. Give both."
            )
        if not _ordered(self.time):
            raise CubeError(
                "Cannot use these radar times: those of a site must not decrease, and NaT may only "
                "follow the last. Sort them."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class StackRadar:
    """The radar part of an opened stack."""

    time: np.ndarray
    """(S, T1) datetime64[ns], UTC; NaT after a site's last image."""
    days: np.ndarray
    """(S, T1) int32: whole days since the season's first day; -1 where ``time`` is NaT."""
    orbit: np.ndarray
    """(S, T1) text: ascending or descending, empty where ``time`` is NaT."""
    pols: tuple[str, ...]
    backscatter: Any
    """(S, T1, P, Y, X) float32 zarr array in decibels; NaN where nothing was measured."""


def create_radar(
    group: Any,
    axis: RadarAxis,
    *,
    season: str,
    shape_yx: tuple[int, int],
    chunk: int,
    sites_per_shard: int,
) -> tuple[str, ...]:
    """Create the empty array and its coordinates in a stack's group; return the coordinates."""
    sites, images = axis.time.shape
    time = axis.time.astype("datetime64[s]")
    absent = np.isnat(time)
    days = days_since(np.where(absent, np.datetime64(0, "s"), time), season)
    whole = tuple(-(-size // chunk) * chunk for size in shape_yx)
    create_array(
        group, "backscatter", (sites, images, len(axis.pols), *shape_yx),
        (1, images, len(axis.pols), chunk, chunk),
        (min(sites_per_shard, sites), images, len(axis.pols), *whole), dtype="float32",
        fill=float("nan"), dims=("site", "time_s1", "pol", "y", "x"),
        attrs={"units": "dB", "long_name": "radar backscatter"},
    )  # fmt: skip
    columns: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
        "time_s1": (
            time.astype("int64"),
            {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        ),
        "days_s1": (
            np.where(absent, _NO_DAY, days).astype(np.int32),
            {"long_name": f"whole days elapsed after {season}; -1 where there is no image"},
        ),
        "orbit_s1": (
            np.asarray(axis.orbit).astype(np.dtypes.StringDType()),
            {"long_name": "direction of flight"},
        ),
    }
    for name, (values, attrs) in columns.items():
        group.create_array(
            name, data=values, chunks=values.shape, dimension_names=("site", "time_s1"),
            attributes=attrs,
        )  # fmt: skip
    group.create_array(
        "pol", data=np.asarray(axis.pols, dtype=np.dtypes.StringDType()),
        chunks=(len(axis.pols),), dimension_names=("pol",),
    )  # fmt: skip
    return _COLUMNS


def open_radar(group: Any) -> StackRadar | None:
    """Return the radar part of a stack's group, or None where it has none."""
    if "backscatter" not in group:
        return None
    return StackRadar(
        time=np.asarray(group["time_s1"][:]).astype("datetime64[s]").astype("datetime64[ns]"),
        days=group["days_s1"][:],
        orbit=np.asarray(group["orbit_s1"][:]),
        pols=tuple(str(value) for value in group["pol"][:]),
        backscatter=group["backscatter"],
    )


def check_radar(dataset: xr.Dataset, errors: list[str]) -> None:
    """Compare the radar part of a stack's dataset with the contract."""
    if "backscatter" not in dataset:
        return
    missing = [name for name in (*_COLUMNS, "pol") if name not in dataset.coords]
    if missing:
        errors.append(
            f"'backscatter' lacks the coordinates {', '.join(missing)}. Assign them, or leave "
            "'backscatter' out."
        )
        return
    time = dataset["time_s1"].to_numpy()
    if not np.issubdtype(time.dtype, np.datetime64) or not _ordered(time):
        errors.append(
            "'time_s1' must be datetime64 and not decrease within a site, with NaT only after its "
            "last image. Sort it."
        )
        return
    absent = np.isnat(time)
    if ((dataset["days_s1"].to_numpy() == _NO_DAY) != absent).any():
        errors.append(f"'days_s1' must be {_NO_DAY} exactly where 'time_s1' is NaT.")
    if (_known(dataset["orbit_s1"].to_numpy()) == absent).any():
        errors.append(
            f"'orbit_s1' must be {' or '.join(ORBITS)} where 'time_s1' is a time, and empty where "
            "it is NaT."
        )


def _known(orbit: np.ndarray) -> np.ndarray:
    """Return where text, of any of numpy's kinds, is a direction of flight."""
    known = [str(value) in ORBITS for value in orbit.ravel()]
    return np.array(known, dtype=bool).reshape(orbit.shape)


def _ordered(time: np.ndarray) -> bool:
    """Return True where no row decreases, and NaT stands only at its end."""
    absent = np.isnat(time)
    numbers = np.where(absent, np.iinfo(np.int64).max, time.astype("int64"))
    return bool((np.diff(numbers, axis=1) >= 0).all())
