"""Masks hide what they should, by chance that repeats; the loss counts what they hide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stcln_geo.errors import InputError
from stcln_geo.model import make_mask, masked_loss, vegetated_dates

RED, NIR = 1, 2


def chips(*, batch=3, dates=8, height=33, width=41):
    """Reflectance (B, T, 3, H, W); green everywhere but on date 2, where a tenth is not."""
    images = torch.full((batch, dates, 3, height, width), 0.05)
    images[:, :, NIR] = 0.4
    images[:, 2, NIR, : height // 8] = 0.05
    return images


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_share_of_hidden_is_the_ratio():
    mask = make_mask(chips(), None, mask_ratio=0.4, red=None, nir=None, generator=seeded())
    assert mask.dtype == torch.bool
    assert mask.shape == (3, 8, 33, 41)
    # Standard deviation of the share: sqrt(0.24 / 32472) = 0.0027.
    assert mask.float().mean().item() == pytest.approx(0.4, abs=0.014)


def test_draws_repeat_with_the_generator_and_are_independent_over_dates_and_pixels():
    options = {"mask_ratio": 0.5, "red": None, "nir": None}
    one = make_mask(chips(), None, generator=seeded(4), **options)
    assert torch.equal(one, make_mask(chips(), None, generator=seeded(4), **options))
    assert not torch.equal(one, make_mask(chips(), None, generator=seeded(5), **options))
    for shifted in (one.roll(1, 0), one.roll(1, 1), one.roll(1, 2), one.roll(1, 3)):
        assert (one == shifted).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_whole_dates_strategy():
    mask = make_mask(
        chips(batch=40), None, mask_ratio=0.3, red=None, nir=None, generator=seeded(),
        strategy="time",
    )  # fmt: skip
    assert torch.equal(mask.any(-1).any(-1), mask.all(-1).all(-1))
    assert 0.2 < mask[:, :, 0, 0].float().mean() < 0.4


def test_only_valid_observations_are_hidden():
    valid = torch.rand(3, 8, 33, 41, generator=seeded(1)) > 0.5
    images = torch.where(valid[:, :, None], chips(), torch.nan)
    mask = make_mask(images, valid, mask_ratio=0.9, red=RED, nir=NIR, generator=seeded())
    assert not (mask & ~valid).any()
    assert mask.any()


def test_gate_keeps_dates_with_bare_ground_whole():
    options = {"mask_ratio": 0.4, "red": RED, "nir": NIR}
    mask = make_mask(chips(), None, generator=seeded(), **options)
    hidden = mask.any(-1).any(-1)
    assert not hidden[:, 2].any()
    assert hidden[:, [0, 1, 3, 4, 5, 6, 7]].all()

    ungated = make_mask(chips(), None, generator=seeded(), gate=False, **options)
    assert ungated.any(-1).any(-1).all()
    lax = make_mask(chips(), None, generator=seeded(), share_above=0.5, **options)
    assert torch.equal(lax, ungated)
    strict = make_mask(chips(), None, generator=seeded(), ndvi_above=0.99, **options)
    assert not strict.any()


def test_gate_counts_valid_pixels_only_and_agrees_with_numpy():
    generator = seeded(2)
    red = torch.rand(2, 5, 9, 11, generator=generator) * 0.2 - 0.01
    nir = red * 3 + 0.02 * torch.rand(2, 5, 9, 11, generator=generator)
    nir[:, 1:3, :3] = red[:, 1:3, :3]
    valid = torch.rand(2, 5, 9, 11, generator=generator) > 0.3
    valid[:, 1, :3] = False  # the bare part of date 1 is cloudy, that of date 2 is not
    valid[0, 4] = False
    found = vegetated_dates(red, nir, valid)

    r, n, v = red.numpy().astype(float), nir.numpy().astype(float), valid.numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        green = ((n - r) / (n + r) > 0.2) & (n + r > 0) & v
        share = green.sum((2, 3)) / v.sum((2, 3))
    np.testing.assert_array_equal(found.numpy(), share > 0.9)
    assert found[:, 1].all()
    assert not found[:, 2].any()
    assert not found[0, 4]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, float("nan")])
def test_ratios_that_hide_nothing_or_all_are_refused(ratio):
    with pytest.raises(InputError, match="mask_ratio"):
        make_mask(chips(), None, mask_ratio=ratio, red=None, nir=None, generator=seeded())


def test_unknown_strategy_is_refused():
    with pytest.raises(InputError, match="space-time, time"):
        make_mask(
            chips(), None, mask_ratio=0.4, red=None, nir=None, generator=seeded(), strategy="tube"
        )


def test_loss_is_the_mean_over_hidden_valid_values_of_all_bands():
    generator = seeded(3)
    made = torch.randn(2, 4, 3, 5, 7, generator=generator)
    target = torch.randn(2, 4, 3, 5, 7, generator=generator)
    mask = torch.rand(2, 4, 5, 7, generator=generator) < 0.4
    valid = torch.rand(2, 4, 5, 7, generator=generator) < 0.8
    chosen = (mask & valid)[:, :, None].expand_as(made).numpy()
    expected = np.square(made.numpy() - target.numpy())[chosen].mean()
    broken = torch.where(valid[:, :, None], target, torch.nan)
    assert masked_loss(made, broken, mask, valid).item() == pytest.approx(expected, rel=1e-6)


def test_nothing_hidden_costs_nothing():
    made = torch.randn(1, 2, 3, 4, 5, requires_grad=True)
    loss = masked_loss(made, torch.full((1, 2, 3, 4, 5), torch.nan),
                       torch.zeros(1, 2, 4, 5, dtype=torch.bool), None)  # fmt: skip
    loss.backward()
    assert loss.item() == 0.0
    assert made.grad.count_nonzero() == 0
