"""A map scored on points and parcels, from Python and from the command line."""

from __future__ import annotations

import json
import math
import re
import shlex

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from odc.geo.geobox import GeoBox
from pyproj import Geod, Transformer
from rasterio.transform import Affine

from stcln_geo import evaluate_map
from stcln_geo.cli.main import invoke
from stcln_geo.cog.mosaic import write_mosaic
from stcln_geo.cog.names import LEGEND_TAG
from stcln_geo.errors import InputError, LabelError
from stcln_geo.grid import Window
from stcln_geo.legend import Legend
from stcln_geo.maps.classmap import open_class_map
from stcln_geo.maps.polygons import write_polygons
from stcln_geo.report.accuracy import AccuracySpec, write_accuracy
from stcln_geo.report.area import estimate_accuracy
from stcln_geo.report.beside import ACCURACY_FILES
from stcln_geo.report.reference import match_classes, read_units

LEGEND = Legend.from_rows(
    [
        {"value": "110", "name": "Wheat"},
        {"value": "120", "name": "Maize & sorghum"},
        {"value": "130", "name": "Grass"},
    ],
    source="the tests",
)
TRANSFORM = Affine(10, 0, 500_000, 0, -10, 5_600_000)
SHAPE = (61, 87)


def codes_of():
    """Stripes of classes with a hole, so that places are easy to name."""
    codes = np.zeros(SHAPE, dtype=np.uint8)
    codes[:, 30:60] = 1
    codes[40:, 60:] = 2
    codes[:10, 70:] = 255
    return codes


@pytest.fixture
def product(tmp_path):
    folder = tmp_path / "product"
    folder.mkdir()
    profile = {
        "driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 1, "dtype": "uint8",
        "nodata": 255, "crs": "EPSG:32631", "transform": TRANSFORM,
    }  # fmt: skip
    with rasterio.open(folder / "classes.tif", "w", **profile) as target:
        target.write(codes_of(), 1)
        target.update_tags(**{LEGEND_TAG: LEGEND.to_json()})
    with rasterio.open(folder / "confidence.tif", "w", **profile) as target:
        target.write(np.where(codes_of() == 255, 255, 80).astype(np.uint8), 1)
    return folder


def points(rows, cols, crop, **columns):
    x = TRANSFORM.c + (np.asarray(cols) + 0.3) * 10
    y = TRANSFORM.f - (np.asarray(rows) + 0.6) * 10
    return geopandas.GeoDataFrame(
        {"crop": crop, **columns}, geometry=geopandas.points_from_xy(x, y), crs="EPSG:32631"
    )


@pytest.fixture
def sample(product, tmp_path):
    """Eighty points: most right; some empty, outside or where the map has no label."""
    rng = np.random.default_rng(2)
    rows, cols = rng.integers(0, SHAPE[0], 80), rng.integers(0, SHAPE[1], 80)
    rows[5:8], cols[5:8] = 4, 80
    codes = codes_of()[rows, cols]
    truth = np.where(rng.random(80) < 0.2, rng.integers(0, 3, 80), np.where(codes == 255, 0, codes))
    crop = np.array(LEGEND.names, dtype=object)[truth]
    crop[:3] = None
    cols[3:5] = 500
    path = tmp_path / "points.gpkg"
    points(rows, cols, crop).to_crs("EPSG:4326").to_file(path)
    return path, rows, cols, truth


def test_counts_and_weights(product, sample):
    path, rows, cols, truth = sample
    found = evaluate_map(product, path, column="crop")
    usable = np.arange(80) >= 5
    mapped = np.full(80, 255)
    mapped[usable] = codes_of()[rows[usable], cols[usable]]
    used = usable & (mapped != 255)
    assert (found.units, found.empty, found.outside) == (80, 3, 2)
    assert found.nodata == (usable & (mapped == 255)).sum() > 0
    assert found.used == used.sum()
    confusion = np.zeros((3, 3), int)
    np.add.at(confusion, (truth[used], mapped[used]), 1)
    assert (found.metrics.confusion == confusion).all()
    pixels = np.bincount(codes_of()[codes_of() != 255])
    np.testing.assert_allclose(found.mapped_areas, 100.0 * pixels)
    np.testing.assert_allclose(found.estimates.proportions.sum(axis=0), pixels / pixels.sum())
    assert sum(one.value for one in found.areas) == pytest.approx(100.0 * pixels.sum())
    simple = evaluate_map(product, path, column="crop", spec=AccuracySpec(strata="none"))
    assert simple.estimates.overall_accuracy.value == pytest.approx(
        np.trace(confusion) / confusion.sum()
    )


