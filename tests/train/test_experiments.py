"""Every experiment at toy size, from the command to the report; interruption, and cost."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stcln_geo.cli.main import invoke
from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import open_season
from stcln_geo.data.split_labels import SplitSpec, split_labels
from stcln_geo.experiments import Choices, Settings, plan_experiment, run_experiment
from stcln_geo.experiments.statistics import estimate

TOY = (
    "model.widths=[8, 16]", "model.layers=1", "model.heads=2", "model.feedforward=32",
    "data.chip=16", "batch_size=4", "validation.every=2",
)  # fmt: skip


def run(name: str, cube: Path, out: Path, *more: str, seeds: int = 1, steps: int = 2) -> int:
    words = ["experiment", name, "--data", str(cube), "--out", str(out), "--seeds", str(seeds)]
    words += ["--preset", "tiny", "--steps", str(steps), "--workers", "1", "--device", "cpu"]
    for text in TOY:
        words += ["--set", text]
    return invoke([*words, *more])


def settings(cube: Path, out: Path, **more: object) -> Settings:
    return Settings(
        **{
            "data": (cube,), "out": out, "seeds": 2, "steps": 2, "preset": "tiny", "workers": 1,
            "device": "cpu", "assignments": TOY, **more,
        }
    )  # fmt: skip


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def trained(out: Path) -> dict[Path, int]:
    """When each file of a finished run was written."""
    runs = [file.parent for file in out.rglob("run.json")]
    finished = [one for one in runs if json.loads((one / "run.json").read_text())["status"]
                == "finished"]  # fmt: skip
    return {
        file: file.stat().st_mtime_ns for one in finished for file in one.rglob("*")
        if file.is_file() and file.suffix in (".json", ".jsonl", ".safetensors", ".toml")
    }  # fmt: skip


@pytest.mark.slow
def test_few_labels_tells_what_its_runs_came_to(small_cube: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run("few-labels", small_cube, out, "--fields", "1", seeds=2) == 0
    assert "Report:" in capsys.readouterr().out
    scores = read(out / "scores.csv")
    assert [(one["arm"], one["seed"]) for one in scores] == [
        ("pretrained-1", "0"), ("pretrained-1", "1"), ("scratch-1", "0"), ("scratch-1", "1"),
    ]  # fmt: skip
    assert len({one["pixels"] for one in scores}) == 1, "the test fields are the same"
    for one in scores:
        folder = out / "runs" / "small" / one["arm"] / f"seed-{one['seed']}"
        found = json.loads((folder / "evaluation-test" / "metrics.json").read_text())
        assert float(one["strict_macro_miou"]) == pytest.approx(found["macro_miou"], abs=1e-6)
    rows = read(out / "table.csv")
    by_arm = {
        arm: [float(one["strict_macro_miou"]) for one in scores if one["arm"] == arm]
        for arm in ("pretrained-1", "scratch-1")
    }
    differences = np.subtract(by_arm["pretrained-1"], by_arm["scratch-1"]).tolist()
    for row, values in zip(rows, [*by_arm.values(), differences], strict=True):
        expected = estimate(values)
        assert float(row["macro_miou_low95"]) == pytest.approx(expected.low, abs=1e-5)
        assert float(row["macro_miou_high95"]) == pytest.approx(expected.high, abs=1e-5)
    report = (out / "report.md").read_text()
    for said in ("3 fields", "2 seeds", "whatever the number of training fields", "stcln-geo 0.",
                 "fields_per_class = 1", "## Published numbers", "+6.49"):  # fmt: skip
        assert said in report
    assert "simulated" not in report, "the test's cube is not from the simulator"
    assert "6.49" not in (out / "table.csv").read_text()
    assert (out / "arms.png").stat().st_size > 5000
    assert (out / "differences.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_forest_takes_part_on_the_fields_of_the_networks(
    small_cube: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    assert run("few-labels", small_cube, out, "--fields", "1", seeds=2) == 0
    before = trained(out)
    assert run("few-labels", small_cube, out, "--fields", "1", "--baseline", "forest", seeds=2) == 0
    weights = [file for file in before if file.suffix == ".safetensors"]
    assert {trained(out)[file] for file in weights} == {before[file] for file in weights}

    scores = read(out / "scores.csv")
    found = {(one["arm"], one["seed"]): one for one in scores}
    assert {arm for arm, _ in found} == {"pretrained-1", "scratch-1", "forest-1"}
    for seed in ("0", "1"):
        folder = out / "runs" / "small" / "scratch-1" / f"seed-{seed}" / "evaluation-test"
        told = json.loads((folder / "metrics.json").read_text())["baseline"]
        assert told["trained_fields"] == 3
        mine = found["forest-1", seed]
        assert float(mine["strict_macro_miou"]) == pytest.approx(told["macro_miou"], abs=1e-6)
        assert mine["pixels"] == found["scratch-1", seed]["pixels"]
    rows = read(out / "table.csv")
    (pair,) = [row for row in rows if "pre-trained - random forest" in "".join(row.values())]
    values = [
        float(found[arm, seed]["strict_macro_miou"])
        for seed in ("0", "1") for arm in ("pretrained-1", "forest-1")
    ]  # fmt: skip
    expected = estimate([values[0] - values[1], values[2] - values[3]])
    assert float(pair["macro_miou_low95"]) == pytest.approx(expected.low, abs=1e-5)
    report = (out / "report.md").read_text()
    assert "random forest, 1 field a class: trained on 3 fields" in report
    assert "gaps filled linearly" in report
    capsys.readouterr()
    assert run("sta", small_cube, tmp_path / "no", "--baseline", "forest") == 2
    assert "few-labels, early-season, cross-year" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_experiment_goes_on(small_cube: Path, tmp_path: Path):
    choices = Choices(fields=(1,))
    whole = run_experiment(
        plan_experiment("few-labels", settings(small_cube, tmp_path / "whole"), choices)
    )
    cut = plan_experiment("few-labels", settings(small_cube, tmp_path / "cut"), choices)
    ended: list[bool] = []

    def interrupt(step: object, worked: bool) -> None:
        ended.append(worked)
        if len(ended) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_experiment(cut, on_done=interrupt)
    before = trained(tmp_path / "cut")
    assert before
    again: list[bool] = []
    result = run_experiment(cut, on_done=lambda step, worked: again.append(worked))
    assert again == [False] * 3 + [True] * 2
    after = trained(tmp_path / "cut")
    assert {file: after[file] for file in before} == before, "finished runs are left alone"
    assert result.table == whole.table
    for name in ("table.csv", "scores.csv"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    # Several at once come to the same, and more seeds add runs to those that are there.
    more = settings(small_cube, tmp_path / "cut", seeds=3, jobs=2)
    told: dict[str, bool] = {}
    run_experiment(
        plan_experiment("few-labels", more, choices),
        on_done=lambda step, worked: told.update({str(step.out): worked}),
    )
    assert sorted(Path(one).name for one, worked in told.items() if worked) == ["seed-2"] * 2
    longer = read(tmp_path / "cut" / "scores.csv")
    assert [one for one in longer if one["seed"] != "2"] == read(tmp_path / "whole/scores.csv")


@pytest.mark.slow
def test_early_season_judges_one_network_at_all_cut_offs(small_cube: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run("early-season", small_cube, out, "--months", "1,5,12") == 0
    scores = read(out / "scores.csv")
    assert [one["view"] for one in scores] == ["month-01", "month-05", "month-12"] * 2
    for arm in ("pretrained", "scratch"):
        seen = [int(one["pixels"]) for one in scores if one["arm"] == arm]
        missed = [int(one["unseen_pixels"]) for one in scores if one["arm"] == arm]
        assert seen == sorted(seen)
        assert len({one + other for one, other in zip(seen, missed, strict=True)}) == 1
        assert len(list((out / "runs" / "small" / arm).glob("*/checkpoints"))) == 1
    assert "dates before 2019-02-01" in {one["dates"] for one in scores}
    # With all dates in, a cut-off changes nothing.
    capsys.readouterr()
    assert invoke(["evaluate", str(out / "runs/small/scratch/seed-0"), str(small_cube)]) == 0
    whole = json.loads((out / "runs/small/scratch/seed-0/evaluation-test/metrics.json").read_text())
    assert float(scores[-1]["strict_macro_miou"]) == pytest.approx(whole["macro_miou"], abs=1e-6)
    assert "80% of the training chips end" in (out / "report.md").read_text()
    assert "prefix = 0.8" in (out / "report.md").read_text()
    assert (out / "curve.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more", "arms"),
    [
        ("mask-ratio", ["--ratios", "0.2,0.6"], ["ratio-0.2", "ratio-0.6", "scratch"]),
        ("mask-strategy", [], ["time", "space", "space-time", "block", "tube", "scratch"]),
        ("sta", [], ["pretrained-with", "pretrained-without", "scratch-with", "scratch-without"]),
    ],
)
def test_arms_train_what_they_say(small_cube: Path, tmp_path: Path, name, more, arms):
    out = tmp_path / "out"
    assert run(name, small_cube, out, *more) == 0
    assert [one["arm"] for one in read(out / "scores.csv")] == arms
    cards = {
        one.parent.parent.name: json.loads(one.read_text())
        for one in out.glob("runs/*/*/*/model_card.json")
    }
    if name == "sta":
        assert [cards[arm]["network"]["sta"] for arm in arms] == [True, False, True, False]
        assert cards[arms[0]]["parameters"] - cards[arms[1]]["parameters"] == 2 * 16**2 + 1
    else:
        hidden = [cards[arm]["training"]["begun_from"]["sha256"] for arm in arms[:-1]]
        assert len(set(hidden)) == len(hidden), "each begins from a pre-training of its own"
        assert cards["scratch"]["training"]["begun_from"] is None


@pytest.mark.slow
def test_short_series_are_judged_with_few_dates(small_cube: Path, tmp_path: Path):
    out = tmp_path / "out"
    assert run("short-series", small_cube, out, "--dates", "5,3") == 0
    scores = read(out / "scores.csv")
    assert {one["dates"] for one in scores} == {"at most 3 dates, spread evenly", "all dates"}
    config = (out / "runs/small/scratch/seed-0/config.toml").read_text()
    assert "max_dates = 3" in config
    assert "dates = 3\n" in config.partition("[validation]")[2]
    assert "max_dates = 5" in (out / "pretraining/max-dates-5/seed-0/config.toml").read_text()


@pytest.mark.slow
def test_cross_year_tests_on_the_season_named(
    new_cube: Callable[..., Path], tmp_path: Path, capsys
):
    cube = new_cube("years")
    new_cube("years", season="2019-09-01", seed=4)
    out = tmp_path / "out"
    years = ["--season", "2018-09-01", "--test-season", "2019-09-01"]
    assert run("cross-year", cube, out, *years) == 0
    scores = read(out / "scores.csv")
    assert [one["season"] for one in scores] == ["2019-09-01", "2018-09-01"] * 2
    table = read(out / "table.csv")
    assert [row["row"] for row in table if row["kind"] == "difference"][2:] == [
        "other season - own season, pre-trained", "other season - own season, from scratch",
    ]  # fmt: skip
    # The season to be tested on stays unseen in pre-training.
    seen = json.loads((out / "pretraining/common/seed-0/environment.json").read_text())["cubes"]
    assert [one["season"] for one in seen] == ["2018-09-01"]
    assert (
        run("cross-year", cube, out, "--season", "2018-09-01", "--test-season", "2020-09-01") == 2
    )
    assert "2020-09-01" in capsys.readouterr().err


@pytest.mark.slow
def test_a_season_that_was_split_again_is_judged_again(
    new_cube: Callable[..., Path], tmp_path: Path
):
    """The other season's split is no part of a run: its figures must follow it all the same."""
    cube = new_cube("years")
    new_cube("years", season="2019-09-01", seed=4)
    out = tmp_path / "out"
    years = ["--season", "2018-09-01", "--test-season", "2019-09-01"]
    assert run("cross-year", cube, out, *years) == 0

    def judged(season: str) -> set[int]:
        return {int(one["pixels"]) + int(one["unseen_pixels"])
                for one in read(out / "scores.csv") if one["season"] == season}  # fmt: skip

    def tested(season: str) -> int:
        fields = open_season(cube, season).fields
        assert fields is not None
        return int(fields.pixels[fields.split == SPLITS["test"]].sum())

    own, before = tested("2018-09-01"), tested("2019-09-01")
    assert (judged("2018-09-01"), judged("2019-09-01")) == ({own}, {before})
    seeds = (seed for seed in range(1, 20))
    while tested("2019-09-01") == before:
        split_labels(cube, SplitSpec(seed=next(seeds), test=0.5), season="2019-09-01")
    files = trained(out)
    assert run("cross-year", cube, out, *years) == 0
    assert (judged("2018-09-01"), judged("2019-09-01")) == ({own}, {tested("2019-09-01")})
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert weights
    assert all(file.stat().st_mtime_ns == files[file] for file in weights), "not trained again"

    files = trained(out)
    assert run("cross-year", cube, out, *years) == 0
    assert trained(out) == files, "nothing is judged again where nothing changed"


