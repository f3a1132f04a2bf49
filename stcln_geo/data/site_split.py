"""Divide the sites of a stack among training, validation and test, each as a whole.

A site's fields, and its pixels that lie in no field, follow the site. So what is judged lies in
places that training does not see.
"""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cube.contract import SPLITS
from ..cube.season import FieldTable
from ..errors import InputError, LabelError, MissingFileError
from .split import check_shares, deal_groups

__all__ = ["SiteLists", "SiteSplit", "read_site_lists", "split_by_fold", "split_by_lists",
           "split_by_site"]  # fmt: skip

_NAMES = ("train", "validation", "test")
_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteLists:
    """Sites by name, as the protocols of published papers list them.

    An id that stands several times in the list of one split is shown so often in an epoch of
    training, and counts so often where weights are chosen.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    source: str = "the lists"
    """Where they come from, for messages."""

    def __post_init__(self) -> None:
        """Check that there is something in them, and each site in one list only."""
        if not (self.train or self.validation or self.test):
            raise InputError(
                f"Cannot split by {self.source}: it names no site. Name ids of sites under train, "
                "validation and test."
            )
        for one, other in ((0, 1), (0, 2), (1, 2)):
            pair = _NAMES[one], _NAMES[other]
            both = sorted(set(getattr(self, pair[0])) & set(getattr(self, pair[1])))
            if both:
                raise InputError(
                    f"Cannot split by {self.source}: {len(both)} sites stand under both {pair[0]} "
                    f"and {pair[1]} ({_some(both)}). A site is in one split. Take them out of one."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSplit:
    """What lists of sites came to."""

    split: np.ndarray
    """(S,) uint8 as in ``SPLITS``; 0, unused, for sites that no list names."""
    weight: np.ndarray
    """(S,) uint16: how often a site was named; 1 for those that were not."""
    missing: tuple[str, ...]
    """Ids that no site has, in the order of the lists."""


def split_by_fold(
    fold: np.ndarray | None, folds: Mapping[str, Sequence[int]], *, stack: str = "the stack"
) -> np.ndarray:
    """Give the sites of whole folds to a split: (S,) uint8 as in ``SPLITS``, 0 for other folds.

    Parameters
    ----------
    fold : (S,) int, or None where the stack has no folds.
    folds
        Folds by the name of their split, as ``{"train": (1, 2, 3), "test": (5,)}``.

    Raises
    ------
    LabelError
        If there are no folds, or not one that is named.
    InputError
        If a fold is given to two splits, or none is given.
    """
    if fold is None:
        raise LabelError(
            f"Cannot split {stack} by fold: its sites have none. Folds are given to create_stack, "
            "as importers of published sets do. Use --by site or --sites FILE."
        )
    named = [(name, int(number)) for name in _NAMES for number in folds.get(name, ())]
    numbers = [number for _, number in named]
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice or not named:
        raise InputError(
            f"Cannot split {stack} by fold with "
            + (f"fold {_some(twice)} in two splits" if twice else "no fold named")
            + ": each fold belongs to one split. Use for example --by fold --train 1,2,3 "
            "--validation 4 --test 5."
        )
    there = sorted(set(np.asarray(fold).tolist()))
    lacking = [number for number in numbers if number not in there]
    if lacking:
        raise LabelError(
            f"Cannot split {stack} by fold: no site is in fold {_some(lacking)}. The stack has "
            f"the folds {', '.join(map(str, there))}. Name these."
        )
    split = np.zeros(len(fold), dtype=np.uint8)
    for name, number in named:
        split[np.asarray(fold) == number] = SPLITS[name]
    return split


def split_by_site(
    fields: FieldTable,
    *,
    sites: int,
    test: float = 0.3,
    validation: float = 0.2,
    seed: int = 0,
) -> np.ndarray:
    """Deal out sites at random so that each class is divided by the shares, as far as possible.

    Of many random orders in which sites are dealt out, that is kept whose classes, counted in
    fields, come nearest to the shares. A class that is met in one site only is in one split only.

    Parameters
    ----------
    test, validation
        Shares of the fields of each class; the rest is for training.
    seed
        The split depends on nothing else than the fields and the arguments.

    Returns
    -------
    (S,) uint8 as in ``SPLITS``; 0, unused, for sites without a field.

    Raises
    ------
    LabelError
        If fewer than two sites have fields.
    """
    check_shares(test=test, validation=validation)
    labelled, groups = np.unique(fields.site, return_inverse=True)
    if len(labelled) < 2:
        raise LabelError(
            f"Cannot split by site: {len(labelled)} of {sites} sites have labelled fields, and at "
            "least two are needed, to train and to test on. Use --by field."
        )
    dealt, _ = deal_groups(
        fields.code, groups, test=test, validation=validation,
        generator=np.random.default_rng(seed), trials=max(10, min(200, 40_000 // len(labelled))),
    )  # fmt: skip
    split = np.zeros(sites, dtype=np.uint8)
    split[fields.site] = dealt
    return split


def split_by_lists(site_id: Sequence[str], lists: SiteLists) -> SiteSplit:
    """Give each site to the split whose list names it.

    Raises
    ------
    LabelError
        If no site bears any of the names.
    """
    place = {name: position for position, name in enumerate(site_id)}
    split = np.zeros(len(site_id), dtype=np.uint8)
    named = np.zeros(len(site_id), dtype=np.uint16)
    missing: dict[str, None] = {}
    for name in _NAMES:
        for one in getattr(lists, name):
            if one in place:
                split[place[one]] = SPLITS[name]
                named[place[one]] += 1
            else:
                missing[one] = None
    if not named.any():
        raise LabelError(
            f"Cannot split by {lists.source}: none of its {len(missing)} sites is in the stack "
            f"({_some(list(missing))}; the stack has {_some(list(site_id))}). Ids must be those of "
            "the stack's site_id. Give the list of this stack."
        )
    return SiteSplit(split=split, weight=np.maximum(named, 1), missing=tuple(missing))


def read_site_lists(path: str | Path) -> SiteLists:
    """Read which sites belong to which split.

    ``.json`` and ``.toml`` hold a list of ids, numbers or text, under ``train``, ``validation``
    and ``test``; other entries may stand beside them. ``.csv`` has the columns ``site_id`` and
    ``split``.

    Raises
    ------
    MissingFileError
        If there is no such file.
    InputError
        If it holds no such lists.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"Cannot read the site lists {path}: there is no such file. Give a .json or .toml file "
            "with lists of ids under train, validation and test, or a .csv with the columns "
            "site_id,split."
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        found = _from_csv(text) if path.suffix == ".csv" else _from_document(text, path.suffix)
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(
            f"Cannot read the site lists {path}: {error}. It must be a .json or .toml file with "
            "lists of ids under train, validation and test, or a .csv with the columns "
            "site_id,split. Correct it."
        ) from error
    return SiteLists(**found, source=str(path))


