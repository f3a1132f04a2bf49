"""What an experiment is run with: data, seeds, device, and options that all arms share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..model.device import Device
from ..storage import Location
from ..train.config import FinetuneConfig, PretrainConfig, load_config
from ..train.protocol import Protocol
from .design import Arm, Design
from .rounds import pretraining_recipe

__all__ = ["Settings"]

_PARTS = ("pretrain", "finetune")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What all runs of an experiment share.

    Raises
    ------
    InputError
        If a number is not allowed, or an assignment is none.
    """

    data: tuple[Path, ...]
    """Cubes or stacks with labels and a split; each is an experiment of its own, and the mean over
    them is told too."""
    out: Location
    pretrain_data: tuple[Path, ...] = ()
    """Cubes, stacks and archives; by default ``data``."""
    season: str | None = None
    """Labelled season, by its first day; by default the only one."""
    pretrain_season: str | None = None
    """Season that pre-training sees; by default all."""
    seeds: int = 5
    first_seed: int = 0
    named_seeds: tuple[int, ...] = ()
    """Seeds in place of those counted from ``first_seed``, as a protocol names them."""
    pretrain_seeds: int = 1
    """Pre-trainings of each kind; fine-tuning runs take them in turn."""
    preset: str | None = None
    steps: int | None = None
    """Steps of all runs, for trials."""
    assignments: tuple[str, ...] = ()
    """``pretrain.KEY=VALUE``, ``finetune.KEY=VALUE``, or ``KEY=VALUE`` for both."""
    device: Device = "auto"
    workers: int = 2
    """Threads that read, of each run."""
    jobs: int = 1
    """Runs at once."""

    def __post_init__(self) -> None:
        """Check numbers and assignments."""
        for name, value in (
            ("seeds", self.seeds), ("pretrain-seeds", self.pretrain_seeds), ("jobs", self.jobs),
            ("workers", self.workers),
        ):  # fmt: skip
            if value < 1:
                raise InputError(
                    f"Cannot run an experiment with --{name} {value}: it must be 1 or more. Use "
                    f"for example --{name} {5 if name == 'seeds' else 1}."
                )
        if self.first_seed < 0:
            raise InputError(
                f"Cannot run an experiment from --first-seed {self.first_seed}: it must be 0 or "
                "more. Leave it out for 0."
            )
        names = [path.stem for path in self.data]
        if not names or len(set(names)) < len(names):
            raise InputError(
                f"Cannot run an experiment on the data sets {', '.join(names) or '(none)'}: there "
                "must be at least one, and their names must differ, as runs and tables bear them. "
                "Name one cube or stack with labels with --data."
            )

    @property
    def streamed(self) -> tuple[Path, ...]:
        """What pre-training sees."""
        return self.pretrain_data or self.data

    @property
    def run_seeds(self) -> tuple[int, ...]:
        """Seeds of the fine-tuning runs."""
        counted = range(self.first_seed, self.first_seed + self.seeds)
        return self.named_seeds or tuple(counted)

    @property
    def pretrained_by(self) -> tuple[int, ...]:
        """Seeds of the pre-trainings that the fine-tuning runs begin from: in turn."""
        first = self.first_seed
        return tuple((first + place) % self.pretrain_seeds for place in range(len(self.run_seeds)))

    def shared(self, part: str) -> tuple[str, ...]:
        """Return the assignments of ``pretrain`` or ``finetune``, as ``KEY=VALUE``."""
        found = []
        for text in self.assignments:
            first, dot, rest = text.partition(".")
            if dot and first in _PARTS:
                if first == part:
                    found.append(rest)
            else:
                found.append(text)
        return tuple(found)

    def check_against(self, design: Design) -> None:
        """Check that no option is set for all that the arms differ in.

        Raises
        ------
        InputError
            If one is.
        """
        for part, own in design.set_keys.items():
            for text in self.shared(part):
                key = text.partition("=")[0].strip()
                if key in own or key in ("seed", "init", "season"):
                    raise InputError(
                        f"Cannot set {part}.{key} in the experiment {design.name}: the experiment "
                        "sets it itself, for each of its runs. Leave it out; the options of the "
                        "command say which values are compared."
                    )

    def pretrain_config(
        self, arm: Arm, *, seed: int, protocol: Protocol | None = None
    ) -> PretrainConfig:
        """Return the recipe of an arm's pre-training; a protocol's settings lie below all others.

        Raises
        ------
        InputError
            If the data do not fit the protocol.
        """
        own: Mapping[str, object] = arm.pretrain or {}
        base = None
        if protocol is not None:
            base = pretraining_recipe(protocol, data=self.data, streamed=self.streamed)
        return load_config(
            PretrainConfig,
            base=base,
            overrides={**self._common(), "season": self.pretrain_season, "seed": seed, **own},
            assignments=self.shared("pretrain"),
        )

    def finetune_config(
        self, arm: Arm, *, seed: int, init: Location | None, protocol: Protocol | None = None
    ) -> FinetuneConfig:
        """Return the recipe of one of an arm's fine-tuning runs; a protocol's lies below it."""
        return load_config(
            FinetuneConfig,
            base=None if protocol is None else protocol.recipe("finetune"),
            overrides={
                **self._common(), "season": self.season, "seed": seed,
                "init": None if init is None else str(init), **arm.finetune,
            },
            assignments=self.shared("finetune"),
        )  # fmt: skip

    def _common(self) -> dict[str, object]:
        return {"model.preset": self.preset, "steps": self.steps}