@pytest.mark.slow
def test_a_dry_run_says_what_it_takes_and_writes_nothing(small_cube: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert run("few-labels", small_cube, out, "--fields", "1,2", "--dry-run", seeds=3, steps=7) == 0
    told = capsys.readouterr().out
    # 4 arms x 3 seeds and one pre-training, 7 steps each.
    assert "optimiser steps left: 91" in told
    assert "runs: 13, of which 0 are finished" in told
    assert "second of two steps of each kind on cpu" in told
    assert not out.exists()
    words = ["--fields", "1", "--dry-run", "--device", "H100"]
    assert run("few-labels", small_cube, out, *words) == 0
    told = capsys.readouterr().out
    assert "estimated for H100" in told
    assert "a guess" in told
    assert not out.exists()


@pytest.mark.slow
def test_several_data_sets_are_told_apart_and_together(
    small_cube: Path, new_cube: Callable[..., Path], tmp_path: Path
):
    out = tmp_path / "out"
    other = new_cube("other", seed=3)
    words = ["--data", str(other), "--fields", "1"]
    assert run("few-labels", small_cube, out, *words) == 0
    rows = [row for row in read(out / "table.csv") if row["kind"] == "mean"]
    assert [row["data"] for row in rows] == ["mean of all"] * 2 + ["small"] * 2 + ["other"] * 2
    whole, small, second = (float(row["macro_miou_mean"]) for row in rows[::2])
    assert whole == pytest.approx((small + second) / 2, abs=1e-6)
    # One pre-training, on both.
    (seen,) = out.glob("pretraining/*/*/environment.json")
    assert len(json.loads(seen.read_text())["cubes"]) == 2
