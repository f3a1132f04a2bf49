"""The recipe of a training run: typed, read from TOML, written back whole into the run directory.

Values that are ``None`` are settled when the data is known; `settle` does so. What does not
change the result (threads, progress, the place of the cube) is no part of the recipe.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.batch import Augmentation
from ..data.chips import BadChunks
from ..data.site_choice import SiteChoice
from ..data.weights import Balance
from ..errors import InputError, MissingFileError
from ..model.config import Mode, Positions, PresetName
from ..model.device import Precision
from .losses import ClassWeights, LossKind
from .masking import MaskingSection

__all__ = [
    "DataSection",
    "FinetuneConfig",
    "FinetuneOptimiserSection",
    "FinetuneValidationSection",
    "LabelsSection",
    "LossSection",
    "MaskingSection",
    "ModelSection",
    "OptimiserSection",
    "PretrainConfig",
    "PretrainDataSection",
    "TrainConfig",
    "ValidationSection",
    "WeightsSection",
    "load_config",
    "merge_values",
    "settle",
    "to_toml",
]

ChooseBy = Literal["macro_miou", "macro_f1", "overall_accuracy"]
Freeze = Literal["none", "convolutions", "encoder"]

_LEARNING_RATES: dict[PresetName, float] = {"tiny": 1e-3, "base": 3e-4, "large": 1e-4}
_ROUNDS = 20
_SHORTEST_ROUND = 10


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """The network. Sizes left out are those of the preset, or of the checkpoint begun from."""

    preset: PresetName | None = None
    bands: tuple[str, ...] | None = None
    """Common STAC names; by default all bands of the cube, or those of the checkpoint."""
    mode: Mode | None = None
    """By default ``geo``; fine-tuning takes that of the checkpoint begun from."""
    positions: Positions | None = None
    """By default ``days`` in ``geo`` mode, else ``index``; fine-tuning takes those of the
    checkpoint begun from."""
    sta: bool | None = None
    """False: without the spatiotemporal attention. By default with it, or as the checkpoint."""
    widths: tuple[int, int] | None = None
    layers: int | None = Field(default=None, ge=1)
    heads: int | None = Field(default=None, ge=1)
    feedforward: int | None = Field(default=None, ge=1)
    dropout: float | None = Field(default=None, ge=0, lt=1)


class DataSection(_Section):
    """What the network is shown."""

    chip: int = Field(default=32, ge=4)
    """Side of a chip (pixels); also the window of validation and prediction."""
    halo: int = Field(default=4, ge=0)
    """Context pixels per side of a window that are not judged."""
    max_dates: int = Field(default=30, ge=0)
    """Training chips are thinned to so many random dates; 0 keeps all."""
    augment: bool = True
    """Turn and mirror training chips."""
    drop_dates: float = Field(default=0.0, ge=0, lt=1)
    """Leave out up to this share of a training chip's dates; how many and which is random."""
    prefix: float = Field(default=0.0, ge=0, le=1)
    """Share of the training chips that end at a random date, as a season still going on does."""
    min_dates: int = Field(default=4, ge=1)
    """Dates that ``drop_dates`` and ``prefix`` leave."""
    memory_gb: float = Field(default=2.0, gt=0)
    """Chips held in memory; part of the recipe, as it sets how far chips are mixed."""

    @property
    def memory(self) -> int:
        """Bytes for chips."""
        return int(self.memory_gb * 1e9)

    @property
    def augmentation(self) -> Augmentation:
        """The random changes of training chips."""
        return Augmentation(
            max_dates=self.max_dates or None,
            dihedral=self.augment,
            prefix=self.prefix,
            drop_dates=self.drop_dates,
            min_dates=self.min_dates,
        )


class WeightsSection(_Section):
    """How often an epoch shows a chip: 1 if nothing is said, 0 never. What fits is multiplied."""

    cubes: dict[str, float] = {}
    """By name, path or pattern of a cube or stack, as ``"alps*" = 2.0``."""
    years: dict[str, float] = {}
    """By the year in which a season begins, or its first day."""
    regions: dict[str, float] = {}
    """By polygon file, or ``"W,S,E,N"`` in degrees."""