@pytest.mark.parametrize(
    ("texts", "way"),
    [
        (["Wheat", "maize & SORGHUM", "Grass"], "name"),
        ([110, 120, 130], "value"),
        ([110.0, 120.0, 130.0], "value"),
        (["0", "1", "2"], "code"),
    ],
    ids=["names", "numbers", "decimals", "codes"],
)
def test_classes_are_matched(product, tmp_path, texts, way):
    points([50] * 3, [5, 40, 70], texts).to_file(tmp_path / "p.gpkg")
    found = evaluate_map(product, tmp_path / "p.gpkg", column="crop")
    assert found.matched_by == way
    assert np.diag(found.metrics.confusion).tolist() == [1, 1, 1]
    assert math.isnan(found.estimates.overall_accuracy.standard_error)
    assert any("single unit" in note for note in found.notes)


def test_unknown_classes_are_named_and_can_be_renamed(product, tmp_path):
    points([50, 50], [5, 40], ["Wheat", "corn"]).to_file(tmp_path / "p.gpkg")
    with pytest.raises(LabelError, match=r"'corn'.*Maize & sorghum \(120, 1\).*--rename"):
        evaluate_map(product, tmp_path / "p.gpkg", column="crop")
    spec = AccuracySpec(rename={"corn": "Maize & sorghum"})
    found = evaluate_map(product, tmp_path / "p.gpkg", column="crop", spec=spec)
    assert found.estimates.overall_accuracy.value == 1
    assert found.estimates.covered < 1
    # Areas are those of the strata with a point; of all points right, as they are mapped.
    seen = [area for area, n in zip(found.mapped_areas, found.metrics.support, strict=True) if n]
    assert sum(one.value for one in found.areas) == pytest.approx(sum(seen))
    assert any("the figures hold for the other" in note for note in found.notes)


def test_values_may_be_renamed_to_names(product, tmp_path):
    """The remedy that a message names, where the column holds the crops' values."""
    legend = open_class_map(product).legend
    values = [entry.value for entry in legend.classes]
    points([50, 50, 50], [5, 40, 70], [values[0], "corn", values[2]]).to_file(tmp_path / "p.gpkg")
    with pytest.raises(LabelError, match="--rename") as caught:
        evaluate_map(product, tmp_path / "p.gpkg", column="crop")
    assert f"--rename 'corn'={legend.names[0]!r}" in str(caught.value)
    spec = AccuracySpec(rename={"corn": legend.names[1]})
    found = evaluate_map(product, tmp_path / "p.gpkg", column="crop", spec=spec)
    assert np.diag(found.metrics.confusion).tolist() == [1, 1, 1]
    by_value = AccuracySpec(rename={"corn": values[1]}, match="value")
    again = evaluate_map(product, tmp_path / "p.gpkg", column="crop", spec=by_value)
    np.testing.assert_array_equal(again.metrics.confusion, found.metrics.confusion)


def test_numbers_that_mean_two_things_are_not_guessed():
    legend = Legend.from_values(["1", "2", "3"])
    with pytest.raises(LabelError, match="--match value or --match code"):
        match_classes({"1", "2"}, legend)
    assert match_classes({"1", "2"}, legend, "code") == ("code", {"1": 1, "2": 2})
    assert match_classes({"1", "2"}, legend, "value") == ("value", {"1": 0, "2": 1})
    assert match_classes({"3"}, legend) == ("value", {"3": 2})
    assert match_classes({"0", "1"}, legend) == ("code", {"0": 0, "1": 1})


def test_a_class_called_none_is_no_empty_cell(product, tmp_path):
    legend = tmp_path / "legend.csv"
    legend.write_text("value,name\n0,Wheat\n1,None\n2,Grass\n")
    table = points([50] * 5, [5, 40, 70, 5, 40], ["Wheat", "None", "Grass", "", "NA"])
    places = table.to_crs("EPSG:4326").geometry
    rows = [f"{x},{y},{crop}" for x, y, crop in zip(places.x, places.y, table["crop"], strict=True)]
    (tmp_path / "P.CSV").write_text("\n".join(["lon,lat,crop", *rows, ",,Wheat"]) + "\n")
    found = evaluate_map(product / "classes.tif", tmp_path / "P.CSV", column="crop", legend=legend)
    assert np.diag(found.metrics.confusion).tolist() == [1, 1, 1]
    assert (found.used, found.empty, found.outside) == (3, 2, 1)


