"""`labels choose`: a file of all fields that says where to go, and its way back into a cube."""

from __future__ import annotations

from pathlib import Path

import geopandas
import matplotlib.pyplot as plt
import numpy as np
import pytest
import shapely

from stcln_geo.cli.main import invoke
from stcln_geo.cube.store import open_season
from stcln_geo.report.visits import VisitSpec, choose_visits

from ..train.conftest import make_cube

KINDS = 3


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cube of 42 square fields, whose three crops are green at different times."""
    return make_cube(tmp_path_factory.mktemp("cube") / "field.zarr")


@pytest.fixture(scope="module")
def outlines(cube: Path) -> geopandas.GeoDataFrame:
    """The cube's fields, one too small to visit and one outside, in longitude and latitude."""
    season = open_season(cube)
    numbers, affine = season.parcels[:], season.geobox.affine
    shapes = []
    for number in season.fields.number:
        rows, cols = np.nonzero(numbers == number)
        left, top = affine * (cols.min(), rows.min())
        right, bottom = affine * (cols.max() + 1, rows.max() + 1)
        shapes.append(shapely.box(left, bottom, right, top))
    left, bottom, right, top = season.geobox.boundingbox.bbox
    shapes += [
        shapely.box(right - 20, top - 20, right, top),
        shapely.box(right + 500, top, right + 700, top + 200),
    ]
    kind = [f"crop {code}" for code in season.fields.code]
    return geopandas.GeoDataFrame(
        {"name": [f"field {row}" for row in range(len(shapes))], "truth": [*kind, None, None]},
        geometry=shapes, crs=str(season.geobox.crs),
    ).to_crs("EPSG:4326")  # fmt: skip


@pytest.fixture
def file(outlines: geopandas.GeoDataFrame, tmp_path: Path) -> Path:
    path = tmp_path / "fields.gpkg"
    outlines.to_file(path)
    return path


def choose(*arguments: object) -> int:
    return invoke(["labels", "choose", *map(str, arguments)])


