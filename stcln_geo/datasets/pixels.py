"""From the numbers of a published set to the digital numbers of a stack."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..cube.contract import FILL

__all__ = ["stamp_of", "to_digital_numbers"]

_LARGEST = 32767


def to_digital_numbers(values: np.ndarray, missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return reflectance as a stack stores it, and where it is usable.

    Parameters
    ----------
    values : (T, C, Y, X) reflectance / 0.0001, of any number type.
    missing : (T, C, Y, X) bool. True where the source measured nothing.

    Returns
    -------
    (T, C, Y, X) int16, -32768 where missing, negatives kept, above 32767 clipped.
    (T, Y, X) bool, True where every band was measured and none was clipped.
    """
    if values.dtype.kind == "f":
        missing = missing | ~np.isfinite(values)
    numbers = np.where(missing, 0, values)
    if values.dtype.kind == "f":
        numbers = np.round(numbers)
    clipped: np.ndarray = np.greater(numbers, _LARGEST)
    digital = np.clip(numbers, FILL + 1, _LARGEST).astype(np.int16)
    digital[missing] = FILL
    return digital, ~np.any(missing | clipped, axis=1)


def stamp_of(files: Iterable[Path]) -> str:
    """Return a hash of names, sizes and times of change of files; absent ones count too."""
    told = []
    for file in files:
        try:
            found = file.stat()
            told.append(f"{file.name} {found.st_size} {found.st_mtime_ns}")
        except FileNotFoundError:
            told.append(f"{file.name} -")
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]
