"""COGs are written whole, and the validator sees what offsets cannot tell."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rio_cogeo.cogeo import cog_validate

from stcln_geo.cog import Source, check_cog, read_legend, validate_cog, write_cog
from stcln_geo.errors import InputError, MissingFileError, OutputError
from stcln_geo.grid import Window, crop_geobox, geobox_from_window, tiles
from stcln_geo.legend import Legend

from ..gdal_python import gdal_names, gdal_validates

SHAPE = (1301, 775)
CRS = "EPSG:32631"
GEOBOX = geobox_from_window(Window(-560_000, 50_000, *SHAPE), crs=CRS, resolution=10.0)
LEGEND = Legend.from_rows(
    [
        {"value": "1", "name": "Winter wheat & <rye>"},
        {"value": "2", "name": "Maïs", "color": "#00ff10"},
        {"value": "3", "name": 'Beet "sugar"'},
        {"value": "4"},
    ],
    source="test",
)


@pytest.fixture(scope="module")
def codes() -> np.ndarray:
    """Fields of a few pixels, noise, and a nodata corner; (H, W) uint8."""
    generator = np.random.default_rng(5)
    fields = generator.integers(0, 4, (SHAPE[0] // 9 + 1, SHAPE[1] // 9 + 1))
    values = fields.repeat(9, 0).repeat(9, 1)[: SHAPE[0], : SHAPE[1]].astype(np.uint8)
    noise = generator.random(SHAPE) < 0.05
    values[noise] = generator.integers(0, 4, int(noise.sum()))
    values[:300, :200] = 255
    return values


def write_sources(folder: Path, values: np.ndarray, size: int = 400) -> list[Source]:
    sources = []
    for index, window in enumerate(tiles(values.shape, size)):
        path = folder / f"part{index}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", height=window.height, width=window.width, count=1,
            dtype="uint8", crs=CRS, transform=crop_geobox(GEOBOX, window).affine,
        ) as target:  # fmt: skip
            target.write(values[window.rows, window.cols], 1)
        sources.append(Source(path=path, window=window))
    return sources


def counts_of(values: np.ndarray) -> dict[int, int]:
    counts = np.bincount(values.ravel())
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


@pytest.fixture(scope="module")
def class_map(tmp_path_factory: pytest.TempPathFactory, codes: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("cog")
    parts = folder / "parts"
    parts.mkdir()
    sources = write_sources(parts, codes)
    path = write_cog(sources, folder / "classes.tif", geobox=GEOBOX, legend=LEGEND)
    assert {entry.name for entry in folder.iterdir()} == {
        "parts", "classes.tif", "classes.tif.aux.xml",
    }  # fmt: skip
    return path


def rewrite(
    target: Path,
    values: np.ndarray,
    *,
    resampling: str = "MODE",
    legend: Legend | None = LEGEND,
    palette: bool = True,
    nodata: int | None = 255,
    crs: str | None = CRS,
    sidecar: Path | None = None,
    **options: str,
) -> Path:
    """Write a map with GDAL alone, to plant faults in it."""
    plain = target.with_name("plain.tif")
    with rasterio.open(
        plain, "w", driver="GTiff", height=values.shape[0], width=values.shape[1], count=1,
        dtype="uint8", crs=crs, transform=GEOBOX.affine, nodata=nodata,
    ) as source:  # fmt: skip
        source.write(values, 1)
        source.update_tags(STCLN_GEO_KIND="classes")
        if palette and legend is not None:
            source.write_colormap(1, {**legend.colormap(), 255: (0, 0, 0, 0)})
        if legend is not None:
            source.update_tags(STCLN_GEO_LEGEND=legend.to_json())
    creation = {"COMPRESS": "DEFLATE", "OVERVIEW_RESAMPLING": resampling, **options}
    rasterio.shutil.copy(str(plain), str(target), driver="COG", **creation)
    for path in target.parent.glob("plain.tif*"):
        path.unlink()
    if sidecar is not None:
        target.with_name(f"{target.name}.aux.xml").write_bytes(sidecar.read_bytes())
    return target


def test_pixels_grid_palette_names_and_nodata(class_map: Path, codes: np.ndarray) -> None:
    with rasterio.open(class_map) as source:
        assert np.array_equal(source.read(1), codes)
        assert source.crs.to_epsg() == 32631
        assert source.transform == GEOBOX.affine
        assert source.nodata == 255
        assert source.overviews(1) == [2, 4]
        assert source.block_shapes == [(512, 512)]
        assert source.compression.name == "zstd"
        palette = source.colormap(1)
        assert all(palette[code] == color for code, color in LEGEND.colormap().items())
        assert palette[255][3] == 0
        assert (
            source.get_tag_item("GDAL_STRUCTURAL_METADATA", "TIFF").find(
                "KNOWN_INCOMPATIBLE_EDITION=NO"
            )
            > 0
        )
    assert read_legend(class_map) == LEGEND


def test_names_stand_in_the_sidecar_and_in_the_file(class_map: Path) -> None:
    sidecar = ElementTree.parse(class_map.with_name("classes.tif.aux.xml")).getroot()
    assert [entry.text for entry in sidecar.iter("Category")] == list(LEGEND.names)

    head = class_map.read_bytes()[:20_000]
    xml = re.search(rb"<GDALMetadata>.*</GDALMetadata>", head, re.DOTALL)
    assert xml is not None
    root = ElementTree.fromstring(xml[0])
    (item,) = [one for one in root if one.get("name") == "DEFAULT_RASTER_ATTRIBUTE_TABLE"]
    assert item.get("role") == "rat"
    rows = [[cell.text for cell in row] for row in item.iter("Row")]
    assert [row[:2] for row in rows] == [[str(entry.code), entry.name] for entry in LEGEND.classes]
    assert rows[1][2:] == ["0", "255", "16"]
    assert b"RESERVED" not in head


def test_a_good_map_has_no_fault(class_map: Path, codes: np.ndarray) -> None:
    expected: dict[str, Any] = {"histogram": counts_of(codes), "geobox": GEOBOX}
    assert validate_cog(class_map) == ([], [])
    assert validate_cog(class_map, legend=LEGEND, **expected) == ([], [])
    check_cog(class_map, **expected)


def test_gdal_reads_names_and_colours_and_finds_no_fault(class_map: Path) -> None:
    told = gdal_names(class_map)
    assert told["categories"] == list(LEGEND.names)
    assert told["table"] == [[entry.code, entry.name] for entry in LEGEND.classes]
    for code, color in LEGEND.colormap().items():
        assert told["colors"][code] == list(color)
    assert told["colors"][255][3] == 0
    gdal_validates(class_map)
    assert cog_validate(str(class_map), strict=True, quiet=True) == (True, [], [])


def test_missing_parts_become_nodata(tmp_path: Path, codes: np.ndarray) -> None:
    sources = write_sources(tmp_path, codes)
    path = write_cog(sources[:-1], tmp_path / "map.tif", geobox=GEOBOX, legend=LEGEND)
    expected = codes.copy()
    last = sources[-1].window
    expected[last.rows, last.cols] = 255
    with rasterio.open(path) as source:
        assert np.array_equal(source.read(1), expected)
    assert validate_cog(path, histogram=counts_of(expected)) == ([], [])


def test_nothing_but_nodata(tmp_path: Path) -> None:
    path = write_cog([], tmp_path / "map.tif", geobox=GEOBOX, legend=LEGEND)
    assert validate_cog(path, histogram={255: SHAPE[0] * SHAPE[1]}) == ([], [])


def test_confidence_averages(tmp_path: Path, codes: np.ndarray) -> None:
    percent = np.where(codes == 255, 255, codes * 30 + 7).astype(np.uint8)
    path = write_cog(
        write_sources(tmp_path, percent), tmp_path / "c.tif", geobox=GEOBOX, legend=None
    )
    assert validate_cog(path, histogram=counts_of(percent), geobox=GEOBOX) == ([], [])
    with rasterio.open(path) as source, rasterio.open(path, OVERVIEW_LEVEL=0) as overview:
        assert np.array_equal(source.read(1), percent)
        small = overview.read(1)
        assert small[-1, 0] != 255
    blocks = percent[400:1300, 300:700].reshape(450, 2, 200, 2).mean((1, 3))
    # GDAL shrinks 1301 rows to 651: blocks drift by a fraction of a pixel.
    assert abs(float(small[200:650, 150:350].mean()) - float(blocks.mean())) < 0.5
    assert not path.with_name("c.tif.aux.xml").exists()


def test_uneven_sides_raise_no_false_alarm(tmp_path: Path) -> None:
    """GDAL's pixels of each level lie across those of the one before where a side is odd."""
    shape = (1035, 1301)
    values = np.random.default_rng(0).integers(0, 8, shape).astype(np.uint8)
    geobox = geobox_from_window(Window(-560_000, 50_000, *shape), crs=CRS, resolution=10.0)
    legend = Legend.from_values([f"crop {number}" for number in range(8)])
    path = write_cog(
        write_sources(tmp_path, values), tmp_path / "c.tif", geobox=geobox, legend=legend
    )
    assert validate_cog(path, histogram=counts_of(values)) == ([], [])