def test_three_by_three(product, tmp_path):
    with rasterio.open(product / "classes.tif", "r+") as target:
        target.write(np.array([[2]], dtype=np.uint8), 1, window=((5, 6), (5, 6)))
    # A stray pixel, a pixel at the raster's corner, one beside the other class, one without label.
    points([5, 0, 20, 5], [5, 0, 30, 75], ["0", "0", "1", "0"]).to_file(tmp_path / "p.gpkg")
    plain = evaluate_map(product, tmp_path / "p.gpkg", column="crop")
    three = evaluate_map(
        product, tmp_path / "p.gpkg", column="crop", spec=AccuracySpec(neighbourhood="3x3")
    )
    assert plain.metrics.confusion[0].tolist() == [1, 0, 1]
    assert three.metrics.confusion[0].tolist() == [2, 0, 0]
    assert three.metrics.confusion[1].tolist() == [0, 1, 0]
    assert plain.nodata == three.nodata == 1


def test_strata_are_of_the_pixel_and_not_of_what_lies_around_it(product, tmp_path):
    """A census of a speckled map: what it estimates is what is there."""
    rng = np.random.default_rng(4)
    truth = codes_of()
    noisy = np.where((rng.random(SHAPE) < 0.3) & (truth != 255), rng.integers(0, 3, SHAPE), truth)
    with rasterio.open(product / "classes.tif", "r+") as target:
        target.write(noisy.astype(np.uint8), 1)
    rows, cols = np.nonzero(truth != 255)
    # Every pixel of the first class, and one in three of the others.
    drawn = (noisy[rows, cols] == 0) | (rng.permutation(len(rows)) % 3 == 0)
    rows, cols = rows[drawn], cols[drawn]
    points(rows, cols, truth[rows, cols].astype(str)).to_file(tmp_path / "p.gpkg")
    spec = AccuracySpec(neighbourhood="3x3", match="code")
    found = evaluate_map(product, tmp_path / "p.gpkg", column="crop", spec=spec).estimates
    shares = np.bincount(truth[truth != 255]) / (truth != 255).sum()
    for one, share in zip(found.area_share, shares, strict=True):
        assert abs(one.value - share) < 0.02
        assert one.lower < share < one.upper


def test_parcels_weigh_by_their_area(product, tmp_path):
    def square(row, col, height, width):
        return shapely.box(
            TRANSFORM.c + col * 10, TRANSFORM.f - (row + height) * 10,
            TRANSFORM.c + (col + width) * 10, TRANSFORM.f - row * 10,
        )  # fmt: skip

    shapes = [square(20, 2, 10, 20), square(20, 26, 5, 10), square(45, 65, 10, 10),
              square(0, 75, 5, 5), square(0, 500, 5, 5)]  # fmt: skip
    crop = ["Wheat", "Wheat", "Grass", "Grass", "Grass"]
    geopandas.GeoDataFrame({"crop": crop}, geometry=shapes, crs="EPSG:32631").to_file(
        tmp_path / "p.gpkg"
    )
    found = evaluate_map(product, tmp_path / "p.gpkg", column="crop")
    # The second parcel has six of ten columns in the other class.
    assert found.kind == "parcels"
    assert (found.used, found.nodata, found.outside) == (3, 1, 1)
    assert found.estimates.overall_accuracy.value == pytest.approx(300 / 350)
    expected = estimate_accuracy(
        np.array([0, 0, 2]), np.array([0, 1, 2]), classes=3, strata=np.zeros(3, int),
        stratum_areas=np.ones(1), sizes=np.array([200.0, 50.0, 100.0]),
    )  # fmt: skip
    error = found.estimates.overall_accuracy.standard_error
    assert error == pytest.approx(expected.overall_accuracy.standard_error)
    assert any("weighted by the parcels' areas" in note for note in found.notes)
    buffered = evaluate_map(
        product, tmp_path / "p.gpkg", column="crop", spec=AccuracySpec(inner_buffer=25)
    )
    # Three parcels are 50 m wide.
    assert any("3 parcels are nothing but border" in note for note in buffered.notes)
    assert buffered.used == 2


def test_of_parcels_a_map_has_no_known_number(product, tmp_path):
    """However many pixels its strata have, two parcels of each are a sample of many."""
    places = [(20, 2), (30, 9), (20, 40), (33, 44), (45, 65), (52, 73)]
    sides = [(6, 7), (3, 5), (5, 5), (4, 9), (5, 7), (7, 4)]
    shapes = [
        shapely.box(col, row, col + width, row + height)
        for (row, col), (height, width) in zip(places, sides, strict=True)
    ]
    shapes = shapely.transform(shapes, lambda at: np.column_stack(TRANSFORM @ at.T))
    truth = np.array([0, 1, 1, 2, 2, 2])
    path = tmp_path / "p.gpkg"
    frame = {"crop": [LEGEND.names[code] for code in truth]}
    geopandas.GeoDataFrame(frame, geometry=shapes, crs="EPSG:32631").to_file(path)

    found = evaluate_map(product, path, column="crop", spec=AccuracySpec(strata="map"))

    strata = np.repeat(np.arange(3), 2)
    expected = estimate_accuracy(
        truth, strata, classes=3, strata=strata, stratum_areas=found.mapped_areas,
        sizes=100.0 * np.prod(sides, axis=1),
    )  # fmt: skip
    for ours, theirs in (
        (found.estimates.overall_accuracy, expected.overall_accuracy),
        *zip(found.estimates.area_share, expected.area_share, strict=True),
    ):
        assert ours.value == pytest.approx(theirs.value)
        assert ours.standard_error == pytest.approx(theirs.standard_error)
    assert expected.overall_accuracy.standard_error > 0.1


