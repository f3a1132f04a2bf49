"""The network as a program: a graph with its weights that runs without this package.

A program takes `images` (B, T, C, H, W) float32 reflectance, `days` (B, T) int64 and `valid`
(B, T, H, W) bool, and gives `logits` (B, K, H, W) float32, as `Stcln` does. B, T, H and W are free,
but H and W are 2 at least. It works on the whole batch at once, without the blocks that bound
memory here.

Programs are written here and never run: of a file only its description is read, which is a text in
the archive (.pt2) or among the metadata (.onnx). Nothing of a file is unpickled.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from ..errors import CheckpointError, InputError
from .description import HEADER, CheckpointInfo, FileFormat, from_json
from .ensemble import Classifier
from .onnx_file import read_onnx_metadata
from .stcln import Stcln

__all__ = [
    "INPUTS",
    "OUTPUT",
    "capture",
    "check_onnx",
    "onnx_bytes",
    "program_format",
    "pt2_bytes",
    "read_program",
]

INPUTS = ("images", "days", "valid")
OUTPUT = "logits"
_EXTRA = f"{HEADER}.json"
_ONNX_PACKAGES = ("onnx", "onnxscript")
_DESCRIPTION_BYTES = 2**24
"""No description is longer; what claims to be is no file of ours."""


def program_format(path: Path) -> FileFormat | None:
    """Tell the format of a program, by the end of its name or else by its content.

    None for anything else, and for what cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in (".pt2", ".onnx"):
        return "pt2" if suffix == ".pt2" else "onnx"
    if suffix == ".safetensors":
        return None
    try:
        with path.open("rb") as file:
            start = file.read(9)
        if start[:2] == b"PK" and _read_pt2(path) is not None:
            return "pt2"
    except (OSError, CheckpointError):
        return None
    # The version of ONNX's own format comes first; safetensors have a brace after eight bytes.
    return "onnx" if start[:1] == b"\x08" and start[8:] != b"{" else None


def capture(network: Classifier) -> ExportedProgram:
    """Turn a classifier into a graph for images of any number, dates, height and width.

    Parameters
    ----------
    network : on the CPU; it is put in eval mode, and no longer cuts its work into blocks.
    """
    network.eval()
    # How often a loop over blocks runs would be fixed in the graph, and with it the sizes.
    for module in network.modules():
        if isinstance(module, Stcln):
            module.encoder.max_sequences = None
            module.attention.affinity_bytes = None
    samples, dates = Dim("samples", min=1), Dim("dates", min=1)
    # Of a single pixel the graph would have other strides.
    height, width = Dim("height", min=2), Dim("width", min=2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            network,
            _example(len(network.config.bands)),
            dynamic_shapes={
                "images": {0: samples, 1: dates, 3: height, 4: width},
                "days": {0: samples, 1: dates},
                "valid": {0: samples, 1: dates, 2: height, 3: width},
            },
            strict=False,
        )
    # Lines of our source with the paths of this machine: of no use to whoever runs it.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def pt2_bytes(program: ExportedProgram, description: str) -> bytes:
    """Return a program as an archive for `torch.export.load`."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "program.pt2"
        torch.export.save(program, file, extra_files={_EXTRA: description})
        return file.read_bytes()


def check_onnx() -> None:
    """Raise InputError where torch cannot write ONNX, before anything is computed."""
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"Cannot export to ONNX: {' and '.join(missing)} cannot be imported, which torch needs "
            "to write it. Install the extra with `pip install 'stcln-geo[onnx]'`, or export to "
            ".pt2, which needs nothing."
        )


def onnx_bytes(program: ExportedProgram, description: str) -> bytes:
    """Return a program as one ONNX file, weights inside."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.onnx.export(
            program,
            (),
            dynamo=True,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            verbose=False,
        )
        if made is None:
            raise CheckpointError(
                "Cannot export to ONNX: torch made no model. Update torch and onnxscript, or "
                "export to .pt2."
            )
        made.model.metadata_props[HEADER] = description
        file = Path(folder) / "program.onnx"
        made.save(file, external_data=False)
        return file.read_bytes()


def read_program(path: Path, *, sha256: str) -> CheckpointInfo:
    """Tell what a program is from its description alone; nothing of the file is run.

    Raises
    ------
    CheckpointError
        If the file is damaged, or another program wrote it.
    """
    file_format = program_format(path)
    text = _read_onnx(path) if file_format == "onnx" else _read_pt2(path)
    if text is None:
        raise CheckpointError(
            f"Cannot describe {path}: it holds no `{HEADER}` text, so another program wrote it. "
            "An exported program tells its network, bands and legend there. Pass one that "
            "`stcln-geo checkpoint export` wrote."
        )
    return from_json(path, text, sha256=sha256, file_format=file_format or "pt2")


def _example(bands: int) -> tuple[Tensor, Tensor, Tensor]:
    # Sizes of 0 and 1 would be taken for constants, equal ones for one and the same.
    samples, dates, height, width = 2, 3, 5, 7
    return (
        torch.zeros(samples, dates, bands, height, width),
        torch.arange(dates).expand(samples, dates).contiguous(),
        torch.ones(samples, dates, height, width, dtype=torch.bool),
    )


def _read_pt2(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(f"/extra/{_EXTRA}"):
                    if entry.file_size > _DESCRIPTION_BYTES:
                        return None
                    return archive.read(entry).decode()
    except (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, error) from error
    return None


def _read_onnx(path: Path) -> str | None:
    try:
        return read_onnx_metadata(path, limit=_DESCRIPTION_BYTES).get(HEADER)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Cannot describe {path}: {error}. It must be a whole exported program; this one is cut "
        "short or damaged. Copy it again, or export it again."
    )
