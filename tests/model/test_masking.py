"""Masks hide what they should, by chance that repeats; the loss counts what they hide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stcln_geo.errors import InputError
from stcln_geo.model import (
    MaskedPretrainer,
    StclnConfig,
    draw_mask,
    group_numbers,
    make_mask,
    masked_loss,
    vegetated_dates,
)
from stcln_geo.model.masking import hideable

RED, NIR = 1, 2

GROUPS = (0, 0, 1)
STRATEGIES = ("space-time", "time", "block", "tube", "band-group")


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


@pytest.mark.parametrize(
    ("strategy", "draws"),
    # How many draws by themselves a chip of 3 dates and 11 x 14 px has, at least: the squares of
    # 5 px cover it in 3 x 3 pieces on average.
    [("space-time", 462), ("time", 3), ("block", 27), ("tube", 9), ("band-group", 54)],
)
@pytest.mark.parametrize("ratio", [0.15, 0.6])
def test_each_value_is_hidden_with_the_ratio_at_ragged_edges_too(strategy, draws, ratio):
    batch = 3000
    mask = draw_mask(
        (batch, 3, 3, 11, 14), mask_ratio=ratio, generator=seeded(8), strategy=strategy, block=5,
        groups=GROUPS,
    )  # fmt: skip
    if mask.ndim == 4:
        mask = mask[:, :, None].expand(-1, -1, 3, -1, -1)
    spread = (ratio * (1 - ratio) / batch) ** 0.5
    assert mask.float().mean().item() == pytest.approx(ratio, abs=4 * spread / (draws / 3) ** 0.5)
    # Each date, band, row and column by itself: one draw a sample at least.
    for axes in ((0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 4), (0, 1, 2, 3)):
        shares = mask.float().mean(axes)
        assert float((shares - ratio).abs().max()) < 4.5 * spread
    # And each place of the chip, the corners with it.
    assert float((mask.float().mean(0) - ratio).abs().max()) < 5 * spread


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_depends_on_its_generator_alone(strategy):
    """Neither on the other samples, nor on dates that follow, as padding does."""
    options = {"mask_ratio": 0.5, "strategy": strategy, "block": 4, "groups": GROUPS}
    together = draw_mask((3, 6, 3, 13, 9), generator=[seeded(one) for one in (7, 8, 9)], **options)
    for place, seed in enumerate((7, 8, 9)):
        alone = draw_mask((1, 4, 3, 13, 9), generator=[seeded(seed)], **options)
        assert torch.equal(together[place : place + 1, :4], alone)
    assert not torch.equal(together[0], together[1])


def pieces(plane):
    """Rows and columns of a plane (H, W) between which something changes."""
    plane = plane.numpy()
    return (
        np.flatnonzero((plane[1:] != plane[:-1]).any(1)) + 1,
        np.flatnonzero((plane[:, 1:] != plane[:, :-1]).any(0)) + 1,
    )


@pytest.mark.parametrize("strategy", ["block", "tube", "band-group"])
def test_squares_are_those_of_one_grid_a_plane(strategy):
    mask = draw_mask(
        (12, 4, 3, 19, 23), mask_ratio=0.5, generator=seeded(2), strategy=strategy, block=5,
        groups=GROUPS,
    )  # fmt: skip
    corners = set()
    for plane in mask.flatten(0, -3):
        edges = pieces(plane)
        for cuts in edges:
            assert len({int(cut) % 5 for cut in cuts}) <= 1
        corners.add(tuple(int(cuts[0]) % 5 if len(cuts) else -1 for cuts in edges))
    assert len(corners) > 8


def test_tubes_go_through_all_dates_and_squares_of_dates_do_not():
    shape = (4, 6, 3, 21, 17)
    tube = draw_mask(shape, mask_ratio=0.5, generator=seeded(3), strategy="tube", block=1)
    assert torch.equal(tube, tube[:, :1].expand_as(tube))
    assert not torch.equal(tube[:, :, 1:], tube[:, :, :-1])
    assert not torch.equal(tube[0], tube[1])
    block = draw_mask(shape, mask_ratio=0.5, generator=seeded(3), strategy="block")
    same = (block[:, 1:] == block[:, :-1]).float().mean().item()
    assert same == pytest.approx(0.5, abs=0.06)


def test_bands_of_a_group_are_hidden_together_and_groups_by_themselves():
    mask = draw_mask(
        (20, 5, 3, 16, 16), mask_ratio=0.5, generator=seeded(4), strategy="band-group", block=3,
        groups=(1, 0, 1),
    )  # fmt: skip
    assert mask.shape == (20, 5, 3, 16, 16)
    assert torch.equal(mask[:, :, 0], mask[:, :, 2])
    same = (mask[:, :, 0] == mask[:, :, 1]).float().mean().item()
    assert same == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gate_and_validity_hold_for_every_strategy(strategy):
    valid = torch.rand(3, 8, 33, 41, generator=seeded(1)) > 0.3
    images = torch.where(valid[:, :, None], chips(), torch.nan)
    mask = make_mask(
        images, valid, mask_ratio=0.6, red=RED, nir=NIR, generator=seeded(6), strategy=strategy,
        groups=GROUPS,
    )  # fmt: skip
    hidden = mask if mask.ndim == 4 else mask.any(2)
    assert not (hidden & ~valid).any()
    assert not hidden[:, 2].any()
    assert hidden[:, 3].any()


def test_groups_of_bands_go_by_name():
    bands = ("nir", "blue", "swir22", "rededge2", "red", "thermal", "nir09", "cirrus")
    assert group_numbers(bands) == (2, 0, 3, 1, 0, 4, 2, 3)
    # Groups without a band of the run leave no gap.
    assert group_numbers(("swir16", "red")) == (1, 0)
    own = {"vegetation": ("red", "nir"), "water": ("swir16",)}
    assert group_numbers(("swir16", "red", "green", "nir"), own) == (1, 0, 2, 0)


@pytest.mark.parametrize(
    ("bands", "groups", "told"),
    [
        (("red", "nir"), {"a": ("red", "nirr")}, "nirr of masking.band_groups"),
        (("red", "nir", "green"), {"a": ("red", "nir"), "b": ("red",)}, "red is in more than one"),
        (("red", "green"), None, "all bands of this run .red, green. are in one group"),
        (("red", "nir"), {"a": ("red", "nir")}, "strategy=block, which is the same"),
    ],
    ids=["unknown", "twice", "one by wavelength", "one of one's own"],
)
def test_groups_that_do_not_fit_the_bands_are_refused(bands, groups, told):
    with pytest.raises(InputError, match=told):
        group_numbers(bands, groups)


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
    for missing in ("red", "nir"):
        without = make_mask(chips(), None, generator=seeded(), **{**options, missing: None})
        assert torch.equal(without, ungated)
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
    everywhere = vegetated_dates(red, nir, torch.ones_like(valid))
    assert torch.equal(vegetated_dates(red, nir, None), everywhere)
    assert not torch.equal(found, everywhere)


def test_a_single_valid_pixel_decides_of_its_date():
    red, nir = torch.full((2, 1, 2, 3, 5), 0.05).unbind()
    nir[0, :, 1, 2] = 0.4
    valid = torch.zeros(1, 2, 3, 5, dtype=torch.bool)
    valid[:, 0, 1, 2] = True
    valid[:, 1, 0, 0] = True
    assert vegetated_dates(red, nir, valid).tolist() == [[True, False]]
    allowed = hideable(torch.stack([red, nir], 2), valid, red=0, nir=1)
    assert allowed.nonzero().tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, float("nan")])
def test_ratios_that_hide_nothing_or_all_are_refused(ratio):
    with pytest.raises(InputError, match="mask_ratio"):
        make_mask(chips(), None, mask_ratio=ratio, red=None, nir=None, generator=seeded())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strategy": "cube"}, "space-time, time, block, tube, band-group"),
        ({"strategy": "block", "block": 0}, "block=0"),
        ({"strategy": "band-group"}, "groups=None"),
        ({"strategy": "band-group", "groups": (0, 1)}, "each of 3 bands"),
        ({"strategy": "band-group", "groups": (0, 1, -1)}, "from 0"),
    ],
    ids=["strategy", "block", "no groups", "few groups", "negative"],
)
def test_options_that_mean_nothing_are_refused(options, told):
    with pytest.raises(InputError, match=told):
        draw_mask((2, 3, 3, 9, 11), mask_ratio=0.4, generator=seeded(), **options)


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


def test_loss_of_a_mask_by_band_counts_its_values_only():
    generator = seeded(5)
    made = torch.randn(2, 4, 3, 5, 7, generator=generator)
    target = torch.randn(2, 4, 3, 5, 7, generator=generator)
    mask = torch.rand(2, 4, 3, 5, 7, generator=generator) < 0.4
    valid = torch.rand(2, 4, 5, 7, generator=generator) < 0.8
    chosen = (mask & valid[:, :, None]).numpy()
    expected = np.square(made.numpy() - target.numpy())[chosen].mean()
    broken = torch.where(valid[:, :, None], target, torch.nan)
    assert masked_loss(made, broken, mask, valid).item() == pytest.approx(expected, rel=1e-6)
    # The same in all bands is the mask without a band axis.
    whole = mask[:, :, :1].expand_as(mask)
    assert torch.equal(
        masked_loss(made, broken, whole, valid), masked_loss(made, broken, whole[:, :, 0], valid)
    )


def test_network_takes_a_mask_by_band():
    torch.manual_seed(0)
    config = StclnConfig(
        bands=("red", "nir", "green"), widths=(4, 8), layers=1, heads=2, feedforward=16, dropout=0.0
    )
    network = MaskedPretrainer(config).eval()
    with torch.no_grad():
        network.token.fill_(0.7)
    images = torch.rand(2, 4, 3, 7, 9, generator=seeded(0))
    days = torch.arange(4).expand(2, 4)
    mask = torch.rand(2, 4, 3, 7, 9, generator=seeded(1)) < 0.5
    made = network(images, days, None, mask)
    # What is hidden cannot be seen, and shows the token; what is not hidden counts.
    other = torch.where(mask, torch.rand(images.shape, generator=seeded(2)), images)
    assert torch.equal(network(other, days, None, mask), made)
    shown = torch.where(mask, 0.7, images)
    nothing = torch.zeros(2, 4, 7, 9, dtype=torch.bool)
    assert torch.equal(network(shown, days, None, nothing), made)
    whole = mask[:, :, :1].expand_as(mask)
    assert torch.equal(
        network(images, days, None, whole), network(images, days, None, whole[:, :, 0])
    )
    with pytest.raises(InputError, match=r"or \(B, T, C, H, W\) bool"):
        network(images, days, None, mask[:, :, :2])
