"""Read cubes: their seasons, opened as raw Zarr arrays.

A cube is a folder ``NAME.zarr``, on disk or in object storage, with one Zarr v3 group per season.
A season is written under the name ``<season>.building`` and gets its own when whole, so what bears
a season's name is complete: by a rename on disk, as ``publish`` describes in object storage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr

from ..errors import CubeError, MissingFileError
from ..grid import Window, absolute_window, tiles
from ..legend import Legend
from ..storage import Location, location, read_version
from .contract import days_since
from .layout import Layout
from .zarr_store import zarr_store

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox
    from shapely.geometry.base import BaseGeometry

__all__ = [
    "FieldTable",
    "Season",
    "choose_season",
    "list_seasons",
    "open_building",
    "open_folder",
    "open_season",
    "shards_of",
    "unchanged",
]

_SEASON = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldTable:
    """The labelled fields of a season, one row each.

    Pixels of a class that lie in no field, such as the background between the parcels of a site,
    are one row for each site and class. So every pixel with a class belongs to one row.
    """

    number: np.ndarray
    """(F,) int32: the field's value in ``parcels``, from 1; 0 for pixels that lie in no field."""
    code: np.ndarray
    """(F,) uint8: class code."""
    pixels: np.ndarray
    """(F,) int32: labelled pixels."""
    split: np.ndarray
    """(F,) uint8: 0 unused, 1 train, 2 validation, 3 test."""
    site: np.ndarray = None  # type: ignore[assignment]  # filled in below
    """(F,) int32: position of the site that holds the field; 0, the default, in a cube."""

    def __post_init__(self) -> None:
        """Put the fields of a cube into its one site."""
        if self.site is None:
            object.__setattr__(self, "site", np.zeros(len(self.number), dtype=np.int32))

    def __len__(self) -> int:
        """Return the number of fields."""
        return len(self.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class Season:
    """An opened season: raw Zarr arrays, coordinates in memory."""

    cube: Location
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
    """(T, chunk_y, chunk_x) uint16 or uint32 zarr array; valid pixels per chunk."""
    overview: Any
    """(T, 3, Y/16, X/16) uint8 zarr array; 0 = no data."""
    scl: Any | None
    """(T, Y, X) uint8 zarr array of scene classes, if kept."""
    observations: Any | None
    """(T, Y, X) uint8 zarr array, clear observations per pixel, if the dates are composites."""
    day_offset: Any | None
    """(T, Y, X) int8 zarr array, day of acquisition less ``days``, if the dates are composites."""
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

    @property
    def level(self) -> str:
        """``surface`` or ``top-of-atmosphere`` reflectance."""
        return str(self.attrs.get("level", "surface"))


def list_seasons(path: str | Location) -> list[str]:
    """Return the names of a cube's complete seasons, oldest first.

    Raises
    ------
    MissingFileError
        If there is no such cube.
    """
    path = location(path)
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


def choose_season(path: str | Location, season: str | None) -> str:
    """Return the season asked for, or the only one.

    Raises
    ------
    CubeError
        If the cube has no such season, none at all, or several and none was named.
    """
    names = list_seasons(path)
    if not names:
        building = sorted(child.name for child in location(path).glob("*.building"))
        held = json.loads((location(path) / "zarr.json").read_text()).get("attributes", {})
        if not building and "season" in held:
            raise CubeError(
                f"Cannot open {path} as a cube: it is the season {held['season']} of one. Give the "
                "folder that holds it, and name the season with --season (season= in Python)."
            )
        if not building and "stcln_geo" not in held:
            raise CubeError(
                f"Cannot open {path} as a cube: it is a Zarr group that stcln-geo did not write. "
                "Open it with xarray.open_zarr, and make a cube of it with write_cube."
            )
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


def open_season(path: str | Location, season: str | None = None, *, mode: str = "r") -> Season:
    """Open one season; by default the only one.

    Raises
    ------
    MissingFileError
        If there is no such cube.
    CubeError
        If the season does not exist, or none was named among several.
    """
    name = choose_season(path, season)
    where = location(path)
    with unchanged(where, name):
        return open_folder(where, name, name, mode=mode)


@contextmanager
def unchanged(path: Location, name: str) -> Iterator[None]:
    """Refuse what was opened in here where the season was replaced meanwhile, in a bucket.

    On disk a season is replaced in an instant; in a bucket it is taken away first (`publish`), so
    what was read between two sightings of the same ``zarr.json`` is of one season.
    """
    if isinstance(path, Path):
        yield
        return
    mark = path / name / "zarr.json"
    before = read_version(mark)
    problem: Exception | None = None
    try:
        yield
    except (CubeError, LookupError, OSError) as error:
        problem = error
    if read_version(mark) != before:
        raise CubeError(
            f"Cannot open season {name} of {path}: it is being replaced or labelled just now. What "
            "opens must be whole. Open it again in a moment."
        ) from problem
    if problem is not None:
        raise problem


def open_folder(path: Location, name: str, folder: str, *, mode: str) -> Season:
    """Open a season's group under whatever name it has."""
    from odc.geo.geobox import GeoBox
    from shapely.geometry import shape

    # Consolidated metadata is for readers over a network; here it could be older than the arrays.
    group: Any = zarr.open_group(
        zarr_store(path / folder), mode="r" if mode == "r" else "r+", zarr_format=3,
        use_consolidated=False,
    )  # fmt: skip
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
        day_offset=group.get("day_offset"),
        labels=group["labels"] if labelled else None,
        parcels=group["parcels"] if labelled else None,
        fields=fields,
        legend=legend,
        aoi=shape(attrs["aoi"]),
        attrs=attrs,
    )


def open_building(path: str | Location, name: str) -> Season | None:
    """Open an unfinished season for writing, or return None if there is none."""
    folder = f"{name}.building"
    metadata = location(path) / folder / "zarr.json"
    # The attributes are written last: a folder without them was left half-created.
    if not metadata.is_file() or "season" not in json.loads(metadata.read_text())["attributes"]:
        return None
    return open_folder(location(path), name, folder, mode="r+")


def shards_of(season: Season) -> list[Window]:
    """Return a season's shards, counted from its first pixel, row by row."""
    return tiles(season.shape_yx, season.layout.shard)


def _affine(values: Sequence[float]) -> Any:
    from affine import Affine

    return Affine(*values)
