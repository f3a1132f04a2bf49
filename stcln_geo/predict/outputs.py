"""The layers of a map: what each means, how it is stored, how it comes from probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..cog import Bands
from ..errors import CheckpointError
from ..legend import CLASS_NODATA, Legend
from .qa import QA_LEGEND, Quality

__all__ = [
    "EMBEDDINGS",
    "OPTIONAL",
    "SCALE",
    "Layer",
    "check_finite",
    "decide",
    "layer_named",
    "layers_for",
]

SCALE = 0.004
"""Probabilities, entropy and margin are stored as whole multiples of this: 0 to 250."""

EMBEDDINGS = "embeddings"

OPTIONAL = ("probabilities", "entropy", "margin", EMBEDDINGS)
"""What ``--outputs`` may ask for."""

_STEPS = 250.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One raster of the product: uint8, one file."""

    name: str
    """Also the file's name, without ``.tif``."""
    title: str
    kind: Literal["classes", "confidence", "scaled", "counts"]
    """What values may occur, as ``cog.validate_cog`` names it."""
    description: str
    decided: bool
    """True where it comes from a pixel's probabilities."""
    per_class: bool = False
    """True where it has a band for each class."""
    unit: str | None = None
    absent: int = CLASS_NODATA
    """Value of pixels that no shard holds."""

    def bands(self, legend: Legend) -> Bands | None:
        """Return how its bands are described in the file; None for the class map, as usual."""
        if self.name == "classes":
            return None
        return Bands(
            kind=self.kind,
            names=legend.names if self.per_class else (self.name,),
            scale=SCALE if self.kind == "scaled" else None,
            unit=self.unit,
            description=self.description,
        )

    def legend(self, legend: Legend) -> Legend | None:
        """Return the names of its values, where these are categories."""
        if self.kind != "classes":
            return None
        return QA_LEGEND if self.name == "qa" else legend


_LAYERS = (
    Layer(
        name="classes",
        title="Crop classes",
        kind="classes",
        description="the most probable class",
        decided=True,
    ),
    Layer(
        name="confidence",
        title="Confidence in percent",
        kind="confidence",
        description="probability of the most probable class, in percent",
        decided=True,
        unit="percent",
    ),
    Layer(
        name="qa",
        title="Why a pixel has a class or none",
        kind="classes",
        description="quality codes",
        decided=False,
        absent=Quality.OUTSIDE,
    ),
    Layer(
        name="observations",
        title="Number of clear dates",
        kind="counts",
        description="number of clear dates; 254 stands for 254 or more",
        decided=False,
        unit="dates",
    ),
    Layer(
        name="probabilities",
        title="Probability of each class",
        kind="scaled",
        description="probability of the class = value x 0.004",
        decided=True,
        per_class=True,
    ),
    Layer(
        name="entropy",
        title="Entropy of the probabilities",
        kind="scaled",
        description=(
            "Shannon entropy of the probabilities, divided by the logarithm of the number of "
            "classes = value x 0.004; 0: sure, 1: all classes equal"
        ),
        decided=True,
    ),
    Layer(
        name="margin",
        title="Margin between the two most probable classes",
        kind="scaled",
        description="highest probability less the second highest = value x 0.004",
        decided=True,
    ),
)


def layers_for(outputs: Sequence[str]) -> tuple[Layer, ...]:
    """Return the rasters of a product: the four it always has, and those asked for."""
    return tuple(layer for layer in _LAYERS if layer.name not in OPTIONAL or layer.name in outputs)


def layer_named(name: str) -> Layer:
    """Return a layer by its name."""
    return next(layer for layer in _LAYERS if layer.name == name)


def check_finite(finite: Tensor) -> None:
    """Raise CheckpointError unless all that a network gave is finite; () bool."""
    if not bool(finite):
        raise CheckpointError(
            "Cannot label a window: the network gave NaN for some pixels. The checkpoint's weights "
            "or its mean and std are broken; train again, or choose another checkpoint."
        )


def decide(
    probability: Tensor, names: Sequence[str], *, ranking: Tensor | None = None
) -> dict[str, Tensor]:
    """Turn probabilities into the layers that come from them.

    Parameters
    ----------
    probability : (B, K, H, W) float32, sums to one over K.
    names
        Of the layers wanted.
    ranking : (B, K, H, W) float32, what the class is the highest of; by default the probabilities.

    Returns
    -------
    dict
        (B, H, W) uint8 by name, "probabilities" (B, K, H, W). The class is the most probable
        one, the lowest code where classes tie; halves are rounded up.
    """
    top = probability.amax(dim=1)
    count = probability.shape[1]
    made: dict[str, Tensor] = {}
    for name in names:
        if name == "classes":
            codes = torch.arange(count, device=probability.device).view(1, -1, 1, 1)
            nothing = torch.full_like(codes, CLASS_NODATA)
            ranked = probability if ranking is None else ranking
            highest = ranked == ranked.amax(dim=1, keepdim=True)
            value = torch.where(highest, codes, nothing).amin(dim=1)
        elif name == "confidence":
            value = _rounded(top * 100.0, 100.0)
        elif name == "margin":
            second = probability.topk(2, dim=1).values[:, 1] if count > 1 else 0.0
            value = _rounded((top - second) * _STEPS, _STEPS)
        elif name == "entropy":
            # In float64, so that the last digit of a logarithm never decides a rounding.
            terms = torch.special.entr(probability.double()).sum(dim=1)
            value = _rounded(terms / max(math.log(count), 1e-9) * _STEPS, _STEPS)
        else:
            value = _rounded(probability * _STEPS, _STEPS)
        made[name] = value.to(torch.uint8)
    return made


def _rounded(value: Tensor, largest: float) -> Tensor:
    return torch.floor(value + 0.5).clamp(0.0, largest)
