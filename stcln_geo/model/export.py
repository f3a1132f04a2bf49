"""Copy a checkpoint into a file to pass on: weights, or a program that runs by itself."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..errors import CheckpointError, InputError
from .checkpoint import load_model, read_metadata, save_checkpoint
from .description import CheckpointInfo, FileFormat, to_json, write_whole
from .ensemble import Classifier
from .mlm import item_bytes, item_path, make_item
from .program import capture, check_onnx, onnx_bytes, pt2_bytes

__all__ = ["Exported", "export_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written."""

    source: CheckpointInfo
    info: CheckpointInfo
    """Of the new file."""
    item: Path | None
    """The STAC item beside it; None for networks that name no classes."""


def export_checkpoint(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    file_format: FileFormat | None = None,
    encoder: bool = False,
) -> Exported:
    """Write the checkpoint of a run, or its encoder alone, into one file, with a STAC item beside.

    Parameters
    ----------
    source : a .safetensors file, a run directory or a published .tar file.
    out : the file to write.
    file_format : by default what the end of `out` says: .pt2, .onnx, else safetensors.
    encoder : True leaves all but the encoder out; safetensors only.

    Raises
    ------
    InputError
        If the format contradicts the name, is not for this network, or lacks what writes it; or
        if the file to write is the checkpoint itself.
    """
    out = Path(out)
    file_format = _choose_format(out, file_format)
    if file_format == "onnx":
        check_onnx()
    told = read_metadata(source)
    if out.resolve() == told.path.resolve():
        raise InputError(
            f"Cannot export {told.path} to {out}: that is the checkpoint itself, and an export "
            "must leave it as it is. Name another file."
        )
    if file_format == "safetensors":
        _save_weights(out, told, source, encoder=encoder)
    else:
        _save_program(out, told, source, file_format, encoder=encoder)
    info = read_metadata(out, programs=True)
    item = None
    if info.kind == "classifier":
        item = item_path(out)
        made = make_item(info, created=datetime.datetime.now(datetime.UTC))
        write_whole(item, item_bytes(made))
    return Exported(source=told, info=info, item=item)


def _choose_format(out: Path, wanted: FileFormat | None) -> FileFormat:
    known = {f".{name}": name for name in get_args(FileFormat)}
    named: FileFormat | None = known.get(out.suffix.lower())
    if wanted is None:
        return named or "safetensors"
    if wanted not in known.values():
        raise InputError(
            f"Cannot export as {wanted!r}: formats are {', '.join(known.values())}. Choose one, or "
            "leave --format out and end the file's name with it."
        )
    if named not in (None, wanted):
        raise InputError(
            f"Cannot export {out} as {wanted}: its name says {named}. They must agree. Leave "
            f"--format out, or end the name with .{wanted}."
        )
    return wanted


def _save_weights(
    out: Path, told: CheckpointInfo, source: str | os.PathLike[str], *, encoder: bool
) -> None:
    save_checkpoint(
        out,
        load_model(source),
        kind="encoder" if encoder else told.kind,
        legend=None if encoder else told.legend,
        ignored=None if encoder else told.ignored,
        silent=() if encoder else told.silent,
        temperature=None if encoder else told.temperature,
        provenance={**told.provenance, "exported_from": told.sha256},
        chip=told.chip,
        halo=told.halo,
        trained_days=told.trained_days,
        season_start=told.season_start,
    )


def _save_program(
    out: Path,
    told: CheckpointInfo,
    source: str | os.PathLike[str],
    file_format: FileFormat,
    *,
    encoder: bool,
) -> None:
    network = load_model(source)
    if encoder or not isinstance(network, Classifier):
        raise CheckpointError(
            f"Cannot export {told.path} as {file_format}: programs give logits, and "
            f"{'an encoder' if encoder else f'this {told.kind}'} has none. Export a classifier "
            "(from `stcln-geo finetune`), or write .safetensors."
        )
    description = to_json(
        out,
        kind=told.kind,
        config=told.config,
        legend=told.legend,
        ignored=told.ignored,
        silent=told.silent,
        temperature=told.temperature,
        chip=told.chip,
        halo=told.halo,
        trained_days=told.trained_days,
        season_start=told.season_start,
        provenance={**told.provenance, "exported_from": told.sha256},
        zscore=(told.mean, told.std),
        members=told.members,
    )
    program = capture(network)
    made = pt2_bytes if file_format == "pt2" else onnx_bytes
    write_whole(out, made(program, description))
