"""The benchmarks run, and compare like with like; what they measure is not tested."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
def test_loader_compares_equal_chips(tmp_path):
    finished = subprocess.run(
        [sys.executable, BENCHMARKS / "loader.py", "--side", "192", "--dates", "4", "--rounds", "1",
         "--batch", "4", "--sites", "8", "--memory", "0.05", "--scratch", tmp_path],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "npy of ready chips" in finished.stdout
    assert "a chunk by zarr" in finished.stdout
    assert "128 chips planned" in finished.stdout
