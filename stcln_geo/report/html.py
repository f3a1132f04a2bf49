"""Write the report of a demo: one HTML page that holds everything it shows."""

from __future__ import annotations

import base64
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingFileError
from ..legend import Legend
from ..progress import duration_text
from ..storage import part_path, writing

__all__ = [
    "ClassScore",
    "DemoReport",
    "OutputFile",
    "Picture",
    "Scores",
    "Stage",
    "write_demo_report",
    "write_page",
    "write_text",
]

_NONE = "\N{EN DASH}"

_FEW_FIELDS = 50
"""With fewer held-out fields the page says that its figures carry no claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Accuracy of one variant on held-out fields, from 0 to 1; means over the seeds."""

    name: str
    """Such as "Pre-trained" or "From scratch"."""
    overall_accuracy: float
    macro_miou: float
    macro_f1: float
    kappa: float
    spread: float | None = None
    """Standard deviation of the overall accuracy over the seeds; None with one seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassScore:
    """Accuracy of the mapped network for one class; NaN where a score is not defined."""

    name: str
    color: str
    fields: int
    """Held-out fields."""
    pixels: int
    """Held-out pixels."""
    iou: float
    f1: float
    users_accuracy: float
    producers_accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture and the words that stand for it."""

    path: Path
    """PNG; it is copied into the page."""
    title: str
    alt: str
    """What a reader who cannot see the picture should know."""
    caption: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of the path."""

    name: str
    seconds: float
    note: str = ""
    """Such as "24 dates, 240 x 336 px"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """A file or folder that was made."""

    path: str
    what: str
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoReport:
    """All that the page shows: plain numbers, words and paths."""

    title: str
    subtitle: str
    """One sentence: what was done where."""
    simulated: bool
    """True where the images are simulated; the page then says so at the top."""
    scores: tuple[Scores, ...]
    """The variant that made the map first."""
    held_out_fields: int
    held_out_pixels: int
    labelled_fields: int
    """Fields the fine-tuning saw, over all classes."""
    seeds: int
    legend: Legend
    maps: tuple[Picture, ...]
    """Side by side: true colour, reference labels, class map, confidence."""
    curves: tuple[Picture, ...] = ()
    confusions: tuple[Picture, ...] = ()
    per_class: tuple[ClassScore, ...] = ()
    stages: tuple[Stage, ...] = ()
    commands: tuple[str, ...] = ()
    files: tuple[OutputFile, ...] = ()
    transductive: bool = True
    """True where pre-training saw the unlabelled pixels of the region that is mapped."""
    facts: tuple[tuple[str, str], ...] = ()
    """Further pairs of a name and a value, such as ("Network", "base, 3.4 M parameters")."""
    made: str = ""
    """When and with which version, such as "2026-01-31, stcln-geo 0.1.0"."""


def write_demo_report(out_html: str | Path, report: DemoReport) -> Path:
    """Write the page, with all pictures inside it, and return its path.

    Parameters
    ----------
    out_html : str or Path
        File to write; replaced if it exists.
    report : DemoReport

    Raises
    ------
    MissingFileError
        If a picture does not exist.
    """
    return write_page(
        out_html,
        "demo.html.j2",
        report=report,
        gain=_gain(report.scores),
        total_s=sum(stage.seconds for stage in report.stages),
        few_fields=_FEW_FIELDS,
        longest_s=max((stage.seconds for stage in report.stages), default=0.0) or 1.0,
    )


def write_page(out_html: str | Path, template: str, **values: Any) -> Path:
    """Write a page from one of the package's templates, in the style all pages share."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stcln_geo.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        percent=_percent, number=_number, duration=_duration, size=_size, inline=_inline
    )
    return write_text(out_html, environment.get_template(template).render(**values))


def write_text(path: str | Path, text: str) -> Path:
    """Write beside the target, then rename, so that no half file is ever there.

    Raises
    ------
    OutputError
        If the disk is full or the folder not writable.
    """
    target = Path(path)
    partial = part_path(target)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _gain(scores: tuple[Scores, ...]) -> dict[str, float] | None:
    """Give what the first variant has more than the second, in percentage points."""
    if len(scores) < 2:
        return None
    first, second = scores[:2]
    names = ("overall_accuracy", "macro_miou", "macro_f1", "kappa")
    return {name: 100 * (getattr(first, name) - getattr(second, name)) for name in names}


def _percent(share: float | None, digits: int = 1) -> str:
    """Write a share as percent; a dash where it is not defined."""
    if share is None or math.isnan(share):
        return _NONE
    return f"{100 * share:.{digits}f}"


def _number(value: int) -> str:
    """Write a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009")


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.1f} s"
    return duration_text(seconds)


def _size(size_bytes: int | None) -> str:
    if size_bytes is None:
        return _NONE
    amount = float(size_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def _inline(picture: Picture) -> Any:
    """Give a picture's file as a data address."""
    if not picture.path.exists():
        raise MissingFileError(
            f"Cannot write the report: the picture '{picture.title}' is missing at "
            f"'{picture.path}'. Pictures must exist before the page is written. Draw it first."
        )
    return "data:image/png;base64," + base64.b64encode(picture.path.read_bytes()).decode("ascii")
