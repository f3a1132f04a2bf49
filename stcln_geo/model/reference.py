"""Read the published weights, and name their parts as this package does.

Three forms exist: the classifier and the pre-trained network, each a dictionary with
`model_state_dict`, and the bare encoder. All are zip files with a pickle inside, and are read with
`weights_only=True`: a file that would run code is refused, never run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import CheckpointError, InputError
from .config import StclnConfig

Kind = Literal["classifier", "encoder", "pretrainer"]

PUBLISHED_HEADS = 8
"""No tensor's shape tells the number of heads; all published networks have this many."""

PASTIS_BANDS = (
    "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08", "swir16", "swir22",
)  # fmt: skip
MTLCC_BANDS = (
    "red", "green", "blue", "nir",
    "rededge1", "rededge2", "rededge3", "nir08", "swir16", "swir22",
    "coastal", "nir09", "cirrus",
)  # fmt: skip

DEAD_PREFIXES = (
    "up3.",
    "temporal_encoder.inconv.",
    "temporal_encoder.out_norm.",
    "temporal_encoder.mlp.",
    "temporal_encoder.transformer_encoder.",
)
"""Parts of the published encoder that no output depends on: accepted and dropped."""
DEAD_HEADS = ("midlinear.weight", "midlinear.bias")
"""The published second reconstruction, whose loss is not used: accepted and dropped."""

_HEADS = {
    "l": "attention.gate",
    "conv1.weight": "attention.query.weight",
    "conv2.weight": "attention.key.weight",
    "conv3.weight": "attention.value.weight",
    "outlinear.weight": "classifier.weight",
    "outlinear.bias": "classifier.bias",
    "MASK_TOKEN": "token",
    "linear.weight": "reconstruction.weight",
    "linear.bias": "reconstruction.bias",
}
# Published name -> ours, by the longest part in front. Two convolutions share each parent.
_ENCODER_PARTS = {
    "inc.double_conv.0.": "convolutions.blocks.0.convolution.",
    "inc.double_conv.1.": "convolutions.blocks.0.norm.",
    "inc.double_conv.3.": "convolutions.blocks.1.convolution.",
    "inc.double_conv.4.": "convolutions.blocks.1.norm.",
    "down1.maxpool_conv.0.double_conv.0.": "convolutions.blocks.2.convolution.",
    "down1.maxpool_conv.0.double_conv.1.": "convolutions.blocks.2.norm.",
    "down1.maxpool_conv.0.double_conv.3.": "convolutions.blocks.3.convolution.",
    "down1.maxpool_conv.0.double_conv.4.": "convolutions.blocks.3.norm.",
    "temporal_encoder.in_norm.": "temporal.norm.",
}
_LAYER_PARTS = {
    "self_attn.in_proj_": "attention.projection.",
    "self_attn.out_proj.": "attention.output.",
    "linear1.": "expand.",
    "linear2.": "contract.",
    "norm1.": "attention_norm.",
    "norm2.": "feedforward_norm.",
}
_LAYER_STACK = "temporal_encoder.layer_stack."


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Published weights under this package's names."""

    kind: Kind
    config: StclnConfig
    """In `reference` mode, with bands, classes and sizes read from the shapes of the tensors."""
    state: dict[str, Tensor]
    """Fits the module of this kind, except for the z-score: it holds no `mean` and no `std`."""
    dropped: tuple[str, ...]
    """Published names of the entries that no output depends on."""
    epoch: int | None
    """As told by the file; None for a bare encoder."""


