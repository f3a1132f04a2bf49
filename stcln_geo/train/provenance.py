"""What a run was made of: versions, machine, cubes and their fingerprints."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from .. import __version__
from ..cube.stack import Stack
from ..cube.store import Season
from ..data.source import Source, source_of
from ..storage import public_name

__all__ = [
    "describe_environment",
    "fingerprint_labels",
    "fingerprint_season",
    "fingerprints_of",
    "public_cubes",
]

_PACKAGES = ("torch", "lightning", "numpy", "zarr", "safetensors", "pydantic")


def describe_environment(
    seasons: Sequence[Source], *, device: str, precision: str, labels: bool
) -> dict[str, Any]:
    """Describe versions, machine and cubes, for environment.json and for provenance."""
    return {
        "stcln_geo": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "precision": precision,
        "cubes": [_describe_source(season, labels=labels) for season in seasons],
    }


def _describe_source(source: Source, *, labels: bool) -> dict[str, Any]:
    """Name a season of a cube or stack and its fingerprints."""
    described = source.describe()
    if labels:
        described["labels"] = fingerprint_labels(source)
    return described


def public_cubes(cubes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what a checkpoint and its card tell of cubes: their names, not where they lie."""
    return [{**cube, "cube": public_name(cube["cube"])} for cube in cubes]


def fingerprint_season(season: Season | Stack | Source) -> str:
    """Return a hash of a season's grids, dates, bands and cloud counts, not of its labels."""
    return source_of(season).fingerprint


def fingerprint_labels(season: Season | Stack | Source) -> str:
    """Return a hash of a season's legend, fields and split; of nothing where it has no labels.

    Of a stack, also of the site that holds each field, and of how often sites are shown.
    """
    source = source_of(season)
    digest = hashlib.sha256()
    if source.legend is not None and source.fields is not None:
        digest.update(source.legend.to_json().encode())
        for column in ("number", "code", "pixels", "split"):
            digest.update(np.ascontiguousarray(getattr(source.fields, column)).tobytes())
        if source.weight is not None:
            for values in (source.fields.site, source.weight):
                digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()


def fingerprints_of(source: Source) -> dict[str, str | None]:
    """Return hashes of what a season is judged by: its pixels, and its labels with their split."""
    labels = fingerprint_labels(source)
    return {"pixels": fingerprint_season(source), "built": source.built, "labels": labels}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