def test_averaged_overviews_are_found_though_their_values_are_codes(
    tmp_path: Path, class_map: Path, codes: np.ndarray
) -> None:
    sidecar = class_map.with_name("classes.tif.aux.xml")
    # Averages of codes 0 to 3 are codes again: only the pixels below tell.
    full = np.where(codes == 255, 0, codes)
    bad = rewrite(tmp_path / "bad.tif", full, resampling="AVERAGE", palette=False, sidecar=sidecar)
    errors, _ = validate_cog(bad)
    assert any("show a class that none of the pixels below" in text for text in errors)
    assert sum(text.startswith("Overview") for text in errors) == 2
    good = rewrite(tmp_path / "good.tif", full, sidecar=sidecar)
    assert validate_cog(good) == ([], [])


def test_overviews_of_many_classes_are_compared(tmp_path: Path) -> None:
    legend = Legend.from_values([str(code) for code in range(200)])
    fields = np.random.default_rng(2).integers(0, 200, (SHAPE[0] // 7 + 1, SHAPE[1] // 7 + 1))
    values = fields.repeat(7, 0).repeat(7, 1)[: SHAPE[0], : SHAPE[1]].astype(np.uint8)
    good = write_cog(
        write_sources(tmp_path, values), tmp_path / "good.tif", geobox=GEOBOX, legend=legend
    )
    assert validate_cog(good) == ([], [])
    sidecar = good.with_name("good.tif.aux.xml")
    bad = rewrite(
        tmp_path / "bad.tif", values, resampling="AVERAGE", legend=legend, palette=False,
        sidecar=sidecar,
    )  # fmt: skip
    errors, _ = validate_cog(bad)
    assert sum("none of the pixels below" in text for text in errors) == 2


def test_overview_values_that_are_no_codes_are_found(tmp_path: Path, codes: np.ndarray) -> None:
    legend = Legend.from_values([str(code) for code in range(4)])
    sparse = np.where(codes == 2, 0, np.where(codes == 1, 3, codes))
    bad = rewrite(
        tmp_path / "bad.tif", np.where(sparse == 255, 0, sparse * 50).astype(np.uint8),
        resampling="AVERAGE", palette=False, legend=legend,
    )  # fmt: skip
    errors, _ = validate_cog(bad)
    assert any("Overview 0: values" in text for text in errors)
    assert any("pixel values [150]" in text for text in errors)


def test_lost_and_changed_pixels_are_found(class_map: Path, codes: np.ndarray) -> None:
    wrong = codes.copy()
    wrong[codes == 3] = 2
    errors, warnings = validate_cog(class_map, histogram=counts_of(wrong))
    assert len(errors) == 1
    assert errors[0].startswith("Histogram: value 2 stands")
    assert "2 values differ" in errors[0]
    assert warnings == []
    with pytest.raises(InputError, match="Histogram: value 2"):
        check_cog(class_map, histogram=counts_of(wrong))


def test_another_grid_is_found(class_map: Path) -> None:
    shifted = geobox_from_window(Window(-560_001, 50_000, *SHAPE), crs=CRS, resolution=10.0)
    wider = geobox_from_window(Window(-560_000, 50_000, 1301, 776), crs=CRS, resolution=10.0)
    zone = geobox_from_window(Window(-560_000, 50_000, *SHAPE), crs="EPSG:32632", resolution=10.0)
    for geobox, word in ((shifted, "transform"), (wider, "shape"), (zone, "CRS")):
        errors, _ = validate_cog(class_map, geobox=geobox)
        assert len(errors) == 1
        assert f"the {word} is" in errors[0]


def test_missing_palette_nodata_names_and_crs_are_found(
    tmp_path: Path, class_map: Path, codes: np.ndarray
) -> None:
    sidecar = class_map.with_name("classes.tif.aux.xml")
    bare = rewrite(
        tmp_path / "bare.tif", codes, legend=None, nodata=None, crs=None, sidecar=sidecar
    )
    errors, _ = validate_cog(bare)
    for start in ("Palette:", "Nodata:", "Names:", "Grid:"):
        assert any(text.startswith(start) for text in errors), start

    alone = rewrite(tmp_path / "alone.tif", codes)
    errors, _ = validate_cog(alone)
    assert len(errors) == 1
    assert "alone.tif.aux.xml is missing" in errors[0]
    alone.with_name("alone.tif.aux.xml").write_bytes(sidecar.read_bytes()[:100])
    assert validate_cog(alone)[0] == [errors[0].replace("is missing or", "cannot be read or")]


def test_another_legend_is_found(class_map: Path) -> None:
    other = Legend.from_rows(
        [{"value": str(code), "color": "#123456"} for code in range(3)], source="test"
    )
    errors, _ = validate_cog(class_map, legend=other)
    starts = {text.split(":")[0] for text in errors}
    assert starts == {"Palette", "Names", "Content", "Overview 0", "Overview 1"}


def test_lost_tiles_are_found(tmp_path: Path, class_map: Path, codes: np.ndarray) -> None:
    sparse = codes.copy()
    sparse[:600] = 255
    path = rewrite(
        tmp_path / "sparse.tif", sparse, SPARSE_OK="TRUE",
        sidecar=class_map.with_name("classes.tif.aux.xml"),
    )  # fmt: skip
    errors, _ = validate_cog(path)
    assert any(text.startswith("Tiles: 2 of 6 tiles of the full resolution") for text in errors)


@pytest.mark.parametrize(
    ("tag", "start"), [("x" * 5000, "Layout:"), ("", "Overview 0:")], ids=["header", "pixels"]
)
def test_a_map_updated_in_place_is_found(
    tmp_path: Path, codes: np.ndarray, tag: str, start: str
) -> None:
    """A smaller tile fits in its old place, and no offset tells of it; the overviews do."""
    sources = write_sources(tmp_path, codes)
    path = write_cog(sources, tmp_path / "map.tif", geobox=GEOBOX, legend=LEGEND)
    with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as source:
        if tag:
            source.update_tags(note=tag)
        else:
            source.write(np.full((40, 40), 1, np.uint8), 1, window=((700, 740), (300, 340)))
    errors, _ = validate_cog(path)
    assert any(text.startswith(start) for text in errors)
    assert any(text.startswith("Layout:") for text in errors) == bool(tag)


def test_damaged_bytes_are_found(tmp_path: Path, codes: np.ndarray) -> None:
    sources = write_sources(tmp_path, codes)
    path = write_cog(sources, tmp_path / "map.tif", geobox=GEOBOX, legend=LEGEND)
    with rasterio.open(path) as source:
        offset = int(source.get_tag_item("BLOCK_OFFSET_1_2", "TIFF", bidx=1))
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 200)
    errors, _ = validate_cog(path)
    assert any("cannot be decoded" in text for text in errors)


def test_other_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="there is no such file"):
        validate_cog(tmp_path / "no.tif")
    text = tmp_path / "text.tif"
    text.write_text("not a raster")
    errors, _ = validate_cog(text)
    assert len(errors) == 1
    assert "cannot be opened" in errors[0]
    floats = tmp_path / "floats.tif"
    with rasterio.open(
        floats, "w", driver="GTiff", height=20, width=31, count=1, dtype="float32",
        crs=CRS, transform=Affine(10, 0, 0, 0, -10, 0),
    ) as target:  # fmt: skip
        target.write(np.zeros((20, 31), np.float32), 1)
    errors, _ = validate_cog(floats)
    assert any("one band of uint8" in text for text in errors)


def test_a_map_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, codes: np.ndarray) -> None:
    path = tmp_path / "map.tif"
    path.write_bytes(b"old")
    broken = Source(path=tmp_path / "absent.tif", window=Window(0, 0, *SHAPE))
    with pytest.raises(OutputError, match="Cannot write"):
        write_cog([broken], path, geobox=GEOBOX, legend=LEGEND)
    assert [entry.name for entry in tmp_path.iterdir()] == ["map.tif"]
    assert path.read_bytes() == b"old"
