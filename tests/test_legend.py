from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from stcln_geo.cog.names import names_xml
from stcln_geo.errors import LabelError, MissingFileError
from stcln_geo.legend import Legend, plain_names
from stcln_geo.predict.style import write_legend, write_style


def test_round_trip_through_json():
    legend = Legend.from_rows(
        [{"value": 1110, "name": "winter wheat", "color": "#e3b5c7"}, {"value": "x"}], source="t"
    )
    assert Legend.from_json(legend.to_json()) == legend
    assert legend.names == ("winter wheat", "x")
    assert legend.colormap()[0] == (0xE3, 0xB5, 0xC7, 255)


def test_read_csv_and_json(tmp_path):
    (tmp_path / "legend.csv").write_text("value,name,color\n7,wheat,#aabbcc\n9,maize,\n")
    legend = Legend.read(tmp_path / "legend.csv")
    assert [entry.value for entry in legend.classes] == ["7", "9"]
    (tmp_path / "legend.json").write_text(legend.to_json())
    assert Legend.read(tmp_path / "legend.json") == legend


GROUPS = (
    "value,name,color\n1110,Wheat,#d8a12d\n1200,Maize,\n1111, Wheat ,\n8100,,\n"
    "spelt,Wheat,#000000\n"
)


def test_rows_of_one_name_are_one_class(tmp_path):
    (tmp_path / "legend.csv").write_text(GROUPS)
    legend = Legend.read(tmp_path / "legend.csv")
    assert legend.names == ("Wheat", "Maize", "8100")
    assert [entry.values for entry in legend.classes] == [
        ("1110", "1111", "spelt"),
        ("1200",),
        ("8100",),
    ]
    assert legend.classes[0].color == "#d8a12d"
    assert legend.find("1111") == legend.find("spelt") == legend.classes[0]
    assert Legend.from_json(legend.to_json()) == legend
    (tmp_path / "legend.json").write_text(legend.to_json())
    assert Legend.read(tmp_path / "legend.json") == legend
    assert legend.keep({"1110"}).classes[0].values == ("1110", "1111", "spelt")


def test_classes_with_codes_of_their_own_are_not_put_together(tmp_path):
    """The legend of a map made before, which may have two classes of one name."""
    (tmp_path / "legend.csv").write_text("code,value,name\n0,1110,Wheat\n1,1111,Wheat\n")
    assert len(Legend.read(tmp_path / "legend.csv")) == 2


@pytest.mark.parametrize("sign", [";", "\t"], ids=["semicolon", "tab"])
def test_a_table_of_excel_has_semicolons_or_tabs(tmp_path, sign):
    (tmp_path / "a.csv").write_text(GROUPS)
    (tmp_path / "b.csv").write_text(GROUPS.replace(",", sign))
    assert Legend.read(tmp_path / "b.csv") == Legend.read(tmp_path / "a.csv")


def test_a_csv_of_excel_begins_with_a_byte_order_mark(tmp_path):
    (tmp_path / "legend.csv").write_text("value,name\n7,wheat\n9,maize\n", encoding="utf-8-sig")
    assert Legend.read(tmp_path / "legend.csv").names == ("wheat", "maize")


def test_names_are_one_line_that_xml_can_hold():
    names = ["\twinter\r\n wheat ", "peas\x0b& <beans>", "bell\x07", "Maïs \N{GRINNING FACE}"]
    legend = Legend.from_rows(
        [{"value": f"v\n{n}", "name": name} for n, name in enumerate(names)], source="t"
    )
    assert legend.names == ("winter wheat", "peas & <beans>", "bell", "Maïs \N{GRINNING FACE}")
    assert legend.classes[0].value == "v\n0", "as the source has it"
    root = ElementTree.fromstring(f"<band>{names_xml(legend)}</band>")
    assert tuple(entry.text for entry in root.iter("Category")) == legend.names
    assert Legend.from_values(["winter\nwheat"]).names == ("winter wheat",)


