"""Write CSV tables that spreadsheet programs show and never run.

A cell that begins like a formula is computed when a spreadsheet opens the file, and names of
classes come from files of others. Such text gets an apostrophe in front, as OWASP recommends
against CSV injection; :func:`from_cell` takes it away again.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable

__all__ = ["csv_text", "from_cell"]

_FORMULA = re.compile(r"'*[=+\-@\t\r＝＋－＠]")  # noqa: RUF001 - wide signs count as well
"""How a formula begins; with apostrophes, so that text which has some already comes back whole."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def csv_text(rows: Iterable[Iterable[object]]) -> str:
    r"""Return rows as CSV, one a line.

    Text that a spreadsheet would take for a formula begins with an apostrophe there; numbers,
    also those that are given as text, stay as they are.

    >>> csv_text([["-1", "=A1", "wheat"]])
    "-1,'=A1,wheat\n"
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [_to_cell(value) for value in row] for row in rows
    )
    return text.getvalue()


def from_cell(text: str) -> str:
    """Return the text that a cell stands for: without the apostrophe before a formula."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def _to_cell(value: object) -> object:
    if not isinstance(value, str) or _NUMBER.fullmatch(value) or not _FORMULA.match(value):
        return value
    return f"'{value}"
