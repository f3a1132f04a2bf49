"""The cube contract: names, codes and the checks a dataset must pass.

A season is an ``xr.Dataset`` with the dimensions ``time``, ``band``, ``y``, ``x``:

- ``reflectance (time, band, y, x)`` int16, reflectance / 0.0001, -32768 where there is none;
- ``valid (time, y, x)`` bool, True where every band was measured and the sky is clear;
- ``coverage (time, chunk_y, chunk_x)`` uint16, of chunks of 256 px or more uint32, clear pixels per
  chunk;
- ``overview (time, rgb, overview_y, overview_x)`` uint8, a picture to look at;
- optional ``observations (time, y, x)`` uint8, the clear observations a composite is made of;
- optional ``day_offset (time, y, x)`` int8, the day a composite's pixel was acquired on, counted
  from the date's ``days``: of a median the mean day, -128 where nothing was observed;
- optional ``scl``, ``labels`` (y, x) uint8, ``parcels`` (y, x) int32 and ``field_*`` (field).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CubeError, InputError

if TYPE_CHECKING:
    import xarray as xr

__all__ = [
    "BANDS",
    "FEWEST_CLEAR",
    "FILL",
    "NO_DAY",
    "OVERVIEW_STEP",
    "SCALE",
    "SCENE_CLASSES",
    "SCENE_COLORS",
    "SCL_CLEAR",
    "SCL_CLOUD",
    "SCL_SHADOW",
    "SPLITS",
    "check_bands",
    "check_cube",
    "check_variables",
    "days_since",
    "flag_attributes",
    "parse_season_start",
    "season_name",
    "validate_cube",
]

SCALE = 1e-4
"""Reflectance per digital number."""

FILL = -32768
"""Digital number of a pixel without a measurement."""

FEWEST_CLEAR = 3
"""Clear dates that a pixel of a map needs for a class, unless a user asks for others."""

NO_DAY = -128
"""Value of ``day_offset`` where nothing clear was observed."""

OVERVIEW_STEP = 16
"""Pixels of the cube per overview pixel."""

BANDS = (
    "coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3",
    "nir", "nir08", "nir09", "cirrus", "swir16", "swir22",
)  # fmt: skip
"""Common STAC names of the Sentinel-2 bands, by wavelength."""

SCL_CLEAR = (4, 5, 6, 7, 11)
"""Scene classes of a clear sky: vegetation, bare soil, water, unclassified, snow."""

SCL_CLOUD = (8, 9, 10)
"""Scene classes of cloud: medium probability, high probability, cirrus."""

SCL_SHADOW = (3,)
"""Scene classes of cloud shadow."""

SCENE_CLASSES = (
    "no data", "saturated or defective", "dark area", "cloud shadow", "vegetation", "bare soil",
    "water", "unclassified", "cloud, medium probability", "cloud, high probability", "thin cirrus",
    "snow or ice",
)  # fmt: skip
"""Names of the scene classes of Sentinel-2, by their codes in ``scl``."""

SCENE_COLORS = (
    "#000000", "#ff0000", "#2f2f2f", "#643200", "#00a000", "#ffe65a",
    "#0000ff", "#808080", "#c0c0c0", "#ffffff", "#64c8ff", "#ff96ff",
)  # fmt: skip
"""The colours in which ESA's tools show them."""

SPLITS = {"unused": 0, "train": 1, "validation": 2, "test": 3}
"""Codes of ``field_split``."""


def parse_season_start(text: str) -> tuple[int, int]:
    """Return month and day of ``MM-DD``."""
    match = re.fullmatch(r"(\d{2})-(\d{2})", text)
    try:
        if match is None:
            raise ValueError(text)
        datetime.date(2001, int(match[1]), int(match[2]))
    except ValueError as error:
        raise InputError(
            f"Cannot start seasons at {text!r}: it must be a month and day that every year has, "
            "as MM-DD. Use for example --season-start 09-01."
        ) from error
    return int(match[1]), int(match[2])


def season_name(time: np.datetime64 | str, season_start: str = "09-01") -> str:
    """Return the season a time belongs to: the date of its first day, ``YYYY-MM-DD``."""
    month, day = parse_season_start(season_start)
    date: Any = np.asarray(time, dtype="datetime64[D]").item()
    year = date.year if (date.month, date.day) >= (month, day) else date.year - 1
    return f"{year:04d}-{month:02d}-{day:02d}"


