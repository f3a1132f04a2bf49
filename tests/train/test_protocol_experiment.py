"""A protocol with all its rounds as one command: splits in memory, folds pooled in two ways."""

from __future__ import annotations

import csv
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.cli.main import invoke
from stcln_geo.data.source import open_source
from stcln_geo.data.split_labels import SplitSpec, open_split, split_labels
from stcln_geo.datasets import import_dataset, plan_pastis
from stcln_geo.errors import CubeError, InputError
from stcln_geo.experiments import Choices, Settings, plan_experiment, run_experiment
from stcln_geo.experiments.catalogue import make_design
from stcln_geo.experiments.design import Arm, Design, Pair, View
from stcln_geo.experiments.paper import figure_lines
from stcln_geo.experiments.pool import ALL_FOLDS, add_up, average, make_tables
from stcln_geo.experiments.rounds import pooling_of, seeds_of
from stcln_geo.experiments.scores import PUBLISHED, STRICT, Counts, Score
from stcln_geo.experiments.table import Table, table_csv, table_markdown
from stcln_geo.report.metrics import confusion_matrix, metrics_from_confusion
from stcln_geo.report.published import published_metrics
from stcln_geo.train.protocol import Protocol, list_protocols, load_protocol
from stcln_geo.train.provenance import fingerprint_labels

from ..datasets.make_pastis import squares_of_folds, write_pastis

SQUARES = {20153: 1, 10279: 1, 10127: 2, 40438: 2, 20777: 3, 40003: 4, 30005: 4, 10005: 5}
"""Fold of each; the published lists of `pastis-2` name those of folds 1 and 2."""

