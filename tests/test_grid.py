from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odc.geo.geobox import GeoBox
from shapely.geometry import Point, box

from stcln_geo.errors import InputError
from stcln_geo.grid import (
    Lattice,
    Window,
    absolute_window,
    bounds_window,
    crop_geobox,
    geobox_from_window,
    snapped_geobox,
    tiles,
    utm_crs,
    utm_zone_at,
    utm_zone_bounds,
    utm_zones,
)

areas = st.builds(
    Window, st.integers(-700, 700), st.integers(-700, 700), st.integers(1, 130), st.integers(1, 130)
)
lattices = st.builds(
    lambda stride, halo: Lattice(window=stride + 2 * halo, halo=halo),
    st.integers(1, 40),
    st.integers(0, 9),
)


@given(areas, lattices)
@settings(max_examples=60, deadline=None)
def test_cores_partition_any_area(area, lattice):
    owners = np.zeros(area.shape_yx, dtype=int)
    for core in lattice.cores(area):
        part = core.intersection(area).relative_to(area)
        owners[part.rows, part.cols] += 1
    assert (owners == 1).all()


@given(areas, areas, lattices)
@settings(max_examples=60, deadline=None)
def test_cores_do_not_depend_on_who_asks(first, second, lattice):
    shared = first.intersection(second)
    expected = {core for core in lattice.cores(first) if not core.intersection(shared).is_empty}
    assert set(lattice.cores(shared)) == expected


@given(areas, lattices)
@settings(max_examples=60, deadline=None)
def test_cover_holds_every_window(area, lattice):
    cover = lattice.cover(area)
    windows = [lattice.window_of(core) for core in lattice.cores(area)]
    assert all(cover.contains(window) for window in windows)
    assert all(window.shape_yx == (lattice.window, lattice.window) for window in windows)


@given(areas, areas)
def test_intersection_is_common_pixels(first, second):
    def cells(window):
        return {
            (row, col)
            for row in range(window.row, window.row + window.height)
            for col in range(window.col, window.col + window.width)
        }

    if abs(first.row - second.row) > 130 or abs(first.col - second.col) > 130:
        assert first.intersection(second).is_empty
    else:
        assert cells(first.intersection(second)) == cells(first) & cells(second)


@given(areas, st.integers(-9, 20), st.integers(-9, 20), st.integers(0, 30))
def test_shifts_and_growth_move_edges_and_nothing_else(window, rows, cols, pixels):
    def edges(one):
        return one.row, one.row + one.height, one.col, one.col + one.width

    top, bottom, left, right = edges(window)
    moved, grown = window.shift(rows, cols), window.expand(pixels)
    assert edges(moved) == (top + rows, bottom + rows, left + cols, right + cols)
    assert edges(grown) == (top - pixels, bottom + pixels, left - pixels, right + pixels)
    assert grown.expand(-pixels) == window
    assert moved.relative_to(window) == Window(rows, cols, *window.shape_yx)
    both = (min(top, top + rows), max(bottom, bottom + rows),
            min(left, left + cols), max(right, right + cols))  # fmt: skip
    assert edges(window.union(moved)) == both


def test_a_halo_that_leaves_no_core_is_refused():
    with pytest.raises(InputError, match="the core, window - 2 x halo, must be at least 1 px"):
        Lattice(window=8, halo=4)
    with pytest.raises(InputError, match="halo of -1 px"):
        Lattice(window=8, halo=-1)


def test_absolute_window_and_geobox_are_inverse():
    window = Window(-562244, 57468, 101, 203)
    geobox = geobox_from_window(window, crs="EPSG:32631", resolution=10)
    assert absolute_window(geobox) == window
    assert geobox.boundingbox.left == 574680
    assert geobox.boundingbox.top == 5622440
    part = Window(7, 11, 20, 30)
    assert absolute_window(crop_geobox(geobox, part)) == part.shift(window.row, window.col)


def test_grids_off_the_pixel_lattice_are_refused():
    from affine import Affine

    shifted = GeoBox((10, 10), Affine(10, 0, 574683, 0, -10, 5622440), "EPSG:32631")
    with pytest.raises(InputError, match="multiple of the 10 m pixel"):
        absolute_window(shifted)
    upside_down = GeoBox((10, 10), Affine(10, 0, 574680, 0, 10, 5622440), "EPSG:32631")
    with pytest.raises(InputError, match="north-up"):
        absolute_window(upside_down)


