"""Fields burnt by strips: the oracle is rasterio on the whole grid at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import shapely
from affine import Affine
from rasterio.features import rasterize
from scipy import ndimage

from stcln_geo.cube.burnt import burn_fields

SHAPE = (101, 83)
GRIDS = {
    "metres": Affine(10, 0, 573_000, 0, -10, 5_625_000),
    "degrees": Affine(0.0001, 0, 3.1234, 0, -0.0001, 51.2),
    "south first": Affine(0.0001, 0, 3.1234, 0, 0.0001, 51.2),
}


def outlines(grid: Affine, *, seed: int = 3) -> np.ndarray:
    """Blobs, and boxes, triangles and bow ties whose sides run exactly through pixels' centres."""
    rng = np.random.default_rng(seed)
    corner = np.round(rng.uniform(-12, 105, (80, 2)) * 2) / 2
    sides = np.round(rng.uniform(0.5, 25, (80, 2)) * 2) / 2
    (x, y), (w, h) = corner.T, sides.T

    def rings(*points: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return shapely.polygons(np.stack([np.stack(pair, axis=1) for pair in points], axis=1))

    found = np.concatenate([
        shapely.box(x, y, x + w, y + h),
        rings((x, y), (x + w, y + h), (x + w, y - h), (x, y)),
        rings((x, y), (x + w, y + h), (x + w, y), (x, y + h), (x, y)),
        shapely.buffer(shapely.points(rng.uniform(-5, 100, (80, 2))), rng.uniform(0.1, 20, 80)),
    ])  # fmt: skip
    return shapely.transform(
        rng.permutation(found), lambda points: np.column_stack(grid @ points.T)
    )


def eroded(numbers: np.ndarray, times: int) -> np.ndarray:
    """Keep pixels whose neighbours are of their field, the edge of the grid being no border."""
    for _ in range(times):
        same = [op(numbers, 3, mode="nearest") for op in (ndimage.minimum_filter,
                                                           ndimage.maximum_filter)]  # fmt: skip
        numbers = np.where(same[0] == same[1], numbers, 0)
    return numbers


@pytest.mark.parametrize("strip", [17, 64, 512])
@pytest.mark.parametrize("erode", [0, 1, 3])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_strips_are_the_whole_raster(grid, erode, strip):
    shapes = outlines(grid)
    whole = rasterize(
        zip(shapes, range(1, len(shapes) + 1), strict=True), out_shape=SHAPE, transform=grid,
        dtype="int32",
    )  # fmt: skip
    whole = eroded(whole, erode)
    burnt = burn_fields(shapes, grid, SHAPE, erode=erode, strip=strip)
    numbers = burnt.through(np.arange(len(shapes) + 1, dtype=np.int32))
    assert np.array_equal(numbers[:], whole)
    assert np.array_equal(numbers[9:40], whole[9:40])
    assert np.array_equal(burnt.pixels, np.bincount(whole.ravel(), minlength=len(shapes) + 1)[1:])
    codes = np.arange(len(shapes) + 1).astype(np.uint8)[::-1]
    found = burnt.through(codes)
    assert (found.shape, found.dtype) == (SHAPE, np.uint8)
    assert np.array_equal(found[:], codes[whole])
    assert found[3:5].dtype == np.uint8
    assert found[9:9].shape == found[40:9].shape == found[500:].shape == (0, 83)


def test_touched_pixels_are_those_of_the_whole_raster():
    grid = GRIDS["metres"]
    rng = np.random.default_rng(7)
    shapes = shapely.buffer(shapely.points(rng.uniform(-5, 100, (60, 2))), rng.uniform(0.1, 9, 60))
    shapes = shapely.transform(shapes, lambda points: np.column_stack(grid @ points.T))
    whole = rasterize(
        zip(shapes, range(1, 61), strict=True), out_shape=SHAPE, transform=grid, dtype="int32",
        all_touched=True,
    )  # fmt: skip
    burnt = burn_fields(shapes, grid, SHAPE, all_touched=True, strip=17)
    assert np.array_equal(burnt.through(np.arange(61, dtype=np.int32))[:], whole)


def test_the_raster_is_never_in_memory():
    grid, shape = GRIDS["metres"], (3001, 1103)
    x, y = (axis.ravel() * 160.0 for axis in np.meshgrid(np.arange(68), np.arange(187)))
    shapes = shapely.box(grid.c + x, grid.f - y - 150, grid.c + x + 150, grid.f - y)[::40]
    tracemalloc.start()
    burnt = burn_fields(shapes, grid, shape, erode=1, strip=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert burnt.pixels.sum() > 40_000
    assert 4 * shape[0] * shape[1] > 5 * peak
