"""Which classes of a cube's legend a network tells apart, and which are left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..cube.store import FieldTable
from ..errors import LabelError
from ..legend import PALETTE, Legend, LegendClass

__all__ = ["ClassChoice", "choose_classes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassChoice:
    """The classes that count, of a cube's legend.

    An ignored class is no output of the network: its pixels count neither in the loss nor in the
    figures, and no map shows it. A silent class is an output, but no pixel's target: it is neither
    learnt nor judged, and a pixel that is taken for it is wrong.
    """

    legend: Legend
    """The outputs; codes dense, as the network and its maps have them."""
    ignored: Legend | None
    """The others; None where all are outputs."""
    codes: tuple[int, ...]
    """Code in the cube's legend of each class that counts."""
    outputs: tuple[int, ...]
    """Output of each class that counts."""
    total: int
    """Length of the cube's legend."""
    left_out: tuple[int, ...] = ()
    """Codes in the cube's legend of the ignored classes."""
    silent: tuple[str, ...] = ()
    """Source values of the outputs that are no pixel's target."""

    def used(self, fields: FieldTable) -> np.ndarray:
        """Return (F,) bool: the fields of classes that count."""
        return np.isin(fields.code, self.codes)

    def count(self, fields: FieldTable, part: np.ndarray) -> np.ndarray:
        """Return (K,) int64: fields of each output, of those in ``part`` (F,) bool."""
        counts = np.zeros(len(self.legend), dtype=np.int64)
        found = np.bincount(fields.code[part], minlength=self.total)
        counts[list(self.outputs)] = found[list(self.codes)]
        return counts

    def pixels(
        self, fields: FieldTable, part: np.ndarray, *, shown: np.ndarray | None = None
    ) -> list[int]:
        """Return the labelled pixels of each output, of the fields in ``part``; 0 if silent.

        Parameters
        ----------
        part : (F,) bool.
        shown : (S,) int, how often each pixel of a site counts; None: once.
        """
        pixels = fields.pixels.astype(np.int64)
        if shown is not None:
            pixels *= shown[fields.site]
        counts = [0] * len(self.legend)
        for code, output in zip(self.codes, self.outputs, strict=True):
            counts[output] = int(pixels[part & (fields.code == code)].sum())
        return counts

    def describe_ignored(self, fields: FieldTable) -> str | None:
        """Say what is left out, and what is silent; None where nothing is."""
        said = []
        if self.ignored is not None:
            count = int(np.isin(fields.code, self.left_out).sum())
            said.append(
                f"Ignored: {', '.join(self.ignored.names)} ({count} fields). "
                "They count neither in the loss nor in the figures, and are no class of the map."
            )
        if self.silent:
            names = [entry.name for entry in self.legend.classes if entry.value in self.silent]
            said.append(
                f"Silent: {', '.join(names)}. They are outputs of the network, but no pixel is "
                "learnt or judged as one of them."
            )
        return " ".join(said) or None

    def describe_scarce(
        self, fields: FieldTable, chosen: np.ndarray, *, wanted: int | None
    ) -> list[str]:
        """Say which classes have no field to train on, or fewer than are wanted of each.

        Parameters
        ----------
        chosen : (F,) bool. True for the fields to train on.
        wanted
            Fields of each class that were asked for; None for no number.
        """
        counts = self.count(fields, chosen)
        learnt = [(self.legend.names[output], int(counts[output])) for output in self.outputs]
        none = [name for name, count in learnt if not count]
        few = [f"{name} ({count})" for name, count in learnt if 0 < count < (wanted or 0)]
        said = []
        if none:
            said.append(
                f"No training fields of {', '.join(none)}: the network has an output for each that "
                "nothing teaches. Split the labels anew, or leave them out with --ignore."
            )
        if few:
            said.append(f"Fewer than {wanted} training fields: {', '.join(few)}.")
        return said


def choose_classes(
    legend: Legend, ignore: Sequence[str | int] = (), *, silent: Sequence[str] = ()
) -> ClassChoice:
    """Leave classes out of a cube's legend, or keep them from being a target.

    Parameters
    ----------
    ignore
        Names, source values or codes.
    silent
        Names or source values. One that the legend lacks becomes an output after all others, so
        that a network can have the outputs of a published one.

    Raises
    ------
    LabelError
        If there is no such class, fewer than two are left, or one is ignored and silent.
    """
    without = {legend.find(wanted).code for wanted in ignore}
    known, new = _find_silent(legend, silent)
    both = sorted(without & known)
    if both:
        raise LabelError(
            f"Cannot ignore {legend.names[both[0]]} and keep it silent: an ignored class is no "
            "output, a silent one is. Take it out of labels.ignore or labels.silent."
        )
    kept = [code for code in legend.codes if code not in without]
    codes = tuple(code for code in kept if code not in known)
    if (without or known) and len(codes) < 2:
        left = ", ".join(legend.names[code] for code in codes) or "none"
        named = ", ".join(legend.names[code] for code in sorted(without | known))
        raise LabelError(
            f"Cannot {'ignore' if without else 'silence'} {named}: of "
            f"{len(legend)} classes there must be two left to tell apart (left: {left}). Ignore "
            "fewer classes."
        )
    gone = {legend.classes[code].value for code in without}
    return ClassChoice(
        legend=_with_outputs(legend.keep({legend.classes[code].value for code in kept}), new),
        ignored=legend.keep(gone) if gone else None,
        codes=codes,
        outputs=tuple(kept.index(code) for code in codes),
        total=len(legend),
        left_out=tuple(sorted(without)),
        silent=(
            *(legend.classes[code].value for code in sorted(known)),
            *(entry.value for entry in new),
        ),
    )


def _find_silent(legend: Legend, silent: Sequence[str]) -> tuple[set[int], list[LegendClass]]:
    """Return the codes of silent classes that the legend has, and those it lacks, as classes."""
    known: set[int] = set()
    new: dict[str, LegendClass] = {}
    for text in silent:
        by_name = [entry for entry in legend.classes if text == entry.name]
        found = by_name or [entry for entry in legend.classes if text in entry.values]
        if found:
            known.add(found[0].code)
            continue
        unlearnt = [entry for entry in legend.ignored if text in (entry.name, *entry.values)]
        color = PALETTE[(len(legend) + len(new)) % len(PALETTE)]
        made = LegendClass(code=0, value=text, name=text, color=color)
        entry = unlearnt[0] if unlearnt else made
        new[entry.value] = entry
    return known, list(new.values())


def _with_outputs(legend: Legend, new: Sequence[LegendClass]) -> Legend:
    """Put classes after those of a legend, before those that it ignores."""
    if not new:
        return legend
    values = {entry.value for entry in new}
    rest = [entry for entry in legend.ignored if entry.value not in values]
    count = len(legend) + len(new)
    every = [replace(entry, code=code) for code, entry in enumerate((*legend.classes, *new, *rest))]
    return Legend(tuple(every[:count]), tuple(every[count:]))