@pytest.mark.parametrize("origin", [(574680, 5621800), (300003.7, 8999991.2)])
@pytest.mark.parametrize(
    ("resolution", "step"), [(10, 6), (20, 3), (60, 1), (2.5, 24), (7, 1), (100, 1)]
)
def test_snapped_grid_starts_at_60_m_and_holds_whole_windows(origin, resolution, step):
    """Or at a whole pixel, where 60 m are none; and it is no larger than it must be."""
    left, bottom = origin
    area = box(left, bottom, left + 3013, bottom + 2027)
    lattice = Lattice(window=32, halo=4)
    geobox = snapped_geobox(area, crs="EPSG:32631", resolution=resolution, lattice=lattice)
    window = absolute_window(geobox)
    cover = lattice.cover(bounds_window(area.bounds, resolution=resolution))
    assert window.contains(cover)
    for first, least, length, least_length in (
        (window.row, cover.row, window.height, cover.height),
        (window.col, cover.col, window.width, cover.width),
    ):
        assert first % step == length % step == 0
        assert least - first < step
        assert first + length - (least + least_length) < step


@pytest.mark.parametrize("resolution", [10.0, 0.1, 60.0])
def test_bounds_take_the_pixels_they_touch_and_rounding_adds_none(resolution):
    window = Window(-560_033, 50_017, 7, 11)
    edges = np.array([50_017, 560_026, 50_028, 560_033]) * resolution
    for jitter in (-1e-7, 0.0, 1e-7):
        for grown in ((-1, 1, 1, 1), (1, 1, -1, -1), (-1, -1, 1, 1)):
            bounds = tuple(edges + jitter * resolution * np.array(grown))
            assert bounds_window(bounds, resolution=resolution) == window
    over = tuple(edges + 1e-3 * resolution * np.array([-1, -1, 1, 1]))
    assert bounds_window(over, resolution=resolution) == window.expand(1)
    place = (50_017.5 * resolution, 560_032.5 * resolution)
    assert bounds_window((*place, *place), resolution=resolution) == Window(-560_033, 50_017, 1, 1)


def test_tiles_partition_a_ragged_grid():
    owners = np.zeros((101, 203), dtype=int)
    for tile in tiles((101, 203), 32):
        owners[tile.rows, tile.cols] += 1
        assert not tile.is_empty
        assert Window(0, 0, 101, 203).contains(tile)
    assert (owners == 1).all()
    assert tiles((101, 203), 32)[6] == Window(0, 192, 32, 11)


@pytest.mark.parametrize(
    ("lon", "lat", "expected"),
    [(4.06, 50.7, "EPSG:32631"), (37.5, -8.0, "EPSG:32737"), (180.0, 10.0, "EPSG:32660")],
)
def test_utm_zone(lon, lat, expected):
    assert utm_crs(Point(lon, lat).buffer(1e-3)) == expected


@pytest.mark.parametrize("lon", [-180.0, -179.99, -6.0, -0.001, 0.0, 5.999, 6.0, 177.3, 179.999])
@pytest.mark.parametrize("lat", [-80.0, -0.001, 0.0, 60.5, 84.0])
def test_every_place_is_owned_by_one_zone(lon, lat):
    zone = utm_zone_at(lon, lat)
    west, south, east, north = utm_zone_bounds(zone)
    assert west <= lon < east
    assert south <= lat < north or (south == 0 and lat == 0)
    assert -90 <= south < north <= 90
    assert east - west == 6
    assert utm_zones(Point(lon, lat).buffer(1e-9)).count(zone) == 1


def test_zones_of_an_area_are_those_that_own_a_part_of_it():
    cross = ["EPSG:32631", "EPSG:32731", "EPSG:32632", "EPSG:32732"]
    assert utm_zones(box(5.9, -0.1, 6.1, 0.1)) == cross
    assert utm_zones(box(0, 50, 6, 51)) == ["EPSG:32631"]
    assert len(utm_zones(box(-180, 10, 180, 20))) == 60
    # What lies in a zone's band only by its bounding box is not in the zone.
    two = box(1, 50, 2, 51).union(box(13, 50, 14, 51))
    assert utm_zones(two) == ["EPSG:32631", "EPSG:32633"]
