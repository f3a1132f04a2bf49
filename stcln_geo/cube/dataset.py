"""Cubes as xarray datasets: open them lazily, and make a cube of any dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..errors import CubeError
from ..grid import Lattice, Window, absolute_window, snapped_geobox
from ..storage import Location, location, remove_tree, writing
from .contract import FILL, SCALE, SCL_CLEAR, season_name
from .foreign import ForeignDataset, Numbers, understand
from .layout import STANDARD_NAMES
from .lock import cube_lock
from .season import unchanged
from .store import (
    Layout,
    choose_season,
    create_season,
    finish_season,
    list_seasons,
    open_season,
    shards_of,
    write_shard,
)
from .zarr_store import zarr_store

if TYPE_CHECKING:
    import xarray as xr
    from odc.geo.geobox import GeoBox

    from ..execution import ProgressHook

__all__ = ["open_cube", "write_cube"]

_MOST = 32767
_SCL_CLASSES = 12


def open_cube(
    path: str | Location,
    season: str | None = None,
    *,
    mask_and_scale: bool = True,
    chunks: str | None = "auto",
) -> xr.Dataset:
    """Open a cube lazily: one season, or all of them along time.

    What holds only of the whole group in this store (chunks, codec, the attributes of GeoZarr) is
    left out, so that the dataset, or a part of it, can be written anywhere; ``xr.open_zarr`` of a
    season keeps it.

    Parameters
    ----------
    season
        First day of a season, ``YYYY-MM-DD``; by default all seasons, concatenated in time.
        What belongs to one season (labels, parcels, fields) is left out when there are several,
        and so is what some of them lack or keep in another form (``scl``, ``coverage``).
    mask_and_scale
        Decode ``reflectance`` to float32 with NaN where nothing was measured; else keep the
        int16 digital numbers.
    chunks
        "auto" for Dask arrays of whole shards; None for arrays without Dask.

    Raises
    ------
    MissingFileError, CubeError
        If there is no such cube or season.
    """
    import xarray as xr

    path = location(path)
    names = list_seasons(path) if season is None else []
    if len(names) < 2:
        return _open_one(path, choose_season(path, season), mask_and_scale, chunks)
    parts = [_open_one(path, name, mask_and_scale, chunks) for name in names]
    dropped = _of_one_season(parts)
    whole: xr.Dataset = xr.concat(
        [part.drop_vars(dropped, errors="ignore") for part in parts],
        dim="time",
        data_vars="minimal",
        coords="minimal",
        compat="override",
        join="exact",
        combine_attrs="drop_conflicts",
    )
    return whole


def _of_one_season(parts: Sequence[xr.Dataset]) -> list[str]:
    """Return the variables that do not go on along time: of one season, or of another form."""
    forms = [
        {str(name): _form(variable) for name, variable in part.variables.items()} for part in parts
    ]
    shared = {
        name for name, form in forms[0].items() if all(other.get(name) == form for other in forms)
    }
    kept = {"band", "y", "x", "spatial_ref"}
    shared = {name for name in shared if name in kept or "time" in parts[0][name].dims}
    return sorted({name for form in forms for name in form} - shared)


def _form(variable: xr.Variable) -> tuple[Any, ...]:
    """Return what seasons must have alike: dimensions, sizes but for time, pixels of a chunk."""
    sizes = {dim: size for dim, size in variable.sizes.items() if dim != "time"}
    return variable.dims, sizes, variable.attrs.get("chunk")


def _open_one(path: Location, name: str, mask_and_scale: bool, chunks: str | None) -> xr.Dataset:
    import xarray as xr

    with unchanged(path, name):
        dataset: xr.Dataset = xr.open_zarr(
            zarr_store(path / name), chunks=None, mask_and_scale=False, consolidated=False
        )
    layout = dataset.attrs.get("layout", {})
    if dataset.attrs.get("kind") == "stack":
        raise CubeError(
            f"Cannot open season {name} of {path} as a cube: it is a stack of many sites. Open it "
            "with stcln_geo.cube.stack.open_stack, or with xarray.open_zarr."
        )
    if "shard" not in layout:
        raise CubeError(
            f"Cannot open season {name} of {path}: it has no layout of chunks and shards, so "
            "stcln-geo did not write it. Open it with xarray.open_zarr, and make a cube of it with "
            "write_cube."
        )
    _forget_store(dataset, int(layout["chunk"]))
    if chunks is not None:
        shard = int(layout["shard"])
        # One Dask chunk per shard: the unit that is stored and fetched as one file.
        small = {"overview_y": -1, "overview_x": -1, "chunk_y": -1, "chunk_x": -1, "rgb": -1}
        sizes = {"time": -1, "band": -1, "y": shard, "x": shard, **small}
        dataset = dataset.chunk({dim: size for dim, size in sizes.items() if dim in dataset.dims})
    if mask_and_scale:
        raw = dataset["reflectance"]
        decoded = (raw.astype("float32") * np.float32(SCALE)).where(raw != FILL)
        encoded = ("scale_factor", "add_offset", "_FillValue")
        decoded.attrs = {key: value for key, value in raw.attrs.items() if key not in encoded}
        dataset["reflectance"] = decoded
    return dataset


_OF_THE_STORE = ("layout", "lattice", "zarr_conventions")
"""Attributes that hold of a season as it is stored, as do those of ``spatial:``."""


def _forget_store(dataset: xr.Dataset, chunk: int) -> None:
    """Leave out what would be wrong of a part of a season, or could not be written elsewhere."""
    from shapely.geometry import shape

    for variable in dataset.variables.values():
        variable.encoding = {
            key: value for key, value in variable.encoding.items() if key in ("units", "calendar")
        }
    if "coverage" in dataset:
        dataset["coverage"].attrs["chunk"] = chunk
    kept = {
        key: value
        for key, value in dataset.attrs.items()
        if key not in _OF_THE_STORE and not key.startswith("spatial:") and value is not None
    }
    for key, value in kept.items():
        if key == "aoi":
            kept[key] = shape(value).wkt
        elif isinstance(value, bool):
            kept[key] = int(value)
        elif isinstance(value, dict):
            kept[key] = json.dumps(value)
    dataset.attrs = kept


def write_cube(
    dataset: xr.Dataset | xr.DataArray,
    path: str | Location,
    *,
    bands: Mapping[str, str] | None = None,
    scale: float | None = None,
    offset: float | None = None,
    nodata: float | None = None,
    level: Literal["surface", "top-of-atmosphere"] = "surface",
    season_start: str = "09-01",
    lattice: Lattice | None = None,
    layout: Layout | None = None,
    overwrite: bool = False,
    progress: ProgressHook | None = None,
) -> Location:
    """Make a cube of any dataset with a CRS and a time axis.

    The dataset holds either ``reflectance (time, band, y, x)`` or one variable
    ``(time, y, x)`` per band. Optional: ``valid`` (bool, True = usable) and ``scl`` (or
    ``SCL``). An array with a dimension ``band`` of names, as stackstac gives, does as well. It is
    padded with no data to whole windows of the lattice and split into seasons.

    Parameters
    ----------
    bands
        Names in the dataset to common band names, such as ``{"B04": "red"}``; by default the
        variables that bear a common band name.
    scale, offset
        ``reflectance = value * scale + offset``. By default the ``scale_factor`` and
        ``add_offset`` that each band declares; a scale that is given takes the place of both.
        Integers without a scale, or with that of 1 which rioxarray gives to every file, are
        reflectance times 10,000 once their own offset is added; floats are reflectance.
    nodata
        Value that means no measurement; by default each band's ``_FillValue``, ``nodata`` and
        ``missing_value``; NaN always means it.
    level
        What the reflectance is: of the surface, as Level-2A products have it, or at the top of the
        atmosphere, as Level-1C.
    season_start
        First day of the seasons, ``MM-DD``.
    overwrite
        Replace seasons that the cube has already.

    Raises
    ------
    CubeError
        If bands, CRS, time, grid or level are missing or unusable, a season exists already,
        another one has other bands or another grid, or another process is writing the cube.
    OutputError
        If the folder cannot be written.
    """
    lattice = lattice or Lattice()
    path = location(path)
    if level not in STANDARD_NAMES:
        raise CubeError(
            f"Cannot make a cube of level={level!r}: it must be one of {', '.join(STANDARD_NAMES)}."
        )
    source = understand(dataset, bands, scale, offset, nodata)
    names = np.asarray([season_name(time, season_start) for time in source.time])
    with cube_lock(path):
        _write_seasons(
            source, path, names, lattice, layout, level,
            overwrite=overwrite, progress=progress,
        )  # fmt: skip
    return path


def _write_seasons(
    source: ForeignDataset,
    path: Location,
    names: np.ndarray,
    lattice: Lattice,
    layout: Layout | None,
    level: str,
    *,
    overwrite: bool,
    progress: ProgressHook | None,
) -> None:
    """Write the dates season by season, by the name of each date's season."""
    seasons = sorted(set(names.tolist()))
    existing = set(list_seasons(path)) if (path / "zarr.json").is_file() else set()
    if existing & set(seasons) and not overwrite:
        raise CubeError(
            f"Cannot write the cube {path}: it has the seasons {sorted(existing & set(seasons))} "
            "already, and write_cube never overwrites unasked. Choose another path, or pass "
            "overwrite=True."
        )
    if overwrite and path.is_dir() and not (path / "zarr.json").is_file() and any(path.iterdir()):
        raise CubeError(
            f"Cannot overwrite {path}: the folder is not a cube. Choose another path, or empty it."
        )
    for name in sorted(existing - set(seasons)):
        _check_same_grid(source, path, name, lattice)
    for done, name in enumerate(seasons):
        dates = np.flatnonzero(names == name)
        _write_season(source, path, name, dates, lattice, layout, level)
        if progress is not None:
            progress(done + 1, len(seasons), "seasons")


