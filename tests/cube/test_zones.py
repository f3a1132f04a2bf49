"""A region across two UTM zones: one cube per zone, which meet without a seam."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyproj import Transformer
from scipy.ndimage import map_coordinates

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube.append import plan_append
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.plan import CubeSpec, plan_cube, plan_zones
from stcln_geo.cube.request import SearchRequest, find_items, request_of
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import Season, open_season
from stcln_geo.errors import InputError
from stcln_geo.grid import utm_zone_at
from stcln_geo.region import Region

WEST, EAST = "EPSG:32631", "EPSG:32632"
ORIGINS = {WEST: (711600, 5599320), EAST: (286820, 5599260)}
"""The line between the zones, 6 E, is at x = 712745 and x = 287255; both scenes cross it."""

SHAPE = (158, 166)
REGION = Region.from_bbox((5.9885, 50.4945, 6.0115, 50.5045))


def field(lon: np.ndarray, lat: np.ndarray) -> np.ndarray:
    """A smooth field: about 60 per pixel eastward, and waves of about 40 pixels."""
    slope = 10_000 + 4.2e5 * (lon - 6.0) + 1.5e5 * (lat - 50.5)
    return slope + 600 * np.sin((lon - 6.0) * 1000) * np.cos((lat - 50.5) * 1000)


def field_on(crs: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return field(*Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y))


def centres(season: Season) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of a season's pixel centres, (H, W) each."""
    affine = season.geobox.affine
    rows, cols = np.indices(season.shape_yx) + 0.5
    return affine.c + 10 * cols, affine.f - 10 * rows


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A catalog of two scenes of one day, each in its zone, that measured the field."""
    from .conftest import Archive

    archive = Archive(tmp_path_factory.mktemp("line") / "archive")
    for number, (crs, (left, top)) in enumerate(ORIGINS.items()):
        rows, cols = np.indices(SHAPE) + 0.5
        values = np.rint(field_on(crs, left + 10 * cols, top - 10 * rows)).astype("uint16")
        archive.add(
            f"S_{number}", f"2019-03-01T10:50:{number}0", pixels={"red": values}, crs=crs,
            scl=np.full((SHAPE[0] // 2, SHAPE[1] // 2), 4, "uint8"), origin=(left, top),
            properties={"grid:code": f"MGRS-3{number + 1}UFS"},
        )  # fmt: skip
    return archive


@pytest.fixture(scope="module")
def cubes(line: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Season]:
    folder = tmp_path_factory.mktemp("zones")
    snapshot = search_items(load_catalog(line.location), region=REGION)
    built = {}
    for zone, plan in plan_zones(snapshot, REGION).items():
        build_cube(plan, folder / f"{zone[-5:]}.zarr")
        built[zone] = open_season(folder / f"{zone[-5:]}.zarr")
    return built


def own_scene(season: Season, zone: str) -> np.ndarray:
    """Return where the zone's own scene lies, (H, W) bool."""
    x, y = centres(season)
    left, top = ORIGINS[zone]
    height, width = SHAPE
    inside = (x > left) & (x < left + 10 * width) & (y < top) & (y > top - 10 * height)
    return inside


