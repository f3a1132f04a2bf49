"""Turn a plain GeoTIFF of any bands into a cloud-optimized one, with its numbers untouched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ..errors import OutputError

__all__ = ["OverviewResampling", "write_image_cog"]

OverviewResampling = Literal["AVERAGE", "MODE", "NEAREST"]
"""How GDAL makes the overviews: means of measurements, or the most frequent code."""

_BLOCK = 512


def write_image_cog(
    source: str | Path,
    path: str | Path,
    *,
    overviews: OverviewResampling,
    threads: int | None = None,
) -> Path:
    """Write a cloud-optimized GeoTIFF with the pixels, tags, scales and names of another file.

    Parameters
    ----------
    source
        Any raster that GDAL reads, on a file system with room for the result beside it.
    path
        The COG; it appears under this name only when it is whole.
    overviews
        Pixels without data take no part in means.
    threads
        Threads that compress; None = all cores.

    Raises
    ------
    OutputError
        If GDAL cannot write it (disk full, folder not writable).
    """
    import rasterio
    import rasterio.shutil
    from rasterio._err import CPLE_BaseError  # what copy raises for most of GDAL's errors
    from rasterio.errors import RasterioError

    source, path = Path(source), Path(path)
    part = source.with_name(f"{source.stem}.{os.getpid()}.cog.tif")
    options = {
        "COMPRESS": "DEFLATE",
        "LEVEL": "6",
        "PREDICTOR": "YES",
        "BLOCKSIZE": str(_BLOCK),
        "BIGTIFF": "IF_SAFER",
        "OVERVIEW_RESAMPLING": overviews,
        "NUM_THREADS": "ALL_CPUS" if threads is None else str(threads),
        "STATISTICS": "NO",
        "OVERVIEWS": "IGNORE_EXISTING",
    }
    try:
        with rasterio.Env(GDAL_PAM_ENABLED=False):
            rasterio.shutil.copy(str(source), str(part), driver="COG", **options)
        os.replace(part, path)
    except (RasterioError, CPLE_BaseError, OSError) as error:
        raise OutputError(
            f"Cannot write {path}: {error}. The folder must be writable and have room for the "
            "image and its overviews. Free some space or choose another folder; finished files "
            "are kept."
        ) from error
    finally:
        part.unlink(missing_ok=True)
    return path
