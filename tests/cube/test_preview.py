"""Animations show the overview, date after date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from shapely.geometry import box

from stcln_geo.cli.main import invoke
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.store import create_season, finish_season, open_season, shards_of, write_shard
from stcln_geo.grid import Window, geobox_from_window

DAYS = ("2018-09-10", "2019-01-15", "2019-06-20")
CLEAR = (0.25, 0.75, 1.0)


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three dates of one grey each; the first rows are clear, as many as the share says."""
    path = tmp_path_factory.mktemp("preview") / "c.zarr"
    shape = (160, 240)
    geobox = geobox_from_window(Window(0, 0, *shape), crs="EPSG:32631", resolution=10)
    season = create_season(
        path, "2018-09-01", geobox=geobox, time=np.array(DAYS, "datetime64[s]"),
        bands=("blue", "green", "red"), aoi=box(*geobox.boundingbox.bbox),
        layout=Layout(chunk=32, shard=64),
    )  # fmt: skip
    valid = np.zeros((3, *shape), dtype=bool)
    values = np.zeros((3, 3, *shape), dtype=np.int16)
    for index, share in enumerate(CLEAR):
        valid[index, : round(160 * share)] = True
        values[index] = 300 + 1000 * index
    for shard in shards_of(season):
        write_shard(
            season, shard, reflectance=values[..., shard.rows, shard.cols],
            valid=valid[:, shard.rows, shard.cols],
        )  # fmt: skip
    finish_season(path, "2018-09-01")
    return path


@pytest.mark.parametrize(("suffix", "tolerance"), [("gif", 8), ("webp", 8), ("png", 0)])
def test_frames_are_the_overview_in_order(cube: Path, tmp_path: Path, suffix: str, tolerance: int):
    out = tmp_path / f"a.{suffix}"
    assert invoke(["cube", "preview", str(cube), "--animate", str(out)]) == 0
    overview = open_season(cube).overview[:]
    with Image.open(out) as picture:
        assert (picture.n_frames, picture.info["loop"]) == (3, 0)
        for index in range(3):
            picture.seek(index)
            picture.load()
            assert picture.info["duration"] == 600
            frame = np.asarray(picture.convert("RGB")).astype(int)
            assert frame.shape == (480 + 22, 720, 3)
            away = np.abs(frame[100, 100] - overview[index, :, 0, 0].astype(int))
            assert away.max() <= tolerance
            # The bar reaches as far as the season has gone.
            bar = (np.abs(frame[481] - [227, 181, 5]).max(axis=1) < 40).sum()
            assert bar == pytest.approx(720 * (9, 136, 292)[index] / 292, abs=9)
            assert (frame[486:] > 128).any()  # the date
    assert not list(tmp_path.glob(".*"))


def test_dates_that_are_not_clear_enough_are_left_out(cube: Path, tmp_path: Path, capsys: Any):
    out = tmp_path / "a.png"
    command = ["cube", "preview", str(cube), "--animate", str(out)]
    assert invoke([*command, "--min-clear", "0.5", "--frame-ms", "200"]) == 0
    with Image.open(out) as picture:
        assert picture.n_frames == 2
        assert picture.info["duration"] == 200
    for options, words in (
        (["--min-clear", "2"], "0 to 1"),
        (["--frame-ms", "1"], "20 to 60000"),
        (["--season", "1999-09-01"], "does not exist"),
    ):
        assert invoke([*command, *options]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert invoke(["cube", "preview", str(cube), "--animate", str(tmp_path / "a.mp4")]) == 2
    assert "must end in .gif" in " ".join(capsys.readouterr().err.split())
    assert invoke(["cube", "preview", str(cube)]) == 2
    assert "no file was named" in " ".join(capsys.readouterr().err.split())


def test_options_that_would_say_nothing_are_refused(cube: Path, tmp_path: Path, capsys: Any):
    out, sheet = tmp_path / "a.gif", tmp_path / "a.png"
    for options, words in (
        (["--animate", str(out), "--date", DAYS[0]], "an animation shows all dates"),
        ([str(sheet), "--min-clear", "0"], "--min-clear without --animate"),
        ([str(sheet), "--frame-ms", "600"], "--frame-ms without --animate"),
    ):
        assert invoke(["cube", "preview", str(cube), *options]) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
    assert invoke(["cube", "preview", str(cube), str(sheet), "--date", DAYS[0]]) == 0
