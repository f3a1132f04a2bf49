"""Write stacks: create one, write it by whole sites, give it its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import zarr

from .. import __version__
from ..errors import CubeError, InputError
from ..legend import Legend
from ..storage import (
    Location,
    S3Path,
    copy_file,
    copy_tree,
    list_files,
    location,
    make_folder,
    remove_tree,
    writing,
)
from .contract import FILL, SCALE, check_bands, days_since
from .layout import STANDARD_NAMES, block_sum, coverage_dtype, create_array
from .publish import recover_publications
from .stack import (
    NO_DAY,
    Stack,
    StackLayout,
    open_building_stack,
    open_stack_folder,
    plan_stack_layout,
)
from .stack_fields import label_stack
from .stack_radar import RadarAxis, create_radar
from .store import finish_season, quiet_zarr
from .zarr_store import zarr_store

__all__ = [
    "create_stack",
    "finish_stack",
    "take_back_stack",
    "write_sites",
    "write_stack_attributes",
]

_TABLE_ROWS = 1024
_MARK = "zarr.json"


def create_stack(
    path: str | Location,
    name: str,
    *,
    site_id: Sequence[str],
    crs: Sequence[str],
    transform: np.ndarray,
    shape_yx: tuple[int, int],
    time: np.ndarray,
    bands: Sequence[str],
    layout: StackLayout | None = None,
    days: np.ndarray | None = None,
    fold: np.ndarray | None = None,
    legend: Legend | None = None,
    with_parcels: bool = False,
    with_scl: bool = False,
    with_observations: bool = False,
    radar: RadarAxis | None = None,
    attrs: Mapping[str, Any] | None = None,
    date_attrs: Mapping[str, np.ndarray] | None = None,
    site_attrs: Mapping[str, np.ndarray] | None = None,
) -> Stack:
    """Create an empty stack under the name ``<name>.building``, ready for ``write_sites``.

    Parameters
    ----------
    name
        First day of the season, ``YYYY-MM-DD``.
    transform : (S, 6) float64, affine order, north-up with square pixels.
    time : (S, T) datetime64, UTC; the dates of a site increase strictly and end with NaT.
    days : (S, T) int32, by default counted from ``name``; for sites whose season began elsewhen.
    fold : (S,) small integers, if the sites belong to folds.
    legend
        Given, the stack has ``labels``; with ``with_parcels`` also ``parcels``.
    radar
        Given, the stack has ``backscatter`` with these times.
    attrs
        JSON values kept as attributes of the season. ``level`` among them tells ``surface``
        (the default) from ``top-of-atmosphere`` reflectance.
    date_attrs : (S, T) text or flags under each name, kept as coordinates.
    site_attrs : (S,) text or numbers under each name, kept as coordinates.

    Raises
    ------
    CubeError
        If sites, bands or times break the contract.
    OutputError
        If the folder cannot be written.
    """
    bands = tuple(str(band) for band in bands)
    check_bands(bands)
    time = np.asarray(time).astype("datetime64[s]")
    transform = np.asarray(transform, dtype=np.float64)
    _check_sites(name, site_id, crs, transform, time)
    sites, dates = time.shape
    layout = layout or plan_stack_layout(dates, len(bands), shape_yx)
    path = location(path)
    folder = path / f"{name}.building"
    if isinstance(path, S3Path):
        # What a writer was publishing when it was stopped lies under this name.
        recover_publications(path)
    with writing(path), quiet_zarr():
        make_folder(path)
        zarr.open_group(
            zarr_store(path), mode="a", zarr_format=3, attributes={"stcln_geo": __version__}
        )
        remove_tree(folder)
        group = zarr.create_group(zarr_store(folder), zarr_format=3)
        _create_arrays(
            group, layout, (sites, dates, len(bands), *shape_yx),
            level=str((attrs or {}).get("level", "surface")), scl=with_scl,
            observations=with_observations, labels=legend is not None,
            parcels=legend is not None and with_parcels,
        )  # fmt: skip
        elapsed = _days(time, name) if days is None else np.asarray(days, dtype=np.int32)
        columns: dict[str, np.ndarray] = {
            "site_id": np.asarray(list(site_id), dtype=np.dtypes.StringDType()),
            "crs": np.asarray(list(crs), dtype=np.dtypes.StringDType()),
            "footprint": _footprints(crs, transform, shape_yx),
            "transform": transform,
            "time": time.astype("int64"),
            "days": elapsed,
            **{key: np.asarray(values) for key, values in (date_attrs or {}).items()},
            **{key: np.asarray(values) for key, values in (site_attrs or {}).items()},
        }
        if fold is not None:
            columns["fold"] = np.asarray(fold, dtype=np.int8)
        for key, values in columns.items():
            _write_column(group, key, values, name)
        group.create_array(
            "band", data=np.asarray(bands, dtype=np.dtypes.StringDType()), chunks=(len(bands),),
            dimension_names=("band",),
        )  # fmt: skip
        radar_columns: tuple[str, ...] = ()
        if radar is not None:
            radar_columns = create_radar(
                group, radar, season=name, shape_yx=shape_yx, chunk=layout.chunk,
                sites_per_shard=layout.sites,
            )  # fmt: skip
        # Written last: a folder without them was left half-created.
        group.attrs.put(
            {
                **(attrs or {}),
                "kind": "stack",
                "Conventions": "CF-1.11",
                "coordinates": " ".join([*columns, *radar_columns]),
                "stcln_geo": __version__,
                "season": name,
                "bands": list(bands),
                "layout": {"chunk": layout.chunk, "sites": layout.sites},
                **({"legend": legend.to_json()} if legend is not None else {}),
            }
        )
    return open_stack_folder(path, name, folder.name, mode="r+")


def write_sites(
    stack: Stack,
    first: int,
    *,
    reflectance: np.ndarray,
    valid: np.ndarray,
    scl: np.ndarray | None = None,
    observations: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    parcels: np.ndarray | None = None,
    backscatter: np.ndarray | None = None,
) -> None:
    """Write one whole shard of a stack, with its coverage.

    Parameters
    ----------
    first
        Position of its first site, a multiple of the sites per shard.
    reflectance : (N, T, C, Y, X) int16.
    valid : (N, T, Y, X) bool, True where usable; False where the site has no such date.
    scl, observations : (N, T, Y, X) uint8, if the stack keeps them.
    labels, parcels : (N, Y, X) uint8 and int32, if the stack has them.
    backscatter : (N, T1, P, Y, X) float32 in decibels, if the stack has radar.
    """
    count = len(reflectance)
    if first % stack.layout.sites or count != min(stack.layout.sites, len(stack) - first):
        raise InputError(
            f"Cannot write {count} sites from site {first} as a shard: shards of this stack are "
            f"{stack.layout.sites} sites from its first, fewer only at its end. Write one whole "
            "shard at a time."
        )
    here = slice(first, first + count)
    height, width = stack.shape_yx
    sums = block_sum(valid.reshape(-1, height, width), stack.layout.chunk)
    with writing(stack.path):
        stack.reflectance[here] = reflectance
        stack.valid[here] = valid
        stack.coverage[here] = sums.reshape(*valid.shape[:2], *sums.shape[1:])
        for array, values in (
            (stack.scl, scl), (stack.observations, observations), (stack.labels, labels),
            (stack.parcels, parcels),
            (stack.radar.backscatter if stack.radar is not None else None, backscatter),
        ):  # fmt: skip
            if array is not None and values is not None:
                array[here] = values


def finish_stack(path: str | Location, name: str) -> None:
    """Give a wholly written stack its name: from now on it opens as complete.

    The fields of a stack with labels are counted first and stored in it (`label_stack`).

    Raises
    ------
    LabelError
        If labels or parcels break the contract.
    """
    built = open_building_stack(path, name)
    if built is not None and built.labels is not None:
        label_stack(built)
    finish_season(path, name)


def write_stack_attributes(stack: Stack, attrs: Mapping[str, Any]) -> None:
    """Add attributes, as JSON values, to an unfinished stack: what is known once it is written."""
    with writing(stack.path), quiet_zarr():
        group: Any = zarr.open_group(
            zarr_store(stack.path / stack.folder), mode="r+", use_consolidated=False
        )
        group.attrs.update(dict(attrs))


def take_back_stack(path: str | Location, name: str) -> None:
    """Make a whole stack an unfinished one again, so that shards of it can be written anew."""
    path = location(path)
    building = f"{name}.building"
    with writing(path):
        remove_tree(path / building)
        if not isinstance(path, S3Path):
            (path / name).rename(path / building)
            return
        # The mark is copied last and removed first: one of the two is whole at any moment.
        shards = [file for file in list_files(path / name) if file != _MARK]
        copy_tree(path / name, path / building, shards)
        copy_file(path / name / _MARK, path / building / _MARK)
        remove_tree(path / name)


def _check_sites(
    name: str,
    site_id: Sequence[str],
    crs: Sequence[str],
    transform: np.ndarray,
    time: np.ndarray,
) -> None:
    sites = len(site_id)
    if not sites or len(set(site_id)) != sites:
        raise CubeError(
            f"Cannot create the stack {name} of {sites} sites: there must be at least one, and "
            "each needs an id of its own. Make the ids unique."
        )
    if len(crs) != sites or transform.shape != (sites, 6) or time.shape[:1] != (sites,):
        raise CubeError(
            f"Cannot create the stack {name}: {sites} ids come with {len(crs)} CRS, transforms of "
            f"shape {transform.shape} and times of shape {time.shape}; they must be {sites}, "
            f"({sites}, 6) and ({sites}, dates). Give one of each per site."
        )
    absent = np.isnat(time)
    numbers = np.where(absent, np.iinfo(np.int64).max, time.astype("int64"))
    later = np.diff(numbers, axis=1)
    if time.shape[1] == 0 or absent[:, 0].any() or not ((later > 0) | absent[:, 1:]).all():
        raise CubeError(
            f"Cannot create the stack {name}: every site needs at least one date, its dates must "
            "increase strictly, and NaT may only follow the last. Sort them, and leave out sites "
            "without dates."
        )


def _create_arrays(
    group: Any,
    layout: StackLayout,
    shape: tuple[int, int, int, int, int],
    *,
    level: str,
    **wanted: bool,
) -> None:
    """Create the empty arrays; ``shape`` is sites, dates, bands, rows, columns."""
    sites, dates, bands, height, width = shape
    chunk, several = layout.chunk, min(layout.sites, sites)
    down, across = -(-height // chunk), -(-width // chunk)
    whole = (down * chunk, across * chunk)
    create_array(
        group, "reflectance", shape, (1, dates, bands, chunk, chunk),
        (several, dates, bands, *whole), dtype="int16", fill=FILL,
        dims=("site", "time", "band", "y", "x"),
        attrs={"scale_factor": SCALE, "add_offset": 0.0, "_FillValue": FILL,
               "standard_name": STANDARD_NAMES[level], "units": "1"},
    )  # fmt: skip
    dated = {"scl": "uint8", "observations": "uint8"}
    for name, dtype in {"valid": "bool", **dated}.items():
        if name == "valid" or wanted[name]:
            create_array(
                group, name, (sites, dates, height, width), (1, dates, chunk, chunk),
                (several, dates, *whole), dtype=dtype, fill=0, dims=("site", "time", "y", "x"),
            )  # fmt: skip
    create_array(
        group, "coverage", (sites, dates, down, across), (several, dates, down, across), None,
        dtype=coverage_dtype(chunk), fill=0, dims=("site", "time", "chunk_y", "chunk_x"),
        attrs={"units": "valid pixels per chunk"},
    )  # fmt: skip
    for name, dtype, fill in (("labels", "uint8", 255), ("parcels", "int32", 0)):
        if wanted[name]:
            create_array(
                group, name, (sites, height, width), (1, chunk, chunk), (several, *whole),
                dtype=dtype, fill=fill, dims=("site", "y", "x"),
            )  # fmt: skip


def _write_column(group: Any, name: str, values: np.ndarray, season: str) -> None:
    dims = {"transform": ("site", "affine")}.get(name, ("site", "time")[: values.ndim])
    attrs: dict[str, dict[str, Any]] = {
        "time": {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        "days": {"long_name": f"whole days elapsed after {season}; -1 where there is no date"},
        "transform": {
            "long_name": "a, b, c, d, e, f: x = a col + b row + c, y = d col + e row + f"
        },
        "footprint": {"long_name": "outline in OGC:CRS84, as WKT"},
    }
    if values.dtype.kind in "UO":
        values = values.astype(np.dtypes.StringDType())
    group.create_array(
        name,
        data=values,
        chunks=(min(len(values), _TABLE_ROWS), *values.shape[1:]),
        dimension_names=dims,
        attributes=attrs.get(name, {}),
    )


def _days(time: np.ndarray, season: str) -> np.ndarray:
    absent = np.isnat(time)
    return np.where(
        absent, NO_DAY, days_since(np.where(absent, np.datetime64(0, "s"), time), season)
    )


def _footprints(crs: Sequence[str], transform: np.ndarray, shape_yx: tuple[int, int]) -> np.ndarray:
    from affine import Affine
    from odc.geo.geobox import GeoBox

    from ..region import footprint

    outlines = [
        footprint(GeoBox(shape_yx, Affine(*map(float, values)), system)).wkt
        for system, values in zip(crs, transform, strict=True)
    ]
    return np.asarray(outlines, dtype=np.dtypes.StringDType())
