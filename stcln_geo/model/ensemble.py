"""Several classifiers as one: the mean of their probabilities (a deep ensemble).

After Lakshminarayanan et al. 2017, "Simple and scalable predictive uncertainty estimation using
deep ensembles": networks of one recipe from different random beginnings err in different places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import InputError
from .config import StclnConfig
from .stcln import Stcln

__all__ = ["Classifier", "Ensemble"]


class Ensemble(nn.Module):
    """Classifiers of one recipe that answer together, as a `Stcln` does.

    Parameters
    ----------
    members
        At least two, of equal configuration.
    temperatures
        What the logits of each are divided by before a probability is made of them; None for
        nothing.
    """

    temperatures: Tensor

    def __init__(
        self, members: Sequence[Stcln], temperatures: Sequence[float | None] | None = None
    ) -> None:
        super().__init__()
        if len(members) < 2 or any(one.config != members[0].config for one in members):
            raise InputError(
                f"Cannot join {len(members)} networks: an ensemble is of two at least, which have "
                "the same bands, classes, sizes and mode. Take runs of one recipe, as "
                "`stcln-geo finetune --seeds 5` makes them."
            )
        self.config = members[0].config
        self.members = nn.ModuleList(members)
        divisors = [1.0 if one is None else one for one in temperatures or [None] * len(members)]
        self.register_buffer("temperatures", torch.tensor(divisors, dtype=torch.float32))

    @classmethod
    def of(cls, config: StclnConfig, members: int) -> Ensemble:
        """Build one of so many networks with random weights."""
        return cls([Stcln(config) for _ in range(members)])

    @property
    def embedding_dim(self) -> int:
        """Length of what `embed` gives of a pixel."""
        return len(self.members) * self.config.dim

    def forward(self, images: Tensor, days: Tensor, valid: Tensor | None = None) -> Tensor:
        """Classify a batch; parameters as in `Encoder.forward`.

        Returns
        -------
        (B, K, H, W) float32, finite: logarithms of the members' mean probability, so that softmax
        gives this mean.
        """
        height, width = images.shape[-2:]
        return self.classify(self.embed(images, days, valid), (height, width))

    def embed(self, images: Tensor, days: Tensor, valid: Tensor | None = None) -> Tensor:
        """Give what the members' classifiers decide from, side by side: (B, H*W, embedding_dim)."""
        made = [one.embed(images, days, valid) for one in self._networks()]
        return torch.cat(made, dim=-1)

    def classify(self, embedded: Tensor, shape_yx: tuple[int, int]) -> Tensor:
        """Turn what `embed` gave into (B, K, H, W) float32, as `forward` gives it."""
        parts = embedded.split(self.config.dim, dim=-1)
        logs = [
            torch.log_softmax(one.classify(part, shape_yx) / temperature, dim=1)
            for one, part, temperature in zip(
                self._networks(), parts, self.temperatures, strict=True
            )
        ]
        return torch.logsumexp(torch.stack(logs), dim=0) - math.log(len(logs))

    def _networks(self) -> list[Stcln]:
        return [cast(Stcln, one) for one in self.members]


Classifier = Stcln | Ensemble
"""What labels pixels: one network, or several together."""
