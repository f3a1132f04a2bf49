"""From a design to runs: each in a directory of its own, pre-trainings shared where equal."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cube.contract import SPLITS
from ..data.source import Source, open_source
from ..data.split import check_labelled
from ..errors import InputError, LabelError
from ..train.config import FinetuneConfig, PretrainConfig
from .design import Arm, Design, View
from .settings import Settings

__all__ = ["FinetuneStep", "PretrainStep", "Steps", "plan_steps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainStep:
    """A pre-training run."""

    title: str
    out: Path
    cubes: tuple[Path, ...]
    config: PretrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneStep:
    """A fine-tuning run, and all that it is judged on."""

    title: str
    out: Path
    arm: str
    data: str
    """Name of the data set."""
    seed: int
    cube: Path
    season: str
    """First day of the season that is trained on."""
    config: FinetuneConfig
    views: tuple[View, ...]

    def season_of(self, view: View) -> str:
        """Return the season that a view judges on."""
        return view.season or self.season


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """All runs of an experiment."""

    pretrain: tuple[PretrainStep, ...]
    finetune: tuple[FinetuneStep, ...]

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
    seasons = {}
    for path in settings.data:
        source = open_source(path, settings.season)
        seasons[path.stem] = source.season
        _check_labelled(source)
        for season in {view.season for view in design.views if view.season is not None}:
            _check_labelled(open_source(path, season), like=source)
    pretrain: dict[Path, PretrainStep] = {}
    finetune = []
    for path in settings.data:
        for arm in design.arms:
            for seed in settings.run_seeds:
                init = None
                if arm.pretrain is not None:
                    step = _pretrain_step(arm, settings, seed=seed % settings.pretrain_seeds)
                    known = pretrain.setdefault(step.out, step)
                    if known.config != step.config:
                        raise InputError(
                            f"Cannot name the pre-trainings of {design.name}: two of them would be "
                            f"{step.out}. Give arms options that differ by name."
                        )
                    init = step.out
                finetune.append(
                    FinetuneStep(
                        title=f"{arm.title}, seed {seed}"
                        + (f", {path.stem}" if len(settings.data) > 1 else ""),
                        out=settings.out / "runs" / path.stem / arm.name / f"seed-{seed}",
                        arm=arm.name,
                        data=path.stem,
                        seed=seed,
                        cube=path,
                        season=seasons[path.stem],
                        config=settings.finetune_config(arm, seed=seed, init=init),
                        views=design.views,
                    )
                )
    return Steps(pretrain=tuple(pretrain.values()), finetune=tuple(finetune))


def _pretrain_step(arm: Arm, settings: Settings, *, seed: int) -> PretrainStep:
    name = _slug(arm.pretrain or {})
    return PretrainStep(
        title=f"pre-training, {name}, seed {seed}",
        out=settings.out / "pretraining" / name / f"seed-{seed}",
        cubes=settings.streamed,
        config=settings.pretrain_config(arm, seed=seed),
    )


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
