"""A dataset of others, understood as bands on a grid: what `write_cube` makes a cube of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CubeError
from ..grid import absolute_window
from .contract import BANDS, SCALE

if TYPE_CHECKING:
    import xarray as xr
    from odc.geo.geobox import GeoBox

__all__ = ["ForeignDataset", "Numbers", "understand"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbers:
    """What the numbers of one band mean: ``reflectance = value * scale + offset``."""

    scale: float
    offset: float
    nodata: tuple[float, ...]
    """Values that mean no measurement, besides NaN."""
    assumed: bool
    """True where nothing says the scale, and floats are taken as reflectance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignDataset:
    """A foreign dataset, understood: one variable per band on a north-up grid."""

    bands: tuple[str, ...]
    planes: Mapping[str, xr.DataArray]
    numbers: Mapping[str, Numbers]
    """By band: files of different bands may differ in scale and fill value."""
    valid: xr.DataArray | None
    scl: xr.DataArray | None
    geobox: GeoBox
    time: np.ndarray


def understand(
    dataset: xr.Dataset | xr.DataArray,
    bands: Mapping[str, str] | None,
    scale: float | None,
    offset: float | None,
    nodata: float | None,
) -> ForeignDataset:
    """Find bands, CRS, grid and time in a foreign dataset.

    For parameters see ``write_cube``.

    Raises
    ------
    CubeError
        If one of them is missing or unusable.
    """
    dataset = _as_dataset(dataset)
    crs = _crs_of(dataset)
    dataset = _with_standard_dims(dataset)
    planes = _planes(dataset, bands)
    names = tuple(sorted(planes, key=BANDS.index))
    return ForeignDataset(
        bands=names,
        planes=planes,
        numbers={name: _numbers_of(planes[name], scale, offset, nodata) for name in names},
        valid=_valid_of(dataset),
        scl=_layer(dataset, "scl"),
        geobox=_geobox_of(dataset, crs),
        time=_time_of(dataset),
    )


def _as_dataset(data: xr.Dataset | xr.DataArray) -> xr.Dataset:
    """Return an array of several bands as a dataset with one variable per band."""
    import xarray as xr

    if isinstance(data, xr.Dataset):
        return data
    if not isinstance(data, xr.DataArray):
        raise CubeError(
            f"Cannot make a cube of a {type(data).__name__}: an xarray.Dataset is needed, or an "
            "xarray.DataArray with the dimensions time, band, y, x. Open the file with xarray, for "
            "example with xarray.open_dataset(path)."
        )
    dims = [name for name in ("band", "bands") if name in data.coords and name in data.dims]
    if not dims:
        raise CubeError(
            f"Cannot make a cube of an array with the dimensions {tuple(map(str, data.dims))}: its "
            "bands have no names. Give it a dimension 'band' with a coordinate of names, or make a "
            "dataset of it, for example with array.to_dataset(name='red')."
        )
    _check_once(data, dims[0])
    return data.to_dataset(dim=dims[0])


def _check_once(data: xr.DataArray, dim: str) -> None:
    """Refuse bands of one name."""
    if not data.get_index(dim).is_unique:
        raise CubeError(
            "Cannot name the bands of the dataset: they are "
            f"{', '.join(map(str, data[dim].to_numpy()))}, and each must occur once. Drop repeated "
            "bands."
        )


def _numbers_of(
    plane: xr.DataArray, scale: float | None, offset: float | None, nodata: float | None
) -> Numbers:
    """Return what is given of a band's numbers, else what its variable declares."""
    declared, added = _declared(plane, "scale_factor", 1.0), _declared(plane, "add_offset", 0.0)
    assumed = scale is None and declared == 1.0 and plane.dtype.kind == "f"
    if scale is not None:
        added = 0.0
    elif declared == 1.0:
        scale = _default_scale(plane)
        added *= scale
    else:
        scale = declared
    fills = _fills_of(plane) if nodata is None else (nodata,)
    return Numbers(
        scale=float(scale),
        offset=float(added if offset is None else offset),
        nodata=tuple(float(fill) for fill in fills if np.isfinite(fill)),
        assumed=assumed,
    )


def _fills_of(variable: xr.DataArray) -> tuple[float, ...]:
    """Return the values that a variable declares to mean nothing."""
    told = (variable.attrs.get(key) for key in ("_FillValue", "nodata", "missing_value"))
    return tuple(float(fill) for fill in told if fill is not None)


