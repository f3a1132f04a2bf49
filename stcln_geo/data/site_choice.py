"""Choose sites of stacks: by fold, by id, or by a list that a set was published with."""

from __future__ import annotations

import csv
import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cube.stack import published_list
from ..errors import InputError, LabelError, MissingFileError
from .source import Source

__all__ = ["ChosenSites", "SiteChoice", "choose_sites", "read_site_ids"]

_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteChoice:
    """Which sites to use. What is empty leaves all; of what is not, all must hold."""

    folds: tuple[int, ...] = ()
    sites: tuple[str, ...] = ()
    """Ids."""
    lists: tuple[str, ...] = ()
    """Names of lists of sites that a set was published with, as ``train_fold0`` of MTLCC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenSites:
    """What a choice came to."""

    used: tuple[np.ndarray, ...]
    """Of each source (S,) bool. True for the sites to use."""
    notes: tuple[str, ...]


def choose_sites(sources: Sequence[Source], choice: SiteChoice) -> ChosenSites:
    """Find the sites of a choice in stacks.

    Ids that no stack has are counted and said.

    Raises
    ------
    InputError
        If a source is a cube, or no site is left.
    LabelError
        If sites have no fold.
    CubeError
        If a list is not there.
    """
    used = []
    for source in sources:
        if source.kind != "stack":
            raise InputError(
                f"Cannot choose sites of {source}: it is a cube, which has one site. Folds and "
                "sites are for stacks. Leave the cube out, or name no folds and sites."
            )
        mine = np.ones(source.sites, dtype=bool)
        if choice.folds:
            if source.fold is None:
                raise LabelError(
                    f"Cannot choose the folds {_some(choice.folds)} of {source}: its sites have "
                    "none. Folds are given to create_stack, as importers of published sets do. "
                    "Name sites by their ids."
                )
            mine &= np.isin(source.fold, choice.folds)
        if choice.sites:
            mine &= np.isin(source.site_id, choice.sites)
        if choice.lists:
            lists = [published_list(source.path, source.season, name) for name in choice.lists]
            mine &= np.isin(source.site_id, [one for ids in lists for one in ids])
        used.append(mine)
    count, total = int(sum(mine.sum() for mine in used)), sum(source.sites for source in sources)
    if not count:
        raise InputError(
            f"Cannot use {_describe(choice)}: none of {total} sites is left "
            f"({', '.join(map(str, sources[:_SHOWN]))}). At least one must be. Name folds, ids or "
            "lists that the stacks have."
        )
    notes = [f"Sites: {count} of {total}, by {_describe(choice)}."]
    there = {one for source in sources for one in source.site_id}
    missing = [one for one in dict.fromkeys(choice.sites) if one not in there]
    if missing:
        notes.append(
            f"{len(missing)} of {len(set(choice.sites))} named sites are not in the data: "
            f"{_some(missing)}"
        )
    return ChosenSites(used=tuple(used), notes=tuple(notes))


def read_site_ids(path: str | Path) -> tuple[str, ...]:
    """Read site ids: one a line, or a ``.csv`` with the column ``site_id``, or a list in JSON.

    Also a ``.json`` or ``.toml`` file with such a list under ``sites``.

    Raises
    ------
    MissingFileError
        If there is no such file.
    InputError
        If it holds no ids.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"Cannot read the site ids {path}: there is no such file. Give a text file with one id "
            "a line, or a .csv with the column site_id."
        )
    try:
        ids = _read_ids(path.read_text(encoding="utf-8-sig"), path.suffix)
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise InputError(
            f"Cannot read the site ids {path}: {error}. It must be a text file with one id a line, "
            "a .csv with the column site_id, or a .json or .toml file with a list under sites. "
            "Correct it."
        ) from error
    return ids


def _read_ids(text: str, suffix: str) -> tuple[str, ...]:
    found: Any
    if suffix in (".json", ".toml"):
        found = json.loads(text) if suffix == ".json" else tomllib.loads(text)
        found = found["sites"] if isinstance(found, dict) else found
        if not isinstance(found, list) or not all(isinstance(one, (str, int)) for one in found):
            raise TypeError("it holds no list of ids")
    elif suffix == ".csv":
        found = [row["site_id"] for row in csv.DictReader(text.splitlines())]
    else:
        found = text.split("\n")
    ids = tuple(dict.fromkeys(str(one).strip() for one in found if str(one).strip()))
    if not ids:
        raise ValueError("it holds no id")
    return ids


def _describe(choice: SiteChoice) -> str:
    parts = []
    if choice.folds:
        parts.append(f"{'fold' if len(choice.folds) == 1 else 'folds'} {_some(choice.folds)}")
    if choice.sites:
        parts.append(f"{len(set(choice.sites))} ids")
    if choice.lists:
        parts.append(f"{'list' if len(choice.lists) == 1 else 'lists'} {_some(choice.lists)}")
    return " and ".join(parts)


def _some(values: Iterable[Any]) -> str:
    """Name the first few of many."""
    shown = [str(value) for value in values]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
