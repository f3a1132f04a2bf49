"""Divide fields among training, validation and test, and choose few training fields.

The unit is the field or a block of fields, never the pixel: pixels of one field resemble each
other so much that a pixel split measures memory, not mapping. Whole sites of a stack are dealt out
by `site_split`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..cube.contract import SPLITS
from ..cube.season import FieldTable, Season
from ..cube.stack import Stack
from ..errors import InputError, LabelError
from ..grid import tiles
from .blocks import open_reader

if TYPE_CHECKING:
    from ..legend import Legend
    from .source import Source

__all__ = [
    "SplitUnit",
    "check_labelled",
    "check_shares",
    "deal_groups",
    "few_label_fields",
    "field_positions",
    "sites_apart",
    "split_fields",
]

SplitUnit = Literal["field", "block"]

_BLOCK_TRIALS = 200
_ORDERS = 1 << 25
"""Places in the orders that are walked at once; one takes 5 bytes."""


def check_labelled(season: Season | Stack | Source) -> tuple[FieldTable, Legend]:
    """Return fields and legend of a season of a cube or stack.

    Raises
    ------
    LabelError
        If it has no labels, or the fields of a stack were not counted.
    """
    if season.fields is not None and season.legend is not None:
        return season.fields, season.legend
    if isinstance(season, Season):
        place = f"{season.cube}, season {season.name}"
    else:
        place = f"{season.path}, season {season.name}" if isinstance(season, Stack) else str(season)
    if season.labels is not None:
        raise LabelError(
            f"Cannot use the labels of {place}: its fields were not counted yet. Run `stcln-geo "
            "labels split STACK` first."
        )
    raise LabelError(
        f"Cannot use the labels of {place}: it has none. Run `stcln-geo labels burn CUBE VECTOR "
        "--column NAME` first; a stack is written with its labels, by create_stack(legend=...) and "
        "write_sites."
    )


def split_fields(
    fields: FieldTable,
    *,
    test: float = 0.3,
    validation: float = 0.2,
    seed: int = 0,
    by: SplitUnit = "field",
    positions: np.ndarray | None = None,
    block_pixels: int = 128,
) -> np.ndarray:
    """Give every field to one split, class by class.

    Parameters
    ----------
    fields
        Each class needs at least two fields, or three where ``validation`` is above 0 and a
        validation field is wanted: a class of two fields has none.
    test, validation
        Shares of the fields of each class, at least one field each; the rest is for training.
    seed
        The split depends on nothing else than the fields and the arguments.
    by
        ``field`` deals out fields; ``block`` deals out squares of ``block_pixels`` with all the
        fields whose centre lies in them, so that neighbours stay together.
    positions : (F, 2) float, row and column of each field's centre; for ``block``.
    block_pixels
        Side of a block (pixels).

    Returns
    -------
    (F,) uint8, codes of ``SPLITS``: 1 train, 2 validation, 3 test.

    Raises
    ------
    LabelError
        If a class has one field, or blocks cannot give every class a train and a test field.
    """
    check_shares(test=test, validation=validation)
    code = np.asarray(fields.code)
    alone = [int(value) for value, count in zip(*_count(code), strict=True) if count < 2]
    if alone or code.size == 0:
        raise LabelError(
            f"Cannot split the fields: class codes {alone} have one field each (fields in all: "
            f"{code.size}); every class needs at least one field to train on and another to test. "
            "Burn the labels again with --min-fields 2 or more; split a stack by site or fold."
        )
    generator = np.random.default_rng(seed)
    if by == "field":
        return _split_by_field(code, test=test, validation=validation, generator=generator)
    if by != "block":
        raise InputError(
            f"Cannot split by {by!r}: a split is by 'field' or by 'block', never by pixel. "
            "Use --by field."
        )
    if positions is None:
        raise InputError(
            "Cannot split by block without the fields' positions: blocks are squares on the "
            "ground. Pass positions=field_positions(season)."
        )
    blocks = _block_of(positions, block_pixels)
    return _split_by_block(
        code, blocks, test=test, validation=validation, generator=generator, side=block_pixels
    )


def check_shares(*, test: float, validation: float) -> None:
    """Check that both shares leave something to train on.

    Raises
    ------
    InputError
        If they do not.
    """
    if not (0 < test < 1 and 0 <= validation < 1 and test + validation < 1):
        raise InputError(
            f"Cannot split with test={test} and validation={validation}: test must lie between 0 "
            "and 1, validation from 0 to 1, and both together below 1, so that training fields "
            "remain. Use for example --test 0.3 --validation 0.2."
        )


def sites_apart(fields: FieldTable, judged: np.ndarray) -> bool:
    """Return True where there are fields to judge by, in sites without a field to train on.

    Parameters
    ----------
    judged : (F,) bool.
    """
    tested = np.unique(fields.site[judged])
    trained = np.unique(fields.site[fields.split == SPLITS["train"]])
    return len(tested) > 0 and not np.isin(tested, trained).any()


def few_label_fields(
    fields: FieldTable,
    *,
    fields_per_class: int | None = None,
    fraction: float | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Choose training fields: so many a class, a share of each class, or all.

    Choices of one seed are nested: fewer fields are a subset of more.

    Returns
    -------
    (F,) bool. True for the chosen fields, all of the train split; every class that has train
        fields keeps at least one.
    """
    if fields_per_class is not None and fraction is not None:
        raise InputError(
            f"Cannot choose fields with fields_per_class={fields_per_class} and fraction="
            f"{fraction} at once: both say how many. Give one of them."
        )
    if fields_per_class is not None and fields_per_class < 1:
        raise InputError(
            f"Cannot train on fields_per_class={fields_per_class}: it must be 1 or more. "
            "Leave it out to train on all fields of the train split."
        )
    if fraction is not None and not 0 < fraction <= 1:
        raise InputError(
            f"Cannot train on fraction={fraction} of the fields: it must be above 0 and at most 1. "
            "Use for example --fraction 0.02."
        )
    code, split = np.asarray(fields.code), np.asarray(fields.split)
    train = split == SPLITS["train"]
    if not train.any():
        raise LabelError(
            f"Cannot choose training fields: none of the {code.size} fields is in the train split. "
            "Run `stcln-geo labels split CUBE` first."
        )
    chosen = np.zeros(code.shape, dtype=bool)
    for value in np.unique(code[train]):
        members = np.flatnonzero(train & (code == value))
        # A generator of its own for each class: adding a class leaves the others' choice alone.
        order = np.random.default_rng([seed, int(value)]).permutation(members)
        keep = members.size
        if fields_per_class is not None:
            keep = fields_per_class
        elif fraction is not None:
            keep = max(math.ceil(fraction * members.size - 1e-9), 1)
        chosen[order[:keep]] = True
    return chosen


