"""Split the labels of a season of a cube or stack: in memory, or stored in it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..cube.contract import SPLITS
from ..cube.lock import cube_lock
from ..cube.season import FieldTable, Season, choose_season
from ..cube.stack import Stack, is_stack, open_stack
from ..cube.stack_fields import count_fields, label_stack, write_stack_split
from ..cube.store import open_season, write_split
from ..errors import InputError, LabelError
from ..legend import Legend
from ..storage import Location, location
from .site_split import SiteLists, split_by_fold, split_by_lists, split_by_site
from .source import Source, source_of
from .split import check_labelled, field_positions, split_fields

__all__ = [
    "MissingSites",
    "SplitReport",
    "SplitRule",
    "SplitSource",
    "SplitSpec",
    "open_split",
    "split_labels",
]

SplitRule = Literal["field", "block", "site", "fold"]
"""What is dealt out as a whole."""

MissingSites = Literal["error", "skip"]
"""What to do where lists name sites that the stack lacks."""

_NAMES = ("train", "validation", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSpec:
    """How fields are divided."""

    by: SplitRule | None = None
    """By default ``field``; with ``lists``, what they name and no more."""
    test: float = 0.3
    """Share of each class's fields to test on; ``field``, ``block`` and ``site``."""
    validation: float = 0.2
    """Share of each class's fields to choose weights by, likewise."""
    seed: int = 0
    block_pixels: int = 128
    """Side of a block (pixels)."""
    folds: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Folds by the name of their split, for ``fold``."""
    lists: SiteLists | None = None
    """Sites by name, before all else; ``fold`` deals out the sites that they do not name."""
    missing: MissingSites = "error"

    def __post_init__(self) -> None:
        """Check that the choices fit each other."""
        if self.by is not None and self.by not in get_args(SplitRule):
            raise InputError(
                f"Cannot split by {self.by!r}: a split is by 'field' or by 'block', of a stack "
                "also by 'site' or by 'fold', never by pixel. Use --by field."
            )
        if self.seed < 0:
            raise InputError(
                f"Cannot split with --seed {self.seed}: it must be 0 or more. Use for example "
                "--seed 0."
            )
        if self.missing not in get_args(MissingSites):
            raise InputError(
                f"Cannot use missing sites = {self.missing!r}: it is error or skip. Use "
                "--missing-sites skip to go on without them."
            )
        if self.lists is not None and self.by not in (None, "fold"):
            raise InputError(
                f"Cannot split by lists of sites and by {self.by} at once: both say where a site "
                "goes. Leave --by out, or use --by fold for the sites that the lists do not name."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitReport:
    """What a split came to."""

    fields: FieldTable
    """With the new split."""
    legend: Legend
    sites: np.ndarray | None
    """(4,) int64: sites with a field of each split, as in ``SPLITS``; None of a cube."""
    repeated: int
    """Sites that lists named more than once."""
    missing: tuple[str, ...]
    """Ids in lists that no site has."""
    listed: int
    """Different ids in lists."""

    def lines(self) -> list[str]:
        """Return the split as lines of text for people."""
        lines = [f"{'fields (pixels)':<28}" + "".join(f"{name:>18}" for name in _NAMES)]
        for entry in self.legend.classes:
            cells = []
            for name in _NAMES:
                mine = (self.fields.code == entry.code) & (self.fields.split == SPLITS[name])
                cells.append(f"{int(mine.sum())} ({int(self.fields.pixels[mine].sum())})")
            lines.append(f"{entry.name[:27]:<28}" + "".join(f"{cell:>18}" for cell in cells))
        if self.sites is not None:
            told = "".join(f"{int(self.sites[SPLITS[name]]):>18}" for name in _NAMES)
            lines.append(f"{'sites':<28}{told}")
        unused = int((self.fields.split == SPLITS["unused"]).sum())
        if unused:
            lines.append(f"{unused} of {len(self.fields)} fields are in no split.")
        lines += self.notes()
        lines += [
            f"No field of {entry.name} to {'train' if name == 'train' else 'test'} on."
            for entry in self.legend.classes
            for name in ("train", "test")
            if not ((self.fields.code == entry.code) & (self.fields.split == SPLITS[name])).any()
        ]
        return lines

    def notes(self) -> tuple[str, ...]:
        """Return what there is to know of the lists, in words."""
        told = []
        if self.repeated:
            told.append(f"{self.repeated} sites are listed more than once, and shown so often.")
        if self.missing:
            told.append(
                f"{len(self.missing)} of {self.listed} listed sites are not in the stack: "
                f"{', '.join(self.missing[:5])}{', ...' if len(self.missing) > 5 else ''}"
            )
        return tuple(told)


def split_labels(
    cube: str | Path | Location,
    spec: SplitSpec,
    *,
    season: str | None = None,
    dry_run: bool = False,
) -> SplitReport:
    """Divide the fields of a season among training, validation and test.

    The fields of a stack are counted first where they were not yet.

    Parameters
    ----------
    cube
        A cube with burnt labels, or a stack with labels.
    season
        By default the only one.
    dry_run
        True reports without writing.

    Raises
    ------
    LabelError
        If there are no labels, or they cannot be divided so.
    InputError
        If the choices do not fit each other, or the season.
    CubeError
        If another process is writing the cube.
    """
    name = choose_season(cube, season)
    mode = "r" if dry_run else "r+"
    with contextlib.nullcontext() if dry_run else cube_lock(location(cube)):
        opened = _open(location(cube), name, mode=mode)
        if not dry_run and isinstance(opened, Stack) and opened.fields is None:
            label_stack(opened)
            opened = _open(location(cube), name, mode=mode)
        dealt = _deal(opened, spec)
        if dry_run:
            return dealt.report
        if isinstance(opened, Stack):
            write_stack_split(opened, dealt.split, dealt.weight)
        else:
            write_split(opened, dealt.split)
        return dealt.report


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitSource:
    """A season with a split that is in memory alone."""

    source: Source
    """With the fields, their split, and how often sites are shown."""
    report: SplitReport


def open_split(
    cube: str | Path | Location, spec: SplitSpec, *, season: str | None = None
) -> SplitSource:
    """Open a season of a cube or stack under a split of its own; what is stored stays as it is.

    It equals what `open_source` gives after `split_labels` with the same spec, so that several
    splits of one cube can be read at the same time.

    Raises
    ------
    LabelError
        If there are no labels, or they cannot be divided so.
    InputError
        If the choices do not fit each other, or the season.
    """
    name = choose_season(cube, season)
    opened = _open(location(cube), name, mode="r")
    dealt = _deal(opened, spec)
    source = replace(source_of(opened), fields=dealt.report.fields, weight=dealt.weight)
    return SplitSource(source=source, report=dealt.report)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dealt:
    """A split that is not stored."""

    split: np.ndarray
    """(F,) uint8 as in ``SPLITS``."""
    weight: np.ndarray | None
    """(S,) uint16: how often an epoch of training shows each site; None of a cube."""
    report: SplitReport


def _open(path: Location, season: str, *, mode: str) -> Season | Stack:
    if is_stack(path, season):
        return open_stack(path, season, mode=mode)
    return open_season(path, season, mode=mode)


def _deal(opened: Season | Stack, spec: SplitSpec) -> _Dealt:
    return _deal_stack(opened, spec) if isinstance(opened, Stack) else _deal_cube(opened, spec)


def _deal_cube(season: Season, spec: SplitSpec) -> _Dealt:
    fields, legend = check_labelled(season)
    if spec.lists is not None or spec.by in ("site", "fold"):
        what = "lists of sites" if spec.lists is not None else spec.by
        raise InputError(
            f"Cannot split {season.cube} by {what}: it is a cube, which has one site. Use --by "
            "field, or --by block for squares on the ground."
        )
    split = _deal_fields(
        fields, spec, positions=field_positions(season) if spec.by == "block" else None
    )
    return _Dealt(split=split, weight=None, report=_report(fields, legend, split))


def _deal_stack(stack: Stack, spec: SplitSpec) -> _Dealt:
    if spec.by == "block":
        raise InputError(
            f"Cannot split {stack.path} by block: the sites of a stack are apart from one another "
            "already. Use --by site."
        )
    fields = count_fields(stack) if stack.fields is None else stack.fields
    legend: Any = stack.legend
    missing: tuple[str, ...] = ()
    weight, listed, repeated = np.ones(len(stack), dtype=np.uint16), 0, 0
    of_site = np.zeros(len(stack), dtype=np.uint8)
    if spec.lists is None and spec.by in (None, "field"):
        split = _deal_fields(fields, spec)
    else:
        if spec.by == "site":
            of_site = split_by_site(
                fields, sites=len(stack), test=spec.test, validation=spec.validation, seed=spec.seed
            )
        elif spec.by == "fold":
            of_site = split_by_fold(stack.fold, spec.folds, stack=str(stack.path))
        if spec.lists is not None:
            found = split_by_lists(stack.site_id, spec.lists)
            of_site = np.where(found.split > 0, found.split, of_site)
            weight, missing, repeated = found.weight, found.missing, int((found.weight > 1).sum())
            listed = len({one for name in _NAMES for one in getattr(spec.lists, name)})
        split = of_site[fields.site]
    if missing and spec.missing == "error":
        raise LabelError(
            f"Cannot split {stack.path}: {len(missing)} of {listed} listed sites are not in it: "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}. Every site listed "
            "must be there. Correct the list, or go on without them with --missing-sites skip."
        )
    for name in ("train", "test"):
        ids = () if spec.lists is None else getattr(spec.lists, name)
        if ids and not (of_site == SPLITS[name]).any():
            raise LabelError(
                f"Cannot split {stack.path} by {spec.lists.source if spec.lists else ''}: none of "
                f"the {len(set(ids))} sites under {name} is in it. At least one must be. Use the "
                "whole set, or another list."
            )
    report = _report(
        fields, legend, split, sites=len(stack), repeated=repeated, missing=missing, listed=listed
    )
    return _Dealt(split=split, weight=weight, report=report)


def _deal_fields(
    fields: FieldTable, spec: SplitSpec, *, positions: np.ndarray | None = None
) -> np.ndarray:
    return split_fields(
        fields,
        test=spec.test,
        validation=spec.validation,
        seed=spec.seed,
        by="block" if spec.by == "block" else "field",
        positions=positions,
        block_pixels=spec.block_pixels,
    )


def _report(
    fields: FieldTable,
    legend: Legend,
    split: np.ndarray,
    *,
    sites: int | None = None,
    repeated: int = 0,
    missing: tuple[str, ...] = (),
    listed: int = 0,
) -> SplitReport:
    counts = None
    if sites is not None:
        pairs = np.unique(np.stack([split, fields.site]), axis=1)
        counts = np.bincount(pairs[0], minlength=len(SPLITS))
    return SplitReport(
        fields=replace(fields, split=split), legend=legend, sites=counts, repeated=repeated,
        missing=missing, listed=listed,
    )  # fmt: skip
