"""Checkpoints: weights and all that is needed to reuse them, in one safetensors file.

The header holds one entry, `stcln_geo`, with JSON: see `description`. The bands are in its
configuration, the z-score among the tensors. Nothing in a checkpoint is ever run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import CheckpointError, InputError, MissingFileError
from ..legend import Legend
from ..saves import is_saved, local_copy
from ..storage import Location, location
from .description import (
    HEADER,
    MODULES,
    CheckpointInfo,
    from_json,
    make_module,
    to_json,
    write_whole,
)
from .ensemble import Ensemble
from .program import program_format, read_program
from .reference import Kind, PublishedWeights, read_published
from .stcln import Encoder, MaskedPretrainer, Stcln

__all__ = [
    "CheckpointInfo",
    "differences",
    "find_checkpoint",
    "load_model",
    "read_checkpoint",
    "read_metadata",
    "save_checkpoint",
    "set_temperature",
]


def save_checkpoint(
    path: str | os.PathLike[str],
    module: nn.Module,
    *,
    kind: Kind | None = None,
    legend: str | None = None,
    ignored: str | None = None,
    silent: Sequence[str] = (),
    temperature: float | None = None,
    provenance: Mapping[str, Any] | None = None,
    chip: int | None = None,
    halo: int | None = None,
    trained_days: tuple[int, int] | None = None,
    season_start: str | None = None,
) -> Path:
    """Write a checkpoint under a temporary name, then rename it: readers never see half a file.

    Parameters
    ----------
    kind : what to write; default: what `module` is. `encoder` takes the encoder out of a
        classifier or pre-trainer.
    legend : JSON of the legend, one class for each output of the network.
    ignored : JSON of a legend of the classes that training left out.
    silent : source values of the classes in the legend that no pixel was learnt as.
    temperature : what logits are divided by before a probability is made of them, above 0.
    provenance : plain JSON values.
    """
    path = Path(path)
    module, kind = _part_to_write(path, module, kind)
    config = module.config
    if legend is not None and len(Legend.from_json(legend)) != config.classes:
        raise InputError(
            f"Cannot save {path}: the legend has {len(Legend.from_json(legend))} classes, and the "
            f"{kind} {config.classes}. They must agree. Pass the legend it was trained with."
        )
    if temperature is not None and not 0 < temperature < math.inf:
        raise InputError(
            f"Cannot save {path}: the temperature is {temperature}, and logits are divided by it. "
            "It must be finite and above 0. Pass None to divide by nothing."
        )
    header = to_json(
        path,
        kind=kind,
        config=config,
        legend=legend,
        ignored=ignored,
        temperature=temperature,
        chip=chip,
        halo=halo,
        trained_days=trained_days,
        season_start=season_start,
        provenance=provenance or {},
        silent=silent,
        members=len(module.members) if isinstance(module, Ensemble) else 1,
    )
    tensors = {
        name: tensor.detach().to("cpu").contiguous() for name, tensor in module.state_dict().items()
    }
    write_whole(path, save(tensors, metadata={HEADER: header}))
    return path


def set_temperature(path: str | os.PathLike[str], temperature: float) -> None:
    """Write a temperature into a checkpoint of ours, and leave all else as it is.

    The file is replaced as a whole, and so is its sha256.
    """
    path = Path(path)
    info, state = read_checkpoint(path)
    if info.published or not 0 < temperature < math.inf:
        raise InputError(
            f"Cannot set the temperature of {path} to {temperature}: it must be a checkpoint that "
            "stcln-geo wrote, and a finite number above 0. Import a published file first."
        )
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()[HEADER])
    told["temperature"] = float(temperature)
    write_whole(path, save(state, metadata={HEADER: json.dumps(told, ensure_ascii=False)}))


def find_checkpoint(path: str | os.PathLike[str] | Location) -> Location:
    """Give the file to read: `path` itself, or the best, else the last, one of a run directory."""
    path = _place(path)
    if path.is_file():
        return path
    if path.is_dir():
        for name in ("best", "last"):
            found = path / "checkpoints" / f"{name}.safetensors"
            if found.is_file() or is_saved(path, f"checkpoints/{found.name}"):
                return found
        seeds = sorted(seed for seed in path.glob("seed-*") if (seed / "checkpoints").is_dir())
        if seeds:
            raise MissingFileError(
                f"Cannot choose a checkpoint in {path}: it is a folder of {len(seeds)} seeds, each "
                f"a run of its own. Name one of them ({seeds[0]}), or join them with "
                f"`stcln-geo checkpoint ensemble {path} --out FILE.safetensors`."
            )
        raise MissingFileError(
            f"Cannot find a checkpoint in {path}: a run directory has checkpoints/best.safetensors "
            "or checkpoints/last.safetensors. Let the run reach its first save, or pass a file."
        )
    raise MissingFileError(
        f"Cannot find the checkpoint {path}: no such file or run directory. "
        "Pass a .safetensors file, a run directory or a published .tar file."
    )


def _place(path: str | os.PathLike[str] | Location) -> Location:
    return location(path if isinstance(path, Location) else os.fspath(path))


def read_metadata(
    path: str | os.PathLike[str] | Location, *, programs: bool = False
) -> CheckpointInfo:
    """Tell what a checkpoint is, without building its network.

    Parameters
    ----------
    programs : True also describes exported programs, which hold no weights to load.
    """
    path = find_checkpoint(path)
    with local_copy(path) as file:
        if programs and program_format(file) is not None:
            info = read_program(file, sha256=_fingerprint(file)[0])
        else:
            info, _ = _read_file(file)
        return replace(info, path=path)


def load_model(
    path: str | os.PathLike[str] | Location,
) -> Stcln | Ensemble | Encoder | MaskedPretrainer:
    """Build the network of a checkpoint with its weights, on the CPU and in eval mode.

    Takes a .safetensors file of ours, a run directory or a published .tar file, also by an address
    such as ``s3://bucket/runs/x``. A classifier is a `Stcln`, several that answer together an
    `Ensemble`, a pre-trained network a `MaskedPretrainer`, a bare encoder an `Encoder`.
    """
    info, state = read_checkpoint(find_checkpoint(path))
    module = make_module(info.kind, info.config, info.members)
    _load_whole(info, module, state)
    module.eval()
    return module


def _part_to_write(
    path: Path, module: nn.Module, kind: Kind | None
) -> tuple[Stcln | Ensemble | Encoder | MaskedPretrainer, Kind]:
    if isinstance(module, Ensemble) and kind in (None, "classifier"):
        return module, "classifier"
    if kind == "encoder" and isinstance(module, Stcln | MaskedPretrainer):
        module = module.encoder
    for own, made in MODULES.items():
        if isinstance(module, made) and kind in (None, own):
            return module, own
    raise InputError(
        f"Cannot save {path}: a {type(module).__name__} is no {kind or 'known kind of network'}. "
        f"Kinds are {', '.join(get_args(Kind))}. Pass a Stcln, an Ensemble, a MaskedPretrainer or "
        "an Encoder."
    )


def read_checkpoint(path: Location) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    """Read a file of any accepted form: what it says, and its tensors under our names."""
    with local_copy(path) as file:
        info, state = _read_file(file)
    return replace(info, path=path), state


def _read_file(path: Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    if program_format(path) is not None:
        raise CheckpointError(
            f"Cannot load {path}: it is an exported program, which stcln-geo describes and does "
            "not run. Networks come from weights. Pass the checkpoint that it was exported from."
        )
    sha256, start = _fingerprint(path)
    # A safetensors file opens with the length of its header (8 bytes), then the header's brace.
    if path.suffix == ".safetensors" or start[8:] == b"{":
        return _read_safetensors(path, sha256)
    return _from_published(path, read_published(path), sha256)


def _fingerprint(path: Path) -> tuple[str, bytes]:
    """Return the sha256 of a file, and its first nine bytes."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            start = file.read(9)
            file.seek(0)
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {error.strerror or error}. "
            "It must be a readable file. Check its permissions."
        ) from error
    return digest.hexdigest(), start