def field_positions(season: Season) -> np.ndarray:
    """Return the centre of each field.

    Returns
    -------
    (F, 2) float64, mean row and mean column (pixels from the cube's corner).
    """
    fields, _ = check_labelled(season)
    reader = open_reader(season.parcels, season.cube / season.folder / "parcels")
    number = np.asarray(fields.number)
    size = int(number.max(initial=0)) + 1
    sums = np.zeros((3, size))
    for tile in tiles(season.shape_yx, 1024):
        parcels = reader.read((tile.rows, tile.cols))
        row, col = np.nonzero((parcels > 0) & (parcels < size))
        which = parcels[row, col]
        # At their places: a tile holds few of the fields, and whole numbers add up in any order.
        np.add.at(sums[0], which, 1.0)
        np.add.at(sums[1], which, (row + tile.row).astype(np.float64))
        np.add.at(sums[2], which, (col + tile.col).astype(np.float64))
    count = np.maximum(sums[0, number], 1)
    return np.stack([sums[1, number] / count, sums[2, number] / count], axis=1)


def _count(code: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, counts = np.unique(code, return_counts=True)
    return values, counts


def _split_by_field(
    code: np.ndarray, *, test: float, validation: float, generator: np.random.Generator
) -> np.ndarray:
    split = np.full(code.shape, SPLITS["train"], dtype=np.uint8)
    for value in np.unique(code):
        members = generator.permutation(np.flatnonzero(code == value))
        # Training keeps a field, and of three or more so does validation, where it is wanted.
        least = 1 if validation and members.size > 2 else 0
        tests = min(max(round(test * members.size), 1), members.size - 1 - least)
        room = members.size - 1 - tests
        validations = min(max(round(validation * members.size), least), room)
        split[members[:tests]] = SPLITS["test"]
        split[members[tests : tests + validations]] = SPLITS["validation"]
    return split


def _block_of(positions: np.ndarray, side: int) -> np.ndarray:
    """Return the number of each field's block: (F,) int, 0 to B-1, only blocks with fields."""
    if side < 1:
        raise InputError(
            f"Cannot split by blocks of {side} px: the side must be 1 px or more. "
            "Use for example --block 128."
        )
    corner = np.floor(np.asarray(positions) / side).astype(np.int64)
    return np.unique(corner, axis=0, return_inverse=True)[1].reshape(-1)


def _split_by_block(
    code: np.ndarray,
    blocks: np.ndarray,
    *,
    test: float,
    validation: float,
    generator: np.random.Generator,
    side: int,
) -> np.ndarray:
    dealt, lacking = deal_groups(
        code, blocks, test=test, validation=validation, generator=generator, trials=_BLOCK_TRIALS
    )
    if lacking:
        raise LabelError(
            f"Cannot split {code.size} fields by blocks of {side} px ({blocks.max() + 1} blocks "
            "hold fields): no division found gives every class a train and a test field. Use "
            "smaller blocks (--block), or --by field."
        )
    return dealt


def deal_groups(
    code: np.ndarray,
    groups: np.ndarray,
    *,
    test: float,
    validation: float,
    generator: np.random.Generator,
    trials: int,
) -> tuple[np.ndarray, int]:
    """Deal out groups greedily in many random orders; keep the order nearest to the shares.

    Parameters
    ----------
    code : (F,) class of each field.
    groups : (F,) int, which of the groups 0 to G-1 a field belongs to.

    Returns
    -------
    (F,) uint8, codes of ``SPLITS``, equal in a group; and how often a class has no field to train
    on, or none to test on.
    """
    values, index = np.unique(code, return_inverse=True)
    members = np.zeros((int(groups.max()) + 1, values.size))
    np.add.at(members, (groups, index), 1)
    total = members.sum(axis=0)
    shares = np.array([1 - test - validation, validation, test])
    target = shares[:, None] * total
    best = (math.inf, 0, np.zeros(len(members), dtype=np.uint8))
    # Many orders are walked side by side: a step of each costs little more than a step of one.
    together = max(min(trials, _ORDERS // len(members)), 1)
    for first in range(0, trials, together):
        orders = np.empty((min(together, trials - first), len(members)), dtype=np.int32)
        for order in orders:
            order[:] = generator.permutation(len(members))
        for order, dealt, choice in zip(
            orders, *_walk(orders, members, target, total), strict=True
        ):
            missing = int((dealt[[0, 2]] == 0).sum())
            lacking = int(((dealt[1] == 0) & (total >= 3)).sum()) if validation else 0
            cost = 1e6 * missing + 1e3 * lacking + float((((dealt - target) / total) ** 2).sum())
            if cost < best[0]:
                of_group = np.empty_like(choice)
                of_group[order] = choice
                best = (cost, missing, of_group)
    codes = np.array([SPLITS["train"], SPLITS["validation"], SPLITS["test"]], dtype=np.uint8)
    return codes[best[2][groups]], best[1]


def _walk(
    orders: np.ndarray, members: np.ndarray, target: np.ndarray, total: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give each group, in each order, to the split whose classes are furthest below their share.

    Parameters
    ----------
    orders : (N, G) int, permutations of the groups.
    members : (G, K) fields of each class in each group.
    target : (3, K) fields of each class that each split should have.
    total : (K,) fields of each class.

    Returns
    -------
    (N, 3, K) fields dealt out; (N, G) uint8, the split of each group in its place in the order.
    """
    unwanted = np.flatnonzero(~target.any(axis=1))
    dealt = np.zeros((len(orders), *target.shape))
    by_split = dealt.reshape(-1, target.shape[1])
    first = np.arange(len(orders)) * len(target)
    choice = np.zeros(orders.shape, dtype=np.uint8)
    # Steps are many and small, so that new arrays would cost as much as the sums.
    gain, scale = np.empty_like(dealt), total**2
    summed = np.empty(gain.shape[:2])
    for step, groups in enumerate(orders.T):
        fields = members.take(groups, axis=0)
        # Below the share relative to the class.
        np.subtract(target, dealt, out=gain)
        np.multiply(gain, fields[:, None], out=gain)
        np.divide(gain, scale, out=gain)
        gain.sum(axis=2, out=summed)
        summed[:, unwanted] = -np.inf
        chosen = summed.argmax(axis=1)
        choice[:, step] = chosen
        by_split[first + chosen] += fields
    return dealt, choice
