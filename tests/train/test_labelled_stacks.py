"""A labelled stack trains and is judged through the code that a cube goes through."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.cli.main import invoke
from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.stack import open_stack
from stcln_geo.cube.stack_fields import write_stack_split
from stcln_geo.cube.store import open_season, write_fields, write_split
from stcln_geo.data.chips import ChipDataset
from stcln_geo.data.source import open_source
from stcln_geo.data.targets import ChipChoice, fields_within
from stcln_geo.errors import InputError, LabelError
from stcln_geo.grid import Window
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.train.config import FinetuneConfig, load_config, to_toml
from stcln_geo.train.evaluate import evaluate_run
from stcln_geo.train.evidence import SITES_APART, TRANSDUCTIVE, figures_hold_for
from stcln_geo.train.finetune import finetune, plan_finetune
from stcln_geo.train.finetune_setup import make_finetune_task, prepare_finetune
from stcln_geo.train.losses import make_class_weights
from stcln_geo.train.ranks import Ranks

from ..labelled_stacks import cut_stack, whole_fields
from .conftest import make_cube

CHIP = 16
SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": CHIP,
    "data.halo": 0,
    "batch_size": 4,
    "steps": 6,
    "validation.every": 3,
    "optimiser.learning_rate": 5e-3,
}
SHAPE = (32, 48)
PLACES = ((0, 0), (16, 48), (48, 0), (32, 96))


def config(**changes: Any) -> FinetuneConfig:
    return load_config(FinetuneConfig, overrides={**SMALL, **changes})


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A cube whose first pixel lies on the lattice, and a stack cut out of it at chips.

    The cube has a split only for the fields that the stack has too. Not to be changed.
    """
    folder = tmp_path_factory.mktemp("pair")
    cube = make_cube(
        folder / "law.zarr", shape_yx=(86, 144), dates=7, origin=(-16 * 7000, 16 * 3000)
    )
    stack = cut_stack(cube, folder / "cut.zarr", PLACES, shape_yx=SHAPE)
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    kept = np.concatenate([whole_fields(season, Window(*place, *SHAPE)) for place in PLACES])
    write_split(season, np.where(np.isin(season.fields.number, kept), season.fields.split, 0))
    return cube, stack


def pixels_drawn(dataset: ChipDataset, *, classes: int) -> list[int]:
    """Count the pixels of each class in all chips that an epoch shows."""
    counts = np.zeros(256, dtype=np.int64)
    for unit in range(len(dataset.units)):
        for chip in dataset.read(unit):
            assert chip.target is not None
            counts += np.bincount(chip.target.ravel(), minlength=256)
    return counts[:classes].tolist()


@pytest.mark.slow
def test_a_stack_is_judged_as_its_cube(pair: tuple[Path, Path], tmp_path: Path) -> None:
    cube, stack = pair
    run = tmp_path / "run"
    finetune(cube, run, config())

    for split in ("train", "validation", "test"):
        ours, theirs = (
            evaluate_run(run, one, split=split, forest=split == "test")  # type: ignore[arg-type]
            for one in (stack, cube)
        )
        # A tie may fall either way when windows share a batch: allow one pixel.
        assert np.abs(ours.metrics.confusion - theirs.metrics.confusion).sum() <= 2
        assert ours.metrics.pixels == theirs.metrics.pixels > 0
        assert ours.unseen_pixels == theirs.unseen_pixels
        assert ours.fields.tolist() == theirs.fields.tolist()
        assert ours.windows == theirs.windows
    assert ours.baseline is not None
    assert theirs.baseline is not None
    # The forest of both was trained on the cube: the same pixels, the same fields.
    assert ours.baseline.metrics.confusion.tolist() == theirs.baseline.metrics.confusion.tolist()
    assert ours.baseline.half_width == pytest.approx(theirs.baseline.half_width, rel=0.2)
    assert ours.baseline.fields == theirs.baseline.fields


def test_a_stack_trains_on_the_pixels_of_its_cube(pair: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"device": "cpu", "ranks": Ranks(), "run": None}
    tasks = []
    for one in pair:
        prepared = prepare_finetune(one, config(), **options)
        task, _ = make_finetune_task(prepared, workers=1, begin=True, ranks=Ranks())
        task.stream.close()
        tasks.append(task)
    ours, theirs = tasks

    assert ours.stream.dataset.chips == theirs.stream.dataset.chips > 0
    assert ours.class_weights.tolist() == theirs.class_weights.tolist()
    # First weights, and the bands' mean and deviation over the training chips.
    for name, value in ours.network.state_dict().items():
        assert bool((value == theirs.network.state_dict()[name]).all()), name
    chosen = [
        prepare_finetune(one, config(**{"labels.fields_per_class": 2}), **options) for one in pair
    ]
    for one in chosen:
        assert np.bincount(one.fields.code[one.chosen]).tolist() == [2, 2, 2]


