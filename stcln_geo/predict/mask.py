"""Leave pixels out of a map by a raster, such as a map of cropland."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError, MissingFileError, UnreadableError
from ..grid import Window, geobox_from_window

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["SkipMask", "open_mask"]

_WHOLE = 2**28
_PART = 2**20
_BESIDE = (".xml", ".ovr")
_EXACT = 1e-6
"""Places are computed, not interpolated between a shard's edges (pixels of the mask)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SkipMask:
    """A raster that says which pixels are mapped.

    It may have any CRS and resolution; each pixel of the map takes the raster's value at its
    centre, so that the answer is the same in every shard.
    """

    path: Path
    values: tuple[int, ...] | None
    """Values that are mapped; None: all but 0 and nodata."""
    fingerprint: str
    """Of the file's content; of a large file's ends and size, and after a dot of its time."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "path": str(self.path),
            "values": None if self.values is None else list(self.values),
            "fingerprint": self.fingerprint,
        }

    @property
    def is_as_planned(self) -> bool:
        """True where the file of this path has the planned content; a copy's time may differ.

        Raises
        ------
        InputError
            If there is no such raster here.
        """
        found = open_mask(self.path, self.values).fingerprint
        return found.partition(".")[0] == self.fingerprint.partition(".")[0]

    def read(self, window: Window, *, crs: str, resolution: float) -> np.ndarray:
        """Return which pixels of an absolute window are mapped, (H, W) bool.

        Places beyond the raster are not mapped.

        Raises
        ------
        UnreadableError
            If that part of the raster cannot be read.
        """
        import rasterio
        from rasterio.enums import Resampling
        from rasterio.errors import RasterioError
        from rasterio.vrt import WarpedVRT

        geobox = geobox_from_window(window, crs=crs, resolution=resolution)
        try:
            with (
                rasterio.open(self.path) as source,
                WarpedVRT(
                    source,
                    crs=geobox.crs.to_wkt() if geobox.crs is not None else None,
                    transform=geobox.affine,
                    height=window.height,
                    width=window.width,
                    resampling=Resampling.nearest,
                    add_alpha=source.nodata is None,
                    tolerance=_EXACT,
                ) as warped,
            ):
                found = warped.read(1)
                # GDAL takes an alpha band for a mask only where it has one byte or two.
                known = warped.read(2) != 0 if source.nodata is None else warped.dataset_mask() > 0
        except (RasterioError, OSError) as error:
            raise UnreadableError(
                f"Cannot read the mask {self.path} at {window}: {error}. Every worker must see it "
                "under the same path. Correct --mask, or repair the file."
            ) from error
        wanted = found != 0 if self.values is None else np.isin(found, self.values)
        mapped: np.ndarray = wanted & known
        return mapped


def open_mask(path: str | Path, values: Sequence[int] | None = None) -> SkipMask:
    """Check a mask and take its fingerprint.

    Parameters
    ----------
    path
        A raster with one band, in any CRS.
    values
        Values that are mapped; None: all but 0 and nodata.

    Raises
    ------
    InputError
        If it is no raster, has no CRS or several bands, or its nodata is among the values.
    """
    import rasterio
    from rasterio.errors import RasterioError

    path = Path(path).resolve()
    if not path.is_file():
        raise MissingFileError(
            f"Cannot use the mask {path}: there is no such file. Give a raster, such as a GeoTIFF "
            "of cropland, to --mask."
        )
    try:
        with rasterio.open(path) as source:
            bands, crs, nodata = source.count, source.crs, source.nodata
            below = {Path(file) for file in source.files} - {path}
    except RasterioError as error:
        raise InputError(
            f"Cannot use the mask {path}: it is no raster that GDAL can open ({error}). "
            "Give a GeoTIFF to --mask."
        ) from error
    if crs is None or bands != 1:
        lack = "it has no CRS" if crs is None else f"it has {bands} bands"
        raise InputError(
            f"Cannot use the mask {path}: {lack}. A mask is one band with a CRS. "
            "Give such a raster to --mask."
        )
    if values is not None and nodata in values:
        raise InputError(
            f"Cannot map where the mask {path} holds {nodata:g}: that is its nodata, and pixels "
            "without data are not mapped. Leave it out of --mask-values, or if it is a class, "
            "unset it with `gdal_edit.py -unsetnodata`."
        )
    return SkipMask(
        path=path,
        values=None if values is None else tuple(sorted(set(values))),
        # What programs write beside a raster when they show it does not change its pixels.
        fingerprint=_fingerprint([path, *sorted(f for f in below if f.suffix not in _BESIDE)]),
    )


def _fingerprint(paths: Sequence[Path]) -> str:
    """Hash files, such as a VRT and its sources; of a large one its ends, size and time."""
    digest, times = hashlib.sha256(), []
    for path in paths:
        if not path.is_file():
            continue  # of the web, or within an archive
        status = path.stat()
        digest.update(str(status.st_size).encode())
        with path.open("rb") as file:
            if status.st_size <= _WHOLE:
                digest.update(file.read())
            else:
                times.append(str(status.st_mtime_ns))
                digest.update(file.read(_PART))
                file.seek(-_PART, 2)
                digest.update(file.read(_PART))
    return ".".join([digest.hexdigest(), *times])