def _time_of(dataset: xr.Dataset) -> np.ndarray:
    """Return the times, (T,) datetime64[s], UTC."""
    found = dataset["time"].to_numpy()
    # Numbers would be taken for seconds since 1970.
    wrong: object = found.dtype if found.dtype.kind not in "MOUST" else None
    if wrong is None:
        try:
            time: np.ndarray = found.astype("datetime64[s]")
        except (TypeError, ValueError) as error:
            wrong = error
    if wrong is not None:
        raise CubeError(
            f"Cannot read the times of the dataset ({wrong}): they must be dates. Decode them, for "
            "example with xarray.decode_cf, or assign datetime64 values to 'time'."
        )
    if time.size == 0 or np.isnat(time).any() or not (np.diff(time.astype("int64")) > 0).all():
        raise CubeError(
            f"Cannot make a cube of {time.size} times: they must be at least one, without gaps "
            "(NaT), and increase strictly. Sort the dataset by time and merge repeated dates."
        )
    return time


def _valid_of(dataset: xr.Dataset) -> xr.DataArray | None:
    """Return where a dataset says that it is usable, with False where it says nothing."""
    valid = _layer(dataset, "valid")
    if valid is None:
        return None
    # What a join left open is NaN, and a fill value is a number: both would count as True.
    for fill in _fills_of(valid):
        valid = valid.where(valid != fill, 0)
    return valid.fillna(False)


def _layer(dataset: xr.Dataset, name: str) -> xr.DataArray | None:
    """Return a variable of every date and pixel, if it is there."""
    found = dataset.get(name)
    if found is None:
        return None
    if set(found.dims) != {"time", "y", "x"}:
        raise CubeError(
            f"Cannot use '{name}' with the dimensions {tuple(map(str, found.dims))}: it must have "
            "time, y, x. Broadcast it over them, or leave it out."
        )
    return found.transpose("time", "y", "x")


def _declared(plane: xr.DataArray, name: str, default: float) -> float:
    """Return what a variable of integers says of its numbers; floats have been decoded."""
    found = plane.attrs.get(name, plane.encoding.get(name, default))
    return default if plane.dtype.kind == "f" else float(found)


def _default_scale(plane: xr.DataArray) -> float:
    if plane.dtype.kind != "f":
        return SCALE
    sample = plane.isel(time=slice(0, 4), y=slice(0, 64), x=slice(0, 64)).to_numpy()
    finite = sample[np.isfinite(sample)]
    if finite.size and float(np.median(finite)) > 2.0:
        raise CubeError(
            f"Cannot take {plane.name!r} as reflectance: its median is {np.median(finite):.4g}, "
            "and reflectance is about 0 to 1. Pass scale=0.0001 if these are digital numbers."
        )
    return 1.0


def _crs_of(dataset: xr.Dataset) -> Any:
    """Return the CRS from rioxarray's accessor or from a CF grid-mapping variable."""
    import rioxarray  # noqa: F401 -- registers the accessor
    from pyproj import CRS

    found = dataset.rio.crs
    if found is None:
        for variable in dataset.variables.values():
            wkt = variable.attrs.get("crs_wkt") or variable.attrs.get("spatial_ref")
            if wkt:
                found = CRS.from_user_input(str(wkt))
                break
    if found is None:
        raise CubeError(
            "Cannot make a cube of a dataset without a CRS: neither rioxarray nor a grid-mapping "
            "variable names one. Set it, for example with dataset.rio.write_crs('EPSG:32631')."
        )
    known = CRS.from_user_input(found.to_wkt())
    if not known.is_projected or known.axis_info[0].unit_conversion_factor != 1.0:
        raise CubeError(
            f"Cannot make a cube of a dataset in {known.name}: a cube needs a projected CRS in "
            "metres, so that pixels are squares of a known area. Reproject it, for example with "
            "dataset.rio.reproject(dataset.rio.estimate_utm_crs(), resolution=10)."
        )
    return found