class PretrainDataSection(DataSection):
    """What pre-training is shown."""

    drop_dates: float = Field(default=0.3, ge=0, lt=1)
    """Leave out up to this share of a training chip's dates; how many and which is random."""
    prefix: float = Field(default=0.1, ge=0, le=1)
    """Share of the training chips that end at a random date, as a season still going on does."""
    min_clear: float = Field(default=3.0, ge=0)
    """Leave out chips whose pixels have fewer clear dates, on average over the storage chunk."""
    balance: Balance = "chips"
    """``sources`` shows each season of a cube or stack as often as any other, whatever its size."""
    bad_chunks: BadChunks = "fail"
    """``skip`` shows nothing where stored bytes are damaged."""
    max_bad_fraction: float = Field(default=0.01, ge=0, le=1)
    """Damaged chunks as a share of all reads of an epoch, above which ``skip`` stops too."""
    allow_amplification: bool = False
    """Accept layouts of which a chunk is decoded more than 8 times an epoch."""
    weights: WeightsSection = WeightsSection()
    folds: tuple[int, ...] = ()
    """Show only sites of these folds; () shows all. As ``sites`` and ``lists``, for stacks only;
    of several, all must hold."""
    sites: tuple[str, ...] = ()
    """Show only these sites, by id."""
    lists: tuple[str, ...] = ()
    """Show only sites of these lists that a set was published with, as ``train_fold0`` of MTLCC."""

    @property
    def choice(self) -> SiteChoice | None:
        """The sites to show; None for all."""
        choice = SiteChoice(folds=self.folds, sites=self.sites, lists=self.lists)
        return None if choice == SiteChoice() else choice


class OptimiserSection(_Section):
    """How the weights move."""

    name: Literal["adamw", "adam"] = "adamw"
    learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate; by default 1e-3 (tiny), 3e-4 (base), 1e-4 (large)."""
    encoder_factor: float = Field(default=1.0, ge=0)
    """The encoder's learning rate as a share of the others'; below 1 spares pre-trained weights."""
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    clip: float = Field(default=5.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights, such as 0.999; 0 keeps none. With an average, it is
    what is judged, and what best.safetensors and last.safetensors hold."""


class FinetuneOptimiserSection(OptimiserSection):
    """How the weights move, of which the encoder's are pre-trained."""

    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from one layer of the encoder to the one before; 0.8, say, lets
    the layers near the bands move least. 1 moves all layers alike."""
    freeze: Freeze = "none"
    """What does not move, statistics included: the ``encoder``, or only its ``convolutions``."""
    freeze_steps: int = Field(default=0, ge=0)
    """Steps after which what is frozen comes free; 0: never."""


class ValidationSection(_Section):
    """When to judge, save and stop."""

    every: int | None = Field(default=None, ge=1)
    """Steps between two validations, each of which saves; by default a 20th of all, at least 10."""
    patience: int = Field(default=0, ge=0)
    """Validations without improvement after which training stops; 0 never stops early."""
    chips: int = Field(default=64, ge=0)
    """Pre-training: chips held out (at most an eighth of all)."""
    dates: int | None = Field(default=None, ge=1)
    """Fine-tuning: judge windows by so many of their dates, spread evenly; by default by all."""


class FinetuneValidationSection(ValidationSection):
    """When to judge, save and stop, and by which figure."""

    choose_by: ChooseBy = "macro_miou"
    """The figure whose best weights are kept."""


class LabelsSection(_Section):
    """Which training fields are used; by default all of the train split."""

    fields_per_class: int | None = Field(default=None, ge=1)
    fraction: float | None = Field(default=None, gt=0, le=1)
    ignore: tuple[str | int, ...] = ()
    """Classes left out, by name, source value or code: no output, no loss, no figures."""
    silent: tuple[str, ...] = ()
    """Classes that are outputs but no pixel's target, by name or source value: neither learnt nor
    judged, as background and void in the published protocol of PASTIS. One that the cube's legend
    lacks is an output after all others."""
    chips: tuple[tuple[int, int], ...] | None = None
    """Train, and choose weights, on these chips of each site alone: ``[[0, 0], [1, 1]]``, row and
    column in the grid of ``data.chip`` that tiles a site from its first pixel."""


class LossSection(_Section):
    """What errors cost."""

    kind: LossKind = "cross-entropy"
    """``focal`` spares pixels that are right already; ``dice`` is about overlap, chip by chip."""
    gamma: float = Field(default=2.0, ge=0)
    """Of ``focal``: 0 is cross-entropy, more spares more."""
    class_weights: ClassWeights = "inverse-sqrt"
    """``inverse-sqrt`` weighs a class by 1 / sqrt(its training pixels), ``effective-number`` by
    (1 - beta) / (1 - beta^pixels)."""
    beta: float = Field(default=0.9999, ge=0, lt=1)
    """Of ``effective-number``: beyond about 1 / (1 - beta) pixels, more are no more evidence."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of cross-entropy, alone or beside dice."""

    @model_validator(mode="after")
    def _check_smoothing(self) -> Self:
        if self.label_smoothing and not self.kind.startswith("cross-entropy"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} belongs to cross-entropy, and kind is "
                f"{self.kind}; set label_smoothing to 0, or kind to cross-entropy"
            )
        return self


