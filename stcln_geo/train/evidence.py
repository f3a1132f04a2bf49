"""What the figures of a run are evidence of."""

from __future__ import annotations

import numpy as np

from ..cube.contract import SPLITS
from ..cube.season import FieldTable
from ..data.split import sites_apart

__all__ = ["SITES_APART", "TRANSDUCTIVE", "figures_hold_for"]

TRANSDUCTIVE = (
    "Pre-training on this cube, the bands' mean and deviation, and the network's attention see the "
    "pixels of validation and test fields, never their labels. The figures hold for mapping this "
    "region and season from few labels, not for other regions or seasons."
)

SITES_APART = (
    "Sites that hold training fields hold none to judge by: the network did not see the pixels "
    "that the figures are of, unless pre-training did. The figures hold for other sites of the "
    "same regions and seasons."
)


def figures_hold_for(fields: FieldTable, *splits: str) -> str:
    """Say what figures of one or more splits are evidence of, by where their fields lie."""
    judged = np.isin(fields.split, [SPLITS[name] for name in splits])
    return SITES_APART if sites_apart(fields, judged) else TRANSDUCTIVE
