"""Laws of who owns which pixel."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest
import shapely

from stcln_geo.grid import Lattice, Window
from stcln_geo.predict.stitch import cut_lines, group_pieces, pieces_of, region_mask

AREA = Window(-560_033, 50_017, 101, 75)


def shards_of(area: Window, size: int, stride: int) -> list[Window]:
    rows = cut_lines(area.row, area.height, size=size, stride=stride)
    cols = cut_lines(area.col, area.width, size=size, stride=stride)
    return [
        Window(top, left, bottom - top, right - left)
        for top, bottom in pairwise(rows)
        for left, right in pairwise(cols)
    ]


@pytest.mark.parametrize("size", [1, 5, 8, 13, 64, 96, 4096])
@pytest.mark.parametrize("lattice", [Lattice(window=16, halo=4), Lattice(window=13, halo=1)])
def test_owned_pixels_partition_the_area(size: int, lattice: Lattice) -> None:
    counts = np.zeros(AREA.shape_yx, dtype=int)
    for shard in shards_of(AREA, size, lattice.stride):
        for piece in pieces_of(shard, lattice, np.ones(shard.shape_yx, dtype=bool)):
            inside = piece.owned.relative_to(AREA)
            counts[inside.rows, inside.cols] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize("size", [5, 13, 64])
def test_a_pixel_is_labelled_by_the_same_window_whatever_the_shards(size: int) -> None:
    lattice = Lattice(window=16, halo=4)

    def seen_from(shards: list[Window]) -> dict[tuple[int, int], Window]:
        owners = {}
        for shard in shards:
            for piece in pieces_of(shard, lattice, np.ones(shard.shape_yx, dtype=bool)):
                assert piece.seen.contains(piece.owned.expand(lattice.halo))
                for row in range(piece.owned.row, piece.owned.row + piece.owned.height):
                    for col in range(piece.owned.col, piece.owned.col + piece.owned.width):
                        owners[row, col] = piece.seen
        return owners

    assert seen_from(shards_of(AREA, size, lattice.stride)) == seen_from([AREA])


@pytest.mark.parametrize("size", [8, 50, 64])
def test_small_shards_cut_along_the_lattice_so_that_no_window_runs_twice(size: int) -> None:
    lattice = Lattice(window=16, halo=4)
    whole = len(pieces_of(AREA, lattice, np.ones(AREA.shape_yx, dtype=bool)))
    parts = sum(
        len(pieces_of(shard, lattice, np.ones(shard.shape_yx, dtype=bool)))
        for shard in shards_of(AREA, size, lattice.stride)
    )
    assert parts == whole


@pytest.mark.parametrize("size", [1, 8, 13, 50, 64])
@pytest.mark.parametrize("stride", [8, 11])
def test_shards_are_about_as_large_as_asked(size: int, stride: int) -> None:
    for start, length in ((-560_033, 101), (50_017, 275), (3, 1)):
        lines = cut_lines(start, length, size=size, stride=stride)
        assert (lines[0], lines[-1]) == (start, start + length)
        assert all(line % stride == 0 for line in lines[1:-1])
        assert all(0 < last - first < size + stride for first, last in pairwise(lines))


def test_shards_of_4096_px_count_from_the_start() -> None:
    assert cut_lines(-5, 9000, size=4096, stride=24) == [-5, 4091, 8187, 8995]


def test_windows_without_a_wanted_pixel_are_left_out() -> None:
    lattice = Lattice(window=16, halo=4)
    wanted = np.zeros(AREA.shape_yx, dtype=bool)
    assert pieces_of(AREA, lattice, wanted) == []
    wanted[50, 33] = True
    (piece,) = pieces_of(AREA, lattice, wanted)
    assert piece.owned.contains(Window(AREA.row + 50, AREA.col + 33, 1, 1))


@pytest.mark.parametrize("size", [1, 20, 64, 1000])
def test_groups_hold_every_window_once_and_all_it_sees(size: int) -> None:
    lattice = Lattice(window=16, halo=4)
    pieces = pieces_of(AREA, lattice, np.ones(AREA.shape_yx, dtype=bool))
    groups = group_pieces(pieces, size=size, stride=lattice.stride)
    members = [piece for group in groups for piece in group.pieces]
    assert sorted(members, key=lambda piece: (piece.seen.row, piece.seen.col)) == pieces
    for group in groups:
        assert all(group.area.contains(piece.seen) for piece in group.pieces)
        assert all(group.cell.contains(piece.core) for piece in group.pieces)
        side = max(size, lattice.stride) + 2 * lattice.halo
        assert max(group.area.shape_yx) <= side


def test_the_mask_asks_each_pixel_centre() -> None:
    top, left = -AREA.row * 10.0, AREA.col * 10.0
    geometry = shapely.Polygon(
        [
            (left + 3, top - 4),
            (left + 741, top - 97),
            (left + 400, top - 1003),
            (left + 45, top - 600),
        ],
        [[(left + 200, top - 200), (left + 300, top - 205), (left + 250, top - 405)]],
    )
    mask = region_mask(geometry, AREA, resolution=10.0)
    for row in range(AREA.height):
        for col in range(AREA.width):
            centre = shapely.Point(left + col * 10 + 5, top - row * 10 - 5)
            assert mask[row, col] == geometry.intersects(centre)
    assert 0 < mask.sum() < mask.size


def test_the_mask_asks_each_pixel_centre_also_over_squares_wholly_in_or_out() -> None:
    window = Window(-5_111, 730, 301, 203)
    top, left = -window.row * 10.0, window.col * 10.0
    holed = shapely.Polygon(
        [(left + 31, top + 40), (left + 1901, top - 97), (left + 1500, top - 3100)],
        [[(left + 1005, top - 999), (left + 1012, top - 999), (left + 1012, top - 1400)]],
    )
    speck = shapely.box(left + 196, top - 2806, left + 219, top - 2784)
    mask = region_mask(holed.union(speck), window, resolution=10.0)
    x = left + 10 * np.arange(203) + 5
    y = top - 10 * np.arange(301) - 5
    expected = shapely.intersects_xy(holed.union(speck), *np.meshgrid(x, y))
    assert np.array_equal(mask, expected)


def test_the_mask_of_a_rectangle_is_that_rectangle_wherever_squares_end() -> None:
    window = Window(-5_111, 730, 193, 157)
    top, left = -window.row * 10.0, window.col * 10.0
    firsts, ends = (0, 1, 63, 64, 65), (127, 128, 129, 157)
    for first, end, begin, stop in itertools.product(firsts, ends, firsts, ends):
        part = shapely.box(
            left + 10 * begin + 1, top - 10 * end + 1, left + 10 * stop - 1, top - 10 * first - 1
        )
        expected = np.zeros(window.shape_yx, dtype=bool)
        expected[first:end, begin:stop] = True
        assert np.array_equal(region_mask(part, window, resolution=10.0), expected)


def test_the_mask_of_a_part_is_the_part_of_the_mask() -> None:
    """Also where edges run through pixel centres, as those of snapped boxes may."""
    top, left = -AREA.row * 10.0, AREA.col * 10.0
    geometry = shapely.box(left + 5, top - 905, left + 655, top - 15)
    whole = region_mask(geometry, AREA, resolution=10.0)
    for shard in shards_of(AREA, 17, 8):
        inside = shard.relative_to(AREA)
        part = region_mask(geometry, shard, resolution=10.0)
        assert np.array_equal(part, whole[inside.rows, inside.cols])
