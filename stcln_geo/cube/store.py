"""Cubes on disk: open a season, create one, write it shard by shard.

A cube is a folder ``NAME.zarr`` with one Zarr v3 group per season. A season is written under
the name ``<season>.building`` and renamed when whole, so what bears a season's name is
complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from .. import __version__
from ..errors import CubeError, InputError, MissingFileError, OutputError
from ..grid import Lattice, Window, absolute_window, tiles
from ..legend import Legend
from .contract import OVERVIEW_STEP, check_bands, days_since
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

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

__all__ = [
    "FieldTable",
    "Layout",
    "Season",
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

_SEASON = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldTable:
    """The labelled fields of a season, one row each."""

    number: np.ndarray
    """(F,) int32: the field's value in ``parcels``, from 1."""
    code: np.ndarray
    """(F,) uint8: class code."""
    pixels: np.ndarray
    """(F,) int32: labelled pixels."""
    split: np.ndarray
    """(F,) uint8: 0 unused, 1 train, 2 validation, 3 test."""

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Season:
    """An opened season: raw Zarr arrays, coordinates in memory."""

    cube: Path
    """The cube's folder."""
    name: str
    """First day of the season, ``YYYY-MM-DD``."""
    folder: str
    """Name of its group in the cube: the season's, or ``<name>.building``."""
    geobox: GeoBox
    time: np.ndarray
    """(T,) datetime64[ns], UTC."""
    days: np.ndarray
    """(T,) int32: whole days since the season's first day."""
    bands: tuple[str, ...]
    layout: Layout
    reflectance: Any
    """(T, C, Y, X) int16 zarr array; reflectance / 0.0001, -32768 = no data."""
    valid: Any
    """(T, Y, X) bool zarr array; True where usable."""
    coverage: Any
    """(T, chunk_y, chunk_x) uint16 zarr array; valid pixels per chunk."""
    overview: Any
    """(T, 3, Y/16, X/16) uint8 zarr array; 0 = no data."""
    scl: Any | None
    """(T, Y, X) uint8 zarr array of scene classes, if kept."""
    observations: Any | None
    """(T, Y, X) uint8 zarr array, clear observations per pixel, if the dates are composites."""
    labels: Any | None
    """(Y, X) uint8 zarr array of class codes, 255 = unlabelled, if burnt."""
    parcels: Any | None
    """(Y, X) int32 zarr array of field numbers, 0 = none, if burnt."""
    fields: FieldTable | None
    legend: Legend | None
    aoi: BaseGeometry
    """The region asked for, in the cube's CRS; the grid is padded to whole windows around it."""
    attrs: dict[str, Any]

    @property
    def window(self) -> Window:
        """The season's place in the absolute pixels of its CRS."""
        return absolute_window(self.geobox)

    @property
    def shape_yx(self) -> tuple[int, int]:
        """Height and width (pixels)."""
        return int(self.geobox.shape[0]), int(self.geobox.shape[1])

    @property
    def resolution(self) -> float:
        """Pixel size (units of the CRS)."""
        return float(self.geobox.affine.a)


def list_seasons(path: str | Path) -> list[str]:
    """Return the names of a cube's complete seasons, oldest first.

    Raises
    ------
    MissingFileError
        If there is no such cube.
    """
    path = Path(path)
    if not (path / "zarr.json").is_file():
        raise MissingFileError(
            f"Cannot open the cube {path}: there is no Zarr v3 group at this path. "
            "Check the path, or build the cube with 'stcln-geo cube build'."
        )
    return sorted(
        child.name
        for child in path.iterdir()
        if _SEASON.fullmatch(child.name) and (child / "zarr.json").is_file()
    )


def choose_season(path: str | Path, season: str | None) -> str:
    """Return the season asked for, or the only one.

    Raises
    ------
    CubeError
        If the cube has no such season, none at all, or several and none was named.
    """
    names = list_seasons(path)
    if not names:
        building = sorted(child.name for child in Path(path).glob("*.building"))
        raise CubeError(
            f"Cannot open the cube {path}: it has no complete season"
            + (f" ({', '.join(building)} is unfinished)" if building else "")
            + ". Run the same 'cube build' command again: it continues where it stopped."
        )
    if season is None:
        if len(names) > 1:
            raise CubeError(
                f"Cannot choose among the {len(names)} seasons of {path}: {', '.join(names)}. "
                "Name one with --season."
            )
        return names[0]
    if season not in names:
        raise CubeError(
            f"Cannot open season {season!r} of {path}: it does not exist. "
            f"The cube has: {', '.join(names)}."
        )
    return season


def open_season(path: str | Path, season: str | None = None, *, mode: str = "r") -> Season:
    """Open one season; by default the only one.

    Raises
    ------
    MissingFileError
        If there is no such cube.
    CubeError
        If the season does not exist, or none was named among several.
    """
    name = choose_season(path, season)
    return _open(Path(path), name, name, mode=mode)


