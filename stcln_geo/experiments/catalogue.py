"""The experiments by name: each a function from a few choices to a design."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..train.protocol import Protocol, list_protocols
from .design import Arm, Design, Pair, View, cutoff
from .rounds import protocol_design

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

WITH_FOREST = ("few-labels", "early-season", "cross-year")
"""Experiments in which a random forest may take part."""

_PREFIX = 0.8
"""Share of the chips that end at a random date, where a network is to serve all cut-offs."""

_OPTIONS_OF = {
    "ratios": ("--ratios", "mask-ratio"),
    "strategies": ("--strategies", "mask-strategy"),
    "months": ("--months", "early-season"),
    "test_season": ("--test-season", "cross-year"),
    "long_dates": ("--dates", "short-series"),
    "short_dates": ("--dates", "short-series"),
}
"""Choices that belong to one experiment alone, by field: the option, and the experiment."""

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
    forest: bool = False
    """True trains a random forest on the same fields beside the networks, of `WITH_FOREST`."""
    protocol: Protocol | None = None
    """Of ``protocol``: what is followed, in all its rounds."""
    pretraining: bool = False
    """Of ``protocol``: True fine-tunes from pre-training too, and compares."""


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
    if choices.protocol is not None and name != "protocol":
        raise InputError(
            f"Cannot follow the protocol {choices.protocol.name} in the experiment {name}: only "
            "the experiment protocol follows one. Leave --protocol out, or run `stcln-geo "
            "experiment protocol`."
        )
    usual = Choices()
    for field, (option, owner) in _OPTIONS_OF.items():
        if name != owner and getattr(choices, field) != getattr(usual, field):
            raise InputError(
                f"Cannot use {option} in the experiment {name}: only {owner} compares by it. Leave "
                f"it out, or run `stcln-geo experiment {owner}`."
            )
    if min(choices.fields, default=1) < 1:
        raise InputError(
            f"Cannot train on --fields {min(choices.fields)} of each class: it must be 1 or more. "
            "Leave it out to train on all training fields."
        )
    if choices.forest and name not in WITH_FOREST:
        raise InputError(
            f"Cannot use --baseline forest in the experiment {name}: it is of "
            f"{', '.join(WITH_FOREST)}. Leave it out, or compare single runs by `stcln-geo "
            "evaluate RUN CUBE --baseline forest`."
        )
    design = EXPERIMENTS[name](choices)
    return design.with_forest() if choices.forest else design


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


def _sta(choices: Choices) -> Design:
    few = _few(choices)
    return Design(
        name="sta",
        title="With and without the spatiotemporal attention",
        question=(
            "Fine-tuning with the spatiotemporal attention (STA) and without it, from "
            "pre-training and from random weights. Pre-training has none."
        ),
        arms=tuple(
            Arm(
                name=f"{start}-{'with' if sta else 'without'}",
                title=f"{said}, {'with' if sta else 'without'} STA",
                pretrain={} if start == "pretrained" else None,
                finetune={**few, "model.sta": sta},
            )
            for start, said in (("pretrained", "pre-trained"), ("scratch", "from scratch"))
            for sta in (True, False)
        ),
        views=(_WHOLE,),
        pairs=(
            _pair("pretrained-with", "pretrained-without", "STA, pre-trained"),
            _pair("scratch-with", "scratch-without", "STA, from scratch"),
            _pair("pretrained-with", "scratch-with", "pre-training, with STA"),
            _pair("pretrained-without", "scratch-without", "pre-training, without STA"),
        ),
    )


def _short_series(choices: Choices) -> Design:
    long, short = choices.long_dates, choices.short_dates
    if not 1 <= short < long:
        raise InputError(
            f"Cannot compare {long} dates in pre-training with {short} in fine-tuning: fine-tuning "
            "has fewer, and at least 1. Use for example --dates 30,12."
        )
    few = {**_few(choices), "data.max_dates": short, "validation.dates": short}
    views = (View(name=f"{short}-dates", title=f"{short} dates", dates=short), _WHOLE)
    return Design(
        name="short-series",
        title=f"Pre-trained on {long} dates, fine-tuned on {short}",
        question=(
            f"Pre-training on up to {long} dates of a chip, fine-tuning on {short} random dates of "
            f"each, judged with {short} dates spread evenly, and with all dates."
        ),
        arms=(
            Arm(name="pretrained", title="pre-trained", pretrain={"data.max_dates": long},
                finetune=few),
            Arm(name="scratch", title="from scratch", finetune=few),
        ),
        views=views,
        pairs=tuple(
            _pair("pretrained", "scratch", f"pre-training, {view.title}", view.name)
            for view in views
        ),
        notes=(f"Weights are chosen by the validation fields with {short} dates.",),
    )  # fmt: skip


def _cross_year(choices: Choices) -> Design:
    own, other = choices.season, choices.test_season
    if own is None or other is None or own == other:
        raise InputError(
            f"Cannot train on the season {own} and test on {other}: two different seasons are "
            "needed, both with labels and a split. Name them with --season and --test-season."
        )
    few = _few(choices)
    there = View(name="other-season", title=f"season {other}", season=other)
    here = View(name="own-season", title=f"season {own}")
    arms = (
        Arm(name="pretrained", title="pre-trained", pretrain={}, finetune=few),
        Arm(name="scratch", title="from scratch", finetune=few),
    )
    return Design(
        name="cross-year",
        title=f"Trained on the season {own}, tested on {other}",
        question=(
            "Networks that were trained and chosen on one season are judged on the test fields of "
            "the other, and of their own."
        ),
        arms=arms,
        views=(there, here),
        pairs=(
            *(
                _pair("pretrained", "scratch", f"pre-training, {view.title}", view.name)
                for view in (there, here)
            ),
            *(
                Pair(first=(arm.name, there.name), second=(arm.name, here.name),
                     title=f"other season - own season, {arm.title}")
                for arm in arms
            ),
        ),
        notes=(
            "The two seasons have splits and fields of their own: a test field of one may lie "
            "where a training field of the other does.",
        ),
    )  # fmt: skip


def _protocol(choices: Choices) -> Design:
    if choices.protocol is None:
        raise InputError(
            "Cannot run the experiment protocol without one: there are "
            f"{', '.join(list_protocols())}, and files of your own. Name one with --protocol."
        )
    return protocol_design(choices.protocol, pretraining=choices.pretraining, few=_few(choices))


EXPERIMENTS: dict[str, Callable[[Choices], Design]] = {
    "few-labels": _few_labels,
    "early-season": _early_season,
    "mask-ratio": _mask_ratio,
    "mask-strategy": _mask_strategy,
    "sta": _sta,
    "short-series": _short_series,
    "cross-year": _cross_year,
    "protocol": _protocol,
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
