"""Protocols: how a published set is split, trained on and judged, as data.

A protocol is a TOML file. Those of the package lie in ``protocols/`` and are known by name; one of
your own is known by its path. It says what `labels split`, `pretrain`, `finetune` and `evaluate`
are to be told, in their own words: its ``[pretrain]`` and ``[finetune]`` tables are recipes as in
`config`. Nothing else is done for a protocol than for any other data.

A protocol may have rounds that differ in some of it, as the five folds of PASTIS do. One round is
named after a colon: ``pastis-official:fold-2``.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..cube.stack import is_stack, open_stack, published_list
from ..cube.store import choose_season, list_seasons
from ..data.site_split import SiteLists
from ..data.split_labels import SplitRule, SplitSpec
from ..errors import InputError, MissingFileError
from ..report.published import PublishedRule
from ..storage import Location, location
from .config import FinetuneConfig, PretrainConfig, merge_values

__all__ = [
    "EvaluationSection",
    "Protocol",
    "PublishedFigure",
    "Round",
    "SplitSection",
    "list_protocols",
    "load_protocol",
    "read_protocol_text",
]

Part = Literal["train", "validation", "test"]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))


class SplitSection(_Table):
    """Where fields or sites go; as `labels split` takes it."""

    by: SplitRule | None = None
    """What is dealt out at random as a whole; ``fold`` and lists need none."""
    test: float = 0.3
    validation: float = 0.2
    seed: int = 0
    block: int = Field(default=128, ge=1)
    """Side of a block (pixels)."""
    folds: dict[Part, tuple[int, ...]] = {}
    sites: dict[Part, tuple[str, ...]] = {}
    """Ids of sites; one that stands twice is shown twice in an epoch. They go before all else."""
    lists: dict[Part, str] = {}
    """Names of lists that the set was published with, as ``eval`` of MTLCC."""

    @field_validator("sites", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Take ids that are written as numbers."""
        if not isinstance(value, Mapping):
            return value
        return {
            part: [str(one) if isinstance(one, int) else one for one in ids]
            if isinstance(ids, list)
            else ids
            for part, ids in value.items()
        }

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.by not in (None, "fold") and (self.folds or self.sites or self.lists):
            raise ValueError(f"by = {self.by!r} and folds, sites or lists both say where sites go")
        if self.by is None and not (self.folds or self.sites or self.lists):
            raise ValueError("it names neither by, folds, sites nor lists")
        return self


class EvaluationSection(_Table):
    """How a network is judged; what is left out is as in training."""

    window: int | Literal["site"] | None = None
    """Side of the windows (pixels); ``site`` shows a site of a stack as a whole."""
    halo: int | None = Field(default=None, ge=0)
    metric: PublishedRule | None = None
    """A published rule of counting, besides ours."""


class PublishedFigure(_Table):
    """A figure that others report, with where it is from."""

    label: str
    source: str
    overall_accuracy: float | None = None
    miou: float | None = None
    f1: float | None = None
    gain_miou: float | None = None
    """Of pre-training over none, or over the best before, as ``note`` says."""
    note: str = ""
    """What it is of, and what is not known."""


class Round(_Table):
    """What of a protocol is different in one of its rounds."""

    name: str = Field(pattern=r"^[\w.-]+$")
    split: SplitSection | None = None
    """In place of the protocol's."""
    pretrain: PretrainConfig = PretrainConfig()
    """What is set here goes before the protocol's."""
    finetune: FinetuneConfig = FinetuneConfig()


