"""Reading: rasterio's numbers, wherever the window lies; failures sorted, retried, recorded."""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.warp import reproject

from stcln_geo.catalog import Access
from stcln_geo.cube.read import (
    AssetReader,
    AssetReadError,
    LedgerEntry,
    _kind_of,
    append_ledger,
    read_ledger,
)
from stcln_geo.grid import Window, bounds_window, crop_geobox, geobox_from_window, tiles


def write(path: Path, array: np.ndarray, size: float, origin: tuple[float, float]) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", height=array.shape[0], width=array.shape[1], count=1,
        dtype=array.dtype.name, crs="EPSG:32631", nodata=0, tiled=True, blockxsize=64,
        blockysize=64, compress="deflate", transform=from_origin(*origin, size, size),
    ) as file:  # fmt: skip
        file.write(array, 1)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> tuple[Path, np.ndarray]:
    pixels = np.random.default_rng(0).integers(1, 9000, (101, 203)).astype("uint16")
    pixels[30:40, 50:60] = 0
    return write(tmp_path / "s.tif", pixels, 10, (600000, 5600040)), pixels


def test_own_grid_gives_the_files_numbers_even_beyond_its_edges(scene: Any):
    path, pixels = scene
    whole = geobox_from_window(Window(-560004, 60000, 101, 203), crs="EPSG:32631", resolution=10)
    np.testing.assert_array_equal(AssetReader().read(str(path), whole), pixels)
    wider = crop_geobox(whole, Window(-7, -3, 120, 213))
    expected = np.zeros((120, 213), dtype="uint16")
    expected[7:108, 3:206] = pixels
    for method in ("nearest", "bilinear", "cubic"):
        got = AssetReader().read(str(path), wider, resampling=method)  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, expected)
    beyond = crop_geobox(whole, Window(500, 500, 5, 6))
    assert not AssetReader().read(str(path), beyond).any()


def test_twenty_metre_bands_equal_rasterios_bilinear(tmp_path: Path):
    pixels = np.random.default_rng(1).integers(1, 9000, (53, 47)).astype("uint16")
    pixels[20:23, 20:25] = 0
    path = write(tmp_path / "s.tif", pixels, 20, (600000, 5600040))
    grid = geobox_from_window(Window(-560008, 59996, 120, 110), crs="EPSG:32631", resolution=10)
    expected = np.zeros((120, 110), dtype="uint16")
    reproject(
        pixels, expected, src_transform=from_origin(600000, 5600040, 20, 20),
        src_crs="EPSG:32631", dst_transform=grid.affine, dst_crs="EPSG:32631", src_nodata=0,
        dst_nodata=0, resampling=Resampling.bilinear,
    )  # fmt: skip
    got = AssetReader().read(str(path), grid, resampling="bilinear")
    np.testing.assert_array_equal(got, expected)
    nearest = AssetReader().read(str(path), grid)
    inner = nearest[4:110, 4:98]
    np.testing.assert_array_equal(inner, np.repeat(np.repeat(pixels, 2, 0), 2, 1))


@pytest.mark.parametrize("size", [10, 20, 60])
@pytest.mark.parametrize("crs", ["EPSG:32631", "EPSG:32632"])
@pytest.mark.parametrize("method", ["nearest", "bilinear", "cubic", "average"])
def test_no_pixel_depends_on_the_window_it_is_read_in(
    tmp_path: Path, size: int, crs: str, method: Any
):
    pixels = np.random.default_rng(2).integers(1, 9000, (151, 149)).astype("uint16")
    path = write(tmp_path / "s.tif", pixels, size, (790000, 5600040))
    change = Transformer.from_crs("EPSG:32631", crs, always_xy=True)
    bounds = change.transform_bounds(790000, 5600040 - 151 * size, 790000 + 149 * size, 5600040)
    # The grid of 20 m upsamples the file of 60 m, and averages that of 10 m.
    window = bounds_window(bounds, resolution=20).expand(5)
    grid = geobox_from_window(window, crs=crs, resolution=20)
    whole = AssetReader().read(str(path), grid, resampling=method)
    assert (whole > 0).mean() > 0.5
    for part in tiles(window.shape_yx, 67):
        got = AssetReader().read(str(path), crop_geobox(grid, part), resampling=method)
        np.testing.assert_array_equal(got, whole[part.rows, part.cols])


