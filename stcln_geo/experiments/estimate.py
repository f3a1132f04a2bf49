"""What an experiment will take: steps, hours and disk, from a few measured steps of its network."""

from __future__ import annotations

from dataclasses import dataclass

from ..cube.contract import SPLITS
from ..data.chips import plan_windows
from ..data.source import open_source
from ..data.split import check_labelled
from ..errors import InputError
from ..grid import Lattice
from ..progress import duration_text
from ..train.finetune import plan_finetune
from ..train.plan import TrainingPlan
from ..train.pretrain import plan_pretrain
from ..train.protocol import EvaluationSection
from .carry_out import finished
from .settings import Settings
from .steps import FinetuneStep, PretrainStep, Steps

__all__ = ["RATES", "Cost", "estimate_cost"]

_PEAKS = {"A10": 125, "L4": 121, "A100": 312, "L40S": 362, "H100": 989, "H200": 989}
"""Dense bfloat16 TFLOP/s that the maker states."""

_REACHED = 0.15

RATES: dict[str, float] = {name: _REACHED * peak for name, peak in _PEAKS.items()}
"""TFLOP/s that a training step is taken to reach on devices that are not here: 15 % of the peak. A
guess, not a measurement."""

_COUNTED_CHIPS = 1
_AUTO_CHIPS = 8
_WEIGHTS_KEPT = 5
"""Copies of the weights in a run's folder: best, last, and the last with two moments to resume."""
_RUN_BYTES = 1_500_000
_VIEW_BYTES = 300_000
_FORWARD_SHARE = 1 / 3
"""Of the time of a training step: the rest goes into gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the runs that are left will take."""

    runs: int
    left: int
    """Runs that are not finished."""
    steps: int
    """Optimiser steps that are left, at most: of unfinished runs all are counted."""
    seconds: float
    """Of all that is left, one run after the other."""
    disk: int
    """Bytes of all runs."""
    how: tuple[str, ...]
    """How it was estimated."""
    lines_of_kinds: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the cost as lines of text for people."""
        return [
            *self.lines_of_kinds,
            f"runs: {self.runs}, of which {self.runs - self.left} are finished",
            f"optimiser steps left: {self.steps:,}",
            f"time left: about {duration_text(self.seconds)}, one run after the other",
            f"disk: about {self.disk / 1e9:.2f} GB in all",
            *self.how,
        ]


def estimate_cost(settings: Settings, steps: Steps, *, named_device: str | None = None) -> Cost:
    """Try a few steps of each kind of run, and add up; nothing is written.

    Kinds of the same network, chips and batch share one measurement. Fine-tuning is tried from
    random weights, which takes as long as from pre-trained ones. Judging is taken as a third of the
    time of a training step for as many pixels.

    Parameters
    ----------
    named_device
        A device of `RATES` that is not here: the operations of a step are counted here and divided
        by its rate.
    """
    if named_device is not None and named_device not in RATES:
        raise InputError(
            f"Cannot estimate for the device {named_device!r}: rates are known of "
            f"{', '.join(RATES)}. Name one of these, or leave it out to measure here."
        )
    plans: dict[str, TrainingPlan] = {}
    seconds = disk = 0.0
    left = total_steps = 0
    kinds: dict[str, list[int]] = {}
    names: dict[str, str] = {}
    chips: dict[str, int] = {}
    tested = _Tested()
    every: tuple[PretrainStep | FinetuneStep, ...] = (*steps.pretrain, *steps.finetune)
    for step in every:
        key = _kind(step)
        # A step of one chip is tried where chips are only counted: a batch need not fit here.
        tried = {} if named_device is None else {"batch_size": 1, "accumulate": 1}
        if key not in plans:
            if isinstance(step, PretrainStep):
                plans[key] = plan_pretrain(
                    settings.streamed, step.config.model_copy(update=tried),
                    device=settings.device, workers=settings.workers,
                )  # fmt: skip
            else:
                plans[key] = plan_finetune(
                    step.open(), step.config.model_copy(update={"init": None, **tried}),
                    device=settings.device, workers=settings.workers,
                )  # fmt: skip
        plan = plans[key]
        chips[key] = plan.config.global_batch
        own = int(plan.config.steps or 0)
        if named_device is not None:
            size = step.config.batch_size
            chips[key] = (_AUTO_CHIPS if size == "auto" else size) * step.config.accumulate
            if step.config.epochs is not None:
                own = max(own // chips[key], 1)
        views = len(step.views) if isinstance(step, FinetuneStep) else 0
        disk += plan.parameters * 4 * _WEIGHTS_KEPT + _RUN_BYTES + views * _VIEW_BYTES
        if finished(step):
            continue
        left += 1
        total_steps += own
        per_step = _seconds(plan, named_device, chips=chips[key])
        rounds = own // int(plan.config.validation.every or own)
        judged = float(plan.validation_chips * rounds)
        if isinstance(step, FinetuneStep):
            judged += sum(tested(step, season) for season in map(step.season_of, step.views))
        seconds += per_step * (own + _FORWARD_SHARE * judged / chips[key])
        kinds.setdefault(key, []).append(own)
        names.setdefault(key, f"{plan.kind}{_which(step)}")
    return Cost(
        runs=steps.count,
        left=left,
        steps=total_steps,
        seconds=seconds,
        disk=int(disk),
        how=tuple(_say_how(plans, named_device)),
        lines_of_kinds=tuple(
            f"{names[key]}: {len(found)} runs of {found[0]:,} steps, chips of a step "
            f"{chips[key]}, {_seconds(plans[key], named_device, chips=chips[key]):.3f} s a step"
            for key, found in kinds.items()
        ),
    )


def _kind(step: PretrainStep | FinetuneStep) -> str:
    """Return what decides on the time of a run, as a key."""
    config, data = step.config, step.config.data
    shown: object = None
    if config.epochs is not None:
        # So many passes are more steps where there are more chips.
        if isinstance(step, PretrainStep):
            shown = step.config.data.choice
        else:
            shown = (step.cube, step.views[0].name, step.config.labels)
    return repr(
        (type(config).__name__, config.steps, config.epochs, config.batch_size, config.accumulate,
         config.model, data.chip, data.max_dates, config.precision, config.validation, shown)
    )  # fmt: skip


def _which(step: PretrainStep | FinetuneStep) -> str:
    """Tell runs of the rounds of a protocol apart, where they have steps of their own."""
    if step.config.epochs is None or isinstance(step, PretrainStep) or not step.views[0].folder:
        return ""
    return f", {step.views[0].title}"


class _Tested:
    """Counts what runs are judged on, in chips of their training; each split of a cube once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def __call__(self, step: FinetuneStep, season: str) -> float:
        """Return the area of the windows that hold test fields, in chips."""
        own = season == step.season
        rule = EvaluationSection() if step.protocol is None else step.protocol.evaluation
        chip, halo = step.config.data.chip, step.config.data.halo
        key = repr((step.cube, season, step.split if own else None, rule, chip, halo))
        if key not in self._known:
            source = open_source(step.open() if own else step.cube, season)
            fields, _ = check_labelled(source)
            side = max(source.shape_yx) if rule.window == "site" else rule.window or chip
            lattice = Lattice(window=side, halo=halo if rule.halo is None else rule.halo)
            units = plan_windows(source, fields.split == SPLITS["test"], lattice=lattice)
            self._known[key] = sum(part.area for unit in units for part in unit.chips)
        return self._known[key] / chip**2


