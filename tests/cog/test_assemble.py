"""The assembled map is the shards' pixels and the overviews that a count by hand gives."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import rasterio
from affine import Affine
from odc.geo.geobox import GeoBox

from stcln_geo.cog import (
    Bands,
    Segment,
    Source,
    TileCodec,
    assemble,
    assemble_cog,
    check_cog,
    read_legend,
    validate_cog,
    write_cog,
    write_segment,
)
from stcln_geo.cog.pyramid import count_values, halve, level_shapes
from stcln_geo.cog.segment import is_whole
from stcln_geo.errors import InputError, MissingFileError, OutputError
from stcln_geo.grid import Window, crop_geobox, geobox_from_window, tiles
from stcln_geo.legend import Legend

from ..gdal_python import gdal_names, gdal_validates

LEGEND = Legend.from_rows(
    [{"value": "1", "name": "Wheat & <rye>"}, {"value": "2", "name": "Maïs", "color": "#00ff10"},
     {"value": "3"}, {"value": "4"}],
    source="test",
)  # fmt: skip
CODEC = TileCodec(size=16)
LEVELS = 2
STEP = 64  # 16 x 2^2: shards are multiples of this
RAGGED = (5 * STEP + 17, 9 * STEP + 33)


def grid(shape: tuple[int, int], crs: str = "EPSG:32631", pixel: float = 10.0) -> GeoBox:
    return geobox_from_window(Window(-560_000, 50_000, *shape), crs=crs, resolution=pixel)


def fields(shape: tuple[int, int], *, classes: int = 4, side: int = 5, seed: int = 5) -> np.ndarray:
    """Fields with noise, a corner without data, and scattered gaps."""
    generator = np.random.default_rng(seed)
    small = (shape[0] // side + 1, shape[1] // side + 1)
    values = generator.integers(0, classes, small).repeat(side, 0).repeat(side, 1)
    values = values[: shape[0], : shape[1]].astype(np.uint8)
    noise = generator.random(shape) < 0.15
    values[noise] = generator.integers(0, classes, int(noise.sum()))
    values[generator.random(shape) < 0.1] = 255
    values[: shape[0] // 3, : shape[1] // 2] = 255
    return values


def segments_of(
    values: np.ndarray, folder: Path, *, size: int = STEP, percent: bool = False, **options: Any
) -> list[Segment]:
    codec = options.pop("codec", replace(CODEC, predictor=percent))
    geobox = grid(values.shape)
    return [
        write_segment(
            values[window.rows, window.cols], folder / f"{window.row}_{window.col}.tif",
            window=window, resampling="average" if percent else "mode", codec=codec,
            geobox=crop_geobox(geobox, window), **{"levels": LEVELS, **options},
        )
        for window in tiles(values.shape, size)
    ]  # fmt: skip


def make_map(
    segments: Sequence[Segment], path: Path, shape: tuple[int, int], **options: Any
) -> Path:
    legend = options.pop("legend", LEGEND)
    codec = options.pop("codec", replace(CODEC, predictor=legend is None))
    geobox = options.pop("geobox", grid(shape))
    options = {"levels": LEVELS, "threads": 2, **options}
    return assemble_cog(segments, path, geobox=geobox, legend=legend, codec=codec, **options)


def levels_of(path: Path) -> list[np.ndarray]:
    with rasterio.open(path) as source:
        found = [source.read(1)]
        count = len(source.overviews(1))
    for level in range(count):
        with rasterio.open(path, OVERVIEW_LEVEL=level) as overview:
            found.append(overview.read(1))
    return found


def blocks_of(values: np.ndarray) -> np.ndarray:
    """Return the four pixels below each overview pixel, (H/2, W/2, 4)."""
    padded = np.pad(values, [(0, side % 2) for side in values.shape], constant_values=255)
    height, width = padded.shape
    return padded.reshape(height // 2, 2, width // 2, 2).swapaxes(1, 2).reshape(
        height // 2, width // 2, 4
    )  # fmt: skip


def votes(values: np.ndarray) -> np.ndarray:
    """Return how often each of the values 0 to 254 stands below each overview pixel."""
    blocks = blocks_of(values)
    return np.stack(
        [(blocks == code).sum(-1) for code in range(blocks[blocks < 255].max(initial=0) + 1)]
    )


def mode_by_hand(values: np.ndarray) -> np.ndarray:
    counts = votes(values)
    return np.where(counts.max(0) > 0, counts.argmax(0), 255).astype(np.uint8)


def mean_by_hand(values: np.ndarray) -> np.ndarray:
    blocks = np.ma.masked_equal(blocks_of(values).astype(np.float64), 255)
    return np.floor(blocks.mean(-1) + 0.5).filled(255).astype(np.uint8)


@pytest.mark.parametrize("resampling", ["mode", "average"])
def test_every_kind_of_four_pixels(resampling: str) -> None:
    """Ties go to the lowest code, halves up, nodata has no vote: all combinations."""
    values = (0, 1, 2, 3, 100, 253, 254, 255)
    combinations = list(itertools.product(values, repeat=4))
    raster = np.array(combinations, dtype=np.uint8).reshape(-1, 2, 2).swapaxes(0, 1).reshape(2, -1)
    expected = []
    for four in combinations:
        valid = [value for value in four if value != 255]
        if not valid:
            expected.append(255)
        elif resampling == "mode":
            expected.append(min(valid, key=lambda value: (-valid.count(value), value)))
        else:
            mean = Fraction(sum(valid), len(valid))
            expected.append(int(mean + Fraction(1, 2)))
    assert halve(raster, resampling).tolist() == [expected]
    without = raster[:, (raster != 255).all(0).reshape(-1, 2).all(1).repeat(2)]
    found = halve(np.ascontiguousarray(without), resampling)
    kept = [one for one, four in zip(expected, combinations, strict=True) if 255 not in four]
    assert found.tolist() == [kept]


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (129, 2), (131, 263), (264, 77)])
def test_halving_ragged_rasters(shape: tuple[int, int]) -> None:
    values = fields(shape, classes=6, side=3)
    assert np.array_equal(halve(values, "mode"), mode_by_hand(values))
    assert np.array_equal(halve(values, "average"), mean_by_hand(values))
    assert count_values(values) == Counter(values.ravel().tolist())


@pytest.mark.parametrize("percent", [False, True], ids=["classes", "percent"])
@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (RAGGED, STEP), (RAGGED, 3 * STEP), ((2 * STEP, STEP), STEP), ((7, 11), STEP),
        ((1, 200), STEP),
    ],
    ids=["ragged", "larger-shards", "whole-shards", "less-than-a-tile", "one-row"],
)  # fmt: skip
def test_all_levels_are_those_made_by_hand(
    tmp_path: Path, shape: tuple[int, int], size: int, percent: bool
) -> None:
    values = fields(shape)
    if percent:
        values = np.where(values == 255, 255, values * 30 + 3).astype(np.uint8)
    segments = segments_of(values, tmp_path, size=size, percent=percent)
    path = make_map(
        segments, tmp_path / "map.tif", shape, legend=None if percent else LEGEND,
    )  # fmt: skip
    found = levels_of(path)
    expected = [values]
    while max(expected[-1].shape) > CODEC.size:
        expected.append((mean_by_hand if percent else mode_by_hand)(expected[-1]))
    assert [one.shape for one in found] == level_shapes(shape, CODEC.size)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.array_equal(ours, theirs)
    counts = np.bincount(values.ravel(), minlength=256)
    check_cog(
        path, geobox=grid(shape), legend=None if percent else LEGEND,
        histogram={code: int(counts[code]) for code in range(256)},
        kind="confidence" if percent else "classes",
    )  # fmt: skip
    names = {"map.tif"} | ({"map.tif.aux.xml"} if not percent else set())
    assert {one.name for one in tmp_path.iterdir()} - {one.path.name for one in segments} == names


@pytest.mark.parametrize("compression", ["zstd", "deflate"])
def test_both_validators_and_a_large_tile(tmp_path: Path, compression: str) -> None:
    shape = (2 * 512 + 517, 1024 + 33)
    codec = TileCodec(compression=compression)
    values = fields(shape)
    segments = segments_of(values, tmp_path, size=1024, codec=codec, levels=1)
    path = make_map(segments, tmp_path / "map.tif", shape, codec=codec, levels=1)
    check_cog(path, geobox=grid(shape), legend=LEGEND)
    with rasterio.open(path) as source:
        assert source.block_shapes == [(512, 512)]
        assert source.overviews(1) == [2, 4]
        assert source.compression.name == compression
        assert "BLOCK_LEADER" in source.get_tag_item("GDAL_STRUCTURAL_METADATA", "TIFF")
    for file in (path, segments[0].path):
        gdal_validates(file)


def test_gdal_makes_the_same_map_but_for_ties(tmp_path: Path) -> None:
    """Both writers, all levels; a differing pixel must be as frequent below as ours.

    GDAL stretches its overview pixels where a side is odd, so that it gets the raster padded with
    nodata to a multiple of 2^levels.
    """
    shape = (2 * 512 + 301, 1024 + 33)
    codec = TileCodec()
    values = fields(shape)
    ours = levels_of(
        make_map(
            segments_of(values, tmp_path, size=1024, codec=codec, levels=1),
            tmp_path / "ours.tif", shape, codec=codec, levels=1,
        )
    )  # fmt: skip
    theirs = gdal_levels(values, tmp_path / "theirs.tif", LEGEND)
    assert [one.shape for one in ours] == [one.shape for one in theirs]
    assert len(ours) == 3
    assert np.array_equal(ours[0], theirs[0])
    differing = 0
    for level in range(1, len(ours)):
        mine, other = votes(ours[level - 1]), votes(theirs[level - 1])
        assert np.array_equal(ours[level], mode_by_hand(ours[level - 1]))
        valid = theirs[level] != 255
        assert np.array_equal(valid, ours[level] != 255)
        chosen = np.where(valid, theirs[level], 0)[None].astype(int)
        assert (np.take_along_axis(other, chosen, 0)[0] == other.max(0))[valid].all()
        if level == 1:  # the same pixels below: only ties can differ
            tied = (mine == mine.max(0)).sum(0) > 1
            assert not (ours[level] != theirs[level])[~tied].any()
        differing += int((ours[level] != theirs[level]).sum())
    assert differing, "the raster must hold ties"


def test_gdal_averages_alike(tmp_path: Path) -> None:
    shape = (2 * 512 + 301, 1024 + 33)
    codec = TileCodec(predictor=True)
    values = fields(shape)
    values = np.where(values == 255, 255, values * 31 + 2).astype(np.uint8)
    segments = segments_of(values, tmp_path, size=1024, percent=True, codec=codec, levels=1)
    path = make_map(segments, tmp_path / "ours.tif", shape, codec=codec, levels=1, legend=None)
    theirs = gdal_levels(values, tmp_path / "theirs.tif", None)
    for mine, other in zip(levels_of(path), theirs, strict=True):
        assert np.array_equal(mine, other)


def gdal_levels(values: np.ndarray, path: Path, legend: Legend | None) -> list[np.ndarray]:
    """Write a padded raster with GDAL's writer, and return its levels without the padding."""
    height, width = (-(-side // 4) * 4 for side in values.shape)
    padded = np.full((height, width), 255, dtype=np.uint8)
    padded[: values.shape[0], : values.shape[1]] = values
    plain = path.with_name("plain.tif")
    geobox = grid(padded.shape)
    with rasterio.open(
        plain, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8",
        crs="EPSG:32631", transform=geobox.affine, nodata=255,
    ) as target:  # fmt: skip
        target.write(padded, 1)
    source = Source(path=plain, window=Window(0, 0, height, width))
    found = levels_of(write_cog([source], path, geobox=geobox, legend=legend))
    shapes = level_shapes(values.shape, 512)
    return [one[:rows, :cols] for one, (rows, cols) in zip(found, shapes, strict=True)]


@pytest.fixture(scope="module")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[Segment]]:
    """A ragged class raster and its segments."""
    values = fields(RAGGED)
    return values, segments_of(values, tmp_path_factory.mktemp("segments"))


def test_order_and_threads_change_no_byte(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]]
) -> None:
    values, segments = ragged
    shuffled = random.Random(3).sample(segments, len(segments))
    first = make_map(segments, tmp_path / "a.tif", RAGGED, threads=1).read_bytes()
    assert make_map(shuffled, tmp_path / "b.tif", RAGGED, threads=4).read_bytes() == first
    again = tmp_path / "again"
    again.mkdir()
    for old, new in zip(segments, segments_of(values, again, threads=3), strict=True):
        assert new.path.read_bytes() == old.path.read_bytes()
        assert new.to_json() == old.to_json()


