"""Write cubes: create a season, write it shard by shard, give it its name, label it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import zarr

from .. import __version__
from ..errors import CubeError, InputError
from ..grid import Lattice, Window, absolute_window
from ..legend import UNLABELLED, Legend
from ..storage import (
    Location,
    S3Path,
    location,
    make_folder,
    remove_tree,
    write_file,
    writing,
)
from .contract import OVERVIEW_STEP, check_bands, flag_attributes
from .layout import (
    Layout,
    block_sum,
    create_array,
    create_arrays,
    geozarr_attrs,
    overview_of,
    plan_layout,
    write_coordinates,
)
from .publish import publish_season, recover_publications
from .season import (
    FieldTable,
    Season,
    choose_season,
    list_seasons,
    open_building,
    open_folder,
    open_season,
    shards_of,
)
from .zarr_store import zarr_store

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

__all__ = [
    "FieldTable",
    "Layout",
    "Raster",
    "Season",
    "choose_season",
    "create_season",
    "finish_season",
    "list_seasons",
    "open_building",
    "open_season",
    "plan_layout",
    "quiet_zarr",
    "shards_of",
    "write_date_flags",
    "write_fields",
    "write_json",
    "write_shard",
    "write_split",
    "writing",
]


class Raster(Protocol):
    """A raster that gives whole rows: a numpy or Zarr array, or one that makes them on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""

    @property
    def dtype(self) -> Any:
        """Type of the values."""

    def __getitem__(self, rows: slice, /) -> Any:
        """Return rows, (rows, X)."""


def create_season(
    path: str | Location,
    name: str,
    *,
    geobox: GeoBox,
    time: np.ndarray,
    bands: Sequence[str],
    aoi: BaseGeometry,
    layout: Layout | None = None,
    lattice: Lattice | None = None,
    with_scl: bool = False,
    with_observations: bool = False,
    attrs: Mapping[str, Any] | None = None,
    date_attrs: Mapping[str, Sequence[Any]] | None = None,
) -> Season:
    """Create an empty season under the name ``<name>.building``, ready for ``write_shard``.

    Parameters
    ----------
    name
        First day of the season, ``YYYY-MM-DD``.
    time : (T,) datetime64, UTC, strictly increasing.
    aoi
        The region asked for, in the CRS of ``geobox``.
    lattice
        The windows for which the grid was padded; recorded.
    attrs
        JSON values kept as attributes of the season.
    date_attrs
        One value per date under each name: kept as coordinates on ``time``.

    Raises
    ------
    CubeError
        If bands or times break the contract.
    OutputError
        If the folder cannot be written.
    """
    bands = tuple(str(band) for band in bands)
    check_bands(bands)
    time = np.asarray(time).astype("datetime64[s]")
    if time.size == 0 or not (np.diff(time.astype("int64")) > 0).all():
        raise CubeError(
            f"Cannot create season {name} with {time.size} dates: there must be at least one, and "
            "they must increase strictly. Merge the scenes of one solar day first."
        )
    height, width = int(geobox.shape[0]), int(geobox.shape[1])
    absolute_window(geobox)
    layout = layout or plan_layout(len(time), len(bands), (height, width))
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
        create_arrays(
            group,
            layout,
            (len(time), len(bands), height, width),
            bands,
            with_scl=with_scl,
            with_observations=with_observations,
            level=str((attrs or {}).get("level", "surface")),
        )
        coordinates = write_coordinates(group, geobox, time, bands, name, dict(date_attrs or {}))
        group.attrs.put(
            {
                **(attrs or {}),
                **geozarr_attrs(geobox),
                "Conventions": "CF-1.11",
                "coordinates": " ".join(coordinates),
                "stcln_geo": __version__,
                "season": name,
                "bands": list(bands),
                "layout": layout.to_json(),
                "lattice": {"window": lattice.window, "halo": lattice.halo} if lattice else None,
                "aoi": aoi.__geo_interface__,
            }
        )
    return open_folder(path, name, folder.name, mode="r+")


