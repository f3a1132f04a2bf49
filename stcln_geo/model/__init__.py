"""The network, in torch alone: no xarray, no Dask, no files but checkpoints.

Import order: config, band_groups, masking -> layers -> stcln -> ensemble, reference ->
description -> program, mlm -> checkpoint -> export, join, transfer.
"""

from __future__ import annotations

from .band_groups import WAVELENGTH_GROUPS, group_numbers
from .checkpoint import (
    find_checkpoint,
    load_model,
    read_metadata,
    save_checkpoint,
)
from .config import Mode, Positions, PresetName, StclnConfig
from .description import CheckpointInfo, FileFormat
from .ensemble import Classifier, Ensemble
from .export import export_checkpoint
from .join import join_checkpoints
from .masking import MaskStrategy, draw_mask, hideable, make_mask, masked_loss, vegetated_dates
from .reference import Kind
from .stcln import Encoder, Features, MaskedPretrainer, Stcln, positions_for, probabilities
from .transfer import load_encoder_into, load_pretrainer_into

__all__ = [
    "WAVELENGTH_GROUPS",
    "CheckpointInfo",
    "Classifier",
    "Encoder",
    "Ensemble",
    "Features",
    "FileFormat",
    "Kind",
    "MaskStrategy",
    "MaskedPretrainer",
    "Mode",
    "Positions",
    "PresetName",
    "Stcln",
    "StclnConfig",
    "draw_mask",
    "export_checkpoint",
    "find_checkpoint",
    "group_numbers",
    "hideable",
    "join_checkpoints",
    "load_encoder_into",
    "load_model",
    "load_pretrainer_into",
    "make_mask",
    "masked_loss",
    "positions_for",
    "probabilities",
    "read_metadata",
    "save_checkpoint",
    "vegetated_dates",
]
