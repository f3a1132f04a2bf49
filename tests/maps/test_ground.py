"""Areas on the ground: the oracle is the geodesic area of each pixel's own outline."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from affine import Affine
from pyproj import Geod, Transformer
from rasterio.features import rasterize

from stcln_geo.maps.ground import ground_areas

GRIDS = {
    "mercator": ("EPSG:3395", Affine(100, 0, 1_203_000, 0, -100, 8_402_000)),
    "zones away": ("EPSG:32631", Affine(90, 0, 1_200_000, 0, -90, 5_600_000)),
    "feet": ("EPSG:2263", Affine(300, 0, 990_000, 0, -250, 210_000)),
}


def geodesic(crs: str, transform: Affine, row: int, col: int) -> float:
    """Return the area (square metres) of a pixel on the ellipsoid."""
    corners = np.array([(col, row), (col + 1, row), (col + 1, row + 1), (col, row + 1)], float)
    x, y = transform @ corners.T
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    return abs(Geod(ellps="GRS80").polygon_area_perimeter(lon, lat)[0])


@pytest.mark.parametrize("name", GRIDS)
def test_a_square_of_pixels_has_the_area_of_those_in_its_middle(name: str) -> None:
    crs, transform = GRIDS[name]
    height, width = 131, 203
    found = ground_areas(crs, transform, (height, width))
    side = found.side
    rows, cols = np.arange(height), np.arange(width)
    for top in range(0, height, side):
        for left in range(0, width, side):
            # Four pixels meet in the middle; of a square cut at the edge, what is within.
            middle = [min(top + side // 2, height - 1), min(left + side // 2, width - 1)]
            around = [
                geodesic(crs, transform, max(middle[0] - down, 0), max(middle[1] - right, 0))
                for down in (0, 1) for right in (0, 1)
            ]  # fmt: skip
            within = np.ix_(rows[top : top + side], cols[left : left + side])
            at = found.at(*np.broadcast_arrays(*within))
            assert (at == at[0, 0]).all()
            assert at[0, 0] == pytest.approx(np.mean(around), rel=3e-5)
    whole = found.at(*np.indices((height, width)))
    for row in (0, 63, 64, 130):
        assert np.array_equal(found.of_row(row), whole[row])


def test_a_raster_of_many_pixels_has_larger_squares() -> None:
    crs, transform = GRIDS["mercator"]
    found = ground_areas(crs, transform, (40_000, 3))
    assert found.side == 79, "40,000 rows in at most 512 squares"
    assert found.pixel.shape == (507, 1)
    for row in (39, 39_999):
        expected = geodesic(crs, transform, row, 1)
        assert found.of_row(row) == pytest.approx([expected] * 3, rel=1e-3)


@pytest.mark.parametrize("shape", [(128, 192), (131, 203)], ids=["whole squares", "ragged"])
@pytest.mark.parametrize("name", GRIDS)
def test_an_outline_has_the_area_of_the_pixels_within(name: str, shape: tuple[int, int]) -> None:
    found = ground_areas(*GRIDS[name], shape)
    areas = found.at(*np.indices(shape))
    rng = np.random.default_rng(5)
    ends = np.sort(rng.integers(0, (shape[1] + 1, shape[0] + 1), (40, 2, 2)), axis=1)
    blobs = shapely.union_all([shapely.box(*one[0], *one[1]) for one in ends[:9]])
    gaps = shapely.union_all([shapely.box(*one[0], *(one[0] + 3)) for one in ends])
    outlines = [
        shapely.box(0, 0, shape[1], shape[0]), shapely.box(shape[1] - 1, 0, shape[1], shape[0]),
        *(one for one in shapely.get_parts(blobs - gaps) if one.area),
    ]  # fmt: skip
    assert any(one.interiors for one in outlines)
    measure = found.measure()
    for outline in outlines:
        inside = rasterize([outline], out_shape=shape) == 1
        assert measure(outline) == pytest.approx(areas[inside].sum(), rel=1e-9)
