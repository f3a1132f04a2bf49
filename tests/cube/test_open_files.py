"""Files that stay open between tasks: whose they are, and how many."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio

from stcln_geo.cube import open_files
from stcln_geo.cube.open_files import close_files, open_file


@pytest.fixture
def tile(tmp_path: Path) -> Path:
    with rasterio.open(
        tmp_path / "red.tif", "w", driver="GTiff", width=3, height=2, count=1, dtype="uint16",
        crs="EPSG:32631", transform=rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000),
    ) as made:  # fmt: skip
        made.write(np.arange(6, dtype="uint16").reshape(1, 2, 3))
    return tmp_path / "red.tif"


@pytest.fixture
def far(tile: Path) -> Iterator[list[str]]:
    """Addresses of the kind of the web, that need no server."""
    addresses = []
    for number in range(3):
        with zipfile.ZipFile(tile.with_name(f"{number}.zip"), "w") as archive:
            archive.write(tile, "red.tif")
        addresses.append(f"zip://{tile.with_name(f'{number}.zip')}!red.tif")
    close_files()
    yield addresses
    close_files()


def test_a_file_of_the_web_is_opened_once(far: list[str]) -> None:
    with open_file(far[0]) as first:
        assert first.read(1).tolist() == [[0, 1, 2], [3, 4, 5]]
    with open_file(far[0]) as again:
        assert again is first
        # It is nobody else's meanwhile.
        with open_file(far[0]) as other:
            assert other is not first
            assert other.read(1).tolist() == again.read(1).tolist()
    assert [other.closed, first.closed] == [False, True]
    close_files()
    assert other.closed


def test_a_file_of_this_machine_is_opened_anew(tile: Path) -> None:
    with open_file(str(tile)) as first:
        pass
    assert first.closed


def test_a_file_that_nobody_read_for_long_is_opened_anew(
    far: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_file(far[0]) as first:
        pass
    monkeypatch.setattr(open_files, "IDLE_SECONDS", 0.0)
    with open_file(far[0]) as again:
        assert again is not first
        assert first.closed
        assert again.read(1).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_that_failed_is_not_used_again(far: list[str]) -> None:
    with pytest.raises(ZeroDivisionError), open_file(far[0]) as first:
        raise ZeroDivisionError
    assert first.closed
    with open_file(far[0]) as again:
        assert again is not first


def test_only_so_many_stay_open(far: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST", 2)
    used = []
    for address in (*far, *far):
        with open_file(address) as source:
            used.append(source)
    # In turn: the first two serve again, the third was never kept.
    assert [used[3] is used[0], used[4] is used[1], used[5] is used[2]] == [True, True, False]
    assert [used[0].closed, used[1].closed, used[2].closed, used[5].closed] == [
        False, False, True, True,
    ]  # fmt: skip
    monkeypatch.setattr(open_files, "IDLE_SECONDS", 0.0)
    with open_file(far[2]) as source:
        pass
    assert [used[0].closed, used[1].closed, source.closed] == [True, False, False]
