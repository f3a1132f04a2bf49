"""Tables of an experiment: means over seeds with intervals, and differences of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..spreadsheet import csv_text
from .design import Design
from .scores import PUBLISHED, STRICT, Score
from .statistics import Estimate, estimate, estimate_difference

__all__ = [
    "ALL_DATA",
    "Row",
    "Table",
    "TableKind",
    "make_table",
    "mean_of_all",
    "scores_csv",
    "table_csv",
    "table_markdown",
]

TableKind = Literal["whole", "summed", "averaged", "each"]
"""What a table is of: ``whole`` of an experiment without folds; else of all folds with their
confusion matrices ``summed``, of all with their figures ``averaged``, or of ``each`` fold."""

ALL_DATA = "mean of all"
"""Name of the rows over several data sets."""

_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """An arm seen in a view, or a difference of two such."""

    data: str
    what: str
    """In words: of an arm its title, of a difference that of the pair."""
    view: str
    """In words; empty of a difference, whose title says it."""
    difference: bool
    arm: str
    """Name of the arm; of a difference that of the first."""
    view_name: str
    estimates: dict[str, Estimate]
    """By figure."""
    folds: dict[str, Estimate] = field(default_factory=dict)
    """Of a mean over folds, by figure: over folds, each with its mean over seeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One reading of an experiment."""

    reading: str
    """``strict``, or ``published`` with the name of its rule."""
    figures: tuple[str, ...]
    rows: tuple[Row, ...]
    kind: TableKind = "whole"

    @property
    def file(self) -> str:
        """Name of its CSV."""
        stem = "table" if self.kind in ("whole", "each") else f"folds-{self.kind}"
        return f"{stem}{'' if self.reading == 'strict' else '-published'}.csv"

    def row(self, arm: str, view: str, data: str | None = None) -> Row:
        """Return the row of an arm in a view; by default over all data."""
        return next(
            row for row in self.rows
            if not row.difference and (row.arm, row.view_name) == (arm, view)
            and data in (None, row.data)
        )  # fmt: skip

    @property
    def differences(self) -> tuple[Row, ...]:
        """The rows that compare."""
        return tuple(row for row in self.rows if row.difference)


def make_table(design: Design, scores: Sequence[Score], *, published: bool = False) -> Table:
    """Put the scores of one reading into a table.

    Of several data sets, first comes the mean over them, seed by seed, then each by itself.
    """
    names = list(dict.fromkeys(score.data for score in scores))
    figures = PUBLISHED if published else STRICT
    rules = {score.rule for score in scores if score.rule is not None}
    reading = "strict"
    if published:
        reading = f"published ({', '.join(sorted(rules))})"
    rows: list[Row] = []
    for data in [ALL_DATA, *names] if len(names) > 1 else names:
        # By figure, arm and view: one value a seed.
        values: dict[str, dict[tuple[str, str], dict[int, float | None]]] = {}
        for figure in figures:
            cells: dict[tuple[str, str], dict[int, list[float | None]]] = {}
            for score in scores:
                if data in (ALL_DATA, score.data):
                    own = score.published if published else score.figures
                    cell = cells.setdefault((score.arm, score.view), {})
                    cell.setdefault(score.seed, []).append(own.get(figure))
            values[figure] = {
                key: {seed: mean_of_all(found) for seed, found in cell.items()}
                for key, cell in cells.items()
            }
        for view in design.views:
            for arm in design.arms:
                key = (arm.name, view.name)
                if key in values[figures[0]]:
                    rows.append(
                        Row(
                            data=data, what=arm.title, view=view.title, difference=False,
                            arm=arm.name, view_name=view.name,
                            estimates={
                                figure: estimate(list(values[figure][key].values()))
                                for figure in figures
                            },
                        )
                    )  # fmt: skip
        rows += [
            Row(
                data=data, what=pair.title, view="", difference=True, arm=pair.first[0],
                view_name=pair.first[1],
                estimates={
                    figure: estimate_difference(
                        values[figure].get(pair.first, {}), values[figure].get(pair.second, {})
                    )
                    for figure in figures
                },
            )
            for pair in design.pairs
        ]  # fmt: skip
    return Table(reading=reading, figures=figures, rows=tuple(rows))


def table_csv(table: Table) -> str:
    """Write a table as CSV: for each figure count, mean, deviation and both ends.

    Of a mean over folds also the number of folds and the deviation between them.
    """
    head = ["data", "row", "kind", "view"]
    # Two ways to pool never share the name of a column.
    way = "" if table.kind in ("whole", "each") else f"{table.kind}_"
    for figure in table.figures:
        head += [f"{way}{figure}_{part}" for part in ("n", "mean", "sd", "low95", "high95")]
        head += [f"{figure}_{part}_over_folds" for part in ("n", "sd") if table.kind == "averaged"]
    lines = []
    for row in table.rows:
        cells: list[object] = [
            row.data, row.what, "difference" if row.difference else "mean", row.view
        ]  # fmt: skip
        for figure in table.figures:
            found = row.estimates[figure]
            cells += [
                found.count,
                *(_number(v) for v in (found.mean, found.deviation, found.low, found.high)),
            ]
            if table.kind == "averaged":
                cells += [row.folds[figure].count, _number(row.folds[figure].deviation)]
        lines.append(cells)
    return csv_text([head, *lines])


def scores_csv(scores: Sequence[Score]) -> str:
    """Write the figures of each run as CSV; the columns of the two readings bear their names."""
    rules = sorted({score.rule for score in scores if score.rule is not None})
    head = ["data", "arm", "view", "seed", "season", "dates", "fields", "pixels", "unseen_pixels"]
    head += [f"strict_{name}" for name in STRICT]
    head += [f"published_{rule}_{name}" for rule in rules for name in PUBLISHED]
    lines = [
        [
            score.data, score.arm, score.view, score.seed, score.season, score.dates, score.fields,
            score.pixels, score.unseen,
            *(_number(score.figures[name]) for name in STRICT),
            *(
                _number(score.published[name]) if score.rule == rule else ""
                for rule in rules for name in PUBLISHED
            ),
        ]
        for score in scores
    ]  # fmt: skip
    return csv_text([head, *lines])


def table_markdown(table: Table, *, differences: bool) -> str:
    """Write the means of a table, or its differences, as a Markdown table.

    A cell holds the mean, the standard deviation between seeds, and the 95 % interval; of a mean
    over folds also the standard deviation between folds.
    """
    rows = [row for row in table.rows if row.difference == differences]
    several = len({row.data for row in rows}) > 1
    viewed = not differences and len({row.view for row in rows}) > 1
    head = [*(["data"] if several else []), "difference" if differences else "arm"]
    if viewed:
        head.append("fold" if table.kind == "each" else "view")
    head += ["seeds", *(name.replace("_", " ") for name in table.figures)]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [*([row.data] if several else []), row.what, *([row.view] if viewed else [])]
        cells.append(str(max(found.count for found in row.estimates.values())))
        cells += [
            say_estimate(row.estimates[name], signed=differences, folds=row.folds.get(name))
            for name in table.figures
        ]
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def say_estimate(found: Estimate, *, signed: bool = False, folds: Estimate | None = None) -> str:
    """Say a mean, with deviation and interval where there are any."""
    if found.mean is None:
        return "-"
    sign = "+" if signed else ""
    text = f"{found.mean:{sign}.{_DIGITS}f}"
    if folds is not None and folds.deviation is not None:
        text += f", sd over folds {folds.deviation:.{_DIGITS}f}"
    if found.low is None or found.high is None or found.deviation is None:
        return text
    return (
        f"{text} (sd {found.deviation:.{_DIGITS}f}; {found.low:{sign}.{_DIGITS}f} to "
        f"{found.high:{sign}.{_DIGITS}f})"
    )


def mean_of_all(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where one value is missing, so that all means are of the same data."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def by_seed(scores: Sequence[Score], arm: str, view: str) -> Mapping[int, float]:
    """Return the macro mIoU of each seed of an arm in a view, over all data."""
    found: dict[int, list[float]] = {}
    for score in scores:
        value = score.figures["macro_miou"]
        if (score.arm, score.view) == (arm, view) and value is not None:
            found.setdefault(score.seed, []).append(value)
    return {seed: float(np.mean(values)) for seed, values in found.items()}
