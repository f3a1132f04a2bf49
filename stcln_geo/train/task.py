"""What Lightning trains: a network, its optimiser and its streams; a step and its safeguards.

A Lightning epoch is a round: the steps between two validations. Batches, masks and dropout of a
step depend on the seed, the number of the step and the rank only, so a resumed run repeats an
uninterrupted one.

A step sees ``batch_size`` x ``accumulate`` chips on each rank. Its loss is the sum of the chips'
errors over the sum of their weights, both over all batches and ranks. So neither the number of
ranks nor that of batches a step is cut into changes the gradient, but for what batch normalisation
does: its statistics are those of the batches that all ranks see at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ..data.batch import Batch
from ..data.stream import OrderedStream, TrainingStream
from ..errors import InputError, TaskError
from ..model.layers import MaskedBatchNorm2d, TemporalEncoder
from ..model.stcln import MaskedPretrainer, Stcln
from .compiled import CompiledNetwork
from .config import TrainConfig
from .finite import GradientWatch, Reading, say_not_finite
from .memory import is_out_of_memory, too_big
from .ranks import Ranks, sum_over_ranks
from .run_directory import RunDirectory
from .sections import OptimiserSection

__all__ = ["TrainingTask", "rate_factor", "step_seed"]


def step_seed(seed: int, *place: int) -> int:
    """Return a well-mixed seed for a step (or any other place) of a run."""
    return int(np.random.SeedSequence([seed, *place]).generate_state(1)[0])


class _Round:
    """The steps up to the next validation, as Lightning wants them: sized and iterable."""

    def __init__(self, stream: TrainingStream, *, start: int, count: int, batches: int) -> None:
        self._stream, self._start, self._count, self._batches = stream, start, count, batches

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Batch, ...]]:
        source = self._stream.batches(self._start * self._batches, self._count * self._batches)
        try:
            for _ in range(self._count):
                yield tuple(next(source) for _ in range(self._batches))
        finally:
            source.close()


class TrainingTask(LightningModule):
    """Steps, optimiser and data of one run; subclasses give errors and figures.

    Parameters
    ----------
    network
        The network that is trained; saved without this wrapper.
    config
        A settled recipe.
    stream
        Training batches of this rank; None where only `prepare` and `error` are wanted.
    validation
        What to judge on; None judges nothing.
    ranks
        Which of the processes of the run this is.
    """

    monitor: str
    """The figure by which the best weights are chosen."""
    larger_is_better: bool

    def __init__(
        self,
        network: Stcln | MaskedPretrainer,
        config: TrainConfig,
        *,
        stream: TrainingStream | None = None,
        validation: OrderedStream | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.network = network
        self.recipe = config
        self._stream = stream
        self.validation = validation
        self.ranks = ranks or Ranks()
        self.average: Stcln | MaskedPretrainer | None = None
        """The moving average of the network; None where the recipe asks for none."""
        if config.optimiser.ema > 0:
            self.average = copy.deepcopy(network).requires_grad_(False)
        self.compiled: CompiledNetwork | None = None
        """The network by `torch.compile`; None where the recipe does not ask for it."""
        if config.compile:
            fills_up = network.config.mode == "geo"
            self.compiled = CompiledNetwork(network, fills_up=fills_up)
        self.step = 0
        """Steps done."""
        self.pieces = 1
        """Parts each batch is cut into, after memory ran out."""
        self.loss = math.nan
        """Loss of the last step, over all ranks."""
        self.rate = math.nan
        """Learning rate of the last step, of the first group."""
        self.counted: list[float] = []
        """Sums of the round so far, over all ranks, of what `prepare` counts."""
        self.figures: dict[str, float | None] = {}
        """Figures of the last validation."""
        self.notes: list[str] = []
        """What happened that the run should tell."""
        self._to_load: Mapping[str, Any] | None = None
        self._watch = GradientWatch(self)
        for module in network.modules():
            if isinstance(module, MaskedBatchNorm2d) and self.ranks.size > 1:
                module.sum_over_ranks = sum_over_ranks
            if isinstance(module, TemporalEncoder):
                module.recompute = config.recompute

    # What subclasses say.

    def prepare(self, batch: Batch) -> tuple[Any, Tensor]:
        """Return what `error` needs besides the batch, and what is to be counted.

        Returns
        -------
        Anything, and (N,) numbers that are added up over batches and ranks: first the weight by
        which the errors are divided, then what `end_round` tells of.
        """
        raise NotImplementedError

    def error(self, batch: Batch, prepared: Any) -> Tensor:
        """Return the sum of the errors of a batch, undivided."""
        raise NotImplementedError

    def end_round(self) -> dict[str, float | None]:
        """Return what a round tells besides loss and figures."""
        return {}

    def write_best(self, run: RunDirectory) -> None:
        """Write what is told of the best weights, beside them; on rank 0, before a save."""

    def parameter_groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the weights by learning rate, as an optimiser takes them; first the head's."""
        encoder = list(self.network.encoder.parameters())
        known = {id(weight) for weight in encoder}
        others = [weight for weight in self.network.parameters() if id(weight) not in known]
        return [
            {"params": others, "lr": rate},
            {"params": encoder, "lr": rate * self.recipe.optimiser.encoder_factor},
        ]

    def drop_gradients(self) -> None:
        """Drop the gradients of weights that shall not move at this step."""

    # What Lightning asks for.

    @property
    def stream(self) -> TrainingStream:
        """The training batches of this rank."""
        if self._stream is None:
            raise InputError("Cannot train without a stream of batches. Pass stream=.")
        return self._stream

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.recipe.steps or 1)

    @property
    def round_steps(self) -> int:
        """Steps of a round; the last may be shorter."""
        return int(self.recipe.validation.every or 1)

    def ends_round(self, step: int) -> bool:
        """Return True where a round ends with this step, counted from 1."""
        return step % self.round_steps == 0 or step == self.steps

    @property
    def rounds(self) -> int:
        """Rounds left, with the one that is begun."""
        return math.ceil(self.steps / self.round_steps) - self.step // self.round_steps

    @property
    def trained(self) -> Callable[..., Tensor]:
        """What steps call: the network, plain or compiled."""
        return self.network if self.compiled is None else self.compiled

    @property
    def judged(self) -> Stcln | MaskedPretrainer:
        """The network that is judged and saved: the average, where there is one."""
        return self.network if self.average is None else self.average

    def train_dataloader(self) -> Any:
        """Return the steps of the coming round, or those left of it."""
        left = self.round_steps - self.step % self.round_steps
        return _Round(
            self.stream,
            start=self.step,
            count=min(left, self.steps - self.step),
            batches=self.recipe.accumulate,
        )

    def val_dataloader(self) -> Any:
        """Return the validation batches of this rank."""
        return self.validation if self.validation is not None else []

    def configure_optimizers(self) -> Any:
        """Return the optimiser and the schedule of the recipe, as an earlier process left them."""
        options = self.recipe.optimiser
        groups = self.parameter_groups(float(options.learning_rate or 1e-3))
        make = torch.optim.AdamW if options.name == "adamw" else torch.optim.Adam
        decay = options.weight_decay if options.name == "adamw" else 0.0
        optimiser = make(groups, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: rate_factor(step, steps=self.steps, options=options)
        )
        if self._to_load is not None:
            optimiser.load_state_dict(self._to_load["optimiser"])
            schedule.load_state_dict(self._to_load["schedule"])
            self._to_load = None
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def training_step(self, batches: Sequence[Batch], batch_idx: int) -> None:
        """Move the weights once, by the batches of a step."""
        optimiser, schedule = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        self._watch.check()
        self.try_step(batches, backward=self.manual_backward)
        self.drop_gradients()
        weights = [weight for group in optimiser.param_groups for weight in group["params"]]
        wait = self.device.type == "cpu" or self.ends_round(self.step + 1)
        self._watch.clip(weights, batches, wait=wait)
        self.rate = float(optimiser.param_groups[0]["lr"])
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        self.step += 1
        self._follow()

    # A step.

    def try_step(self, batches: Sequence[Batch], *, backward: Callable[[Tensor], None]) -> None:
        """Compute loss and gradients of a step; out of memory, cut its batches in halves.

        Raises
        ------
        TaskError
            If the loss is no number, or one chip alone takes more memory than there is.
        """
        kept = [buffer.clone() for buffer in self.network.buffers()]
        while True:
            parts = [
                batch.part(first, first + size)
                for batch in batches
                for size in [-(-len(batch) // self.pieces)]
                for first in range(0, len(batch), size)
            ]
            try:
                loss, counted = self._accumulate(parts, backward=backward)
                break
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                largest = max(len(part) for part in parts)
                if self.ranks.size > 1 or largest == 1:
                    raise too_big(self.recipe, largest, ranks=self.ranks.size) from error
            # Outside of the except block, so that nothing holds on to what ran out.
            self.pieces *= 2
            self.zero_grad()
            self._put_back(kept)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.notes.append(
                f"Memory ran out at step {self.step + 1}: chips go through the network "
                f"{-(-self.recipe.rank_batch // self.pieces)} at a time since, as many a step as "
                "before."
            )
        if not math.isfinite(loss):
            # Running statistics have seen it already.
            self._put_back(kept)
            what = f"the loss of step {self.step + 1} is {loss}"
            raise TaskError(say_not_finite(self, parts, what, gradients=False, moved=False))
        self.loss = loss
        so_far = self.counted or [0.0] * len(counted)
        self.counted = [one + other for one, other in zip(so_far, counted, strict=True)]

    def _put_back(self, kept: Sequence[Tensor]) -> None:
        for buffer, before in zip(self.network.buffers(), kept, strict=True):
            buffer.copy_(before)

    def _accumulate(
        self, parts: Sequence[Batch], *, backward: Callable[[Tensor], None]
    ) -> tuple[float, list[float]]:
        """Add up the gradients of the parts; return the loss, and what was counted."""
        ready = [self.prepare(part) for part in parts]
        counted = sum_over_ranks(torch.stack([counts.double() for _, counts in ready]).sum(0))
        weight = counted[0].clamp(min=1e-12)
        error = torch.zeros_like(weight)
        told: Reading | None = None
        for place, (part, (prepared, _)) in enumerate(zip(parts, ready, strict=True)):
            # Dropout is a function of the seed and the place.
            torch.manual_seed(step_seed(self.recipe.seed, 1, self.step, self.ranks.rank, place))
            own = self.error(part, prepared)
            error = error + own.detach()
            last = place == len(parts) - 1
            if last:
                # On its way to the host while the gradients are computed.
                told = Reading(torch.cat([sum_over_ranks(error / weight)[None], counted]))
            with nullcontext() if last else self._alone():
                # The ranks' gradients are averaged, and are to be added up.
                backward(own * (self.ranks.size / weight).to(own.dtype))
        if told is None:
            raise InputError(
                "Cannot make a step without a batch: the stream gave none. Give it chips."
            )
        loss, *counts = told.values()
        return loss, counts

    def _alone(self) -> AbstractContextManager[Any]:
        """Add up gradients here, without telling the other ranks yet."""
        if self.ranks.size == 1:
            return nullcontext()
        strategy: Any = self.trainer.strategy
        alone: AbstractContextManager[Any] = strategy.block_backward_sync()
        return alone

    def _follow(self) -> None:
        """Move the average towards the weights; less slowly in the beginning."""
        if self.average is None:
            return
        share = 1 - min(self.recipe.optimiser.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, weight in zip(
                self.average.parameters(), self.network.parameters(), strict=True
            ):
                mean.lerp_(weight, share)
            # Statistics too: the latest are those of other weights, and of the last few batches.
            for kept, buffer in zip(self.average.buffers(), self.network.buffers(), strict=True):
                if buffer.is_floating_point():
                    kept.lerp_(buffer, share)
                else:
                    kept.copy_(buffer)

    # A resumption.

    def resumable(self) -> dict[str, Any]:
        """Return all that a later process needs to go on as if nothing had happened.

        Raises
        ------
        TaskError
            If the last step's gradients were no numbers.
        """
        self._watch.check()
        optimiser, schedule = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        return {
            "step": self.step,
            "pieces": self.pieces,
            "counted": list(self.counted),
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimiser": optimiser.optimizer.state_dict(),
            "schedule": schedule.state_dict(),
        }

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up what `resumable` gave, before Lightning asks for the optimiser."""
        self.step, self.pieces = state["step"], state["pieces"]
        self.counted = list(state["counted"])
        self.network.load_state_dict(state["network"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._to_load = state


def rate_factor(step: int, *, steps: int, options: OptimiserSection) -> float:
    """Return the learning rate of a step as a share of the highest."""
    warm = math.ceil(options.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if options.schedule == "constant":
        return 1.0
    done = (step - warm) / max(steps - warm, 1)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