def test_parcels_whose_outlines_cross_themselves_or_have_no_area(product, tmp_path):
    x, y = TRANSFORM.c, TRANSFORM.f
    bow = shapely.Polygon([(x, y - 400), (x + 200, y - 200), (x + 200, y - 400), (x, y - 200)])
    line = shapely.Polygon([(x, y - 100), (x + 200, y - 100), (x + 100, y - 100)])
    shapes = [bow, line, shapely.box(x + 310, y - 300, x + 410, y - 200)]
    geopandas.GeoDataFrame({"crop": ["Wheat"] * 3}, geometry=shapes, crs="EPSG:32631").to_parquet(
        tmp_path / "p.parquet"
    )
    found = evaluate_map(product, tmp_path / "p.parquet", column="crop")
    assert (found.units, found.used, found.outside, found.nodata) == (3, 2, 1, 0)
    # The bow's two triangles, right, and a square that the map takes for maize.
    assert found.estimates.overall_accuracy.value == pytest.approx(20_000 / 30_000)


def test_parcels_on_a_grid_of_degrees_count_by_their_ground_however_rings_run(tmp_path):
    grid = Affine(0.001, 0, 4.0, 0, -0.001, 61.0)
    path = tmp_path / "degrees.tif"
    with rasterio.open(path, "w", driver="GTiff", height=40, width=60, count=1, dtype="uint8",
                       crs="EPSG:4326", transform=grid) as target:  # fmt: skip
        target.write(np.ones((40, 60), dtype=np.uint8), 1)
    outer = [(4.002, 60.97), (4.012, 60.97), (4.012, 60.98), (4.002, 60.98)]
    hole = [(4.004, 60.972), (4.01, 60.972), (4.01, 60.978), (4.004, 60.978)]
    east = [(lon + 0.03, lat) for lon, lat in outer]
    frame = geopandas.GeoDataFrame(
        geometry=[
            shapely.Polygon(outer),
            shapely.Polygon(outer, [hole]),
            shapely.Polygon(outer, [hole[::-1]]),
            shapely.MultiPolygon([shapely.Polygon(outer), shapely.Polygon(east[::-1])]),
        ],
        crs="EPSG:4326",
    )
    sizes = read_units(open_class_map(path), frame).sizes
    np.testing.assert_allclose(sizes[1:] / sizes[0], [0.64, 0.64, 2], rtol=1e-4)
    rows = open_class_map(path).row_areas()[20:30]
    assert sizes[0] == pytest.approx(10 * rows.sum(), rel=1e-4)


def test_a_foreign_map_and_a_legend_file(tmp_path, sample):
    path, *_ = sample
    values = np.array([10, 20, 40, *[0] * 253], dtype=np.int16)[codes_of()]
    raster = tmp_path / "foreign.tif"
    profile = {
        "driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 1, "dtype": "int16",
        "nodata": 0, "crs": "EPSG:32631", "transform": TRANSFORM,
    }  # fmt: skip
    with rasterio.open(raster, "w", **profile) as target:
        target.write(values, 1)
    assert open_class_map(raster).legend.names == ("10", "20", "40")
    legend = tmp_path / "legend.csv"
    legend.write_text("value,name\n10,Wheat\n20,Maize & sorghum\n40,Grass\n")
    found = evaluate_map(raster, path, column="crop", legend=legend)
    assert found.used > 60
    assert found.mapped_areas.sum() == 100.0 * (values != 0).sum()
    # Rows of one name are one class: 20 and 40 together, in the map and in the reference.
    legend.write_text("value,name\n40,Other\n10,Wheat\n20,Other\n")
    grouped = evaluate_map(
        raster, path, column="crop", legend=legend,
        spec=AccuracySpec(rename={"Grass": "40", "Maize & sorghum": "20", "Wheat": "10"}),
    )  # fmt: skip
    assert grouped.legend.names == ("Other", "Wheat")
    whole = found.metrics.confusion
    np.testing.assert_array_equal(
        grouped.metrics.confusion,
        [[whole[1:, 1:].sum(), whole[1:, 0].sum()], [whole[0, 1:].sum(), whole[0, 0]]],
    )
    np.testing.assert_allclose(
        grouped.mapped_areas, [found.mapped_areas[1:].sum(), found.mapped_areas[0]]
    )
    legend.write_text("value,name\n10,Wheat\n20,Maize & sorghum\n")
    with pytest.raises(InputError, match="value 40"):
        evaluate_map(
            raster, path, column="crop", legend=legend, spec=AccuracySpec(rename={"Grass": "Wheat"})
        )


