"""Where sites lie, and what is said of bad ones."""

from __future__ import annotations

from pathlib import Path

import geopandas
import numpy as np
import pandas
import pyogrio
import pytest
from pyproj import Transformer
from shapely.geometry import LineString, Point, box

from stcln_geo.archive.sites import mgrs_cell, place_site, read_sites
from stcln_geo.archive.spec import ArchiveSpec, parse_seasons
from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.grid import geobox_from_window
from stcln_geo.region import footprint


@pytest.mark.parametrize(
    ("lon", "lat", "tile"),
    [(2.35, 48.85, "31UDQ"), (-74.0, 40.72, "18TWL"), (151.2, -33.87, "56HLH"),
     (36.82, -1.29, "37MBU")],
    ids=["paris", "new-york", "sydney", "nairobi"],
)  # fmt: skip
def test_cells_are_the_tiles_of_sentinel_2(lon: float, lat: float, tile: str):
    site = place_site("a", lon, lat, size=128)
    x, y = Transformer.from_crs("EPSG:4326", site.crs, always_xy=True).transform(lon, lat)
    assert mgrs_cell(site.crs, x, y) == site.cell == tile


@pytest.mark.parametrize(("size", "resolution"), [(48, 10.0), (128, 20.0), (2560, 10.0), (64, 7.0)])
def test_a_site_lies_around_its_point_on_the_pixels_of_its_zone(size: int, resolution: float):
    rng = np.random.default_rng(0)
    for lon, lat in zip(rng.uniform(-180, 180, 40), rng.uniform(-79, 83, 40), strict=True):
        site = place_site("a", float(lon), float(lat), size=size, resolution=resolution)
        assert site.crs[-2:] == f"{int((lon + 180) // 6) + 1:02d}"
        assert site.window.shape_yx == (size, size)
        x, y = Transformer.from_crs("EPSG:4326", site.crs, always_xy=True).transform(lon, lat)
        bounds = site.geobox.boundingbox
        step = 60 if 60 % resolution == 0 else resolution
        assert abs((bounds.left + bounds.right) / 2 - x) <= step / 2 + 1e-6
        assert abs((bounds.bottom + bounds.top) / 2 - y) <= step / 2 + 1e-6
        for edge in (bounds.left, bounds.top):
            assert edge / step == pytest.approx(round(edge / step), abs=1e-6)


def test_the_footprint_agrees_with_the_corners_and_is_cut_at_the_antimeridian():
    site = place_site("a", 4.0, 50.0, size=512)
    bounds = site.geobox.boundingbox
    back = Transformer.from_crs(site.crs, "EPSG:4326", always_xy=True)
    corners = [(bounds.left, bounds.top), (bounds.right, bounds.bottom)]
    for corner in corners:
        assert site.footprint.boundary.distance(Point(back.transform(*corner))) < 1e-9

    far = place_site("b", 179.999, -16.5, size=512)
    shape = far.footprint
    assert shape.geom_type == "MultiPolygon"
    west, _, east, _ = shape.bounds
    assert (west, east) == (-180.0, 180.0)
    assert max(part.bounds[2] - part.bounds[0] for part in shape.geoms) < 0.05
    # The same square away from the line is as large.
    other = footprint(geobox_from_window(far.window, crs="EPSG:32759", resolution=10.0))
    assert shape.area == pytest.approx(other.area, rel=1e-9)


