"""Parcels of a map: the oracle is rasterio on the whole raster, one parcel at a time."""

from __future__ import annotations

import tracemalloc

import geopandas
import numpy as np
import pandas
import pytest
import rasterio
import shapely
from rasterio.features import rasterize
from rasterio.transform import Affine

from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.legend import Legend
from stcln_geo.maps.classmap import open_class_map
from stcln_geo.maps.parcels import count_parcels, write_parcels

from .conftest import LEGEND, SHAPE, TRANSFORM, patchy


def parcels(seed: int = 2) -> np.ndarray:
    """Blobs that overlap, cross the map's edge, or are too small; squares that share borders."""
    rng = np.random.default_rng(seed)
    left, top = TRANSFORM.c, TRANSFORM.f
    found = []
    for _ in range(60):
        x, y = (
            left + rng.uniform(-60, SHAPE[1] * 10 + 60),
            top - rng.uniform(-60, SHAPE[0] * 10 + 60),
        )
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(0.3, 1.0, 9) * rng.choice([4.0, 40.0, 220.0])
        found.append(
            shapely.Polygon(
                np.column_stack([x + radius * np.cos(angles), y + radius * np.sin(angles)])
            )
        )
    # Borders that run exactly through pixels' centres, and a sliver between them.
    for row in range(3):
        found += [
            shapely.box(
                left + 205 + 45 * n, top - 305 - 45 * row, left + 250 + 45 * n, top - 260 - 45 * row
            )
            for n in range(4)
        ]
    found += [shapely.box(left + 501, top - 400, left + 504, top - 100), shapely.box(0, 0, 9, 9)]
    return shapely.make_valid(np.array(found, dtype=object))


