"""The report is one whole page: balanced HTML, every number, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import errno
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from stcln_geo.errors import MissingFileError, OutputError
from stcln_geo.legend import Legend, LegendClass
from stcln_geo.report.html import (
    ClassScore,
    DemoReport,
    OutputFile,
    Picture,
    Scores,
    Stage,
    write_demo_report,
)
from stcln_geo.report.plots import plot_rgb

LEGEND = Legend(
    classes=(
        LegendClass(code=0, value="1", name="Wheat & rye", color="#d8a12d"),
        LegendClass(code=1, value="2", name="Maize", color="#e2711d"),
    )
)
VOID = {"meta", "img", "br", "hr", "link", "input"}


class _Page(HTMLParser):
    """Collects tags, text and loaded addresses, and checks that tags are balanced."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        if "id" in values:
            self.ids.append(values["id"])
        if tag != "a":
            self.loaded += [values[name] for name in ("src", "href", "srcset") if name in values]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += " " + data


@pytest.fixture
def report(tmp_path):
    rgb = np.full((9, 14, 3), 120, dtype=np.uint8)
    picture = Picture(
        path=plot_rgb(rgb, tmp_path / "p.png"), title="True colour", alt="Fields <from above>"
    )
    return DemoReport(
        title="Crop map of a <simulated> region",
        subtitle="24 dates, 35 fields.",
        simulated=True,
        scores=(
            Scores(
                name="Pre-trained",
                overall_accuracy=0.7812,
                macro_miou=0.6021,
                macro_f1=0.7443,
                kappa=0.7294,
                spread=0.0213,
            ),
            Scores(
                name="From scratch",
                overall_accuracy=0.7025,
                macro_miou=0.6241,
                macro_f1=0.6717,
                kappa=0.6418,
            ),
        ),
        held_out_fields=88,
        held_out_pixels=14872,
        labelled_fields=35,
        seeds=2,
        legend=LEGEND,
        maps=(picture, picture),
        curves=(picture,),
        confusions=(picture, picture),
        per_class=(
            ClassScore(
                name="Maize",
                color="#e2711d",
                fields=12,
                pixels=2345,
                iou=0.555,
                f1=0.666,
                users_accuracy=math.nan,
                producers_accuracy=0.777,
            ),
        ),
        stages=(
            Stage(name="Pre-train", seconds=195.4, note="400 steps"),
            Stage(name="Build", seconds=3.21),
        ),
        commands=("stcln-geo pretrain a.zarr --out 'b'",),
        files=(OutputFile(path="map/classes.tif", what="Class codes", size_bytes=48211),),
        facts=(("Network", "tiny"),),
        made="2026-01-31, stcln-geo 0.1.0",
    )


def _write(tmp_path, report):
    source = write_demo_report(tmp_path / "report.html", report).read_text(encoding="utf-8")
    return source, _Page(source)


def test_page_is_balanced_and_described(tmp_path, report):
    source, page = _write(tmp_path, report)
    assert source.startswith("<!DOCTYPE html>")
    assert page.open == []
    assert {"html", "head", "title", "header", "main", "table", "figure"} <= set(page.tags)
    assert page.tags.count("h1") == 1
    assert len(page.ids) == len(set(page.ids))
    assert set(re.findall(r'aria-labelledby="(\w+)"', source)) <= set(page.ids)


def test_page_loads_nothing_from_elsewhere(tmp_path, report):
    source, page = _write(tmp_path, report)
    assert len(page.images) == 5
    assert all(address.startswith("data:image/png;base64,") for address in page.loaded)
    stored = base64.b64decode(page.images[0]["src"].split(",", 1)[1])
    assert stored == report.maps[0].path.read_bytes()
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", source)


def test_pictures_have_words(tmp_path, report):
    _, page = _write(tmp_path, report)
    assert all(image["alt"] == "Fields <from above>" for image in page.images)


def test_page_holds_the_numbers(tmp_path, report):
    _, page = _write(tmp_path, report)
    text = " ".join(page.text.split())
    for shown in (
        "78.1 ± 2.1", "60.2", "74.4", "72.9", "70.2", "62.4", "67.2", "64.2",
        "+7.9", "-2.2", "+7.3", "+8.8", "88 fields (14 872 pixels)", "35 labelled fields",
        "2 seeds",
        "2 345", "55.5", "66.6", "77.7", "3 min 15 s", "3.2 s", "3 min 19 s in all", "400 steps",
        "stcln-geo pretrain a.zarr --out 'b'", "map/classes.tif", "48.2 kB", "Wheat & rye", "tiny",
        "2026-01-31, stcln-geo 0.1.0", "Crop map of a <simulated> region",
    ):  # fmt: skip
        assert shown in text, shown


def test_notices_follow_the_facts(tmp_path, report):
    simulated = "Simulated data: these accuracies say nothing about real crops"
    _, page = _write(tmp_path, report)
    assert simulated in page.text
    assert "Transductive" in page.text
    real = dataclasses.replace(report, simulated=False, transductive=False)
    _, page = _write(tmp_path, real)
    assert simulated not in page.text
    assert "Transductive" not in page.text


def test_page_without_the_optional_parts_is_whole(tmp_path, report):
    small = dataclasses.replace(
        report, scores=report.scores[:1], seeds=1, maps=(), curves=(), confusions=(),
        per_class=(), stages=(), commands=(), files=(), facts=(),
    )  # fmt: skip
    _, page = _write(tmp_path, small)
    assert page.open == []
    assert page.images == []
    assert "1 seed." in " ".join(page.text.split())
    assert "Difference" not in page.text


def test_missing_picture_is_named_and_leaves_no_page(tmp_path, report):
    lost = dataclasses.replace(report.maps[0], path=tmp_path / "lost.png")
    with pytest.raises(MissingFileError, match=r"lost\.png"):
        write_demo_report(tmp_path / "report.html", dataclasses.replace(report, maps=(lost,)))
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_one_sentence(tmp_path, report, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("before")

    def full(self, text, **options):
        self.write_bytes(text[:10].encode())
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError, match=r"report\.html: No space left.*free some space"):
        write_demo_report(page, report)
    assert page.read_bytes() == b"before"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(("simulated", "fields", "told"), [(False, 4, True), (False, 400, False)])
def test_few_held_out_fields_carry_no_claim(report, tmp_path, simulated, fields, told):
    import dataclasses

    changed = dataclasses.replace(report, simulated=simulated, held_out_fields=fields)
    page = write_demo_report(tmp_path / "page.html", changed).read_text(encoding="utf-8")
    assert ("carry no claim about accuracy" in page) is told