def test_areas_of_pixels_in_degrees(tmp_path):
    """The oracle is the closed form of a zone's area on the ellipsoid."""
    path = tmp_path / "degrees.tif"
    grid = Affine(0.01, 0, 4.0, 0, -0.02, 61.0)
    with rasterio.open(path, "w", driver="GTiff", height=7, width=5, count=1, dtype="uint8",
                       crs="EPSG:4326", transform=grid) as target:  # fmt: skip
        target.write(np.ones((7, 5), dtype=np.uint8), 1)
    a, f = 6378137.0, 1 / 298.257223563
    e = math.sqrt(f * (2 - f))

    def zone(lat):
        s = math.sin(math.radians(lat))
        return s / (1 - (e * s) ** 2) + math.log((1 + e * s) / (1 - e * s)) / (2 * e)

    b = a * (1 - f)
    expected = [
        math.radians(0.01) * b**2 / 2 * (zone(61 - 0.02 * n) - zone(60.98 - 0.02 * n))
        for n in range(7)
    ]
    np.testing.assert_allclose(open_class_map(path).row_areas(), expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("crs", "grid", "expected"),
    [
        ("EPSG:32631", Affine(10, 0, 499_500, 0, -10, 5_600_000), "0.08 % less than"),
        # To beyond the zone in the east, as in the mosaic of a region in several zones.
        ("EPSG:32631", Affine(1e4, 0, 5e5, 0, -1e4, 5e5), None),
        ("EPSG:3857", Affine(10, 0, 5e5, 0, -10, 6.6e6), None),
        ("EPSG:3035", Affine(10, 0, 4e6, 0, -10, 3e6), "as much as"),
    ],
)
def test_how_areas_on_the_grid_differ_from_those_on_the_ground(tmp_path, crs, grid, expected):
    path = tmp_path / "map.tif"
    with rasterio.open(path, "w", driver="GTiff", height=50, width=100, count=1, dtype="uint8",
                       crs=crs, transform=grid) as target:  # fmt: skip
        target.write(np.ones((50, 100), dtype=np.uint8), 1)
    note = open_class_map(path).area_note
    if expected is not None:
        assert note.endswith(f"That is {expected} on the ground.")
        return
    # The oracle is the geodesic area of a small square at each corner.
    shares = []
    for col, row in ((0, 0), (100, 0), (0, 50), (100, 50)):
        x, y = grid.c + grid.a * col, grid.f + grid.e * row
        square = geopandas.GeoSeries([shapely.box(x - 5, y - 5, x + 5, y + 5)], crs=crs)
        shape = square.to_crs("EPSG:4326")[0]
        shares.append(100 * (100 / abs(Geod(ellps="WGS84").geometry_area_perimeter(shape)[0]) - 1))
    told = [float(one) for one in re.findall(r"(\d+\.\d+) % (?:less|more)", note)]
    assert "more than on the ground" in note
    assert told[-1] == pytest.approx(max(shares), rel=0.03)
    assert max(shares) > 1


