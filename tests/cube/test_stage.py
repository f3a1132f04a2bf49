"""Where a block's pixels wait: in memory as far as they may, else in scratch; nothing stays."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.cube.pixels import Pixels
from stcln_geo.cube.stage import Stage
from stcln_geo.errors import OutputError
from stcln_geo.grid import Window, tiles

SHARDS = tiles((101, 203), 48)
DTYPES = ("uint8", "uint16", "int16")


def asset(scene: int, number: int) -> Pixels:
    """Return pixels that cover three quarters of the block."""
    rng = np.random.default_rng([scene, number])
    values = rng.integers(1, 200, (51, 77)).astype(DTYPES[number])
    return Pixels(
        values=values, row=-4, col=-2, nodata=0, step=2, smooth=DTYPES[number] == "uint16"
    )


@pytest.mark.parametrize("memory", [0, 5_000, 10**9], ids=["scratch", "both", "memory"])
def test_what_is_put_is_taken(tmp_path: Path, memory: int):
    places = [(scene, number) for scene in range(4) for number in range(3)]
    padding = 3
    with Stage(SHARDS, tmp_path, memory=memory) as stage:
        with ThreadPoolExecutor(4) as pool:
            jobs = [
                pool.submit(stage.put, scene, DTYPES[number], asset(scene, number), padding=padding)
                for scene, number in places
            ]
            for job in jobs:
                job.result()
        files = [path for path in tmp_path.rglob("pixels") if path.is_file()]
        assert len(files) == (memory < 10**9)
        sizes = sum(path.stat().st_size for path in files)
        assert (sizes > 0) == (memory < 10**9)
        for scene, number in places:
            whole = asset(scene, number)
            for index, shard in enumerate(SHARDS):
                around = shard.expand(padding)
                got = stage.take(scene, DTYPES[number], index).on_grid(around)
                np.testing.assert_array_equal(got, whole.on_grid(around))
                assert got.dtype == DTYPES[number]
    assert list(tmp_path.iterdir()) == []


def test_memory_holds_no_more_than_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    written: list[int] = []
    original = os.pwrite

    def counting(file: int, data: Any, offset: int) -> int:
        written.append(len(data))
        return original(file, data, offset)

    monkeypatch.setattr(os, "pwrite", counting)
    pixels = asset(0, 1)
    total = sum(pixels.part(shard).values.nbytes for shard in SHARDS)
    for memory in (0, 1_000, total - 1, total):
        written.clear()
        with Stage(SHARDS, tmp_path, memory=memory) as stage:
            stage.put(0, "red", pixels)
        assert total - sum(written) <= memory
    assert not written


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(OutputError, match=r"No space left.*--scratch, or give more --memory"),
        Stage([Window(0, 0, 101, 203)], tmp_path, memory=0) as stage,
    ):
        stage.put(0, "red", asset(0, 1))
    assert list(tmp_path.iterdir()) == []