def test_names_colours_and_tags_are_read_back(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]]
) -> None:
    path = make_map(ragged[1], tmp_path / "map.tif", RAGGED, tags={"NOTE": "a < b & ü"})
    with rasterio.open(path) as source:
        palette = source.colormap(1)
        assert all(palette[code] == color for code, color in LEGEND.colormap().items())
        assert palette[255][3] == 0
        assert source.tags()["NOTE"] == "a < b & ü"
        assert source.descriptions == ("class",)
        assert source.nodata == 255
    assert read_legend(path) == LEGEND
    header = path.read_bytes()[:20_000].decode("utf-8", errors="replace")
    (table,) = header.split('role="rat">')[1:]
    rows = table.split("</Item>")[0].split("<Row ")[1:]
    assert [row.split("<F>")[2].split("</F>")[0] for row in rows] == [
        "Wheat &amp; &lt;rye&gt;", "Maïs", "3", "4",
    ]  # fmt: skip
    told = gdal_names(path)
    assert told["categories"] == list(LEGEND.names)
    assert told["table"] == [[entry.code, entry.name] for entry in LEGEND.classes]
    assert told["colors"] == [list(palette[code]) for code in range(256)]
    assert told["nodata"] == 255
    percent = segments_of(ragged[0], tmp_path, percent=True)
    bands = Bands(kind="scaled", names=("sure",), scale=0.01, unit="km", description="so it is")
    confidence = make_map(percent, tmp_path / "c.tif", RAGGED, legend=None, bands=bands)
    with rasterio.open(confidence) as source:
        assert source.scales == (0.01,)
        assert source.descriptions == ("sure",)
        assert source.units == ("km",)
        assert source.tags()["TIFFTAG_IMAGEDESCRIPTION"] == "so it is"
        assert source.tags()["STCLN_GEO_KIND"] == "scaled"
        assert source.colorinterp[0].name == "gray"


