"""The folder beside a map that holds its accuracy."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["ACCURACY_FILES", "ACCURACY_FOLDER", "remove_accuracy"]

ACCURACY_FOLDER = "accuracy"
"""In a product's folder; where `stcln-geo evaluate MAP` writes unless it is told otherwise."""

ACCURACY_FILES = (
    "accuracy.json", "areas.png", "confusion-area.png", "confusion.csv", "confusion.png",
    "report.html",
)  # fmt: skip


def remove_accuracy(product: Path) -> None:
    """Remove the accuracy of a map that is about to be replaced, and no other file."""
    folder = product / ACCURACY_FOLDER
    if not (folder / ACCURACY_FILES[0]).is_file():
        return
    for name in ACCURACY_FILES:
        (folder / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        # Other files may lie there.
        folder.rmdir()