def _from_document(text: str, suffix: str) -> dict[str, tuple[str, ...]]:
    content: Any = tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    if not isinstance(content, dict):
        raise TypeError("it holds no lists by split")
    found = {}
    for name in _NAMES:
        ids = content.get(name, [])
        if not isinstance(ids, list) or not all(
            isinstance(one, (str, int)) and not isinstance(one, bool) for one in ids
        ):
            raise TypeError(f"{name!r} is no list of ids")
        found[name] = tuple(str(one) for one in ids)
    return found


def _from_csv(text: str) -> dict[str, tuple[str, ...]]:
    rows = list(csv.DictReader(text.splitlines(), skipinitialspace=True))
    found: dict[str, list[str]] = {name: [] for name in _NAMES}
    for number, row in enumerate(rows, start=2):
        name, site = str(row.get("split") or "").strip(), str(row.get("site_id") or "").strip()
        if name not in found or not site:
            raise ValueError(f"line {number} has the site_id {site!r} and the split {name!r}")
        found[name].append(site)
    return {name: tuple(ids) for name, ids in found.items()}


def _some(values: Sequence[Any]) -> str:
    """Name the first few of many."""
    shown = ", ".join(str(value) for value in values[:_SHOWN])
    return f"{shown} and {len(values) - _SHOWN} more" if len(values) > _SHOWN else shown
