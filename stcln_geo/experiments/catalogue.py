"""The experiments by name: each a function from a few choices to a design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from .design import Arm, Design, Pair, View, cutoff

__all__ = ["EXPERIMENTS", "RATIOS", "STRATEGIES", "Choices", "make_design"]

RATIOS = (0.15, 0.2, 0.4, 0.6, 0.8)
"""Those that the published scripts name."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "time": {"masking.strategy": "time"},
    # A pixel on all dates: a tube of one pixel.
    "space": {"masking.strategy": "tube", "masking.block": 1},
    "space-time": {"masking.strategy": "space-time"},
    "block": {"masking.strategy": "block", "masking.block": 4},
    "tube": {"masking.strategy": "tube", "masking.block": 4},
}
"""Ways to mask, by name: only along time, only in space, both by pixel, and by squares."""

_PREFIX = 0.8
"""Share of the chips that end at a random date, where a network is to serve all cut-offs."""

_WHOLE = View(name="season", title="whole season")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What may be chosen of an experiment; each uses a few of these."""

    fields: tuple[int, ...] = ()
    """Training fields of each class; by default all, of ``few-labels`` 1, 3 and 10."""
    ratios: tuple[float, ...] = RATIOS
    strategies: tuple[str, ...] = tuple(STRATEGIES)
    months: tuple[int, ...] = ()
    """Cut-offs of ``early-season``: whole months after the season's first day."""
    season: str | None = None
    """First day of the labelled season."""
    test_season: str | None = None
    """Of ``cross-year``."""
    long_dates: int = 30
    short_dates: int = 12
    """Dates of pre-training, and of fine-tuning and test, of ``short-series``."""


def make_design(name: str, choices: Choices) -> Design:
    """Return an experiment by its name.

    Raises
    ------
    InputError
        If there is none of this name, or the choices do not fit it.
    """
    if name not in EXPERIMENTS:
        raise InputError(
            f"Cannot run the experiment {name!r}: there are {', '.join(EXPERIMENTS)}. Name one of "
            "these."
        )
    if min(choices.fields, default=1) < 1:
        raise InputError(
            f"Cannot train on --fields {min(choices.fields)} of each class: it must be 1 or more. "
            "Leave it out to train on all training fields."
        )
    return EXPERIMENTS[name](choices)


def _few_labels(choices: Choices) -> Design:
    counts = choices.fields or (1, 3, 10)
    arms, pairs = [], []
    for count in sorted(counts):
        few = {"labels.fields_per_class": count}
        arms += [
            Arm(
                name=f"pretrained-{count}", title=f"pre-trained, {_fields(count)}", pretrain={},
                finetune=few, level=count, curve="pre-trained",
            ),
            Arm(
                name=f"scratch-{count}", title=f"from scratch, {_fields(count)}", finetune=few,
                level=count, curve="from scratch",
            ),
        ]  # fmt: skip
        pairs.append(
            _pair(f"pretrained-{count}", f"scratch-{count}", f"pre-training, {_fields(count)}")
        )
    return Design(
        name="few-labels",
        title="Few labels, with and without pre-training",
        question="Fine-tuning from pre-training and from random weights, on the same few fields.",
        arms=tuple(arms), views=(_WHOLE,), pairs=tuple(pairs), axis="training fields of each class",
    )  # fmt: skip