def test_tables_of_all_forms_give_the_same_sites(tmp_path: Path):
    names = ["a", "b/1"]
    points = geopandas.GeoDataFrame(
        {"id": names, "other": ["x", "y"]}, geometry=[Point(4, 50), Point(5, 51)], crs="EPSG:4326"
    )
    points.to_file(tmp_path / "p.gpkg")
    points.to_crs("EPSG:32631").to_file(tmp_path / "p.geojson", driver="GeoJSON")
    points.to_parquet(tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("id,Lon,lat,other\na,4,50,x\nb/1,5,51,y\n")
    first = read_sites(tmp_path / "p.gpkg", size=64)
    assert [site.id for site in first] == names
    for name in ("p.geojson", "p.parquet", "p.csv"):
        found = read_sites(tmp_path / name, size=64)
        assert [(site.id, site.window) for site in found] == [(s.id, s.window) for s in first]
    assert [s.id for s in read_sites(tmp_path / "p.csv", size=64, id_column="other")] == ["x", "y"]
    (tmp_path / "i.csv").write_text("id,lon,lat\n0012,4,50\n12, 5.5,51\nNA,17,-22\n1.0,7,8\n")
    kept = read_sites(tmp_path / "i.csv", size=64)
    assert [(s.id, s.lon) for s in kept] == [("0012", 4), ("12", 5.5), ("NA", 17), ("1.0", 7)]
    (tmp_path / "n.csv").write_text("x,y\n4,50\n5,51\n")
    numbered = read_sites(tmp_path / "n.csv", size=64)
    assert [site.id for site in numbered] == ["site-0001", "site-0002"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("lon,lat\n", {}, "holds no point"),
        ("", {}, "holds no point"),
        ("id,lon,lat\na,4,50\na,5,51\n", {}, "'a' stands more than once"),
        ("lon,lat\n4,50\n", {"id_column": "name"}, "column 'name'.*it has lon, lat.*--id-column"),
        ("lon,lat\n4,50\n", {"size": 100}, "multiple of 16 px.*--size 96"),
        ("lon,lat\n4,50\n", {"size": 20000}, "100 km"),
        ("lon,lat\n4,50\nx,50\n", {}, "point 2 of .* is not a number"),
        ("e,n\n4,50\n", {}, "columns e, n, but needs lon and lat"),
        ("lon,lat\n4,88\n", {}, "80 S to 84 N"),
        ("lon,lat\n400000,5600000\n", {}, "longitude 400000"),
    ],
)
def test_bad_points_are_named(text: str, options: dict, message: str, tmp_path: Path):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_sites(tmp_path / "p.csv", **{"size": 64, **options})


def test_other_files_than_points_are_named(tmp_path: Path):
    with pytest.raises(MissingFileError, match=r"no such file.*archive sample"):
        read_sites(tmp_path / "p.gpkg", size=64)
    (tmp_path / "p.gpkg").write_text("no")
    with pytest.raises(InputError, match="It must be points as GeoPackage"):
        read_sites(tmp_path / "p.gpkg", size=64)
    pyogrio.write_dataframe(pandas.DataFrame({"value": [1]}), tmp_path / "t.gpkg")
    with pytest.raises(InputError, match=r"without geometry\. It must be points as GeoPackage"):
        read_sites(tmp_path / "t.gpkg", size=64)
    for kind, shape in (
        ("Polygon", box(4, 50, 5, 51)),
        ("LineString", LineString([(0, 0), (1, 1)])),
    ):
        geopandas.GeoDataFrame(geometry=[shape], crs=4326).to_file(tmp_path / "s.geojson")
        with pytest.raises(InputError, match=f"holds {kind}, but a site is one point"):
            read_sites(tmp_path / "s.geojson", size=64)


@pytest.mark.parametrize(
    ("text", "years"),
    [
        ("2019", (2019,)),
        ("2017..2019", (2017, 2018, 2019)),
        ("2020, 2017..2018", (2017, 2018, 2020)),
    ],
)
def test_seasons_are_read(text: str, years: tuple[int, ...]):
    assert parse_seasons(text) == years


@pytest.mark.parametrize(
    ("text", "message"),
    [("2024..2017", "--seasons 2017..2024"), ("17..24", "must be years"), ("", "must be years")],
)
def test_bad_seasons_are_named(text: str, message: str):
    with pytest.raises(InputError, match=message):
        parse_seasons(text)


def test_a_season_is_twelve_months():
    spec = ArchiveSpec(catalog="x", years=(2019,), size=64)
    times = spec.time_range("2019-09-01")
    assert (str(times.start), str(times.end)) == ("2019-09-01T00:00:00", "2020-08-31T23:59:59")