def test_areas_of_a_mosaic_of_zones_are_those_on_the_ground(tmp_path):
    """In the CRS of one zone the ground of the next is too large; the oracle are geodesics."""
    rng = np.random.default_rng(3)
    maps = []
    # At 36 E on the equator, where zone 36 ends, and three degrees into zone 37.
    for crs, left, top in (("EPSG:32736", 833_000, 9_999_000), ("EPSG:32737", 500_000, 9_999_000)):
        blobs = rng.integers(0, 3, (21, 35)).repeat(5, 0).repeat(7, 1)[:101, :243].astype(np.uint8)
        place = tmp_path / crs[-5:] / "classes.tif"
        place.parent.mkdir()
        grid = Affine(10, 0, left, 0, -10, top)
        with rasterio.open(place, "w", driver="GTiff", height=101, width=243, count=1, nodata=255,
                           dtype="uint8", crs=crs, transform=grid) as target:  # fmt: skip
            target.write(blobs, 1)
        maps.append((place, GeoBox(blobs.shape, grid, crs)))
    write_mosaic(maps, tmp_path / "classes.vrt", warped=tmp_path / "warped", legend=LEGEND)
    shown = open_class_map(tmp_path)
    assert shown.shape_yx[1] > 30_000
    found = shown.count_pixels()
    assert "ellipsoid" in found.note
    geod = Geod(ellps="WGS84")
    ground = np.zeros(3)
    grid = shown.transform
    with shown.reader() as reader:
        codes = reader.read(Window(0, 0, *shown.shape_yx))
    to_degrees = Transformer.from_crs("EPSG:32736", 4326, always_xy=True).transform
    for part in (slice(0, 400), slice(codes.shape[1] - 400, codes.shape[1])):
        middle = (part.start + part.stop) / 2, codes.shape[0] / 2
        x, y = grid * middle
        around = shapely.box(x - 50, y - 50, x + 50, y + 50)
        square = shapely.transform(around, to_degrees, interleaved=False)
        pixel = abs(geod.geometry_area_perimeter(square)[0]) / 100
        ground += pixel * np.bincount(codes[:, part].ravel(), minlength=256)[:3]
        points = geopandas.GeoDataFrame(geometry=[shapely.Point(x, y)], crs="EPSG:32736")
        assert read_units(shown, points).sizes[0] == pytest.approx(pixel, rel=2e-5)
    np.testing.assert_allclose(found.areas, ground, rtol=2e-5)
    assert (found.areas < 0.995 * 100 * found.pixels).all()

    report = write_polygons(shown, tmp_path / "patches.parquet")
    patches = geopandas.read_parquet(tmp_path / "patches.parquet")
    assert report.area_note == found.note
    by_class = patches.groupby("code").area_m2.sum()
    np.testing.assert_allclose(by_class, found.areas, rtol=1e-9)
    outlines = patches.geometry.to_crs(4326)
    exact = [abs(geod.geometry_area_perimeter(one)[0]) for one in outlines]
    np.testing.assert_allclose(patches.area_m2, exact, rtol=1e-4)
    np.testing.assert_allclose(read_units(shown, patches[["geometry"]]).sizes, exact, rtol=1e-6)


def test_land_that_is_none_of_the_classes_counts_against_the_map(product, tmp_path, capsys):
    """A fifth of what is mapped is forest: left empty in the reference, it flatters the map."""
    rng = np.random.default_rng(11)
    codes = codes_of()
    truth = np.where(rng.random(SHAPE) < 0.2, 3, codes)
    places = rng.permutation(np.argwhere(codes != 255))[:700]
    rows, cols = places.T
    names = np.array([*LEGEND.names, "Forest"], dtype=object)[truth[rows, cols]]
    path = tmp_path / "points.gpkg"
    points(rows, cols, names).to_file(path)
    with pytest.raises(LabelError, match="--other 'Forest'"):
        evaluate_map(product, path, column="crop")
    found = evaluate_map(product, path, column="crop", spec=AccuracySpec(other=("forest",)))

    pixels = np.bincount(codes[codes != 255])
    oracle = estimate_accuracy(
        truth[rows, cols], codes[rows, cols], classes=4, strata=codes[rows, cols],
        stratum_areas=100.0 * pixels, stratum_units=pixels,
    )  # fmt: skip
    assert found.estimates.overall_accuracy == oracle.overall_accuracy
    assert found.estimates.users_accuracy[:3] == oracle.users_accuracy[:3]
    assert found.areas[3].value == pytest.approx(oracle.area_share[3].value * 100 * pixels.sum())
    assert found.areas[3].lower < 100 * ((truth == 3) & (codes != 255)).sum() < found.areas[3].upper
    assert found.estimates.macro_miou == pytest.approx(
        np.mean([one.value for one in oracle.iou[:3]])
    )
    assert found.estimates.macro_miou > oracle.macro_miou
    assert found.legend.names == (*LEGEND.names, "none of the classes")
    assert found.mapped_areas.tolist() == [*(100.0 * pixels), 0]
    assert any("none of the map's classes" in note for note in found.notes)
    assert not any("producer's accuracy of none" in note for note in found.notes)
    page = write_accuracy(found, tmp_path / "report").read_text()
    assert "none of the classes" in page
    told = json.loads((tmp_path / "report" / "accuracy.json").read_text())
    assert told["reference"] == path.name
    assert str(tmp_path) not in page + json.dumps(told)
    assert told["per_class"][3]["area_m2"]["value"] == pytest.approx(found.areas[3].value)

    points(rows, cols, np.where(names == "Forest", None, names)).to_file(path)
    flattered = evaluate_map(product, path, column="crop", spec=AccuracySpec(other=("forest",)))
    assert flattered.legend == LEGEND
    assert flattered.estimates.overall_accuracy.value == 1
    assert found.estimates.overall_accuracy.value < 0.85
    with pytest.raises(LabelError, match="Wheat for land that is none"):
        evaluate_map(product, path, column="crop", spec=AccuracySpec(other=("wheat",)))

    points(rows, cols, names).to_file(path)
    words = ["evaluate", str(product), str(path), "--column", "crop", "--other", "Forest"]
    assert invoke(words) == 0
    assert "points lie on land that is none of the map's classes" in capsys.readouterr().out