def _season_geobox(source: ForeignDataset, lattice: Lattice) -> GeoBox:
    """Return the grid of a cube of the dataset: padded to whole windows of the lattice."""
    from shapely.geometry import box

    return snapped_geobox(
        box(*source.geobox.boundingbox.bbox),
        crs=source.geobox.crs,
        resolution=float(source.geobox.affine.a),
        lattice=lattice,
    )


def _check_same_grid(source: ForeignDataset, path: Location, name: str, lattice: Lattice) -> None:
    """Refuse what would not lie beside a season that stays."""
    season, geobox = open_season(path, name), _season_geobox(source, lattice)
    if season.geobox == geobox and season.bands == source.bands:
        return
    raise CubeError(
        f"Cannot write a season into {path}: it would have the bands {', '.join(source.bands)} on "
        f"{_grid_text(geobox)}, and season {name} has {', '.join(season.bands)} on "
        f"{_grid_text(season.geobox)}. The seasons of a cube share bands and grid. Choose another "
        "path, or bring the dataset to that grid and those bands."
    )


def _grid_text(geobox: GeoBox) -> str:
    box, crs = geobox.boundingbox, geobox.crs
    code = f"EPSG:{crs.epsg}" if crs is not None and crs.epsg else str(crs)[:60]
    return (
        f"{geobox.shape[1]} x {geobox.shape[0]} px of {geobox.affine.a:g} m in {code} from x "
        f"{box.left:.10g}, y {box.top:.10g}"
    )


