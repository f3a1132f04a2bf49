"""From a design to runs: each in a directory of its own, pre-trainings shared where equal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from ..cube.contract import SPLITS
from ..data.source import Source, open_source
from ..data.split import check_labelled
from ..data.split_labels import SplitSpec, open_split
from ..errors import InputError, LabelError
from ..storage import Location
from ..train.config import FinetuneConfig, PretrainConfig
from ..train.protocol import Protocol
from .design import Arm, Design, View
from .rounds import Pooling, pooling_of, pretraining_name
from .settings import Settings

__all__ = ["FinetuneStep", "PretrainStep", "Steps", "plan_steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainStep:
    """A pre-training run."""

    title: str
    out: Location
    cubes: tuple[Path, ...]
    config: PretrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneStep:
    """A fine-tuning run, and all that it is judged on."""

    title: str
    out: Location
    arm: str
    data: str
    """Name of the data set."""
    seed: int
    cube: Path
    season: str
    """First day of the season that is trained on."""
    config: FinetuneConfig
    views: tuple[View, ...]
    protocol: Protocol | None = None
    """Judges the run; None where no protocol is followed."""
    forest: str = ""
    """Name of the arm that is a random forest on the fields of this run; empty for none."""
    split: SplitSpec | None = None
    """Where fields go, in memory alone; None leaves them where the cube has them."""

    def season_of(self, view: View) -> str:
        """Return the season that a view judges on."""
        return view.season or self.season

    def open(self) -> Path | Source:
        """Return what is trained and judged on: the cube, or its season under the own split."""
        if self.split is None:
            return self.cube
        return open_split(self.cube, self.split, season=self.season).source


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """All runs of an experiment."""

    pretrain: tuple[PretrainStep, ...]
    finetune: tuple[FinetuneStep, ...]
    pooling: Pooling = "none"
    """How the rounds of a protocol come together."""
    notes: tuple[str, ...] = ()
    """What there is to know of the splits."""

    @property
    def count(self) -> int:
        """Number of runs."""
        return len(self.pretrain) + len(self.finetune)


def plan_steps(design: Design, settings: Settings) -> Steps:
    """List the runs of an experiment; data are opened, no pixel is read.

    Raises
    ------
    InputError
        If options are set for all that the arms differ in.
    """
    settings.check_against(design)
    pretrain: dict[Location, PretrainStep] = {}
    finetune: list[FinetuneStep] = []
    poolings: list[Pooling] = []
    notes: dict[str, None] = {}
    for path in settings.data:
        rounds = [_open_round(path, settings, views) for views in design.parts]
        poolings.append(_pooling(rounds))
        notes |= dict.fromkeys(note for one in rounds for note in one.notes)
        for arm in design.arms:
            if arm.forest_of:
                continue  # judged with the runs of that arm
            for one in rounds:
                for seed, pretrained in zip(
                    settings.run_seeds, settings.pretrained_by, strict=True
                ):
                    init = None
                    if arm.pretrain is not None:
                        step = _pretrain_step(arm, settings, one, seed=pretrained, known=pretrain)
                        init = step.out
                    made = _finetune_step(arm, settings, one, seed=seed, init=init)
                    forests = [other.name for other in design.arms if other.forest_of == arm.name]
                    finetune.append(replace(made, forest=forests[0]) if forests else made)
    return Steps(
        pretrain=tuple(pretrain.values()),
        finetune=tuple(finetune),
        pooling=min(poolings, key=get_args(Pooling).index),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Round:
    """A data set under one split: that of a round of a protocol, or the one it has."""

    path: Path
    season: str
    views: tuple[View, ...]
    split: SplitSpec | None
    tested: np.ndarray
    """(F,) bool. True for the fields that are tested on."""
    notes: tuple[str, ...]

    @property
    def protocol(self) -> Protocol | None:
        return self.views[0].protocol

    @property
    def folder(self) -> str:
        return self.views[0].folder


def _open_round(path: Path, settings: Settings, views: tuple[View, ...]) -> _Round:
    """Open a data set as runs will, and check that they can be judged."""
    protocol = views[0].protocol
    split = None if protocol is None else protocol.split_spec(path, season=settings.season)
    notes: tuple[str, ...] = ()
    if split is None:
        source = open_source(path, settings.season)
    else:
        opened = open_split(path, split, season=settings.season)
        source, notes = opened.source, opened.report.notes()
    _check_labelled(source)
    for season in {view.season for view in views if view.season is not None}:
        _check_labelled(open_source(path, season), like=source)
    fields, _ = check_labelled(source)
    return _Round(
        path=path, season=source.season, views=views, split=split,
        tested=fields.split == SPLITS["test"],
        notes=tuple(f"{views[0].title}: {note}" for note in notes),
    )  # fmt: skip


def _pooling(rounds: Sequence[_Round]) -> Pooling:
    """Tell how the rounds of a data set come together."""
    found = pooling_of([one.tested for one in rounds])
    labels = {
        (one.protocol.finetune.labels.ignore, one.protocol.finetune.labels.silent)
        for one in rounds
        if one.protocol is not None
    }
    # Matrices of other classes cannot be added up.
    return "mean" if found == "both" and len(labels) > 1 else found


def _finetune_step(
    arm: Arm, settings: Settings, one: _Round, *, seed: int, init: Location | None
) -> FinetuneStep:
    also = [one.views[0].title] if one.folder else []
    also += [one.path.stem] if len(settings.data) > 1 else []
    return FinetuneStep(
        title=", ".join([f"{arm.title}, seed {seed}", *also]),
        out=settings.out / "runs" / one.path.stem / arm.name / one.folder / f"seed-{seed}",
        arm=arm.name,
        data=one.path.stem,
        seed=seed,
        cube=one.path,
        season=one.season,
        config=settings.finetune_config(arm, seed=seed, init=init, protocol=one.protocol),
        views=one.views,
        protocol=one.protocol,
        split=one.split,
    )


def _pretrain_step(
    arm: Arm, settings: Settings, one: _Round, *, seed: int, known: dict[Location, PretrainStep]
) -> PretrainStep:
    """Return a pre-training, which is put among those that are known; equal ones are shared."""
    config = settings.pretrain_config(arm, seed=seed, protocol=one.protocol)
    name = _slug(arm.pretrain or {})
    if one.protocol is not None:
        name = pretraining_name(config)

    def named(name: str) -> PretrainStep:
        return PretrainStep(
            title=f"pre-training, {name}, seed {seed}",
            out=settings.out / "pretraining" / name / f"seed-{seed}",
            cubes=settings.streamed,
            config=config,
        )

    step = named(name)
    found = known.setdefault(step.out, step)
    if found.config != config and one.folder:
        step = named(f"{name}-{one.folder}")
        found = known.setdefault(step.out, step)
    if found.config != config:
        raise InputError(
            f"Cannot name the pre-trainings of {settings.out}: two of them would be {step.out}. "
            "Give arms options that differ by name."
        )
    return found


def _check_labelled(source: Source, *, like: Source | None = None) -> None:
    """Check, before hours of training, that a season can be judged on."""
    fields, legend = check_labelled(source)
    if not (fields.split == SPLITS["test"]).any():
        raise LabelError(
            f"Cannot judge on {source}: none of its {len(fields)} fields is in the test split. Run "
            "`stcln-geo labels split CUBE` first."
        )
    if like is not None and like.legend is not None:
        here, there = ([entry.value for entry in one.classes] for one in (legend, like.legend))
        if here != there:
            raise LabelError(
                f"Cannot judge on {source} what was trained on {like}: its classes are "
                f"{', '.join(here)}, not {', '.join(there)}. Both seasons must have the same "
                "classes, in the same order. Burn both with the same --legend and --min-fields 1."
            )


def _slug(options: Mapping[str, Any]) -> str:
    """Name options: their last words and values."""
    parts = [f"{key.rpartition('.')[2]}-{json.dumps(value)}" for key, value in options.items()]
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(parts)).strip("-").lower() or "common"