def _read_safetensors(path: Path, sha256: str) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(HEADER)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: {error}. It must be a whole safetensors file; "
            "this one is cut short or damaged. Copy it again, or go back to an earlier one."
        ) from error
    if header is None:
        raise CheckpointError(
            f"Cannot use {path}: its header has no `{HEADER}` entry, so another program wrote it. "
            "A checkpoint tells its network, bands and legend there. Pass one that stcln-geo wrote."
        )
    info = from_json(path, header, sha256=sha256, state=state)
    _check_entries(info, state)
    return info, state


def _check_entries(info: CheckpointInfo, state: Mapping[str, Tensor]) -> None:
    """Raise unless the tensors are those of the network described, before it takes memory."""
    try:
        with torch.device("meta"):
            wanted = make_module(info.kind, info.config, info.members).state_dict()
        gaps = differences(state, wanted)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes beyond what a tensor can have
        gaps = str(error).partition("\n")[0]
    if gaps:
        raise _misfit(info, gaps)


def _from_published(
    path: Path, weights: PublishedWeights, sha256: str
) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    prefix = "" if weights.kind == "encoder" else "encoder."
    bands = len(weights.config.bands)
    zscore = {f"{prefix}mean": torch.zeros(bands), f"{prefix}std": torch.ones(bands)}
    provenance: dict[str, Any] = {"source": "published", "file": path.name, "sha256": sha256}
    if weights.epoch is not None:
        provenance["epoch"] = weights.epoch
    info = CheckpointInfo(
        path=path,
        kind=weights.kind,
        config=weights.config,
        mean=(0.0,) * bands,
        std=(1.0,) * bands,
        legend=None,
        ignored=None,
        temperature=None,
        chip=None,
        halo=None,
        trained_days=None,
        season_start=None,
        provenance=provenance,
        sha256=sha256,
        published=True,
        dropped=weights.dropped,
    )
    return info, weights.state | zscore


def differences(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], *, but: tuple[str, ...] = ()
) -> str:
    """Say what keeps `source` from filling `target`; empty when nothing does."""
    missing = sorted(set(target) - set(source) - set(but))
    unknown = sorted(set(source) - set(target))
    shapes = [
        f"{name} is {tuple(source[name].shape)} for {tuple(target[name].shape)}"
        for name in sorted(set(source) & set(target))
        if source[name].shape != target[name].shape
        and name not in but
        and name != "convolutions.blocks.0.convolution.weight"
    ]
    said = []
    for what, names in (("missing", missing), ("unknown", unknown), ("wrong shape", shapes)):
        if names:
            said.append(f"{what}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}")
    return "; ".join(said)


def _load_whole(info: CheckpointInfo, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(dict(state))
    except RuntimeError as error:
        gaps = differences(state, module.state_dict()) or "shapes differ"
        raise _misfit(info, gaps) from error


def _misfit(info: CheckpointInfo, gaps: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot load {info.path}: {gaps}. The entries must be exactly those of the network "
        "that its configuration describes. Fetch or write the file again."
    )
