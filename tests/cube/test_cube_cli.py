"""The commands `cube` and `catalogs`, from the user's side."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from stcln_geo import open_cube
from stcln_geo.catalog import Catalog, load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import build as build_module
from stcln_geo.cube.block import BlockResult, BlockTask, build_block


def test_build_look_and_check(planted_once: Any, tmp_path: Path, capsys: Any):
    out = str(tmp_path / "c.zarr")
    build = ["cube", "build", "--catalog", planted_once.location, "--time",
             "2019-03-01/2019-03-31", "--bands", "red,nir", out]  # fmt: skip
    assert invoke([*build, "--dry-run"]) == 0
    assert "2 dates, 2019-03-01 to 2019-03-11" in capsys.readouterr().out
    assert not Path(out).exists()

    assert invoke(build) == 0
    assert "6 asset windows read" in capsys.readouterr().out
    assert invoke(build) == 0
    assert "nothing to do" in capsys.readouterr().out

    assert invoke(["cube", "info", out]) == 0
    text = capsys.readouterr().out
    assert "bands   red, nir" in text
    assert "EPSG:32631, 10 m" in text
    assert "gap     10 days at most between clear dates, 2019-03-01 to 2019-03-11" in text
    assert invoke(["cube", "info", out, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["seasons"]
    season = open_cube(out)
    assert [date["time"][:10] for date in told["dates"]] == ["2019-03-01", "2019-03-11"]
    clear = season["valid"].mean(("y", "x")).to_numpy()
    assert [date["clear"] for date in told["dates"]] == pytest.approx(clear)
    assert told["clear"] == pytest.approx(clear.mean())
    x, y = season["x"].to_numpy(), season["y"].to_numpy()
    assert told["bounds"] == [x[0] - 5, y[-1] - 5, x[-1] + 5, y[0] + 5]
    assert (told["crs"], told["level"], told["labels"]) == ("EPSG:32631", "surface", None)
    assert invoke(["cube", "validate", out]) == 0
    assert "keeps the contract" in capsys.readouterr().out
    assert invoke(["cube", "preview", out, str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").stat().st_size > 100


def test_a_signal_ends_a_build_as_ctrl_c_does(
    planted_once: Any, tmp_path: Path, capsys: Any, monkeypatch: Any, ending_signal: int
):
    """No lock stays behind, which would keep another machine from going on."""
    out = tmp_path / "c.zarr"
    build = ["cube", "build", "--catalog", planted_once.location, "--bands", "red", str(out)]

    def be_stopped(task: BlockTask) -> BlockResult:
        assert list(tmp_path.rglob("*.lock"))
        os.kill(os.getpid(), ending_signal)
        return build_block(task)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "build_block", be_stopped)
        assert invoke(build) == 128 + ending_signal
    assert out.exists()
    assert not list(tmp_path.rglob("*.lock"))
    assert invoke(build) == 0
    assert "Continuing" in capsys.readouterr().out


def test_plan_takes_a_region_file(planted_once: Any, tmp_path: Path, capsys: Any):
    import geopandas
    from shapely.geometry import box

    file = tmp_path / "aoi.gpkg"
    geopandas.GeoDataFrame(geometry=[box(600100, 5599500, 600300, 5599700)], crs=32631).to_file(
        file
    )
    common = ["cube", "plan", "--catalog", planted_once.location]
    assert invoke([*common, "--region", str(file), "--window", "24", "--halo", "2"]) == 0
    text = capsys.readouterr().out
    assert "whole windows of 24 px" in text
    assert invoke([*common, "--region", str(file), "--bbox", "4,50,5,51"]) == 2
    assert "Give one of them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bbox", "5,50,4,51"], "west must be less"),
        (["--bbox", "8,50,8.1,50.1"], "3 items were seen (3 lies outside the region)"),
        (["--time", "2019"], "START/END"),
        (["--bands", "blue"], "The items have: red, nir, swir16"),
        (["--memory", "many"], "amount of memory"),
        (["--crs", "EPSG:4326"], "projected CRS"),
        (["--collection", "other"], "3 is of collection planted"),
        (["--tiles", "31UFT"], "3 is of a tile that is not selected"),
        (["--tiles", "Paris"], "MGRS tile"),
        (["--orbits", "51,a"], "whole numbers, by commas"),
        (["--max-cloud", "10"], "3 does not say its cloud cover"),
        (["--max-cloud", "-1"], "0 to 100"),
        (["--workers", "-1"], "workers=-1"),
    ],
)
def test_mistakes_exit_2_with_one_sentence(
    planted_once: Any, capsys: Any, arguments: list[str], message: str
):
    assert invoke(["cube", "plan", "--catalog", planted_once.location, *arguments]) == 2
    text = " ".join(capsys.readouterr().err.split())
    assert message in text
    assert "Traceback" not in text


def test_catalogs_list_and_show(tmp_path: Path, capsys: Any):
    assert invoke(["catalogs", "list"]) == 0
    text = capsys.readouterr().out
    assert "earth-search" in text
    assert "sentinel-2-c1-l2a" in text
    assert invoke(["catalogs", "show", "cdse"]) == 0
    shown = capsys.readouterr().out
    assert Catalog.model_validate(yaml.safe_load(shown)) == load_catalog("cdse")
    (tmp_path / "mine.yaml").write_text(shown)
    assert load_catalog(tmp_path / "mine.yaml") == load_catalog("cdse")
