"""Where cubes meet torch: chips, batches and the order of samples; splits by field.

Import order: reader, split -> source -> plan, targets -> labelled -> chips -> batch, sampling
-> stream; splits of sites and labels stand beside.
"""

from __future__ import annotations

from .batch import Batch, collate, decode_reflectance
from .chips import Chip, ChipDataset, plan_chips, plan_labelled_chips, plan_windows
from .reader import Block, read_block
from .split import few_label_fields, split_fields
from .split_labels import SplitSpec, split_labels
from .stream import OrderedStream, TrainingStream

__all__ = [
    "Batch",
    "Block",
    "Chip",
    "ChipDataset",
    "OrderedStream",
    "SplitSpec",
    "TrainingStream",
    "collate",
    "decode_reflectance",
    "few_label_fields",
    "plan_chips",
    "plan_labelled_chips",
    "plan_windows",
    "read_block",
    "split_fields",
    "split_labels",
]
