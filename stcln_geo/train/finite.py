"""Losses and gradients that are no numbers: noticed at their step, with the chips named."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import TaskError

if TYPE_CHECKING:
    from .task import TrainingTask

__all__ = ["GradientWatch", "Reading", "say_not_finite"]

_NAMED_CHIPS = 8


class Reading:
    """Numbers on their way from the device, which goes on meanwhile."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = values
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def values(self) -> list[float]:
        """Wait for the numbers, and return them."""
        if self._event is not None:
            self._event.synchronize()
        found: list[float] = self._host.tolist()
        return found


class GradientWatch:
    """Clips gradients, and stops a run whose gradients are no numbers though its loss is one.

    A GPU is not waited for: there the norm of a step is looked at before the next step, before
    the weights are judged and before they are saved. So the weights may have been moved by it, but
    no file holds them.
    """

    def __init__(self, task: TrainingTask) -> None:
        self._task = task
        self._norm: Reading | None = None
        self._step = 0
        self._batches: Sequence[Batch] = ()

    def clip(self, weights: Sequence[Tensor], batches: Sequence[Batch], *, wait: bool) -> None:
        """Clip the gradients of a step to the recipe's norm.

        Parameters
        ----------
        batches
            What they come from.
        wait
            True to look at them now, and not before the next step.

        Raises
        ------
        TaskError
            If they were looked at and are no numbers.
        """
        most = self._task.recipe.optimiser.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(weights, most)
        self._norm, self._step, self._batches = Reading(norm[None]), self._task.step, batches
        if wait:
            self.check()

    def check(self) -> None:
        """Look at the gradients of the last step that was clipped.

        Raises
        ------
        TaskError
            If they are no numbers.
        """
        if self._norm is None:
            return
        (norm,), batches = self._norm.values(), self._batches
        self._norm, self._batches = None, ()
        if math.isfinite(norm):
            return
        what = f"the norm of the gradients of step {self._step + 1} is {norm}"
        moved = self._task.step > self._step
        raise TaskError(say_not_finite(self._task, batches, what, gradients=True, moved=moved))


def say_not_finite(
    task: TrainingTask, batches: Sequence[Batch], what: str, *, gradients: bool, moved: bool
) -> str:
    """Say why training cannot go on, and name the chips; to be called on all ranks.

    Parameters
    ----------
    gradients
        True where a chip is also at fault if only its gradients are no numbers.
    moved
        True where the weights were moved by them: no chip can be judged by such weights.
    """
    own: list[str] = []
    if not moved:
        own = [name for part in batches for name in _find(task, part, gradients=gradients)]
    everywhere = [name for names in task.ranks.gather(own) for name in names]
    kind = "gradients are" if gradients else "error is"
    whose = f"The chips whose {kind} no number, each by itself"
    if not everywhere:
        own = [part.describe(chip) for part in batches for chip in range(len(part))]
        everywhere = [name for names in task.ranks.gather(own) for name in names]
        whose = "The chips of the step"
        if not moved:
            whose = "No chip is at fault by itself; the chips of the step"
    named = "; ".join(everywhere[:_NAMED_CHIPS])
    if len(everywhere) > _NAMED_CHIPS:
        named += f"; and {len(everywhere) - _NAMED_CHIPS} more"
    kept = "so those of the last save stay" if moved else "so they were not moved"
    return (
        f"Cannot go on training: {what}. Weights that are no numbers never recover, {kept}. "
        f"{whose}: {named}. Look at these chips if they are few. Else lower the learning rate "
        "(--set optimiser.learning_rate=...) and begin anew with --overwrite."
    )


def _find(task: TrainingTask, part: Batch, *, gradients: bool) -> list[str]:
    """Describe the chips of a batch whose error, judged alone, is no number."""
    found = []
    training, compiled = task.network.training, task.compiled
    task.network.eval()
    task.compiled = None  # not worth compiling for
    weights = [weight for weight in task.network.parameters() if weight.requires_grad]
    with torch.set_grad_enabled(gradients):
        for chip in range(len(part)):
            alone = part.part(chip, chip + 1)
            prepared, _ = task.prepare(alone)
            values = [task.error(alone, prepared)]
            if values[0].requires_grad:
                # Not `backward`: other ranks would wait to be told.
                made = torch.autograd.grad(values[0], weights, allow_unused=True)
                values += [gradient for gradient in made if gradient is not None]
            if not all(bool(torch.isfinite(value).all()) for value in values):
                found.append(part.describe(chip))
    task.network.train(training)
    task.compiled = compiled
    return found