@pytest.mark.parametrize("sign", ["\x00", "\x1b", "\ud800", "\ufffe", "\uffff"], ids=ascii)
def test_no_name_breaks_the_style_of_a_map(tmp_path, sign):
    text = json.dumps([{"value": "1", "name": f'a{sign}<b> & "c"'}, {"value": "2"}])
    (tmp_path / "legend.json").write_text(text)
    legend = Legend.read(tmp_path / "legend.json")
    write_style(tmp_path / "classes.qml", legend)
    write_legend(tmp_path, legend)
    entries = ElementTree.parse(tmp_path / "classes.qml").getroot().iter("paletteEntry")
    assert [entry.get("label") for entry in entries] == ['a <b> & "c"', "2"]


def test_keep_makes_codes_dense_again():
    legend = Legend.from_values(["a", "b", "c"]).keep({"a", "c"})
    assert [(entry.code, entry.value) for entry in legend.classes] == [(0, "a"), (1, "c")]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("value,name,color\n1,a,red\n", "colours are written #rrggbb"),
        ("value,name\n1,a\n1,b\n", "stand twice"),
        ("name\nwheat\n", "lacks 'value'"),
        ("value\n", "holds no class"),
        ("value,name\n1,a\n1,a\n", "stand twice"),
        ("value,name,ignored\n1,a,\n2,a,true\n", "'a' some are ignored and some are not"),
        ("value,name\n1,a\n2,a\n,a\n", "row 3 lacks 'value'"),
    ],
    ids=["colour", "repeated", "no-value", "empty", "row-twice", "half-ignored", "third-row"],
)
def test_bad_legends_are_explained(tmp_path, text, match):
    path = tmp_path / "legend.csv"
    path.write_text(text)
    with pytest.raises(LabelError, match=match):
        Legend.read(path)


def test_missing_legend(tmp_path):
    with pytest.raises(MissingFileError, match="there is no such file"):
        Legend.read(tmp_path / "nothing.csv")


def test_a_class_is_found_by_name_then_value_then_code():
    legend = Legend.from_rows(
        [{"value": "7", "name": "wheat"}, {"value": "0", "name": "maize"}, {"value": "wheat"}],
        source="t",
    )
    assert [legend.find(wanted).code for wanted in ("wheat", "0", "1", 0, 2)] == [0, 1, 1, 0, 2]
    for wanted in ("9", 9, -1, "rye"):
        with pytest.raises(LabelError, match=rf"Cannot find the class '{wanted}'.*0 wheat"):
            legend.find(wanted)


def test_ignored_classes_come_last_and_are_no_classes(tmp_path):
    path = tmp_path / "legend.csv"
    path.write_text("value,name,ignored\n19,void,yes\n0,background,\n1,meadow,no\n")

    legend = Legend.read(path)

    assert len(legend) == 2
    assert legend.names == ("background", "meadow")
    assert set(legend.colormap()) == {0, 1}
    assert [(entry.code, entry.value) for entry in legend.ignored] == [(2, "19")]
    assert Legend.from_json(legend.to_json()) == legend
    kept = legend.keep({"1"})
    assert (kept.names, [entry.code for entry in kept.ignored]) == (("meadow",), [1])
    with pytest.raises(LabelError, match="holds no class"):
        Legend.from_rows([{"value": 1, "ignored": True}], source="t")
    with pytest.raises(LabelError, match="those of ignored classes last"):
        Legend(legend.classes, legend.classes)


def test_plain_names_are_of_admitted_letters_and_each_of_one_code():
    names = dict(enumerate(["wheat, winter", "wheat (winter)", "maïs", "...", "озимая", "Oats_2"]))
    found = plain_names(names)
    assert list(found) == list(names)
    assert all(re.fullmatch(r"[0-9A-Za-z_-]+", name) for name in found.values())
    assert len(set(found.values())) == len(names)
    assert found[5] == "Oats_2"
