"""Show maps of several CRSs as one raster: a VRT in the CRS of one of them, nothing copied.

GDAL reads a VRT like any raster, and passes a coarse view down to the overviews of the maps. A
map in another CRS gets a VRT of its own that warps it, as a mosaic takes sources of its own CRS
only. All are nearest: no value is made up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from ..errors import OutputError
from ..grid import Window, absolute_window, bounds_window, geobox_from_window
from ..legend import CLASS_NODATA, Legend
from .names import CLASS_BANDS, Bands, map_tags, removed
from .write import Source, mosaic_xml

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = ["mosaic_grid", "write_mosaic"]

_TOLERANCE = 0.01
"""How far (pixels) GDAL may place a warped pixel's centre from where the projection has it."""


def mosaic_grid(geoboxes: Sequence[GeoBox]) -> GeoBox:
    """Return the grid of a mosaic: that of the first, grown until it holds all of them."""
    main = geoboxes[0]
    whole, resolution = absolute_window(main), float(main.affine.a)
    for other in geoboxes[1:]:
        whole = whole.union(_place(other, main))
    return geobox_from_window(whole, crs=main.crs, resolution=resolution)


def write_mosaic(
    maps: Sequence[tuple[Path, GeoBox]],
    path: Path,
    *,
    warped: Path,
    legend: Legend | None,
    bands: Bands | None = None,
    absent: int = CLASS_NODATA,
    tags: Mapping[str, str] | None = None,
) -> Path:
    """Write a VRT over maps, with paths relative to it.

    Parameters
    ----------
    maps
        Files and their grids; the first gives the CRS and the pixels, and shows where two have a
        value.
    warped
        Folder of the VRTs that warp maps of other CRSs.
    legend, bands, tags
        As in ``write_cog``.
    absent
        Value of the pixels that a map does not hold; nodata of the mosaic.

    Raises
    ------
    OutputError
        If GDAL or the disk refuses.
    """
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    main = maps[0][1]
    grid = mosaic_grid([geobox for _, geobox in maps])
    whole = absolute_window(grid)
    told = bands or (Bands() if legend is None else CLASS_BANDS)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with removed(part):
            warped.mkdir(parents=True, exist_ok=True)
            # What GDAL draws last lies on top, so the first of the maps comes last.
            sources = []
            for file, geobox in reversed(maps):
                place = _place(geobox, main)
                if geobox.crs != main.crs:
                    target = geobox_from_window(
                        place, crs=main.crs, resolution=float(main.affine.a)
                    )
                    file = _write_warped(file, warped, target, absent=absent)
                sources.append(Source(path=file, window=place.relative_to(whole)))
            part.write_text(
                mosaic_xml(
                    sources, path.parent, grid, legend=legend, bands=told, absent=absent,
                    tags=map_tags(legend, told, tags),
                ),
                encoding="utf-8",
            )  # fmt: skip
            os.replace(part, path)
    except (RasterioError, CPLE_BaseError, OSError) as error:
        raise OutputError(
            f"Cannot write the mosaic {path}: {error}. The folder must be writable, and the maps "
            "in it whole. Run the same command again."
        ) from error
    return path


def _place(geobox: GeoBox, main: GeoBox) -> Window:
    """Return the absolute pixels of the main grid that a grid meets."""
    if geobox.crs == main.crs:
        return absolute_window(geobox)
    from rasterio.warp import transform_bounds

    bounds = transform_bounds(
        geobox.crs.to_wkt() if geobox.crs is not None else None,
        main.crs.to_wkt() if main.crs is not None else None,
        *geobox.boundingbox.bbox,
        densify_pts=99,
    )
    return bounds_window(bounds, resolution=float(main.affine.a)).expand(1)


def _write_warped(file: Path, folder: Path, target: GeoBox, *, absent: int) -> Path:
    """Write a VRT that shows a map on a grid of another CRS."""
    import rasterio
    import rasterio.shutil
    from rasterio.enums import Resampling
    from rasterio.vrt import WarpedVRT

    path = folder / f"{file.parent.name}-{file.stem}.vrt"
    part = path.with_name(f".{path.stem}.{os.getpid()}.part.vrt")
    height, width = (int(side) for side in target.shape)
    with (
        removed(part),
        rasterio.open(file) as source,
        WarpedVRT(
            source,
            crs=target.crs.to_wkt() if target.crs is not None else None,
            transform=target.affine,
            height=height,
            width=width,
            resampling=Resampling.nearest,
            src_nodata=absent,
            nodata=absent,
            tolerance=_TOLERANCE,
        ) as view,
    ):
        rasterio.shutil.copy(view, str(part), driver="VRT")
        # GDAL writes paths relative to the VRT only where they lead down; a product is moved whole.
        tree = ElementTree.parse(part)
        for element in tree.iter("SourceDataset"):
            element.text = os.path.relpath(file.resolve(), folder.resolve())
            element.set("relativeToVRT", "1")
        tree.write(part, encoding="utf-8")
        os.replace(part, path)
    return path
