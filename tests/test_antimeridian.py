"""The line at 180 degrees: nothing is lost, moved or doubled, whatever side it is drawn on."""

from __future__ import annotations

from typing import Any

import pytest
from shapely import LineString, MultiPolygon, Polygon, box, union_all
from shapely.affinity import translate

from stcln_geo.antimeridian import boxes_around, cut_at_antimeridian, split_at_antimeridian, wrapped
from stcln_geo.grid import Window, geobox_from_window
from stcln_geo.region import Region, footprint

FIJI = Polygon([(177.5, -18.5), (181.5, -19), (180.5, -16), (178, -16.5)])
ISLAND = box(20, -17, 21, -16)


def same(one: Any, other: Any) -> bool:
    return one.symmetric_difference(other).area < 1e-9


def test_of_several_parts_those_that_cross_are_split_and_the_others_stay():
    both = split_at_antimeridian(MultiPolygon([ISLAND, FIJI]))
    sides = [FIJI.intersection(box(170, -30, 180, 0)),
             translate(FIJI.intersection(box(180, -30, 190, 0)), xoff=-360)]  # fmt: skip
    assert same(both, union_all([ISLAND, *sides]))
    assert same(split_at_antimeridian(FIJI), union_all(sides))


def test_boxes_are_found_by_what_is_drawn_on_either_side_of_the_line():
    halves = [FIJI.intersection(box(170, -30, 180, 0)), FIJI.intersection(box(180, -30, 190, 0))]
    (west, south, _, north), (_, low, east, high) = (half.bounds for half in halves)
    # Each turn to the east or west has both boxes, side by side at its line.
    lines = [-180 - 360, -180, 180, 180 + 360]
    boxes = [box(line + west - 180, south, line, north) for line in lines[1:]]
    boxes += [box(line, low, line + east - 180, high) for line in lines[:-1]]
    assert same(boxes_around(FIJI), union_all(boxes))
    assert boxes_around(ISLAND.buffer(0.3)).equals(box(*ISLAND.buffer(0.3).bounds))


def test_a_ring_that_jumps_is_the_one_that_goes_on():
    """A comb of teeth across the line: their ups are long edges, and their downs short ones."""
    teeth = [(lon, 0.1 * (4 * n + k)) for n in range(60)
             for k, lon in enumerate((177.0, 182.0, 179.6, 177.1))]  # fmt: skip
    ring = [*teeth, (176.0, 24.0), (176.0, 0.0)]
    on, jumping = Polygon(ring), Polygon([((lon + 180) % 360 - 180, lat) for lon, lat in ring])
    expected = union_all(
        [on.intersection(box(170, -1, 180, 30)),
         translate(on.intersection(box(180, -1, 190, 30)), xoff=-360)]
    )  # fmt: skip
    assert same(split_at_antimeridian(on), expected)
    assert same(split_at_antimeridian(jumping), expected)


@pytest.mark.parametrize(
    "shape",
    [LineString([(179, 0), (181, 1)]), box(5e5, 4e6, 6e5, 5e6), box(-361, 0, -358, 1)],
    ids=["line", "metres", "farther"],
)
def test_what_is_no_polygon_in_degrees_stays_as_it_is(shape: Any):
    assert split_at_antimeridian(shape) is shape


@pytest.mark.parametrize("first", [-360.0, -270.5, -180.0, -1.0, 0.0, 179.5, 180.0, 359.0])
def test_longitudes_from_one_turn_to_the_other_find_their_place(first: float):
    shape = box(first, 40, first + 1, 41)
    west = (first + 180) % 360 - 180
    east = west + 1
    expected = box(west, 40, east, 41)
    if east > 180:
        expected = union_all([box(west, 40, 180, 41), box(-180, 40, east - 360, 41)])
    assert same(wrapped(shape), expected)
    assert same(split_at_antimeridian(shape), expected)


@pytest.mark.parametrize("half_width", [10, 89.5, 90.0])
def test_what_crosses_greenwich_stays_there(half_width: float):
    shape = box(-half_width, 40, half_width, 41)
    assert same(cut_at_antimeridian(shape), shape)


def test_a_grid_across_greenwich_has_its_footprint_there():
    # 67 km of zone 31 around 0 degrees east, 51 degrees north.
    grid = geobox_from_window(Window(-565_531, 25_431, 3001, 6701), crs="EPSG:32631", resolution=10)
    outline = footprint(grid)
    west, south, east, north = outline.bounds
    assert -1.5 < west < 0 < east < 1.5
    assert 50 < south < north < 52
    back = Region(geometry=outline, source="x").to_crs("EPSG:32631")
    whole = box(*grid.boundingbox.bbox)
    assert back.symmetric_difference(whole).area < 1e-4 * whole.area
