"""The pixel audit: scenes whose darkest pixels contradict their offset are marked, not changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import block as block_module
from stcln_geo.cube.audit import SceneAudit, merge_audits
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.cost import task_bytes
from stcln_geo.cube.dataset import open_cube
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.plan import CubePlan, CubeSpec, plan_cube
from stcln_geo.cube.search import search_items
from stcln_geo.cube.store import open_season

RAW_HAS_IT, RAW_LACKS_IT = 1000, 0


def plant(archive: Any) -> None:
    """Five scenes of dark ground: two of them say the contrary of what their pixels show."""
    rng = np.random.default_rng(3)
    scl = np.full((51, 52), 4, dtype="uint8")
    scl[:, 40:] = 5
    scl[:5, :10] = 9
    cases = [
        ("right_raw", RAW_HAS_IT, -0.1),
        ("taken_off_twice", RAW_LACKS_IT, -0.1),
        ("right_done", RAW_LACKS_IT, 0.0),
        ("never_taken_off", RAW_HAS_IT, 0.0),
        ("bright", 3000, 0.0),
    ]
    for number, (name, more, offset) in enumerate(cases):
        pixels = {
            band: (rng.integers(150, 900, (102, 104)) + more).astype("uint16")
            for band in ("red", "nir")
        }
        # Desert has no dark ground: its brightness says nothing.
        classes = np.full_like(scl, 5) if name == "bright" else scl
        time = f"2019-03-{number + 1:02d}T10:50:00"
        archive.add(name, time, pixels=pixels, scl=classes, offset=offset)


def plan_of(archive: Any, **choices: Any) -> CubePlan:
    spec = CubeSpec(layout=Layout(chunk=16, shard=48), **choices)
    return plan_cube(search_items(load_catalog(archive.location)), spec=spec)


EXPECTED = ("never_taken_off", "taken_off_twice")


def test_scenes_that_contradict_their_offset_are_marked_both_ways(archive: Any, tmp_path: Path):
    plant(archive)
    report = build_cube(plan_of(archive), tmp_path / "c.zarr")
    assert report.suspects == EXPECTED
    dataset = open_cube(tmp_path / "c.zarr")
    assert dataset["offset_suspect"].dtype == bool
    assert dataset["offset_suspect"].dims == ("time",)
    marked = {str(name) for name in dataset["item_ids"].values[dataset["offset_suspect"].values]}
    assert marked == set(EXPECTED)
    # The numbers are those of the rule, doubtful or not.
    season = open_season(tmp_path / "c.zarr")
    row, col = -560004 - season.window.row + 60, 60000 - season.window.col + 60
    assert (season.reflectance[1, 0, row, col] < 0).all()
    assert (season.reflectance[3, 0, row, col] > 1000).all()


def test_neither_blocks_nor_interruptions_change_the_verdict(
    archive: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    plant(archive)
    plan = plan_of(archive)
    one = max(task_bytes(plan, season, season.layout.shard) for season in plan.seasons)
    build_cube(plan, tmp_path / "whole.zarr")
    written = []
    original = block_module.write_shard

    def stop_at_fourth(season: Any, window: Any, **arrays: Any) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(window)
        original(season, window, **arrays)

    with monkeypatch.context() as patched:
        patched.setattr(block_module, "write_shard", stop_at_fourth)
        with pytest.raises(KeyboardInterrupt):
            build_cube(plan, tmp_path / "parts.zarr", memory=one)
    report = build_cube(plan, tmp_path / "parts.zarr", memory=one)
    assert (report.shards_kept, report.suspects) == (3, EXPECTED)
    totals = []
    for name in ("whole", "parts"):
        files = sorted((tmp_path / f"{name}.zarr" / "manifests" / "2018-09-01").glob("*.json"))
        assert len(files) == 9
        totals.append(merge_audits(json.loads(file.read_text()) for file in files))
    assert totals[0] == totals[1]
    # Every clear pixel of a scene counts once.
    season = open_season(tmp_path / "whole.zarr")
    assert totals[0]["right_raw"].clear == season.valid[0].sum()


def test_build_and_info_tell(archive: Any, tmp_path: Path, capsys: Any):
    plant(archive)
    out = str(tmp_path / "c.zarr")
    assert invoke(["cube", "build", "--catalog", archive.location, out]) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "darkest pixels of 2 scenes contradict the offset" in told
    assert "never_taken_off, taken_off_twice" in told
    assert invoke(["cube", "info", out]) == 0
    assert "suspect 2 dates whose offset is in doubt: 2019-03-02, 2019-03-04" in (
        capsys.readouterr().out
    )


def test_without_suspects_nothing_is_said(planted_once: Any, tmp_path: Path, capsys: Any):
    out = str(tmp_path / "c.zarr")
    assert invoke(["cube", "build", "--catalog", planted_once.location, out]) == 0
    assert invoke(["cube", "info", out]) == 0
    shown = capsys.readouterr()
    assert "in doubt" not in shown.out
    assert "contradict" not in shown.err


def test_few_pixels_say_nothing_and_counts_add_up():
    few = SceneAudit(clear=100, too_dark=(90,), dark_ground=100, dark=(0,))
    assert not few.contradicts(-1000)
    assert not few.contradicts(0)
    more = few + few + SceneAudit()
    assert more == SceneAudit(clear=200, too_dark=(180,), dark_ground=200, dark=(0,))
    assert more.contradicts(-1000)
    assert more.contradicts(0)
    assert SceneAudit.from_json(more.to_json()) == more
    # No visible band, no verdict.
    assert not SceneAudit(clear=900, dark_ground=900).contradicts(0)
    assert not SceneAudit(clear=900, dark_ground=900).contradicts(-1000)