@pytest.mark.parametrize(
    ("crs", "pixel"),
    [("EPSG:32733", 10.0), ("EPSG:3035", 20.0), ("EPSG:4326", 0.00025),
     ("+proj=laea +lat_0=5 +lon_0=20 +units=m +ellps=GRS80", 30.0)],
    ids=["utm-south", "europe", "degrees", "no-code"],
)  # fmt: skip
def test_the_place_is_what_gdal_would_write(tmp_path: Path, crs: str, pixel: float) -> None:
    values = fields((50, 90))
    affine = Affine(pixel, 0, 3 * pixel + 0.125, 0, -pixel, 41.0)
    geobox = GeoBox(values.shape, affine, crs)
    path = make_map(
        segments_of(values, tmp_path, size=128), tmp_path / "map.tif", values.shape, geobox=geobox
    )
    plain = tmp_path / "plain.tif"
    with rasterio.open(
        plain, "w", driver="GTiff", height=50, width=90, count=1, dtype="uint8",
        crs=geobox.crs.to_wkt(), transform=affine,
    ) as target:  # fmt: skip
        target.write(values, 1)
    with rasterio.open(path) as ours, rasterio.open(plain) as theirs:
        assert ours.crs == theirs.crs
        assert ours.transform == theirs.transform
        assert ours.bounds == theirs.bounds
    assert validate_cog(path, geobox=geobox) == ([], [])