class Protocol(_Table):
    """A protocol, or one round of it."""

    name: str
    title: str
    dataset: Literal["pastis", "mtlcc"] | None = None
    """The published set it is for; None for any data."""
    season: str | None = None
    sources: tuple[str, ...] = ()
    """Where it is from."""
    notes: tuple[str, ...] = ()
    """What there is to know of it, and where it differs from what was published."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2, 3, 4), min_length=1)
    """Of training; the split has its own."""
    split: SplitSection | None = None
    """None leaves the split of the data."""
    pretrain: PretrainConfig = PretrainConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    evaluation: EvaluationSection = EvaluationSection()
    figures: tuple[PublishedFigure, ...] = ()
    rounds: tuple[Round, ...] = ()

    def round(self, name: str) -> Protocol:
        """Return one round, as a protocol without rounds.

        Raises
        ------
        InputError
            If there is none of this name.
        """
        found = next((one for one in self.rounds if one.name == name), None)
        if found is None:
            known = ", ".join(one.name for one in self.rounds) or "no rounds"
            raise InputError(
                f"Cannot find the round {name!r} of the protocol {self.name}: it has {known}. "
                "Name one after a colon, as in pastis-official:fold-1."
            )
        return self.model_copy(
            update={
                "name": f"{self.name}:{name}",
                "rounds": (),
                "split": found.split or self.split,
                "pretrain": _merged(self.pretrain, found.pretrain),
                "finetune": _merged(self.finetune, found.finetune),
            }
        )

    def recipe(self, kind: Literal["pretrain", "finetune"]) -> dict[str, Any]:
        """Return what the protocol sets of a recipe: the lowest layer of `load_config`.

        Raises
        ------
        InputError
            If the protocol has rounds, and none was chosen.
        """
        self._check_round()
        values = getattr(self, kind).model_dump(exclude_unset=True)
        return {"season": self.season, **values} if self.season is not None else values

    def split_spec(
        self, data: str | Path | Location, *, season: str | None = None
    ) -> SplitSpec | None:
        """Return how the labels of a cube or stack are to be split; None leaves its own split.

        Sites that the protocol names and the data lack are skipped and counted.

        Parameters
        ----------
        season
            By default the protocol's, or the only one.

        Raises
        ------
        InputError
            If the data is of another set, or the protocol has rounds and none was chosen.
        CubeError
            If a published list is not there.
        """
        self._check_round()
        self._check_dataset(data)
        season = choose_season(data, season or self.season)
        split = self.split
        if split is None:
            return None
        folds: Mapping[str, tuple[int, ...]] = cast(Any, split.folds)
        return SplitSpec(
            by="fold" if split.folds else split.by,
            test=split.test,
            validation=split.validation,
            seed=split.seed,
            block_pixels=split.block,
            folds=folds,
            lists=self._site_lists(split, location(data), season),
            missing="skip",
        )

    def _site_lists(self, split: SplitSection, path: Location, season: str) -> SiteLists | None:
        if not (split.sites or split.lists):
            return None
        named: dict[str, tuple[str, ...]] = {str(part): ids for part, ids in split.sites.items()}
        taken = {one for ids in named.values() for one in ids}
        for part, name in split.lists.items():
            # Sites named by id go where they are named.
            ids = tuple(one for one in published_list(path, season, name) if one not in taken)
            named[part] = (*named.get(part, ()), *ids)
        return SiteLists(**named, source=f"the protocol {self.name}")

    def _check_round(self) -> None:
        if self.rounds:
            raise InputError(
                f"Cannot use the protocol {self.name} as a whole: it has the rounds "
                f"{', '.join(one.name for one in self.rounds)}, each with settings of its own. "
                f"Name one, as in {self.name}:{self.rounds[0].name}."
            )

    def _check_dataset(self, data: str | Path | Location) -> None:
        if self.dataset is None:
            return
        # Of any season: that it is another set says more than that it has other seasons.
        seasons = list_seasons(data)
        stack = open_stack(data, seasons[0]) if seasons and is_stack(data, seasons[0]) else None
        found = None if stack is None else stack.attrs.get("dataset")
        if found != self.dataset:
            what = "a cube" if stack is None else f"a stack of {found or 'no published set'}"
            raise InputError(
                f"Cannot apply the protocol {self.name} to {location(data)}: it is for the set "
                f"{self.dataset}, and this is {what}. Import the set with `stcln-geo import "
                f"{self.dataset}`, or choose another protocol."
            )

    def lines(self) -> list[str]:
        """Return the protocol as lines of text for people, without its lists of ids."""
        lines = [f"{self.name}: {self.title}"]
        if self.dataset:
            lines.append(f"for: {self.dataset}")
        if self.season:
            lines.append(f"season: {self.season}")
        if self.rounds:
            lines.append(f"rounds: {', '.join(one.name for one in self.rounds)}")
        lines.append(f"seeds: {', '.join(map(str, self.seeds))}")
        lines += _say_split(self.split) if self.split is not None else ["split: that of the data"]
        for kind in ("pretrain", "finetune"):
            config = getattr(self, kind)
            lines += [f"{kind}: {text}" for text in _say_set(config.model_dump(exclude_unset=True))]
        judged = _say_set(self.evaluation.model_dump(exclude_none=True))
        lines += [f"evaluate: {text}" for text in judged or ["as in training"]]
        for figure in self.figures:
            told = figure.model_dump(exclude_none=True, exclude={"label", "source", "note"})
            values = ", ".join(f"{name} {value:g}" for name, value in told.items())
            note = f"; {figure.note}" if figure.note else ""
            lines.append(f"published: {figure.label}: {values} ({figure.source}{note})")
        lines += [f"note: {note}" for note in self.notes]
        return [*lines, *(f"source: {source}" for source in self.sources)]


def list_protocols() -> tuple[str, ...]:
    """Return the names of the protocols that come with the package."""
    names = (entry.name for entry in _folder().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_protocol(name_or_path: str | Path) -> Protocol:
    """Read a protocol of the package by its name, or one of your own by its path.

    Parameters
    ----------
    name_or_path
        As ``pastis-2``, ``pastis-official:fold-1`` (one round) or ``mine.toml``.

    Raises
    ------
    MissingFileError
        If there is none.
    InputError
        If it is not as it must be; all breaches in one message.
    """
    place, which = _find(str(name_or_path))
    content = read_protocol_text(place)
    try:
        values = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise _unreadable(place, str(error)) from error
    name = place if place in list_protocols() else Path(place).stem
    try:
        protocol = Protocol.model_validate({**values, "name": name})
    except ValidationError as error:
        breaches = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'protocol'}: {item['msg'].lower()}"
            for item in error.errors()
        )
        raise _unreadable(place, breaches) from error
    return protocol if which is None else protocol.round(which)


def read_protocol_text(name_or_path: str | Path) -> str:
    """Return the text of a protocol's file; of a round, that of the protocol it belongs to."""
    place, _ = _find(str(name_or_path))
    if place in list_protocols():
        text: str = (_folder() / f"{place}.toml").read_text(encoding="utf-8")
        return text
    try:
        return Path(place).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(place, str(error)) from error