def read_published(path: Path) -> PublishedWeights:
    """Read a published file; raise CheckpointError unless it is one, in any of its three forms."""
    content = _load_tensors(path)
    epoch = content.get("epoch")
    state = content.get("model_state_dict", content)
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(
            f"Cannot read {path} as published STCLN weights: it holds "
            f"{', '.join(map(str, list(content)[:5])) or 'nothing'}. A published file is a state "
            "dict, or a dict with `model_state_dict`. Pass such a file, or a .safetensors."
        )
    kind: Kind = "encoder"
    if any(name.startswith("utae.") for name in state):
        kind = "pretrainer" if "MASK_TOKEN" in state else "classifier"

    mapped: dict[str, Tensor] = {}
    dropped, unknown = [], []
    for name, tensor in state.items():
        if _is_dead(name, kind):
            dropped.append(name)
            continue
        ours = our_name(name, kind)
        if ours is None:
            unknown.append(name)
        else:
            # The published projections are 1 x 1 convolutions; ours are linear maps.
            mapped[ours] = tensor.flatten(1) if name.startswith("conv") else tensor
    if unknown:
        raise CheckpointError(
            f"Cannot read {path} as a published STCLN {kind}: unknown entries "
            f"{', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}. Only entries of the "
            "published network are accepted. Check that the file is one of its checkpoints."
        )
    return PublishedWeights(
        kind=kind,
        config=_config_of(path, mapped, kind),
        state=mapped,
        dropped=tuple(dropped),
        epoch=epoch if isinstance(epoch, int) else None,
    )


def _load_tensors(path: Path) -> Mapping[Any, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything in here
        raise CheckpointError(
            f"Cannot read {path}: it is damaged, or holds objects other than tensors "
            f"({type(error).__name__}). Files are read as plain weights, and nothing in them is "
            "ever run. Fetch the file again, or save its weights as a state dict of tensors."
        ) from error
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"Cannot read {path} as published STCLN weights: it holds a {type(content).__name__}. "
            "A published file holds a dictionary. Pass such a file, or a .safetensors."
        )
    return content


def _is_dead(name: str, kind: Kind) -> bool:
    if kind == "pretrainer" and name in DEAD_HEADS:
        return True
    if kind != "encoder":
        if not name.startswith("utae."):
            return False
        name = name.removeprefix("utae.")
    return name.startswith(DEAD_PREFIXES)


def our_name(name: str, kind: Kind) -> str | None:
    """Translate a published name of a live entry; None where there is no such entry."""
    prefix = ""
    if kind != "encoder":
        if not name.startswith("utae."):
            return _HEADS.get(name)
        name = name.removeprefix("utae.")
        prefix = "encoder."
    for theirs, ours in _ENCODER_PARTS.items():
        if name.startswith(theirs):
            return prefix + ours + name.removeprefix(theirs)
    if name.startswith(_LAYER_STACK):
        layer, _, rest = name.removeprefix(_LAYER_STACK).partition(".")
        for theirs, ours in _LAYER_PARTS.items():
            if rest.startswith(theirs):
                return f"{prefix}temporal.layers.{layer}.{ours}{rest.removeprefix(theirs)}"
    return None


def _config_of(path: Path, state: Mapping[str, Tensor], kind: Kind) -> StclnConfig:
    """Read the network's sizes from the shapes of its tensors."""
    prefix = "" if kind == "encoder" else "encoder."
    try:
        first = state[f"{prefix}convolutions.blocks.0.convolution.weight"]
        second = state[f"{prefix}convolutions.blocks.2.convolution.weight"]
        expand = state[f"{prefix}temporal.layers.0.expand.weight"]
        classes = len(state["classifier.weight"]) if kind == "classifier" else 0
    except KeyError as error:
        raise CheckpointError(
            f"Cannot read {path} as a published STCLN {kind}: the entry that becomes {error} "
            "is missing. The file must hold the whole network. Fetch it again."
        ) from error
    bands = {len(bands): bands for bands in (PASTIS_BANDS, MTLCC_BANDS)}.get(first.shape[1])
    if bands is None:
        raise CheckpointError(
            f"Cannot read {path}: its network takes {first.shape[1]} bands. Published weights take "
            f"{len(PASTIS_BANDS)} (PASTIS) or {len(MTLCC_BANDS)} (MTLCC), in a known order. "
            "Use one of these."
        )
    stack = f"{prefix}temporal.layers."
    layers = {name.removeprefix(stack).split(".")[0] for name in state if name.startswith(stack)}
    try:
        return StclnConfig(
            bands=bands,
            classes=classes,
            widths=(first.shape[0], second.shape[0]),
            layers=len(layers),
            heads=PUBLISHED_HEADS,
            feedforward=expand.shape[0],
            mode="reference",
            positions="index",
        )
    except InputError as error:
        raise CheckpointError(f"Cannot read {path}: {error}") from error
