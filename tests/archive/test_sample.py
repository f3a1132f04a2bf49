"""Proposed sites: in their stratum, as many as asked for, apart from one another."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import rasterio
from pyproj import Geod, Transformer
from rasterio.transform import from_origin
from shapely.geometry import box

from stcln_geo.archive.ground import pixel_areas
from stcln_geo.archive.sample import allocate, sample_sites
from stcln_geo.archive.sites import place_site, read_sites
from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.region import Region


@pytest.fixture(scope="module")
def cover(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Land cover in degrees across a zone line: classes 10 (70 %), 20, 30 and nodata 0."""
    path = tmp_path_factory.mktemp("cover") / "cover.tif"
    rng = np.random.default_rng(5)
    codes = rng.choice([10, 20, 30], p=[0.7, 0.25, 0.05], size=(301, 403)).astype("uint8")
    codes[:40] = 0
    with rasterio.open(
        path, "w", driver="GTiff", width=403, height=301, count=1, dtype="uint8", nodata=0,
        crs="EPSG:4326", transform=from_origin(5.0, 51.0, 0.005, 0.005),
    ) as file:  # fmt: skip
        file.write(codes, 1)
    return path


def windows_apart(table: geopandas.GeoDataFrame, size: int) -> bool:
    sites = [place_site("", point.x, point.y, size=size) for point in table.geometry]
    return all(
        first.crs != second.crs or first.window.intersection(second.window).is_empty
        for first, second in itertools.combinations(sites, 2)
    )


@pytest.mark.parametrize("allocation", ["equal", "proportional"])
def test_points_lie_in_their_class_and_their_squares_apart(
    cover: Path, tmp_path: Path, allocation: Any
):
    report = sample_sites(
        cover, tmp_path / "s.gpkg", count=41, seed=3, size=320, allocation=allocation
    )
    table = geopandas.read_file(tmp_path / "s.gpkg")
    assert len(table) == 41
    assert report.short == {}
    with rasterio.open(cover) as file:
        codes = [int(next(file.sample([(p.x, p.y)]))[0]) for p in table.geometry]
    assert [str(code) for code in codes] == list(table["stratum"])
    counts = table["stratum"].value_counts().to_dict()
    assert counts == dict(report.found)
    if allocation == "equal":
        assert sorted(counts.values()) == [13, 14, 14]
    else:
        assert counts["10"] == pytest.approx(0.7 * 41, abs=1)
    assert {site.crs for site in read_sites(tmp_path / "s.gpkg", size=320)} == {
        "EPSG:32631", "EPSG:32632",
    }  # fmt: skip
    assert windows_apart(table, 320)
    assert not windows_apart(table, 20_00), "the test would not notice an overlap"
    assert (tmp_path / "s.png").stat().st_size > 5_000


def test_the_seed_decides(cover: Path, tmp_path: Path):
    tables = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample_sites(cover, tmp_path / f"{name}.gpkg", count=12, seed=seed)
        tables.append(geopandas.read_file(tmp_path / f"{name}.gpkg"))
    assert tables[0].equals(tables[1])
    assert not tables[0].geometry.equals(tables[2].geometry)


def test_draws_are_uniform_by_area(tmp_path: Path):
    # In degrees a row of pixels at 60 N covers half as much ground as one at the equator.
    with rasterio.open(
        tmp_path / "n.tif", "w", driver="GTiff", width=20, height=160, count=1, dtype="uint8",
        crs="EPSG:4326", transform=from_origin(0, 80, 0.5, 0.5),
    ) as file:  # fmt: skip
        file.write(np.ones((160, 20), "uint8"), 1)
    sample_sites(tmp_path / "n.tif", tmp_path / "n.gpkg", count=600, size=16)
    lat = geopandas.read_file(tmp_path / "n.gpkg").geometry.y
    # Half the area between 0 and 80 N lies south of 29.5 N.
    expected = np.sin(np.radians(29.5)) / np.sin(np.radians(80))
    assert (lat < 29.5).mean() == pytest.approx(expected, abs=0.07)
    assert abs((lat < 40).mean() - 0.5) > 0.1


def test_draws_are_uniform_by_area_on_a_grid_of_mercator_too(tmp_path: Path):
    # Half the area between the equator and 66.5 N lies south of 27.3 N; of the grid, a third does.
    side = 10_000.0
    with rasterio.open(
        tmp_path / "n.tif", "w", driver="GTiff", width=41, height=1000, count=1, dtype="uint8",
        crs="EPSG:3857", transform=from_origin(0, 1000 * side, side, side),
    ) as file:  # fmt: skip
        file.write(np.ones((1000, 41), "uint8"), 1)
    sample_sites(tmp_path / "n.tif", tmp_path / "n.gpkg", count=600, size=16)
    lat = geopandas.read_file(tmp_path / "n.gpkg").geometry.y
    assert lat.max() < 66.6
    for south in (15.0, 27.3, 45.0):
        expected = np.sin(np.radians(south)) / np.sin(np.radians(66.5))
        assert (lat < south).mean() == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("crs", "west", "north", "side"),
    [
        ("EPSG:3857", 1_000_000.0, 8_000_000.0, 1000.0),
        ("EPSG:32631", 400_000.0, 5_000_000.0, 500.0),
        ("EPSG:32760", 680_000.0, 4_000_000.0, 500.0),
        ("EPSG:3035", 4_000_000.0, 3_000_000.0, 300.0),
    ],
    ids=["Mercator", "UTM", "over the antimeridian", "equal area"],
)
def test_areas_on_the_ground_are_those_of_geodesics(crs, west, north, side):
    shape = (70, 97)
    areas = pixel_areas(crs, from_origin(west, north, side, side), shape)
    assert areas.shape == shape
    change = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    for row, col in ((0, 0), (33, 40), (69, 96)):
        x = west + side * (col + np.array([0, 1, 1, 0]))
        y = north - side * (row + np.array([0, 0, 1, 1]))
        oracle = abs(Geod(ellps="WGS84").polygon_area_perimeter(*change.transform(x, y))[0])
        assert areas[row, col] == pytest.approx(oracle, rel=0.01)


