"""An experiment as data: arms that differ in a few options, and what each run is judged on."""

from __future__ import annotations

import calendar
import datetime
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ..data.dates import DateChoice
from ..errors import InputError
from ..train.protocol import Protocol

__all__ = ["Arm", "Design", "Pair", "View"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to train: what it sets beyond what all arms share."""

    name: str
    """Name of its folder."""
    title: str
    """In words."""
    pretrain: Mapping[str, Any] | None = None
    """Options of pre-training by dotted key; None trains from scratch."""
    finetune: Mapping[str, Any] = field(default_factory=dict)
    """Options of fine-tuning by dotted key."""
    level: float | None = None
    """Where it lies on the horizontal axis of the plot; None where it is of no scale."""
    curve: str = ""
    """Arms of one curve share this; by default each is of its own."""
    forest_of: str = ""
    """Name of the arm on whose training fields a random forest is trained; empty for a network."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What of the test fields a run is shown when it is judged."""

    name: str
    title: str
    months: int | None = None
    """Dates before so many months after the season's first day; None for all."""
    dates: int | None = None
    """At most so many dates; None for all."""
    season: str | None = None
    """Another season than that of the training."""
    protocol: Protocol | None = None
    """The protocol, or the round of one, that splits, trains and judges: a view with one has runs
    of its own."""
    folder: str = ""
    """Name of the folder of these runs, in that of their arm; empty for none."""

    def choice(self, season: str) -> DateChoice | None:
        """Return which dates are used of a season, given its first day; None for all."""
        if self.months is None and self.dates is None:
            return None
        until = None
        if self.months is not None:
            until = (cutoff(season, self.months) - datetime.date.fromisoformat(season)).days
        return DateChoice(until=until, most=self.dates)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two cells of the table whose runs are compared seed by seed."""

    first: tuple[str, str]
    """Names of an arm and a view."""
    second: tuple[str, str]
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """An experiment, without its data."""

    name: str
    title: str
    question: str
    """What is compared, in a sentence."""
    arms: tuple[Arm, ...]
    views: tuple[View, ...]
    pairs: tuple[Pair, ...]
    axis: str = ""
    """Label of the horizontal axis; empty for arms side by side."""
    along: str = "arms"
    """``views`` draws a curve along the views, ``arms`` along the levels of the arms."""
    notes: tuple[str, ...] = ()
    """What a reader has to know of how it is done."""

    def __post_init__(self) -> None:
        """Check that names are clear, and pairs are of this experiment."""
        arms, views = [arm.name for arm in self.arms], [view.name for view in self.views]
        twice = sorted({name for name in arms + views if (arms + views).count(name) > 1})
        if twice or not arms or not views:
            raise InputError(
                f"Cannot make the experiment {self.name}: {len(arms)} arms, {len(views)} views, "
                f"named twice: {', '.join(twice) or 'none'}. There must be at least one of each, "
                "and every name once. Leave out values that are given twice."
            )
        strange = [
            cell for pair in self.pairs for cell in (pair.first, pair.second)
            if cell[0] not in arms or cell[1] not in views
        ]  # fmt: skip
        if strange:
            raise InputError(
                f"Cannot compare {strange[0]} in the experiment {self.name}: it has the arms "
                f"{', '.join(arms)} and the views {', '.join(views)}. Name these."
            )

    @property
    def set_keys(self) -> dict[str, set[str]]:
        """The options that arms or rounds set, of ``pretrain`` and of ``finetune``.

        They are not to be set for all.
        """
        return {
            "pretrain": {key for arm in self.arms for key in (arm.pretrain or {})}
            | self._varied("pretrain"),
            "finetune": {key for arm in self.arms for key in arm.finetune}
            | self._varied("finetune"),
        }

    def _varied(self, part: Literal["pretrain", "finetune"]) -> set[str]:
        """Return the options that are not the same in all rounds of a protocol."""
        rounds = [
            dict(_flat(view.protocol.recipe(part)))
            for view in self.views
            if view.protocol is not None
        ]
        return {
            key for one in rounds for key in one
            if any(other.get(key) != one[key] for other in rounds)
        }  # fmt: skip

    def with_forest(self) -> Design:
        """Return the design with a random forest beside each arm that is trained from scratch.

        It is trained on the fields of that arm, and compared with what that arm is compared with.
        """
        forests = {
            arm.name: replace(
                arm, name=f"forest{arm.name.removeprefix('scratch')}",
                title=arm.title.replace("from scratch", "random forest"), finetune={},
                curve="random forest", forest_of=arm.name,
            )
            for arm in self.arms if arm.pretrain is None
        }  # fmt: skip
        pairs = [
            Pair(
                first=pair.first, second=(forests[pair.second[0]].name, pair.second[1]),
                title=f"pre-trained - {forests[pair.second[0]].title}"
                + (f", {self.view(pair.second[1]).title}" if len(self.views) > 1 else ""),
            )
            for pair in self.pairs
            if pair.second[0] in forests and pair.first[0] != pair.second[0]
        ]  # fmt: skip
        return replace(
            self, arms=(*self.arms, *forests.values()), pairs=(*self.pairs, *pairs),
            notes=(
                *self.notes,
                "The random forest sees the bands of a pixel every ten days, gaps filled linearly "
                "in time; no validation field chooses anything of it.",
            ),
        )  # fmt: skip

    @property
    def parts(self) -> list[tuple[View, ...]]:
        """The views that share runs: all of them, but each with a protocol by itself."""
        shared = tuple(view for view in self.views if view.protocol is None)
        alone = [(view,) for view in self.views if view.protocol is not None]
        return [shared, *alone] if shared else list(alone)

    def arm(self, name: str) -> Arm:
        """Return an arm by its name."""
        return next(arm for arm in self.arms if arm.name == name)

    def view(self, name: str) -> View:
        """Return a view by its name."""
        return next(view for view in self.views if view.name == name)


def cutoff(season: str, months: int) -> datetime.date:
    """Return the day so many months after a season's first day.

    >>> cutoff("2018-09-01", 7)
    datetime.date(2019, 4, 1)
    """
    begun = datetime.date.fromisoformat(season)
    years, month = divmod(begun.month - 1 + months, 12)
    year = begun.year + years
    return datetime.date(year, month + 1, min(begun.day, calendar.monthrange(year, month + 1)[1]))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of a recipe by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
