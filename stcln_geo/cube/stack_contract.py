"""The stack contract, and stacks as xarray datasets.

A stack's season is an ``xr.Dataset`` with the dimensions ``site``, ``time``, ``band``, ``y`` and
``x``:

- ``reflectance (site, time, band, y, x)`` int16, reflectance / 0.0001, -32768 where there is none;
- ``valid (site, time, y, x)`` bool, True where every band was measured and the sky is clear;
- ``time (site, time)`` datetime64, increasing per site, NaT after its last date, where ``valid`` is
  False; ``days`` likewise, whole days since the season's first, -1 after the last date;
- ``site_id``, ``crs``, ``footprint (site)`` text and ``transform (site, affine)``;
- ``coverage (site, time, chunk_y, chunk_x)`` uint16 or uint32, clear pixels per chunk;
- optional ``scl``, ``observations (site, time, y, x)`` uint8, and ``fold (site)``;
- optional ``labels (site, y, x)`` uint8, codes of the legend, 255 = unlabelled, and
  ``parcels (site, y, x)`` int32, the number of the field, 0 = none: numbers are unique over the
  stack, so that a field lies in one site. A stack with labels has one row a field (`stack_fields`):
  ``field_number``, ``field_code``, ``field_pixels``, ``field_split``, ``field_site (field)``; and
  ``site_weight (site)``, how often training shows each site;
- optional ``backscatter (site, time_s1, pol, y, x)`` float32 in decibels, NaN where there is none,
  with ``time_s1``, ``days_s1`` and ``orbit_s1 (site, time_s1)``: `stack_radar` tells more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import CubeError
from ..legend import Legend
from ..storage import Location, location
from .contract import FILL, SCALE, check_bands, check_variables
from .layout import block_sum
from .season import choose_season
from .stack import NO_DAY, is_stack
from .stack_radar import check_radar
from .zarr_store import zarr_store

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["stack_dataset", "validate_stack"]

_VARIABLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reflectance": (("site", "time", "band", "y", "x"), ("int16", "float32", "float64")),
    "valid": (("site", "time", "y", "x"), ("bool",)),
}
_OPTIONAL: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "coverage": (("site", "time", "chunk_y", "chunk_x"), ("uint16", "uint32")),
    "scl": (("site", "time", "y", "x"), ("uint8",)),
    "observations": (("site", "time", "y", "x"), ("uint8",)),
    "labels": (("site", "y", "x"), ("uint8",)),
    "parcels": (("site", "y", "x"), ("int32",)),
    "backscatter": (("site", "time_s1", "pol", "y", "x"), ("float32",)),
    "field_number": (("field",), ("int32",)),
    "field_code": (("field",), ("uint8",)),
    "field_pixels": (("field",), ("int32",)),
    "field_split": (("field",), ("uint8",)),
    "field_site": (("field",), ("int32",)),
    "site_weight": (("site",), ("uint16",)),
}
_COORDINATES: dict[str, tuple[str, ...]] = {
    "site_id": ("site",), "crs": ("site",), "transform": ("site", "affine"),
    "time": ("site", "time"), "days": ("site", "time"), "band": ("band",),
}  # fmt: skip
_LOOKED_AT = 5
"""Sites whose pixels are read."""


def stack_dataset(path: str | Location, season: str | None = None) -> xr.Dataset:
    """Open a season of a stack lazily, with its digital numbers; one Dask chunk per shard.

    Raises
    ------
    MissingFileError, CubeError
        If there is no such stack or season.
    """
    import xarray as xr

    name = choose_season(path, season)
    if not is_stack(path, name):
        raise CubeError(
            f"Cannot open season {name} of {path} as a stack: it is a cube. Open it with open_cube."
        )
    dataset: xr.Dataset = xr.open_zarr(
        zarr_store(location(path) / name),
        chunks=None,
        mask_and_scale=False,
        consolidated=False,
    )
    return dataset.chunk({"site": int(dataset.attrs["layout"]["sites"])})


def validate_stack(dataset: xr.Dataset) -> tuple[list[str], list[str]]:
    """Compare a dataset, raw or decoded, with the stack contract.

    Pixels are read of five sites, spread over the stack.

    Returns
    -------
    errors : what breaks the contract, each with the rule, the value and the remedy.
    warnings : what is allowed but deserves attention.
    """
    errors: list[str] = []
    warnings: list[str] = []
    errors += check_variables(
        dataset, _VARIABLES, _OPTIONAL, what="a stack", writer="create_stack and write_sites"
    )
    _check_coordinates(dataset, errors)
    check_radar(dataset, errors)
    if not errors:
        _check_table(dataset, errors)
    if not errors:
        for site in sorted({*np.linspace(0, dataset.sizes["site"] - 1, _LOOKED_AT, dtype=int)}):
            _check_site(dataset.isel(site=int(site)), int(site), errors, warnings)
    return errors, warnings


def _check_coordinates(dataset: xr.Dataset, errors: list[str]) -> None:
    for name, dims in _COORDINATES.items():
        if name not in dataset.coords:
            errors.append(f"The coordinate '{name}' is missing. Assign it.")
        elif tuple(dataset[name].dims) != dims:
            errors.append(
                f"The coordinate '{name}' has the dimensions {tuple(dataset[name].dims)}; they "
                f"must be {dims}. Transpose it."
            )


def _check_table(dataset: xr.Dataset, errors: list[str]) -> None:
    """Check what each site is, and when it was seen."""
    from pyproj import CRS
    from pyproj.exceptions import CRSError

    ids = [str(value) for value in dataset["site_id"].to_numpy()]
    if len(set(ids)) != len(ids):
        errors.append("'site_id' has a value more than once. Give every site an id of its own.")
    for text in sorted({str(value) for value in dataset["crs"].to_numpy()}):
        try:
            CRS(text)
        except CRSError:
            errors.append(f"'crs' holds {text!r}, which is not known. Use codes as EPSG:32631.")
    a, b, _, d, e, _ = np.moveaxis(dataset["transform"].to_numpy(), -1, 0)
    if (b != 0).any() or (d != 0).any() or (a <= 0).any() or not np.allclose(a, -e):
        errors.append(
            "'transform' holds a grid that is not north-up with square pixels. Resample the site."
        )
    try:
        check_bands(tuple(str(band) for band in dataset["band"].to_numpy()))
    except CubeError as error:
        errors.append(str(error))
    time = dataset["time"].to_numpy()
    if not np.issubdtype(time.dtype, np.datetime64):
        errors.append(f"'time' has the dtype {time.dtype}; it must be datetime64. Decode it.")
        return
    absent = np.isnat(time)
    later = np.diff(time.astype("int64"), axis=1) > 0
    # NaT is the least of all numbers, so a date after NaT would seem to be later.
    if (absent[:, :-1] & ~absent[:, 1:]).any() or not (later | absent[:, 1:]).all():
        errors.append(
            "'time' must increase strictly within a site, with NaT only after its last date. Sort "
            "it and merge repeated dates."
        )
    if absent.all(axis=1).any():
        site = ids[int(np.flatnonzero(absent.all(axis=1))[0])]
        errors.append(f"Site {site!r} has no date. Leave such sites out.")
    if ((dataset["days"].to_numpy() == NO_DAY) != absent).any():
        errors.append(f"'days' must be {NO_DAY} exactly where 'time' is NaT. Count them anew.")


def _check_site(dataset: xr.Dataset, position: int, errors: list[str], warnings: list[str]) -> None:
    """Read one site: enough to find a wrong scale, or dates that do not exist but are valid."""
    name = str(dataset["site_id"].to_numpy())
    valid = dataset["valid"].to_numpy()
    if valid[np.isnat(dataset["time"].to_numpy())].any():
        errors.append(
            f"'valid' of site {name!r} is True on a date that does not exist (time is NaT). Set it "
            "to False there."
        )
    values = dataset["reflectance"].to_numpy()
    usable = np.moveaxis(values, 1, -1)[valid]
    missing = usable == FILL if values.dtype == np.int16 else np.isnan(usable)
    if missing.any():
        errors.append(
            f"'valid' of site {name!r} is True where 'reflectance' is missing. Set it to False "
            "where any band is missing."
        )
    if "coverage" in dataset and "layout" in dataset.attrs:
        counted = block_sum(valid, int(dataset.attrs["layout"]["chunk"]))
        if not np.array_equal(counted, dataset["coverage"].to_numpy()):
            errors.append(
                f"'coverage' of site {name!r} (position {position}) does not count its valid "
                "pixels: the shard was not written whole. Build it again."
            )
    if "labels" in dataset and "field_site" in dataset and "legend" in dataset.attrs:
        learnt = len(Legend.from_json(dataset.attrs["legend"]))
        labelled = int((dataset["labels"].to_numpy() < learnt).sum())
        mine = dataset["field_site"].to_numpy() == position
        told = int(dataset["field_pixels"].to_numpy()[mine].sum())
        if told != labelled:
            errors.append(
                f"The fields of site {name!r} have {told} pixels, and 'labels' {labelled}: the "
                "labels were written after their fields were counted. Run label_stack again."
            )
    if not valid.any():
        warnings.append(f"No pixel of site {name!r} is ever valid.")
        return
    median = float(np.nanmedian(usable)) * (SCALE if values.dtype == np.int16 else 1.0)
    if not 0.0 < median < 1.2:
        warnings.append(
            f"The median reflectance of site {name!r} is {median:.3g}; 0.01 to 0.6 is usual. "
            "Check scale and offset."
        )