def write_shard(
    season: Season,
    window: Window,
    *,
    reflectance: np.ndarray,
    valid: np.ndarray,
    scl: np.ndarray | None = None,
    observations: np.ndarray | None = None,
    day_offset: np.ndarray | None = None,
) -> None:
    """Write one whole shard of a season, with its coverage and overview.

    Parameters
    ----------
    window
        The shard, counted from the season's first pixel; starts at a multiple of the shard.
    reflectance : (T, C, H, W) int16.
    valid : (T, H, W) bool, True where usable.
    scl : (T, H, W) uint8, if the season keeps scene classes.
    observations : (T, H, W) uint8, if the season keeps the number of clear observations.
    day_offset : (T, H, W) int8, likewise: their day, counted from the date's, or -128.
    """
    side = season.layout.shard
    expected = Window(window.row, window.col, side, side).intersection(
        Window(0, 0, *season.shape_yx)
    )
    if window.row % side or window.col % side or window != expected:
        raise InputError(
            f"Cannot write {window} as a shard: shards of this season are squares of {side} px "
            "from its first pixel, cut only at its edges. Write one whole shard at a time."
        )
    chunk = season.layout.chunk
    rows = slice(window.row // chunk, -(-(window.row + window.height) // chunk))
    cols = slice(window.col // chunk, -(-(window.col + window.width) // chunk))
    small_rows = slice(
        window.row // OVERVIEW_STEP, -(-(window.row + window.height) // OVERVIEW_STEP)
    )
    small_cols = slice(
        window.col // OVERVIEW_STEP, -(-(window.col + window.width) // OVERVIEW_STEP)
    )
    with writing(season.cube):
        season.reflectance[:, :, window.rows, window.cols] = reflectance
        season.valid[:, window.rows, window.cols] = valid
        if season.scl is not None and scl is not None:
            season.scl[:, window.rows, window.cols] = scl
        if season.observations is not None and observations is not None:
            season.observations[:, window.rows, window.cols] = observations
        if season.day_offset is not None and day_offset is not None:
            season.day_offset[:, window.rows, window.cols] = day_offset
        season.coverage[:, rows, cols] = block_sum(valid, chunk)
        season.overview[:, :, small_rows, small_cols] = overview_of(reflectance, season.bands)


def write_date_flags(season: Season, name: str, flags: np.ndarray) -> None:
    """Write the values of a coordinate on time that an unfinished season already has.

    Parameters
    ----------
    flags : (T,) bool.
    """
    folder = season.cube / f"{season.name}.building"
    group: Any = zarr.open_group(zarr_store(folder), mode="r+", use_consolidated=False)
    group[name][:] = flags


def finish_season(path: str | Location, name: str) -> None:
    """Give a wholly written season its name: from now on it opens as complete."""
    path = location(path)
    with writing(path), quiet_zarr():
        zarr.consolidate_metadata(zarr_store(path / f"{name}.building"))
        if isinstance(path, S3Path):
            publish_season(path, name)
            return
        building, final = path / f"{name}.building", path / name
        if final.exists():
            aside = path / f"{name}.replaced"
            remove_tree(aside)
            final.rename(aside)
            building.rename(final)
            remove_tree(aside)
        else:
            building.rename(final)


def write_fields(
    season: Season, *, labels: Raster, parcels: Raster, fields: FieldTable, legend: Legend
) -> None:
    """Write labels into a season, in place of any it had, a row of shards at a time.

    Parameters
    ----------
    labels : (Y, X) uint8, class code or 255.
    parcels : (Y, X) int32, field number or 0.
    """
    if labels.shape != season.shape_yx or parcels.shape != season.shape_yx:
        raise InputError(
            f"Cannot write labels of shape {labels.shape} and parcels of shape {parcels.shape}: "
            f"the season has {season.shape_yx} (rows, columns). Burn them on the season's grid."
        )
    with writing(season.cube), quiet_zarr():
        folder = zarr_store(season.cube / season.folder)
        group: Any = zarr.open_group(folder, mode="r+", use_consolidated=False)
        # The legend is the mark of whole labels: taken away first, put back last.
        if "legend" in group.attrs:
            del group.attrs["legend"]
        every = (*legend.classes, *legend.ignored)
        meanings = {entry.code: entry.name for entry in every} | {UNLABELLED: "unlabelled"}
        flags = {"labels": flag_attributes(meanings)}
        for name, values, fill in (("labels", labels, 255), ("parcels", parcels, 0)):
            array = create_array(
                group,
                name,
                season.shape_yx,
                (season.layout.chunk,) * 2,
                (season.layout.shard,) * 2,
                dtype=values.dtype.name,
                fill=fill,
                dims=("y", "x"),
                attrs={"grid_mapping": "spatial_ref", **flags.get(name, {})},
            )
            for row in range(0, season.shape_yx[0], season.layout.shard):
                rows = slice(row, min(row + season.layout.shard, season.shape_yx[0]))
                array[rows] = values[rows]
        for column in ("number", "code", "pixels", "split"):
            values = getattr(fields, column)
            array = create_array(
                group,
                f"field_{column}",
                values.shape,
                (max(len(values), 1),),
                None,
                dtype=values.dtype.name,
                fill=0,
                dims=("field",),
            )
            array[:] = values
        group.attrs["legend"] = legend.to_json()
        zarr.consolidate_metadata(folder)


def write_split(season: Season, split: np.ndarray) -> None:
    """Write the split, (F,) uint8 as in ``SPLITS``, of a season's fields."""
    with writing(season.cube), quiet_zarr():
        folder = zarr_store(season.cube / season.name)
        group: Any = zarr.open_group(folder, mode="r+", use_consolidated=False)
        group["field_split"][:] = np.asarray(split, dtype=np.uint8)


def write_json(path: Location, value: Any) -> None:
    """Write JSON as a whole: readers see all of it or nothing."""
    write_file(path, json.dumps(value, indent=1, default=str).encode())


@contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence two notes of zarr on string arrays and on consolidated metadata."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        warnings.filterwarnings("ignore", message=".*not part in the Zarr format 3 specification.*")
        yield
