"""The commands: assemble, run again, describe, check; and a user's mistakes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stcln_geo.cli.main import invoke

from .conftest import PLACES


@pytest.fixture
def points(tmp_path: Path) -> Path:
    lines = [f"{name},{lon},{lat}" for name, (lon, lat) in PLACES.items() if name in {"w1", "e2"}]
    (tmp_path / "p.csv").write_text("\n".join(["id,lon,lat", *lines]))
    return tmp_path / "p.csv"


def test_an_archive_from_points_to_index(points: Path, planted: Any, tmp_path: Path, capsys: Any):
    out = str(tmp_path / "a")
    command = ["archive", "create", "--sites", str(points), "--size", "32", "--seasons", "2018",
               "--catalog", planted.location, out]  # fmt: skip
    assert invoke([*command, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "2 (2 MGRS tiles x 1 seasons), 0 of them kept" in text
    assert not (tmp_path / "a" / "stacks").exists()
    assert invoke(command) == 0
    text = capsys.readouterr().out
    assert "2 of them kept from before" in text
    assert "2 site-seasons, 2 written now" in text
    assert invoke(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert invoke(["archive", "info", out]) == 0
    assert "2018-09-01" in capsys.readouterr().out
    assert invoke(["archive", "validate", out]) == 0
    assert "is whole" in capsys.readouterr().out
    stack = str(tmp_path / "a" / "stacks" / "32631.zarr")
    assert invoke(["archive", "add", str(tmp_path / "b"), stack]) == 0
    assert "1 members added; 1 site-seasons" in capsys.readouterr().out
    (tmp_path / "a" / "index.parquet").write_bytes((tmp_path / "b" / "index.parquet").read_bytes())
    assert invoke(["archive", "validate", out]) == 1
    assert "is broken" in capsys.readouterr().out
    # Another recipe is refused, and says in what it differs.
    assert invoke([*command, "--bands", "red"]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "its bands is None, not ['red']" in told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--seasons": "2019..2018"}, "--seasons 2018..2019"),
        ({"--size": "33"}, "multiple of 16"),
        ({"--catalog": "nowhere"}, "nowhere"),
        ({"--sites": "none.gpkg"}, "no such file"),
        ({"--id-column": "name"}, "column 'name'"),
        ({"--memory": "lots"}, "--memory 8GB"),
        ({"--tiles": "here"}, "'here'"),
        ({"--composite": "median"}, "--period"),
    ],
)
def test_mistakes_end_with_a_sentence(
    points: Path, planted: Any, tmp_path: Path, capsys: Any, changes: Any, message: str
):
    options = {"--sites": str(points), "--size": "32", "--seasons": "2018",
               "--catalog": planted.location, **changes}  # fmt: skip
    flat = [part for pair in options.items() for part in pair]
    assert invoke(["archive", "create", *flat, str(tmp_path / "a")]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "a" / "stacks").exists()


def test_sites_are_proposed(tmp_path: Path, capsys: Any):
    import geopandas
    from shapely.geometry import box

    polygons = tmp_path / "z.geojson"
    geopandas.GeoDataFrame({"c": ["a"]}, geometry=[box(4, 50, 4.05, 50.05)], crs=4326).to_file(
        polygons
    )
    out = str(tmp_path / "s.gpkg")
    command = ["archive", "sample", "--stratify", str(polygons), "--column", "c", out]
    assert invoke([*command, "--count", "5"]) == 0
    assert "5 sites (a: 5)" in capsys.readouterr().out
    assert invoke([*command, "--count", "500", "--size", "256"]) == 0
    assert "has room for" in " ".join(capsys.readouterr().err.split())
    assert invoke([*command, "--count", "0"]) == 2
