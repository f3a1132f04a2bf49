"""The paper's experiments as commands: arms x seeds, run, judged, put into tables with intervals.

Import order: design, statistics -> rounds -> settings -> catalogue, steps -> carry_out -> scores,
estimate -> table, paper -> pool -> write -> run.
"""

from __future__ import annotations

from .catalogue import EXPERIMENTS, Choices
from .run import Experiment, ExperimentResult, plan_experiment, run_experiment
from .settings import Settings

__all__ = [
    "EXPERIMENTS",
    "Choices",
    "Experiment",
    "ExperimentResult",
    "Settings",
    "plan_experiment",
    "run_experiment",
]
