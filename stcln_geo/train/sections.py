"""The parts of a recipe: network, data, optimiser, validation, labels and loss."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..data.batch import Augmentation
from ..data.chips import BadChunks
from ..data.site_choice import SiteChoice
from ..data.weights import Balance
from ..model.config import Mode, Positions, PresetName
from .losses import ClassWeights, LossKind

__all__ = [
    "DataSection",
    "FinetuneOptimiserSection",
    "FinetuneValidationSection",
    "LabelsSection",
    "LossSection",
    "ModelSection",
    "OptimiserSection",
    "PretrainDataSection",
    "Section",
    "ValidationSection",
    "WeightsSection",
]

ChooseBy = Literal["macro_miou", "macro_f1", "overall_accuracy"]
Freeze = Literal["none", "convolutions", "encoder"]

_DECAY = 0.01
_GAMMA = 2.0
_BETA = 0.9999
_LEAST_DATES = 4
_BAD_SHARE = 0.01


class Section(BaseModel):
    """Options that refuse what they do not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The network. Sizes left out are those of the preset, or of the checkpoint begun from."""

    preset: PresetName | None = None
    """Sizes by name; by default ``base``, the published ones, or those of the checkpoint."""
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
    """Channels after the first and the second block of convolutions."""
    layers: int | None = Field(default=None, ge=1)
    """Layers of the transformer over dates."""
    heads: int | None = Field(default=None, ge=1)
    """Heads of its attention; the second of ``widths`` is a multiple of twice as many."""
    feedforward: int | None = Field(default=None, ge=1)
    """Width of its feed-forward part."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of its values that are dropped in training."""


class DataSection(Section):
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
    min_dates: int = Field(default=_LEAST_DATES, ge=1)
    """Dates that ``drop_dates`` and ``prefix`` leave."""
    shift_days: int = Field(default=0, ge=0, le=183)
    """Move all dates of a training chip together, by up to so many days to and fro, as seasons
    come earlier or later in other years and regions."""
    memory_gb: float = Field(default=2.0, gt=0)
    """Chips held in memory; part of the recipe, as it sets how far chips are mixed."""

    @model_validator(mode="after")
    def _check_least(self) -> Self:
        if self.min_dates != _LEAST_DATES and not (self.drop_dates or self.prefix):
            raise ValueError(
                f"min_dates={self.min_dates} belongs to drop_dates and prefix, and both are 0, so "
                "that no date is left out by them; set one of them, or leave min_dates out"
            )
        return self

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
            shift_days=self.shift_days,
        )


class WeightsSection(Section):
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
    max_bad_fraction: float = Field(default=_BAD_SHARE, ge=0, le=1)
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

    @model_validator(mode="after")
    def _check_bad(self) -> Self:
        if self.max_bad_fraction != _BAD_SHARE and self.bad_chunks != "skip":
            raise ValueError(
                f"max_bad_fraction={self.max_bad_fraction} belongs to skip, and bad_chunks is "
                f"{self.bad_chunks}, which stops at the first; set bad_chunks to skip, or leave "
                "max_bad_fraction out"
            )
        return self

    @property
    def choice(self) -> SiteChoice | None:
        """The sites to show; None for all."""
        choice = SiteChoice(folds=self.folds, sites=self.sites, lists=self.lists)
        return None if choice == SiteChoice() else choice