def _with_standard_dims(dataset: xr.Dataset) -> xr.Dataset:
    aliases = {
        "t": "time",
        "latitude": "y",
        "longitude": "x",
        "lat": "y",
        "lon": "x",
        "bands": "band",
    }
    renamed = {
        old: new for old, new in aliases.items() if old in dataset.dims and new not in dataset.dims
    }
    if "SCL" in dataset and "scl" not in dataset:
        # As some catalogs call the scene classes.
        renamed["SCL"] = "scl"
    dataset = dataset.rename(renamed)
    missing = [name for name in ("time", "y", "x") if name not in dataset.coords]
    if missing:
        raise CubeError(
            f"Cannot make a cube of a dataset with the coordinates "
            f"{sorted(map(str, dataset.coords))}: {', '.join(missing)} is missing. "
            "Rename or assign the coordinates time, y, x."
        )
    if dataset["y"].size > 1 and float(dataset["y"][1]) > float(dataset["y"][0]):
        dataset = dataset.isel(y=slice(None, None, -1))
    return dataset


def _planes(dataset: xr.Dataset, bands: Mapping[str, str] | None) -> dict[str, xr.DataArray]:
    """Return one (time, y, x) array per band, by common name."""
    rename = dict(bands or {})
    if "reflectance" in dataset and "band" in dataset["reflectance"].dims:
        stack = dataset["reflectance"]
        _check_once(stack, "band")
        sources = {str(name): stack.sel(band=name) for name in stack["band"].to_numpy()}
    else:
        sources = {
            str(name): array
            for name, array in dataset.data_vars.items()
            if {"time", "y", "x"} == set(array.dims)
        }
    missing = [name for name in rename if name not in sources]
    if missing:
        raise CubeError(
            f"Cannot find the bands {missing}: the dataset has {sorted(sources)}. "
            "Correct the names in 'bands'."
        )
    if len(set(rename.values())) < len(rename):
        raise CubeError(
            f"Cannot name the bands of the dataset by {rename}: each common name must stand for "
            "one variable. Correct the names in 'bands'."
        )
    named = {rename.get(name, name): array for name, array in sources.items()
             if name in rename or (bands is None and name in BANDS)}  # fmt: skip
    unknown = [name for name in named if name not in BANDS]
    if unknown or not named:
        raise CubeError(
            f"Cannot name the bands of the dataset: it has {sorted(sources)}"
            + (f" and {unknown} are not common band names" if unknown else "")
            + f". Pass bands={{'name in the dataset': 'common name'}} with names among "
            f"{', '.join(BANDS)}."
        )
    return {name: array.transpose("time", "y", "x") for name, array in named.items()}


def _geobox_of(dataset: xr.Dataset, crs: Any) -> GeoBox:
    from affine import Affine
    from odc.geo.geobox import GeoBox

    y, x = dataset["y"].to_numpy(), dataset["x"].to_numpy()
    if y.size < 2 or x.size < 2:
        raise CubeError(
            f"Cannot make a cube of {y.size} x {x.size} pixels: at least 2 x 2 are needed to know "
            "the pixel size. Give a larger dataset."
        )
    steps = np.concatenate([np.diff(x), -np.diff(y)])
    resolution = float(round(float(np.median(steps)), 9))
    if not np.allclose(steps, resolution, rtol=1e-3):
        raise CubeError(
            f"Cannot use a grid with steps from {steps.min():.6g} to {steps.max():.6g}: pixels "
            "must be square and regular. Resample it, for example with rioxarray's reproject."
        )
    left, top = float(x[0]), float(y[0])
    if not _names_corners(dataset, left, top, resolution):
        left, top = left - resolution / 2, top + resolution / 2
    affine = Affine(resolution, 0.0, left, 0.0, -resolution, top)
    geobox = GeoBox((y.size, x.size), affine, str(crs.to_wkt()))
    absolute_window(geobox)
    return geobox


def _names_corners(dataset: xr.Dataset, x: float, y: float, resolution: float) -> bool:
    """Return True where coordinates are those of north-west corners, by the declared transform.

    stackstac names corners by default. A part of a dataset keeps the transform of the whole, so
    only the place of coordinates between the borders of pixels counts.
    """
    arrays = (dataset, *dataset.data_vars.values())
    for transform in (array.attrs.get("transform") for array in arrays):
        if transform is None or len(transform) < 6:
            continue
        step, _, left, _, step_down, top = (float(value) for value in transform[:6])
        if np.isclose([step, -step_down], resolution).all():
            pixels = np.array([x - left, y - top]) / resolution
            return bool(np.allclose(pixels, np.rint(pixels), atol=1e-3))
    return False