SIDE = 16
TOY = (
    "model.widths=[8, 16]", "model.layers=1", "model.heads=2", "model.feedforward=32",
    "data.chip=8", "data.halo=0", "batch_size=4", "validation.every=2",
    # Random pixels are never green.
    "pretrain.masking.gate=false", "pretrain.data.min_clear=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def pastis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PASTIS in small, imported, with sites in all five folds; not to be changed."""
    folder = tmp_path_factory.mktemp("folds")
    write_pastis(folder / "PASTIS", squares_of_folds(SQUARES, side=SIDE, seed=11))
    import_dataset(plan_pastis(folder / "PASTIS"), folder / "pastis.zarr")
    return folder / "pastis.zarr"


def settings(data: Path, out: Path, **more: Any) -> Settings:
    return Settings(
        **{
            "data": (data,), "out": out, "seeds": 2, "steps": 2, "preset": "tiny", "workers": 1,
            "device": "cpu", "assignments": TOY, **more,
        }
    )  # fmt: skip


def command(data: Path, out: Path, *more: str) -> list[str]:
    words = ["experiment", "protocol", "--data", str(data), "--out", str(out), "--steps", "2"]
    words += ["--preset", "tiny", "--workers", "1", "--device", "cpu"]
    return [*words, *(word for text in TOY for word in ("--set", text)), *more]


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def digest(folder: Path) -> str:
    """Return a hash of all files of a folder, and of their names."""
    found = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()


# A split in memory.


@pytest.mark.parametrize("name", ["pastis-official:fold-2", "pastis-2"])
def test_a_split_in_memory_is_that_which_would_be_stored(pastis, tmp_path, name):
    import shutil

    own = tmp_path / "pastis.zarr"
    shutil.copytree(pastis, own)
    spec = load_protocol(name).split_spec(own)
    before = digest(own)
    opened = open_split(own, spec)
    assert digest(own) == before
    report = split_labels(own, spec)
    assert digest(own) != before, "and the same split stored changes the stack"
    stored = open_source(own)
    assert fingerprint_labels(opened.source) == fingerprint_labels(stored)
    assert opened.source.weight.tolist() == stored.weight.tolist()
    assert opened.source.fields.split.tolist() == stored.fields.split.tolist()
    assert opened.report.lines() == report.lines()


@pytest.mark.parametrize("spec", [SplitSpec(seed=3), SplitSpec(by="block", block_pixels=13)])
def test_a_cube_can_be_opened_under_another_split_too(small_cube, spec):
    before = open_source(small_cube)
    opened = open_split(small_cube, spec).source
    assert opened.fields.split.tolist() != before.fields.split.tolist()
    assert (open_source(small_cube).fields.split == before.fields.split).all()
    assert opened.fields.split.tolist() == (
        split_labels(small_cube, spec, dry_run=True).fields.split.tolist()
    )
    assert open_source(opened, before.season) is opened
    with pytest.raises(CubeError, match="as season 1999-01-01"):
        open_source(opened, "1999-01-01")


# Folds or variants.


def test_folds_are_told_from_variants_by_what_is_tested():
    folds = np.eye(5, dtype=bool)
    assert pooling_of(list(folds)) == "both"
    assert pooling_of([folds[1]]) == "none"
    assert pooling_of([folds[1], folds[1]]) == "none"
    assert pooling_of([folds[1], folds[1] | folds[2]]) == "mean"
    assert pooling_of([folds[0], folds[1], folds[0]]) == "mean"


def test_every_protocol_is_an_experiment():
    for name in list_protocols():
        protocol = load_protocol(name)
        for pretraining in (False, True):
            choices = Choices(protocol=protocol, pretraining=pretraining)
            design = make_design("protocol", choices)
            assert len(design.views) == max(len(protocol.rounds), 1)
            assert all(view.protocol.rounds == () for view in design.views)
            assert len(design.arms) == 1 + pretraining
            assert len(design.pairs) == len(design.views) * pretraining
            assert design.parts == [(view,) for view in design.views]


def test_seeds_are_the_protocols_and_then_more():
    named = Protocol(name="mine", title="Mine", seeds=(3407, 7))
    assert seeds_of(named, 1) == (3407,)
    assert seeds_of(named, 2) == (3407, 7)
    assert seeds_of(named, 4) == (3407, 7, 3408, 3409)


def test_runs_of_a_protocol_follow_it(pastis, tmp_path):
    plan = plan_experiment(
        "protocol", settings(pastis, tmp_path, pretrain_data=(pastis,)),
        Choices(protocol=load_protocol("pastis-official")),
    )  # fmt: skip
    assert plan.steps.pooling == "both"
    assert len(plan.steps.finetune) == 2 * 5 * 2
    shown = {step.out.parent.name: step.config.data.folds for step in plan.steps.pretrain}
    assert shown["folds-2-3-4"] == (2, 3, 4)
    assert len(shown) == len(plan.steps.pretrain) == 5
    tested = []
    for step in plan.steps.finetune:
        source = step.open()
        mine = set(source.fold[source.fields.site[source.fields.split == 3]].tolist())
        tested.append(mine)
        assert len(mine) == 1
        if step.config.init is not None:
            begun = next(one for one in plan.steps.pretrain if str(one.out) == step.config.init)
            assert not mine & set(begun.config.data.folds), "nothing judged was pre-trained on"
    assert set.union(*tested) == {1, 2, 3, 4, 5}
    assert not list(tmp_path.iterdir()), "planning writes nothing"
    # One round goes where it lies among all.
    one = plan_experiment(
        "protocol", settings(pastis, tmp_path),
        Choices(protocol=load_protocol("pastis-official:fold-3")),
    )  # fmt: skip
    assert one.steps.pooling == "none"
    assert {step.out for step in one.steps.finetune} < {step.out for step in plan.steps.finetune}


def test_a_protocol_without_rounds_is_one_split(pastis, tmp_path):
    plan = plan_experiment(
        "protocol", settings(pastis, tmp_path, seeds=1), Choices(protocol=load_protocol("pastis-2"))
    )
    assert plan.steps.pooling == "none"
    assert any("139 of 143 listed sites are not in the stack" in line for line in plan.lines())
    (step,) = plan.steps.finetune
    assert step.out == tmp_path / "runs" / "pastis" / "scratch" / "seed-0"
    assert step.open().weight.max() == 2, "a site that is listed twice counts twice"
    assert step.config.labels.silent == ("0", "19")
    assert step.config.steps == 2
    assert step.config.epochs is None


def test_other_data_are_pretrained_on_whole(pastis, small_cube, tmp_path):
    choices = Choices(protocol=load_protocol("pastis-official"))
    other = settings(pastis, tmp_path, pretrain_data=(small_cube,))
    plan = plan_experiment("protocol", other, choices)
    (step,) = plan.steps.pretrain
    assert step.config.data.folds == ()
    assert step.config.season is None
    assert step.out.parent.name == "common"
    both = settings(pastis, tmp_path, pretrain_data=(pastis, small_cube))
    with pytest.raises(InputError, match="either what the protocol is for, or other data"):
        plan_experiment("protocol", both, choices)


def test_another_copy_of_a_set_is_no_other_data(pastis, tmp_path):
    import shutil

    copy = tmp_path / "copy.zarr"
    shutil.copytree(pastis, copy)
    plan = plan_experiment(
        "protocol", settings(pastis, tmp_path / "out", pretrain_data=(copy,)),
        Choices(protocol=load_protocol("pastis-official:fold-1")),
    )  # fmt: skip
    assert plan.steps.pretrain[0].config.data.folds == (1, 2, 3)


def test_what_rounds_differ_in_is_not_set_for_all(small_cube, tmp_path):
    choices = Choices(protocol=load_protocol("fractions"))
    shared = settings(small_cube, tmp_path, assignments=("finetune.labels.fraction=0.5",))
    with pytest.raises(InputError, match="sets it itself"):
        plan_experiment("protocol", shared, choices)
    with pytest.raises(InputError, match="says itself how many fields"):
        plan_experiment("protocol", settings(small_cube, tmp_path), replace(choices, fields=(3,)))
    plan = plan_experiment("protocol", settings(small_cube, tmp_path, pretrain_data=(small_cube,)),
                           choices)  # fmt: skip
    assert plan.steps.pooling == "none"
    assert plan.design.along == "views"
    assert len(plan.steps.pretrain) == 1, "rounds share a pre-training that is the same"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["protocol"], "Name one with --protocol"),
        (["protocol", "--protocol", "pastis-3"], "one of fields-per-class, fractions"),
        (["protocol", "--protocol", "pastis-official:fold-6"], "it has fold-1, fold-2"),
        (["protocol", "--protocol", "mtlcc-2"], "it is for the set mtlcc"),
        (["few-labels", "--protocol", "pastis-2"], "only the experiment protocol follows one"),
        (["protocol", "--protocol", "pastis-2", "--seeds", "0"], "--seeds 0"),
        (["folds", "--protocol", "pastis-2"], "cross-year, protocol"),
        (["protocol", "--protocol", "pastis-2", "--set", "season=2019-01-01"], "sets it itself"),
    ],
)  # fmt: skip
def test_mistakes_are_told_at_once(pastis, tmp_path, capsys, words, said):
    out = tmp_path / "out"
    assert invoke(["experiment", *words, "--data", str(pastis), "--out", str(out)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error
    assert "Traceback" not in error
    assert not out.exists()


# Pooled figures.


MATRICES = {
    # Fold, seed: three classes; the third is met in fold b alone.
    ("a", 0): [[6, 2, 0], [1, 3, 0], [0, 0, 0]],
    ("b", 0): [[1, 0, 1], [0, 8, 0], [2, 0, 2]],
    ("a", 1): [[8, 0, 0], [0, 4, 0], [0, 0, 0]],
    ("b", 1): [[0, 2, 0], [0, 8, 0], [4, 0, 0]],
}
BINS = {
    "a": [{"pixels": 10, "confidence": 0.5, "right": 0.4},
          {"pixels": 2, "confidence": 0.9, "right": 1.0}],
    "b": [{"pixels": 6, "confidence": 0.51, "right": 1.0}],
}  # fmt: skip


def by_hand(fold: str, seed: int, *, arm: str = "scratch", shift: float = 0.0) -> Score:
    matrix = np.array(MATRICES[fold, seed])
    placed = np.zeros((20, 20), dtype=np.int64)
    placed[:3, :3] = matrix  # the first is the background, which is not scored
    found = metrics_from_confusion(matrix).summary()
    figures = {**dict.fromkeys(STRICT, 0.5), **found}
    figures["macro_miou"] = found["macro_miou"] + shift
    published = published_metrics(placed, rule="pastis").summary()
    return Score(
        data="set", arm=arm, view=fold, seed=seed, season="2018-09-01", dates="all dates",
        figures={name: figures[name] for name in STRICT}, rule="pastis",
        published={name: published[name] for name in PUBLISHED}, fields=3,
        pixels=int(matrix.sum()), unseen=1, note="",
        counts=Counts(confusion=matrix, placed=placed, bins=tuple(BINS[fold])),
    )  # fmt: skip


FOLDS = Design(
    name="protocol", title="Folds", question="Which?",
    arms=(Arm(name="pretrained", title="pre-trained", pretrain={}),
          Arm(name="scratch", title="from scratch")),
    views=(View(name="a", title="a"), View(name="b", title="b")),
    pairs=tuple(Pair(first=("pretrained", name), second=("scratch", name),
                     title=f"pre-training, {name}") for name in "ab"),
)  # fmt: skip


def made(*, pooling: str = "both") -> dict[tuple[str, str], Table]:
    scores = [by_hand(fold, seed) for fold, seed in MATRICES]
    scores += [by_hand(fold, seed, arm="pretrained", shift=0.1) for fold, seed in MATRICES]
    tables = make_tables(FOLDS, scores, pooling)
    return {(table.kind, table.reading.partition(" ")[0]): table for table in tables}


def test_matrices_of_folds_are_added_up_seed_by_seed():
    first, second = add_up([by_hand(fold, seed) for fold, seed in MATRICES])
    # Seed 0 in all: [[7, 2, 1], [1, 11, 0], [2, 0, 2]], so IoU 7/13, 11/14, 2/5.
    assert (first.seed, first.view, first.pixels) == (0, ALL_FOLDS, 26)
    assert first.figures["macro_miou"] == pytest.approx((7 / 13 + 11 / 14 + 2 / 5) / 3)
    assert first.figures["overall_accuracy"] == pytest.approx(20 / 26)
    # F1: 14/20, 22/25, 4/7... of truth 10, 12, 4 and predictions 10, 13, 3.
    assert first.figures["macro_f1"] == pytest.approx((14 / 20 + 22 / 25 + 4 / 7) / 3)
    # Confidences 0.5 and 0.51 share a bin: |5 + 3.06 - 10| + |1.8 - 2| over 18 pixels.
    assert first.figures["expected_calibration_error"] == pytest.approx((1.94 + 0.2) / 18)
    # Without background in the truth: of 16 pixels 13 right. Classes 1 and 2 alone: [[11, 0],
    # [0, 2]]; the F1 has the stray background too.
    assert first.published["overall_accuracy"] == pytest.approx(13 / 16)
    assert first.published["miou"] == pytest.approx(1.0)
    assert first.published["f1"] == pytest.approx((0 + 22 / 23 + 4 / 6) / 3)
    # Seed 1 in all: [[8, 2, 0], [0, 12, 0], [4, 0, 0]].
    assert second.figures["macro_miou"] == pytest.approx((8 / 14 + 12 / 14 + 0) / 3)


def test_a_sum_of_folds_is_the_matrix_of_all_their_pixels():
    rng = np.random.default_rng(5)
    truth, said = rng.integers(0, 4, 501), rng.integers(0, 4, 501)
    parts = np.split(np.arange(501), [17, 230, 231])
    folds = [
        replace(
            by_hand("a", 0),
            view=str(number),
            counts=Counts(
                confusion=confusion_matrix(truth[part], said[part], classes=4), placed=None, bins=()
            ),
        )
        for number, part in enumerate(parts)
    ]
    (whole,) = add_up(folds)
    expected = metrics_from_confusion(confusion_matrix(truth, said, classes=4)).summary()
    assert {name: whole.figures[name] for name in expected} == expected


def test_figures_of_folds_are_averaged_seed_by_seed():
    first, second = average([by_hand(fold, seed) for fold, seed in MATRICES])
    # Fold a, seed 0: IoU 6/9 and 3/6 of two classes; fold b: 1/4, 1, 2/5.
    in_a, in_b = (6 / 9 + 3 / 6) / 2, (1 / 4 + 1 + 2 / 5) / 3
    assert first.figures["macro_miou"] == pytest.approx((in_a + in_b) / 2)
    # Seed 1: 1 and 1; then 0/6, 8/10, 0/4.
    assert second.figures["macro_miou"] == pytest.approx((1 + 0.8 / 3) / 2)
    missing = replace(by_hand("a", 0), figures=dict.fromkeys(STRICT))
    (lacking,) = average([missing, by_hand("b", 0)])
    assert lacking.figures["macro_miou"] is None


def test_both_ways_have_tables_of_their_own_in_both_readings():
    tables = made()
    assert list(tables) == [
        (kind, reading) for reading in ("strict", "published")
        for kind in ("summed", "averaged", "each")
    ]  # fmt: skip
    assert len({table.file for table in tables.values()}) == 6
    headers: list[set[str]] = []
    for (kind, _), table in tables.items():
        if kind != "each":
            head = table_csv(table).splitlines()[0].split(",")
            headers.append({name for name in head if name.endswith("_mean")})
    assert not headers[0] & headers[1], "never in one column"
    assert not headers[2] & headers[3]
    summed = tables["summed", "strict"].row("scratch", ALL_FOLDS).estimates["macro_miou"]
    values = [(7 / 13 + 11 / 14 + 2 / 5) / 3, (8 / 14 + 12 / 14) / 3]
    assert (summed.count, summed.mean) == (2, pytest.approx(np.mean(values)))
    assert summed.deviation == pytest.approx(np.std(values, ddof=1))
    # t(0.975, 1) = 12.7062.
    half = 12.7062 * np.std(values, ddof=1) / np.sqrt(2)
    assert summed.high - summed.mean == pytest.approx(half, rel=1e-5)


def test_deviations_over_folds_and_over_seeds_are_told_apart():
    table = made()["averaged", "strict"]
    row = table.row("scratch", ALL_FOLDS)
    in_a = [(6 / 9 + 3 / 6) / 2, 1.0]
    in_b = [(1 / 4 + 1 + 2 / 5) / 3, 0.8 / 3]
    over_seeds = np.mean([in_a, in_b], axis=0)
    over_folds = np.mean([in_a, in_b], axis=1)
    assert row.estimates["macro_miou"].mean == pytest.approx(over_seeds.mean())
    assert row.estimates["macro_miou"].deviation == pytest.approx(np.std(over_seeds, ddof=1))
    assert row.folds["macro_miou"].count == 2
    assert row.folds["macro_miou"].deviation == pytest.approx(np.std(over_folds, ddof=1))
    found = next(iter(csv.DictReader(table_csv(table).splitlines()[0:1] + [
        line for line in table_csv(table).splitlines() if "from scratch" in line])))  # fmt: skip
    assert float(found["macro_miou_sd_over_folds"]) == pytest.approx(
        np.std(over_folds, ddof=1), abs=1e-6
    )
    assert f"sd over folds {np.std(over_folds, ddof=1):.4f}" in table_markdown(
        table, differences=False
    )


def test_differences_of_pooled_figures_are_paired():
    (difference,) = made()["averaged", "strict"].differences
    assert difference.what == "pre-training"
    assert difference.estimates["macro_miou"].mean == pytest.approx(0.1)
    assert difference.estimates["macro_miou"].deviation == pytest.approx(0, abs=1e-12)
    assert difference.folds["macro_miou"].mean == pytest.approx(0.1)
    # Both arms have the same matrices.
    (summed,) = made()["summed", "strict"].differences
    assert summed.estimates["macro_miou"].mean == 0


def test_rounds_that_overlap_are_averaged_alone():
    assert [kind for kind, _ in made(pooling="mean")] == ["averaged", "each"] * 2
    assert [kind for kind, _ in made(pooling="none")] == ["whole"] * 2


def test_numbers_that_a_protocol_names_are_told_with_it():
    told = "\n".join(figure_lines(load_protocol("pastis-official")))
    assert "| PASTIS | U-TAE | mIoU 0.6310, OA 0.8320 | pastis-official, all labels |" in told
    assert "+6.49 points of mIoU" in "\n".join(figure_lines(load_protocol("pastis-2")))
    assert figure_lines(load_protocol("fractions")) == []


# From the command to the report.


@pytest.mark.slow
def test_five_folds_of_pastis_are_one_command(pastis: Path, tmp_path: Path, capsys):
    out, before = tmp_path / "out", digest(pastis)
    words = command(pastis, out, "--protocol", "pastis-official", "--seeds", "1")
    assert invoke([*words, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "1 arms (scratch) x 5 folds" in told
    # 5 runs of 2 steps.
    assert "optimiser steps left: 10" in told
    assert "runs: 5, of which 0 are finished" in told
    assert not out.exists()

    # It stops after the first fold, and goes on after it.
    plan = plan_experiment(
        "protocol", settings(pastis, out, seeds=1),
        Choices(protocol=load_protocol("pastis-official")),
    )  # fmt: skip

    def interrupt(step: object, worked: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(plan, on_done=interrupt)
    first = out / "runs" / "pastis" / "scratch" / "fold-1" / "seed-0"
    assert json.loads((first / "run.json").read_text())["status"] == "finished"
    weights = (first / "checkpoints" / "best.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    assert invoke([*words, "--jobs", "2"]) == 0
    told = capsys.readouterr().out
    assert f"{first}: was finished" in told
    assert told.count(": done") == 4
    assert (first / "checkpoints" / "best.safetensors").stat().st_mtime_ns == weights
    assert digest(pastis) == before, "the stack is as it was, labels and split too"

    # By hand, from the matrices that the runs wrote.
    matrices = []
    for number in range(1, 6):
        run = first.parent.parent / f"fold-{number}" / "seed-0"
        name = f"evaluation-test-pastis-official-fold-{number}"
        with (run / name / "confusion.csv").open() as file:
            matrices.append(np.array([row[1:] for row in csv.reader(file)][1:], dtype=int))
        seen = json.loads((run / "run.json").read_text())["splits"]["test"]["pixels"]
        assert 0 < matrices[-1].sum() <= seen
    total = np.sum(matrices, axis=0)
    assert total.shape == (19, 19)
    hits = np.diag(total)
    union = total.sum(0) + total.sum(1) - hits
    (summed,) = read(out / "folds-summed.csv")
    miou = (hits[union > 0] / union[union > 0]).mean()
    assert float(summed["summed_macro_miou_mean"]) == pytest.approx(miou, abs=1e-6)
    assert float(summed["summed_overall_accuracy_mean"]) == pytest.approx(
        hits.sum() / total.sum(), abs=1e-6
    )
    assert summed["summed_macro_miou_sd"] == "", "one seed has no deviation over seeds"
    scores = [float(one["strict_macro_miou"]) for one in read(out / "scores.csv")]
    (averaged,) = read(out / "folds-averaged.csv")
    assert float(averaged["averaged_macro_miou_mean"]) == pytest.approx(np.mean(scores), abs=1e-6)
    assert float(averaged["macro_miou_sd_over_folds"]) == pytest.approx(
        np.std(scores, ddof=1), abs=1e-6
    )
    assert [row["view"] for row in read(out / "table.csv")] == [f"fold-{n}" for n in range(1, 6)]
    report = (out / "report.md").read_text()
    for said in ("U-TAE", "0.6310", "confusion matrices added up", "The authors of PASTIS score so",
                 "| pastis, fold-4 |", "(folds.png)",
                 "source of the protocol: Garnot and Landrieu (2021)"):  # fmt: skip
        assert said in report
    assert (out / "folds.png").stat().st_size > 5000

    # The same as split, fine-tune and evaluate by hand.
    import shutil

    own = tmp_path / "pastis.zarr"
    shutil.copytree(pastis, own)
    assert invoke(["labels", "split", str(own), "--protocol", "pastis-official:fold-3"]) == 0
    hand = ["--protocol", "pastis-official:fold-3", "--workers", "1", "--device", "cpu"]
    toy = [word for text in TOY if not text.startswith("pretrain") for word in ("--set", text)]
    toy += ["--preset", "tiny", "--steps", "2"]
    assert invoke(["finetune", str(own), "--out", str(tmp_path / "hand"), *hand, *toy]) == 0
    assert invoke(["evaluate", str(tmp_path / "hand"), str(own), *hand]) == 0
    file = "evaluation-test-pastis-official-fold-3/metrics.json"
    expected = json.loads((tmp_path / "hand" / file).read_text())
    found = json.loads((first.parent.parent / "fold-3" / "seed-0" / file).read_text())
    assert found["confusion"] == expected["confusion"]
    # And such a run is judged again under its split, by hand.
    run = str(first.parent.parent / "fold-3" / "seed-0")
    assert invoke(["evaluate", run, str(own), *hand]) == 0
    split_labels(own, load_protocol("pastis-official:fold-1").split_spec(own))
    assert invoke(["evaluate", run, str(own), "--device", "cpu"]) == 2
    assert "split again since it was trained" in capsys.readouterr().err


@pytest.mark.slow
def test_a_protocol_of_ones_own_compares_with_pretraining(pastis: Path, tmp_path: Path, capsys):
    mine = tmp_path / "mine.toml"
    mine.write_text(
        'title = "Two of the folds"\ndataset = "pastis"\nseeds = [7]\n'
        '[finetune.labels]\nsilent = ["0", "19"]\n'
        '[evaluation]\nwindow = "site"\nhalo = 0\nmetric = "pastis"\n'
        '[[figures]]\nlabel = "others"\nsource = "somewhere"\nmiou = 0.25\n'
        '[[rounds]]\nname = "a"\nsplit.folds = {train = [1, 2], validation = [5], test = [4]}\n'
        "pretrain.data.folds = [1, 2]\n"
        '[[rounds]]\nname = "b"\nsplit.folds = {train = [3, 4], validation = [5], test = [1, 2]}\n'
        "pretrain.data.folds = [3, 4]\n"
    )
    out = tmp_path / "out"
    words = command(pastis, out, "--protocol", str(mine), "--pretrain-data", str(pastis))
    assert invoke(words) == 0
    capsys.readouterr()
    scores = read(out / "scores.csv")
    assert [(one["arm"], one["view"], one["seed"]) for one in scores] == [
        (arm, view, "7") for arm in ("pretrained", "scratch") for view in "ab"
    ]
    runs = out / "runs" / "pastis"
    for arm in ("pretrained", "scratch"):
        placed = []
        for view in "ab":
            found = json.loads(
                (runs / arm / view / f"seed-7/evaluation-test-mine-{view}/metrics.json").read_text()
            )
            # Each site as a whole, counted by the published rule too.
            assert (found["window"], found["halo"]) == (SIDE, 0)
            names = [int(record["name"] == "19") for record in found["per_class"]]
            assert names == [0] * 19 + [1]
            assert np.array(found["confusion"])[0].sum() == 0, "background is silent"
            placed.append(np.array(found["confusion"]))
            one = next(one for one in scores if (one["arm"], one["view"]) == (arm, view))
            assert float(one["published_pastis_miou"]) == pytest.approx(
                found["published"]["miou"], abs=1e-6
            )
        expected = published_metrics(np.sum(placed, axis=0), rule="pastis")
        rows = {row["row"]: row for row in read(out / "folds-summed-published.csv")}
        title = {"pretrained": "pre-trained", "scratch": "from scratch"}[arm]
        assert float(rows[title]["summed_miou_mean"]) == pytest.approx(expected.miou, abs=1e-6)
    shown = {
        one.parent.parent.name: json.loads(one.read_text())["data"]["sites"]
        for one in out.glob("pretraining/*/*/run.json")
    }
    assert shown == {"folds-1-2": 4, "folds-3-4": 3}
    report = (out / "report.md").read_text()
    assert "| PASTIS | others | mIoU 0.2500 | mine | somewhere |" in report
    assert "1 seeds (7)" in report
    assert "folds-1-2, folds-3-4" in report

    # Judged by another rule, it is judged again; nothing is trained.
    mine.write_text(mine.read_text().replace('window = "site"', "window = 12"))
    assert invoke(words) == 0
    told = capsys.readouterr().out
    assert told.count(": done") == 4
    assert told.count("was finished") == 2
    again = json.loads((runs / "scratch/a/seed-7/evaluation-test-mine-a/metrics.json").read_text())
    assert again["window"] == 12


@pytest.mark.slow
def test_variants_are_not_pooled(small_cube: Path, tmp_path: Path):
    mine = tmp_path / "few.toml"
    mine.write_text(
        'title = "Fields"\nseeds = [0]\n[split]\nby = "field"\nseed = 5\n'
        '[[rounds]]\nname = "1"\nfinetune.labels.fields_per_class = 1\n'
        '[[rounds]]\nname = "3"\nfinetune.labels.fields_per_class = 3\n'
    )
    stored = open_source(small_cube).fields.split.copy()
    out = tmp_path / "out"
    assert invoke(command(small_cube, out, "--protocol", str(mine))) == 0
    assert (open_source(small_cube).fields.split == stored).all()
    assert [row["view"] for row in read(out / "table.csv")] == ["1", "3"]
    assert not list(out.glob("folds*"))
    assert (out / "curve.png").stat().st_size > 5000
    report = (out / "report.md").read_text()
    assert "fields_per_class = 1" in report
    assert "fields_per_class = 3" in report
    assert "trained on 3 and 9 fields" in report