def interpolated(
    zone: str, values: np.ndarray, season: Season, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    affine = season.geobox.affine
    rows, cols = (affine.f - y) / 10 - 0.5, (x - affine.c) / 10 - 0.5
    return map_coordinates(values.astype(float), [rows, cols], order=1, mode="nearest")


@pytest.mark.parametrize(("here", "there"), [(WEST, EAST), (EAST, WEST)], ids=["west", "east"])
def test_a_smooth_field_meets_across_the_line(cubes: dict[str, Season], here: str, there: str):
    mine, theirs = cubes[here], cubes[there]
    x, y = centres(theirs)
    seen = theirs.valid[0] & own_scene(theirs, there)
    x_here, y_here = Transformer.from_crs(there, here, always_xy=True).transform(x, y)
    # The places of their pixels around which all four of mine are of my own scene.
    left, top = ORIGINS[here]
    seen &= (x_here > left + 10) & (x_here < left + 10 * SHAPE[1] - 10)
    seen &= (y_here < top - 10) & (y_here > top - 10 * SHAPE[0] + 10)
    affine, (height, width) = mine.geobox.affine, mine.shape_yx
    seen &= (x_here > affine.c + 10) & (x_here < affine.c + 10 * width - 10)
    seen &= (y_here < affine.f - 10) & (y_here > affine.f - 10 * height + 10)
    lon, lat = Transformer.from_crs(there, "EPSG:4326", always_xy=True).transform(x, y)
    assert (lon[seen] < 6 - 0.003).sum() > 1000
    assert (lon[seen] > 6 + 0.003).sum() > 1000

    sampled = interpolated(here, mine.reflectance[0, 0], mine, x_here, y_here)
    exact = interpolated(here, np.rint(field_on(here, *centres(mine))), mine, x_here, y_here)
    own_error = np.abs(exact - field(lon, lat))[seen].max()
    assert 1 < own_error < 10
    difference = np.abs(sampled - theirs.reflectance[0, 0])[seen]
    assert difference.max() <= own_error + 0.5  # their number is rounded


@pytest.mark.parametrize("zone", [WEST, EAST])
def test_each_cube_measures_the_field(cubes: dict[str, Season], zone: str):
    season = cubes[zone]
    own, valid = own_scene(season, zone), season.valid[0]
    truth = field_on(zone, *centres(season))
    values = season.reflectance[0, 0]
    assert own.sum() > 5000
    np.testing.assert_array_equal(values[own], np.rint(truth[own]))
    # Beyond its own scene a cube takes the other zone's, warped.
    other = EAST if zone == WEST else WEST
    x, y = Transformer.from_crs(zone, other, always_xy=True).transform(*centres(season))
    left, top = ORIGINS[other]
    warped = ~own & (x > left + 10) & (x < left + 10 * SHAPE[1] - 10)
    warped &= (y < top - 10) & (y > top - 10 * SHAPE[0] + 10)
    assert warped.sum() > 500
    assert valid[warped].all()
    assert np.abs(values[warped] - truth[warped]).max() < 8  # half a pixel would be 30


def test_what_a_zone_owns_and_a_window_more_is_in_its_cube(cubes: dict[str, Season]):
    generator = np.random.default_rng(2)
    west, south, east, north = REGION.geometry.bounds
    lon, lat = generator.uniform(west, east, 4000), generator.uniform(south, north, 4000)
    owners = np.array([utm_zone_at(*place) for place in zip(lon, lat, strict=True)])
    assert set(owners) == {WEST, EAST}
    for zone, season in cubes.items():
        x, y = Transformer.from_crs("EPSG:4326", zone, always_xy=True).transform(lon, lat)
        rows = np.floor((season.geobox.affine.f - y) / 10).astype(int)
        cols = np.floor((x - season.geobox.affine.c) / 10).astype(int)
        owned = owners == zone
        near = owned & (np.abs(lon - 6) < 0.001)
        assert near.sum() > 50
        for shift in (-32, 32):
            assert ((cols[near] + shift >= 0) & (cols[near] + shift < season.shape_yx[1])).all()
        assert season.valid[0][rows[owned], cols[owned]].all()


def test_auto_is_one_cube_in_the_zone_of_the_centre(line: Any):
    snapshot = search_items(load_catalog(line.location), region=REGION)
    mostly_east = Region.from_bbox((5.9985, 50.4945, 6.0115, 50.5045))
    assert plan_cube(snapshot, mostly_east).crs == EAST
    assert list(plan_zones(snapshot, mostly_east)) == [WEST, EAST]
    only_east = Region.from_bbox((6.0, 50.4945, 6.0115, 50.5045))
    assert list(plan_zones(snapshot, only_east)) == [EAST]
    assert list(plan_zones(snapshot)) == [WEST, EAST]
    with pytest.raises(InputError, match=r"in EPSG:32631.*Leave --crs out"):
        plan_zones(snapshot, REGION, CubeSpec(crs=WEST))


def test_the_commands_build_a_cube_per_zone(line: Any, tmp_path: Path, capsys: Any):
    out = str(tmp_path / "r.zarr")
    common = ["--catalog", line.location, "--bbox", "5.9885,50.4945,6.0115,50.5045", out,
              "--per-zone"]  # fmt: skip
    assert invoke(["cube", "plan", *common]) == 0
    text = capsys.readouterr().out
    assert "Grid        EPSG:32631" in text
    assert "Grid        EPSG:32632" in text
    assert "in EPSG:32632" in text
    assert invoke(["cube", "build", *common]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r-32631.zarr", "r-32632.zarr"]
    capsys.readouterr()
    assert invoke(["cube", "build", *common]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert invoke(["cube", "build", *common, "--crs", "EPSG:32631"]) == 2
    assert "Leave --crs out, or --per-zone" in " ".join(capsys.readouterr().err.split())


def test_append_knows_the_days_of_a_zones_part(archive: Any, tmp_path: Path):
    # At the antimeridian the sun's day of the whole region is not that of its part in zone 60.
    def add(day: str) -> None:
        for number, crs, left in ((60, "EPSG:32760", 817440), (1, "EPSG:32701", 178540)):
            archive.add(
                f"S_{number}_{day}", f"{day}T22:20:00", crs=crs, origin=(left, 8120000),
                pixels={"red": np.full((400, 400), number + int(day[-2:]), "uint16")},
                properties={"grid:code": f"MGRS-{number:02d}KAB"},
            )  # fmt: skip

    add("2019-03-01")
    region = Region.from_bbox((179.995, -17.01, -179.985, -16.99))
    search = SearchRequest(catalog=archive.location, region=region, time="../2019-03-31")
    snapshot = find_items(search, CubeSpec())
    plans = plan_zones(snapshot, region)
    assert set(plans) == {"EPSG:32760", "EPSG:32701"}
    for zone, plan in plans.items():
        request = {**request_of(search, CubeSpec()), "zone": zone}
        build_cube(dataclasses.replace(plan, request=request), tmp_path / f"{zone[-5:]}.zarr")
    add("2019-04-10")
    for zone in plans:
        (change,) = plan_append(tmp_path / f"{zone[-5:]}.zarr", "2019-04-30").changes
        assert (change.new_dates, change.changed_dates) == (1, 0)
