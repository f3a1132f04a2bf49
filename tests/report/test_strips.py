"""Strips show truth, what was hidden, and what was filled in; the page holds them and balances."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread

from stcln_geo.errors import InputError, MissingFileError
from stcln_geo.report.html import Picture
from stcln_geo.report.pretraining import PretrainingReport, write_pretraining_report
from stcln_geo.report.strips import CLOUD_COLOR, HIDDEN_COLOR, plot_strip

VOID = {"meta", "img", "br"}


def strip():
    """Two dates of 6 x 9 px: dark left, bright right; a cloud and a hidden square on the second."""
    truth = np.full((2, 3, 6, 9), 0.1, dtype=np.float32)
    truth[..., 5:] = 0.5
    truth[1, :, :2, :2] = np.nan
    hidden = np.zeros(truth.shape, dtype=bool)
    hidden[1, 2, 3:6, 6:9] = True
    made = np.where(hidden, np.float32(0.1), truth)
    return truth, made, hidden


def colour(image, *, row, date, y, x):
    """The colour at a pixel of a chip: strips begin 0.9 inch from the left, 0.3 from the top."""
    step_x, step_y = 1.05 + 0.06, 1.05 * 6 / 9 + 0.06
    left = 0.9 + date * step_x + 1.05 * (x + 0.5) / 9
    top = 0.3 + row * step_y + 1.05 * 6 / 9 * (y + 0.5) / 6
    found = image[int(top * 144), int(left * 144), :3]
    return "#" + "".join(f"{round(255 * float(part)):02x}" for part in found)


def test_a_strip_shows_truth_hidden_and_filled_in(tmp_path):
    truth, made, hidden = strip()
    image = imread(
        plot_strip(truth, made, hidden, ["2019-04-01", "2019-05-01"], tmp_path / "a.png")
    )
    for row in range(3):
        assert colour(image, row=row, date=0, y=3, x=1) == "#000000"
        assert colour(image, row=row, date=0, y=1, x=7) == "#ffffff"
        assert colour(image, row=row, date=1, y=0, x=0) == CLOUD_COLOR
    assert colour(image, row=0, date=1, y=4, x=7) == "#ffffff"
    assert colour(image, row=1, date=1, y=4, x=7) == HIDDEN_COLOR
    assert colour(image, row=1, date=1, y=2, x=7) == "#ffffff"
    # Only the band shown as blue was hidden, and filled in as dark.
    assert colour(image, row=2, date=1, y=4, x=7) == "#ffff00"


def test_a_strip_of_nothing_clear_is_drawn_and_one_of_no_date_refused(tmp_path):
    nothing = np.full((1, 3, 5, 4), np.nan, dtype=np.float32)
    hidden = np.zeros(nothing.shape, dtype=bool)
    assert plot_strip(nothing, nothing, hidden, ["2019-04-01"], tmp_path / "b.png").exists()
    with pytest.raises(InputError, match=r"\(0, 3, 5, 4\) on 0 dates"):
        plot_strip(nothing[:0], nothing[:0], hidden[:0], [], tmp_path / "c.png")


class Page(HTMLParser):
    """Collects text and loaded addresses, and checks that tags are balanced."""

    def __init__(self, source):
        super().__init__()
        self.open, self.loaded, self.text = [], [], ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += " " + data


def error_rows():
    found = {"usable": 900, "hidden": 300, "error": 0.25, "rmse": 0.0123}
    never = {"usable": 800, "hidden": 0, "error": None, "rmse": None}
    none = {"usable": 0, "hidden": 0, "error": None, "rmse": None}
    months = {"all": found, "05": found, "11": never}
    return [
        {"month": month, "band": band, **(never if band == "swir16" else months.get(month, none))}
        for month in ("all", *(f"{one:02d}" for one in range(1, 13)))
        for band in ("all", "nir", "swir16")
    ]


def report(picture, **changes):
    return PretrainingReport(
        **{
            "title": "run <1>",
            "run": {
                "steps": 40, "best_step": 30, "stopped_early": False, "chips": 1200,
                "validation_chips": 64, "global_batch": 8, "seconds": 75.0,
                "notes": ["Bands: nir & swir16."],
                "data": {"chips_left_out_cloudy": 17, "chip_dates": 90, "chip_dates_empty": 12},
                "bad_chunks": ["one", "two", "three"],
            },
            "environment": {
                "device": "cpu", "precision": "float32",
                "cubes": [
                    {"cube": f"{one}.zarr", "season": "2018-09-01", "dates": 9, "crs": "EPSG:32631"}
                    for one in range(45)
                ],
            },
            "config": {
                "seed": 0, "data": {"chip": 32}, "model": {"bands": ["nir", "swir16"]},
                "masking": {"strategy": "tube", "block": 6, "mask_ratio": 0.5, "gate": False},
            },
            "errors": error_rows(),
            "hidden_share": 0.31,
            "first_month": 9,
            "curves": None,
            "chips": [Picture(path=picture, title="In <true> colour", alt="A chip")],
            **changes,
        }
    )  # fmt: skip


def test_the_page_says_what_was_measured_and_what_was_not(tmp_path):
    picture = plot_strip(*strip(), ["2019-04-01", "2019-05-01"], tmp_path / "a.png")
    source = write_pretraining_report(tmp_path / "report.html", report(picture)).read_text()
    page = Page(source)
    words = " ".join(page.text.split())
    for told in (
        "run <1>", "squares of 6 px on all dates, with a chance of 0.5", "0.250",
        "RMSE 0.0123 in reflectance", "swir16 800 0 never hidden",
        "November 800 0 never hidden", "May 900 300 0.250", "August 0 0 no clear date",
        "Chips with too few clear dates 17", "12 of 90", "Damaged chunks 3", "and 5 more",
        "Bands: nir & swir16.", "In <true> colour", "75 s", "31.0 %",
    ):  # fmt: skip
        assert told in words, told
    assert words.index("September") < words.index("January") < words.index("August")
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    assert len(page.loaded) == 1


def test_a_page_without_figures_says_so_and_a_missing_picture_is_named(tmp_path):
    bare = report(tmp_path / "none.png", errors=[], chips=[], hidden_share=None)
    page = Page(write_pretraining_report(tmp_path / "report.html", bare).read_text())
    assert "No chip was held out." in page.text
    assert "Errors per" not in page.text
    with pytest.raises(MissingFileError, match=r"none\.png"):
        write_pretraining_report(tmp_path / "again.html", report(tmp_path / "none.png"))
