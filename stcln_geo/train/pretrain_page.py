"""The page of a pre-training run, made of what the run directory holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..report.html import Picture
from ..report.pretraining import PretrainingReport, write_pretraining_report
from ..report.strips import plot_strip
from ..storage import public_name
from .error_table import read_error_rows
from .provenance import public_cubes
from .reconstruction import ReconstructedChip, read_reconstructions
from .run_directory import RunDirectory

__all__ = ["write_pretrain_page"]


def write_pretrain_page(run: RunDirectory) -> Path:
    """Draw the reconstructed chips of a finished run, and write ``report.html``; return its path.

    May be called again, and takes nothing but files.
    """
    environment = run.environment()
    errors = run.errors_file
    rows = read_error_rows(errors.read_text(encoding="utf-8")) if errors.is_file() else []
    records = run.records()
    chips = read_reconstructions(run.reconstructions_file)
    folder = run.reconstructions_file.parent
    return write_pretraining_report(
        run.report_file,
        PretrainingReport(
            title=run.path.resolve().name,
            run=run.summary(),
            environment={**environment, "cubes": public_cubes(environment["cubes"])},
            config=_told(run.recipe()),
            errors=rows,
            hidden_share=records[-1].get("hidden_share") if records else None,
            first_month=int(environment["cubes"][0]["season"][5:7]),
            curves=run.curves_file if run.curves_file.is_file() else None,
            chips=[
                _draw(chip, folder / f"chip-{number}.png")
                for number, chip in enumerate(chips, start=1)
            ],
        ),
    )


def _told(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the options as the page tells them."""
    init = recipe.get("init")
    return recipe if init is None else {**recipe, "init": public_name(init)}


def _draw(chip: ReconstructedChip, out_png: Path) -> Picture:
    shown = "true colour" if chip.bands == ("red", "green", "blue") else " / ".join(chip.bands)
    return Picture(
        path=plot_strip(chip.truth, chip.made, chip.hidden, chip.dates, out_png),
        title=f"In {shown}",
        alt=f"A chip on {len(chip.dates)} dates: as it is, what the network saw, what it filled in",
        caption=chip.name,
    )