def oracle(shape: shapely.Polygon, codes: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return where a parcel's pixels are, by rasterio on the whole raster.

    In pixels, since rasterio's own change of coordinates rounds: a border that runs exactly
    through centres would fall on either side of them.
    """
    corner = np.array([TRANSFORM.c, TRANSFORM.f])
    shape = shapely.transform(shape, lambda points: (points - corner) / (10, -10))
    options = {"out_shape": codes.shape, "dtype": "uint8"}
    inside = rasterize([shape], **options) == 1
    touched = not inside.any()
    if touched:
        inside = rasterize([shape], all_touched=True, **options) == 1
    return inside, touched and inside.any()


def test_a_turned_map_counts_its_turned_parcels_alike(new_map):
    codes, turn = patchy(), Affine.translation(9_000, -700) * Affine.rotation(27)
    # Other than on grids with the north up, coordinates are rounded: no borders through centres.
    shapes = parcels()[:60]
    turned = shapely.transform(shapes, lambda points: np.column_stack(turn @ points.T))
    plain = count_parcels(open_class_map(new_map(codes)), shapes)
    grid = new_map(codes, "turned", transform=turn * TRANSFORM)
    table = count_parcels(open_class_map(grid), turned, window=40)
    assert np.array_equal(table.counts, plain.counts)
    assert np.array_equal(table.all_touched, plain.all_touched)
    np.testing.assert_allclose(table.outside, plain.outside, atol=1e-6)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("Grass", "grass", "Maize", "+"), ("grass_0", "grass_1", "maize", "_3")),
        (("Grass", "grass", "Grass 1", "+"), ("grass_0", "grass_1", "grass_1_2", "_3")),
    ],
    ids=["two alike", "alike with a code"],
)
def test_each_class_has_a_column_of_its_own(new_map, tmp_path, names, expected):
    rows = [{"value": str(code), "name": name} for code, name in enumerate(names)]
    codes = patchy()
    product = new_map(codes, legend=Legend.from_rows(rows, source="the test"))
    frame = geopandas.GeoDataFrame(geometry=parcels()[:60], crs="EPSG:32631")
    frame.to_file(tmp_path / "parcels.gpkg")
    write_parcels(product, tmp_path / "parcels.gpkg", tmp_path / "out.parquet")
    found = geopandas.read_parquet(tmp_path / "out.parquet")
    columns = [name for name in found.columns if name.startswith("map_fraction")]
    assert columns == [f"map_fraction_{name}" for name in expected]
    shares = found.loc[found["map_pixels"] > 0, columns].to_numpy()
    np.testing.assert_allclose(shares.sum(axis=1), 1)


@pytest.mark.parametrize("window", [17, 64, 1000])
def test_counts_are_those_of_the_whole_raster(new_map, window):
    codes = patchy()
    class_map = open_class_map(new_map(codes))
    shapes = parcels()
    with rasterio.open(class_map.confidence) as source:
        percent = source.read(1).astype(np.int64)
    table = count_parcels(class_map, shapes, window=window)
    kinds = set()
    for number, shape in enumerate(shapes):
        inside, touched = oracle(shape, codes)
        expected = np.bincount(np.minimum(codes[inside], 4), minlength=5)
        assert table.counts[number].tolist() == expected[:4].tolist(), number
        assert table.nodata[number] == expected[4]
        assert table.all_touched[number] == touched
        sums = [percent[inside & (codes == code)].sum() for code in range(4)]
        assert table.confidence[number].tolist() == sums
        kinds |= {("touched", bool(touched)), ("some", bool(inside.any()))}
    assert kinds == {("touched", True), ("touched", False), ("some", True), ("some", False)}
    # Overlap is real: pixels are counted for each of the parcels they lie in.
    assert table.counts.sum() + table.nodata.sum() > codes.size * 0.3


def test_parcels_that_repeat_take_no_raster_each(new_map):
    # A register with two crops a year lists each parcel twice; a third row overlaps both.
    codes = patchy((211, 337))
    corner, sides = np.meshgrid(np.arange(30) * 11.3, np.arange(20) * 10.7)
    left, top = TRANSFORM.c + 10 * corner.ravel(), TRANSFORM.f - 10 * sides.ravel()
    once = shapely.box(left, top - 93, left + 97, top)
    third = shapely.buffer(shapely.points(left[::7] + 50, top[::7] - 50), 71, quad_segs=2)
    shapes = np.concatenate([once, third, once])
    class_map = open_class_map(new_map(codes))
    tracemalloc.start()
    table = count_parcels(class_map, shapes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(table.counts[: len(once)], table.counts[-len(once) :])
    for number in range(0, len(shapes), 9):
        inside, _ = oracle(shapes[number], codes)
        expected = np.bincount(np.minimum(codes[inside], 4), minlength=5)
        assert [*table.counts[number], table.nodata[number]] == expected.tolist(), number
    # A raster for each of them would be 86 MB.
    assert len(shapes) * codes.size > 80e6 > 8 * peak


def test_outside_is_a_share_of_the_area(new_map):
    left, top = TRANSFORM.c, TRANSFORM.f
    shapes = np.array(
        [shapely.box(left - 30, top - 50, left + 10, top),
         shapely.box(left, top - 9, left + 9, top),
         shapely.box(left - 30, top, left, top + 9), None, shapely.Polygon()],
        dtype=object,
    )  # fmt: skip
    table = count_parcels(open_class_map(new_map(patchy())), shapes)
    np.testing.assert_allclose(table.outside, [0.75, 0, 1, 1, 1])
    assert table.counts[2:].sum() == 0


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_file_has_a_row_for_each_parcel(new_map, tmp_path, suffix):
    codes = patchy()
    product = new_map(codes)
    shapes = parcels()
    frame = geopandas.GeoDataFrame(
        {"id": np.arange(len(shapes)), "map_share": 9.0}, geometry=shapes, crs="EPSG:32631"
    )
    # Nearly exact in lon/lat: the columns are compared with those counted from the same outlines.
    frame.to_crs("EPSG:4326").to_file(tmp_path / "parcels.gpkg")
    out = tmp_path / f"out{suffix}"
    report = write_parcels(product, tmp_path / "parcels.gpkg", out, window=50)
    found = geopandas.read_parquet(out) if suffix == ".parquet" else geopandas.read_file(out)
    assert found.crs == "EPSG:4326"
    assert found["id"].tolist() == list(range(len(shapes)))
    table = count_parcels(
        open_class_map(product),
        geopandas.read_file(tmp_path / "parcels.gpkg").geometry.to_crs("EPSG:32631").to_numpy(),
    )
    labelled = table.counts.sum(axis=1)
    names = np.array(LEGEND.names)
    for number, row in enumerate(found.itertuples()):
        if not labelled[number]:
            assert pandas.isna(row.map_code)
            assert pandas.isna(row.map_class)
            continue
        most = table.counts[number].argmax()
        assert row.map_code == most
        assert row.map_class == names[most]
        assert row.map_share == pytest.approx(table.counts[number, most] / labelled[number])
        mean = table.confidence[number, most] / table.counts[number, most]
        assert row.map_confidence == pytest.approx(mean)
        assert row.map_confidence_all == pytest.approx(
            table.confidence[number].sum() / labelled[number]
        )
        fractions = [row.map_fraction_winter_wheat, row.map_fraction_maize,
                     row.map_fraction_maïs_soy, row.map_fraction_grass]  # fmt: skip
        assert sum(fractions) == pytest.approx(1)
        assert fractions[most] == row.map_share
    assert report.parcels == len(shapes)
    assert report.labelled == (labelled > 0).sum()
    assert sum(report.by_class.values()) == report.labelled
    assert not list(tmp_path.glob(".*"))


def test_each_window_of_the_map_is_told(new_map, tmp_path):
    geopandas.GeoDataFrame(geometry=parcels()[-5:-2], crs="EPSG:32631").to_parquet(
        tmp_path / "in.parquet"
    )
    told = []
    write_parcels(
        new_map(patchy()), tmp_path / "in.parquet", tmp_path / "out.parquet", window=50,
        progress=lambda *done: told.append(done),
    )  # fmt: skip
    count = -(-SHAPE[0] // 50) * -(-SHAPE[1] // 50)
    assert told == [(number + 1, count, "windows") for number in range(count)]


@pytest.mark.parametrize("suffix", [".gpkg", ".parquet"])
def test_columns_whose_names_a_geopackage_has_a_use_for(new_map, tmp_path, suffix):
    """Of GeoJSON as QGIS exports it: fid is a property, and stands twice where a parcel was cut."""
    columns = {"fid": [7, 7, 9], "GEOM": ["a", "b", "c"], "fid_": [1.5, None, 2], "MAP_CODE": 3}
    frame = geopandas.GeoDataFrame(columns, geometry=parcels()[-5:-2], crs="EPSG:32631")
    frame.to_parquet(tmp_path / "in.parquet")
    out = tmp_path / f"out{suffix}"
    write_parcels(new_map(patchy()), tmp_path / "in.parquet", out)
    found = geopandas.read_parquet(out) if suffix == ".parquet" else geopandas.read_file(out)
    for name in ("fid", "GEOM", "fid_"):
        pandas.testing.assert_series_equal(found[name], frame[name], check_dtype=False)
    assert [name for name in found.columns if name.lower() == "map_code"] == ["map_code"]


def test_columns_that_a_geopackage_takes_for_one_are_named(new_map, tmp_path):
    frame = geopandas.GeoDataFrame(
        {"crop": [1], "Crop": [2]}, geometry=parcels()[-3:-2], crs="EPSG:32631"
    )
    frame.to_parquet(tmp_path / "in.parquet")
    with pytest.raises(InputError, match=r"'Crop'.*upper and lower case.*write \.parquet"):
        write_parcels(new_map(patchy()), tmp_path / "in.parquet", tmp_path / "out.gpkg")
    assert not list(tmp_path.glob("*out*"))


def test_a_parcel_that_the_maps_crs_has_no_place_for_lies_outside(new_map, tmp_path):
    product = new_map(patchy())
    near = geopandas.GeoSeries(parcels()[-4:-2], crs="EPSG:32631").to_crs("EPSG:4326")
    shapes = [near[0], shapely.box(0, 40, 170, 95), near[1]]
    geopandas.GeoDataFrame({"n": [1, 2, 3]}, geometry=shapes, crs="EPSG:4326").to_parquet(
        tmp_path / "in.parquet"
    )
    report = write_parcels(product, tmp_path / "in.parquet", tmp_path / "out.parquet")
    assert (report.parcels, report.outside) == (3, 1)
    found = geopandas.read_parquet(tmp_path / "out.parquet")
    assert found["map_outside"].tolist() == [0, 1, 0]
    assert found["map_pixels"][1] == 0 < found["map_pixels"][0]
    assert found.geometry.tolist() == shapes


def test_a_map_without_confidence(new_map, tmp_path):
    path = new_map(np.where(patchy() == 255, 255, patchy() + 10).astype(np.uint8), plain=True)
    geopandas.GeoDataFrame(geometry=parcels(), crs="EPSG:32631").to_file(tmp_path / "p.gpkg")
    write_parcels(path, tmp_path / "p.gpkg", tmp_path / "o.parquet")
    found = geopandas.read_parquet(tmp_path / "o.parquet")
    assert set(found["map_class"].dropna()) <= {"10", "11", "12", "13"}
    assert "map_confidence" not in found


def test_other_layers_of_the_parcels_file_are_not_lost(new_map, tmp_path):
    product, path = new_map(patchy()), tmp_path / "farm.gpkg"
    frame = geopandas.GeoDataFrame(geometry=parcels()[-5:-2], crs="EPSG:32631")
    frame.to_file(path, layer="parcels")
    write_parcels(product, path, path)
    assert "map_code" in geopandas.read_file(path)
    frame.to_file(path, layer="roads")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"2 layers \(farm, roads\).*Choose another name"):
        write_parcels(product, path, path, layer="roads")
    assert path.read_bytes() == before


def test_mistakes(new_map, tmp_path):
    product = new_map(patchy())
    points = geopandas.GeoDataFrame(geometry=[shapely.Point(0, 0)], crs="EPSG:32631")
    points.to_file(tmp_path / "points.gpkg")
    with pytest.raises(InputError, match="holds Point"):
        write_parcels(product, tmp_path / "points.gpkg", tmp_path / "o.gpkg")
    with pytest.raises(InputError, match=r"\.shp"):
        write_parcels(product, tmp_path / "points.gpkg", tmp_path / "o.shp")
    with pytest.raises(MissingFileError, match=r"none\.gpkg"):
        write_parcels(product, tmp_path / "none.gpkg", tmp_path / "o.gpkg")
    far = geopandas.GeoDataFrame(geometry=[shapely.box(0, 0, 9, 9)], crs="EPSG:32631")
    far.to_file(tmp_path / "far.gpkg")
    with pytest.raises(InputError, match="meets the map"):
        write_parcels(product, tmp_path / "far.gpkg", tmp_path / "o.gpkg")
    assert not (tmp_path / "o.gpkg").exists()
