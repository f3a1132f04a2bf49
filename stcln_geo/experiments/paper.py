"""Numbers that others published, to stand beside ours; never in one column with them."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from ..train.protocol import Protocol

__all__ = ["PaperNumber", "figure_lines", "paper_lines", "read_paper"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PaperNumber:
    """A published result; shares in 0 to 1, None where it was not told."""

    experiments: tuple[str, ...]
    """Experiments that ask a like question."""
    set: str
    what: str
    protocol: str
    source: str
    miou: float | None = None
    f1: float | None = None
    oa: float | None = None
    gain_miou: float | None = None
    """Points of mIoU over something else, as ``what`` says."""

    def figures(self) -> str:
        """Return the figures in words."""
        told = [
            f"{name} {value:.4f}"
            for name, value in (("mIoU", self.miou), ("F1", self.f1), ("OA", self.oa))
            if value is not None
        ]
        if self.gain_miou is not None:
            told.append(f"{self.gain_miou:+.2f} points of mIoU")
        return ", ".join(told)


def read_paper() -> tuple[PaperNumber, ...]:
    """Read all numbers that are known."""
    text = files(__package__).joinpath("paper.toml").read_text(encoding="utf-8")
    return tuple(
        PaperNumber(**{**entry, "experiments": tuple(entry["experiments"])})
        for entry in tomllib.loads(text)["numbers"]
    )


def paper_lines(experiment: str) -> list[str]:
    """Return the numbers that stand beside an experiment's, as Markdown; nothing for none."""
    return _lines([number for number in read_paper() if experiment in number.experiments])


def figure_lines(protocol: Protocol) -> list[str]:
    """Return the numbers that a protocol names, in the same form.

    They are of all its rounds, whichever is given.
    """
    name = protocol.name.partition(":")[0]
    return _lines(
        [
            PaperNumber(
                experiments=("protocol",),
                set=(protocol.dataset or "-").upper(),
                what=figure.label,
                protocol=", ".join(part for part in (name, figure.note) if part),
                source=figure.source,
                miou=figure.miou,
                f1=figure.f1,
                oa=figure.overall_accuracy,
                gain_miou=None if figure.gain_miou is None else 100 * figure.gain_miou,
            )
            for figure in protocol.figures
        ]
    )


def _lines(known: Sequence[PaperNumber]) -> list[str]:
    if not known:
        return []
    return [
        "## Published numbers",
        "",
        "Of others, on the data and by the protocol named: not to be compared with the figures "
        "above unless both are the same.",
        "",
        "| set | what | figures | protocol | source |",
        "|---|---|---|---|---|",
        *(
            f"| {number.set} | {number.what} | {number.figures()} | {number.protocol} | "
            f"{number.source} |"
            for number in known
        ),
        "",
    ]
