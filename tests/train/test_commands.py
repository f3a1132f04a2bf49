"""The commands from labels to figures, as a user types them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import geopandas
import numpy as np
import pytest
from rasterio.features import shapes

from stcln_geo.cli.main import invoke
from stcln_geo.cube.store import open_season
from stcln_geo.train.config import PretrainConfig, load_config

SMALL = [
    "--preset", "tiny", "--chip", "16", "--batch-size", "4", "--workers", "1",
    "--set", "model.widths=[8, 16]", "--set", "model.layers=1", "--set", "model.heads=2",
    "--set", "model.feedforward=32",
]  # fmt: skip


@pytest.fixture
def fields(new_cube: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A cube, and its fields as a vector file."""
    cube = new_cube(split=False)
    season = open_season(cube)
    assert season.fields is not None
    parcels = season.parcels[:]
    found = [
        ({"type": geometry["type"], "coordinates": geometry["coordinates"]}, int(value))
        for geometry, value in shapes(parcels, mask=parcels > 0, transform=season.geobox.affine)
    ]
    frame = geopandas.GeoDataFrame.from_features(
        [
            {
                "type": "Feature",
                "geometry": geometry,
                "properties": {"crop": f"c{season.fields.code[number - 1]}"},
            }
            for geometry, number in found
        ],
        crs="EPSG:32631",
    )
    frame.to_file(tmp_path / "fields.gpkg")
    return cube, tmp_path / "fields.gpkg"


def test_the_path_from_labels_to_figures(
    fields: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cube, vector = (str(path) for path in fields)
    pre, fine = str(tmp_path / "pre"), str(tmp_path / "fine")

    assert invoke(["labels", "burn", cube, vector, "--column", "crop"]) == 0
    assert "20 fields of 3 classes" in capsys.readouterr().out
    assert invoke(["labels", "split", cube, "--by", "field", "--seed", "1"]) == 0
    assert "validation" in capsys.readouterr().out
    options = ["--steps", "3", *SMALL, "--set", "masking.gate=false"]
    assert invoke(["pretrain", cube, "--out", pre, *options]) == 0
    assert "validation_loss" in capsys.readouterr().out
    options = ["--steps", "3", "--init", pre, "--fields-per-class", "2", *SMALL]
    assert invoke(["finetune", cube, "--out", fine, *options, "--dry-run"]) == 0
    assert "fields: 6 of" in capsys.readouterr().out
    assert not Path(fine).exists()
    assert invoke(["finetune", cube, "--out", fine, *options]) == 0
    assert "validation_macro_miou" in capsys.readouterr().out
    assert invoke(["finetune", cube, "--out", fine, *options]) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert invoke(["evaluate", fine, cube, "--json", str(tmp_path)]) == 2
    assert "it is a folder" in " ".join(capsys.readouterr().err.split())
    figures = tmp_path / "figures.json"
    assert invoke(["evaluate", fine, cube, "--split", "test", "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    told = json.loads(figures.read_text())
    assert f"overall_accuracy: {told['overall_accuracy']:.4f}" in shown
    assert "never their labels" in shown
    assert np.array(told["confusion"]).sum() == told["pixels"] > 0


def test_seeds(
    fields: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cube, vector = (str(path) for path in fields)
    out = str(tmp_path / "runs")
    assert invoke(["labels", "burn", cube, vector, "--column", "crop"]) == 0
    assert invoke(["labels", "split", cube]) == 0
    capsys.readouterr()

    assert invoke(["finetune", cube, "--out", out, "--seeds", "2", "--steps", "1", *SMALL]) == 0
    assert "mean of 2 seeds" in capsys.readouterr().out
    assert invoke(["evaluate", out, cube, "--dry-run"]) == 0
    assert "windows of 16 px" in capsys.readouterr().out
    assert invoke(["evaluate", out, cube]) == 0
    shown = capsys.readouterr().out
    assert "macro_miou: mean" in shown
    _, command = shown.split("Next: stcln-geo ")
    assert invoke(shlex.split(command)) == 0
    assert "2 networks of" in capsys.readouterr().out
    assert invoke(["evaluate", f"{out}/ensemble.safetensors", cube]) == 0
    assert "macro_miou" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["labels", "burn", "CUBE", "VECTOR", "--column", "kind"], "Its columns are: crop"),
        (["labels", "split", "CUBE", "--by", "pixel"], "never by pixel"),
        (["labels", "split", "CUBE", "--block", "16"], "the blocks of --by block"),
        (["finetune", "CUBE", "--out", "OUT"], "labels split CUBE"),
        (["finetune", "CUBE", "--out", "OUT", "--set", "loss=3"], "loss: "),
        (["pretrain", "CUBE", "--out", "OUT", "--preset", "huge"], "model.preset"),
        (["pretrain", "CUBE", "--out", "OUT", "--nodes", "2"], "Use torchrun or srun"),
        (["pretrain", "CUBE", "--out", "OUT", "--devices", "0"], "it must be 1 or more"),
        (["pretrain", "CUBE", "--out", "OUT", "--batch-size", "many"], "batch_size"),
        (["pretrain", "CUBE", "--out", "OUT", "--track", "paper"], "trackers are tensorboard"),
        (["pretrain", "OUT", "--out", "OUT"], "there is no Zarr v3 group"),
        (["evaluate", "OUT", "CUBE"], "no such file or run directory"),
    ],
)
def test_mistakes_exit_2_with_one_sentence(
    fields: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    places = {"CUBE": fields[0], "VECTOR": fields[1], "OUT": tmp_path / "out"}

    code = invoke([str(places.get(word, word)) for word in arguments])

    assert code == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_options_are_printed_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--steps", "3", "--batch-size", "auto", "--set", "optimiser.ema=0.99"]

    assert invoke(["pretrain", "no.zarr", "--out", "none", *asked, "--print-config"]) == 0

    (tmp_path / "options.toml").write_text(capsys.readouterr().out)
    read = load_config(PretrainConfig, file=tmp_path / "options.toml")
    assert (read.steps, read.batch_size, read.optimiser.ema) == (3, "auto", 0.99)


def test_a_plan_for_several_devices_tells_the_chips_of_a_step(
    new_cube: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--steps", "3", "--devices", "2", "--set", "accumulate=2", "--dry-run"]

    assert invoke(["finetune", str(new_cube()), "--out", str(tmp_path / "run"), *options]) == 0

    told = capsys.readouterr().out
    assert "chips of a step: 4 x 2 ranks x 2 batches = 16" in told
    assert "ranks = 2" in told
    assert not (tmp_path / "run").exists()


def test_what_the_launcher_did_must_be_what_was_asked_for(
    new_cube: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    assert invoke(["pretrain", "no.zarr", "--out", str(tmp_path), "--devices", "4"]) == 2
    assert "4 processes on 2 nodes, which makes 2" in capsys.readouterr().err