def _open(path: Path, name: str, folder: str, *, mode: str) -> Season:
    from odc.geo.geobox import GeoBox
    from shapely.geometry import shape

    # Consolidated metadata is for readers over a network; here it could be older than the arrays.
    group: Any = zarr.open_group(
        path / folder, mode="r" if mode == "r" else "r+", use_consolidated=False
    )
    attrs = dict(group.attrs)
    if attrs.get("kind") == "stack":
        raise CubeError(
            f"Cannot open season {name} of {path} as a cube: it is a stack of many sites. "
            "Open it with open_stack, or describe it with 'stcln-geo archive info'."
        )
    height, width = (int(size) for size in group["reflectance"].shape[2:])
    try:
        affine = _affine(attrs["spatial:transform"])
        geobox = GeoBox((height, width), affine, group["spatial_ref"].attrs["crs_wkt"])
        time = np.asarray(group["time"][:]).astype("datetime64[s]").astype("datetime64[ns]")
        legend = Legend.from_json(attrs["legend"]) if "legend" in attrs else None
        layout = Layout(**attrs["layout"])
    except KeyError as error:
        raise CubeError(
            f"Cannot open season {name} of {path}: the attribute {error} is missing, so it was not "
            "written by stcln-geo. Make a cube of it with write_cube."
        ) from error
    labelled = legend is not None
    fields = None
    if labelled:
        fields = FieldTable(
            number=group["field_number"][:],
            code=group["field_code"][:],
            pixels=group["field_pixels"][:],
            split=group["field_split"][:],
        )
    return Season(
        cube=path,
        name=name,
        folder=folder,
        geobox=geobox,
        time=time,
        days=days_since(time, name),
        bands=tuple(attrs["bands"]),
        layout=layout,
        reflectance=group["reflectance"],
        valid=group["valid"],
        coverage=group["coverage"],
        overview=group["overview"],
        scl=group.get("scl"),
        observations=group.get("observations"),
        labels=group["labels"] if labelled else None,
        parcels=group["parcels"] if labelled else None,
        fields=fields,
        legend=legend,
        aoi=shape(attrs["aoi"]),
        attrs=attrs,
    )


def open_building(path: str | Path, name: str) -> Season | None:
    """Open an unfinished season for writing, or return None if there is none."""
    folder = f"{name}.building"
    metadata = Path(path) / folder / "zarr.json"
    # The attributes are written last: a folder without them was left half-created.
    if not metadata.is_file() or "season" not in json.loads(metadata.read_text())["attributes"]:
        return None
    return _open(Path(path), name, folder, mode="r+")


def create_season(
    path: str | Path,
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
    path = Path(path)
    folder = path / f"{name}.building"
    with writing(path), quiet_zarr():
        path.mkdir(parents=True, exist_ok=True)
        zarr.open_group(path, mode="a", zarr_format=3, attributes={"stcln_geo": __version__})
        shutil.rmtree(folder, ignore_errors=True)
        group = zarr.create_group(folder, zarr_format=3)
        create_arrays(
            group,
            layout,
            (len(time), len(bands), height, width),
            bands,
            with_scl=with_scl,
            with_observations=with_observations,
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
                "layout": {"chunk": layout.chunk, "shard": layout.shard},
                "lattice": {"window": lattice.window, "halo": lattice.halo} if lattice else None,
                "aoi": aoi.__geo_interface__,
            }
        )
    return _open(path, name, folder.name, mode="r+")


def write_shard(
    season: Season,
    window: Window,
    *,
    reflectance: np.ndarray,
    valid: np.ndarray,
    scl: np.ndarray | None = None,
    observations: np.ndarray | None = None,
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
        season.coverage[:, rows, cols] = block_sum(valid, chunk).astype(np.uint16)
        season.overview[:, :, small_rows, small_cols] = overview_of(reflectance, season.bands)


def write_date_flags(season: Season, name: str, flags: np.ndarray) -> None:
    """Write the values of a coordinate on time that an unfinished season already has.

    Parameters
    ----------
    flags : (T,) bool.
    """
    folder = season.cube / f"{season.name}.building"
    group: Any = zarr.open_group(folder, mode="r+", use_consolidated=False)
    group[name][:] = flags


def finish_season(path: str | Path, name: str) -> None:
    """Give a wholly written season its name: from now on it opens as complete."""
    path = Path(path)
    building, final = path / f"{name}.building", path / name
    with writing(path), quiet_zarr():
        zarr.consolidate_metadata(str(building))
        if final.exists():
            aside = path / f"{name}.replaced"
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
            building.rename(final)
            shutil.rmtree(aside)
        else:
            building.rename(final)


def write_fields(
    season: Season, *, labels: np.ndarray, parcels: np.ndarray, fields: FieldTable, legend: Legend
) -> None:
    """Write labels into a season, in place of any it had.

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
        group: Any = zarr.open_group(season.cube / season.folder, mode="r+", use_consolidated=False)
        # The legend is the mark of whole labels: taken away first, put back last.
        if "legend" in group.attrs:
            del group.attrs["legend"]
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
                attrs={"grid_mapping": "spatial_ref"},
            )
            array[:] = values
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
        zarr.consolidate_metadata(str(season.cube / season.folder))


def write_split(season: Season, split: np.ndarray) -> None:
    """Write the split, (F,) uint8 as in ``SPLITS``, of a season's fields."""
    with writing(season.cube), quiet_zarr():
        group: Any = zarr.open_group(season.cube / season.name, mode="r+", use_consolidated=False)
        group["field_split"][:] = np.asarray(split, dtype=np.uint8)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn refusals of the file system into one clear error."""
    try:
        yield
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(
            f"Cannot write to {path}: {error.strerror or error}. The folder must be writable and "
            "have room. Choose another output path, or free some space."
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename: readers see all of it or nothing."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(json.dumps(value, indent=1, default=str), encoding="utf-8")
        temporary.replace(path)


def _affine(values: Sequence[float]) -> Any:
    from affine import Affine

    return Affine(*values)


@contextmanager
def quiet_zarr() -> Iterator[None]:
    """Silence two notes of zarr on string arrays and on consolidated metadata."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Cc]onsolidated metadata.*")
        warnings.filterwarnings("ignore", message=".*does not have a Zarr V3 specification.*")
        warnings.filterwarnings("ignore", message=".*not part in the Zarr format 3 specification.*")
        yield


def shards_of(season: Season) -> list[Window]:
    """Return a season's shards, counted from its first pixel, row by row."""
    return tiles(season.shape_yx, season.layout.shard)
