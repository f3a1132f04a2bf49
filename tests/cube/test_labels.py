"""Burning agrees with rasterio, whatever the file's CRS, and says clearly what it cannot do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas
import pytest
from rasterio.features import rasterize
from shapely import transform
from shapely.geometry import Point, Polygon, box

from stcln_geo.cli.main import invoke
from stcln_geo.cube.labels import burn_labels
from stcln_geo.cube.lock import cube_lock
from stcln_geo.cube.store import (
    Layout,
    Season,
    create_season,
    finish_season,
    open_season,
    write_split,
)
from stcln_geo.errors import LabelError, MissingFileError
from stcln_geo.grid import Lattice, Window, geobox_from_window
from stcln_geo.legend import Legend

SHAPE = (61, 83)
CRS = "EPSG:32631"


@pytest.fixture
def cube(tmp_path: Path) -> Path:
    return make_cube(tmp_path / "own.zarr", Window(-563000, 57000, *SHAPE))


def make_cube(path: Path, window: Window, *, crs: str = CRS) -> Path:
    geobox = geobox_from_window(window, crs=crs, resolution=10)
    create_season(
        path, "2018-09-01", geobox=geobox, time=np.array(["2018-10-01"], "datetime64[D]"),
        bands=("red", "nir"), aoi=box(*geobox.boundingbox.bbox), layout=Layout(chunk=32, shard=64),
        lattice=Lattice(),
    )  # fmt: skip
    finish_season(path, "2018-09-01")
    return path


def polygons(season: Season, *, count: int = 24, seed: int = 0) -> geopandas.GeoDataFrame:
    """Irregular quadrilaterals, some overlapping, some partly outside; three crops."""
    left, bottom, right, top = season.geobox.boundingbox.bbox
    generator = np.random.default_rng(seed)
    shapes = []
    for _ in range(count):
        x, y = generator.uniform(left, right), generator.uniform(bottom, top)
        corners = [(1, 0), (0, 1), (-1, 0), (0, -1)]
        sizes = generator.uniform(20, 90, 4)
        shapes.append(
            Polygon([(x + a * s, y + b * s) for (a, b), s in zip(corners, sizes, strict=True)])
        )
    crops = np.array(["wheat", "maize", "beet"])[np.arange(count) % 3]
    return geopandas.GeoDataFrame(
        {"crop": crops, "id": range(count)}, geometry=shapes, crs=season.geobox.crs
    )


def write(frame: geopandas.GeoDataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path)
    return path


@pytest.mark.parametrize("suffix", [".gpkg", ".geojson", ".parquet"])
@pytest.mark.parametrize("all_touched", [False, True], ids=["centres", "touched"])
def test_equals_rasterio(cube: Path, tmp_path: Path, suffix: str, all_touched: bool) -> None:
    season = open_season(cube)
    frame = polygons(season)
    file = frame.to_crs(4326) if suffix == ".geojson" else frame

    report = burn_labels(
        cube, write(file, tmp_path / f"fields{suffix}"), column="crop", all_touched=all_touched
    )

    expected = rasterize(
        zip(frame.geometry, range(1, len(frame) + 1), strict=True),
        out_shape=SHAPE,
        transform=season.geobox.affine,
        all_touched=all_touched,
        dtype="int32",
    )
    names = np.array(["", *frame["crop"]])
    opened = open_season(cube)
    labels = opened.labels[:]
    assert opened.legend is not None
    assert opened.legend.names == ("beet", "maize", "wheat")
    burnt = np.array([*opened.legend.names, *[""] * 253])[labels]
    # Reprojection to and fro moves corners by less than a millimetre.
    assert (burnt != names[expected]).sum() <= (3 if suffix == ".geojson" else 0)
    assert report.pixels == (labels != 255).sum()


def test_the_geometry_of_geoparquet_may_bear_any_name(cube: Path, tmp_path: Path) -> None:
    frame = polygons(open_season(cube))
    burn_labels(cube, write(frame, tmp_path / "usual.parquet"), column="crop")
    usual = open_season(cube).parcels[:]

    other = write(frame.rename_geometry("geom"), tmp_path / "other.parquet")
    burn_labels(cube, other, column="crop")

    np.testing.assert_array_equal(open_season(cube).parcels[:], usual)
    with pytest.raises(LabelError, match=r"no column 'geom'\. Its columns are: crop, id"):
        burn_labels(cube, other, column="geom")
    far = frame.set_geometry(frame.translate(xoff=90_000)).rename_geometry("geom")
    with pytest.raises(LabelError, match=r"covers \(6.*the cube covers \(57"):
        burn_labels(cube, write(far, tmp_path / "far.parquet"), column="crop")


def test_fields_at_the_edge_of_a_wide_cube_are_found_in_degrees(tmp_path: Path) -> None:
    # Along the northern edge the middle lies 170 m north of the line between the corners.
    path = make_cube(tmp_path / "wide.zarr", Window(-560011, 46003, 101, 8003))
    left, bottom, right, top = open_season(path).geobox.boundingbox.bbox
    west = np.linspace(left + 100, right - 200, 31)
    edges = [box(x, y, x + 60, y + 60) for x in west for y in (top - 80, bottom + 20)]
    crops = [("wheat", "maize")[number % 2] for number in range(len(edges))]
    frame = geopandas.GeoDataFrame({"crop": crops}, geometry=edges, crs=CRS)

    for suffix in (".gpkg", ".parquet"):
        file = write(frame.to_crs(4326), tmp_path / f"fields{suffix}")
        report = burn_labels(path, file, column="crop", dry_run=True)

        assert (report.features, len(report.fields)) == (62, 62)


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".parquet"])
@pytest.mark.parametrize("way", ["jumping", "beyond 180", "before -180"])
def test_fields_across_the_antimeridian_are_found_in_degrees(
    tmp_path: Path, suffix: str, way: str
) -> None:
    # 180 E, 17 S lies at 819 451 m in zone 60: the line runs through the middle of the cube.
    cube = make_cube(tmp_path / "fiji.zarr", Window(-811_860, 81_905, *SHAPE), crs="EPSG:32760")
    frame = polygons(open_season(cube))
    burn_labels(cube, write(frame, tmp_path / "metres.gpkg"), column="crop")
    expected = open_season(cube).labels[:], open_season(cube).parcels[:]

    def moved(points: np.ndarray) -> np.ndarray:
        turn = {"jumping": 0, "beyond 180": 360, "before -180": -360}[way]
        away = points[:, 0] * turn < 0
        return np.column_stack([points[:, 0] + turn * away, points[:, 1]])

    degrees = frame.to_crs(4326)
    degrees["geometry"] = [transform(shape, moved) for shape in degrees.geometry]
    elsewhere = geopandas.GeoDataFrame(
        {"crop": "sorghum", "id": -1}, geometry=[box(30, -17.1, 30.1, -16.9)], crs=4326, index=[-1]
    )
    file = write(pandas.concat([degrees, elsewhere]), tmp_path / f"fields{suffix}")
    report = burn_labels(cube, file, column="crop")

    assert report.features == len(frame)
    assert report.legend.names == ("beet", "maize", "wheat")
    for burnt, metres in zip(
        (open_season(cube).labels[:], open_season(cube).parcels[:]), expected, strict=True
    ):
        assert (burnt != metres).sum() <= 3


def test_fields_and_parcels_tell_the_same(cube: Path, tmp_path: Path) -> None:
    file = write(polygons(open_season(cube)), tmp_path / "fields.gpkg")

    report = burn_labels(cube, file, column="crop")

    opened = open_season(cube)
    labels, parcels, fields = opened.labels[:], opened.parcels[:], opened.fields
    assert fields is not None
    assert fields.number.tolist() == list(range(1, len(fields) + 1))
    assert np.bincount(parcels.reshape(-1))[1:].tolist() == fields.pixels.tolist()
    assert ((labels == 255) == (parcels == 0)).all()
    for number, code in zip(fields.number, fields.code, strict=True):
        assert (labels[parcels == number] == code).all()
    assert (fields.split == 0).all()
    assert report.features == 24
    assert report.without_pixel == 24 - len(fields)
    assert opened.labels.dtype == np.uint8
    assert opened.parcels.dtype == np.int32


@pytest.mark.parametrize("dtype", ["Int64", "string", "object"])
def test_nullable_columns_of_geoparquet_may_have_gaps(
    cube: Path, tmp_path: Path, dtype: str
) -> None:
    frame = polygons(open_season(cube))
    codes = np.array([11, 12, 13] if dtype == "Int64" else ["a", "b", "c"], dtype=object)
    column = codes[np.arange(len(frame)) % 3]
    column[[5, 17]] = None
    frame = frame.assign(crop=pandas.array(column, dtype=dtype))

    report = burn_labels(cube, write(frame, tmp_path / "fields.parquet"), column="crop")

    assert report.legend.names == tuple(map(str, codes))
    assert report.without_value == 2


def test_classes_with_few_fields_are_dropped_and_listed(cube: Path, tmp_path: Path) -> None:
    frame = polygons(open_season(cube))
    frame.loc[[0, 3], "crop"] = "rye"
    file = write(frame, tmp_path / "fields.gpkg")

    report = burn_labels(cube, file, column="crop", min_fields=3)

    assert report.legend.names == ("beet", "maize", "wheat")
    (dropped,) = report.dropped
    assert (dropped.value, dropped.fields) == ("rye", 2)
    assert any("rye" in line and "fewer than 3" in line for line in report.lines())
    kept = burn_labels(cube, file, column="crop", min_fields=2)
    assert kept.legend.names == ("beet", "maize", "rye", "wheat")
    assert kept.pixels == report.pixels + dropped.pixels


def test_more_values_than_codes_may_be_dropped(cube: Path, tmp_path: Path) -> None:
    left, bottom, _, _ = open_season(cube).geobox.boundingbox.bbox
    squares = [
        box(left + 10 * (place % 80), bottom + 10 * (place // 80), left + 10 * (place % 80) + 10,
            bottom + 10 * (place // 80) + 10)
        for place in range(300)
    ]  # fmt: skip
    crops = [*("wheat", "maize", "beet") * 3, *(f"rare {place}" for place in range(291))]
    frame = geopandas.GeoDataFrame({"crop": crops}, geometry=squares, crs=CRS)
    file = write(frame, tmp_path / "fields.gpkg")

    report = burn_labels(cube, file, column="crop")

    assert report.legend.names == ("beet", "maize", "wheat")
    assert {(drop.fields, drop.pixels, drop.reason) for drop in report.dropped} == {
        (1, 1, "fewer than 3 fields")
    }
    assert len(report.dropped) == 291
    with pytest.raises(LabelError, match="codes are 0 to 254"):
        burn_labels(cube, file, column="crop", min_fields=1)


def test_legend_chooses_names_and_order(cube: Path, tmp_path: Path) -> None:
    file = write(polygons(open_season(cube)), tmp_path / "fields.gpkg")
    legend = Legend.from_rows(
        [
            {"value": "wheat", "name": "Winter wheat", "color": "#102030"},
            {"value": "oats"},
            {"value": "beet"},
        ],
        source="test",
    )

    report = burn_labels(cube, file, column="crop", legend=legend)

    assert report.legend.names == ("Winter wheat", "beet")
    assert report.legend.colormap()[0] == (16, 32, 48, 255)
    assert {drop.value: drop.reason for drop in report.dropped} == {
        "oats": "fewer than 3 fields",
        "maize": "not in the legend",
    }


def test_crops_may_be_grouped_by_a_legend(cube: Path, tmp_path: Path) -> None:
    """Labels are those of a file in which each crop of a group has the name of the group."""
    frame = polygons(open_season(cube))
    frame["crop"] = np.where(frame["id"] == 0, "spelt", frame["crop"])
    (tmp_path / "legend.csv").write_text(
        "value,name\nbeet,Beet\nwheat,Cereal\nspelt,Cereal\nmaize,Maize\n"
    )
    legend = Legend.read(tmp_path / "legend.csv")

    report = burn_labels(cube, write(frame, tmp_path / "f.gpkg"), column="crop", legend=legend)

    season = open_season(cube)
    labels, fields = season.labels[:], season.fields
    assert report.legend.names == ("Beet", "Cereal", "Maize")
    assert report.dropped == ()
    assert season.legend == report.legend
    frame["crop"] = frame["crop"].replace({"wheat": "b", "spelt": "b", "beet": "a", "maize": "c"})
    burn_labels(cube, write(frame, tmp_path / "plain.gpkg"), column="crop")
    np.testing.assert_array_equal(labels, open_season(cube).labels[:])
    np.testing.assert_array_equal(fields.code, open_season(cube).fields.code)


def test_numbers_are_sorted_as_numbers_and_written_whole(cube: Path, tmp_path: Path) -> None:
    frame = polygons(open_season(cube))
    frame["code"] = np.where(frame["crop"] == "beet", 1110.0, np.where(frame["id"] % 2, 20.0, 9.0))
    frame.loc[frame["id"] == 23, "code"] = np.nan
    file = write(frame, tmp_path / "fields.gpkg")

    report = burn_labels(cube, file, column="code")

    assert report.legend.names == ("9", "20", "1110")
    assert report.without_value == 1


def test_erosion_takes_the_border_off(cube: Path, tmp_path: Path) -> None:
    season = open_season(cube)
    left, _, _, top = season.geobox.boundingbox.bbox
    squares = [
        box(left + 100 * col, top - 100 * row - 100, left + 100 * col + 100, top - 100 * row)
        for row in range(2)
        for col in range(4)
    ]
    frame = geopandas.GeoDataFrame({"crop": ["a", "b"] * 4}, geometry=squares, crs=CRS)
    file = write(frame, tmp_path / "fields.gpkg")

    report = burn_labels(cube, file, column="crop", erode=2)

    parcels = open_season(cube).parcels[:]
    second = np.argwhere(parcels == 2)
    # Neighbours on the left, right and below; above is the edge of the cube, which is no border.
    assert second.min(axis=0).tolist() == [0, 12]
    assert second.max(axis=0).tolist() == [7, 17]
    assert report.fields.pixels[1] == 8 * 6


def test_burning_again_replaces_labels_and_split(cube: Path, tmp_path: Path) -> None:
    season = open_season(cube)
    first = write(polygons(season, count=30), tmp_path / "first.gpkg")
    second = write(polygons(season, count=12, seed=9), tmp_path / "second.gpkg")
    burn_labels(cube, first, column="crop")
    fields = open_season(cube).fields
    assert fields is not None
    write_split(open_season(cube, mode="r+"), np.full(len(fields), 3, dtype=np.uint8))

    report = burn_labels(cube, second, column="crop")

    again = open_season(cube).fields
    assert again is not None
    assert len(again) == len(report.fields) < len(fields)
    assert (again.split == 0).all()
    assert open_season(cube).parcels[:].max() == len(again)


def test_an_interrupted_burn_leaves_no_half_labels(
    cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(polygons(open_season(cube)), tmp_path / "fields.gpkg")
    burn_labels(cube, file, column="crop")
    from stcln_geo.cube import store

    create_array = store.create_array

    def fail_at_fields(group: Any, name: str, *args: Any, **options: Any) -> Any:
        if name == "field_code":
            raise KeyboardInterrupt
        return create_array(group, name, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(store, "create_array", fail_at_fields)
        with pytest.raises(KeyboardInterrupt):
            burn_labels(cube, file, column="crop")

    assert open_season(cube).legend is None
    assert open_season(cube).labels is None
    burn_labels(cube, file, column="crop")
    assert open_season(cube).legend is not None


def test_burning_and_splitting_wait_for_no_other_writer(
    cube: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(polygons(open_season(cube)), tmp_path / "fields.gpkg")
    burn = ["labels", "burn", str(cube), str(file), "--column", "crop"]
    with cube_lock(cube):
        assert invoke(burn) == 2
        assert "one writer at a time" in " ".join(capsys.readouterr().err.split())
        assert invoke([*burn, "--dry-run"]) == 0
    assert open_season(cube).labels is None
    assert invoke(burn) == 0
    split = ["labels", "split", str(cube)]
    with cube_lock(cube):
        assert invoke(split) == 2
        assert invoke([*split, "--dry-run"]) == 0
    assert not open_season(cube).fields.split.any()
    assert invoke(split) == 0
    assert open_season(cube).fields.split.any()
    # A path without a cube gets no lock file and no folder.
    assert invoke(["labels", "split", str(tmp_path / "not" / "there.zarr")]) == 2
    assert not (tmp_path / "not").exists()


def test_dry_run_writes_nothing(cube: Path, tmp_path: Path) -> None:
    file = write(polygons(open_season(cube)), tmp_path / "fields.gpkg")

    report = burn_labels(cube, file, column="crop", dry_run=True)

    assert len(report.fields) > 10
    assert open_season(cube).labels is None


def test_says_what_is_wrong(cube: Path, tmp_path: Path) -> None:
    season = open_season(cube)
    frame = polygons(season)
    file = write(frame, tmp_path / "fields.gpkg")

    with pytest.raises(LabelError, match=r"no column 'kind'\. Its columns are: crop, id"):
        burn_labels(cube, file, column="kind")
    with pytest.raises(LabelError, match=r"no column 'kind'\. Its columns are: crop, id"):
        burn_labels(cube, write(frame, tmp_path / "fields.parquet"), column="kind")
    with pytest.raises(MissingFileError, match="there is no such file"):
        burn_labels(cube, tmp_path / "none.gpkg", column="crop")
    far = frame.translate(xoff=90_000)
    away = geopandas.GeoDataFrame(frame[["crop"]], geometry=far, crs=CRS)
    with pytest.raises(LabelError, match=r"covers \(6.*the cube covers \(57") as caught:
        burn_labels(cube, write(away, tmp_path / "away.gpkg"), column="crop")
    assert "EPSG:32631" in str(caught.value)
    nowhere = geopandas.GeoDataFrame(frame[["crop"]], geometry=frame.geometry.to_numpy(), crs=None)
    with pytest.raises(LabelError, match="no coordinate reference system"):
        burn_labels(cube, write(nowhere, tmp_path / "nowhere.parquet"), column="crop")
    one = frame.assign(crop="wheat")
    with pytest.raises(LabelError, match="1 class with at least 3 fields"):
        burn_labels(cube, write(one, tmp_path / "one.gpkg"), column="crop")
    left, _, _, top = season.geobox.boundingbox.bbox
    dots = [Point(left + 35 + 10 * place, top - 35) for place in range(24)]
    points = geopandas.GeoDataFrame(frame[["crop"]], geometry=dots, crs=CRS)
    with pytest.raises(LabelError, match=r"they are Point; 24 have a value.*outlines of fields"):
        burn_labels(cube, write(points, tmp_path / "points.gpkg"), column="crop")
    (tmp_path / "table.csv").write_text("crop,id\nwheat,1\n")
    with pytest.raises(LabelError, match=r"a table without geometry.*vector file of polygons"):
        burn_labels(cube, tmp_path / "table.csv", column="crop")
    (tmp_path / "broken.gpkg").write_bytes(b"no vector file")
    with pytest.raises(LabelError, match="cannot be read as a vector file"):
        burn_labels(cube, tmp_path / "broken.gpkg", column="crop")


def test_real_fields_of_flanders(flanders: Path, tmp_path: Path) -> None:
    import rasterio

    with rasterio.open(flanders / "labels.tif") as source:
        official, transform, crs = source.read(1), source.transform, source.crs
    geobox = geobox_from_window(
        Window(round(-transform.f / 10), round(transform.c / 10), *official.shape),
        crs=str(crs),
        resolution=10,
    )
    path = tmp_path / "flanders.zarr"
    create_season(
        path, "2018-09-01", geobox=geobox, time=np.array(["2018-10-01"], "datetime64[D]"),
        bands=("red", "nir"), aoi=box(*geobox.boundingbox.bbox), layout=Layout(chunk=32, shard=64),
    )  # fmt: skip
    finish_season(path, "2018-09-01")

    report = burn_labels(path, flanders / "parcels.gpkg", column="crop_code", min_fields=1)

    opened = open_season(path)
    assert opened.legend is not None
    values = np.array([int(entry.value) for entry in opened.legend.classes] + [0] * 249)
    burnt = np.append(values, np.zeros(256 - len(values), dtype=int))[opened.labels[:]]
    assert (burnt == official).mean() > 0.99
    kept = burn_labels(path, flanders / "parcels.gpkg", column="crop_code")
    assert kept.legend.names == ("1110", "1200", "9120")
    assert len(report.legend) == 7