def test_shards_of_nodata_and_shards_that_are_absent_share_one_tile(tmp_path: Path) -> None:
    values = np.full(RAGGED, 255, dtype=np.uint8)
    values[-30:, -20:] = 2
    segments = segments_of(values, tmp_path)
    path = make_map(segments, tmp_path / "map.tif", RAGGED)
    few = make_map(segments[-12:], tmp_path / "few.tif", RAGGED)
    assert few.read_bytes() == path.read_bytes()
    assert np.array_equal(levels_of(path)[0], values)
    check_cog(path, legend=LEGEND, histogram={255: values.size - 600, 2: 600})
    gdal_validates(path)
    with rasterio.open(path) as source:
        places = {
            source.get_tag_item(f"BLOCK_OFFSET_{col}_{row}", "TIFF", bidx=1)
            for row in range(10) for col in range(10)
        }  # fmt: skip
    assert len(places) == 1

    none = make_map([], tmp_path / "new" / "folder" / "none.tif", RAGGED)
    assert (levels_of(none)[-1] == 255).all()
    check_cog(none, legend=LEGEND, histogram={255: values.size})
    gdal_validates(none)


@pytest.mark.parametrize("absent", [1, 3])
def test_absent_pixels_may_have_a_value_that_counts(tmp_path: Path, absent: int) -> None:
    """Such as a quality code; in overviews it hides what is rare, and empty tiles stay shared."""
    values = np.full(RAGGED, absent, dtype=np.uint8)
    values[STEP : 2 * STEP : 4, : 3 * STEP : 5] = 2  # a fifth of a quarter: gone one level up
    values[-STEP - 17 : -40, 2 * STEP : 5 * STEP] = fields((STEP - 23, 3 * STEP))
    values[values == 255] = 2
    segments = segments_of(values, tmp_path, absent=absent)
    path = make_map(segments, tmp_path / "map.tif", RAGGED, absent=absent)
    held = [one for one in segments if set(one.histogram) != {absent}]
    empty = [one for one in segments if one not in held]
    assert empty
    assert all(one.path.stat().st_size == one.head_bytes for one in empty), "no tile is stored"
    few = make_map(held, tmp_path / "few.tif", RAGGED, absent=absent)
    assert few.read_bytes() == path.read_bytes()

    found = levels_of(path)
    assert np.array_equal(found[0], values)
    for fine, coarse in itertools.pairwise(found):
        assert np.array_equal(coarse, halve(fine, "mode"))
    assert (found[-1] == absent).any()
    codes, counts = np.unique(values, return_counts=True)
    check_cog(
        path, legend=LEGEND, histogram=dict(zip(codes.tolist(), counts.tolist(), strict=True))
    )
    gdal_validates(path)
    # GDAL's writer reads the same files, in which the tiles of absent pixels have no bytes.
    again = write_cog(segments, tmp_path / "gdal.tif", geobox=grid(RAGGED), legend=LEGEND)
    assert np.array_equal(levels_of(again)[0], values)