def days_since(time: np.ndarray, season: str) -> np.ndarray:
    """Return whole days since the first day of a season.

    Parameters
    ----------
    time : (T,) datetime64, UTC.

    Returns
    -------
    (T,) int32.
    """
    elapsed = np.asarray(time).astype("datetime64[D]") - np.datetime64(season, "D")
    return elapsed.astype(np.int32)


def check_bands(bands: tuple[str, ...]) -> None:
    """Raise CubeError unless all names are common band names, each once."""
    unknown = [band for band in bands if band not in BANDS]
    if unknown or len(set(bands)) != len(bands) or not bands:
        raise CubeError(
            f"Cannot use the bands {', '.join(bands) or '(none)'}: each must be one of "
            f"{', '.join(BANDS)}, and stand once. Name them by these common STAC names."
        )


def check_cube(dataset: xr.Dataset) -> None:
    """Raise CubeError, listing every breach, unless the dataset is a season of a cube."""
    errors, _ = validate_cube(dataset)
    if errors:
        raise CubeError("Cannot use the dataset as a cube: " + " ".join(errors))


def validate_cube(dataset: xr.Dataset) -> tuple[list[str], list[str]]:
    """Compare a dataset, raw or decoded, with the cube contract.

    Returns
    -------
    errors : what breaks the contract, each with the rule, the value and the remedy.
    warnings : what is allowed but deserves attention.
    """
    errors: list[str] = []
    warnings: list[str] = []
    errors += check_variables(dataset, _VARIABLES, _OPTIONAL, what="a cube", writer="write_cube")
    _check_coordinates(dataset, errors, warnings)
    _check_coverage(dataset, errors)
    if not errors:
        _check_content(dataset, errors, warnings)
    return errors, warnings


def flag_attributes(names: Mapping[int, str]) -> dict[str, Any]:
    """Return the attributes by which the CF conventions say what codes mean.

    Parameters
    ----------
    names
        Name of each code; what stands between its words becomes an underscore.

    Examples
    --------
    >>> flag_attributes({0: "winter wheat", 255: "no label"})
    {'flag_values': [0, 255], 'flag_meanings': 'winter_wheat no_label'}
    """
    words = (re.sub(r"[^\w.+@-]+", "_", name).strip("_") for name in names.values())
    meanings = [word or f"code_{code}" for code, word in zip(names, words, strict=True)]
    return {"flag_values": list(names), "flag_meanings": " ".join(meanings)}


_VARIABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reflectance": (("time", "band", "y", "x"), ("int16", "float32", "float64")),
    "valid": (("time", "y", "x"), ("bool",)),
}
_OPTIONAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "scl": (("time", "y", "x"), ("uint8",)),
    "observations": (("time", "y", "x"), ("uint8",)),
    "day_offset": (("time", "y", "x"), ("int8",)),
    "labels": (("y", "x"), ("uint8",)),
    "parcels": (("y", "x"), ("int32",)),
    "coverage": (("time", "chunk_y", "chunk_x"), ("uint16", "uint32")),
    "overview": (("time", "rgb", "overview_y", "overview_x"), ("uint8",)),
}


Layouts = Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]]
"""Dimensions and allowed dtypes of variables, by name."""


def check_variables(
    dataset: xr.Dataset, required: Layouts, optional: Layouts, *, what: str, writer: str
) -> list[str]:
    """Return what is wrong with the names, dimensions and dtypes of variables.

    Parameters
    ----------
    what, writer
        What the dataset is, "a cube", and the functions that write one, for the messages.
    """
    errors = [
        f"The variable '{name}' is missing: {what} has {' and '.join(required)}. "
        f"Write it with {writer}."
        for name in required
        if name not in dataset
    ]
    for name, (dims, dtypes) in {**required, **optional}.items():
        if name not in dataset:
            continue
        variable = dataset[name]
        if tuple(variable.dims) != dims:
            errors.append(
                f"'{name}' has the dimensions {tuple(variable.dims)}; they must be {dims}. "
                "Transpose it."
            )
        if variable.dtype.name not in dtypes:
            errors.append(
                f"'{name}' has the dtype {variable.dtype.name}; it must be {' or '.join(dtypes)}. "
                "Convert it."
            )
    return errors


