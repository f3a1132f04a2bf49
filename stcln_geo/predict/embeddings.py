"""Embeddings: what the classifier decides from, as a sharded Zarr array on the map's grid.

They are stored as float16, NaN where a pixel has no class. Each pixel's embedding comes from the
window whose core owns it, also where classes are blended.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cube.layout import create_array, geozarr_attrs
from ..cube.store import writing
from ..grid import Window, tiles
from ..storage import part_path

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["EmbeddingFile", "Part", "write_embeddings"]

_CHUNK = 64
_SHARD = 512

Part = tuple[Path, Window]
"""A shard's file and its place, counted from the map's first pixel."""


class EmbeddingFile:
    """A shard's embeddings while they are filled: (D, H, W) float16 on disk, not in memory."""

    def __init__(self, path: Path, shape: tuple[int, int, int]) -> None:
        self._path = path
        self._part = part_path(path)
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Written through, band by band: a full disk is an error here, not a crash later.
            blank = np.full(shape[1:], np.nan, dtype=np.float16).tobytes()
            with self._part.open("wb") as file:
                header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                for _ in range(shape[0]):
                    file.write(blank)
        self._values = np.load(self._part, mmap_mode="r+")

    def put(self, place: Window, values: np.ndarray, *, where: np.ndarray) -> None:
        """Write (D, h, w) values at a place counted from the shard's corner, where True."""
        np.copyto(self._values[:, place.rows, place.cols], values, where=where)

    def finish(self) -> str:
        """Give the file its name and return its SHA-256."""
        from .files import file_checksum

        with writing(self._path.parent):
            self._values.flush()
            os.replace(self._part, self._path)
        return file_checksum(self._path) or ""

    def discard(self) -> None:
        """Remove the file, unless it has its name."""
        self._part.unlink(missing_ok=True)


def write_embeddings(
    parts: Sequence[Part], path: Path, *, geobox: GeoBox, dim: int, attrs: dict[str, str]
) -> Path:
    """Gather the shards' embeddings in one Zarr group, under a temporary name at first.

    Parameters
    ----------
    parts
        Files that do not overlap; pixels without a file are NaN.
    dim
        Length of an embedding, D.
    attrs
        Further attributes of the group.

    Returns
    -------
    Path
        A Zarr v3 group with ``embedding (dim, y, x)`` float16, ``y``, ``x`` and ``spatial_ref``.

    Raises
    ------
    OutputError
        If it cannot be written.
    """
    import zarr

    height, width = (int(side) for side in geobox.shape)
    building = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with writing(path):
            group = zarr.open_group(building, mode="w", zarr_format=3)
            group.attrs.update({**geozarr_attrs(geobox), **attrs})
            array = create_array(
                group,
                "embedding",
                (dim, height, width),
                (dim, _CHUNK, _CHUNK),
                (dim, _SHARD, _SHARD),
                dtype="float16",
                fill=np.float16(np.nan),
                dims=("dim", "y", "x"),
                attrs={
                    "long_name": "features of the pixel before the classifier",
                    "grid_mapping": "spatial_ref",
                    "coordinates": "spatial_ref",
                },
            )
            _write_axes(group, geobox)
            for square in tiles((height, width), _SHARD):
                values = np.full((dim, *square.shape_yx), np.nan, dtype=np.float16)
                for file, place in parts:
                    both = place.intersection(square)
                    if both.is_empty:
                        continue
                    # Opened for this square alone: there may be more files than may be open.
                    source = np.load(file, mmap_mode="r")
                    there, here = both.relative_to(place), both.relative_to(square)
                    values[:, here.rows, here.cols] = source[:, there.rows, there.cols]
                array[:, square.rows, square.cols] = values
            with warnings.catch_warnings():
                # Readers that do not know consolidated metadata read the group without it.
                warnings.filterwarnings("ignore", message="Consolidated metadata")
                zarr.consolidate_metadata(group.store)
            if path.exists():
                shutil.rmtree(path)
            os.replace(building, path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return path


def _write_axes(group: Any, geobox: GeoBox) -> None:
    affine = geobox.affine
    wkt = str(geobox.crs.to_wkt()) if geobox.crs is not None else ""
    height, width = (int(side) for side in geobox.shape)
    axes = {
        "y": affine.f + affine.e * (np.arange(height) + 0.5),
        "x": affine.c + affine.a * (np.arange(width) + 0.5),
    }
    for name, values in axes.items():
        group.create_array(
            name,
            data=values,
            chunks=values.shape,
            dimension_names=(name,),
            attributes={"standard_name": f"projection_{name}_coordinate", "units": "m"},
        )
    reference = group.create_array("spatial_ref", shape=(), dtype="int64", fill_value=0)
    reference.attrs.update(
        {
            "crs_wkt": wkt,
            "spatial_ref": wkt,
            "GeoTransform": " ".join(repr(float(value)) for value in affine.to_gdal()),
        }
    )
