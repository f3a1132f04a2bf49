"""Write several classifiers as one ensemble."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage import Location, public_name
from .checkpoint import find_checkpoint, load_model, read_metadata, save_checkpoint
from .description import CheckpointInfo
from .ensemble import Ensemble
from .stcln import Stcln

__all__ = ["join_checkpoints"]


def join_checkpoints(
    sources: Sequence[str | os.PathLike[str] | Location], out: str | os.PathLike[str]
) -> CheckpointInfo:
    """Write fine-tuned classifiers as one checkpoint that answers with their mean probability.

    Each keeps its bands' mean and deviation and its temperature. Labelling takes as many times as
    long as there are members.

    Parameters
    ----------
    sources
        Checkpoints or run directories, of one recipe: equal network, bands, classes, chips and
        start of the season.
    out
        The .safetensors file to write.

    Returns
    -------
    What the file says about itself.

    Raises
    ------
    CheckpointError
        If one is no fine-tuned classifier, or they are not of one recipe, or one is there twice.
    InputError
        If there are fewer than two.
    """
    found = [read_metadata(find_checkpoint(source)) for source in sources]
    for place, info in enumerate(found):
        if info.kind != "classifier" or info.legend is None or info.members > 1:
            what = f"an ensemble of {info.members}" if info.members > 1 else f"a {info.kind}"
            raise CheckpointError(
                f"Cannot join {info.path}: it is {what}, and an ensemble is made of single "
                "classifiers with a legend. Pass the runs of `stcln-geo finetune`."
            )
        mine, first = _recipe(info), _recipe(found[0])
        unlike = [name for name in first if mine[name] != first[name]]
        if unlike:
            told = "; ".join(
                f"{name} {mine[name]} and {first[name]}" if len(str(mine[name])) < 80 else name
                for name in unlike
            )
            raise CheckpointError(
                f"Cannot join {info.path} with {found[0].path}: they differ ({told}). An ensemble "
                "is of runs of one recipe. Leave one of them out."
            )
        twice = next((one for one in found[:place] if one.sha256 == info.sha256), None)
        if twice is not None:
            raise CheckpointError(
                f"Cannot join {info.path} with {twice.path}: they are the same weights, which "
                "would count twice. Leave one of them out."
            )
    networks = [load_model(info.path) for info in found]
    days = [info.trained_days for info in found if info.trained_days is not None]
    joined = Ensemble(
        [one for one in networks if isinstance(one, Stcln)], [info.temperature for info in found]
    )
    path = save_checkpoint(
        out,
        joined,
        legend=found[0].legend,
        ignored=found[0].ignored,
        silent=found[0].silent,
        provenance=_provenance(found),
        chip=found[0].chip,
        halo=found[0].halo,
        trained_days=(min(first for first, _ in days), max(last for _, last in days))
        if days
        else None,
        season_start=found[0].season_start,
    )
    return read_metadata(Path(path))


def _recipe(info: CheckpointInfo) -> dict[str, Any]:
    """Return what must be equal, by name."""
    return {
        **info.config.to_dict(),
        "legend": info.legend,
        "ignored": info.ignored,
        "silent": info.silent,
        "season start": info.season_start,
        "chip": info.chip,
        "halo": info.halo,
    }


def _provenance(found: Sequence[CheckpointInfo]) -> dict[str, Any]:
    """Tell of each member, and of all cubes that one of them was trained on."""
    cubes: dict[str, Any] = {}
    for info in found:
        for cube in info.provenance.get("cubes") or ():
            cubes.setdefault(json.dumps(cube, sort_keys=True), cube)
    return {
        "trained": "ensemble",
        "members": [
            {
                "path": public_name(info.path),
                "sha256": info.sha256,
                "seed": info.provenance.get("seed"),
                "temperature": info.temperature,
            }
            for info in found
        ],
        "cubes": list(cubes.values()),
    }
