"""Which classes of a cube's legend a network tells apart, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..cube.store import FieldTable
from ..errors import LabelError
from ..legend import Legend

__all__ = ["ClassChoice", "choose_classes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassChoice:
    """The classes that count, of a cube's legend.

    An ignored class is no output of the network: its pixels count neither in the loss nor in the
    figures, and no map shows it.
    """

    legend: Legend
    """The classes that count; codes dense, as the network and its maps have them."""
    ignored: Legend | None
    """The others; None where all count."""
    codes: tuple[int, ...]
    """Code in the cube's legend of each class that counts."""
    total: int
    """Length of the cube's legend."""

    def used(self, fields: FieldTable) -> np.ndarray:
        """Return (F,) bool: the fields of classes that count."""
        return np.isin(fields.code, self.codes)

    def count(self, fields: FieldTable, part: np.ndarray) -> np.ndarray:
        """Return (K,) int64: fields of each class that counts, of those in ``part`` (F,) bool."""
        return np.bincount(fields.code[part], minlength=self.total)[list(self.codes)]

    def pixels(self, fields: FieldTable, part: np.ndarray) -> list[int]:
        """Return the labelled pixels of each class that counts, of the fields in ``part``."""
        return [int(fields.pixels[part & (fields.code == code)].sum()) for code in self.codes]

    def describe_ignored(self, fields: FieldTable) -> str | None:
        """Say what is left out; None where nothing is."""
        if self.ignored is None:
            return None
        return (
            f"Ignored: {', '.join(self.ignored.names)} ({int((~self.used(fields)).sum())} fields). "
            "They count neither in the loss nor in the figures, and are no class of the map."
        )


def choose_classes(legend: Legend, ignore: Sequence[str | int] = ()) -> ClassChoice:
    """Leave classes out of a cube's legend.

    Parameters
    ----------
    ignore
        Names, source values or codes.

    Raises
    ------
    LabelError
        If there is no such class, or fewer than two are left.
    """
    without = {legend.find(wanted).code for wanted in ignore}
    codes = tuple(code for code in legend.codes if code not in without)
    if without and len(codes) < 2:
        left = ", ".join(legend.names[code] for code in codes) or "none"
        raise LabelError(
            f"Cannot ignore {', '.join(legend.names[code] for code in sorted(without))}: of "
            f"{len(legend)} classes there must be two left to tell apart (left: {left}). Ignore "
            "fewer classes."
        )
    values = {legend.classes[code].value for code in codes}
    gone = {legend.classes[code].value for code in without}
    return ClassChoice(
        legend=legend.keep(values),
        ignored=legend.keep(gone) if gone else None,
        codes=codes,
        total=len(legend),
    )