def _write_season(
    source: ForeignDataset,
    path: Location,
    name: str,
    dates: np.ndarray,
    lattice: Lattice,
    layout: Layout | None,
    level: str,
) -> None:
    from shapely.geometry import box

    season = create_season(
        path,
        name,
        geobox=_season_geobox(source, lattice),
        time=source.time[dates],
        bands=source.bands,
        aoi=box(*source.geobox.boundingbox.bbox),
        layout=layout,
        lattice=lattice,
        with_scl=source.scl is not None,
        attrs={"source": "write_cube", "level": level},
    )
    try:
        place = absolute_window(source.geobox).relative_to(season.window)
        beyond = count = 0
        for shard in shards_of(season):
            more = _write_one(source, season, shard, place, dates)
            beyond, count = beyond + more[0], count + more[1]
        # The sample that the scale was judged by may have lain where nothing was measured.
        if beyond * 2 > count:
            raise CubeError(
                f"Cannot take the numbers of season {name} as reflectance: {beyond} of {count} are "
                "above 3.2, and reflectance is about 0 to 1. Pass scale=0.0001 if these are "
                "digital numbers."
            )
    except BaseException:
        with writing(path):
            remove_tree(path / f"{name}.building")
        raise
    finish_season(path, name)


def _write_one(
    source: ForeignDataset, season: Any, shard: Window, place: Window, dates: np.ndarray
) -> tuple[int, int]:
    """Read what the source has of a shard, harmonise it, write the shard.

    Returns how many numbers that were taken as reflectance were too large for it, and of how many.
    """
    beyond, count = 0, 0
    shape = (len(dates), *shard.shape_yx)
    reflectance = np.full((len(dates), len(source.bands), *shard.shape_yx), FILL, dtype=np.int16)
    valid = np.zeros(shape, dtype=bool)
    scl = None if source.scl is None else np.zeros(shape, dtype=np.uint8)
    shared = shard.intersection(place)
    if not shared.is_empty:
        read, put = shared.relative_to(place), shared.relative_to(shard)
        pick = {"time": dates, "y": read.rows, "x": read.cols}
        usable = np.ones((len(dates), *shared.shape_yx), dtype=bool)
        for index, band in enumerate(source.bands):
            values, numbers = source.planes[band].isel(pick).to_numpy(), source.numbers[band]
            digital, measured, good = _harmonise(values, numbers)
            reflectance[:, index, put.rows, put.cols] = digital
            usable &= good
            if numbers.assumed:
                count += measured.sum()
                beyond += (measured & (digital == _MOST)).sum()
        if source.valid is not None:
            usable &= source.valid.isel(pick).to_numpy().astype(bool)
        if source.scl is not None and scl is not None:
            classes = source.scl.isel(pick).to_numpy()
            known = np.isin(classes, range(_SCL_CLASSES))
            scl[:, put.rows, put.cols] = np.where(known, classes, 0)
            usable &= np.isin(classes, SCL_CLEAR)
        valid[:, put.rows, put.cols] = usable
    write_shard(season, shard, reflectance=reflectance, valid=valid, scl=scl)
    return int(beyond), int(count)


def _harmonise(values: np.ndarray, numbers: Numbers) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return digital numbers (int16, -32768 = no data), where measured, where usable (bool)."""
    measured = (
        np.isfinite(values) if values.dtype.kind == "f" else np.ones(values.shape, dtype=bool)
    )
    for fill in numbers.nodata:
        measured &= values != fill
    digital = values.astype(np.float64) * (numbers.scale / SCALE) + numbers.offset / SCALE
    digital = np.rint(np.where(measured, digital, 0.0))
    usable = measured & (digital <= _MOST) & (digital > FILL)
    clipped = np.clip(digital, FILL + 1, _MOST).astype(np.int16)
    return np.where(measured, clipped, np.int16(FILL)), measured, usable
