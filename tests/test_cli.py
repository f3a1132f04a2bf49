"""A user's mistakes: one sentence with the remedy, exit code 2, nothing left that looks done."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stcln_geo.cli._common import parse_memory, visible
from stcln_geo.cli.main import invoke
from stcln_geo.cube.store import list_seasons, open_season
from stcln_geo.errors import InputError


@pytest.fixture(scope="session")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "archive"
    assert invoke(["simulate", str(folder), "--size", "101x75", "--dates", "6", "--seed", "3"]) == 0
    return folder


@pytest.fixture(scope="session")
def built(archive) -> Path:
    path = archive.parent / "cube.zarr"
    assert invoke(["cube", "build", "--catalog", str(archive), str(path)]) == 0
    return path


@pytest.fixture
def cube(built, tmp_path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cube.zarr"))


@pytest.fixture(scope="session")
def checkpoint(built) -> Path:
    """A classifier with random weights: enough to be refused, or to map."""
    import torch

    from stcln_geo.legend import Legend
    from stcln_geo.model import Stcln, StclnConfig, save_checkpoint

    season = open_season(built)
    torch.manual_seed(0)
    model = Stcln(StclnConfig.preset("tiny", bands=season.bands, classes=3))
    return save_checkpoint(
        built.parent / "random.safetensors",
        model,
        kind="classifier",
        legend=Legend.from_values(["a", "b", "c"]).to_json(),
    )


def failing(capsys, arguments: list[str | Path]) -> str:
    """Run a command that must fail as a user's mistake; return what it said."""
    capsys.readouterr()
    code = invoke([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert code == 2, said.err
    assert "Traceback" not in said.err
    return " ".join(said.err.split())


def test_missing_band(capsys, archive, tmp_path):
    said = failing(
        capsys,
        ["cube", "build", "--catalog", archive, "--bands", "blue,coastal", tmp_path / "c.zarr"],
    )
    assert "coastal" in said
    assert not (tmp_path / "c.zarr").exists()


def test_wrong_crs(capsys, archive, tmp_path):
    said = failing(
        capsys,
        ["cube", "build", "--catalog", archive, "--crs", "EPSG:999999", tmp_path / "c.zarr"],
    )
    assert "EPSG:999999" in said
    assert not (tmp_path / "c.zarr").exists()


def test_empty_search(capsys, archive, tmp_path):
    said = failing(
        capsys,
        ["cube", "build", "--catalog", archive, "--time", "1999-01-01/1999-12-31",
         tmp_path / "c.zarr"],
    )  # fmt: skip
    assert "1999" in said
    assert not (tmp_path / "c.zarr").exists()


@pytest.mark.parametrize("content", [None, "{not json"], ids=["missing", "broken"])
def test_unreadable_catalog(capsys, tmp_path, content):
    catalog = tmp_path / "catalog.json"
    if content is not None:
        catalog.write_text(content)
    said = failing(capsys, ["cube", "build", "--catalog", catalog, tmp_path / "c.zarr"])
    assert "catalog" in said
    assert not (tmp_path / "c.zarr").exists()


def test_labels_outside_the_cube(capsys, cube, archive, tmp_path):
    import geopandas

    parcels = geopandas.read_file(archive / "parcels.gpkg")
    parcels.geometry = parcels.geometry.translate(xoff=50_000)
    parcels.to_file(tmp_path / "far.gpkg")
    said = failing(capsys, ["labels", "burn", cube, tmp_path / "far.gpkg", "--column", "crop_code"])
    assert "outside" in said or "overlap" in said
    assert open_season(cube).legend is None


def test_labels_of_one_class_only(capsys, cube, archive, tmp_path):
    import geopandas

    parcels = geopandas.read_file(archive / "parcels.gpkg")
    parcels["crop_code"] = 7
    parcels.to_file(tmp_path / "one.gpkg")
    said = failing(capsys, ["labels", "burn", cube, tmp_path / "one.gpkg", "--column", "crop_code"])
    assert "two" in said
    assert open_season(cube).legend is None


def test_the_layer_that_is_read_is_told_in_words(cube, archive, tmp_path):
    """A GeoPackage of two layers: one line, not the place in a library where it was noticed."""
    import geopandas

    parcels = geopandas.read_file(archive / "parcels.gpkg")
    for layer in ("fields", "others"):
        parcels.to_file(tmp_path / "fields.gpkg", layer=layer)
    command = [Path(sys.executable).with_name("stcln-geo"), "labels", "burn", cube,
               tmp_path / "fields.gpkg", "--column", "crop_code", "--min-fields", "1"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stderr.startswith("Warning: ")
    assert "has 2 layers: fields, others. The first is read" in run.stderr
    assert len(run.stderr.splitlines()) == 1
    run = subprocess.run([*command, "--layer", "others"], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


@pytest.mark.slow
def test_what_comes_next_can_be_run_as_it_is_printed(capsys, archive, tmp_path):
    """Of two seasons in a folder whose name has a space."""
    import shlex

    folder = tmp_path / "two seasons"
    assert invoke(["simulate", str(folder / "archive"), "--size", "101x75", "--dates", "4",
                   "--seasons", "2"]) == 0  # fmt: skip
    cube, season = str(folder / "cube.zarr"), "2022-09-01"
    assert invoke(["cube", "build", "--catalog", str(folder / "archive"), cube]) == 0
    burn = ["labels", "burn", cube, str(archive / "parcels.gpkg"), "--column", "crop_code"]
    train = ["finetune", cube, "--out", str(folder / "run"), "--season", season, "--steps", "1",
             "--preset", "tiny"]  # fmt: skip
    for command in ([*burn, "--season", season, "--min-fields", "1"], train):
        capsys.readouterr()
        assert invoke(command) == 0
        (told,) = re.findall("Next: stcln-geo (.*)", capsys.readouterr().out)
        assert invoke(shlex.split(told)) == 0, told


def test_labels_with_a_wrong_column(capsys, cube, archive):
    said = failing(capsys, ["labels", "burn", cube, archive / "parcels.gpkg", "--column", "plant"])
    assert "crop_code" in said


def test_season_that_does_not_exist(capsys, cube, checkpoint, tmp_path):
    said = failing(
        capsys,
        ["predict", cube, "--checkpoint", checkpoint, "--season", "1999-09-01",
         "--out", tmp_path / "map"],
    )  # fmt: skip
    assert list_seasons(cube)[0] in said
    assert not (tmp_path / "map" / "classes.tif").exists()


def test_checkpoint_and_cube_with_different_bands(capsys, archive, checkpoint, tmp_path):
    small = tmp_path / "small.zarr"
    arguments = ["cube", "build", "--catalog", archive, "--bands", "red,nir,swir16", small]
    assert invoke([str(argument) for argument in arguments]) == 0
    said = failing(
        capsys, ["predict", small, "--checkpoint", checkpoint, "--out", tmp_path / "map"]
    )
    assert "'blue'" in said
    assert "The cube has: red, nir, swir16" in said
    assert not (tmp_path / "map" / "classes.tif").exists()
    burnt = ["labels", "burn", small, archive / "parcels.gpkg", "--column", "crop_code",
             "--min-fields", "1"]  # fmt: skip
    assert invoke([str(argument) for argument in burnt]) == 0
    assert invoke(["labels", "split", str(small)]) == 0
    train = ["finetune", small, "--init", checkpoint, "--out", tmp_path / "run", "--steps", "2"]
    said = failing(capsys, [*train, "--set", "model.bands=['blue', 'red']"])
    assert "lacks band 'blue' required by model.bands" in said
    assert not list((tmp_path / "run").glob("checkpoints/*.safetensors"))
    # Unless they are named, bands that lack count as if at their mean.
    assert invoke([str(argument) for argument in [*train, "--dry-run"]]) == 0
    said = capsys.readouterr().out
    assert "The cube lacks blue, green, " in said


@pytest.mark.parametrize(
    "command",
    [
        ["cube", "build", "--catalog", "{archive}", "{blocked}"],
        ["pretrain", "{cube}", "--out", "{blocked}", "--steps", "1", "--set", "data.min_clear=0"],
        ["predict", "{cube}", "--checkpoint", "{checkpoint}", "--out", "{blocked}"],
        ["simulate", "{blocked}", "--size", "64x64", "--dates", "3"],
    ],
    ids=lambda command: " ".join(command[:2]) if command[0] == "cube" else command[0],
)
def test_path_that_cannot_be_written(capsys, command, archive, cube, checkpoint, tmp_path):
    (tmp_path / "file").write_text("in the way")
    names = {
        "archive": archive,
        "cube": cube,
        "checkpoint": checkpoint,
        "blocked": tmp_path / "file" / "below",
    }
    said = failing(capsys, [part.format(**names) for part in command])
    assert str(tmp_path / "file") in said


def test_missing_cube_and_checkpoint(capsys, cube, checkpoint, tmp_path):
    assert "nothing.zarr" in failing(capsys, ["cube", "info", tmp_path / "nothing.zarr"])
    said = failing(
        capsys,
        ["predict", cube, "--checkpoint", tmp_path / "no.safetensors", "--out", tmp_path / "m"],
    )
    assert "no.safetensors" in said


def test_a_wrong_flag_and_a_wrong_verb(capsys):
    assert "--colour" in failing(capsys, ["simulate", "out", "--colour", "red"])
    assert "fly" in failing(capsys, ["fly"])


def test_the_demo_looks_at_the_size_before_it_begins(capsys, tmp_path):
    demo = ["demo", "--out", tmp_path / "demo", "--dry-run"]
    assert "'banana'" in failing(capsys, [*demo, "--size", "banana"])
    (tmp_path / "parcels.gpkg").touch()
    assert "to simulate" in failing(capsys, [*demo, "--data", tmp_path, "--size", "64x64"])
    assert invoke([str(argument) for argument in demo]) == 0
    assert "--size 301x203" in capsys.readouterr().out


def test_a_misspelt_command_is_told_what_is_like_it(capsys):
    assert "Did you mean 'cube'?" in failing(capsys, ["cub", "info", "x.zarr"])
    assert "Did you mean 'predict'?" in failing(capsys, ["prdict"])
    assert "Did you mean 'build'?" in failing(capsys, ["cube", "biuld"])
    assert "Did you mean" not in failing(capsys, ["xyzzy"])


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("stcln-geo pre", {"pretrain", "predict"}),
        ("stcln-geo cube b", {"build"}),
        ("stcln-geo cube build --cat", {"--catalog"}),
        ("stcln-geo evaluate d", {"design"}),
    ],
)
def test_the_shell_is_told_how_a_command_goes_on(words, offered):
    """As the script of --show-completion asks, and without a heavy library, so at once."""
    code = (
        "import atexit, sys\n"
        "heavy = ('torch', 'dask', 'xarray', 'rasterio', 'geopandas')\n"
        "atexit.register(lambda: print(*(m for m in heavy if m in sys.modules), file=sys.stderr))\n"
        "from stcln_geo.cli.main import run\n"
        "run([])"
    )
    asked = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
        "_STCLN_GEO_COMPLETE": "complete_bash",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert set(result.stdout.split()) == offered
    assert result.stderr.strip() == ""


def test_the_script_for_a_shell_is_shown(capsys, monkeypatch):
    # Which one is asked for is the shell that started the tests, if one did.
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    with pytest.raises(SystemExit) as end:
        invoke(["--show-completion", "bash"])
    assert end.value.code == 0
    assert "_STCLN_GEO_COMPLETE=complete_bash" in capsys.readouterr().out


def commands(command=None, path=()):
    """Yield every command and group with its path."""
    import typer

    from stcln_geo.cli.main import app

    command = typer.main.get_command(app) if command is None else command
    yield path, command
    if hasattr(command, "list_commands"):
        context = command.context_class(command, info_name="x")
        for name in command.list_commands(context):
            yield from commands(command.get_command(context, name), (*path, name))


def test_overviews_are_whole_sentences_and_arguments_in_capitals(capsys, monkeypatch):
    """In a terminal of 80 columns no line of an overview is cut; nobody reads half of one."""
    monkeypatch.setenv("COLUMNS", "80")
    groups = [path for path, command in commands() if hasattr(command, "list_commands")]
    assert len(groups) > 8
    for path in groups:
        assert invoke([*path, "--help"]) == 0
        _, _, overview = capsys.readouterr().out.partition("Commands:")
        assert [line for line in overview.splitlines() if line.endswith("...")] == [], path
    named = {
        (*path, parameter.metavar or parameter.name)
        for path, command in commands()
        for parameter in command.params
        if parameter.param_type_name == "argument"
    }
    assert {name for *_, name in named if not name[0].isupper()} == set(), named


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8e9), ("8G", 8e9), ("6Gi", 6 * 2**30), ("0.5 gib", 2**29), ("512M", 512e6),
     ("4000000000", 4e9)],
)  # fmt: skip
def test_amounts_of_memory(text, size):
    """As people write them, and as SLURM and Kubernetes do."""
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["8", "0GB", "-1GB", "GB", "8 apples", "8GBB", ""])
def test_a_memory_of_eight_bytes_is_a_mistake(text):
    with pytest.raises(InputError, match="with a unit"):
        parse_memory(text)