def _seconds(plan: TrainingPlan, named_device: str | None, *, chips: int) -> float:
    if named_device is None:
        return plan.seconds_per_step
    return _operations(plan) * chips / (RATES[named_device] * 1e12)


def _operations(plan: TrainingPlan) -> float:
    """Count the floating-point operations of a step for one chip: products and convolutions."""
    import dataclasses

    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ..model.device import rng_kept
    from ..model.stcln import MaskedPretrainer, Stcln

    _, dates, bands, height, width = plan.batch_shape
    config = dataclasses.replace(plan.network)
    with rng_kept("cpu"):
        images = torch.zeros(_COUNTED_CHIPS, dates, bands, height, width)
        days = torch.arange(dates).expand(_COUNTED_CHIPS, dates)
        valid = torch.ones(_COUNTED_CHIPS, dates, height, width, dtype=torch.bool)
        # In training the transformer is counted whole: its fast path of evaluation is not.
        with FlopCounterMode(display=False) as counter:
            if plan.kind == "pretrain":
                made = MaskedPretrainer(config)(images, days, valid, valid)
            else:
                made = Stcln(config)(images, days, valid)
            made.sum().backward()
    return float(counter.get_total_flops()) / _COUNTED_CHIPS


def _say_how(plans: dict[str, TrainingPlan], named_device: str | None) -> list[str]:
    here = next(iter(plans.values())).device if plans else "this device"
    judged = "judging is taken as a third of training, for as many pixels"
    if named_device is None:
        return [f"estimated from the second of two steps of each kind on {here}; {judged}"]
    return [
        f"estimated for {named_device}: operations of a step were counted here, and divided by "
        f"{RATES[named_device]:.0f} TFLOP/s, a guess of what training reaches there: "
        f"{_REACHED:.0%} of the peak that the maker states for bfloat16; {judged}"
    ]
