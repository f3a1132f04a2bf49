"""What is fetched: blocks that hold all that windows need, in folders that do not stay."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stcln_geo.cube.scratch import check_scratch, scratch_folder, sweep_scratch
from stcln_geo.errors import OutputError
from stcln_geo.grid import Window
from stcln_geo.predict.blocks import cut_blocks
from stcln_geo.predict.fetch import _reach


@pytest.mark.parametrize("seed", range(6))
def test_blocks_hold_all_pixels_in_the_order_of_their_use(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grid = Window(-301, 57, 211, 173)
    areas = [
        Window(-330 + int(row), 40 + int(col), int(height), int(width))
        for row, col, height, width in rng.integers(1, 150, (9, 4))
    ]
    shape = (32 * int(rng.integers(1, 4)), 32 * int(rng.integers(1, 9)))
    blocks = cut_blocks(areas, grid, shape_yx=shape, shard=32)
    held = np.full(grid.shape_yx, -1)
    last = np.full(grid.shape_yx, -1)
    for number, block in enumerate(blocks):
        assert block.area.height <= shape[0]
        assert block.area.width <= shape[1]
        for cell in block.cells:
            assert block.area.contains(cell)
            assert cell.row % 32 == cell.col % 32 == 0
            assert (held[cell.rows, cell.cols] == -1).all(), "a cell is read once"
            held[cell.rows, cell.cols], last[cell.rows, cell.cols] = number, block.last
    first = [block.first for block in blocks]
    assert first == sorted(first)
    for index, area in enumerate(areas):
        inside = area.intersection(grid).relative_to(grid)
        if inside.is_empty:
            continue
        needed = held[inside.rows, inside.cols]
        assert (needed >= 0).all()
        assert all(first[number] <= index for number in np.unique(needed))
        assert (last[inside.rows, inside.cols] >= index).all()


def test_the_next_group_may_always_be_fetched() -> None:
    assert _reach([0, 0, 64, 64, 640], 64) == [3, 3, 3, 4, 5]


def test_scratch_is_gone_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "new") as folder:
        (folder / "pixels").write_bytes(b"1")
        with scratch_folder(tmp_path / "new") as other:
            assert other != folder
        assert sweep_scratch(tmp_path / "new") == 0, "what is in use stays"
        assert folder.is_dir()
    with pytest.raises(RuntimeError), scratch_folder(tmp_path / "new"):
        raise RuntimeError
    assert list((tmp_path / "new").iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from stcln_geo.cube.scratch import scratch_folder\n"
        "with scratch_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'pixels').write_bytes(b'1'); print('ready', flush=True); input()"
    )
    (tmp_path / "mine.txt").write_text("stays")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert sweep_scratch(tmp_path) == 0, "it lives"
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.iterdir())) == 3
    check_scratch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_scratch_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot keep pixels in .*file.*--scratch"):
        check_scratch(tmp_path / "file")
