"""Run an experiment from its name and settings to its report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..data.source import open_source
from ..execution import ProgressHook
from ..storage import Location
from ..train.baseline import check_installed
from .carry_out import Step, carry_out_steps
from .catalogue import Choices, make_design
from .design import Design
from .estimate import Cost, estimate_cost
from .pool import make_tables
from .rounds import seeds_of, with_pooling
from .scores import Score, read_scores
from .settings import Settings
from .steps import Steps, plan_steps
from .table import Table
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
        design, parts = self.design, self.design.parts
        rounds = ""
        if len(parts) > 1:
            said = "rounds" if self.steps.pooling == "none" else "folds"
            rounds = f"{len(parts)} {said} ({', '.join(one.name for (one,) in parts)}) x "
        return [
            f"{design.title}. {design.question}",
            f"{len(design.arms)} arms ({', '.join(arm.name for arm in design.arms)}) x {rounds}"
            f"{len(self.settings.run_seeds)} seeds x {len(self.settings.data)} data sets = "
            f"{len(self.steps.finetune)} fine-tuning runs, each judged "
            f"{len(parts[0])} times; {len(self.steps.pretrain)} pre-trainings",
            *self.steps.notes,
        ]

    def cost(self, *, named_device: str | None = None) -> Cost:
        """Estimate what is left to do; see `estimate_cost`."""
        return estimate_cost(self.settings, self.steps, named_device=named_device)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExperimentResult:
    """A finished experiment."""

    report: Location
    table: Table
    """The first of ``tables``."""
    tables: tuple[Table, ...]
    """The strict reading, then the published one where there is one; of folds three of each: their
    confusion matrices added up, the mean over them, and each."""
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
    protocol = chosen.protocol
    if protocol is not None:
        chosen = replace(chosen, pretraining=chosen.pretraining or bool(settings.pretrain_data))
        settings = replace(settings, season=settings.season or protocol.season)
        if not settings.first_seed:
            settings = replace(settings, named_seeds=seeds_of(protocol, settings.seeds))
    else:
        season = open_source(settings.data[0], settings.season).season
        chosen = replace(chosen, season=season)
    if chosen.forest:
        check_installed()
    design = make_design(name, chosen)
    if name == "cross-year" and not (settings.pretrain_data or settings.pretrain_season):
        # The season to be tested on stays unseen, without labels too.
        settings = replace(settings, pretrain_season=chosen.season)
    steps = plan_steps(design, settings)
    return Experiment(design=with_pooling(design, steps.pooling), settings=settings, steps=steps)


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
    tables = make_tables(experiment.design, scores, experiment.steps.pooling)
    report = write_results(experiment.design, experiment.settings, experiment.steps, scores, tables)
    return ExperimentResult(report=report, table=tables[0], tables=tables, scores=tuple(scores))
