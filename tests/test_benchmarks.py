"""The benchmarks run, and compare like with like; what they measure is not tested."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.stats
import torch

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.stack import open_stack
from stcln_geo.cube.store import open_season

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.slow
def test_cube_build_compares_equal_cubes(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "cube_build.py", "--size", "301x203", "--dates", "3",
         "--workers", "1", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "x as fast" in finished.stdout
    assert finished.stdout.count("odc-stac-") >= 3


@pytest.mark.slow
def test_cog_write_compares_equal_maps(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "cog_write.py", "--size", "4610x1030", "--threads", "1",
         "--rounds", "1", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "ties in the first overview" in finished.stdout
    assert "x as fast in all" in finished.stdout


@pytest.mark.slow
def test_forward_compares_equal_networks():
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "forward.py", "--preset", "tiny", "--dates", "3", "--side",
         "9", "--batch", "1", "--rounds", "1", "--seconds", "0", "--threads", "1", "--no-memory",
         "--precision", "float32", "bf16"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(" of the matrix rate") == 5
    assert "geo bf16" in finished.stdout
    assert "device: " in finished.stdout


@pytest.mark.slow
def test_train_step_compares_equal_gradients():
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "train_step.py", "--preset", "tiny", "--dates", "3",
         "--side", "9", "--batch", "2", "--rounds", "1", "--seconds", "0", "--threads", "1",
         "--precision", "float32", "bf16"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count(" of the matrix rate") == 5


@pytest.mark.slow
def test_train_memory_compares_equal_losses(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "train_memory.py", "--steps", "2", "--batch", "2", "--side",
         "96", "--dates", "4", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"kept: [\d.]+ x as fast, peak [\d.]+ GB beside [\d.]+ GB", finished.stdout)


@pytest.mark.slow(minutes=2)
def test_predict_scale_counts_tasks_and_measures_memory(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "predict_scale.py", "--dense", "60", "101", "--sparse",
         "1100", "--every", "2", "--shard-size", "64", "--workers", "1", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "Tasks = shards: yes." in finished.stdout
    assert "Growth from the first dense region to the last: " in finished.stdout
    row = re.search(r"sparse 1100 x 1100 +(\d+) +(\d+) +([\d,]+) ", finished.stdout)
    assert row is not None
    assert row[1] == row[2] != "0", "tasks = shards"
    mapped = int(row[3].replace(",", ""))
    assert 0 < mapped <= (512 + 1100 - 2 * 512) ** 2, "nothing but the storage shards that exist"
    assert not list(tmp_path.iterdir()), "it cleans up"


@pytest.mark.slow
@pytest.mark.parametrize("scaling", [False, True], ids=["alone", "workers"])
def test_predict_overlap_takes_turns(tmp_path, scaling):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "predict_overlap.py", "--preset", "tiny", "--side", "61",
         "--dates", "3", "--window", "16", "--rounds", "1", "--device", "cpu", "--scratch",
         tmp_path, *(["--scaling"] if scaling else [])],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    told = "x as fast as one on one" if scaling else "End to end / alone: "
    assert told in finished.stdout or "not measured: two cores" in finished.stdout


@pytest.mark.slow
def test_the_simulated_study_runs_from_its_file_to_its_tables(tmp_path):
    study = (BENCHMARKS / "study" / "simulated.toml").read_text(encoding="utf-8")
    small = {
        r"width = \d+": "width = 134", r"height = \d+": "height = 128", "dates = 36": "dates = 8",
        "seasons = 3": "seasons = 1", "start_year = 2019": "start_year = 2021",
        "field_pixels = 120": "field_pixels = 60", "block = 64": "block = 32",
        'preset = "base"': 'preset = "tiny"', r"fields = \[1, 3, 10\]": "fields = [1]",
    }  # fmt: skip
    for pattern, value in small.items():
        study, count = re.subn(pattern, value, study)
        assert count, pattern
    # Two regions, of which both have labels.
    study = (
        study.partition('[[regions]]\nname = "coole"')[0] + study[study.index("# Fields of the") :]
    )
    (tmp_path / "whole.toml").write_text(study, encoding="utf-8")
    (tmp_path / "study.toml").write_text(
        'extends = "whole.toml"\n[early-season]\nmonths = [7, 12]\n', encoding="utf-8"
    )
    toy = ["steps=2", "model.widths=[8, 16]", "model.layers=1", "model.heads=2",
           "model.feedforward=32", "pretrain.batch_size=4", "finetune.batch_size=4"]  # fmt: skip
    command = [sys.executable, BENCHMARKS / "simulated_study.py", tmp_path / "out", "--study",
               tmp_path / "study.toml", "--seeds", "1", "--device", "cpu"]  # fmt: skip
    command += [word for text in toy for word in ("--set", text)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert "early-season: takes over the pre-training of few-labels" in finished.stdout
    for name in ("few-labels", "early-season"):
        report = (tmp_path / "out" / name / "report.md").read_text()
        assert "**The data are simulated" in report
        assert "ardre (simulated)" in report
        assert "- steps=2, on the command line" in report
        assert "late_days = -12.0" in report
        assert "months = [7, 12]" in report
        assert "mean of all" in (tmp_path / "out" / name / "table.csv").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "is there" in again.stdout
    assert ": done" not in again.stdout


@pytest.mark.slow
def test_few_dates_compares_equal_options(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "few_dates.py", "--size", "120x110", "--dates", "14", "--few",
         "6", "--fields", "1", "--seeds", "2", "--pretrain-steps", "3", "--steps", "2", "--chip",
         "16", "--min-fields", "3", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "6 dates, 10 bands" in finished.stdout
    scores = [
        [float(value) for value in re.findall(rf"{name} (0\.\d+)", finished.stdout)]
        for name in ("from pre-training", "from scratch")
    ]
    assert [len(own) for own in scores] == [2, 2]
    one, other = (first - second for first, second in zip(*scores, strict=True))
    told = re.search(r"difference (\S+), 95 % interval (\S+) to (\S+) \(2 seeds\)", finished.stdout)
    assert told is not None
    mean, low, high = map(float, told.groups())
    assert mean == pytest.approx((one + other) / 2, abs=2e-4)
    # Student's factor for two values is 12.706, and their standard error half their distance.
    assert (high - low) / 2 == pytest.approx(12.706 * abs(one - other) / 2, abs=2e-3)
    assert not list(tmp_path.iterdir()), "it cleans up"


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_predict_gpu_measures_nothing_without_a_gpu(capsys):
    assert load_script("predict_gpu").main([]) == {}
    assert capsys.readouterr().out == "not measured: no CUDA device\n"


def test_predict_gpu_goes_all_its_steps_on_a_cpu(benchmark_module, capsys):
    best = benchmark_module("predict_gpu").main([
        "--device", "cpu", "--preset", "tiny", "--dates", "3", "--window", "12", "--halo", "2",
        "--batch", "1", "2", "--rounds", "1", "--launches", "1", "--square", "32", "--tokens", "8",
    ])  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("batch ") == 2
    assert best["px_dates"] == pytest.approx(best["km2"] * 1e4 * 3), "10 m pixels, 3 dates"
    cores = 1375**2  # of 8 px in 11,000
    assert best["tile"] == pytest.approx(cores * 8 * 8 * 3 / best["px_dates"])
    assert best["flops"] > 0


@pytest.mark.slow
def test_loader_compares_equal_chips(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "loader.py", "--side", "192", "--dates", "4", "--rounds", "1",
         "--batch", "4", "--sites", "8", "--memory", "0.05", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "npy of ready chips" in finished.stdout
    assert "a chunk by zarr" in finished.stdout
    assert re.search(r"8 sites of 128 px, .* [1-9]\d* chips planned", finished.stdout)


@pytest.fixture
def benchmark_module(monkeypatch):
    """Import a script as a module, which processes of its own can import too."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