def _check_coordinates(dataset: xr.Dataset, errors: list[str], warnings: list[str]) -> None:
    errors.extend(
        f"The coordinate '{name}' is missing. Assign it."
        for name in ("time", "band", "y", "x")
        if name not in dataset.coords
    )
    if "time" in dataset.coords:
        time = dataset["time"].to_numpy()
        if not np.issubdtype(time.dtype, np.datetime64):
            errors.append(f"'time' has the dtype {time.dtype}; it must be datetime64. Decode it.")
        elif time.size and not (np.diff(time.astype("int64")) > 0).all():
            errors.append("'time' must increase strictly. Sort it and merge repeated dates.")
    if "band" in dataset.coords:
        try:
            check_bands(tuple(str(band) for band in dataset["band"].to_numpy()))
        except CubeError as error:
            errors.append(str(error))
    for axis, sign in (("x", 1), ("y", -1)):
        if axis in dataset.coords and dataset[axis].size > 1:
            steps = np.diff(dataset[axis].to_numpy())
            if not np.allclose(steps, steps[0], rtol=1e-5) or np.sign(steps[0]) != sign:
                errors.append(
                    f"'{axis}' must {'increase' if sign > 0 else 'decrease'} in equal steps. "
                    "Resample to a regular north-up grid."
                )
    spatial_ref = dataset.coords.get("spatial_ref")
    if spatial_ref is None or "crs_wkt" not in spatial_ref.attrs:
        errors.append(
            "The coordinate 'spatial_ref' with the attribute 'crs_wkt' is missing: a cube has a "
            "CRS. Set it with rioxarray's rio.write_crs."
        )
    if "time" in dataset.coords and dataset.sizes.get("time", 0) > 1:
        gap = int(np.diff(dataset["time"].to_numpy()).max() / np.timedelta64(1, "D"))
        if gap > 45:
            warnings.append(f"The longest gap between dates is {gap} days.")


def _check_coverage(dataset: xr.Dataset, errors: list[str]) -> None:
    """Cubes of chunks of 256 px that early versions wrote count a clear chunk as 0."""
    if "coverage" not in dataset:
        return
    layout = dataset.attrs.get("layout") or {}
    chunk = layout.get("chunk", dataset["coverage"].attrs.get("chunk"))
    if chunk is None:
        return
    most = np.iinfo(dataset["coverage"].dtype).max
    if chunk * chunk > most:
        errors.append(
            f"'coverage' counts to {most}; a chunk of {chunk} x {chunk} px has more pixels, so "
            "that clear ones count as cloudy. Write the cube anew with cube rechunk."
        )


def _check_content(dataset: xr.Dataset, errors: list[str], warnings: list[str]) -> None:
    """Read one square in the middle: enough to find a wrong scale or an empty cube."""
    height, width = dataset.sizes["y"], dataset.sizes["x"]
    middle = {
        "y": slice(max(height // 2 - 16, 0), height // 2 + 16),
        "x": slice(max(width // 2 - 16, 0), width // 2 + 16),
    }
    valid = dataset["valid"].isel(middle).to_numpy()
    if "observations" in dataset:
        seen = dataset["observations"].isel(middle).to_numpy() > 0
        if (seen != valid).any():
            errors.append(
                f"'valid' and 'observations' disagree at {int((seen != valid).sum())} pixels in "
                "the middle: a composite is valid exactly where something clear was observed. "
                "Set valid to observations > 0."
            )
    if "day_offset" in dataset:
        known = dataset["day_offset"].isel(middle).to_numpy() != NO_DAY
        if (known != valid).any():
            errors.append(
                f"'valid' and 'day_offset' disagree at {int((known != valid).sum())} pixels in the "
                f"middle: a pixel has a day exactly where it is valid, else {NO_DAY}. Correct "
                "day_offset, or leave it out."
            )
    if not valid.any():
        warnings.append("No pixel in the middle of the grid is ever valid.")
        return
    values = dataset["reflectance"].isel(middle).to_numpy()
    usable = np.moveaxis(values, 1, -1)[valid]
    if values.dtype == np.int16:
        if (usable == FILL).any():
            errors.append(
                f"'valid' is True where 'reflectance' is {FILL} (no data). "
                "Set valid to False where any band is missing."
            )
        usable = usable.astype(np.float32) * np.float32(SCALE)
    elif np.isnan(usable).any():
        errors.append(
            "'valid' is True where 'reflectance' is NaN. "
            "Set valid to False where any band is missing."
        )
    median = float(np.nanmedian(usable))
    if not 0.0 < median < 1.2:
        warnings.append(
            f"The median reflectance in the middle is {median:.3g}; 0.01 to 0.6 is usual. "
            "Check scale and offset."
        )
