"""Numbers that others published, to stand beside ours; never in one column with them."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["PaperNumber", "paper_lines", "read_paper"]


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
    known = [number for number in read_paper() if experiment in number.experiments]
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
