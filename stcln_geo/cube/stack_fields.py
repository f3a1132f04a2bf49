"""The table of labelled fields of a stack: counted from its labels and parcels, stored beside them.

A row is a field: the pixels of one number in ``parcels``, which lie in one site. What is labelled
but lies in no field (all of it, where a stack has no ``parcels``) is one row for each site and
class, under the number 0. Pixels of classes that the legend ignores belong to no row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import zarr

from ..errors import LabelError
from ..legend import UNLABELLED, Legend
from ..storage import writing
from .layout import create_array
from .season import FieldTable
from .stack import FIELD_MARK, Stack
from .store import quiet_zarr
from .zarr_store import zarr_store

__all__ = ["count_fields", "label_stack", "write_stack_split"]

_COLUMNS = {"number": "int32", "code": "uint8", "pixels": "int32", "split": "uint8",
            "site": "int32"}  # fmt: skip


def label_stack(stack: Stack) -> FieldTable:
    """Count the fields of a stack and store the table in it, in place of any it had.

    Rows that the stack had already, with the same number, class and site, keep their split.
    ``finish_stack`` does so by itself.

    Parameters
    ----------
    stack
        Opened for writing, with ``labels`` and a legend.

    Raises
    ------
    LabelError
        If there are no labels, or they break the contract (`count_fields`).
    """
    table = count_fields(stack)
    if stack.fields is not None:
        table = _with_split_of(stack.fields, table)
    with writing(stack.path), quiet_zarr():
        folder = zarr_store(stack.path / stack.folder)
        group: Any = zarr.open_group(folder, mode="r+", use_consolidated=False)
        # The mark of a whole table: taken away first, put back last.
        if FIELD_MARK in group.attrs:
            del group.attrs[FIELD_MARK]
        for column, dtype in _COLUMNS.items():
            _write(group, f"field_{column}", getattr(table, column).astype(dtype), "field")
        weight = np.ones(len(stack), dtype=np.uint16) if stack.weight is None else stack.weight
        _write(group, "site_weight", weight, "site")
        group.attrs[FIELD_MARK] = len(table)
        zarr.consolidate_metadata(folder)
    return table


def count_fields(stack: Stack) -> FieldTable:
    """Count the labelled pixels of each field of a stack; nothing is written.

    A field whose pixels are of several classes counts as one of the class that most of them have
    (of equals, the one of the lowest code); each pixel keeps its own label.

    Returns
    -------
    The rows by site, in a site by number; all in the split ``unused``.

    Raises
    ------
    LabelError
        If there are no labels, a label is no code of the legend, or a field's number is met in
        several sites.
    """
    if stack.labels is None or stack.legend is None:
        raise LabelError(
            f"Cannot count the fields of {stack.path}, season {stack.name}: it has no labels. "
            "Create it with create_stack(legend=...), and write labels with write_sites."
        )
    parts = []
    for shard in stack.shards:
        labels = stack.labels[shard.start : shard.stop]
        parcels = (
            np.zeros(labels.shape, dtype=np.int32)
            if stack.parcels is None
            else stack.parcels[shard.start : shard.stop]
        )
        for place, site in enumerate(shard):
            _check_codes(stack, stack.legend, site, labels[place])
            counted = _count_site(labels[place], parcels[place], len(stack.legend))
            parts.append(np.vstack([counted, np.full(counted.shape[1], site)]))
    number, code, pixels, site = np.hstack(parts)
    _check_numbers(stack, number, site)
    return FieldTable(
        number=number.astype(np.int32),
        code=code.astype(np.uint8),
        pixels=pixels.astype(np.int32),
        split=np.zeros(len(number), dtype=np.uint8),
        site=site.astype(np.int32),
    )


def write_stack_split(stack: Stack, split: np.ndarray, weight: np.ndarray | None = None) -> None:
    """Write the split of a stack's fields, whose table is stored.

    Parameters
    ----------
    split : (F,) uint8 as in ``SPLITS``.
    weight : (S,) uint16, how often an epoch of training shows each site; by default once.
    """
    weight = np.ones(len(stack), dtype=np.uint16) if weight is None else weight
    with writing(stack.path), quiet_zarr():
        folder = zarr_store(stack.path / stack.folder)
        group: Any = zarr.open_group(folder, mode="r+", use_consolidated=False)
        group["field_split"][:] = np.asarray(split, dtype=np.uint8)
        group["site_weight"][:] = np.asarray(weight, dtype=np.uint16)


def _write(group: Any, name: str, values: np.ndarray, dim: str) -> None:
    array = create_array(
        group, name, values.shape, (max(len(values), 1),), None, dtype=values.dtype.name, fill=0,
        dims=(dim,),
    )  # fmt: skip
    array[:] = values


def _count_site(labels: np.ndarray, parcels: np.ndarray, classes: int) -> np.ndarray:
    """Return number, code and pixels of each row of a site: (3, N) int64, by number, then code."""
    known = labels < classes
    pairs, counts = np.unique(
        np.maximum(parcels[known], 0).astype(np.int64) * 256 + labels[known], return_counts=True
    )
    number, code = pairs // 256, pairs % 256
    # Of each field the most frequent class first.
    order = np.lexsort((code, -counts, number))
    number, code, counts = number[order], code[order], counts[order]
    first = np.flatnonzero((np.diff(number, prepend=-1) != 0) | (number == 0))
    sums = np.add.reduceat(counts, first) if len(first) else counts
    found = np.stack([number[first], code[first], sums])
    return found[:, np.lexsort((found[1], found[0]))]


def _check_codes(stack: Stack, legend: Legend, site: int, labels: np.ndarray) -> None:
    most = len(legend) + len(legend.ignored)
    wrong = np.unique(labels[(labels >= most) & (labels != UNLABELLED)])
    if len(wrong):
        raise LabelError(
            f"Cannot count the fields of {stack.path}, season {stack.name}: the labels of site "
            f"{stack.site_id[site]!r} hold {', '.join(map(str, wrong[:5].tolist()))}, and the "
            f"legend's codes are 0 to {most - 1} ({UNLABELLED} = unlabelled). Write labels as "
            "codes of the legend."
        )


def _check_numbers(stack: Stack, number: np.ndarray, site: np.ndarray) -> None:
    """Refuse numbers that are met in more than one site."""
    order = np.lexsort((site, number))
    ordered = number[order]
    twice = np.flatnonzero((np.diff(ordered) == 0) & (ordered[1:] > 0))
    if len(twice):
        one, other = (stack.site_id[int(site[order[twice[0] + step]])] for step in (0, 1))
        raise LabelError(
            f"Cannot count the fields of {stack.path}, season {stack.name}: parcel "
            f"{int(ordered[twice[0]])} lies in the sites {one!r} and {other!r} "
            f"({len(twice)} such cases). Parcels' numbers must be unique over the stack, so that "
            "each field lies in one site. Number them anew."
        )


def _with_split_of(before: FieldTable, table: FieldTable) -> FieldTable:
    """Return the table with the split that the same rows had before."""
    columns = [(old.number, old.code, old.site) for old in (before, table)]
    keys = [list(zip(*(part.tolist() for part in row), strict=True)) for row in columns]
    known = dict(zip(keys[0], before.split.tolist(), strict=True))
    split = np.array([known.get(key, 0) for key in keys[1]], dtype=np.uint8)
    return FieldTable(
        number=table.number, code=table.code, pixels=table.pixels, split=split, site=table.site
    )
