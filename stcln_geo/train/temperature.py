"""Temperature scaling: one number, fitted on validation fields, that makes confidence honest.

Guo et al. 2017, "On calibration of modern neural networks": logits are divided by the temperature
before the softmax. The order of the classes stays, so the map does too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..data.batch import IGNORE_INDEX
from ..model.checkpoint import load_model, set_temperature
from ..model.device import autocast_for
from ..model.stcln import Stcln, probabilities
from ..report.calibration import Calibration
from .finetune_task import FinetuneTask
from .ranks import sum_over_ranks
from .scoring import observed_target

__all__ = [
    "LARGEST",
    "SMALLEST",
    "Fitted",
    "calibrate",
    "fit_temperature",
    "fitted_on",
    "stride_for",
]

SMALLEST, LARGEST = 0.05, 20.0
"""Bounds of the temperature: without them, pixels that are nearly all right would ask for 0."""
_MOST_PIXELS = 2_000_000
_MOST_ROUNDS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A temperature, and what it does on the pixels it was fitted on."""

    temperature: float
    error_before: float
    """Expected calibration error on the validation fields, without the temperature."""
    error_after: float
    pixels: int
    """Pixels that it was fitted on."""


def fit_temperature(
    logits: Tensor, target: Tensor, *, add_up: Callable[[Tensor], Tensor] = sum_over_ranks
) -> float | None:
    """Find the temperature with the least negative log-likelihood.

    That is convex in the inverse of the temperature: Newton's steps, within an interval that is
    halved where a step would leave it. Each rank may hold pixels of its own.

    Parameters
    ----------
    logits : (P, K) float.
    target : (P,) int64, 0 to K - 1.
    add_up
        Adds up a tensor over the ranks.

    Returns
    -------
    0.05 to 20; None where the pixels of all ranks are right, or there is none: then the lower the
    temperature, the likelier, and no value is the likeliest.
    """
    values = logits.double()
    own = values.gather(1, target[:, None])[:, 0]
    if not int(add_up((values > own[:, None]).any(1).sum()[None])):
        return None
    low, high = 1 / LARGEST, 1 / SMALLEST
    inverse = 1.0
    for _ in range(_MOST_ROUNDS):
        shares = (inverse * values).softmax(dim=1)
        mean = (shares * values).sum(1)
        variance = (shares * (values - mean[:, None]).square()).sum(1)
        slope, curve = add_up(torch.stack([(mean - own).sum(), variance.sum()])).tolist()
        if slope > 0:
            high = inverse
        else:
            low = inverse
        step = inverse - slope / curve if curve > 0 else math.nan
        # A bound is itself the answer where the slope never turns.
        before, inverse = inverse, step if low < step < high else (low + high) / 2
        if abs(inverse - before) <= 1e-7 * inverse:
            break
    return min(max(1 / inverse, SMALLEST), LARGEST)


def calibrate(
    task: FinetuneTask, checkpoint: Path, *, labelled: int, device: str, precision: str
) -> dict[str, float | int] | None:
    """Fit the temperature of a checkpoint on the task's validation fields, and write it there.

    Parameters
    ----------
    checkpoint
        Weights of the task's network; rank 0 reads and writes it.
    labelled
        Pixels of the validation fields. Of more than two million, every so many are taken.

    Returns
    -------
    The fields of `Fitted`; None where there is no validation pixel, or all of them are right: the
    task's notes tell which.
    """
    if task.validation is None:
        return None
    network = Stcln(task.network.config)
    network.load_state_dict(task.ranks.on_first(lambda: load_model(checkpoint).state_dict()))
    fitted = _fit(task, network, labelled=labelled, device=device, precision=precision)
    if fitted is None:
        return None
    task.ranks.on_first(lambda: set_temperature(checkpoint, fitted.temperature))
    return asdict(fitted)


def _fit(
    task: FinetuneTask, network: Stcln, *, labelled: int, device: str, precision: str
) -> Fitted | None:
    if task.validation is None:
        return None
    network.to(device).eval()
    lookup = task.lookup.to(device)
    stride = stride_for(labelled)
    # A rank may have no window of its own.
    classes = network.config.classes
    found = [(torch.zeros(0, classes), torch.zeros(0, dtype=torch.int64))]
    with torch.inference_mode(), autocast_for(precision, device):
        for batch in task.validation:
            moved = batch.to(device)
            target = observed_target(moved, lookup)
            counted = target != IGNORE_INDEX
            logits = task.classify(network, moved).float().movedim(1, -1)
            found.append((logits[counted][::stride].cpu(), target[counted][::stride].cpu()))
    # On the device again, where ranks that talk by NCCL need it.
    values, target = (torch.cat(parts).to(device) for parts in zip(*found, strict=True))
    fitted = fitted_on(values, target)
    if isinstance(fitted, str):
        task.notes.append(f"Confidence is not calibrated: {fitted}")
        return None
    return fitted


def stride_for(pixels: int) -> int:
    """Return of how many pixels one is taken, so that the fit has no more than two million."""
    return max(-(-pixels // _MOST_PIXELS), 1)


def fitted_on(values: Tensor, target: Tensor) -> Fitted | str:
    """Fit a temperature on the pixels of all ranks; or say why there is none.

    Parameters
    ----------
    values : (P, K) float32 logits.
    target : (P,) int64, 0 to K - 1.
    """
    temperature = fit_temperature(values, target)
    pixels = int(sum_over_ranks(torch.tensor(len(target), device=target.device)))
    if temperature is None:
        return (
            f"all {pixels} pixels of the validation fields are right, so that they do not tell how "
            "sure is too sure."
            if pixels
            else "no pixel of the validation fields has a clear date."
        )
    errors = [_error(values, target, divisor) for divisor in (None, temperature)]
    return Fitted(
        temperature=temperature,
        error_before=errors[0],
        error_after=errors[1],
        pixels=pixels,
    )


def _error(values: Tensor, target: Tensor, temperature: float | None) -> float:
    """Return the expected calibration error over the pixels of all ranks."""
    shares = probabilities(values, temperature)
    calibration = Calibration()
    right = values.argmax(dim=1) == target
    calibration.add(shares.amax(dim=1).cpu().numpy(), right.cpu().numpy())
    for name in ("count", "right", "confidence"):
        own = torch.from_numpy(getattr(calibration, name)).to(values.device)
        setattr(calibration, name, sum_over_ranks(own).cpu().numpy())
    return float(calibration.error or 0.0)
