"""A file's own pixels on a finer grid: GDAL's numbers to the digit, whole or in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT

from stcln_geo.cube.pixels import Pixels
from stcln_geo.cube.read import AssetReader
from stcln_geo.grid import Window, crop_geobox, geobox_from_window, tiles

ORIGIN = (699960, 4900020)
"""West and north of the files, as of a Sentinel-2 tile."""


def write(path: Path, values: np.ndarray, size: int) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1,
        dtype=values.dtype.name, crs="EPSG:32631", nodata=0, tiled=True, blockxsize=64,
        blockysize=64, compress="deflate", transform=from_origin(*ORIGIN, size, size),
    ) as file:  # fmt: skip
        file.write(values, 1)
    return path


def grid_of(window: Window, resolution: int) -> Any:
    """Return a grid that begins so many pixels south and east of the files."""
    west, north = (start // resolution for start in ORIGIN)
    return geobox_from_window(
        window.shift(-north, west), crs="EPSG:32631", resolution=float(resolution)
    )


def by_gdal(path: Path, grid: Any, method: Resampling, step: int) -> np.ndarray:
    with (
        rasterio.open(path) as file,
        WarpedVRT(
            file, crs="EPSG:32631", transform=grid.affine, height=int(grid.shape[0]),
            width=int(grid.shape[1]), resampling=method, src_nodata=0, nodata=0,
            tolerance=1e-12, XSCALE=str(step), YSCALE=str(step),
        ) as warped,
    ):  # fmt: skip
        numbers: np.ndarray = warped.read(1)
    return numbers


def values_of(dtype: str, missing: float, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.integers(1, np.iinfo(dtype).max, (101, 83), endpoint=True).astype(dtype)
    values[rng.random(values.shape) < missing] = 0
    values[40:60, 20:50] = 0
    return values


@pytest.mark.parametrize("missing", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    "window",
    [
        Window(0, 0, 202, 166),
        Window(-5, -4, 211, 180),
        Window(33, 57, 71, 64),
        Window(98, 64, 1, 3),
    ],
    ids=["whole", "wider", "inner", "sliver"],
)
def test_interpolation_is_gdals_to_the_digit(
    tmp_path: Path, window: Window, dtype: str, missing: float
):
    path = write(tmp_path / "s.tif", values_of(dtype, missing), 20)
    grid = grid_of(window, 10)
    pixels = AssetReader().fetch(str(path), grid, resampling="bilinear")
    assert (pixels.step, pixels.smooth) == (2, True), "GDAL has no part in it"
    got = pixels.on_grid(Window(0, 0, *window.shape_yx))
    np.testing.assert_array_equal(got, by_gdal(path, grid, Resampling.bilinear, 2))
    assert got.dtype == dtype


def test_halves_are_rounded_up_as_gdal_rounds_them(tmp_path: Path):
    # 1 and 2 only: every fourth number lies halfway between two whole ones.
    values = np.random.default_rng(3).integers(0, 3, (61, 67)).astype("uint16")
    path = write(tmp_path / "s.tif", values, 20)
    grid = grid_of(Window(0, 0, 122, 134), 10)
    got = AssetReader().read(str(path), grid, resampling="bilinear")
    np.testing.assert_array_equal(got, by_gdal(path, grid, Resampling.bilinear, 2))


@pytest.mark.parametrize(("size", "resolution"), [(20, 10), (60, 10), (60, 20)])
def test_repetition_is_gdals_nearest(tmp_path: Path, size: int, resolution: int):
    path = write(tmp_path / "s.tif", values_of("uint8", 0.1), size)
    step = size // resolution
    for window in (Window(-7, -3, 101 * step + 20, 83 * step + 9), Window(35, 41, 90, 77)):
        grid = grid_of(window, resolution)
        pixels = AssetReader().fetch(str(path), grid)
        assert pixels.step == step
        got = pixels.on_grid(Window(0, 0, *window.shape_yx))
        np.testing.assert_array_equal(got, by_gdal(path, grid, Resampling.nearest, step))


@pytest.mark.parametrize("method", ["nearest", "bilinear"])
def test_parts_are_cut_out_of_the_whole(tmp_path: Path, method: Any):
    path = write(tmp_path / "s.tif", values_of("uint16", 0.2), 20)
    window = Window(-9, -6, 230, 190)
    pixels = AssetReader().fetch(str(path), grid_of(window, 10), resampling=method)
    whole = pixels.on_grid(Window(0, 0, *window.shape_yx))
    for cut in tiles(window.shape_yx, 37):
        part = pixels.part(cut)
        assert part.values.size <= (37 // 2 + 4) ** 2, "no more than is needed"
        assert part.values.base is None, "a copy, so that the rest can be forgotten"
        np.testing.assert_array_equal(part.on_grid(cut), whole[cut.rows, cut.cols])
        moved = part.shift(5, -8)
        np.testing.assert_array_equal(moved.on_grid(cut.shift(5, -8)), part.on_grid(cut))
    beyond = Window(400, 10, 12, 13)
    assert not pixels.part(beyond).on_grid(beyond).any()


def test_a_window_of_a_fetch_is_the_fetch_of_a_window(tmp_path: Path):
    path = write(tmp_path / "s.tif", values_of("uint16", 0.2), 20)
    grid = grid_of(Window(0, 0, 202, 166), 10)
    whole = AssetReader().read(str(path), grid, resampling="bilinear")
    for cut in tiles((202, 166), 53):
        got = AssetReader().read(str(path), crop_geobox(grid, cut), resampling="bilinear")
        np.testing.assert_array_equal(got, whole[cut.rows, cut.cols])


@pytest.mark.parametrize(
    ("dtype", "nodata", "method"),
    [("int16", 0, "bilinear"), ("uint16", 7, "bilinear"), ("uint16", 0, "cubic")],
)
def test_what_whole_numbers_do_not_give_is_left_to_gdal(
    tmp_path: Path, dtype: str, nodata: int, method: Any
):
    values = np.random.default_rng(1).integers(8, 3000, (31, 33)).astype(dtype)
    path = write(tmp_path / "s.tif", values, 20)
    pixels = AssetReader().fetch(
        str(path), grid_of(Window(0, 0, 62, 66), 10), resampling=method, nodata=nodata
    )
    assert pixels.step == 1
    assert pixels.values.shape == (62, 66)


def test_pixels_of_one_step_are_as_they_are():
    values = np.arange(1, 31, dtype="int16").reshape(5, 6)
    pixels = Pixels(values=values, row=-2, col=3, nodata=-9)
    expected = np.full((6, 11), -9, dtype="int16")
    expected[:3, 3:9] = values[2:]
    np.testing.assert_array_equal(pixels.on_grid(Window(0, 0, 6, 11)), expected)
