"""Pictures show the numbers they are given: colours are read back from the PNG files."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import rasterio
from matplotlib.image import imread

from stcln_geo.data.profiles import FieldProfiles
from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.legend import Legend, LegendClass
from stcln_geo.report import plots
from stcln_geo.report.plots import (
    plot_areas,
    plot_class_map,
    plot_classes,
    plot_confidence,
    plot_confusion,
    plot_curves,
    plot_rgb,
)
from stcln_geo.report.profiles import plot_profiles, write_profiles

LEGEND = Legend(
    classes=(
        LegendClass(code=0, value="a", name="Wheat", color="#d8a12d"),
        LegendClass(code=1, value="b", name="Maize", color="#3355cc"),
    )
)
# Halves of two classes with a corner without data, in a ragged shape.
CLASSES = np.zeros((43, 70), dtype=np.uint8)
CLASSES[:, 35:] = 1
CLASSES[:10, :20] = 255


def _at(path, *, y, x):
    """The colour at a place given as shares of the height and the width."""
    image = imread(path)
    color = image[int(y * image.shape[0]), int(x * image.shape[1]), :3]
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in color)


def test_classes_are_drawn_in_the_colours_of_the_legend(tmp_path):
    path = plot_classes(CLASSES, LEGEND, tmp_path / "map.png", with_legend=False)
    assert _at(path, y=0.7, x=0.2) == "#d8a12d"
    assert _at(path, y=0.7, x=0.8) == "#3355cc"
    assert _at(path, y=0.1, x=0.1) not in ("#d8a12d", "#3355cc")
    height, width = imread(path).shape[:2]
    assert height / width == pytest.approx(43 / 70, rel=0.01)


def test_legend_takes_room_below_the_map(tmp_path):
    bare = imread(plot_classes(CLASSES, LEGEND, tmp_path / "a.png", with_legend=False))
    full = imread(plot_classes(CLASSES, LEGEND, tmp_path / "b.png", title="A map"))
    assert full.shape[0] > bare.shape[0]
    assert full.shape[1] == bare.shape[1]


@pytest.mark.parametrize("size", [1, 40], ids=["small", "reduced"])
def test_class_map_of_a_file_honours_its_nodata(tmp_path, size):
    classes = np.kron(np.where(CLASSES == 255, 9, CLASSES), np.ones((size, size), np.uint8))
    path = tmp_path / "classes.tif"
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=classes.shape[0],
        width=classes.shape[1],
        count=1,
        dtype="uint8",
        nodata=9,
        transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
    ) as file:
        file.write(classes, 1)
    drawn = plot_class_map(path, LEGEND, tmp_path / "map.png", with_legend=False)
    direct = plot_classes(CLASSES, LEGEND, tmp_path / "direct.png", with_legend=False)
    for y, x in ((0.7, 0.2), (0.7, 0.8), (0.1, 0.1)):
        assert _at(drawn, y=y, x=x) == _at(direct, y=y, x=x)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"none\.tif"):
        plot_class_map(tmp_path / "none.tif", LEGEND, tmp_path / "map.png")


def test_confidence_grows_brighter_and_nodata_differs(tmp_path):
    percent = np.full((30, 61), 5, dtype=np.uint8)
    percent[:, 20:] = 95
    percent[:, 40:] = 255
    image = imread(plot_confidence(percent, tmp_path / "c.png", with_bar=False))[..., :3]
    row = image[image.shape[0] // 2]
    low, high, none = (row[int(share * row.shape[0])] for share in (0.1, 0.5, 0.9))
    assert low.sum() < high.sum()
    assert np.ptp(none) < 0.05
    with_bar = imread(plot_confidence(percent, tmp_path / "d.png"))
    assert with_bar.shape[0] > image.shape[0]


def test_true_colour_keeps_its_colours(tmp_path):
    rgb = np.zeros((21, 33, 3), dtype=np.uint8)
    rgb[..., 1] = 200
    assert _at(plot_rgb(rgb, tmp_path / "rgb.png"), y=0.5, x=0.5) == "#00c800"


def test_confusion_of_many_classes_keeps_to_a_size(tmp_path, monkeypatch):
    # Of 200 classes at the usual size of a cell, drawing would take 10 GB.
    assert plots._WIDEST <= 30
    monkeypatch.setattr(plots, "_WIDEST", 4.0)
    sides = {}
    for classes in (3, 7, 31):
        names = [f"{number}" for number in range(classes)]
        drawn = imread(plot_confusion(np.eye(classes), names, tmp_path / f"{classes}.png"))
        sides[classes] = drawn.shape[1]
    assert sides == {
        classes: pytest.approx(144 * (1.9 + side), abs=2)
        for classes, side in ((3, 3 * 0.52), (7, 7 * 0.52), (31, 4.0))
    }


@pytest.mark.parametrize("normalise", [True, False])
def test_confusion_is_darkest_where_the_share_is_largest(tmp_path, normalise):
    matrix = np.array([[90, 10], [0, 0]])
    path = plot_confusion(matrix, ["Wheat", "Maize"], tmp_path / "cm.png", normalise=normalise)
    image = imread(path)[..., :3]
    # Deep teal, unlike the dark grey of the words: green well above red, and not light.
    rows, cols = np.nonzero((image[..., 1] - image[..., 0] > 0.2) & (image[..., 0] < 0.2))
    assert len(rows) > 500
    # All of it is one cell, in the upper left of the two by two; the row without truth stays light.
    assert np.ptp(rows) * np.ptp(cols) < 1.2 * len(rows)
    assert rows.max() < 0.6 * image.shape[0]
    assert cols.max() < 0.75 * image.shape[1]


@pytest.mark.parametrize("name", ["a $\\frac{$ b", "5 $ to 6 $ ^", "$", "$$"])
def test_names_are_no_formulas(tmp_path, name):
    legend = Legend.from_values([name, "b"])
    counts, hectares = np.eye(2), np.ones(2)
    file = tmp_path / "a.png"
    plot_confusion(counts, legend.names, file, title=name)
    plot_classes(np.zeros((3, 4), int), legend, file, title=name)
    plot_areas(legend, mapped=hectares, adjusted=hectares, intervals=np.ones((2, 2)), out_png=file)
    plot_curves({name: [(0, 1.0), (1, 2.0)]}, file, title=name)


def test_profiles_are_drawn_over_gaps(tmp_path):
    ndvi = np.full((5, 7), np.nan, np.float32)
    ndvi[0, [1, 5]] = 0.2, 0.7
    profiles = FieldProfiles(
        season="2019-09-01",
        legend=Legend.from_rows(
            [
                {"value": "1", "name": "Wheat $\\frac{$", "color": "#ff0000"},
                {"value": "2", "name": "Maize", "color": "#0000ff"},
            ],
            source="rows",
        ),
        first=np.datetime64("2019-09-01") + 10 * np.arange(7),
        code=np.array([0, 0, 1, 1, 1], np.uint8),
        ndvi=ndvi,
    )
    red = imread(plot_profiles(profiles, tmp_path / "p.png"))[..., :3]
    drawn = (red[..., 0] > 0.95) & (red[..., 1] < 0.3) & (red[..., 2] < 0.3)
    columns = np.flatnonzero(drawn.any(axis=0))
    # One line from the first seen period to the last, and no other class has one.
    assert drawn[:, columns[0] : columns[-1] + 1].any(axis=0).all()
    assert columns[-1] - columns[0] > 100
    assert not ((red[..., 2] > 0.95) & (red[..., 0] < 0.3)).any()
    rows = write_profiles(profiles, tmp_path / "p.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 7
    assert rows[2] == "Wheat $\\frac{$,2019-09-11,1,,0.2000,"


@pytest.mark.parametrize(
    ("draw", "told"),
    [
        (lambda out: plot_rgb(np.zeros((3, 4, 5), np.uint8), out), r"\(3, 4, 5\)"),
        (lambda out: plot_classes(np.zeros(3, np.uint8), LEGEND, out), "must be"),
        (lambda out: plot_confusion(np.zeros((2, 2)), ["one"], out), "1 names"),
        (lambda out: plot_curves({}, out), "no point"),
    ],
    ids=["rgb", "classes", "confusion", "curves"],
)
def test_what_cannot_be_drawn_is_refused_and_leaves_no_file(tmp_path, draw, told):
    with pytest.raises(InputError, match=told):
        draw(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_drawing_does_not_touch_pyplot(tmp_path):
    known = sys.modules.pop("matplotlib.pyplot", None)
    try:
        plot_curves({"a": [(0, 1), (1, 2)]}, tmp_path / "c.png")
        assert "matplotlib.pyplot" not in sys.modules
    finally:
        if known is not None:
            sys.modules["matplotlib.pyplot"] = known