def test_missing_and_broken_files_are_sorted(scene: Any, tmp_path: Path):
    path, _ = scene
    grid = geobox_from_window(Window(-560004, 60000, 101, 203), crs="EPSG:32631", resolution=10)
    reader = AssetReader(pause=0)
    with pytest.raises(AssetReadError) as missing:
        reader.read(str(tmp_path / "S2_20190429T404500.tif"), grid)
    assert (missing.value.kind, missing.value.attempts) == ("gone", 1)

    content = path.read_bytes()
    cut = tmp_path / "cut.tif"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(AssetReadError) as broken:
        reader.read(str(cut), grid)
    assert (broken.value.kind, broken.value.attempts) == ("corrupt", 2)
    assert reader.reads == 0


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("HTTP response code: 404", "gone"),
        ("the file: No such file or directory", "gone"),
        ("HTTP response code: 503", "transient"),
        ("HTTP error code : 429", "transient"),
        ("Operation timed out after 120000 milliseconds", "transient"),
        ("HTTP response code: 403", "denied"),
        ("InvalidCredentials", "denied"),
        ("TIFFReadEncodedTile() failed", "corrupt"),
    ],
)
def test_kinds_of_failure(reason: str, kind: str):
    assert _kind_of(reason) == kind


HERE = Access(allow_hosts=("127.0.0.1",))


class Flaky(SimpleHTTPRequestHandler):
    """Serves a folder, after some refusals of each address; keeps what was asked for."""

    refusals: int = 0
    status: int = 503
    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve(super().do_HEAD)

    def do_GET(self) -> None:
        self._serve(super().do_GET)

    def _serve(self, answer: Any) -> None:
        type(self).asked.append(self.path)
        if type(self).refusals > 0:
            type(self).refusals -= 1
            self.send_error(type(self).status)
            return
        answer()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, type[Flaky]]]:
    handler = type("Handler", (Flaky,), {"asked": [], "refusals": 0})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler
    server.shutdown()
    server.server_close()


def test_a_server_that_fails_for_a_while_is_asked_again(scene: Any, web: Any):
    path, pixels = scene
    url, handler = web
    handler.refusals = 2
    grid = geobox_from_window(Window(-560004, 60000, 101, 203), crs="EPSG:32631", resolution=10)
    got = AssetReader(HERE, pause=0).read(f"{url}/{path.name}", grid)
    np.testing.assert_array_equal(got, pixels)
    assert handler.refusals == 0


def test_a_server_that_stays_down_is_transient_and_given_up(scene: Any, web: Any):
    path, _ = scene
    url, handler = web
    handler.refusals = 10_000
    grid = geobox_from_window(Window(-560004, 60000, 101, 203), crs="EPSG:32631", resolution=10)
    with pytest.raises(AssetReadError) as error:
        AssetReader(HERE, pause=0).read(f"{url}/{path.name}?sig=secret", grid)
    assert (error.value.kind, error.value.attempts) == ("transient", 4)
    assert "secret" not in error.value.reason


def test_tokens_are_fetched_once_and_only_for_blobs(web: Any, tmp_path: Path):
    url, handler = web
    folder = tmp_path / "acc"
    folder.mkdir()
    far = {"token": "sv=1&sig=abc", "msft:expiry": "2999-01-01T00:00:00Z"}
    (folder / "box").write_text(json.dumps(far))
    reader = AssetReader(Access(kind="sas", token_url=url + "/{account}/{container}"))
    sign = reader._tokens.sign
    href = "https://acc.blob.core.windows.net/box/a/b.tif"
    assert sign(href) == f"{href}?sv=1&sig=abc"
    assert sign(href.replace("b.tif", "c.tif")).endswith("c.tif?sv=1&sig=abc")
    assert sign("https://example.org/a.tif") == "https://example.org/a.tif"
    assert handler.asked == ["/acc/box"]
    reader._tokens.forget(href)
    sign(href)
    assert handler.asked == ["/acc/box"] * 2


def test_ledger_keeps_every_line_of_many_writers(tmp_path: Path):
    path = tmp_path / "ledger.jsonl"
    assert read_ledger(path) == []

    def record(worker: int) -> None:
        for number in range(20):
            append_ledger(
                path,
                LedgerEntry(
                    item=f"{worker}-{number}", asset="red", href="x", kind="gone", error="e" * 300,
                    attempts=1, window=(0, 0, 1, 1),
                ),
            )  # fmt: skip

    threads = [threading.Thread(target=record, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({entry.item for entry in read_ledger(path)}) == 80
