"""The network, in torch alone: no xarray, no Dask, no files but checkpoints.

Import order: config -> layers -> stcln, masking -> reference -> checkpoint -> transfer.
"""

from __future__ import annotations

from .checkpoint import (
    CheckpointInfo,
    find_checkpoint,
    load_model,
    read_metadata,
    save_checkpoint,
)
from .config import Mode, Positions, PresetName, StclnConfig
from .masking import MaskStrategy, make_mask, masked_loss, vegetated_dates
from .reference import Kind
from .stcln import Encoder, Features, MaskedPretrainer, Stcln, positions_for, probabilities
from .transfer import load_encoder_into

__all__ = [
    "CheckpointInfo",
    "Encoder",
    "Features",
    "Kind",
    "MaskStrategy",
    "MaskedPretrainer",
    "Mode",
    "Positions",
    "PresetName",
    "Stcln",
    "StclnConfig",
    "find_checkpoint",
    "load_encoder_into",
    "load_model",
    "make_mask",
    "masked_loss",
    "positions_for",
    "probabilities",
    "read_metadata",
    "save_checkpoint",
    "vegetated_dates",
]