def _early_season(choices: Choices) -> Design:
    few = {**_few(choices), "data.prefix": _PREFIX}
    months = choices.months or tuple(range(1, 13))
    if list(months) != sorted(set(months)) or not 0 < min(months) <= max(months) <= 24:
        raise InputError(
            f"Cannot use the cut-offs {', '.join(map(str, months))} (months after the season's "
            "first day): they must increase, from 1 to at most 24. Use for example --months 3,6,9."
        )
    if choices.season is None:
        raise InputError(
            "Cannot make the cut-offs of early-season without a season. Name one with --season."
        )
    days = [cutoff(choices.season, count) for count in months]
    views = tuple(
        View(name=f"month-{count:02d}", title=f"{day.day} {day:%b}", months=count)
        for count, day in zip(months, days, strict=True)
    )
    return Design(
        name="early-season",
        title="Early season: one network for all cut-offs",
        question=(
            "Each network is trained once, on series that end at random dates, and judged on the "
            "test fields with the dates before each cut-off."
        ),
        arms=(
            Arm(name="pretrained", title="pre-trained", pretrain={}, finetune=few),
            Arm(name="scratch", title="from scratch", finetune=few),
        ),
        views=views,
        pairs=tuple(
            _pair("pretrained", "scratch", f"pre-training, dates before {view.title}", view.name)
            for view in views
        ),
        axis="dates before",
        along="views",
        notes=(
            f"{_PREFIX:.0%} of the training chips end at a random one of their dates. Weights are "
            "chosen by the validation fields with the whole season.",
            "A pixel without a clear date before the cut-off has no prediction and is not counted: "
            "see the column of unseen pixels. Early figures are of fewer pixels.",
        ),
    )


def _mask_ratio(choices: Choices) -> Design:
    ratios = choices.ratios
    if not ratios or not all(0 < ratio < 1 for ratio in ratios):
        raise InputError(
            f"Cannot hide the shares {', '.join(map(str, ratios))}: each must lie between 0 and 1. "
            "Use for example --ratios 0.2,0.4,0.6."
        )
    arms = tuple(
        Arm(
            name=f"ratio-{ratio:g}", title=f"{ratio:g} hidden",
            pretrain={"masking.mask_ratio": ratio}, finetune=_few(choices), level=ratio,
            curve="pre-trained",
        )
        for ratio in sorted(ratios)
    )  # fmt: skip
    return Design(
        name="mask-ratio",
        title="How much pre-training hides",
        question="Pre-training that hides more or less, and the same fine-tuning.",
        arms=(*arms, _scratch(choices)), views=(_WHOLE,),
        pairs=tuple(_pair(arm.name, "scratch", f"{arm.title} - from scratch") for arm in arms),
        axis="share hidden in pre-training",
    )  # fmt: skip


def _mask_strategy(choices: Choices) -> Design:
    unknown = [name for name in choices.strategies if name not in STRATEGIES]
    if unknown or not choices.strategies:
        raise InputError(
            f"Cannot mask by {', '.join(unknown) or '(none)'}: ways to mask are "
            f"{', '.join(STRATEGIES)}. Name some of these with --strategies."
        )
    arms = tuple(
        Arm(name=name, title=name, pretrain=STRATEGIES[name], finetune=_few(choices))
        for name in choices.strategies
    )
    return Design(
        name="mask-strategy",
        title="What pre-training hides",
        question=(
            "Pre-training that hides dates (time), pixels on all dates (space), pixels on dates "
            "(space-time), squares on dates (block) or squares on all dates (tube), and the same "
            "fine-tuning."
        ),
        arms=(*arms, _scratch(choices)), views=(_WHOLE,),
        pairs=tuple(_pair(arm.name, "scratch", f"{arm.title} - from scratch") for arm in arms),
    )  # fmt: skip


EXPERIMENTS: dict[str, Callable[[Choices], Design]] = {
    "few-labels": _few_labels,
    "early-season": _early_season,
    "mask-ratio": _mask_ratio,
    "mask-strategy": _mask_strategy,
}
"""Designs by name."""


def _few(choices: Choices) -> dict[str, Any]:
    """Return the option that chooses training fields; nothing for all of them."""
    if len(choices.fields) > 1:
        raise InputError(
            f"Cannot use --fields {','.join(map(str, choices.fields))} here: only few-labels "
            "compares several numbers of fields. Give one."
        )
    return {"labels.fields_per_class": choices.fields[0]} if choices.fields else {}


def _scratch(choices: Choices) -> Arm:
    return Arm(name="scratch", title="from scratch", finetune=_few(choices))


def _pair(first: str, second: str, title: str, view: str = _WHOLE.name) -> Pair:
    return Pair(first=(first, view), second=(second, view), title=title)


def _fields(count: int) -> str:
    return f"{count} {'field' if count == 1 else 'fields'} a class"
