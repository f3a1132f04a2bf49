"""Protocols say what the commands are told, and imported sets follow them."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.cli.main import invoke
from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.stack import open_stack
from stcln_geo.datasets import import_dataset, plan_mtlcc, plan_pastis
from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.report.published import published_confusion, published_metrics
from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config, settle
from stcln_geo.train.protocol import Protocol, list_protocols, load_protocol, read_protocol_text

from ..datasets.make_mtlcc import make_tile, write_records
from ..datasets.make_pastis import squares_of_folds, write_pastis

CHIP = 8
SMALL = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
}
SQUARES = {20153: 1, 10279: 1, 10127: 2, 40438: 2, 40003: 4, 30005: 4, 10005: 5, 20777: 3}
"""Fold of each: the first two are for training, 20153 twice; of the next two 10127 stands twice."""


def small(**more: Any) -> list[str]:
    values = {**SMALL, **more}
    return [
        word
        for key, value in values.items()
        for word in ("--set", f"{key.replace('__', '.')}={value}")
    ]


@pytest.fixture(scope="module")
def pastis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PASTIS in small, with squares that the published lists name, imported."""
    folder = tmp_path_factory.mktemp("pastis")
    write_pastis(folder / "PASTIS", squares_of_folds(SQUARES, side=4 * CHIP, seed=8))
    import_dataset(plan_pastis(folder / "PASTIS"), folder / "pastis.zarr")
    return folder / "pastis.zarr"


# The protocols of the package.


@pytest.mark.parametrize("name", list_protocols())
def test_every_protocol_makes_recipes_that_settle(name: str) -> None:
    protocol = load_protocol(name)
    assert protocol.name == name
    rounds = [load_protocol(f"{name}:{one.name}") for one in protocol.rounds] or [protocol]
    for one in rounds:
        tuned = load_config(FinetuneConfig, base=one.recipe("finetune"))
        trained = load_config(PretrainConfig, base=one.recipe("pretrain"))
        assert tuned.season == trained.season == protocol.season
        settle(tuned, chips=10, preset="tiny", default_steps=3)
        settle(trained, chips=10, preset="tiny", default_steps=3)
        assert one.lines()[0].startswith(f"{one.name}: ")


def test_the_published_subsets_are_those_of_the_scripts(shared: Path) -> None:
    told = json.loads((shared / "facts" / "label_subsets.json").read_text())
    for name, chips, steps in (("pastis-2", "2_percent", 7600), ("pastis-5", "5_percent", 19_000)):
        split = load_protocol(name).split
        assert split is not None
        assert split.sites == {
            "train": tuple(map(str, told["pastis"]["train_patches"])),
            "validation": tuple(map(str, told["pastis"]["validation_patches"])),
        }
        assert split.folds == {"test": (told["pastis"]["test_fold"],)}
        recipe = load_config(FinetuneConfig, base=load_protocol(name).recipe("finetune"))
        assert [list(chip) for chip in recipe.labels.chips or ()] == told["pastis"][
            "chips_4x4_grid"
        ][chips]
        # 76 squares with two or five chips, two chips a step, 100 times.
        settled = settle(recipe, chips=76 * len(recipe.labels.chips or ()), preset="base",
                         default_steps=1)  # fmt: skip
        assert settled.steps == steps
        assert settled.validation.every == steps / 100
    for name, share in (("mtlcc-1", "1_percent"), ("mtlcc-2", "2_percent")):
        split, count = load_protocol(name).split, told["mtlcc"]["tiles_per_class"][share]
        assert split is not None
        for part in ("train", "validation"):
            classes = told["mtlcc"][f"{part}_tiles_by_class_index"]
            expected = [str(tile) for tiles in classes.values() for tile in tiles[:count]]
            assert list(split.sites[part]) == expected  # type: ignore[index]
        assert split.lists == {"test": told["mtlcc"]["test_split"]}


