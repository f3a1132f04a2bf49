"""Small networks and ragged batches for the tests of the network."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from stcln_geo.model import Stcln, StclnConfig

if not torch.cuda.is_available():
    # Read when Triton is imported, which other tests may do before those of the kernels.
    os.environ.setdefault("TRITON_INTERPRET", "1")

BANDS = ("blue", "green", "red", "nir")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """What a network is given, and what it should say."""

    images: Tensor
    days: Tensor
    valid: Tensor | None
    labels: Tensor


def _make_config(preset: str = "tiny", **changes: object) -> StclnConfig:
    config = StclnConfig.preset(preset, bands=BANDS, classes=5)
    return dataclasses.replace(config, **{"dropout": 0.0, **changes})


def _make_network(
    preset: str = "tiny", *, dtype: torch.dtype = torch.float32, **changes: object
) -> Stcln:
    torch.manual_seed(7)
    network = Stcln(_make_config(preset, **changes))
    network.encoder.set_normalisation([0.1, 0.12, 0.1, 0.3], [0.08, 0.1, 0.12, 0.1])
    with torch.no_grad():
        network.attention.gate.fill_(0.7)
        for name, tensor in network.named_parameters():
            if "norm" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
    return network.to(dtype)


def _make_batch(
    *, dates: int = 6, height: int = 7, width: int = 10, dtype: torch.dtype = torch.float32
) -> Batch:
    generator = torch.Generator().manual_seed(3)
    shape = (2, dates, height, width)
    valid = torch.rand(shape, generator=generator) > 0.4
    valid[:, :, 2, 3] = False
    valid[0, dates // 2] = False
    images = torch.rand(2, dates, 4, height, width, generator=generator) * 0.4
    return Batch(
        images=images.to(dtype),
        days=torch.randint(0, 365, (2, dates), generator=generator).sort(1).values,
        valid=valid,
        labels=torch.randint(0, 5, (2, height, width), generator=generator),
    )


@pytest.fixture(scope="session")
def make_config() -> Callable[..., StclnConfig]:
    """A preset without dropout, so that training is a function of the batch."""
    return _make_config


@pytest.fixture(scope="session")
def make_network() -> Callable[..., Stcln]:
    """A classifier whose attention over space counts, and whose norms are not trivial."""
    return _make_network


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """A batch with a never-valid pixel at (2, 3), and a never-valid date of sample 0."""
    return _make_batch