def test_half_intervals_are_told_before_they_are_cut(product, tmp_path):
    """Two units of a class, one of them right: 50 percent, with a standard error of 50 points."""
    path = tmp_path / "points.gpkg"
    crop = ["Wheat", "Grass", "Maize & sorghum", "Maize & sorghum"]
    points([5, 9, 5, 9], [5, 9, 40, 44], crop).to_file(path)
    found = evaluate_map(product, path, column="crop")
    wheat = found.estimates.users_accuracy[0]
    assert (wheat.value, wheat.lower, wheat.upper) == (0.5, 0.0, 1.0)
    half = 100 * 1.959964 * wheat.standard_error
    assert half > 97
    told = [line for line in found.lines() if "\N{PLUS-MINUS SIGN}" in line]
    assert f"50.0 \N{PLUS-MINUS SIGN} {half:.1f}" in next(
        line for line in told if line.startswith("Wheat")
    )
    area = found.areas[2]
    half = 1.959964 * area.standard_error / 1e4
    assert half > (area.upper - area.value) / 1e4
    assert f"{area.value / 1e4:,.1f} \N{PLUS-MINUS SIGN} {half:,.1f}" in next(
        line for line in told if line.startswith("Grass")
    )


def test_what_has_no_figure_is_told_by_a_dash(product, tmp_path):
    """One unit a class: none has a standard error; and one class that nothing is known of."""
    path = tmp_path / "points.gpkg"
    points([5, 5], [5, 40], ["Wheat", "Maize & sorghum"]).to_file(path)
    found = evaluate_map(product, path, column="crop")
    assert math.isnan(found.estimates.overall_accuracy.standard_error)
    lines = found.lines()
    assert not [line for line in lines if "nan" in line]
    table = lines[next(row for row, line in enumerate(lines) if line.startswith("class ")) + 1 :]
    assert table[0].split() == ["Wheat", "100.0", "100.0", "100.0", "27.4", "27.4"]
    assert table[2].split() == ["Grass", "-", "-", "-", "5.7", "0.0"]


def test_an_interval_without_length_is_not_passed_off_as_certainty(product, tmp_path):
    """Three points of Maize, all right: a map that is wrong at every third would often do as well.

    Of a census the interval is rightly empty.
    """
    said = re.compile("All units said the same for (.*): the standard error is 0")
    path = tmp_path / "points.gpkg"
    points(
        [5, 9, 14, 5, 9, 14, 50, 52],
        [5, 9, 14, 40, 44, 48, 70, 72],
        ["Wheat", "Wheat", "Grass", *["Maize & sorghum"] * 3, "Grass", "Wheat"],
    ).to_file(path)
    found = evaluate_map(product, path, column="crop")
    maize = found.estimates.users_accuracy[1]
    assert (maize.value, maize.lower, maize.upper) == (1, 1, 1)
    assert (1 - 1 / 3) ** 3 > 0.25
    told = [match[1] for note in found.notes if (match := said.match(note))]
    assert told == [
        "the user's accuracy of Maize & sorghum (3), the producer's accuracy of Maize & sorghum (3)"
    ]

    rows, cols = np.nonzero(codes_of() != 255)
    names = np.array(LEGEND.names, dtype=object)[codes_of()[rows, cols]]
    points(rows, cols, names).to_file(path)
    found = evaluate_map(product, path, column="crop")
    assert found.estimates.overall_accuracy.standard_error == 0
    assert not [note for note in found.notes if said.match(note)]


def test_report_and_figures(product, sample, tmp_path):
    path, *_ = sample
    found = evaluate_map(product, path, column="crop")
    page = write_accuracy(found, tmp_path / "report").read_text()
    assert "Maize &amp; sorghum" in page
    assert page.count("data:image/png") == 3
    assert f"{100 * found.estimates.overall_accuracy.value:.1f}" in page
    names = {file.name for file in (tmp_path / "report").iterdir()}
    assert names == set(ACCURACY_FILES)
    assert not [name for name in names if name.startswith(".")]
    told = json.loads((tmp_path / "report" / "accuracy.json").read_text())
    assert told["overall_accuracy"]["value"] == found.estimates.overall_accuracy.value
    assert np.array(told["confusion"]).sum() == found.used