class TestRealFewFields:
    def test_folds_share_out_the_fields_of_each_class(self, benchmark_module):
        data = benchmark_module("_real_data")
        code = np.array([0] * 4 + [1] * 3 + [2] * 7)
        pixels = np.array([214, 588, 352, 224, 38, 244, 129, 2, 9, 10, 261, 16, 240, 202])
        folds = data.deal_folds(code, pixels)
        np.testing.assert_array_equal(folds < 0, pixels < 10)
        for value in range(3):
            counts = np.bincount(folds[(code == value) & (folds >= 0)], minlength=3)
            assert counts.min() >= 1, "each fold tests each class"
            assert counts.max() - counts.min() <= 1
        splits = np.stack([data.split_fold(folds, fold) for fold in range(3)])
        tests = (splits == SPLITS["test"]).sum(axis=0)
        np.testing.assert_array_equal(tests, np.where(pixels < 10, 0, 1), "each field is one once")
        assert not (splits == SPLITS["validation"]).any()

    def test_classes_have_samples_on_both_sides(self, benchmark_module):
        data = benchmark_module("_real_data")
        crop = np.array(["a"] * 5 + ["b"] * 5 + ["c"] * 4)
        north = np.array([True, True, True, False, False] + [True] * 5 + [True, True, False, False])
        assert data.common_classes(crop, [north, ~north], least=2) == ["a", "c"]

    def test_gaps_are_filled_in_time(self, benchmark_module):
        forest = benchmark_module("_forest")
        gap = np.nan
        values = np.array([[gap, 2.0, gap, 8.0, gap], [1, gap, 3, gap, gap], [1, 1, 1, 1, 7]])
        series = forest.Series(
            values=np.stack([values, -values], axis=2), days=np.array([0, 10, 15, 40, 50]),
            code=np.array([1, 1, 0]), field=np.array([4, 4, 2]), classes=2,
        )  # fmt: skip
        filled = forest.fill_gaps(series).reshape(3, 5, 2)
        np.testing.assert_allclose(filled[0, :, 0], [2, 2, 3, 8, 8])
        np.testing.assert_allclose(filled[1, :, 0], [1, 1 + 2 * 10 / 15, 3, 3, 3])
        np.testing.assert_allclose(filled[:, :, 1], -filled[:, :, 0])

        means = forest.field_means(series)
        np.testing.assert_array_equal(means.field, [2, 4])
        np.testing.assert_array_equal(means.code, [0, 1])
        np.testing.assert_allclose(means.values[1, :, 0], [1, 2, 3, 8, np.nan])

    def test_intervals_are_those_of_student(self, benchmark_module):
        statistics = benchmark_module("_few_fields_statistics")
        one, other = [0.31, 0.27, 0.35, 0.3, 0.41], [0.3, 0.31, 0.29, 0.2, 0.38]
        found = statistics.estimate_difference(
            {**dict(enumerate(one)), 7: 0.9}, dict(reversed(list(enumerate(other))))
        )
        test = scipy.stats.ttest_rel(one, other).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((test.low, test.high))
        assert (found.mean, found.deviation) == pytest.approx((0.032, 0.00277**0.5))
        assert found.count == 5, "a seed without its pair is left out"
        single = statistics.estimate([0.4])
        assert (single.mean, single.low, single.high, single.deviation) == (0.4, None, None, None)

    @pytest.mark.slow
    def test_flanders_tests_each_field_once(self, shared, tmp_path, benchmark_module):
        data, forest = benchmark_module("_real_data"), benchmark_module("_forest")
        data.make_flanders(shared / "data" / data.SOURCES["flanders"], tmp_path)
        tested = []
        for part in data.flanders_parts():
            season = open_season(tmp_path / f"{part}.zarr")
            fields, test = season.fields, season.fields.split == SPLITS["test"]
            tested.append(test)
            assert set(fields.code[test]) == {0, 1, 2}
            series = forest.read_series(tmp_path / f"{part}.zarr")
            train = fields.split == SPLITS["train"]
            for means in (False, True):
                counts = forest.judge_forest(series, train, test, trees=3, seed=0, means=means)
                pixels = np.bincount(fields.code[test], fields.pixels[test], minlength=3)
                np.testing.assert_array_equal(counts.sum(axis=1), pixels)
        np.testing.assert_array_equal(np.sum(tested, axis=0), fields.pixels >= 10)
        assert np.sum(tested) == 13
        # A clear observation, as stored.
        date, row, col = np.argwhere(season.valid[:] & (season.parcels[:] == fields.number[0]))[0]
        pixel = np.flatnonzero(
            (season.parcels[:] > 0) & np.isin(season.parcels[:], fields.number[fields.split > 0])
        ).tolist().index(row * 64 + col)  # fmt: skip
        np.testing.assert_allclose(
            series.values[pixel, date], season.reflectance[date, :, row, col] * 1e-4, rtol=1e-6
        )

    @pytest.mark.slow
    def test_france_trains_and_tests_in_different_cells(
        self, shared, tmp_path, benchmark_module, monkeypatch, capsys
    ):
        script = benchmark_module("real_few_fields")
        part = "france-north-to-south"
        study = dataclasses.replace(
            script.STUDIES["france"], parts=(part,), arms=("pretrained", "forest")
        )
        monkeypatch.setitem(script.STUDIES, "france", study)
        monkeypatch.setattr(script, "begin_worker", lambda: None)  # it would leave one thread
        out = tmp_path / "out"
        given = [
            "--out", str(out), "--data", str(shared / "data"), "--studies", "france", "--preset",
            "tiny", "--fields", "1", "--seeds", "2", "--steps", "2", "--pretrain-steps", "1",
            "--trees", "3", "--device", "cpu",
        ]  # fmt: skip
        script.main([*given, "--dry-run"])
        assert "4 models, of which 4 remain; inputs are to be prepared" in capsys.readouterr().out
        assert not out.exists()
        script.main(given)

        stack = open_stack(out / "inputs" / "france" / f"{part}.zarr")
        cell = stack.fold[stack.fields.site]
        train, test = (set(cell[stack.fields.split == SPLITS[name]]) for name in ("train", "test"))
        assert (len(train), len(test)) == (1, 2)
        assert not train & test

        with (out / "scores.csv").open() as file:
            rows = list(csv.DictReader(file))
        assert [(row["arm"], row["seed"]) for row in rows] == [
            (arm, seed) for arm in ("pretrained", "forest") for seed in "01"
        ]
        pixels = int(stack.fields.pixels[stack.fields.split == SPLITS["test"]].sum())
        assert {int(row["test_pixels"]) for row in rows} == {pixels}
        assert {row["trained_fields"] for row in rows} == {"6"}, "one of each class"
        scores = [float(row["macro_miou"]) for row in rows]
        one, other = scores[0] - scores[2], scores[1] - scores[3]
        table = (out / "table.md").read_text()
        told = re.search(r"\| pretrained - forest \| (\S+) \((\S+) to (\S+)\)", table)
        assert told is not None
        mean, low, high = map(float, told.groups())
        assert mean == pytest.approx((one + other) / 2, abs=1e-3)
        assert (high - low) / 2 == pytest.approx(12.706 * abs(one - other) / 2, abs=2e-3)

        def written() -> dict[Path, int]:
            return {path: path.stat().st_mtime_ns for path in sorted(out.rglob("seed-*"))}

        before = written()
        assert len(before) == 4, "networks are not kept"
        next(iter(before)).unlink()
        script.main(given)
        after = written()
        assert set(after) == set(before)
        assert sum(after[path] != before[path] for path in before) == 1, "only what was missing"
        assert (out / "table.md").read_text() == table, "and with the same result"
        with pytest.raises(SystemExit, match=r"its runs differ from these options in trees"):
            script.main([*given, "--trees", "4"])


