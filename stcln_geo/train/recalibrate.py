"""Fit the temperature of a finished checkpoint on the validation fields of a cube."""

from __future__ import annotations

from pathlib import Path

import torch

from ..data.batch import IGNORE_INDEX
from ..data.source import Source
from ..errors import InputError, LabelError
from ..execution import ProgressHook
from ..model.checkpoint import find_checkpoint, set_temperature
from ..model.device import Device, choose_device
from ..storage import Location
from .evaluate import label_windows, open_plan, plan_evaluation
from .temperature import Fitted, fitted_on, stride_for

__all__ = ["calibrate_checkpoint"]


def calibrate_checkpoint(
    checkpoint: str | Location,
    cube: str | Path | Source,
    *,
    season: str | None = None,
    device: Device = "auto",
    workers: int = 2,
    progress: ProgressHook | None = None,
) -> Fitted:
    """Fit the temperature of a classifier on validation fields, and write it into its file.

    As fine-tuning does at its end. An ensemble of calibrated networks is less sure than it is
    right, where they disagree: it wants a temperature of its own, usually below 1.

    Parameters
    ----------
    cube
        Cube or stack with labels and a split.

    Raises
    ------
    InputError
        If it is the checkpoint of a run, which has calibrated itself, or lies in a bucket.
    CheckpointError, LabelError
        As ``evaluate_run`` does; and LabelError where no validation pixel counts or all are right.
    """
    path = find_checkpoint(checkpoint)
    if (path.parent.parent / "run.json").is_file() and path.parent.name == "checkpoints":
        raise InputError(
            f"Cannot calibrate {path}: it belongs to a run, which has fitted its temperature on "
            "its own validation fields. Calibrate a copy: `stcln-geo checkpoint export "
            f"{checkpoint} COPY.safetensors`."
        )
    if not isinstance(path, Path):
        raise InputError(
            f"Cannot calibrate {path}: the temperature is written into the file, which must be on "
            f"this machine. Calibrate a copy: `stcln-geo checkpoint export {path} "
            "COPY.safetensors`."
        )
    plan = plan_evaluation(path, cube, season=season, split="validation")
    network, stream = open_plan(plan, workers=workers)
    stride = stride_for(plan.pixels)
    values, targets = [], []
    for _, target, logits in label_windows(
        network, stream, plan, device=choose_device(device), progress=progress
    ):
        counted = target != IGNORE_INDEX
        values.append(logits.movedim(1, -1)[counted][::stride].cpu())
        targets.append(target[counted][::stride].cpu())
    fitted = fitted_on(torch.cat(values), torch.cat(targets))
    if isinstance(fitted, str):
        raise LabelError(
            f"Cannot calibrate {plan.info.path} on {plan.source}: {fitted} Use it as it is, or "
            "give validation more fields."
        )
    set_temperature(path, fitted.temperature)
    return fitted
