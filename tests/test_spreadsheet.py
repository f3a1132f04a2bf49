"""What a spreadsheet program would compute is text in our tables, and comes back as it was."""

import csv

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stcln_geo.legend import Legend
from stcln_geo.predict.style import write_legend
from stcln_geo.spreadsheet import csv_text, from_cell

FORMULAS = ["=1+1", "@SUM(A1)", "-", "+cmd|' /C calc'!A0", "\t=1", "-2+3", "＝1"]  # noqa: RUF001


@pytest.mark.parametrize("text", FORMULAS)
def test_no_cell_begins_like_a_formula(text):
    ((cell, count),) = csv.reader(csv_text([[text, -3]]).splitlines())
    assert cell == f"'{text}"
    assert count == "-3", "a number is no formula"


@pytest.mark.parametrize("text", ["-1", "+2.5e-3", "wheat", "maize = corn", "'s-Gravenhage", ""])
def test_numbers_and_plain_words_stay_as_they_are(text):
    assert next(csv.reader([csv_text([[text, 1]])]))[0] == text


@given(st.text(st.sampled_from("'=+-@1.ea \"\t"), max_size=6))
def test_every_text_comes_back(text):
    ((cell, _),) = csv.reader([csv_text([[text, 1]])])
    assert not cell.startswith(("=", "@", "\t"))
    assert from_cell(cell) == text


def test_a_legend_with_formulas_for_names_reads_back_equal(tmp_path):
    rows = [{"value": f"-{code}", "name": name} for code, name in enumerate(FORMULAS)]
    legend = Legend.from_rows([*rows, {"value": "@x", "name": "'=1"}], source="t")

    write_legend(tmp_path, legend)

    cells = [row["name"] for row in csv.DictReader((tmp_path / "legend.csv").open())]
    assert all(cell.startswith("'") for cell in cells)
    assert Legend.read(tmp_path / "legend.csv") == legend
    assert Legend.read(tmp_path / "legend.json") == legend