@pytest.mark.parametrize("suffix", ["gpkg", "parquet"])
def test_each_crop_is_visited_and_every_field_has_a_row(
    suffix: str, cube: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / f"visits.{suffix}", tmp_path / "groups.png"
    assert choose(cube, file, out, "--count", KINDS, "--plot", plot) == 0
    assert plt.imread(plot).std() > 0.05, "a picture"
    said = capsys.readouterr().out
    assert "3 of 44 parcels to visit. They stand for 42." in said
    assert "Not to visit: 1 outside the cube, 1 too small (--min-pixels)." in said
    read = geopandas.read_parquet if suffix == "parquet" else geopandas.read_file
    found, given = read(out), geopandas.read_file(file)
    assert found.crs == given.crs
    assert found["name"].tolist() == given["name"].tolist()
    assert found.geometry.geom_equals_exact(given.geometry, 1e-9).all()
    assert found["crop"].isna().all()
    visits = found[found["visit"].notna()].sort_values("visit")
    assert visits["visit"].tolist() == [1, 2, 3] == visits["visit_group"].tolist()
    assert set(visits["truth"]) == {"crop 0", "crop 1", "crop 2"}
    assert found["visit_group"].isna().tolist() == [False] * 42 + [True] * 2
    size = found["visit_group"].value_counts().sort_index()
    assert size.tolist() == sorted(size, reverse=True)
    crop = visits.set_index("visit")["truth"]
    inside = found.iloc[:42]
    assert (inside["visit_group"].map(crop) == inside["truth"]).all(), "clumps of one crop"


def test_what_was_filled_in_is_burnt_and_counts_as_visited(
    cube: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.gpkg", tmp_path / "second.gpkg"
    assert choose(cube, file, first, "--count", 9) == 0
    found = geopandas.read_file(first)
    found["crop"] = found["truth"].where(found["visit"].notna())
    found.to_file(first)

    assert choose(cube, first, second, "--count", 5, "--column", "crop") == 0
    assert (
        "Not to visit: 9 visited before (a value in 'crop'), 1 outside" in capsys.readouterr().out
    )
    again = geopandas.read_file(second)
    assert again["crop"].notna().sum() == 9
    assert not (again["visit"].notna() & again["crop"].notna()).any()
    assert again["visit"].notna().sum() == 5

    again["crop"] = again["crop"].where(again["visit"].isna(), again["truth"])
    again.to_file(second)
    copy = make_cube(tmp_path / "copy.zarr")
    assert invoke(["labels", "burn", str(copy), str(second), "--column", "crop"]) == 0
    fields = open_season(copy).fields
    assert fields is not None
    assert len(fields) == 14


def test_nothing_that_was_filled_in_is_lost(
    cube: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "visits.gpkg"
    assert choose(cube, file, out, "--count", 4, "--dry-run") == 0
    assert not out.exists()
    assert choose(cube, file, out, "--count", 4) == 0
    before = out.read_bytes()
    capsys.readouterr()
    assert choose(cube, file, out, "--count", 5) == 2
    assert "crops may have been filled in already" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert choose(cube, file, out, "--count", 5, "--overwrite") == 0
    # The file that is read keeps all it had.
    assert choose(cube, out, out, "--count", 6) == 0
    assert geopandas.read_file(out)["visit"].max() == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--count", 43), "Cannot choose 43 parcels: it must be 1 to 42"),
        (("--count", 0), "Cannot choose 0 parcels"),
        (
            ("--count", 3, "--min-pixels", 122),
            "none is left to visit (1 outside the cube, 43 too small (--min-pixels))",
        ),
        (("--count", 3, "--column", "corp"), "it has no column 'corp' (columns: name, truth)"),
        (("--count", 3, "--season", "2019-09-01"), "2019-09-01"),
    ],
)
def test_what_cannot_be_is_said(
    arguments: tuple[object, ...], said: str, cube: Path, file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert choose(cube, file, tmp_path / "visits.gpkg", *arguments) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "visits.gpkg").exists()


def test_fields_of_another_region_and_cubes_without_nir_are_refused(
    cube: Path, outlines: geopandas.GeoDataFrame, file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    far = tmp_path / "far.gpkg"
    outlines.iloc[43:].to_file(far)
    assert choose(cube, far, tmp_path / "visits.gpkg", "--count", 1) == 2
    assert "none holds the centre of a pixel of the cube" in capsys.readouterr().err
    blind = make_cube(tmp_path / "blind.zarr", bands=("green", "red", "swir16"))
    assert choose(blind, file, tmp_path / "visits.gpkg", "--count", 1) == 2
    assert "it lacks nir, and NDVI is of red and nir" in capsys.readouterr().err
    assert choose(cube, tmp_path / "no.gpkg", tmp_path / "visits.gpkg", "--count", 1) == 2
    assert "there is no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_groups_of_real_fields_are_grass_winter_and_summer_crops(
    flanders: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "flanders.zarr", tmp_path / "visits.gpkg"
    assert invoke(["cube", "build", "--catalog", str(flanders / "catalog.json"), str(path)]) == 0
    fields = flanders / "parcels.gpkg"
    assert choose(path, fields, out, "--count", 4, "--season", "2018-09-01") == 0
    found = geopandas.read_file(out)
    found = found[found["visit_group"].notna()]
    kind = found["crop_code"].astype(str).map(
        {"9120": "grass", "1110": "winter", "1500": "winter", "1510": "winter",
         "1200": "summer", "5100": "summer", "8100": "summer"}
    )  # fmt: skip
    visited = kind[found["visit"].notna()]
    assert set(visited) == {"grass", "winter", "summer"}
    most = kind.groupby(found["visit_group"]).transform(lambda own: own.mode()[0])
    assert len(kind) == 17
    assert (kind == most).sum() >= 15


def test_a_picture_has_room_for_the_largest_groups(cube: Path, file: Path, tmp_path: Path) -> None:
    report = choose_visits(cube, file, tmp_path / "visits.gpkg", VisitSpec(count=30))
    assert report.groups.legend.names == tuple(f"visit {visit}" for visit in range(1, 25))
    drawn = np.bincount(report.groups.code)
    np.testing.assert_array_equal(drawn, report.stands_for[:24])
