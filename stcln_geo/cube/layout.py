"""The form of a season on disk: arrays, chunks, coordinates and attributes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from zarr.codecs import BloscCodec

from ..errors import InputError
from .contract import (
    FILL,
    NO_DAY,
    OVERVIEW_STEP,
    SCALE,
    SCENE_CLASSES,
    days_since,
    flag_attributes,
)

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "CODEC_LEVEL",
    "STANDARD_NAMES",
    "Codec",
    "Layout",
    "block_sum",
    "coverage_dtype",
    "create_array",
    "create_arrays",
    "geozarr_attrs",
    "overview_bands",
    "overview_of",
    "plan_layout",
    "write_coordinates",
]

Codec = Literal["zstd", "lz4"]
"""Compressor within blosc: zstd is smaller, lz4 is faster to read."""

CODEC_LEVEL = 4
"""Of blosc. On Sentinel-2 pixels level 5 takes nearly twice the time for files of the same size."""

_CHUNK_BYTES = 2_500_000
_SHARD_BYTES = 400_000_000
_OVERVIEW_BANDS = (
    ("red", "green", "blue"),
    ("nir", "rededge1", "swir22"),
    ("nir08", "swir16", "rededge1"),
)
_OVERVIEW_WHITE = 0.35
_PROJ_CONVENTION = "f17cb550-5864-4468-aeb7-f3180cfb622f"
_SPATIAL_CONVENTION = "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the pixels of a season are cut and compressed."""

    chunk: int
    """Side of the inner chunk (pixels): what is decoded at once."""
    shard: int
    """Side of the shard (pixels): what is one file and is written whole."""
    dates: int | None = None
    """Dates per inner chunk; None keeps all together, which is what training reads."""
    codec: Codec = "zstd"

    def __post_init__(self) -> None:
        """Check that shards hold whole chunks and whole overview pixels."""
        if self.codec not in get_args(Codec):
            raise InputError(
                f"Cannot use the codec {self.codec!r}: it must be {' or '.join(get_args(Codec))}. "
                "Leave it out for zstd."
            )
        if self.dates is not None and self.dates < 1:
            raise InputError(
                f"Cannot lay out {self.dates} dates per chunk: it must be 1 or more. Leave it out "
                "to keep all dates together."
            )
        fits = self.chunk >= OVERVIEW_STEP and self.chunk % OVERVIEW_STEP == 0
        if not fits or self.shard < self.chunk or self.shard % self.chunk:
            raise InputError(
                f"Cannot lay out chunks of {self.chunk} px in shards of {self.shard} px: the chunk "
                f"must be a multiple of {OVERVIEW_STEP} px and the shard a multiple of the chunk. "
                "Use for example chunk=32, shard=256."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the layout as JSON values; what is as usual is not told."""
        told = {"dates": self.dates} if self.dates is not None else {}
        codec = {"codec": self.codec} if self.codec != "zstd" else {}
        return {"chunk": self.chunk, "shard": self.shard, **told, **codec}

    def chunks(self, lead: tuple[int, ...], dims: Sequence[str]) -> tuple[int, ...]:
        """Return the inner chunk of an array.

        Parameters
        ----------
        lead
            Sizes of its dimensions before ``y`` and ``x``.
        dims
            Their names.
        """
        together = zip(lead, dims, strict=True)
        sizes = [
            min(self.dates, size) if self.dates is not None and name == "time" else size
            for size, name in together
        ]
        return (*sizes, self.chunk, self.chunk)

    def shards(self, lead: tuple[int, ...], dims: Sequence[str]) -> tuple[int, ...]:
        """Return the shard of an array: whole chunks that hold all of its other dimensions."""
        inner = self.chunks(lead, dims)
        whole = [-(-size // part) * part for size, part in zip(lead, inner, strict=False)]
        return (*whole, self.shard, self.shard)


def plan_layout(dates: int, bands: int, shape_yx: tuple[int, int]) -> Layout:
    """Choose chunk and shard: chunks of a few MB, raw shards below 400 MB, none needlessly big."""
    pixel_bytes = max(dates * bands * 2, 1)
    chunk = 64 if pixel_bytes * 64 * 64 <= _CHUNK_BYTES else 32
    shard = 512
    while shard > chunk and pixel_bytes * shard * shard > _SHARD_BYTES:
        shard //= 2
    while shard > 2 * chunk and shard // 2 >= max(shape_yx):
        shard //= 2
    return Layout(chunk=chunk, shard=shard)


STANDARD_NAMES = {
    "surface": "surface_bidirectional_reflectance",
    "top-of-atmosphere": "toa_bidirectional_reflectance",
}
"""CF name of reflectance by level."""


def create_arrays(
    group: Any,
    layout: Layout,
    shape: tuple[int, int, int, int],
    bands: tuple[str, ...],
    *,
    with_scl: bool,
    with_observations: bool = False,
    level: str = "surface",
) -> None:
    """Create the empty arrays of a season.

    Parameters
    ----------
    shape
        Dates, bands, rows, columns.
    with_observations
        True for composites: they keep how many observations were clear, and of which day.
    level
        ``surface`` or ``top-of-atmosphere`` reflectance.
    """
    dates, _, height, width = shape
    chunk, shard = layout.chunk, layout.shard
    cube_dims, image_dims = ("time", "band"), ("time",)
    grid = {"grid_mapping": "spatial_ref"}
    create_array(
        group, "reflectance", shape, layout.chunks(shape[:2], cube_dims),
        layout.shards(shape[:2], cube_dims), dtype="int16", fill=FILL,
        dims=(*cube_dims, "y", "x"), codec=layout.codec,
        attrs={**grid, "scale_factor": SCALE, "add_offset": 0.0, "_FillValue": FILL,
               "standard_name": STANDARD_NAMES[level], "units": "1"},
    )  # fmt: skip
    scenes = flag_attributes(dict(enumerate(SCENE_CLASSES)))
    optional = {"scl": with_scl, "observations": with_observations}
    pixel_arrays = {name: "uint8" for name, wanted in optional.items() if wanted}
    for name, dtype in {"valid": "bool", **pixel_arrays}.items():
        create_array(
            group, name, (dates, height, width), layout.chunks((dates,), image_dims),
            layout.shards((dates,), image_dims), dtype=dtype, fill=0, dims=("time", "y", "x"),
            attrs={**grid, **scenes} if name == "scl" else grid, codec=layout.codec,
        )  # fmt: skip
    if with_observations:
        create_array(
            group, "day_offset", (dates, height, width), layout.chunks((dates,), image_dims),
            layout.shards((dates,), image_dims), dtype="int8", fill=NO_DAY,
            dims=("time", "y", "x"), codec=layout.codec,
            # No units: xarray would read "days" as a span of time.
            attrs={**grid, "_FillValue": NO_DAY,
                   "long_name": "day of acquisition, counted from the date's 'days'"},
        )  # fmt: skip
    per_shard = shard // chunk
    create_array(
        group, "coverage", (dates, -(-height // chunk), -(-width // chunk)),
        (dates, per_shard, per_shard), None, dtype=coverage_dtype(chunk), fill=0,
        dims=("time", "chunk_y", "chunk_x"), attrs={"units": "valid pixels per chunk"},
    )  # fmt: skip
    small = shard // OVERVIEW_STEP
    names = overview_bands(bands)
    create_array(
        group, "overview", (dates, 3, -(-height // OVERVIEW_STEP), -(-width // OVERVIEW_STEP)),
        (dates, 3, small, small), None, dtype="uint8", fill=0,
        dims=("time", "rgb", "overview_y", "overview_x"),
        attrs={"bands": list(names), "white_reflectance": _OVERVIEW_WHITE},
    )  # fmt: skip


def create_array(
    group: Any,
    name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    *,
    dtype: str,
    fill: Any,
    dims: tuple[str, ...],
    attrs: Mapping[str, Any] | None = None,
    codec: Codec = "zstd",
) -> Any:
    """Create one array, compressed with blosc after a shuffle, in place of any it had."""
    shuffle: Any = "shuffle" if np.dtype(dtype).itemsize > 1 else "bitshuffle"
    return group.create_array(
        name,
        shape=shape,
        chunks=chunks,
        shards=shards,
        dtype=dtype,
        fill_value=fill,
        compressors=BloscCodec(cname=codec, clevel=CODEC_LEVEL, shuffle=shuffle),
        dimension_names=dims,
        attributes=dict(attrs or {}),
        overwrite=True,
    )


def write_coordinates(
    group: Any,
    geobox: GeoBox,
    time: np.ndarray,
    bands: tuple[str, ...],
    season: str,
    date_attrs: dict[str, Sequence[Any]],
) -> list[str]:
    """Write the coordinates and return the names of those that are not dimensions."""
    affine = geobox.affine
    height, width = int(geobox.shape[0]), int(geobox.shape[1])
    wkt = str(geobox.crs.to_wkt()) if geobox.crs is not None else ""
    values: dict[str, tuple[np.ndarray, tuple[str, ...], dict[str, Any]]] = {
        "time": (
            time.astype("int64"),
            ("time",),
            {"units": "seconds since 1970-01-01", "calendar": "proleptic_gregorian"},
        ),
        "days": (
            days_since(time, season),
            ("time",),
            {"long_name": f"whole days elapsed after {season}"},
        ),
        "band": (np.asarray(bands, dtype=np.dtypes.StringDType()), ("band",), {}),
        "y": (affine.f + affine.e * (np.arange(height) + 0.5), ("y",), _axis("y")),
        "x": (affine.c + affine.a * (np.arange(width) + 0.5), ("x",), _axis("x")),
    }
    for name, column in date_attrs.items():
        array = np.asarray(list(column))
        if array.dtype.kind in "UO":
            array = np.asarray([str(value) for value in column], dtype=np.dtypes.StringDType())
        values[name] = (array, ("time",), {})
    for name, (array, dims, attrs) in values.items():
        group.create_array(
            name, data=array, chunks=array.shape, dimension_names=dims, attributes=attrs
        )
    reference = group.create_array("spatial_ref", shape=(), dtype="int64", fill_value=0)
    reference.attrs.update(
        {
            "crs_wkt": wkt,
            "spatial_ref": wkt,
            "GeoTransform": " ".join(repr(float(value)) for value in affine.to_gdal()),
        }
    )
    return ["spatial_ref", "days", *date_attrs]


def _axis(axis: str) -> dict[str, str]:
    return {"standard_name": f"projection_{axis}_coordinate", "axis": axis.upper(), "units": "m"}


def geozarr_attrs(geobox: GeoBox) -> dict[str, Any]:
    """Return the GeoZarr attributes of a group: CRS, transform, bounds, shape."""
    crs: Any = geobox.crs
    epsg = crs.epsg
    box = geobox.boundingbox
    return {
        "zarr_conventions": [{"uuid": _PROJ_CONVENTION, "name": "proj:"},
                             {"uuid": _SPATIAL_CONVENTION, "name": "spatial:"}],
        **({"proj:code": f"EPSG:{epsg}"} if epsg else {"proj:wkt2": crs.to_wkt()}),
        "spatial:dimensions": ["y", "x"],
        "spatial:shape": [int(size) for size in geobox.shape],
        "spatial:transform": [float(value) for value in tuple(geobox.affine)[:6]],
        "spatial:bbox": [float(value) for value in (box.left, box.bottom, box.right, box.top)],
    }  # fmt: skip


def coverage_dtype(chunk: int) -> str:
    """Return the type that counts the pixels of a chunk: uint16, or uint32 from 256 px on."""
    return "uint16" if chunk * chunk <= np.iinfo(np.uint16).max else "uint32"


def block_sum(values: np.ndarray, chunk: int) -> np.ndarray:
    """Add up the numbers, or count the True, per square.

    (T, H, W) bool or int16 -> (T, ceil(H/chunk), ceil(W/chunk)) int32.
    """
    count, height, width = values.shape
    rows = np.zeros((count, -(-height // chunk), width), dtype=np.int32)
    # Whole rows at a time are several times as fast as ``reduceat`` along this axis.
    for offset in range(min(chunk, height)):
        part = values[:, offset::chunk]
        rows[:, : part.shape[1]] += part
    sums: np.ndarray = np.add.reduceat(rows, np.arange(0, width, chunk), axis=2)
    return sums


def overview_bands(bands: tuple[str, ...]) -> tuple[str, str, str]:
    """Choose three bands to look at: true colour if it is there."""
    for names in _OVERVIEW_BANDS:
        if set(names) <= set(bands):
            return names
    return bands[-1], bands[len(bands) // 2], bands[0]


def overview_of(reflectance: np.ndarray, bands: tuple[str, ...]) -> np.ndarray:
    """Average (T, C, H, W) int16 to (T, 3, H/16, W/16) uint8; 0 where nothing was measured."""
    indices = [bands.index(name) for name in overview_bands(bands)]
    planes = []
    for index in indices:
        plane = reflectance[:, index]
        measured = plane != FILL
        count = block_sum(measured, OVERVIEW_STEP)
        total = block_sum(np.where(measured, plane, np.int16(0)), OVERVIEW_STEP)
        mean = total / np.maximum(count, 1) * SCALE
        gray = np.clip(np.sqrt(np.clip(mean / _OVERVIEW_WHITE, 0, 1)) * 254 + 1, 1, 255)
        planes.append(np.where(count > 0, gray, 0).astype(np.uint8))
    return np.stack(planes, axis=1)
