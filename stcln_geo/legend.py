"""Legends: class codes, source values, names and colours."""

from __future__ import annotations

import csv
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import LabelError, MissingFileError
from .spreadsheet import from_cell

__all__ = ["CLASS_NODATA", "PALETTE", "UNLABELLED", "Legend", "LegendClass", "plain_names"]

UNLABELLED = 255
"""Code of a pixel without a label, in a cube's ``labels``."""

CLASS_NODATA = 255
"""Nodata of class maps: outside the region, or without enough clear dates."""

PALETTE = (
    "#e3b505", "#2f7d4f", "#b5543c", "#4f7cac", "#8f5fa8", "#98c14b", "#d98a2b", "#3aa6a0",
    "#c65b7c", "#7a6a4f", "#f0d777", "#5b4b8a", "#6fbf73", "#a63d2f", "#8ab6d6", "#d3a6c8",
    "#4b5d67", "#c2b280", "#1f5f8b", "#e07a5f",
)  # fmt: skip
"""Colours given to classes that come without one, in order of their codes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendClass:
    """One class of a legend.

    Parameters
    ----------
    code
        Dense code, 0 to K-1: the network's output channel and the map's pixel value.
    value
        The value in the source (vector column), as text.
    name
        Name shown to people.
    color
        ``#rrggbb``.
    also
        Further values in the source that mean the same class.
    """

    code: int
    value: str
    name: str
    color: str
    also: tuple[str, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """All values in the source that mean this class."""
        return (self.value, *self.also)

    def __post_init__(self) -> None:
        """Check the colour and the code."""
        if not re.fullmatch(r"#[0-9a-fA-F]{6}", self.color):
            raise LabelError(
                f"Cannot use the colour {self.color!r} of class {self.name!r}: colours are written "
                "#rrggbb. Correct it in the legend file."
            )
        if not 0 <= self.code < UNLABELLED:
            raise LabelError(
                f"Cannot use class code {self.code} of {self.name!r}: codes are 0 to 254 "
                "(255 means unlabelled). Merge classes to have fewer."
            )


@dataclass(frozen=True, slots=True)
class Legend:
    """The classes of a map, in order of their dense codes 0 to K-1.

    ``len``, names, codes and colours are of these classes alone: of what a network tells apart.
    """

    classes: tuple[LegendClass, ...]
    ignored: tuple[LegendClass, ...] = ()
    """What labels may say that is neither learnt nor judged, as PASTIS's void: codes from K on."""

    def __post_init__(self) -> None:
        """Check that codes are dense and values distinct."""
        every = (*self.classes, *self.ignored)
        if [entry.code for entry in every] != list(range(len(every))):
            raise LabelError(
                f"Cannot use a legend with codes {[entry.code for entry in every]}: codes "
                "must run 0, 1, 2, ... in order, those of ignored classes last. Build it with "
                "Legend.from_values or Legend.from_rows."
            )
        values = [value for entry in every for value in entry.values]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise LabelError(
                f"Cannot use a legend in which the values {twice} stand twice: each source value "
                "belongs to one class. Remove the repeated rows."
            )

    def __len__(self) -> int:
        """Return the number of classes."""
        return len(self.classes)

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in order of code."""
        return tuple(entry.name for entry in self.classes)

    @property
    def codes(self) -> tuple[int, ...]:
        """Class codes, 0 to K-1."""
        return tuple(entry.code for entry in self.classes)

    def find(self, wanted: str | int) -> LegendClass:
        """Return the class of a name, else of a source value, else of a code.

        Raises
        ------
        LabelError
            If there is none.
        """
        text = str(wanted)
        if not isinstance(wanted, int):
            for entry in self.classes:
                if entry.name == text:
                    return entry
            for entry in self.classes:
                if text in entry.values:
                    return entry
        if text.isdecimal() and int(text) < len(self):
            return self.classes[int(text)]
        known = ", ".join(f"{entry.code} {entry.name}" for entry in self.classes)
        raise LabelError(
            f"Cannot find the class {text!r}: the legend has {known}. Give a name, a source value "
            "or a code of the legend."
        )

    def colormap(self) -> dict[int, tuple[int, int, int, int]]:
        """Return ``{code: (red, green, blue, 255)}``, 0 to 255 each."""
        return {
            entry.code: (
                int(entry.color[1:3], 16),
                int(entry.color[3:5], 16),
                int(entry.color[5:7], 16),
                255,
            )
            for entry in self.classes
        }

    def keep(self, values: set[str]) -> Legend:
        """Return the legend of some of the classes, codes dense again, order kept."""
        kept = [entry for entry in self.classes if entry.value in values]
        every = [replace(entry, code=code) for code, entry in enumerate((*kept, *self.ignored))]
        return Legend(tuple(every[: len(kept)]), tuple(every[len(kept) :]))

    def to_json(self) -> str:
        """Return the legend as JSON text: a list of value, name and color by code.

        Classes of several values have the further ones in ``"also"``; ignored classes have
        ``"ignored": true``.
        """
        rows: list[dict[str, object]] = [
            {"code": entry.code, "value": entry.value, "name": entry.name, "color": entry.color}
            | ({"also": list(entry.also)} if entry.also else {})
            for entry in (*self.classes, *self.ignored)
        ]
        for row in rows[len(self.classes) :]:
            row["ignored"] = True
        return json.dumps(rows, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Legend:
        """Read what ``to_json`` wrote."""
        return cls.from_rows(json.loads(text), source="legend JSON")

    @classmethod
    def from_values(cls, values: list[str]) -> Legend:
        """Make a legend with names equal to the values and colours from the palette."""
        return cls.from_rows([{"value": value} for value in values], source="values")

    @classmethod
    def from_rows(cls, rows: list[dict[str, object]], *, source: str) -> Legend:
        """Make a legend from rows with ``value`` and, if wanted, ``name`` and ``color``.

        Line breaks and other control characters in names become spaces: tables of attributes have
        them, and the XML in which GIS programs read names has not. So do halves of characters.

        Rows whose ``ignored`` is true, in whatever place, get the last codes.
        """
        rows = sorted(rows, key=_is_ignored)
        learnt = sum(not _is_ignored(row) for row in rows)
        if not learnt:
            raise LabelError(
                f"Cannot make a legend from {source}: it holds no class. "
                "Give at least two rows with a value."
            )
        classes = []
        for code, row in enumerate(rows):
            value = row.get("value")
            if value is None or str(value) == "":
                raise LabelError(
                    f"Cannot make a legend from {source}: row {code + 1} lacks 'value'. The "
                    "columns are value, name, color; only value is required."
                )
            classes.append(
                LegendClass(
                    code=code,
                    value=str(value),
                    name=_in_one_line(str(row.get("name") or "")) or _in_one_line(str(value)),
                    color=str(row.get("color") or PALETTE[code % len(PALETTE)]),
                    also=tuple(str(more) for more in _listed(row.get("also"))),
                )
            )
        return cls(tuple(classes[:learnt]), tuple(classes[learnt:]))

    @classmethod
    def read(cls, path: str | Path) -> Legend:
        """Read a legend file: ``.csv`` or ``.json`` with value, name, color, ignored.

        Rows of one name are one class of several values, so that crops can be grouped: the colour
        is that of the first row which has one. The legends that maps come with say the code of
        each class, and are taken as they are. A ``.csv`` may have semicolons or tabs.

        Raises
        ------
        MissingFileError
            If there is no such file.
        LabelError
            If the file is not a legend.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(
                f"Cannot read the legend {path}: there is no such file. Give a .csv or .json file "
                "with the columns value, name, color."
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
            rows = json.loads(text) if path.suffix == ".json" else _table(text)
            if not all(isinstance(row, dict) for row in rows):
                raise TypeError("rows are not records")
        except (ValueError, TypeError, csv.Error) as error:
            raise LabelError(
                f"Cannot read the legend {path}: {error}. It must be a .csv with the header "
                "value,name,color, or a .json list of such records."
            ) from error
        return cls.from_rows(_grouped(rows, source=str(path)), source=str(path))


def plain_names(names: Mapping[int, str]) -> dict[int, str]:
    """Return a name of each code in the letters that STAC's classification extension admits.

    Names that come out as one get their codes behind.

    >>> plain_names({0: "wheat, winter", 1: "wheat (winter)", 2: "maïs", 3: "..."})
    {0: 'wheat-winter-0', 1: 'wheat-winter-1', 2: 'ma-s', 3: 'class-3'}
    """
    plain = {
        code: re.sub(r"[^0-9A-Za-z_-]+", "-", name).strip("-") or f"class-{code}"
        for code, name in names.items()
    }
    used = Counter(plain.values())
    return {code: f"{name}-{code}" if used[name] > 1 else name for code, name in plain.items()}


def _table(text: str) -> list[dict[str, object]]:
    """Read a table whose columns part at commas, or else at what its first line has."""
    header = next(iter(text.splitlines()), "")
    parted = next((sign for sign in ",;\t" if sign in header), ",")
    rows = csv.DictReader(text.splitlines(), delimiter=parted, skipinitialspace=True)
    return [
        {key: from_cell(cell) if isinstance(cell, str) else cell for key, cell in row.items()}
        for row in rows
    ]


def _grouped(rows: list[dict[str, object]], *, source: str) -> list[dict[str, object]]:
    """Put rows of the same name together, unless they say codes of their own."""
    if any("code" in row or row.get("value") in (None, "") for row in rows):
        return rows
    groups: dict[str, dict[str, object]] = {}
    for row in rows:
        name = _in_one_line(str(row.get("name") or "")) or _in_one_line(str(row["value"]))
        if name not in groups:
            groups[name] = dict(row)
            continue
        group = groups[name]
        if _is_ignored(group) != _is_ignored(row):
            raise LabelError(
                f"Cannot make a legend from {source}: of the rows named {name!r} some are ignored "
                "and some are not, and rows of one name are one class. Give the ignored ones "
                "another name."
            )
        group["also"] = [*_listed(group.get("also")), row["value"], *_listed(row.get("also"))]
        group["color"] = group.get("color") or row.get("color")
    return list(groups.values())


def _listed(also: object) -> list[object]:
    return also if isinstance(also, list) else []


def _in_one_line(text: str) -> str:
    """Return a text without what XML forbids, its words parted by single spaces."""
    plain = "".join(
        " " if unicodedata.category(sign) in {"Cc", "Cs"} or sign in "\ufffe\uffff" else sign
        for sign in text
    )
    return " ".join(plain.split())


def _is_ignored(row: dict[str, object]) -> bool:
    """Return True where a row says so: true in JSON; true, yes or 1 in CSV."""
    return str(row.get("ignored") or "").strip().lower() in ("true", "yes", "1")
