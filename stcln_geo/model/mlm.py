"""Describe a classifier to catalogs: a STAC item of the Machine Learning Model extension.

The item follows version 1.4 of the extension, https://github.com/stac-extensions/mlm. Its input is
reflectance as it is: the network applies the z-score of its bands itself, so `value_scaling` is
null, and mean and deviation are statistics of the bands.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..legend import Legend, plain_names
from .description import CheckpointInfo, FileFormat

__all__ = ["item_bytes", "item_path", "make_item"]

_SCHEMAS = "https://stac-extensions.github.io"
_EXTENSIONS = [
    f"{_SCHEMAS}/mlm/v1.4.0/schema.json",
    f"{_SCHEMAS}/classification/v2.0.0/schema.json",
    f"{_SCHEMAS}/file/v2.1.0/schema.json",
    f"{_SCHEMAS}/processing/v1.2.0/schema.json",
    f"{_SCHEMAS}/scientific/v1.0.0/schema.json",
]
_DOI = "10.1016/j.jag.2025.104426"
_MEDIA_TYPES: dict[FileFormat, str] = {
    "safetensors": "application/vnd.safetensors",
    "pt2": "application/zip; application=pytorch; profile=torch.export",
    "onnx": "application/onnx; framework=onnxruntime",
}
_ARTIFACTS: dict[FileFormat, str] = {
    "safetensors": "safetensors.torch.save_file",
    "pt2": "torch.export.save",
    "onnx": "onnx.save",
}
_TITLES: dict[FileFormat, str] = {
    "safetensors": "Weights and description, for stcln-geo",
    "pt2": "Program for torch.export.load",
    "onnx": "Program for ONNX runtimes",
}
_SHA256 = "1220"
"""How a multihash says that 32 bytes of sha256 follow."""


def make_item(info: CheckpointInfo, *, created: datetime.datetime) -> dict[str, Any]:
    """Return the item of an exported classifier, whose asset lies beside it.

    Parameters
    ----------
    info : of the exported file, which must exist.
    created : with a time zone.
    """
    bands = [
        {"name": band, "data_type": "float32", "statistics": {"mean": mean, "stddev": std}}
        for band, mean, std in zip(info.bands, info.mean, info.std, strict=True)
    ]
    properties: dict[str, Any] = {
        "title": f"Crop classifier {info.path.stem}",
        "description": (
            "STCLN classifier of each pixel's crop from a series of Sentinel-2 images, by "
            "Qin et al. (2025), as stcln-geo implements it."
        ),
        "created": _moment(created),
        **_time_range(info, created),
        "mlm:name": _name(info.path.stem),
        "mlm:architecture": "STCLN",
        "mlm:tasks": ["semantic-segmentation"],
        **_framework(info.format),
        "mlm:total_parameters": info.parameters,
        **_pretraining(info.provenance),
        "mlm:accelerator": None,
        "mlm:accelerator_constrained": False,
        "mlm:input": _inputs(info),
        "mlm:output": [_output(info)],
        "mlm:hyperparameters": {
            **{key: value for key, value in info.config.to_dict().items() if key != "bands"},
            "season_start": info.season_start,
            "trained_days": info.trained_days and list(info.trained_days),
            "chip": info.chip,
            "halo": info.halo,
            **({"members": info.members} if info.members > 1 else {}),
        },
        "bands": bands,
        "processing:software": {"stcln-geo": __version__, "torch": torch.__version__},
        "sci:doi": _DOI,
        "stcln_geo:provenance": dict(info.provenance),
    }
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": _EXTENSIONS,
        "id": info.path.name,
        "geometry": None,
        "properties": properties,
        "links": [
            {
                "rel": "cite-as",
                "href": f"https://doi.org/{_DOI}",
                "type": "text/html",
            }
        ],
        "assets": {
            "model": {
                "href": f"./{info.path.name}",
                "type": _MEDIA_TYPES[info.format],
                "title": _TITLES[info.format],
                "roles": ["mlm:model"],
                # The extension looks for bands in the properties, where STAC allows none unless an
                # asset has some.
                "bands": bands,
                "mlm:artifact_type": _ARTIFACTS[info.format],
                "file:size": Path(str(info.path)).stat().st_size,
                "file:checksum": _SHA256 + info.sha256,
            }
        },
    }


def _inputs(info: CheckpointInfo) -> list[dict[str, Any]]:
    masked = info.config.mode == "geo"
    days = (
        f"days since the season's start ({info.season_start or 'MM-DD'})"
        if info.config.positions == "days"
        else "ranks 0, 1, 2, ... of the dates"
    )
    return [
        {
            "name": "images",
            "description": (
                "Surface reflectance, 0 to 1 and a little beyond; the z-score of the bands is "
                "applied by the model. Any value, NaN included, where `valid` is false."
                + ("" if info.chip is None else f" Trained on chips of {info.chip} pixels a side.")
            ),
            "bands": list(info.bands),
            "input": _array(
                [-1, -1, len(info.bands), -1, -1],
                ["batch", "time", "bands", "height", "width"],
                "float32",
            ),
            "value_scaling": None,
            "resize_type": None,
            "pre_processing_function": None,
        },
        {
            "name": "days",
            "description": f"The date of each image: {days}.",
            "bands": [],
            "input": _array([-1, -1], ["batch", "time"], "int64"),
        },
        {
            "name": "valid",
            "description": "Boolean, one byte: true where an observation is usable. "
            + (
                "What is not plays no part."
                if masked
                else "What is not counts as zero after the z-score."
            ),
            "bands": [],
            "input": _array([-1, -1, -1, -1], ["batch", "time", "height", "width"], "uint8"),
        },
    ]


def _output(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "name": "logits",
        "description": (
            "Before the softmax. The class of a pixel is the one of the largest; a pixel without "
            "any usable observation has none."
        ),
        "tasks": ["semantic-segmentation"],
        "result": _array(
            [-1, info.config.classes, -1, -1],
            ["batch", "class", "height", "width"],
            "float32",
        ),
        "classification:classes": _classes(info),
        "post_processing_function": None,
    }


def _array(shape: list[int], order: list[str], data_type: str) -> dict[str, Any]:
    return {"shape": shape, "dim_order": order, "data_type": data_type}


def _classes(info: CheckpointInfo) -> list[dict[str, Any]]:
    """Return what the output channels mean; numbers where the file has no legend."""
    if info.legend is None:
        return [
            {"value": code, "name": f"class-{code}", "description": f"Class {code}"}
            for code in range(info.config.classes)
        ]
    classes = Legend.from_json(info.legend).classes
    plain = plain_names({entry.code: entry.name for entry in classes})
    return [
        {
            "value": entry.code,
            "name": plain[entry.code],
            "description": entry.name,
            "color_hint": entry.color[1:].upper(),
        }
        for entry in classes
    ]


def _framework(file_format: FileFormat) -> dict[str, str]:
    if file_format != "onnx":
        return {"mlm:framework": "PyTorch", "mlm:framework_version": torch.__version__}
    from importlib.metadata import version

    return {"mlm:framework": "ONNX", "mlm:framework_version": version("onnx")}


def _pretraining(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Say what the training began from; nothing where that is not known."""
    init = provenance.get("init", {})
    if init is None:
        return {"mlm:pretrained": False, "mlm:pretrained_source": None}
    if not isinstance(init, Mapping) or "sha256" not in init:
        return {}
    return {"mlm:pretrained": True, "mlm:pretrained_source": f"sha256:{init['sha256']}"}


