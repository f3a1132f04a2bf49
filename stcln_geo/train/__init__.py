"""Pre-training, fine-tuning and evaluation.

Import order: masking, losses, classes -> config, ranks, run_directory -> memory, trackers, task ->
error_table, reconstruction -> pretrain_task, finetune_task, journal, card, pretrain_page -> fit,
temperature -> plan, start -> pretrain, finetune, protocol -> seeds, evaluation, evaluate ->
over_seeds.
"""

from __future__ import annotations

from .config import FinetuneConfig, PretrainConfig, load_config
from .evaluate import Evaluation, evaluate_run
from .finetune import finetune, plan_finetune
from .over_seeds import evaluate_seeds
from .plan import RunResult, TrainingPlan
from .pretrain import plan_pretrain, pretrain
from .seeds import SeedsResult, finetune_seeds

__all__ = [
    "Evaluation",
    "FinetuneConfig",
    "PretrainConfig",
    "RunResult",
    "SeedsResult",
    "TrainingPlan",
    "evaluate_run",
    "evaluate_seeds",
    "finetune",
    "finetune_seeds",
    "load_config",
    "plan_finetune",
    "plan_pretrain",
    "pretrain",
]