def test_the_published_subsets_have_the_published_counts() -> None:
    counts = {
        "pastis-2": (76, 72, 76, 71),
        "mtlcc-1": (39, 39, 39, 37),
        "mtlcc-2": (78, 78, 78, 73),
    }
    for name, expected in counts.items():
        split = load_protocol(name).split
        assert split is not None
        train, validation = split.sites["train"], split.sites["validation"]
        found = (len(train), len(set(train)), len(validation), len(set(validation)))
        assert found == expected
        assert not set(train) & set(validation)


def test_each_fold_of_pastis_is_the_test_once() -> None:
    protocol = load_protocol("pastis-official")
    tested: Counter[int] = Counter()
    for one in protocol.rounds:
        split = protocol.round(one.name).split
        assert split is not None
        folds = [fold for part in split.folds.values() for fold in part]
        assert sorted(folds) == [1, 2, 3, 4, 5]
        assert len(split.folds["train"]) == 3
        tested.update(split.folds["test"])
        # Nothing that is judged on is pre-trained on.
        assert one.pretrain.data.folds == split.folds["train"]
    assert tested == dict.fromkeys(range(1, 6), 1)


# Protocols of one's own.


def test_a_round_goes_before_its_protocol_and_options_before_both(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'title = "Mine"\nseason = "2020-09-01"\n[split.sites]\ntrain = [7, "b", 7]\n'
        '[finetune]\nepochs = 3\n[finetune.data]\nchip = 24\n[finetune.loss]\nkind = "focal"\n'
        '[[rounds]]\nname = "a"\nfinetune.steps = 40\nfinetune.data.halo = 0\n'
    )
    whole, one = load_protocol(path), load_protocol(f"{path}:a")

    assert (whole.name, one.name) == ("mine", "mine:a")
    assert one.split is not None
    assert one.split.sites == {"train": ("7", "b", "7")}
    plain = load_config(FinetuneConfig, base=one.recipe("finetune"))
    assert (plain.steps, plain.epochs, plain.season) == (40, None, "2020-09-01")
    assert (plain.data.chip, plain.data.halo, plain.loss.kind) == (24, 0, "focal")
    file = tmp_path / "options.toml"
    file.write_text("epochs = 7\n[data]\nchip = 16\n")
    over = load_config(FinetuneConfig, base=one.recipe("finetune"), file=file,
                       overrides={"season": "2021-09-01"})  # fmt: skip
    assert (over.steps, over.epochs, over.season) == (None, 7, "2021-09-01")
    assert (over.data.chip, over.data.halo) == (16, 0)
    assert read_protocol_text(f"{path}:a") == path.read_text()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title = ", "must be TOML"),
        ('title = "x"\nfolds = [1]', "folds: extra inputs are not permitted"),
        ('title = "x"\n[finetune.data]\nchips = 3', "finetune.data.chips: extra inputs"),
        ('title = "x"\n[split]\nby = "pixel"', "split.by: input should be 'field'"),
        ('title = "x"\n[split]\nseed = 3', "it names neither by, folds, sites nor lists"),
        ('title = "x"\n[split]\nby = "site"\nfolds.test = [1]', "both say where sites go"),
        ('seeds = []', "title: field required; seeds: tuple should have at least 1 item"),
    ],
)  # fmt: skip
def test_breaches_are_told_all_at_once(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(InputError, match="Cannot read the protocol") as caught:
        load_protocol(path)
    assert told in str(caught.value)


def test_a_protocol_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(MissingFileError, match="one of fields-per-class, fractions, mtlcc-1"):
        load_protocol("pastis-3")
    with pytest.raises(InputError, match="it has fold-1, fold-2"):
        load_protocol("pastis-official:fold-6")
    with pytest.raises(InputError, match="Name one, as in fractions:1"):
        load_protocol("fractions").recipe("finetune")


# Imported sets.


@pytest.mark.slow
def test_pastis_goes_from_import_to_both_ways_of_counting(
    pastis: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stack, run, begun = str(pastis), str(tmp_path / "run"), str(tmp_path / "begun")
    named = ["--protocol", "pastis-2"]
    before = open_stack(pastis)
    assert before.fields is not None
    assert invoke(["labels", "split", stack, *named, "--dry-run"]) == 0
    assert "Nothing was written" in capsys.readouterr().out
    assert (open_stack(pastis).fields.split == before.fields.split).all()  # type: ignore[union-attr]

    assert invoke(["labels", "split", stack, *named]) == 0
    shown = capsys.readouterr().out
    assert ["sites", "2", "2", "2"] in [line.split() for line in shown.splitlines()]
    assert "139 of 143 listed sites are not in the stack" in shown
    after = open_stack(pastis)
    fields, weight = after.fields, after.weight
    assert fields is not None
    assert weight is not None
    place = {name: site for site, name in enumerate(after.site_id)}
    assert {name: int(weight[place[name]]) for name in place if weight[place[name]] > 1} == {
        "20153": 2,
        "10127": 2,
    }
    expected = {1: "train", 2: "validation", 4: "test", 5: "unused", 3: "unused"}
    for number, fold in SQUARES.items():
        rows = fields.site == place[str(number)]
        assert set(fields.split[rows].tolist()) == {SPLITS[expected[fold]]}

    options = [*named, "--chip", str(CHIP), "--workers", "1", "--steps", "2"]
    options += small(validation__every=1)
    # Random pixels are never green.
    ungated = ["--set", "masking.gate=false"]
    assert invoke(["pretrain", stack, "--out", begun, *options, *ungated]) == 0
    assert "Sites: 1 of 8, by fold 5." in capsys.readouterr().out
    assert json.loads((tmp_path / "begun" / "run.json").read_text())["data"]["sites"] == 1
    assert invoke(["pretrain", stack, "--out", begun, *options, *ungated, "--fold", "4,5"]) == 2
    assert "data.folds" in capsys.readouterr().err
    (tmp_path / "ids.txt").write_text("10005\n30005\n1\n")
    ids = ["--sites", str(tmp_path / "ids.txt")]
    assert invoke(["pretrain", stack, "--out", begun, *options, *ungated, *ids]) == 2
    assert "data.sites" in capsys.readouterr().err
    assert invoke(["pretrain", stack, "--out", begun, *options, *ungated]) == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert invoke(["finetune", stack, "--out", run, "--init", begun, *options]) == 0
    assert "Silent: Background, 19." in capsys.readouterr().out
    info = read_metadata(run)
    assert (info.config.classes, info.config.mode, info.config.positions) == (
        20,
        "reference",
        "index",
    )
    assert info.silent == ("0", "19")
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["monitor"] == "validation_overall_accuracy"
    # Both chips of a square, twice for the one that stands twice.
    assert told["chips"] == 2 * 3

    assert invoke(["evaluate", run, stack, *named]) == 0
    shown = capsys.readouterr().out
    assert "by the published rule of pastis" in shown
    folder = tmp_path / "run" / "evaluation-test-pastis-2"
    told = json.loads((folder / "metrics.json").read_text())
    # Each test square as a whole, as published.
    assert (told["window"], told["halo"], told["windows"]) == (4 * CHIP, 0, 2)
    confusion = np.array(told["confusion"])
    assert confusion.shape == (20, 20)
    assert confusion[[0, 19]].sum() == 0
    assert confusion.sum() == told["published"]["pixels"] > 0
    with (folder / "confusion.csv").open() as file:
        assert (
            np.array([row[1:] for row in csv.reader(file)][1:], int).tolist() == told["confusion"]
        )
    assert told["protocol"] == "pastis-2"
    # By hand: classes of the truth, and within them alone.
    there = np.flatnonzero(confusion.sum(axis=1))
    scored = confusion[np.ix_(there, there)]
    hits = np.diag(scored)
    iou = hits / (scored.sum(0) + scored.sum(1) - hits)
    assert told["published"]["miou"] == pytest.approx(np.nanmean(iou))
    assert told["published"]["overall_accuracy"] == pytest.approx(
        np.trace(confusion) / confusion.sum()
    )
    assert told["published"]["classes"] == len(there)


def test_the_official_folds_are_split_round_by_round(pastis: Path) -> None:
    spec = load_protocol("pastis-official:fold-4").split_spec(pastis)
    assert spec is not None
    assert (spec.by, dict(spec.folds)) == (
        "fold",
        {"train": (1, 4, 5), "validation": (2,), "test": (3,)},
    )
    assert spec.lists is None


def test_mtlcc_takes_its_test_tiles_from_the_published_list(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    # Of both lists; then in the published lists of train, test and eval as the generator has them.
    numbers = (1175, 1007, 17_996, 17_998)
    tiles = [make_tile(number, year=year, dates=5, side=24, rng=rng)
             for number in numbers for year in (2016, 2017)]  # fmt: skip
    out = tmp_path / "mtlcc.zarr"
    import_dataset(plan_mtlcc(write_records(tmp_path / "480", tiles)), out)

    assert invoke(["labels", "split", str(out), "--protocol", "mtlcc-1"]) == 0

    stack, other = open_stack(out, "2016-01-01"), open_stack(out, "2017-01-01")
    assert stack.fields is not None
    assert other.fields is not None
    split = {
        name: set(stack.fields.split[stack.fields.site == site].tolist())
        for site, name in enumerate(stack.site_id)
    }
    assert split == {
        "1175": {SPLITS["train"]},
        "1007": {SPLITS["validation"]},
        "17996": {SPLITS["unused"]},
        "17998": {SPLITS["test"]},
    }
    assert not other.fields.split.any()
    assert load_protocol("mtlcc-2").recipe("pretrain")["data"]["lists"] == ("train_fold0",)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--protocol", "mtlcc-2"], "it is for the set mtlcc, and this is"),
        (["--protocol", "pastis-2", "--seed", "3"], "Cannot use --seed with --protocol"),
        (["--protocol", "pastis-official"], "Name one, as in pastis-official:fold-1"),
        (["--protocol", "ALIEN"], "none of the 1 sites under train is in it"),
    ],
)
def test_mistakes_exit_2_with_one_sentence(
    pastis: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    alien = tmp_path / "alien.toml"
    alien.write_text('title = "x"\n[split.sites]\ntrain = [1]\ntest = [40003]\n')
    words = [str(alien) if word == "ALIEN" else word for word in arguments]
    season = ["--season", "2018-09-01"]
    assert invoke(["labels", "split", str(pastis), *words, *season]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def test_lists_and_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["protocol", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in list_protocols())
    assert "pastis-official:fold-5" in listed
    assert invoke(["protocol", "show", "pastis-2"]) == 0
    shown = capsys.readouterr().out
    assert "split: train: 76 sites by id (72 different)" in shown
    assert "finetune: labels.chips = [(0, 0), (1, 1)]" in shown
    assert "note: " in shown
    assert invoke(["protocol", "show", "fractions:5", "--toml"]) == 0
    assert capsys.readouterr().out.rstrip() == read_protocol_text("fractions").rstrip()


def test_a_file_sets_no_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('title = "x"\nname = "pastis-2"\n')
    assert load_protocol(tmp_path / "mine.toml").name == "mine"
    assert isinstance(load_protocol("pastis-2"), Protocol)


# Published codes.


def test_published_codes_are_found_by_value() -> None:
    # The network may answer unknown, which is its last output, and never is: order of classes.txt.
    confusion = np.array([[5, 1, 2], [0, 4, 1], [0, 0, 0]])
    placed = published_confusion(confusion, ["1", "26", "0"], rule="mtlcc")
    assert placed.tolist() == [[0, 0, 0], [2, 5, 1], [1, 0, 4]]
    assert published_metrics(placed, rule="mtlcc").overall_accuracy == 0.9

    placed = published_confusion(confusion, ["3", "1", "19"], rule="pastis")
    assert placed.shape == (20, 20)
    assert placed[3, [1, 3, 19]].tolist() == [1, 5, 2]
    assert published_metrics(placed, rule="pastis").overall_accuracy == pytest.approx(9 / 13)
    with pytest.raises(InputError, match="those of PASTIS are 0 to 19"):
        published_confusion(confusion, ["3", "wheat", "19"], rule="pastis")