def test_real_few_fields_says_which_data_are_absent(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "real_few_fields.py", "--out", tmp_path / "out", "--data",
         tmp_path, "--studies", "france", "--prepare"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 1
    assert "france_2023_dekads.geoparquet and belgium_2021_monthly" in finished.stderr
    assert "--data" in finished.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_choose_fields_compares_equal_numbers_of_fields(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "choose_fields.py", "--size", "140x120", "--dates", "6",
         "--count", "5", "--seeds", "2", "--regions", "1", "--pretrain-steps", "2", "--steps", "2",
         "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    scores = {
        arm: [
            float(value)
            for value in re.findall(rf"5 fields {arm}: macro mIoU (\S+),", finished.stdout)
        ]
        for arm in ("random", "chosen")
    }
    assert [len(own) for own in scores.values()] == [2, 2]
    told = re.search(r"macro mIoU: .* difference (\S+) \((\S+) to (\S+)\)", finished.stdout)
    assert told is not None
    mean, low, high = map(float, told.groups())
    assert mean == pytest.approx(np.mean(scores["chosen"]) - np.mean(scores["random"]), abs=1.1e-3)
    assert low <= mean <= high
    assert not list(tmp_path.iterdir()), "it cleans up"


def test_choose_fields_reads_real_series(shared, benchmark_module):
    script = benchmark_module("choose_fields")
    values, ndvi, code = script.read_france(shared / "data" / "france_2023_dekads.geoparquet")
    assert len(values) == len(ndvi) == len(code) == 424
    assert values.shape[1] == 9 * ndvi.shape[1] == 9 * 13
    assert np.isfinite(values).all()
    assert -0.5 < np.nanmin(ndvi) < 0.2 < 0.8 < np.nanmax(ndvi) <= 1
    assert len(np.unique(code)) == 14
