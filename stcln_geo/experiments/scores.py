"""The figures of all runs: ours and, of the published sets, those by the published rules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..errors import MissingFileError
from ..legend import Legend
from ..model.checkpoint import find_checkpoint, read_metadata
from ..report.published import PublishedRule, published_confusion, published_metrics
from .carry_out import evaluation_file
from .design import View
from .steps import FinetuneStep, Steps

__all__ = [
    "PUBLISHED",
    "STRICT",
    "Counts",
    "Score",
    "place_by_names",
    "published_rule",
    "read_published",
    "read_scores",
]

STRICT = ("macro_miou", "macro_f1", "overall_accuracy", "kappa", "expected_calibration_error")
"""Our figures: every labelled pixel that was seen counts, and classes count alike."""

PUBLISHED = ("miou", "f1", "overall_accuracy", "kappa")
"""Figures by a published rule; see `stcln_geo.report.published`."""

_PASTIS = (
    "background", "meadow", "soft winter wheat", "corn", "winter barley", "winter rapeseed",
    "spring barley", "sunflower", "grapevine", "beet", "winter triticale", "winter durum wheat",
    "fruits, vegetables, flowers", "potatoes", "leguminous fodder", "soybeans", "orchard",
    "mixed cereal", "sorghum", "void",
)  # fmt: skip
_MTLCC = (
    "unknown", "sugar beet", "summer oat", "meadow", "rape", "hop", "winter spelt",
    "winter triticale", "beans", "peas", "potatoe", "soybeans", "asparagus", "winter wheat",
    "winter barley", "winter rye", "summer barley", "maize",
)  # fmt: skip
_SETS: dict[PublishedRule, tuple[str, ...]] = {"pastis": _PASTIS, "mtlcc": _MTLCC}


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What one run came to, of one view."""

    data: str
    arm: str
    view: str
    seed: int
    season: str
    """Season that was judged."""
    dates: str
    """Which dates were used, in words."""
    figures: dict[str, float | None]
    """Those of `STRICT`."""
    rule: PublishedRule | None
    """Of the published reading; None where the classes are of no published set."""
    published: dict[str, float | None]
    """Those of `PUBLISHED`; empty without a rule."""
    fields: int
    pixels: int
    """Pixels that were judged."""
    unseen: int
    """Labelled pixels without a clear date, which have no prediction."""
    note: str
    """What the figures hold for."""
    counts: Counts | None = field(default=None, compare=False)
    """What the figures are derived from."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Counts:
    """What one run's figures are derived from, to be added up over folds."""

    confusion: np.ndarray
    """(K, K) int64, pixels; rows truth, columns prediction."""
    placed: np.ndarray | None
    """(P, P) int64: the same in the places of the published codes; None without a rule."""
    bins: tuple[dict[str, float], ...]
    """Pixels by confidence, as `Calibration.to_json` gives them."""


def read_scores(steps: Steps) -> list[Score]:
    """Read the figures of all runs, in order of the steps and views.

    Raises
    ------
    MissingFileError
        If a run was not judged yet.
    """
    scores = []
    for step in steps.finetune:
        for view in step.views:
            file = evaluation_file(step, view)
            if not file.is_file():
                raise MissingFileError(
                    f"Cannot make the table: {file} is missing, the figures of {step.title}. Run "
                    "the same command again: it makes what is not there."
                )
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            scores.append(_score_of(step, view, found))
            if step.forest:
                # It has no confidence that could be right or wrong.
                calibration: dict[str, Any] = {**dict.fromkeys(found["calibration"]), "bins": []}
                forest = {**found, **found["baseline"], "calibration": calibration}
                scores.append(replace(_score_of(step, view, forest), arm=step.forest))
    return scores


def _score_of(step: FinetuneStep, view: View, found: dict[str, Any]) -> Score:
    """Return the figures of an evaluation's record."""
    confusion = np.array(found["confusion"], dtype=np.int64)
    names = [str(record["name"]) for record in found["per_class"]]
    rule, placed = _place(step, confusion, names)
    return Score(
        data=step.data, arm=step.arm, view=view.name, seed=step.seed,
        season=found["season"], dates=found["dates"] or "all dates",
        figures={
            **{name: found[name] for name in STRICT[:-1]},
            STRICT[-1]: found["calibration"][STRICT[-1]],
        },
        rule=rule, published=read_published(rule, placed), fields=found["fields"],
        pixels=found["pixels"], unseen=found["unseen_pixels"], note=found["note"],
        counts=Counts(
            confusion=confusion, placed=placed, bins=tuple(found["calibration"]["bins"])
        ),
    )  # fmt: skip


def published_rule(names: Sequence[str]) -> PublishedRule | None:
    """Return the published set that has all of these classes; None for none.

    They must be half of the set's classes at least: a few common crops are no sign of a set.
    """
    own = {name.casefold() for name in names}
    for rule, known in _SETS.items():
        if own <= set(known) and 2 * len(own) >= len(known):
            return rule
    return None


def _place(
    step: FinetuneStep, confusion: np.ndarray, names: Sequence[str]
) -> tuple[PublishedRule | None, np.ndarray | None]:
    """Put a confusion matrix in the places of a published set: by its protocol, or by names."""
    if step.protocol is None or step.protocol.evaluation.metric is None:
        return place_by_names(confusion, names)
    rule = step.protocol.evaluation.metric
    legend = Legend.from_json(str(read_metadata(find_checkpoint(step.out)).legend))
    values = [entry.value for entry in legend.classes]
    return rule, published_confusion(confusion, values, rule=rule)


def place_by_names(
    confusion: np.ndarray, names: Sequence[str]
) -> tuple[PublishedRule | None, np.ndarray | None]:
    """Put a confusion matrix in the places of the set that has these classes, if one has."""
    rule = published_rule(names)
    if rule is None:
        return None, None
    # Into the place that the source gives each class; what has no class here has no pixel.
    place = [_SETS[rule].index(name.casefold()) for name in names]
    whole = np.zeros((len(_SETS[rule]),) * 2, dtype=np.int64)
    whole[np.ix_(place, place)] = confusion
    return rule, whole


def read_published(
    rule: PublishedRule | None, placed: np.ndarray | None
) -> dict[str, float | None]:
    """Score a confusion matrix by the rule of its set; nothing without one."""
    if rule is None or placed is None:
        return {}
    found = published_metrics(placed, rule=rule)
    values = (found.miou, found.f1, found.overall_accuracy, found.kappa)
    return {
        name: float(value) if np.isfinite(value) else None
        for name, value in zip(PUBLISHED, values, strict=True)
    }