def test_a_bigtiff_has_the_same_pixels(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make_map(ragged[1], tmp_path / "small.tif", RAGGED)
    monkeypatch.setattr("stcln_geo.cog.assemble.CLASSIC_LIMIT", 1000)
    big = make_map(ragged[1], tmp_path / "big.tif", RAGGED)
    assert small.read_bytes()[:4] == b"II*\0"
    assert big.read_bytes()[:4] == b"II+\0"
    for one, other in zip(levels_of(small), levels_of(big), strict=True):
        assert np.array_equal(one, other)
    check_cog(big, legend=LEGEND, geobox=grid(RAGGED))
    gdal_validates(big)


@pytest.mark.parametrize("failure", ["raises", "returns nothing"])
def test_a_compressor_that_fails_fails_the_run(
    tmp_path: Path,
    ragged: tuple[np.ndarray, list[Segment]],
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
) -> None:
    """In a worker, and in the finaliser's coarse levels."""
    values, segments = ragged
    calls = itertools.count()
    encode = numcodecs.Zstd.encode

    def fail_once(self: Any, data: Any) -> Any:
        if next(calls) != 5:
            return encode(self, data)
        if failure == "raises":
            raise RuntimeError("out of memory")
        return b""

    with monkeypatch.context() as patched:
        patched.setattr(numcodecs.Zstd, "encode", fail_once)
        with pytest.raises(OutputError, match="Cannot compress a tile"):
            segments_of(values, tmp_path, threads=2)
        calls = itertools.count()
        with pytest.raises(OutputError, match="Cannot compress a tile"):
            make_map(segments, tmp_path / "map.tif", RAGGED)
    left = sorted(one.name for one in tmp_path.iterdir())
    done = [one.path for one in segments[: len(left)]]
    assert left == sorted(one.name for one in done), "neither a map nor the shard that failed"
    assert all((tmp_path / one.name).read_bytes() == one.read_bytes() for one in done)


def flip(position: int) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[position] ^= 1

    return change


def cut(data: bytearray) -> None:
    del data[-9:]


@pytest.mark.parametrize("place", ["header", "table", "coarse", "fine", "end", "cut"])
def test_a_damaged_shard_is_named(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]], place: str
) -> None:
    segments = list(ragged[1])
    victim = segments[-12]
    copied = tmp_path / "victim.tif"
    data = bytearray(victim.path.read_bytes())
    change = {
        "header": flip(5), "table": flip(victim.head_bytes - 3),
        "coarse": flip(victim.head_bytes + 7), "fine": flip(len(data) // 2),
        "end": flip(-1), "cut": cut,
    }[place]  # fmt: skip
    change(data)
    copied.write_bytes(data)
    segments[-12] = replace(victim, path=copied)
    target = tmp_path / "map.tif"
    target.write_bytes(b"old")
    assert is_whole(victim, CODEC)
    assert not is_whole(segments[-12], CODEC)
    with pytest.raises(InputError, match=r"victim\.tif is damaged"):
        make_map(segments, target, RAGGED)
    assert target.read_bytes() == b"old"
    assert {one.name for one in tmp_path.iterdir()} == {"map.tif", "victim.tif"}


def test_a_shard_that_is_absent_is_named(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]]
) -> None:
    segments = [*ragged[1][:-1], replace(ragged[1][-1], path=tmp_path / "lost.tif")]
    assert not is_whole(segments[-1], CODEC)
    with pytest.raises(MissingFileError, match=r"lost\.tif does not exist"):
        make_map(segments, tmp_path / "map.tif", RAGGED)
    assert not list(tmp_path.iterdir())