def test_the_commands(product, tmp_path, capsys):
    points_file, figures = tmp_path / "visit.gpkg", tmp_path / "figures.json"
    design = ["evaluate", "design", str(product), "--count", "60", "--out", str(points_file)]
    assert invoke([*design, "--dry-run"]) == 0
    assert not points_file.exists()
    assert invoke(design) == 0
    assert "60 points" in capsys.readouterr().out
    assert invoke(["evaluate", str(product), "--reference", str(points_file)]) == 2
    assert "60 have no class" in capsys.readouterr().err
    frame = geopandas.read_file(points_file)
    frame["reference"] = frame["stratum_name"]
    frame.to_file(points_file)
    told = ["evaluate", str(product), str(points_file), "--json", str(figures)]
    assert invoke([*told, "--dry-run"]) == 0
    assert not (product / "accuracy").exists()
    assert invoke(told) == 0
    shown = capsys.readouterr().out
    assert "Overall accuracy 100.0" in shown
    assert "from visit.design.json" in shown
    assert json.loads(figures.read_text())["overall_accuracy"]["value"] == 1
    assert (product / "accuracy" / "report.html").is_file()

    squares = geopandas.GeoDataFrame(
        {"id": [1]},
        geometry=[shapely.box(500_000, 5_599_800, 500_200, 5_600_000)],
        crs="EPSG:32631",
    )
    squares.to_file(tmp_path / "fields.gpkg")
    out = tmp_path / "fields.parquet"
    assert invoke(["parcels", str(product), str(tmp_path / "fields.gpkg"), str(out)]) == 0
    assert geopandas.read_parquet(out)["map_class"].tolist() == ["Wheat"]
    assert geopandas.read_parquet(out)["map_confidence"].tolist() == [80]
    out = tmp_path / "patches.gpkg"
    assert invoke(["polygons", str(product), str(out), "--minimum-area", "500"]) == 0
    assert "0.08 % less than on the ground" in capsys.readouterr().out
    assert len(geopandas.read_file(out)) == 4


def test_points_of_a_map_without_a_legend_are_scored_by_the_command_that_is_printed(
    tmp_path, capsys
):
    codes = np.repeat(np.array([[3, 7]], dtype=np.uint8), 40, axis=0).repeat(20, axis=1)
    with rasterio.open(
        tmp_path / "classes.tif", "w", driver="GTiff", width=40, height=40, count=1, dtype="uint8",
        crs="EPSG:32631", transform=rasterio.transform.from_origin(5e5, 5.6e6, 10, 10), nodata=255,
    ) as target:  # fmt: skip
        target.write(codes, 1)
    (tmp_path / "legend.csv").write_text("value,name\n3,Wheat\n7,Maize\n")
    points = tmp_path / "points.gpkg"
    design = ["evaluate", "design", str(tmp_path / "classes.tif"), "--count", "20"]
    assert invoke([*design, "--legend", str(tmp_path / "legend.csv"), "--out", str(points)]) == 0
    frame = geopandas.read_file(points)
    frame["reference"] = frame["stratum_name"]
    frame.to_file(points)

    (told,) = re.findall("then stcln-geo (.*)", capsys.readouterr().out)

    assert invoke(shlex.split(told)) == 0
    assert "Overall accuracy 100.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["evaluate", "MAP"], "--reference"),
        (["evaluate", "MAP", "POINTS"], "Its columns are: crop"),
        (["evaluate", "MAP", "POINTS", "--reference", "POINTS"], "one reference"),
        (["evaluate", "MAP", "POINTS", "--column", "crop", "--strata-column", "crop"], "--design"),
        (["evaluate", "MAP", "POINTS", "--column", "crop", "--rename", "corn"], "= between"),
        (["evaluate", "MAP", "POINTS", "--column", "crop", "--match", "colour"], "auto, value"),
        (["evaluate", "MAP", "POINTS", "--column", "crop", "--inner-buffer", "5"], "for parcels"),
        (["evaluate", "MAP", "MAP"], "it is a folder"),
        (["evaluate", "MAP", "none.gpkg"], "no such file"),
        (["evaluate", "none.tif", "POINTS"], "no such file"),
        (["evaluate", "RUN"], "needs a cube"),
        (["evaluate", "RUN", "POINTS", "--strata", "map", "--out", "x"], "use --strata, --out to"),
        (["evaluate", "MAP", "POINTS", "--season", "2018-09-01"], "use --season to"),
        (["evaluate", "design", "MAP", "--out", "x.gpkg"], "exactly one"),
        (["evaluate", "design", "MAP", "--count", "9", "--out", "x.shp"], ".gpkg"),
        (
            ["evaluate", "design", "MAP", "--count", "9", "--expected", "good", "--out", "x.gpkg"],
            "number",
        ),
        (["polygons", "MAP", "x.kml"], ".gpkg"),
    ],
)
def test_mistakes_exit_2(product, sample, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    places = {"MAP": str(product), "POINTS": str(sample[0]), "RUN": str(tmp_path)}
    assert invoke([places.get(word, word) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert not (tmp_path / "x.gpkg").exists()