@pytest.fixture
def polygons(tmp_path: Path) -> Path:
    shapes = [box(4, 50, 4.5, 50.2), box(4.6, 50, 4.7, 50.1), box(5, 50, 5.1, 50.2)]
    geopandas.GeoDataFrame(
        {"zone": ["north", "south", "north"]}, geometry=shapes, crs="EPSG:4326"
    ).to_file(tmp_path / "z.gpkg")
    return tmp_path / "z.gpkg"


def test_points_lie_in_polygons_of_their_value(polygons: Path, tmp_path: Path):
    region = Region.from_bbox((4.2, 49.9, 5.05, 50.15))
    sample_sites(polygons, tmp_path / "s.gpkg", count=25, column="zone", region=region, size=64)
    found = geopandas.read_file(tmp_path / "s.gpkg")
    table = geopandas.read_file(polygons)
    assert found["stratum"].value_counts().to_dict() == {"north": 13, "south": 12}
    for row in found.itertuples():
        inside = table[table["zone"] == row.stratum].geometry
        assert any(shape.distance(row.geometry) < 1e-9 for shape in inside)
        assert region.geometry.contains(row.geometry)
    assert windows_apart(found, 64)
    both = found[found["stratum"] == "north"].geometry.x
    assert (both < 4.5).any()
    assert (both > 5).any()


def test_a_stratum_without_room_is_said(polygons: Path, tmp_path: Path):
    report = sample_sites(polygons, tmp_path / "s.gpkg", count=60, column="zone", size=512)
    found, wanted = report.short["south"]
    assert 0 < found < wanted == 30
    assert windows_apart(geopandas.read_file(tmp_path / "s.gpkg"), 512)


def test_shares_add_up():
    rng = np.random.default_rng(0)
    for count in (1, 7, 40, 1000):
        areas = {str(number): float(area) for number, area in enumerate(rng.random(6) ** 3)}
        for kind in ("equal", "proportional"):
            shares = allocate(areas, count, kind)
            assert sum(shares.values()) == count
            total = sum(areas.values())
            part = {
                name: areas[name] / total if kind == "proportional" else 1 / 6 for name in areas
            }
            assert all(abs(shares[name] - part[name] * count) < 1 for name in areas)


def test_bad_input_is_named(cover: Path, polygons: Path, tmp_path: Path):
    out = tmp_path / "o.gpkg"
    with pytest.raises(MissingFileError, match="no such file"):
        sample_sites(tmp_path / "x.tif", out, count=3)
    with pytest.raises(InputError, match=r"column 'crop'.*it has zone.*--column"):
        sample_sites(polygons, out, count=3, column="crop")
    with pytest.raises(InputError, match=r"Name it o.gpkg"):
        sample_sites(polygons, tmp_path / "o.csv", count=3)
    with pytest.raises(InputError, match="--count 1 or more"):
        sample_sites(polygons, out, count=0)
    with pytest.raises(InputError, match="equal or proportional"):
        sample_sites(polygons, out, count=3, allocation="fair")  # type: ignore[arg-type]
    far = Region.from_bbox((20, 10, 21, 11))
    with pytest.raises(InputError, match="no class lies in the region"):
        sample_sites(cover, out, count=3, region=far)
    with pytest.raises(InputError, match="no class lies in the region"):
        sample_sites(polygons, out, count=3, region=far)
    (tmp_path / "table.csv").write_text("value,name\n1,wheat\n")
    with pytest.raises(InputError, match="table without geometry"):
        sample_sites(tmp_path / "table.csv", out, count=3)
    with pytest.raises(InputError, match="--seed -1: it must be 0 or more"):
        sample_sites(cover, out, count=3, seed=-1)
    (tmp_path / "bad.gpkg").write_text("no")
    with pytest.raises(InputError, match="must be a raster"):
        sample_sites(tmp_path / "bad.gpkg", out, count=3)
    with rasterio.open(
        tmp_path / "float.tif", "w", driver="GTiff", width=2, height=2, count=1, dtype="float32",
        transform=from_origin(5.0, 51.0, 1, 1),
    ) as file:  # fmt: skip
        file.write(np.ones((2, 2), "float32"), 1)
    with pytest.raises(InputError, match=r"has float32 and no CRS"):
        sample_sites(tmp_path / "float.tif", out, count=3)
