"""The command line: same map, clear words, exit codes."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import rasterio

from stcln_geo.cli.main import invoke
from stcln_geo.errors import StclnGeoWarning
from stcln_geo.predict import run as run_module
from stcln_geo.predict.shard import ShardTask, predict_shard


def arguments(world: Any, out: Path, *more: str) -> list[str]:
    return [
        "predict", str(world.cube), "--checkpoint", str(world.checkpoint), "--out", str(out),
        "--device", "cpu", *more,
    ]  # fmt: skip


def test_predict_and_validate(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    region = tmp_path / "part.geojson"
    region.write_text(
        json.dumps(
            {
                "type": "Polygon",
                "coordinates": [
                    [
                        [3.004, 50.547],
                        [3.009, 50.547],
                        [3.009, 50.551],
                        [3.004, 50.551],
                        [3.004, 50.547],
                    ]
                ],
            }
        )
    )
    out = tmp_path / "map"
    more = ("--region", str(region), "--min-clear", "2", "--memory", "1MB", "--shard-size", "32")
    assert invoke(arguments(world, out, *more)) == 0
    shown = capsys.readouterr().out
    assert "Prediction of season 2018-09-01" in shown
    assert "Maïs" in shown
    assert "pixels labelled" in shown
    assert json.loads((out / "run.json").read_text())["spec"]["min_clear"] == 2

    for name in ("classes.tif", "confidence.tif"):
        assert invoke(["cog", "validate", str(out / name)]) == 0
    assert "is a valid cloud-optimized GeoTIFF" in capsys.readouterr().out
    careless = {"mode": "r+", "IGNORE_COG_LAYOUT_BREAK": "YES"}
    with rasterio.open(out / "classes.tif", **careless) as source:
        values = source.read(1)
        values[0, 0] = 77
        source.write(values, 1)
    assert invoke(["cog", "validate", str(out / "classes.tif")]) == 1  # as all that check
    assert "77" in capsys.readouterr().out


def test_parcels_and_polygons_of_the_map(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import geopandas
    import numpy as np

    out, fields, patches = tmp_path / "map", tmp_path / "fields.gpkg", tmp_path / "patches.parquet"
    points = geopandas.GeoDataFrame(geometry=geopandas.points_from_xy([0], [0]), crs="EPSG:32631")
    points.to_file(fields)
    assert invoke(arguments(world, out, "--parcels", str(fields))) == 2
    assert "parcels are polygons" in capsys.readouterr().err
    assert not out.exists()

    # Within the region of the fixtures, whose first pixel is at (500170, 5600330).
    squares = geopandas.points_from_xy(
        500_170 + np.array([100, 300]), 5_600_330 - np.array([200, 400])
    )
    frame = geopandas.GeoDataFrame({"id": [1, 2]}, geometry=squares, crs="EPSG:32631")
    frame.geometry = frame.geometry.buffer(60, cap_style="square")
    frame.to_file(fields)
    more = ("--parcels", str(fields), "--polygons", str(patches))
    assert invoke(arguments(world, out, *more)) == 0
    table = geopandas.read_file(out / "parcels.gpkg")
    assert table["id"].tolist() == [1, 2]
    assert table["map_pixels"].tolist() == [144, 144]
    assert table["map_confidence"].between(1, 100).all()
    with rasterio.open(out / "classes.tif") as source:
        labelled = int((source.read(1) != 255).sum())
    assert geopandas.read_parquet(patches)["pixels"].sum() == labelled


def test_dry_run_writes_nothing(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(arguments(world, tmp_path / "map", "--dry-run", "--halo", "3")) == 0
    assert "stride 10 px" in capsys.readouterr().out
    assert not (tmp_path / "map").exists()


def test_what_happens_to_workers_is_said_and_the_plan_once(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until now the run's own warnings were lost: that a scheduler has no workers, for one."""

    def lose_a_worker(task: ShardTask) -> dict[str, Any]:
        warnings.warn("1 of 2 Dask workers was sent away.", StclnGeoWarning, stacklevel=2)
        return predict_shard(task)

    monkeypatch.setattr(run_module, "predict_shard", lose_a_worker)
    more = ("--window", "20", "--seam-audit", "0", "--shard-size", "256")
    with pytest.warns(StclnGeoWarning, match="sent away") as said:
        assert invoke(arguments(world, tmp_path / "map", *more)) == 0
    assert capsys.readouterr().err.count("trained on chips of 16 px") == 1
    assert not [one for one in said if "trained on chips" in str(one.message)]


def test_a_signal_ends_it_as_ctrl_c_does(
    world: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending_signal: int
) -> None:
    """A cluster that stops a machine sends SIGTERM; a lock left there stops the next machine."""

    def be_stopped(task: ShardTask) -> dict[str, Any]:
        assert list((tmp_path / "map").glob("*.lock"))
        os.kill(os.getpid(), ending_signal)
        return predict_shard(task)

    monkeypatch.setattr(run_module, "predict_shard", be_stopped)
    assert invoke(arguments(world, tmp_path / "map", "--shard-size", "40")) == 128 + ending_signal
    assert {path.name for path in (tmp_path / "map").iterdir()} == {"plan.json", "shards"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--season", "1999-09-01"), "does not exist"),
        (("--precision", "half"), "auto, float32, bf16"),
        (("--workers", "1", "--scheduler", "tcp://localhost:1"), "--workers or --scheduler"),
    ],
)
def test_mistakes_exit_with_2(
    world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], text: str
) -> None:
    assert invoke(arguments(world, tmp_path / "map", *more)) == 2
    assert text in capsys.readouterr().err


def test_a_missing_file_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["cog", "validate", str(tmp_path / "no.tif")]) == 2
    assert "there is no such file" in capsys.readouterr().err
