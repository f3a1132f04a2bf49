"""A random forest on the same fields as the network, for ``real_few_fields.py``.

It sees the bands of all dates of a season, in order. A forest takes no gaps: what is not clear is
filled linearly in time between the clear dates before and after, and with the nearest clear date at
either end of the season.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Series:
    """The labelled pixels of a season that have a clear date, in fields of some split."""

    values: np.ndarray
    """(N, D, C) float32 reflectance; NaN where not clear."""
    days: np.ndarray
    """(D,) int: days since the season's first day."""
    code: np.ndarray
    """(N,) class codes."""
    field: np.ndarray
    """(N,) row of each pixel's field in the table of fields."""
    classes: int


def read_series(path: Path) -> Series:
    """Read the pixels of the fields of a labelled cube or stack."""
    from stcln_geo.cube.stack import is_stack

    values, valid, days, labels, parcels, fields, classes = (
        _read_stack(path) if is_stack(path) else _read_cube(path)
    )
    row = np.full(int(max(fields.number.max(), parcels.max())) + 1, -1)
    row[fields.number[fields.split > 0]] = np.flatnonzero(fields.split > 0)
    used = (row[parcels] >= 0) & (labels < classes) & valid.any(axis=1)
    gaps = ~valid[used]
    reflectance = values[used].astype(np.float32) * np.float32(1e-4)
    reflectance[gaps] = np.nan
    return Series(
        values=reflectance, days=days, code=labels[used], field=row[parcels[used]], classes=classes
    )


def _read_cube(path: Path):
    from stcln_geo.cube.store import open_season

    season = open_season(path)
    values = season.reflectance[:].transpose(2, 3, 0, 1)  # (T, C, Y, X) -> (Y, X, T, C)
    dates, bands = values.shape[2:]
    return (
        values.reshape(-1, dates, bands),
        season.valid[:].reshape(dates, -1).T,
        season.days,
        season.labels[:].ravel(),
        season.parcels[:].ravel(),
        season.fields,
        len(season.legend),
    )


def _read_stack(path: Path):
    """Bring the dates of the sites, which differ, onto one axis; sites are single pixels."""
    from stcln_geo.cube.stack import open_stack

    stack = open_stack(path)
    days = np.unique(stack.days[stack.days >= 0])
    values = np.zeros((len(stack), len(days), len(stack.bands)), dtype=np.int16)
    valid = np.zeros((len(stack), len(days)), dtype=bool)
    site, date = np.nonzero(stack.days >= 0)
    place = np.searchsorted(days, stack.days[site, date])
    values[site, place] = stack.reflectance[:][site, date, :, 0, 0]
    valid[site, place] = stack.valid[:][site, date, 0, 0]
    return (
        values, valid, days, stack.labels[:].ravel(), stack.parcels[:].ravel(), stack.fields,
        len(stack.legend),
    )  # fmt: skip


def field_means(series: Series) -> Series:
    """Return one series a field: the mean of its clear pixels on each date, and its class."""
    rows, first, place = np.unique(series.field, return_index=True, return_inverse=True)
    seen = ~np.isnan(series.values)
    sums = np.zeros((len(rows), *series.values.shape[1:]))
    counts = np.zeros(sums.shape)
    np.add.at(sums, place, np.where(seen, series.values, 0))
    np.add.at(counts, place, seen)
    means = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return replace(series, values=means, code=series.code[first], field=rows)


def fill_gaps(series: Series) -> np.ndarray:
    """Return what the forest sees: (N, D * C) float64 without gaps."""
    filled = series.values.astype(np.float64)
    for pixel in filled:
        seen = ~np.isnan(pixel[:, 0])
        for band in range(pixel.shape[1]):
            pixel[:, band] = np.interp(series.days, series.days[seen], pixel[seen, band])
    return filled.reshape(len(filled), -1)


def judge_forest(
    series: Series, chosen: np.ndarray, judged: np.ndarray, *, trees: int, seed: int, means: bool
) -> np.ndarray:
    """Train on some fields and count the pixels of others.

    Parameters
    ----------
    chosen, judged : (F,) bool, fields to train on and to test on.
    means
        True trains on the mean series of fields, and gives all pixels of a field the class of its
        mean: this needs the outlines of the test fields. False takes each pixel for itself.

    Returns
    -------
    (K, K) int64 confusion matrix; rows truth, columns prediction.
    """
    from sklearn.ensemble import RandomForestClassifier

    from stcln_geo.report.metrics import confusion_matrix

    shown = field_means(series) if means else series
    features = fill_gaps(shown)
    train, test = chosen[shown.field], judged[shown.field]
    forest = RandomForestClassifier(
        n_estimators=trees, class_weight="balanced", random_state=seed, n_jobs=1
    )
    forest.fit(features[train], shown.code[train])
    found = np.full(len(judged), -1) if means else None
    predicted = forest.predict(features[test])
    pixels = judged[series.field]
    if found is not None:
        found[shown.field[test]] = predicted
        predicted = found[series.field[pixels]]
    return confusion_matrix(series.code[pixels], predicted, classes=series.classes)