def test_version_and_help(capsys):
    assert invoke(["--version"]) == 0
    assert invoke(["--help"]) == 0
    said = capsys.readouterr().out
    for verb in ("demo", "simulate", "cube", "labels", "pretrain", "finetune", "evaluate"):
        assert verb in said


def test_dry_runs_write_nothing(capsys, archive, cube, checkpoint, tmp_path):
    commands = [
        ["simulate", tmp_path / "a", "--size", "64x64", "--dates", "3", "--dry-run"],
        ["cube", "build", "--catalog", archive, tmp_path / "b.zarr", "--dry-run"],
        [
            "pretrain",
            cube,
            "--out",
            tmp_path / "c",
            "--steps",
            "2",
            "--set",
            "data.min_clear=0",
            "--preset",
            "tiny",
            "--dry-run",
        ],
        ["predict", cube, "--checkpoint", checkpoint, "--out", tmp_path / "d", "--dry-run"],
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for command in commands:
        assert invoke([str(part) for part in command]) == 0, command
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert capsys.readouterr().out.strip()


def test_ctrl_c_says_one_line_even_within_the_demo(tmp_path):
    command = Path(sys.executable).with_name("stcln-geo")
    process = subprocess.Popen(
        [command, "demo", "--out", tmp_path / "demo", "--size", "1501x1203"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        # In the background of a shell Ctrl-C is ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    # Once the first file of the archive is begun, the demo is within a command.
    deadline = time.monotonic() + 300
    while not list((tmp_path / "demo").glob("archive/S2*/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130
    assert said.count("Interrupted. Run the same command again") == 1
    assert "Traceback" not in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("errors", ["", " 2>/dev/full"])
def test_a_full_disk_under_what_is_printed_is_told(errors):
    command = Path(sys.executable).with_name("stcln-geo")
    ended = subprocess.run(
        f"{command} catalogs list >/dev/full{errors}", shell=True, capture_output=True, text=True
    )
    assert ended.returncode == 1
    told = "Error: Cannot write what is printed or saved: No space left on device. Free some room"
    assert ended.stderr.startswith("" if errors else told)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    "sign", ["\x1b[2J", "\x1b]0;mine\x07", "\r", "\x9b2J", "\x08", "\u202e"], ids=ascii
)
def test_names_of_others_do_not_command_the_terminal(capsys, tmp_path, sign):
    document = {"type": "Catalog", "id": f"a{sign}b", "links": []}
    (tmp_path / "catalog.json").write_text(json.dumps(document))
    assert invoke(["cube", "plan", "--catalog", str(tmp_path)]) == 2
    assert invoke(["catalogs", "show", str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "a" + ascii(sign)[1:-1] + "b" in shown.err
    assert not set(sign[0]) & set(shown.out + shown.err)
    # Letters of all scripts stay, and so do lines.
    assert visible("Ğ\u200c字\tx\n") == "Ğ\u200c字\tx\n"
