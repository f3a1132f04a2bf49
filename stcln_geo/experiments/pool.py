"""The folds of a protocol as one result, in the two ways that are in use; they are never mixed.

*Added up*: the confusion matrices of all folds are added up, and figures derived from the sum. A
class counts by all its pixels, wherever they lie. The authors of PASTIS score so. *Averaged*: each
fold has its figures, and their mean is taken. A fold counts as much as any other.

Both come to one value a seed first, so that means, deviations and intervals over seeds are those
of other experiments. The deviation over folds is told beside, and no interval over folds: their
training parts overlap, so that they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..report.calibration import Calibration
from ..report.metrics import metrics_from_confusion
from .design import Design, Pair, View
from .rounds import Pooling
from .scores import PUBLISHED, STRICT, Counts, Score, read_published
from .statistics import Estimate, estimate
from .table import Row, Table, make_table, mean_of_all

__all__ = ["ALL_FOLDS", "add_up", "average", "make_tables", "pooled_design"]

ALL_FOLDS = "all-folds"
"""Name of the view that has all folds."""


def make_tables(design: Design, scores: Sequence[Score], pooling: Pooling) -> tuple[Table, ...]:
    """Put scores into tables: of each reading that of all folds added up, averaged, and each fold.

    Without folds there is one table of each reading.
    """
    readings = [False, *([True] if any(score.rule is not None for score in scores) else [])]
    tables = []
    for published in readings:
        each = make_table(design, scores, published=published)
        if pooling == "none":
            tables.append(each)
            continue
        whole = pooled_design(design)
        if pooling == "both":
            summed = make_table(whole, add_up(scores), published=published)
            tables.append(replace(summed, kind="summed"))
        mean = make_table(whole, average(scores), published=published)
        tables.append(
            replace(mean, kind="averaged", rows=tuple(_with_folds(row, each) for row in mean.rows))
        )
        tables.append(replace(each, kind="each"))
    return tuple(tables)


def pooled_design(design: Design) -> Design:
    """Return the design in which all folds are one view."""
    pairs = {(pair.first[0], pair.second[0]): pair for pair in design.pairs}
    return replace(
        design,
        views=(View(name=ALL_FOLDS, title="all folds"),),
        pairs=tuple(
            Pair(first=(first, ALL_FOLDS), second=(second, ALL_FOLDS),
                 title=pair.title.partition(",")[0])
            for (first, second), pair in pairs.items()
        ),
    )  # fmt: skip


def add_up(scores: Sequence[Score]) -> list[Score]:
    """Return a score for all folds of each data set, arm and seed, from what they count together.

    Each run must hold its counts.
    """

    def summed(folds: Sequence[Score]) -> Score:
        counts = [one.counts for one in folds if one.counts is not None]
        confusion = np.sum([one.confusion for one in counts], axis=0)
        placed = [one.placed for one in counts if one.placed is not None]
        together = None if not placed else np.sum(placed, axis=0)
        calibration = Calibration()
        for one in counts:
            calibration.add_bins(one.bins)
        figures = metrics_from_confusion(confusion).summary()
        figures[STRICT[-1]] = calibration.error
        return replace(
            folds[0],
            figures={name: figures[name] for name in STRICT},
            published=read_published(folds[0].rule, together),
            counts=Counts(
                confusion=confusion, placed=together, bins=tuple(calibration.to_json())
            ),
        )  # fmt: skip

    return _over_folds(scores, summed)


def average(scores: Sequence[Score]) -> list[Score]:
    """Return a score for all folds of each data set, arm and seed: the mean of their figures.

    A figure that one fold lacks has no mean.
    """

    def averaged(folds: Sequence[Score]) -> Score:
        return replace(
            folds[0],
            figures={name: mean_of_all([one.figures[name] for one in folds]) for name in STRICT},
            published={
                name: mean_of_all([one.published.get(name) for one in folds]) for name in PUBLISHED
            }
            if folds[0].rule is not None
            else {},
            counts=None,
        )

    return _over_folds(scores, averaged)


def _over_folds(
    scores: Sequence[Score], together: Callable[[Sequence[Score]], Score]
) -> list[Score]:
    groups: dict[tuple[str, str, int], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.data, score.arm, score.seed), []).append(score)
    return [
        replace(
            together(folds),
            view=ALL_FOLDS,
            fields=sum(one.fields for one in folds),
            pixels=sum(one.pixels for one in folds),
            unseen=sum(one.unseen for one in folds),
        )
        for folds in groups.values()
    ]


def _with_folds(row: Row, each: Table) -> Row:
    """Tell beside a mean over folds how folds differ: each with its mean over seeds."""
    folds = [
        one for one in each.rows
        if one.difference == row.difference and (one.data, one.arm) == (row.data, row.arm)
    ]  # fmt: skip
    found: dict[str, Estimate] = {
        name: estimate([one.estimates[name].mean for one in folds]) for name in each.figures
    }
    return replace(row, folds=found)