class OptimiserSection(Section):
    """How the weights move."""

    name: Literal["adamw", "adam"] = "adamw"
    """The rule by which weights move."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Highest learning rate; by default 1e-3 (tiny), 3e-4 (base), 1e-4 (large)."""
    encoder_factor: float = Field(default=1.0, ge=0)
    """The encoder's learning rate as a share of the others'; below 1 spares pre-trained weights."""
    weight_decay: float = Field(default=_DECAY, ge=0)
    """How strongly ``adamw`` draws weights to zero; ``adam`` does not."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """How the learning rate goes on after ``warmup``: falls to a hundredth, or stays."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    clip: float = Field(default=5.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Decay of a moving average of the weights and their statistics, such as 0.999; 0 keeps none.
    With an average, it is what is judged, and what best.safetensors and last.safetensors hold."""

    @model_validator(mode="after")
    def _check_decay(self) -> Self:
        if self.name == "adam" and self.weight_decay not in (0, _DECAY):
            raise ValueError(
                f"weight_decay={self.weight_decay} belongs to adamw, and name is adam, which has "
                "none; set name to adamw, or leave weight_decay out"
            )
        return self


class FinetuneOptimiserSection(OptimiserSection):
    """How the weights move, of which the encoder's are pre-trained."""

    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor of the learning rate from one layer of the encoder to the one before; 0.8, say, lets
    the layers near the bands move least. 1 moves all layers alike."""
    freeze: Freeze = "none"
    """What does not move, statistics included: the ``encoder``, or only its ``convolutions``."""
    freeze_steps: int = Field(default=0, ge=0)
    """Steps after which what is frozen comes free; 0: never."""

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        moved = [name for name in ("encoder_factor", "layer_decay") if getattr(self, name) != 1]
        if moved and self.freeze == "encoder" and not self.freeze_steps:
            raise ValueError(
                f"{moved[0]}={getattr(self, moved[0])} belongs to an encoder that moves, and "
                "freeze is encoder throughout; set freeze_steps, after which it does, or leave "
                f"{moved[0]} out"
            )
        return self


class ValidationSection(Section):
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


class LabelsSection(Section):
    """Which training fields are used; by default all of the train split."""

    fields_per_class: int | None = Field(default=None, ge=1)
    """Train on so many fields of each class."""
    fraction: float | None = Field(default=None, gt=0, le=1)
    """Train on this share of each class's fields."""
    ignore: tuple[str | int, ...] = ()
    """Classes left out, by name, source value or code: no output, no loss, no figures."""
    silent: tuple[str, ...] = ()
    """Classes that are outputs but no pixel's target, by name or source value: neither learnt nor
    judged, as background and void in the published protocol of PASTIS. One that the cube's legend
    lacks is an output after all others."""
    chips: tuple[tuple[int, int], ...] | None = None
    """Train, and choose weights, on these chips of each site alone: ``[[0, 0], [1, 1]]``, row and
    column in the grid of ``data.chip`` that tiles a site from its first pixel."""


class LossSection(Section):
    """What errors cost."""

    kind: LossKind = "cross-entropy"
    """``focal`` spares pixels that are right already; ``dice`` is about overlap, chip by chip."""
    gamma: float = Field(default=_GAMMA, ge=0)
    """Of ``focal``: 0 is cross-entropy, more spares more."""
    class_weights: ClassWeights = "inverse-sqrt"
    """``inverse-sqrt`` weighs a class by 1 / sqrt(its training pixels), ``effective-number`` by
    (1 - beta) / (1 - beta^pixels); pixels of a site that is shown twice count twice."""
    beta: float = Field(default=_BETA, ge=0, lt=1)
    """Of ``effective-number``: beyond about 1 / (1 - beta) pixels, more are no more evidence."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Of cross-entropy, alone or beside dice."""

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.label_smoothing and not self.kind.startswith("cross-entropy"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing} belongs to cross-entropy, and kind is "
                f"{self.kind}; set label_smoothing to 0, or kind to cross-entropy"
            )
        if self.gamma != _GAMMA and self.kind != "focal":
            raise ValueError(
                f"gamma={self.gamma} belongs to focal, and kind is {self.kind}; set kind to focal, "
                "or leave gamma out"
            )
        if self.beta != _BETA and self.class_weights != "effective-number":
            raise ValueError(
                f"beta={self.beta} belongs to effective-number, and class_weights is "
                f"{self.class_weights}; set class_weights to effective-number, or leave beta out"
            )
        return self
