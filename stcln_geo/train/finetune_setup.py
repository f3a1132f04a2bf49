"""What a fine-tuning begins with: fields, classes, bands, chips, network and streams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..cube.contract import SPLITS
from ..cube.store import FieldTable
from ..data.chips import ChipDataset
from ..data.dates import DateChoice
from ..data.labelled import plan_training, repeat_units
from ..data.source import Source, open_source
from ..data.split import check_labelled, few_label_fields
from ..data.stream import OrderedStream, TrainingStream
from ..data.targets import ChipChoice, fields_within
from ..errors import LabelError
from ..grid import Lattice
from ..model.checkpoint import CheckpointInfo, read_metadata
from ..model.config import StclnConfig
from ..model.device import Device, choose_device, choose_precision, rng_kept
from ..model.stcln import Stcln
from ..model.transfer import check_sizes
from .classes import ClassChoice, choose_classes
from .compiled import check_compiler
from .config import FinetuneConfig, settle
from .finetune_task import FinetuneTask
from .plan import check_shift, choose_batch_size, network_config
from .ranks import Ranks
from .run_directory import RunDirectory
from .scoring import make_lookup
from .sections import LabelsSection
from .start import check_freeze, choose_bands, give_first_weights, say_differences
from .task import step_seed

__all__ = [
    "FinetuneSetup",
    "TrainingFields",
    "count_fields",
    "make_finetune_task",
    "prepare_finetune",
    "say_counts",
    "training_fields",
]

_DEFAULT_STEPS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSetup:
    """A run whose data is known, but not yet read."""

    source: Source
    fields: FieldTable
    """As seen through the chips that are trained on."""
    classes: ClassChoice
    config: FinetuneConfig
    network: StclnConfig
    init: CheckpointInfo | None
    chosen: np.ndarray
    """(F,) bool: fields to train on."""
    dataset: ChipDataset
    held_out: ChipDataset
    device: str
    precision: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingFields:
    """The fields that a recipe trains on."""

    fields: FieldTable
    """Of the season, as seen through the chips that labels are limited to."""
    classes: ClassChoice
    chosen: np.ndarray
    """(F,) bool: those to train on."""
    within: ChipChoice | None
    """The chips that labels are limited to; None for none."""


def training_fields(source: Source, config: FinetuneConfig) -> TrainingFields:
    """Choose the fields to train on, the same for the same recipe and labels.

    Raises
    ------
    LabelError
        If there is no field to train on.
    """
    within = None
    if config.labels.chips is not None:
        within = ChipChoice(config.data.chip, config.labels.chips)
    fields, classes = _labelled(source, config.labels, within)
    chosen = few_label_fields(
        fields,
        fields_per_class=config.labels.fields_per_class,
        fraction=config.labels.fraction,
        seed=config.seed,
    )
    return TrainingFields(
        fields=fields, classes=classes, chosen=chosen & classes.used(fields), within=within
    )


def prepare_finetune(
    cube: str | Path | Source,
    config: FinetuneConfig,
    *,
    device: Device,
    ranks: Ranks,
    run: RunDirectory | None,
) -> FinetuneSetup:
    """Find out what a run is made of; reads the tables of fields and dates, and no pixel.

    Parameters
    ----------
    run
        Where the run is written; None for a rehearsal.

    Raises
    ------
    LabelError
        If there is no field to train on.
    """
    source = open_source(cube, config.season)
    learnt = training_fields(source, config)
    fields, classes, chosen, within = learnt.fields, learnt.classes, learnt.chosen, learnt.within
    init = read_metadata(config.init) if config.init is not None else None
    choice = choose_bands(source, config.model.bands, init)
    bands = choice.bands
    network, preset = network_config(
        config.model,
        bands=bands,
        classes=len(classes.legend),
        base=init.config if init is not None else None,
    )
    check_shift(config.data, network)
    if init is not None:
        check_sizes(init, network)
    judged = (fields.split == SPLITS["validation"]) & classes.used(fields)
    lattice = Lattice(window=config.data.chip, halo=config.data.halo)
    trained, held_out = plan_training(
        source, trained=chosen, judged=judged, chip=config.data.chip, lattice=lattice, within=within
    )
    trained, held_out = repeat_units(trained, source), repeat_units(held_out, source)
    if not trained:
        raise LabelError(
            f"Cannot fine-tune on {source.path}: none of the {int(chosen.sum())} chosen training "
            "fields lies where the cube has a clear date. Choose another season, or check the "
            "cube with `stcln-geo cube info`."
        )
    where = choose_device(device)
    precision = choose_precision(config.precision, where, width=network.dim)
    if config.compile:
        check_compiler(where)
    chips = sum(len(unit.chips) for unit in trained)
    settled = settle(
        config,
        chips=chips,
        # A checkpoint's sizes decide on the learning rate as the preset of these sizes would.
        preset=preset or network.preset_name,
        default_steps=_DEFAULT_STEPS,
        batch_size=choose_batch_size(
            config,
            run,
            lambda: FinetuneTask(Stcln(network), config, class_pixels=[1] * len(classes.legend)),
            dates=int(source.dates.max()),
            chips=chips,
            device=where,
            precision=precision,
            ranks=ranks,
        ),
        ranks=ranks.size,
    )
    left_out = classes.describe_ignored(fields)
    notes = [*choice.notes, *([left_out] if left_out else [])]
    notes += classes.describe_scarce(fields, chosen, wanted=config.labels.fields_per_class)
    frozen = check_freeze(config.optimiser, init, choice.fresh)
    if frozen:
        notes.append(frozen)
    if not judged.any():
        notes.append(
            "No validation fields: the last weights count as the best, nothing stops early, and "
            "confidence is not calibrated."
        )
    notes += say_differences(source, init)
    return FinetuneSetup(
        source=source,
        fields=fields,
        classes=classes,
        config=settled.model_copy(
            update={
                "season": source.season,
                "model": settled.model.model_copy(update={"bands": bands, "preset": preset}),
            }
        ),
        network=network,
        init=init,
        chosen=chosen,
        dataset=ChipDataset([source], trained, bands=bands, wanted=[chosen], within=within),
        held_out=ChipDataset(
            [source],
            held_out,
            bands=bands,
            wanted=[judged],
            within=within,
            halo=config.data.halo,
            dates=DateChoice(most=config.validation.dates) if config.validation.dates else None,
        ),
        device=where,
        precision=precision,
        notes=tuple(notes),
    )


def make_finetune_task(
    prepared: FinetuneSetup, *, workers: int, begin: bool, ranks: Ranks, alone: bool = False
) -> tuple[FinetuneTask, tuple[str, ...]]:
    """Build network and streams.

    Parameters
    ----------
    begin
        Give the network its first weights.
    alone
        Make steps without the other ranks.
    """
    config = prepared.config
    with rng_kept(prepared.device):
        torch.manual_seed(step_seed(config.seed, 0))
        network = Stcln(prepared.network)
    report: tuple[str, ...] = ()
    if begin:
        report = give_first_weights(network, prepared.init, prepared.dataset, seed=config.seed)
    stream = TrainingStream(
        prepared.dataset,
        batch_size=config.rank_batch,
        seed=config.seed,
        memory=config.data.memory,
        threads=workers,
        augmentation=config.data.augmentation,
        rank=ranks.rank,
        world_size=ranks.size,
    )
    validation = None
    if prepared.held_out.chips:
        validation = OrderedStream(
            prepared.held_out,
            # As `evaluate` does: a window of this mode must not be filled up with others' dates.
            batch_size=1 if prepared.network.mode == "reference" else config.rank_batch,
            memory=config.data.memory // 4,
            threads=workers,
            rank=ranks.rank,
            world_size=ranks.size,
        )
    classes = prepared.classes
    task = FinetuneTask(
        network,
        config,
        stream=stream,
        validation=validation,
        class_pixels=classes.pixels(prepared.fields, prepared.chosen, shown=prepared.source.weight),
        lookup=make_lookup(classes),
        ranks=Ranks() if alone else ranks,
    )
    return task, report


def count_fields(prepared: FinetuneSetup) -> dict[str, dict[str, int]]:
    """Count fields and pixels of each split; of the train split also those chosen."""
    fields = prepared.fields
    used = prepared.classes.used(fields)
    parts = {
        "train_chosen": prepared.chosen,
        **{name: (fields.split == code) & used for name, code in SPLITS.items()},
    }
    return {
        name: {"fields": int(part.sum()), "pixels": int(fields.pixels[part].sum())}
        for name, part in parts.items()
    }


def say_counts(prepared: FinetuneSetup) -> str:
    """Tell how many fields each split has."""
    counts = count_fields(prepared)
    return "fields: " + ", ".join(
        f"{counts[name]['fields']} {said}"
        for name, said in (
            ("train_chosen", f"of {counts['train']['fields']} training fields chosen"),
            ("validation", "for validation"),
            ("test", "for test"),
        )
    )


def _labelled(
    source: Source, labels: LabelsSection, within: ChipChoice | None
) -> tuple[FieldTable, ClassChoice]:
    """Return fields and classes of a season that has both, and a split."""
    fields, legend = check_labelled(source)
    classes = choose_classes(legend, labels.ignore, silent=labels.silent)

    def any_to_train_on(among: FieldTable) -> bool:
        return bool(((among.split == SPLITS["train"]) & classes.used(among)).any())

    if not any_to_train_on(fields):
        left = " of a class that counts" if classes.left_out or classes.silent else ""
        raise LabelError(
            f"Cannot fine-tune on {source}: none of its {len(fields)} fields{left} is in the train "
            "split. Run `stcln-geo labels split CUBE` first."
        )
    if within is None:
        return fields, classes
    seen = fields_within(source, within)
    if not any_to_train_on(seen):
        raise LabelError(
            f"Cannot fine-tune on {source}: no field of the train split has a pixel in the chips "
            f"{[list(chip) for chip in within.chips]} of a site. Name other chips with "
            "labels.chips, or leave it out."
        )
    return seen, classes
