"""Smooth the probabilities of a window before its classes are decided.

The neighbourhood of every pixel that a window owns must lie inside the window, so it may reach
no further than the halo. Smoothing then depends on the window alone, and the map stays the same
for any shard size, worker or region.

Bayesian smoothing follows Camara et al., "Bayesian Inference for Post-Processing of
Remote-Sensing Image Classification", Remote Sensing 16(23), 2024, doi 10.3390/rs16234572, as in
the R package sits: the logit of a class is drawn to the mean of the highest logits around it,
the more so the more alike these are. Other than there, pixels beyond the window or without
enough clear dates have no say, rather than being mirrored, and the results are scaled to sum to
one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

__all__ = ["SMOOTHINGS", "Smoothing", "SmoothingMethod", "smooth"]

SmoothingMethod = Literal["majority", "bayesian"]
SMOOTHINGS = ("majority", "bayesian")

_SURE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Smoothing:
    """How probabilities are smoothed.

    Parameters
    ----------
    method
        "majority": each neighbour votes for its most probable class. "bayesian": Camara et al.
    window
        Side of the neighbourhood (pixels), odd.
    smoothness
        Bayesian: variance of the logits that is taken for noise; more smooths more.
    fraction
        Bayesian: share of the neighbours, those with the highest logits, that make the prior.
    """

    method: SmoothingMethod
    window: int = 7
    smoothness: float = 20.0
    fraction: float = 0.5

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "method": self.method,
            "window": self.window,
            "smoothness": self.smoothness,
            "fraction": self.fraction,
        }


def smooth(probability: Tensor, usable: Tensor, smoothing: Smoothing) -> Tensor:
    """Smooth the probabilities of windows.

    Parameters
    ----------
    probability : (B, K, H, W) float32, sums to one over K.
    usable : (B, H, W) bool. True where the pixel has clear dates enough to have a say.

    Returns
    -------
    (B, K, H, W) float32, sums to one over K. Pixels that are not usable keep theirs.
    """
    # One window at a time: the neighbourhoods of a pixel take 49 times the room of its own.
    smoothed = torch.stack(
        [
            _majority(one, weight, smoothing)
            if smoothing.method == "majority"
            else _bayesian(one, weight, smoothing)
            for one, weight in zip(probability, usable, strict=True)
        ]
    )
    return torch.where(usable[:, None], smoothed, probability)


def _neighbours(values: Tensor, side: int, fill: float) -> Tensor:
    """Return what lies around each pixel: (K, H, W) -> (K, H, W, side * side)."""
    reach = side // 2
    around = pad(values, (reach, reach, reach, reach), value=fill)
    return around.unfold(1, side, 1).unfold(2, side, 1).flatten(3)


def _majority(probability: Tensor, usable: Tensor, smoothing: Smoothing) -> Tensor:
    """Return the shares of the votes; the mean probability is one more vote, to settle ties."""
    classes = probability.shape[0]
    votes = one_hot(probability.argmax(0), classes).permute(2, 0, 1)  # (H, W, K) -> (K, H, W)
    said = torch.cat([votes * usable, probability * usable, usable[None].to(probability)])
    total = _neighbours(said.double(), smoothing.window, 0.0).sum(3)
    votes, sums, voters = total[:classes], total[classes : 2 * classes], total[-1:].clamp(min=1.0)
    return ((votes + sums / voters) / (voters + 1.0)).to(probability)


def _bayesian(probability: Tensor, usable: Tensor, smoothing: Smoothing) -> Tensor:
    sure = probability.double().clamp(_SURE, 1.0 - _SURE)
    logit = torch.log(sure) - torch.log1p(-sure)
    around = _neighbours(torch.where(usable, logit, -math.inf), smoothing.window, -math.inf)
    ordered = around.sort(dim=3, descending=True).values  # (K, H, W, n)
    counts = torch.isfinite(ordered).sum(3, keepdim=True)
    taken = torch.ceil(counts * smoothing.fraction).clamp(min=1.0)
    high = torch.arange(ordered.shape[3], device=ordered.device) < taken
    values = torch.where(high & torch.isfinite(ordered), ordered, 0.0)
    mean = values.sum(3) / taken[..., 0]
    spread = torch.where(high, values - mean[..., None], 0.0).square().sum(3)
    variance = spread / (taken[..., 0] - 1.0).clamp(min=1.0)
    weight = variance / (variance + smoothing.smoothness)
    posterior = torch.sigmoid(weight * logit + (1.0 - weight) * mean)
    return (posterior / posterior.sum(0, keepdim=True)).to(probability)
