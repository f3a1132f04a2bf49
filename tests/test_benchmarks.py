"""The benchmarks run, and compare like with like; what they measure is not tested."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

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
    (tmp_path / "study.toml").write_text(study, encoding="utf-8")
    study = study.replace("[early-season]", "[early-season]\nmonths = [7, 12]")
    toy = ["steps=2", "model.widths=[8, 16]", "model.layers=1", "model.heads=2",
           "model.feedforward=32", "pretrain.batch_size=4", "finetune.batch_size=4"]  # fmt: skip
    command = [sys.executable, BENCHMARKS / "simulated_study.py", tmp_path / "out", "--study",
               tmp_path / "study.toml", "--seeds", "1", "--device", "cpu"]  # fmt: skip
    command += [word for text in toy for word in ("--set", text)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    for name in ("few-labels", "early-season"):
        report = (tmp_path / "out" / name / "report.md").read_text()
        assert "**The data are simulated" in report
        assert "ardre (simulated)" in report
        assert "- steps=2, on the command line" in report
        assert "late_days = -12.0" in report
        assert "mean of all" in (tmp_path / "out" / name / "table.csv").read_text()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "is there" in again.stdout
    assert ": done" not in again.stdout


@pytest.mark.slow
def test_few_dates_compares_equal_options(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "few_dates.py", "--size", "150x130", "--dates", "30", "--few",
         "12", "--fields", "1", "--seeds", "2", "--pretrain-steps", "3", "--steps", "2", "--chip",
         "16", "--min-fields", "3", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "12 dates, 10 bands" in finished.stdout
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


def test_predict_gpu_goes_all_its_steps_on_a_cpu(capsys):
    best = load_script("predict_gpu").main([
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
