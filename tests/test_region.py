"""Regions: bounding boxes and vector files, each in its own CRS."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
from pyproj import Geod, Transformer
from shapely import segmentize, transform
from shapely.geometry import LineString, MultiPolygon, Polygon, box

from stcln_geo.antimeridian import split_at_antimeridian
from stcln_geo.errors import InputError, MissingFileError, StclnGeoWarning
from stcln_geo.grid import utm_crs, utm_zone_bounds, utm_zones
from stcln_geo.region import Region, choose_layer


def test_bbox_text_and_numbers_are_the_same():
    assert Region.from_bbox("4.0,50.7,4.2,50.8").geometry.equals(
        Region.from_bbox((4.0, 50.7, 4.2, 50.8)).geometry
    )


@pytest.mark.parametrize(
    ("bbox", "message"),
    [
        ("4.2,50.7,4.0,50.8", "west must be less"),
        ("4.0,50.8,4.2,50.7", "west must be less"),
        ("4.0,50.7,4.2", "four numbers"),
        ("a,b,c,d", "four numbers"),
        ("600000,5600000,601000,5601000", "leave the range"),
        ("50.7,4.0,50.8,400", "leave the range"),
        ("-360.1,0,-300,1", "leave the range"),
        ("300,0,360.1,1", "leave the range"),
        ("0,-90.1,1,1", "leave the range"),
        ("0,0,1,90.1", "leave the range"),
        ("nan,0,1,1", "west must be less"),
    ],
)
def test_bad_boxes_are_named(bbox: str, message: str):
    with pytest.raises(InputError, match=message):
        Region.from_bbox(bbox)


def test_parts_reach_the_margin_beyond_what_their_zone_owns_on_all_sides():
    region = Region.from_bbox("5.9,-0.1,6.1,0.1")
    parts = region.by_utm_zone(margin=500.0)
    assert list(parts) == ["EPSG:32631", "EPSG:32731", "EPSG:32632", "EPSG:32732"]
    geod = Geod(ellps="WGS84")
    for zone, part in parts.items():
        west, south, east, north = part.geometry.bounds
        owned = utm_zone_bounds(zone)
        assert part.geometry.equals(box(west, south, east, north))
        if owned[2] == 6:
            assert west == 5.9
            assert geod.inv(6, 0, east, 0)[2] == pytest.approx(500, rel=0.01)
        else:
            assert east == 6.1
            assert geod.inv(6, 0, west, 0)[2] == pytest.approx(500, rel=0.01)
        if owned[1] == 0:
            assert north == 0.1
            assert geod.inv(6, 0, 6, south)[2] == pytest.approx(500, rel=0.01)
        else:
            assert south == -0.1
            assert geod.inv(6, 0, 6, north)[2] == pytest.approx(500, rel=0.01)


@pytest.mark.parametrize("name", ["r.geojson", "r.gpkg", "r.parquet"])
def test_files_in_lon_lat(tmp_path: Path, name: str):
    shapes = [box(4.0, 50.0, 4.1, 50.1), box(4.1, 50.0, 4.2, 50.1)]
    frame = geopandas.GeoDataFrame(geometry=shapes, crs="EPSG:4326")
    write = frame.to_parquet if name.endswith("parquet") else frame.to_file
    write(tmp_path / name)
    region = Region.from_file(tmp_path / name)
    assert region.geometry.equals(box(4.0, 50.0, 4.2, 50.1))
    assert region.native is None


def test_file_in_metres_stays_exact_in_its_crs(tmp_path: Path):
    square = box(600010, 5600020, 600770, 5600990)
    file = tmp_path / "r.gpkg"
    geopandas.GeoDataFrame(geometry=[square], crs="EPSG:32631").to_file(file)
    region = Region.from_file(file)
    assert region.to_crs("EPSG:32631").equals(square)
    assert 4 < region.geometry.centroid.x < 5
    back = Region(geometry=region.geometry, source="x").to_crs("EPSG:32631")
    np.testing.assert_allclose(back.bounds, square.bounds, atol=1e-3)


def test_long_edges_bend_with_the_projection():
    region = Region.from_bbox("0,50,6,51").to_crs("EPSG:32631")
    corners = Region.from_bbox("0,50,6,51").geometry
    ends = [Region.from_bbox((x, 50, x + 1e-6, 51)).to_crs("EPSG:32631").bounds[1] for x in (0, 3)]
    # The southern edge dips below the line between its ends, at the central meridian.
    assert region.bounds[1] == pytest.approx(min(ends), abs=1)
    assert len(region.exterior.coords) > 100 * len(corners.exterior.coords) / 5


@pytest.mark.parametrize(
    ("crs", "left", "bottom", "side", "target"),
    [
        ("EPSG:2154", 600_000, 6_600_000, 101_000, "EPSG:32631"),
        ("EPSG:2225", 6_500_000, 2_000_000, 331_000, "EPSG:32610"),
    ],
    ids=["metres", "feet"],
)
def test_long_edges_of_a_file_in_another_projection_bend(
    tmp_path: Path, crs: str, left: float, bottom: float, side: float, target: str
):
    # Corners alone would leave out a strip of up to 230 m along the edges.
    square = box(left, bottom, left + side, bottom + side)
    geopandas.GeoDataFrame(geometry=[square], crs=crs).to_file(tmp_path / "square.gpkg")

    region = Region.from_file(tmp_path / "square.gpkg")

    for place in ("EPSG:4326", target):
        move = Transformer.from_crs(crs, place, always_xy=True).transform
        exact = transform(segmentize(square, side / 1000), partial(_moved, move))
        assert region.to_crs(place).symmetric_difference(exact).area < 3e-6 * exact.area


def _moved(move: Callable[..., Any], points: np.ndarray) -> np.ndarray:
    return np.column_stack(move(points[:, 0], points[:, 1]))


def test_a_file_in_metres_across_the_antimeridian_is_split(tmp_path: Path):
    fiji = box(800_000, 8_100_000, 903_000, 8_201_000)
    rest = box(200_000, 8_100_000, 207_000, 8_131_000)
    frame = geopandas.GeoDataFrame(geometry=[fiji, rest], crs="EPSG:32760")
    frame.to_file(tmp_path / "fiji.gpkg")

    region = Region.from_file(tmp_path / "fiji.gpkg")

    parts = sorted(part.bounds for part in region.geometry.geoms)
    assert [(round(west), round(east)) for west, _, east, _ in parts] == [
        (-180, -179), (174, 174), (180, 180),
    ]  # fmt: skip
    assert region.unwrapped.bounds[2] - region.unwrapped.bounds[0] < 7
    assert utm_crs(region.unwrapped) == "EPSG:32701"
    assert region.to_crs("EPSG:32760").equals(MultiPolygon([fiji, rest]))
    alone = Region(geometry=region.geometry, source="lon/lat alone").to_crs("EPSG:32760")
    # Each crossing of the antimeridian leaves two copies of an edge.
    assert alone.symmetric_difference(MultiPolygon([fiji, rest])).area < 3e-6 * fiji.area


@pytest.mark.parametrize(
    ("ring", "warned"),
    [
        ([(179.4, -17.2), (180.3, -17.3), (180.5, -16.1), (179.6, -16.0)], False),
        ([(-180.6, -17.2), (-179.7, -17.3), (-179.5, -16.1), (-180.4, -16.0)], False),
        ([(179.4, -17.2), (-179.7, -17.3), (-179.5, -16.1), (179.6, -16.0)], True),
    ],
    ids=["beyond 180", "before -180", "jumping"],
)
def test_a_file_in_degrees_is_split_at_the_antimeridian_however_it_is_drawn(
    tmp_path: Path, ring: list[tuple[float, float]], warned: bool, recwarn: Any
):
    # A hole that crosses, and an island apart, which lies inside the jumping ring in a plane.
    turn = -360 if ring[0][0] < -180 else 0
    back = -360 if warned else 0
    hole = [(179.9 + turn, -16.9), (180.1 + turn + back, -16.9), (180.1 + turn + back, -16.5)]
    frame = geopandas.GeoDataFrame(
        geometry=[Polygon(ring, [hole]), box(20, -17, 21, -16)], crs=4326
    )
    frame.to_file(tmp_path / "fiji.geojson")

    region = Region.from_file(tmp_path / "fiji.geojson")

    zone = "EPSG:32760"
    whole = Polygon(
        [((lon - 177) % 360 + 177, lat) for lon, lat in ring],
        [[((lon - 177) % 360 + 177, lat) for lon, lat in hole]],
    )
    move = Transformer.from_crs(4326, zone, always_xy=True).transform
    exact = transform(segmentize(whole, 0.005), partial(_moved, move))
    west = Region(geometry=region.geometry.intersection(box(-180, -20, -170, 0)), source="west")
    east = Region(geometry=region.geometry.intersection(box(170, -20, 180, 0)), source="east")
    halves = west.to_crs(zone).union(east.to_crs(zone))
    assert halves.symmetric_difference(exact).area < 3e-6 * exact.area
    assert region.geometry.intersection(box(-170, -90, 170, 90)).equals(box(20, -17, 21, -16))
    assert utm_zones(region.geometry) == ["EPSG:32701", "EPSG:32734", "EPSG:32760"]
    told = [str(one.message) for one in recwarn if issubclass(one.category, StclnGeoWarning)]
    assert len(told) == warned
    assert all("taken to cross the antimeridian" in text for text in told)


@pytest.mark.parametrize(
    "shape",
    [
        box(-180, -90, 180, 90), box(-180, -60, 180, 80), box(0, 0, 180, 1), box(-100, 0, 100, 1),
        box(-130, 0, 130, 1),
        Polygon([(-180, 60), (-60, 61), (60, 60), (180, 61), (180, 90), (-180, 90)]),
    ],
    ids=["Earth", "lands", "half", "wide", "wider", "around the pole"],
)  # fmt: skip
def test_what_reaches_around_the_earth_is_not_taken_to_cross_the_antimeridian(shape: Any):
    assert split_at_antimeridian(shape) is shape
    assert Region(geometry=shape, source="x").geometry.equals(shape)


def test_files_without_crs_or_area_or_polygons_are_named(tmp_path: Path):
    no_crs = tmp_path / "none.gpkg"
    geopandas.GeoDataFrame(geometry=[box(0, 0, 1, 1)]).to_file(no_crs)
    with pytest.raises(InputError, match="names no CRS"):
        Region.from_file(no_crs)
    lines = tmp_path / "lines.geojson"
    geopandas.GeoDataFrame(geometry=[LineString([(0, 0), (1, 1)])], crs=4326).to_file(lines)
    with pytest.raises(InputError, match="no area"):
        Region.from_file(lines)
    with pytest.raises(MissingFileError, match="no such file"):
        Region.from_file(tmp_path / "absent.gpkg")
    for text in (tmp_path / "text.gpkg", tmp_path / "text.parquet"):
        text.write_text("not a vector file")
        with pytest.raises(InputError, match="must be a vector file"):
            Region.from_file(text)
    table = tmp_path / "table.csv"
    table.write_text("value,name\n1,wheat\n")
    with pytest.raises(InputError, match=r"without geometry \(columns: value, name\)"):
        Region.from_file(table)
    two = tmp_path / "two.gpkg"
    for layer in ("a", "b"):
        geopandas.GeoDataFrame(geometry=[box(0, 0, 1, 1)], crs=4326).to_file(two, layer=layer)
    with pytest.raises(InputError, match="a, b"):
        Region.from_file(two)


def test_crossing_polygons_are_repaired(tmp_path: Path):
    bow = Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
    file = tmp_path / "bow.geojson"
    geopandas.GeoDataFrame(geometry=[bow], crs=4326).to_file(file)
    region = Region.from_file(file)
    assert region.geometry.is_valid
    assert region.geometry.area == pytest.approx(0.5)


def test_a_box_across_the_antimeridian_is_split_and_one_area_in_its_zone():
    region = Region.from_bbox("179.7,-16.8,-179.9,-16.5")
    assert [part.bounds for part in region.geometry.geoms] == [
        (179.7, -16.8, 180, -16.5), (-180, -16.8, -179.9, -16.5),
    ]  # fmt: skip
    longitude, latitude = region.centre
    assert longitude == pytest.approx(179.9)
    assert latitude == pytest.approx(-16.65)
    assert utm_crs(region.unwrapped) == "EPSG:32760"
    area = region.to_crs("EPSG:32760")
    west, _, east, _ = area.bounds
    # 0.4 degrees at that latitude, in one piece.
    assert east - west == pytest.approx(0.4 * 111_320 * np.cos(np.radians(16.65)), rel=0.02)
    assert region.unwrapped.bounds == (179.7, -16.8, 180.1, -16.5)
    assert region.bbox == pytest.approx([179.7, -16.8, -179.9, -16.5])
    assert Region.from_bbox(region.bbox).geometry.equals_exact(region.geometry, 1e-9)
    assert Region.from_bbox("179.7,-16.8,180.1,-16.5").geometry.equals(region.geometry)
    assert Region.from_bbox("-180.3,-16.8,-179.9,-16.5").geometry.equals(region.geometry)
    mostly_east = Region.from_bbox("179.9,-16.8,-179.5,-16.5")
    assert mostly_east.centre[0] == pytest.approx(-179.8)
    assert utm_crs(mostly_east.unwrapped) == "EPSG:32701"


def test_a_region_around_the_earth_is_one_piece():
    region = Region.from_bbox("-180,-10,180,10")
    assert region.unwrapped.equals(region.geometry)
    assert region.centre == (0, 0)
    assert region.bbox == [-180, -10, 180, 10]


@pytest.mark.parametrize("bbox", ["5,50,4,51", "100,0,-60,1", "-170,0,-171,1", "190,0,-170,1"])
def test_boxes_too_wide_to_cross_are_mistakes(bbox: str):
    with pytest.raises(InputError, match="west must be less"):
        Region.from_bbox(bbox)


def test_parts_by_zone_cover_the_region_and_overlap_by_the_margin():
    outline = Polygon([(4.5, 50.2), (7.4, 50.4), (6.9, 51.3), (5.2, 51.0)])
    region = Region(geometry=outline, source="a polygon")
    parts = region.by_utm_zone(margin=320.0)
    assert list(parts) == ["EPSG:32631", "EPSG:32632"]
    west, east = (part.geometry for part in parts.values())
    assert west.union(east).symmetric_difference(outline).area < 1e-9
    assert parts["EPSG:32632"].source == "the part of a polygon in EPSG:32632"
    line = LineString([(6.0, 50.3), (6.0, 51.2)])
    for crs, part in parts.items():
        beyond = Region(geometry=west.intersection(east), source="x").to_crs(crs)
        area = part.to_crs(crs)
        assert area.buffer(1).contains(beyond)
        left, _, right, _ = beyond.intersection(box(0, 5.6e6, 1e6, 5.601e6)).bounds
        assert right - left > 640
    assert west.intersection(east).contains(line.intersection(outline.buffer(-0.01)))
    assert west.bounds[2] < 6.01
    small = Region.from_bbox((4.0, 50.0, 4.1, 50.1))
    assert small.by_utm_zone(margin=320.0) == {"EPSG:32631": small}


def with_styles(path: Path) -> Path:
    """Put into a GeoPackage the table in which QGIS keeps styles: it has no geometry."""
    import pandas
    import pyogrio

    styles = pandas.DataFrame({"f_table_name": ["x"], "styleQML": ["<qgis/>"]})
    pyogrio.write_dataframe(styles, path, layer="layer_styles", append=True)
    return path


def test_the_styles_that_qgis_stores_are_no_layer_of_a_region(tmp_path: Path, recwarn) -> None:
    area = geopandas.GeoDataFrame(geometry=[box(3, 50, 4, 51)], crs=4326)
    area.to_file(tmp_path / "region.gpkg", layer="region")
    path = with_styles(tmp_path / "region.gpkg")
    assert Region.from_file(path).geometry.bounds == (3, 50, 4, 51)
    assert [str(warning.message) for warning in recwarn] == []


def test_of_several_layers_the_one_that_is_read_is_told(tmp_path: Path, recwarn) -> None:
    path = tmp_path / "fields.gpkg"
    for layer in ("fields", "roads"):
        geopandas.GeoDataFrame(geometry=[box(0, 0, 1, 1)], crs=4326).to_file(path, layer=layer)
    assert choose_layer(path, "roads") == "roads"
    assert len(recwarn) == 0
    with pytest.warns(StclnGeoWarning, match="2 layers: fields, roads. The first is read"):
        assert choose_layer(path) == "fields"