def test_shards_that_do_not_fit_are_refused(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]]
) -> None:
    values, segments = ragged
    out = tmp_path / "map.tif"
    moved = replace(segments[0], window=segments[0].window.shift(8, 0))
    with pytest.raises(InputError, match="multiples of 64 px"):
        make_map([moved], out, RAGGED)
    outside = replace(segments[0], window=segments[0].window.shift(64 * 20, 0))
    with pytest.raises(InputError, match="multiples of 64 px"):
        make_map([outside], out, RAGGED)
    with pytest.raises(InputError, match="they overlap"):
        make_map([segments[0], segments[1], replace(segments[1])], out, RAGGED)
    other = segments_of(
        values[:STEP, :STEP], tmp_path, codec=TileCodec(size=16, compression="deflate")
    )
    with pytest.raises(InputError, match="Write all shards of a map with one codec"):
        make_map([other[0], *segments[1:]], out, RAGGED)
    with pytest.raises(InputError, match="in the shape of its window"):
        write_segment(values, out, window=Window(0, 0, 3, 3), resampling="mode")
    assert not out.exists()


HEIGHT, WIDTH = RAGGED


@pytest.mark.parametrize(
    "window",
    [
        Window(HEIGHT - 20, 0, 20, STEP), Window(0, WIDTH - 20, STEP, 20),
        Window(0, 0, STEP - 1, STEP), Window(0, 0, STEP, STEP + 1),
        Window(0, 0, STEP, 0), Window(-STEP, 0, STEP, STEP), Window(0, 9 * STEP, STEP, STEP),
    ],
    ids=["first row", "first column", "last row", "last column", "empty", "above", "beyond"],
)  # fmt: skip
def test_shards_begin_and_end_on_the_squares_along_both_axes(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]], window: Window
) -> None:
    with pytest.raises(InputError, match=r"0_0\.tif at .*multiples of 64 px"):
        make_map([replace(ragged[1][0], window=window)], tmp_path / "map.tif", RAGGED)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)])
def test_a_shard_within_another_is_refused_wherever_it_lies(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]], place: tuple[int, int]
) -> None:
    large = replace(ragged[1][0], window=Window(STEP, 2 * STEP, 3 * STEP, 3 * STEP))
    small = Window((1 + place[0]) * STEP, (2 + place[1]) * STEP, STEP, STEP)
    with pytest.raises(InputError, match="they overlap"):
        make_map([large, replace(ragged[1][1], window=small)], tmp_path / "map.tif", RAGGED)


def test_a_full_disk_is_said_before_the_copy(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(assemble.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match=r"0\.00 GB are free"):
        make_map(ragged[1], tmp_path / "map.tif", RAGGED)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]]
) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match="The folder must be writable"):
        make_map(ragged[1], tmp_path / "file" / "map.tif", RAGGED)


