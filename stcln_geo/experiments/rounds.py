"""A protocol as a design: each round a view with runs of its own, and whether rounds are folds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..archive.index import INDEX_FILE
from ..cube.stack import is_stack, open_stack
from ..cube.store import list_seasons
from ..errors import InputError
from ..storage import location
from ..train.config import PretrainConfig
from ..train.protocol import Protocol
from .design import Arm, Design, Pair, View

__all__ = [
    "Pooling",
    "pooling_of",
    "pretraining_name",
    "pretraining_recipe",
    "protocol_design",
    "seeds_of",
    "with_pooling",
]

Pooling = Literal["none", "mean", "both"]
"""How rounds come together. ``both``: they are folds, each field is tested on once at most, so that
confusion matrices may be added up, and figures averaged. ``mean``: test parts overlap, so that
figures may only be averaged. ``none``: there is one round, or all are tested on the same fields, as
variants of one another."""

_CHOICE = ("folds", "sites", "lists")
"""Options of pre-training that choose sites."""


def protocol_design(
    protocol: Protocol, *, pretraining: bool, few: Mapping[str, Any] | None = None
) -> Design:
    """Return a protocol as an experiment over all its rounds.

    Parameters
    ----------
    pretraining
        True adds an arm that begins from pre-training.
    few
        Options of fine-tuning that choose training fields, besides those of the protocol.

    Raises
    ------
    InputError
        If ``few`` sets what the protocol sets.
    """
    rounds = [protocol.round(one.name) for one in protocol.rounds] or [protocol]
    for one in rounds:
        labels = one.finetune.labels
        if few and (labels.fields_per_class or labels.fraction):
            raise InputError(
                f"Cannot use --fields with the protocol {one.name}: it says itself how many fields "
                "are trained on. Leave --fields out."
            )
    arms = [Arm(name="scratch", title="from scratch", finetune=few or {})]
    if pretraining:
        arms.insert(0, Arm(name="pretrained", title="pre-trained", pretrain={}, finetune=few or {}))
    views = tuple(_view(one) for one in rounds)
    pairs = tuple(
        Pair(
            first=("pretrained", view.name), second=("scratch", view.name),
            title="pre-training" + (f", {view.title}" if len(views) > 1 else ""),
        )
        for view in views
    )  # fmt: skip
    return Design(
        name="protocol",
        title=f"The protocol {protocol.name}",
        question=f"{protocol.title}.",
        arms=tuple(arms),
        views=views,
        pairs=pairs if pretraining else (),
        axis="round of the protocol",
        notes=protocol.notes,
    )


def _view(protocol: Protocol) -> View:
    name, colon, which = protocol.name.rpartition(":")
    return View(name=which, title=which, protocol=protocol, folder=which if colon and name else "")


def with_pooling(design: Design, pooling: Pooling) -> Design:
    """Draw the rounds of a protocol as a curve where they are variants of one another."""
    if pooling == "none" and len(design.views) > 1 and design.views[0].protocol is not None:
        return replace(design, along="views")
    return design


def pooling_of(tests: Sequence[np.ndarray]) -> Pooling:
    """Tell folds from variants by the fields that rounds are tested on.

    Parameters
    ----------
    tests : (F,) bool each. True for the fields that a round is tested on.

    >>> pooling_of([np.array([True, False]), np.array([False, True])])
    'both'
    """
    if all((one == tests[0]).all() for one in tests):
        return "none"
    often = np.sum(tests, axis=0)
    return "both" if often.max() <= 1 else "mean"


def seeds_of(protocol: Protocol, count: int) -> tuple[int, ...]:
    """Return the first seeds of a protocol; where it names fewer, further ones count up."""
    known = protocol.seeds
    more = range(max(known) + 1, max(known) + 1 + count - len(known))
    return (*known[:count], *more)


def pretraining_name(config: PretrainConfig) -> str:
    """Name the pre-training of a round by the sites that it is shown."""
    data = config.data
    parts = [
        "-".join(["folds", *map(str, data.folds)]) if data.folds else "",
        "-".join(["lists", *data.lists]).replace("_", "-") if data.lists else "",
        f"sites-{len(data.sites)}" if data.sites else "",
    ]
    return "-".join(part for part in parts if part) or "common"


def pretraining_recipe(
    protocol: Protocol, *, data: Sequence[Path], streamed: Sequence[Path]
) -> dict[str, Any]:
    """Return what a protocol sets of pre-training, for the data that pre-training is shown.

    Season and sites are those of the data that the protocol is about. Other data are shown whole.

    Parameters
    ----------
    data
        What is fine-tuned and judged on.
    streamed
        What pre-training is shown.

    Raises
    ------
    InputError
        If sites are to be chosen, and there are data of both kinds.
    """
    recipe = protocol.recipe("pretrain")
    known = {path.resolve() for path in data}
    own = [path for path in streamed if path.resolve() in known or _is_of(path, protocol.dataset)]
    if len(own) == len(streamed):
        return recipe
    section = recipe.get("data", {})
    if own and (recipe.get("season") or any(section.get(key) for key in _CHOICE)):
        other = next(path for path in streamed if path not in own)
        raise InputError(
            f"Cannot pre-train on {own[0]} and {other} at once: the protocol {protocol.name} shows "
            f"only a season or sites of the first, and the second has others. Name with "
            "--pretrain-data either what the protocol is for, or other data."
        )
    recipe.pop("season", None)
    return {
        **recipe, "data": {key: value for key, value in section.items() if key not in _CHOICE}
    }  # fmt: skip


def _is_of(path: Path, dataset: str | None) -> bool:
    """Return True where a path is a stack of a published set: another copy of it, perhaps."""
    place = location(path)
    if dataset is None or (place / INDEX_FILE).is_file():
        return False
    return any(
        is_stack(place, season) and open_stack(place, season).attrs.get("dataset") == dataset
        for season in list_seasons(place)
    )