@pytest.mark.slow
def test_a_stack_of_several_systems_and_any_size_goes_the_whole_way(
    new_cube: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = (30, 27)
    places = [(row, col) for row in (0, 33) for col in (0, 30, 60, 90)]
    path = cut_stack(
        new_cube(shape_yx=(66, 120), split=False), tmp_path / "sites.zarr", places,
        shape_yx=shape, fold=[1, 2, 1, 2, 3, 3, 1, 2], background=True, void=True, split=False,
        thin=True, crs=["EPSG:32631", "EPSG:32632"] * 4,
    )  # fmt: skip
    stack, run = str(path), str(tmp_path / "run")
    small = ["--preset", "tiny", "--chip", "16", "--batch-size", "4", "--workers", "1"]
    for key in ("model.widths=[8, 16]", "model.layers=1", "model.heads=2", "model.feedforward=32"):
        small += ["--set", key]

    folds = ["--by", "fold", "--train", "1", "--validation", "3", "--test", "2"]
    assert invoke(["finetune", stack, "--out", run, *small]) == 2
    assert "labels split CUBE" in capsys.readouterr().err
    assert invoke(["labels", "split", stack, *folds]) == 0
    shown = capsys.readouterr().out
    assert ["sites", "3", "2", "3"] in [line.split() for line in shown.splitlines()]
    assert "background" in shown
    assert "void" not in shown
    options = [*small, "--steps", "2", "--fields-per-class", "2"]
    assert invoke(["finetune", stack, "--out", run, *options, "--dry-run"]) == 0
    assert "fields: 8 of" in capsys.readouterr().out
    assert invoke(["finetune", stack, "--out", run, *options]) == 0
    capsys.readouterr()
    assert invoke(["finetune", stack, "--out", run, *options]) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert invoke(["evaluate", run, stack, "--dry-run"]) == 0
    assert "3 sites, each a map of its own" in capsys.readouterr().out
    assert invoke(["evaluate", run, stack]) == 0
    assert SITES_APART in capsys.readouterr().out

    source = open_source(path)
    info = read_metadata(run)
    assert info.trained_days == source.day_range
    assert info.season_start == "09-01"
    (described,) = info.provenance["cubes"]
    assert described["kind"] == "stack"
    assert described["sites"] == 8
    assert described["crs"] == ["EPSG:32631", "EPSG:32632"]
    assert described["fingerprint"] == source.fingerprint
    told = json.loads((Path(run) / "evaluation-test" / "metrics.json").read_text())
    fields = source.fields
    assert fields is not None
    tested = fields.split == SPLITS["test"]
    assert told["pixels"] + told["unseen_pixels"] == fields.pixels[tested].sum()
    assert [record["name"] for record in told["per_class"]][-1] == "background"
    card = (Path(run) / "model_card.md").read_text()
    assert "sites.zarr, 8 sites | 2018-09-01" in card
    assert "EPSG:32631, EPSG:32632" in card
    assert SITES_APART in card


def test_how_often_sites_are_shown_is_part_of_the_run(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path, run = tmp_path / "own.zarr", tmp_path / "run"
    shutil.copytree(pair[1], path)
    finetune(path, run, config(steps=1))
    before = prepare_finetune(path, config(), device="cpu", ranks=Ranks(), run=None)
    stack = open_stack(path, mode="r+")
    assert stack.fields is not None

    write_stack_split(stack, stack.fields.split, np.array([1, 3, 1, 1]))

    after = prepare_finetune(path, config(), device="cpu", ranks=Ranks(), run=None)
    for old, new in ((before.dataset, after.dataset), (before.held_out, after.held_out)):
        counts = [
            np.bincount([unit.site for unit in one.units], weights=one.chips_per_unit, minlength=4)
            for one in (old, new)
        ]
        assert counts[1].tolist() == (counts[0] * [1, 3, 1, 1]).tolist()
    for prepared in (before, after):
        weighed = make_finetune_task(prepared, workers=1, begin=False, ranks=Ranks())[0]
        drawn = pixels_drawn(prepared.dataset, classes=len(prepared.classes.legend))
        assert weighed.class_weights.tolist() == make_class_weights("inverse-sqrt", drawn).tolist()
    with pytest.raises(InputError, match=r"its data changed since it was begun \(labels\)"):
        finetune(path, run, config(steps=1))
    with pytest.raises(LabelError, match="burnt or split again since"):
        evaluate_run(run, path)
    assert plan_finetune(path, config(steps=1)).chips == after.dataset.chips


def test_labels_that_lie_elsewhere_are_other_labels(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    path, run = tmp_path / "own.zarr", tmp_path / "run"
    shutil.copytree(pair[0], path)
    finetune(path, run, config(steps=1))
    told = json.loads((run / "run.json").read_text())
    season = open_season(path, mode="r+")
    assert season.fields is not None
    assert season.legend is not None

    # A pixel to the left: as many pixels of each field as before, if not the same ones.
    labels, parcels = (np.roll(array[:], -1, axis=1) for array in (season.labels, season.parcels))
    write_fields(season, labels=labels, parcels=parcels, fields=season.fields, legend=season.legend)

    with pytest.raises(InputError, match=r"its data changed since it was begun \(label_pixels\)"):
        finetune(path, run, config(steps=1))
    # A run of an earlier version does not tell where its fields lie, and still is known.
    del told["identity"]["label_pixels"]
    (run / "run.json").write_text(json.dumps(told))
    assert finetune(path, run, config(steps=1)).already


def test_chips_of_the_recipe_are_all_that_is_trained_and_chosen_on(
    pair: tuple[Path, Path],
) -> None:
    _, path = pair
    recipe = config(**{"labels.chips": [[0, 0], [1, 1]]})
    assert "chips = [[0, 0], [1, 1]]" in to_toml(recipe)

    prepared = prepare_finetune(path, recipe, device="cpu", ranks=Ranks(), run=None)

    for dataset in (prepared.dataset, prepared.held_out):
        places = {
            (part.row // CHIP, part.col // CHIP) for unit in dataset.units for part in unit.chips
        }
        assert places <= {(0, 0), (1, 1)}
        assert places
    source = open_source(path)
    seen = fields_within(source, ChipChoice(CHIP, ((0, 0), (1, 1))))
    assert prepared.chosen.tolist() == (seen.split == SPLITS["train"]).tolist()
    target = np.concatenate(
        [
            chip.target[chip.target != 255]  # type: ignore[index]
            for number in range(len(prepared.dataset.units))
            for chip in prepared.dataset.read(number)
        ]
    )
    expected = [int(seen.pixels[prepared.chosen & (seen.code == code)].sum()) for code in range(3)]
    assert np.bincount(target, minlength=3).tolist() == expected
    with pytest.raises(InputError, match=r"\[\[0, 3\]\].*2 rows and 3 columns"):
        plan_finetune(path, config(**{"labels.chips": [[0, 3]]}))


def test_fields_of_one_site_tell_of_that_site_alone(pair: tuple[Path, Path]) -> None:
    for path in pair:
        fields = open_source(path).fields
        assert fields is not None
        assert figures_hold_for(fields, "test") == TRANSDUCTIVE


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["labels", "split", "BARE"], "it has no labels"),
        (["labels", "split", "STACK", "--by", "fold", "--train", "1"], "its sites have none"),
        (["labels", "split", "STACK", "--by", "fold", "--train", "a"], "must be numbers of folds"),
        (["labels", "split", "STACK", "--train", "1"], "--train is for folds"),
        (["labels", "split", "STACK", "--test", "1,2"], "must be a share such as 0.3"),
        (["labels", "split", "STACK", "--sites", "NONE"], "there is no such file"),
        (["labels", "split", "STACK", "--sites", "LIST"], "1 of 2 listed sites are not in it: zz"),
        (
            ["labels", "split", "STACK", "--sites", "LIST", "--missing-sites", "drop"],
            "it is error or skip",
        ),
        (["labels", "split", "STACK", "--missing-sites", "skip"], "without --sites"),
        (["labels", "split", "STACK", "--by", "block"], "Use --by site"),
        (["finetune", "BARE", "--out", "OUT"], "it has none"),
        (["finetune", "STACK", "--out", "OUT", "--set", "labels.chips=[[9, 9]]"], "[[9, 9]]"),
    ],
)
def test_mistakes_exit_2_with_one_sentence(
    pair: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    bare = tmp_path / "bare.zarr"
    if "BARE" in arguments:
        _make_bare(bare)
    (tmp_path / "list.csv").write_text("site_id,split\ns1,train\nzz,test\n")
    places = {"STACK": pair[1], "BARE": bare, "OUT": tmp_path / "out", "NONE": tmp_path / "none",
              "LIST": tmp_path / "list.csv"}  # fmt: skip

    assert invoke([str(places.get(word, word)) for word in arguments]) == 2

    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def _make_bare(path: Path) -> None:
    """Write a stack of one site, without labels."""
    from stcln_geo.cube.stack_store import create_stack, finish_stack, write_sites

    stack = create_stack(
        path, "2018-09-01", site_id=["a"], crs=["EPSG:32631"],
        transform=np.array([[10, 0, 5e5, 0, -10, 5e6]]), shape_yx=(16, 16),
        time=np.array([["2018-10-01"]], dtype="datetime64[s]"), bands=("red", "nir"),
    )  # fmt: skip
    write_sites(
        stack, 0, reflectance=np.full((1, 1, 2, 16, 16), 900, dtype=np.int16),
        valid=np.ones((1, 1, 16, 16), dtype=bool),
    )  # fmt: skip
    finish_stack(path, "2018-09-01")