def _folder() -> Any:
    return files("stcln_geo.train") / "protocols"


def _find(text: str) -> tuple[str, str | None]:
    """Return the name or path of a protocol, and the round that is named after a colon."""
    name, colon, which = text.rpartition(":")
    known = list_protocols()
    for place, one in ((text, None), (name, which)) if colon else ((text, None),):
        if place in known or Path(place).is_file():
            return place, one
    raise MissingFileError(
        f"Cannot find the protocol {text!r}: it is neither a file nor one of {', '.join(known)}. "
        "Name one of these, or give the path of a .toml file."
    )


def _unreadable(place: str, why: str) -> InputError:
    return InputError(
        f"Cannot read the protocol {place}: {why}. It must be TOML with a title and the tables "
        "split, pretrain, finetune and evaluation, the recipes with the keys of their configs. "
        "`stcln-geo protocol show pastis-2 --toml` prints one. Correct it."
    )


def _merged(low: Any, high: Any) -> Any:
    """Return a recipe in which what ``high`` sets goes before what ``low`` sets."""
    values = low.model_dump(exclude_unset=True)
    merge_values(values, high.model_dump(exclude_unset=True))
    return type(low).model_validate(values)


def _say_split(split: SplitSection) -> list[str]:
    lines = []
    if split.by not in (None, "fold"):
        lines.append(
            f"split: by {split.by}, test {split.test:g}, validation {split.validation:g}, seed "
            f"{split.seed}"
        )
    for part in ("train", "validation", "test"):
        told = []
        if part in split.folds:
            told.append(f"folds {', '.join(map(str, split.folds[part]))}")
        if part in split.sites:
            ids = split.sites[part]
            told.append(f"{len(ids)} sites by id ({len(set(ids))} different)")
        if part in split.lists:
            told.append(f"the published list {split.lists[part]}")
        if told:
            lines.append(f"split: {part}: {' and '.join(told)}")
    return lines


def _say_set(values: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return settings as ``key = value``, one line each."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += _say_set(value, f"{prefix}{key}.")
        else:
            shown = list(value) if isinstance(value, tuple) else value
            lines.append(f"{prefix}{key} = {shown}")
    return lines
