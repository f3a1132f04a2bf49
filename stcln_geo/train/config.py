"""The recipe of a training run: typed, read from TOML, written back whole into the run directory.

Values that are ``None`` are settled when the data is known; `settle` does so. What does not
change the result (threads, progress, the place of the cube) is no part of the recipe.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from ..errors import InputError, MissingFileError
from ..model.config import PresetName
from ..model.device import Precision
from ..storage import Location, location
from .masking import MaskingSection
from .sections import (
    DataSection,
    FinetuneOptimiserSection,
    FinetuneValidationSection,
    LabelsSection,
    LossSection,
    ModelSection,
    OptimiserSection,
    PretrainDataSection,
    Section,
    ValidationSection,
)

__all__ = [
    "FinetuneConfig",
    "PretrainConfig",
    "TrainConfig",
    "load_config",
    "merge_values",
    "option_keys",
    "settle",
    "to_toml",
]

_LEARNING_RATES: dict[PresetName, float] = {"tiny": 1e-3, "base": 3e-4, "large": 1e-4}
_RIVALS = {
    "steps": "epochs", "epochs": "steps",
    "fields_per_class": "fraction", "fraction": "fields_per_class",
}  # fmt: skip
"""Options that say the same thing in two ways: the one given later replaces the other."""
_ROUNDS = 20
_SHORTEST_ROUND = 10


class TrainConfig(Section):
    """What both kinds of training share."""

    seed: int = Field(default=0, ge=0)
    """Sets first weights, order, masks and random changes, and which few fields are taken."""
    season: str | None = None
    """Season of the cube; by default the only one (pre-training: all)."""
    steps: int | None = Field(default=None, ge=1)
    """Steps to train; by default 5000 of pre-training and 2000 of fine-tuning."""
    epochs: float | None = Field(default=None, gt=0)
    """Instead of steps: passes over the chips."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] = 8
    """Chips that go through the network together, on each rank; ``auto``: as many as fit."""
    accumulate: int = Field(default=1, ge=1)
    """Batches whose gradients are added up for one step."""
    ranks: int | None = Field(default=None, ge=1)
    """Processes that share a step, one a device; settled by how the run is started."""
    precision: Precision = "auto"
    """``auto`` takes ``bf16`` where the hardware is faster at it, else ``float32``."""
    deterministic: bool = False
    """Use only operations that repeat bit for bit; slower on GPUs."""
    recompute: bool = False
    """Run the transformer again for the gradients, instead of keeping what it made: less memory."""
    compile: bool = False
    """Compile the network with `torch.compile`: minutes at the start, for each shape of a batch."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    optimiser: OptimiserSection = OptimiserSection()
    validation: ValidationSection = ValidationSection()

    @field_validator("season", mode="before")
    @classmethod
    def _date_as_text(cls, value: Any) -> Any:
        """TOML reads 2018-09-01 without quotes as a date."""
        return value.isoformat() if isinstance(value, date) else value

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

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        if self.validation.dates is not None:
            raise ValueError(
                f"validation.dates={self.validation.dates} belongs to fine-tuning: pre-training is "
                "judged on chips as it is trained on them; leave it out"
            )
        return self


class FinetuneConfig(TrainConfig):
    """The recipe of fine-tuning, from a checkpoint or from scratch."""

    init: str | None = None
    """Checkpoint whose encoder to begin from."""
    labels: LabelsSection = LabelsSection()
    loss: LossSection = LossSection()
    optimiser: FinetuneOptimiserSection = FinetuneOptimiserSection()
    validation: FinetuneValidationSection = FinetuneValidationSection()

    @model_validator(mode="after")
    def _check_validation(self) -> Self:
        usual = FinetuneValidationSection().chips
        if self.validation.chips != usual:
            raise ValueError(
                f"validation.chips={self.validation.chips} belongs to pre-training: fine-tuning is "
                "judged on all windows of the validation fields; leave it out"
            )
        return self


C = TypeVar("C", bound=TrainConfig)


def load_config(
    kind: type[C],
    *,
    base: Mapping[str, Any] | None = None,
    file: str | Location | None = None,
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
        merge_values(values, _read_toml(location(file)))
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    assigned = [_parse_assignment(text) for text in assignments]
    _drop_rivals(values, {**given, **{key: value for key, value in assigned if value is not None}})
    for key, value in (*given.items(), *assigned):
        _assign(values, key, value)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        breaches = "; ".join(_breach(kind, item) for item in error.errors())
        raise InputError(
            f"Cannot use the training options: {breaches}. The keys and types are those of "
            f"{kind.__name__}, which --print-config prints. Correct these values."
        ) from error


def _breach(kind: type[TrainConfig], item: Any) -> str:
    """Say what is wrong with an option; of one that does not exist, which ones are like it."""
    key = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] != "extra_forbidden":
        return f"{key}: {item['msg'].lower()} (given: {item['input']!r})"
    hint = " and ".join(_like(key, list(option_keys(kind))))
    told = f", but {hint}" if hint else ""
    return f"{key}: there is no such option{told} (given: {item['input']!r})"


def _like(key: str, known: list[str]) -> list[str]:
    """Return the options that may be meant by a key: in other sections, longer, or misspelt."""
    section, _, name = key.rpartition(".")
    elsewhere = [option for option in known if option.rpartition(".")[2] == name]
    start = f"{section}." if section else ""
    beside = dict.fromkeys(
        option.removeprefix(start).partition(".")[0] for option in known if option.startswith(start)
    )
    longer = [other for other in beside if name in other.split("_")][:3]
    near = longer or get_close_matches(name, beside, n=2, cutoff=0.75)
    return elsewhere or [start + other for other in near]


def option_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all options of a recipe, those of its sections included."""
    for name, field in kind.model_fields.items():
        section = type(field.default)
        if issubclass(section, BaseModel):
            yield from option_keys(section, f"{prefix}{name}.")
        else:
            yield prefix + name


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
    """Take out what a value that is given, by its dotted key, is said in place of."""
    for key in given:
        section, dot, name = key.rpartition(".")
        rival = _RIVALS.get(name)
        inner: Any = values
        for part in section.split(".") if dot else ():
            inner = inner.get(part, {}) if isinstance(inner, dict) else {}
        if rival is not None and isinstance(inner, dict) and section + dot + rival not in given:
            inner.pop(rival, None)


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


def _read_toml(path: Location) -> dict[str, Any]:
    if not path.is_file():
        raise MissingFileError(
            f"Cannot read the training options {path}: there is no such file. Give a TOML file, "
            "for example the config.toml of an earlier run."
        )
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
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
                "Use the dotted keys that --print-config prints."
            )
        values = inner
    values[last] = value


def _parse_assignment(text: str) -> tuple[str, Any]:
    """Read ``section.key=value``: key and value."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise InputError(
            f"Cannot use --set {text!r}: it must be key=value, with a dotted key. "
            "Use for example --set optimiser.learning_rate=1e-4."
        )
    return key.strip(), _parse_value(value.strip())


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
