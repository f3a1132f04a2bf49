"""The files of a shard: where they lie, how they are written and read back."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from ..cube.store import writing
from ..grid import Window, geobox_from_window
from ..legend import CLASS_NODATA
from ..storage import part_path
from .outputs import EMBEDDINGS

__all__ = ["checksum", "file_checksum", "read_raster", "shard_path", "write_raster"]


def shard_path(out: str | Path, window: Window, what: str) -> Path:
    """Return the file of a shard: a manifest ("json", "sieved") or one of its layers."""
    stem = f"{window.row}_{window.col}_{window.height}x{window.width}"
    endings = {"json": ".json", "sieved": ".sieved.json", EMBEDDINGS: f".{EMBEDDINGS}.npy"}
    return Path(out) / "shards" / (stem + endings.get(what, f".{what}.tif"))


def checksum(values: np.ndarray) -> str:
    """Return the SHA-256 of an array's values."""
    return hashlib.sha256(np.ascontiguousarray(values).reshape(-1).data).hexdigest()


def file_checksum(path: Path) -> str | None:
    """Return the SHA-256 of a file, or None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def write_raster(
    path: Path, values: np.ndarray, window: Window, *, crs: str, resolution: float
) -> None:
    """Write (H, W) or (K, H, W) uint8 under a temporary name, then rename."""
    import rasterio

    geobox = geobox_from_window(window, crs=crs, resolution=resolution)
    bands = values[None] if values.ndim == 2 else values
    part = part_path(path)
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with rasterio.open(
                part,
                "w",
                driver="GTiff",
                height=window.height,
                width=window.width,
                count=len(bands),
                dtype="uint8",
                nodata=CLASS_NODATA,
                crs=geobox.crs.to_wkt() if geobox.crs is not None else None,
                transform=geobox.affine,
                tiled=True,
                blockxsize=256,
                blockysize=256,
                compress="deflate",
                zlevel=1,
                interleave="band",
            ) as target:
                target.write(bands)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def read_raster(path: Path) -> np.ndarray | None:
    """Return a shard's pixels, (H, W) or (K, H, W) uint8; None where they cannot be read."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with rasterio.open(path) as source:
            values: np.ndarray = source.read()
    except (RasterioError, OSError):
        return None
    return values[0] if len(values) == 1 else values