def _time_range(info: CheckpointInfo, created: datetime.datetime) -> dict[str, Any]:
    """Return the dates that it was trained on, or where they are not known, when it was made."""
    cubes = info.provenance.get("cubes")
    seasons = [
        datetime.date.fromisoformat(cube["season"])
        for cube in (cubes if isinstance(cubes, list) else [])
        if isinstance(cube, Mapping) and _is_date(cube.get("season"))
    ]
    if not seasons or info.trained_days is None:
        return {"datetime": _moment(created)}
    first, last = (
        datetime.datetime.combine(
            season + datetime.timedelta(days=day), datetime.time(), datetime.UTC
        )
        for season, day in zip((min(seasons), max(seasons)), info.trained_days, strict=True)
    )
    return {"datetime": None, "start_datetime": _moment(first), "end_datetime": _moment(last)}


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(datetime.date.fromisoformat(value))
    except ValueError:
        return False


def _moment(time: datetime.datetime) -> str:
    text = time.astimezone(datetime.UTC).isoformat(timespec="seconds")
    return text.replace("+00:00", "Z")


def _name(stem: str) -> str:
    """Return a name as the extension wants it: it begins with a letter and ends without a sign."""
    name = re.sub(r"[^0-9A-Za-z_. -]+", "-", stem).strip("-_. ")
    return f"STCLN {name}".strip()


def item_path(exported: Path) -> Path:
    """Return where the item of an exported file lies: beside it."""
    return exported.with_name(f"{exported.name}.stac.json")


def item_bytes(item: Mapping[str, Any]) -> bytes:
    """Return an item as the content of its file."""
    return (json.dumps(item, indent=2, ensure_ascii=False) + "\n").encode()