def test_what_a_killed_run_leaves_has_the_maps_name(
    tmp_path: Path, ragged: tuple[np.ndarray, list[Segment]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that 'predict' finds and removes it: every temporary file begins with .map.tif."""
    opened: set[str] = set()
    open_file = Path.open

    def watch(self: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        if mode != "rb" and self.parent == tmp_path:
            opened.add(self.name)
        return open_file(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", watch)
    make_map(ragged[1], tmp_path / "map.tif", RAGGED)
    assert len(opened) > 3, "the coarse levels must have been written too"
    assert all(name.startswith(".map.tif.") for name in opened - {".map.tif.aux.xml"}), opened


def repeated(segment: Segment, rows: int, cols: int) -> list[Segment]:
    """Place one shard's file many times."""
    side = segment.window.height
    return [
        replace(segment, window=Window(row * side, col * side, side, side))
        for row in range(rows) for col in range(cols)
    ]  # fmt: skip


@pytest.mark.slow
def test_the_memory_of_the_assembler_does_not_grow(tmp_path: Path) -> None:
    """Nine times the pixels: what is added is the table of tiles, 12 bytes for each."""
    (segment,) = segments_of(
        fields((4096, 4096), side=200), tmp_path, size=4096, codec=TileCodec(), levels=3
    )
    peaks = []
    for side in (8, 24):
        shape = (side * 4096, side * 4096)
        tracemalloc.start()
        path = make_map(
            repeated(segment, side, side), tmp_path / "map.tif", shape,
            codec=TileCodec(), levels=3, threads=1,
        )  # fmt: skip
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        with rasterio.open(path) as source:
            assert source.shape == shape
            assert len(source.overviews(1)) == len(level_shapes(shape, 512)) - 1
    assert peaks[1] < 1.25 * peaks[0], peaks
    assert peaks[1] < 80e6, peaks


@pytest.mark.slow
def test_a_file_beyond_4_gb(tmp_path: Path) -> None:
    """Shards of noise fill the file, most of the raster is empty, and all of it is read back."""
    if shutil.disk_usage(tmp_path).free < 8e9:
        pytest.skip("less than 8 GB are free")
    noise = np.random.default_rng(0).integers(0, 255, (4096, 4096), dtype=np.uint8)
    legend = Legend.from_values([str(code) for code in range(255)])
    codec = TileCodec(level=1)
    (segment,) = segments_of(noise, tmp_path, size=4096, codec=codec, levels=3)
    shape = (14 * 4096 + 517, 24 * 4096 + 33)
    segments = repeated(segment, 10, 22)
    segments = [replace(one, window=one.window.shift(4096, 4096)) for one in segments]
    path = make_map(segments, tmp_path / "map.tif", shape, codec=codec, levels=3, legend=legend)
    try:
        assert path.stat().st_size > 2**32
        assert os.listdir(tmp_path).count(".map.tif") == 0
        with rasterio.open(path) as source:
            assert source.shape == shape
            assert len(source.overviews(1)) == 8
            last = int(
                source.get_tag_item(f"BLOCK_OFFSET_{23 * 8 - 1}_{11 * 8 - 1}", "TIFF", bidx=1)
            )
            assert last > 2**32
            for row, col in ((1, 1), (5, 11), (9, 22)):
                window = ((row * 4096 - 300, row * 4096 + 700), (col * 4096, col * 4096 + 900))
                found = source.read(1, window=window)
                assert np.array_equal(found[300:], noise[:700, :900])
                above = noise[-300:, :900] if row > 1 else np.full((300, 900), 255)
                assert np.array_equal(found[:300], above)
            assert (source.read(1, window=((shape[0] - 900, shape[0]), (0, 900))) == 255).all()
        small = halve(halve(halve(halve(noise, "mode"), "mode"), "mode"), "mode")
        with rasterio.open(path, OVERVIEW_LEVEL=3) as overview:
            assert np.array_equal(overview.read(1, window=((512, 768), (768, 1024))), small)
        from rio_cogeo.cogeo import cog_validate

        assert cog_validate(str(path), strict=True, quiet=True) == (True, [], [])
        gdal_validates(path)
    finally:
        path.unlink(missing_ok=True)