class TrainConfig(_Section):
    """What both kinds of training share."""

    seed: int = Field(default=0, ge=0)
    season: str | None = None
    """Season of the cube; by default the only one (pre-training: all)."""
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0)
    """Instead of steps: passes over the chips."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Chips that go through the network together, on each rank; ``auto``: as many as fit."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added up for one step."""
    ranks: int | None = Field(default=None, ge=1)
    """Processes that share a step, one a device; settled by how the run is started."""
    precision: Precision = "auto"
    deterministic: bool = False
    """Use only operations that repeat bit for bit; slower on GPUs."""
    recompute: bool = False
    """Run the transformer again for the gradients, instead of keeping what it made: less memory."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimiser: OptimiserSection = OptimiserSection()
    validation: ValidationSection = ValidationSection()

    @property
    def rank_batch(self) -> int:
        """Chips that go through the network together, of a settled recipe."""
        return int(self.batch_size)

    @property
    def global_batch(self) -> int:
        """Chips of a step, over all ranks, of a settled recipe."""
        return self.rank_batch * self.accumulate * (self.ranks or 1)


class PretrainConfig(TrainConfig):
    """The recipe of masked pre-training, from a checkpoint or from scratch."""

    init: str | None = None
    """Checkpoint whose encoder to begin from; of a pre-training, also its reconstruction."""
    masking: MaskingSection = MaskingSection()
    data: PretrainDataSection = PretrainDataSection()


class FinetuneConfig(TrainConfig):
    """The recipe of fine-tuning, from a checkpoint or from scratch."""

    init: str | None = None
    """Checkpoint whose encoder to begin from."""
    labels: LabelsSection = LabelsSection()
    loss: LossSection = LossSection()
    optimiser: FinetuneOptimiserSection = FinetuneOptimiserSection()
    validation: FinetuneValidationSection = FinetuneValidationSection()


C = TypeVar("C", bound=TrainConfig)


def load_config(
    kind: type[C],
    *,
    base: Mapping[str, Any] | None = None,
    file: str | Path | None = None,
    assignments: Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
) -> C:
    """Put a recipe together; later sources win: defaults, base, file, overrides, assignments.

    Parameters
    ----------
    base
        Values by section, such as a protocol sets.
    file
        TOML, for example the ``config.toml`` of a run.
    assignments
        ``section.key=value``, values as in TOML; bare words are taken as text, and
        ``null`` sets nothing.
    overrides
        Values by dotted key; those that are None are left out.

    Raises
    ------
    InputError
        If a key is unknown or a value is not allowed; all breaches in one message.
    """
    values: dict[str, Any] = {}
    merge_values(values, base or {})
    if file is not None:
        merge_values(values, _read_toml(Path(file)))
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    _drop_rivals(values, given)
    for key, value in given.items():
        _assign(values, key, value)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise InputError(
                f"Cannot use --set {text!r}: it must be key=value, with a dotted key. "
                "Use for example --set optimiser.learning_rate=1e-4."
            )
        _assign(values, key.strip(), _parse_value(value.strip()))
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        breaches = "; ".join(
            f"{'.'.join(str(part) for part in item['loc']) or 'recipe'}: {item['msg'].lower()} "
            f"(given: {item['input']!r})"
            for item in error.errors()
        )
        raise InputError(
            f"Cannot use the training options: {breaches}. The keys and types are those of "
            f"{kind.__name__}; --dry-run prints them all. Correct these values."
        ) from error


def merge_values(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Set what ``more`` holds, section by section, and leave the rest of ``values``."""
    _drop_rivals(values, more)
    for key, value in more.items():
        inner = values.get(key)
        if isinstance(value, Mapping) and isinstance(inner, dict):
            merge_values(inner, value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def _drop_rivals(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, rival in (("steps", "epochs"), ("epochs", "steps")):
        # Either says how long: the one given replaces the other one.
        if key in given and rival not in given:
            values.pop(rival, None)


def settle(
    config: C,
    *,
    chips: int,
    preset: PresetName | None,
    default_steps: int,
    batch_size: int | None = None,
    ranks: int = 1,
) -> C:
    """Fill in what depends on data and machine: batch, steps, learning rate, validations.

    Parameters
    ----------
    chips
        Training chips.
    batch_size
        What ``auto`` comes to.
    ranks
        Processes that share a step.
    preset
        The network's preset; None for sizes of one's own.
    """
    if config.steps is not None and config.epochs is not None:
        raise InputError(
            f"Cannot train for steps={config.steps} and epochs={config.epochs} at once: both say "
            "how long. Give one of them."
        )
    if config.batch_size == "auto" and batch_size is not None:
        config = config.model_copy(update={"batch_size": batch_size})
    config = config.model_copy(update={"ranks": ranks})
    steps = config.steps or default_steps
    if config.epochs is not None:
        steps = max(math.ceil(config.epochs * chips / config.global_batch), 1)
    rate = config.optimiser.learning_rate or _LEARNING_RATES.get(preset or "base", 3e-4)
    every = config.validation.every or max(math.ceil(steps / _ROUNDS), _SHORTEST_ROUND)
    return config.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "optimiser": config.optimiser.model_copy(update={"learning_rate": rate}),
            "validation": config.validation.model_copy(update={"every": min(every, steps)}),
        }
    )


def to_toml(config: TrainConfig) -> str:
    """Write a recipe as TOML that `load_config` reads back; None is left out."""
    lines: list[str] = []
    sections: list[str] = []
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            rows = [f"{name} = {_format(item)}" for name, item in value.items() if item is not None]
            sections += ["", f"[{key}]", *rows]
        elif value is not None:
            lines.append(f"{key} = {_format(value)}")
    return "\n".join([*lines, *sections]) + "\n"


def _read_toml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(
            f"Cannot read the training options {path}: there is no such file. Give a TOML file, "
            "for example the config.toml of an earlier run."
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"Cannot read the training options {path}: {error}. The file must be TOML. "
            "Correct it, or begin from the config.toml of an earlier run."
        ) from error


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise InputError(
                f"Cannot set {key!r}: {section!r} is a value, not a section. "
                "Use the dotted keys that --dry-run prints."
            )
        values = inner
    values[last] = value


def _parse_value(text: str) -> Any:
    """Read a TOML value; ``null`` is None, and what is no TOML value is text."""
    if text == "null":
        return None
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _format(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        rows = [f"{_format(key)} = {_format(item)}" for key, item in value.items()]
        return "{" + ", ".join(rows) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_format(item) for item in value) + "]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
