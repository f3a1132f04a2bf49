"""Run an experiment from its name and settings to its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..data.source import open_source
from ..execution import ProgressHook
from .carry_out import Step, carry_out_steps
from .catalogue import Choices, make_design
from .design import Design
from .estimate import Cost, estimate_cost
from .scores import Score, read_scores
from .settings import Settings
from .steps import Steps, plan_steps
from .table import Table, make_table
from .write import write_results

__all__ = ["Experiment", "ExperimentResult", "plan_experiment", "run_experiment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """An experiment that is planned: nothing has run yet."""

    design: Design
    settings: Settings
    steps: Steps

    def lines(self) -> list[str]:
        """Return the plan as lines of text for people."""
        return [
            f"{self.design.title}. {self.design.question}",
            f"{len(self.design.arms)} arms ({', '.join(arm.name for arm in self.design.arms)}) x "
            f"{self.settings.seeds} seeds x {len(self.settings.data)} data sets = "
            f"{len(self.steps.finetune)} fine-tuning runs, each judged "
            f"{len(self.design.views)} times; {len(self.steps.pretrain)} pre-trainings",
        ]

    def cost(self, *, named_device: str | None = None) -> Cost:
        """Estimate what is left to do; see `estimate_cost`."""
        return estimate_cost(self.design, self.settings, self.steps, named_device=named_device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentResult:
    """A finished experiment."""

    report: Path
    table: Table
    scores: tuple[Score, ...]


def plan_experiment(name: str, settings: Settings, choices: Choices | None = None) -> Experiment:
    """Resolve an experiment; its data are opened, and no pixel is read.

    Parameters
    ----------
    name
        One of `EXPERIMENTS`.
    choices
        What is compared; the season is that of the settings, by default the only one of the first
        data set.

    Raises
    ------
    InputError
        If the name, the choices or the settings do not fit.
    """
    chosen = choices or Choices()
    season = open_source(settings.data[0], settings.season).season
    design = make_design(name, replace(chosen, season=season))
    if name == "cross-year" and not (settings.pretrain_data or settings.pretrain_season):
        # The season to be tested on stays unseen, without labels too.
        settings = replace(settings, pretrain_season=season)
    return Experiment(design=design, settings=settings, steps=plan_steps(design, settings))


def run_experiment(
    experiment: Experiment,
    *,
    progress: ProgressHook | None = None,
    on_done: Callable[[Step, bool], None] | None = None,
) -> ExperimentResult:
    """Make all runs that are not there yet, judge them, and write tables, plots and report.

    Called again after an interruption, it goes on; called again when all is done, it writes the
    same tables. More seeds add runs to those that are there.

    Parameters
    ----------
    on_done
        Told each run as it ends, and whether there was anything left to do.
    """
    carry_out_steps(experiment.steps, experiment.settings, progress=progress, on_done=on_done)
    scores = read_scores(experiment.steps)
    report = write_results(experiment.design, experiment.settings, experiment.steps, scores)
    return ExperimentResult(
        report=report, table=make_table(experiment.design, scores), scores=tuple(scores)
    )
