"""The laws of `geo` mode: what is invalid does not exist, and the order of dates says nothing.

Checked in float64 (where they hold to rounding of 1e-12) and in float32 (1e-6), in evaluation and
in training, on ragged chips. Training laws include gradients and the batch norms' running
statistics.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stcln_geo.errors import InputError
from stcln_geo.model import Encoder, MaskedPretrainer, Stcln, masked_loss, positions_for
from stcln_geo.model.layers import MaskedBatchNorm2d, PixelGroupNorm


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    logits: Tensor
    gradients: dict[str, Tensor]
    statistics: dict[str, Tensor]


def outcome(network, batch, *, training) -> Outcome:
    """One step on a copy of the network."""
    network = copy.deepcopy(network).train(training)
    logits = network(batch.images, batch.days, batch.valid)
    nn.functional.cross_entropy(logits, batch.labels).backward()
    return Outcome(
        logits=logits.detach(),
        gradients={name: weight.grad for name, weight in network.named_parameters()},
        statistics={
            name: value for name, value in network.named_buffers() if value.is_floating_point()
        },
    )


def assert_same(one: Outcome, other: Outcome, *, atol: float) -> None:
    torch.testing.assert_close(one.logits, other.logits, atol=atol, rtol=0)
    for mine, theirs in ((one.gradients, other.gradients), (one.statistics, other.statistics)):
        assert mine.keys() == theirs.keys()
        for name in mine:
            worst = (mine[name] - theirs[name]).abs().max().item()
            assert worst <= atol, f"{name} moved by {worst}"


modes = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
precisions = pytest.mark.parametrize(
    ("dtype", "atol"),
    [(torch.float64, 1e-12), (torch.float32, 1e-6)],
    ids=["float64", "float32"],
)


@modes
@precisions
@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_permuting_dates_with_their_days_changes_nothing(
    make_network, make_batch, preset, dtype, atol, training
):
    network, batch = make_network(preset, dtype=dtype), make_batch(dtype=dtype)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted = dataclasses.replace(
        batch, images=batch.images[:, order], days=batch.days[:, order], valid=batch.valid[:, order]
    )
    before = outcome(network, batch, training=training)
    # A permutation reorders every sum over dates: a little more rounding than the other laws.
    slack = 3 if dtype == torch.float32 else 1
    assert_same(before, outcome(network, permuted, training=training), atol=slack * atol)


@modes
@precisions
@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_appending_invalid_dates_moves_nothing(
    make_network, make_batch, preset, dtype, atol, training
):
    network, batch = make_network(preset, dtype=dtype), make_batch(dtype=dtype)
    junk = torch.full_like(batch.images[:, :3], 1e9)
    junk[:, 1] = torch.nan
    junk[:, 2] = -torch.inf
    days = torch.tensor([[torch.nan, 1e9, -5.0], [100.0, torch.inf, 0.0]], dtype=dtype)
    longer = dataclasses.replace(
        batch,
        images=torch.cat([batch.images, junk], 1),
        days=torch.cat([batch.days.to(dtype), days], 1),
        valid=torch.cat([batch.valid, torch.zeros_like(batch.valid[:, :3])], 1),
    )
    before = outcome(network, batch, training=training)
    assert before.logits.isfinite().all()
    assert_same(before, outcome(network, longer, training=training), atol=atol)


@modes
@pytest.mark.parametrize("junk", [torch.nan, 1e9, -0.3], ids=["nan", "huge", "plausible"])
def test_values_where_invalid_move_nothing(make_network, make_batch, junk, training):
    network, batch = make_network(), make_batch()
    changed = dataclasses.replace(
        batch, images=torch.where(batch.valid[:, :, None], batch.images, junk)
    )
    before = outcome(network, batch, training=training)
    assert_same(before, outcome(network, changed, training=training), atol=0.0)


@modes
@precisions
def test_a_margin_of_invalid_pixels_moves_nothing(make_network, make_batch, dtype, atol, training):
    """What is invalid looks like the border of the chip, so padding a chip is no change."""
    network, batch = make_network(dtype=dtype), make_batch(dtype=dtype)
    margin = (2, 1, 3, 5)  # left, right, top, bottom
    padded = dataclasses.replace(
        batch,
        images=nn.functional.pad(batch.images, margin, value=torch.nan),
        valid=nn.functional.pad(batch.valid, margin, value=False),
        labels=nn.functional.pad(batch.labels, margin, value=-100),  # ignored by the loss
    )
    before = outcome(network, batch, training=training)
    after = outcome(network, padded, training=training)
    inside = dataclasses.replace(after, logits=after.logits[..., 3:-5, 2:-1])
    assert_same(before, inside, atol=atol)


@modes
def test_values_where_valid_do_move_logits(make_network, make_batch, training):
    network, batch = make_network(), make_batch()
    batch.valid[1, 2, 4, 4] = True
    changed = dataclasses.replace(batch, images=batch.images.clone())
    changed.images[1, 2, :, 4, 4] += 0.2
    before = outcome(network, batch, training=training).logits
    after = outcome(network, changed, training=training).logits
    assert (after - before).abs().max() > 1e-3


@modes
def test_no_valid_argument_means_all_valid(make_network, make_batch, training):
    network, batch = make_network(dtype=torch.float64), make_batch(dtype=torch.float64)
    everything = dataclasses.replace(batch, valid=torch.ones_like(batch.valid))
    nothing = dataclasses.replace(batch, valid=None)
    assert_same(
        outcome(network, everything, training=training),
        outcome(network, nothing, training=training),
        atol=1e-12,
    )


@modes
def test_pixels_without_a_valid_date_say_nothing(make_network, make_batch, training):
    """Their logits are the classifier's bias, and no other pixel attends to them."""
    network, batch = make_network(), make_batch()
    logits = outcome(network, batch, training=training).logits
    torch.testing.assert_close(logits[:, :, 2, 3], network.classifier.bias.detach().expand(2, 5))

    nothing = dataclasses.replace(batch, valid=torch.zeros_like(batch.valid))
    result = outcome(network, nothing, training=training)
    bias = network.classifier.bias.detach()[None, :, None, None]
    torch.testing.assert_close(result.logits, bias.expand_as(result.logits))
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    for name, value in network.named_buffers():
        if value.is_floating_point():
            torch.testing.assert_close(result.statistics[name], value, atol=0, rtol=0)


def test_never_valid_pixels_are_never_keys(make_network):
    """Attention over a chip equals attention over its valid pixels alone."""
    attention = make_network(dtype=torch.float64).attention
    generator = torch.Generator().manual_seed(1)
    shape = (1, 9, 4, attention.query.in_features)
    valid = torch.rand(1, 9, 4, generator=generator) > 0.3
    valid[:, 5:] = False
    zero = valid[..., None]
    temporal = torch.randn(shape, generator=generator, dtype=torch.float64) * zero
    spatial = torch.randn(shape, generator=generator, dtype=torch.float64) * zero
    whole = attention(temporal, spatial, valid)
    part = attention(temporal[:, :5], spatial[:, :5], valid[:, :5])
    torch.testing.assert_close(whole[:, :5], part)
    assert whole[:, 5:].count_nonzero() == 0


def test_geo_equals_reference_at_thirty_dates_and_not_elsewhere(make_network, make_batch):
    geo, reference = make_network(), make_network(mode="reference")
    for dates, equal in ((30, True), (12, False)):
        batch = make_batch(dates=dates, height=5, width=6)
        with torch.no_grad():
            one = geo.eval()(batch.images, batch.days)
            other = reference.eval()(batch.images, batch.days)
        assert torch.allclose(one, other, atol=1e-5) is equal


@modes
def test_reference_takes_what_is_invalid_for_zeros_and_no_more(make_network, make_batch, training):
    """As published: padding is a value like any other, and moves the logits."""
    network, batch = make_network(mode="reference"), make_batch()
    network.encoder.set_normalisation([0.0] * 4, [1.0] * 4)
    zeros = torch.where(batch.valid[:, :, None], batch.images, 0.0)
    told = outcome(network, batch, training=training)
    plain = dataclasses.replace(batch, images=zeros, valid=None)
    assert_same(told, outcome(network, plain, training=training), atol=0.0)

    padded = dataclasses.replace(
        batch,
        images=torch.cat([batch.images, torch.zeros_like(batch.images[:, :2])], 1),
        days=torch.cat([batch.days, batch.days[:, :2]], 1),
        valid=torch.cat([batch.valid, torch.zeros_like(batch.valid[:, :2])], 1),
    )
    moved = outcome(network, padded, training=training).logits - told.logits
    assert moved.abs().max() > 1e-3


def test_affinity_scale_is_that_of_the_shared_dates(make_config):
    """Against the formula, pixel pair by pixel pair."""
    torch.manual_seed(0)
    attention = Stcln(make_config()).double().attention
    with torch.no_grad():
        attention.gate.fill_(1.0)
    dim = attention.query.in_features
    valid = torch.tensor([[[1, 1, 0], [1, 0, 1], [0, 0, 1], [1, 1, 1]]], dtype=torch.bool)
    temporal = torch.randn(1, 4, 3, dim, dtype=torch.float64) * valid[..., None]
    spatial = torch.randn(1, 4, 3, dim, dtype=torch.float64) * valid[..., None]
    query, key = attention.query(temporal)[0], attention.key(spatial)[0]
    logits = torch.full((4, 4), -torch.inf, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            shared = valid[0, i] & valid[0, j]
            if shared.any():
                product = (query[i, shared] * key[j, shared]).sum()
                logits[i, j] = product * (30 / shared.sum()) ** 0.5 / dim**0.5
    highest = torch.stack([temporal[0, i, valid[0, i]].amax(0) for i in range(4)])
    value = attention.value(highest)
    expected = logits.softmax(-1) @ value + value
    torch.testing.assert_close(attention(temporal, spatial, valid)[0], expected)


def test_without_sta_a_network_is_the_one_whose_gate_is_shut(make_config, make_batch):
    """Other weights begin alike, and no pixel sees more of its neighbours than convolutions do."""
    torch.manual_seed(4)
    with_sta = Stcln(make_config()).eval()
    torch.manual_seed(4)
    without = Stcln(dataclasses.replace(make_config(), sta=False)).eval()
    assert with_sta.attention.gate == 0
    batch = make_batch()
    arguments = (batch.images.float(), batch.days, batch.valid)
    torch.testing.assert_close(without(*arguments), with_sta(*arguments), atol=1e-6, rtol=0)
    lacking = with_sta.state_dict().keys() - without.state_dict().keys()
    assert lacking == {"attention.query.weight", "attention.key.weight", "attention.gate"}
    with torch.no_grad():
        with_sta.attention.gate.fill_(1.0)
    assert (with_sta(*arguments) - without(*arguments)).abs().max() > 1e-3


def test_pretraining_obeys_the_laws_too(make_config, make_batch):
    torch.manual_seed(2)
    network = MaskedPretrainer(make_config()).double().train()
    batch = make_batch(dtype=torch.float64)
    mask = torch.rand(batch.valid.shape) < 0.4
    with torch.no_grad():
        network.token.fill_(0.3)

    def gradients(images, days, valid, mask):
        trained = copy.deepcopy(network)
        made = trained(images, days, valid, mask)
        loss = masked_loss(made, trained.normalise(images), mask, valid)
        loss.backward()
        return [loss, *(weight.grad for weight in trained.parameters())]

    before = gradients(batch.images, batch.days, batch.valid, mask)
    junk = torch.full_like(batch.images[:, :2], torch.nan)
    after = gradients(
        torch.cat([torch.where(batch.valid[:, :, None], batch.images, 1e9), junk], 1),
        torch.cat([batch.days, batch.days[:, :2]], 1),
        torch.cat([batch.valid, torch.zeros_like(batch.valid[:, :2])], 1),
        torch.cat([mask, torch.ones_like(mask[:, :2])], 1),
    )
    for mine, theirs in zip(before, after, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    assert before[0] > 0


def test_hidden_values_do_not_reach_the_reconstruction(make_config, make_batch):
    torch.manual_seed(2)
    network = MaskedPretrainer(make_config()).eval()
    batch = make_batch()
    mask = torch.rand(batch.valid.shape) < 0.4
    changed = torch.where(mask[:, :, None], batch.images + 5, batch.images)
    with torch.no_grad():
        one = network(batch.images, batch.days, batch.valid, mask)
        other = network(changed, batch.days, batch.valid, mask)
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_hiding_what_is_invalid_has_no_effect(make_config, make_batch):
    torch.manual_seed(2)
    network = MaskedPretrainer(make_config()).eval()
    batch = make_batch()
    mask = torch.rand(batch.valid.shape) < 0.4
    with torch.no_grad():
        network.token.fill_(2.0)
        one = network(batch.images, batch.days, batch.valid, mask & batch.valid)
        other = network(batch.images, batch.days, batch.valid, mask | ~batch.valid)
    torch.testing.assert_close(one, other, atol=0, rtol=0)


def test_batch_norm_over_all_equals_torch():
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    for _ in range(3):
        x = torch.randn(2, 3, 5, 4, dtype=torch.float64) * 2 + 1
        everywhere = torch.ones(2, 1, 5, 4, dtype=torch.bool)
        torch.testing.assert_close(ours(x, everywhere), theirs(x))
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_batch_norm_over_valid_equals_torch_on_the_valid_pixels_alone():
    torch.manual_seed(0)
    ours, theirs = MaskedBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(2, 3, 5, 4)
    valid = torch.rand(2, 1, 5, 4) > 0.5
    alone = x.permute(0, 2, 3, 1)[valid[:, 0]].T[None, :, :, None]  # (1, C, pixels, 1)
    expected = theirs(alone)[0, :, :, 0].T
    torch.testing.assert_close(ours(x, valid).permute(0, 2, 3, 1)[valid[:, 0]], expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("pixels", [0, 1])
def test_batch_norm_of_hardly_anything_stays_finite(pixels):
    norm = MaskedBatchNorm2d(3)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    valid = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    valid.view(-1)[:pixels] = True
    norm(x, valid).sum().backward()
    assert x.grad.isfinite().all()
    assert norm.running_var.isfinite().all()
    assert int(norm.num_batches_tracked) == pixels
    assert torch.equal(norm.running_mean, torch.zeros(3)) is (pixels == 0)


def test_group_norm_over_all_equals_torch():
    torch.manual_seed(0)
    ours, theirs = PixelGroupNorm(12, 3), nn.GroupNorm(3, 12)
    x = torch.randn(5, 7, 12)
    expected = theirs(x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours(x, torch.ones(5, 7, dtype=torch.bool)), expected)


def test_encoder_output_is_zero_where_invalid(make_network, make_batch):
    encoder, batch = make_network().encoder.eval(), make_batch()
    with torch.no_grad():
        features = encoder(batch.images, batch.days, batch.valid)
    assert features.shape == (2, 6, encoder.config.dim, 7, 10)
    assert torch.equal(features.abs().amax(2) > 0, batch.valid)


def test_index_positions_are_ranks(make_config):
    days = torch.tensor([[4, 90, 200]])
    assert torch.equal(positions_for(make_config(positions="days"), days), days)
    ranks = positions_for(make_config(positions="index"), days)
    assert torch.equal(ranks, torch.tensor([[0, 1, 2]]))


def test_precision_under_bfloat16(make_network, make_batch):
    """Logits and loss stay float32 and near those of float32 throughout."""
    network, batch = make_network().eval(), make_batch()
    with torch.no_grad():
        exact = network(batch.images, batch.days, batch.valid)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = network(batch.images, batch.days, batch.valid)
            assert network.encoder.temporal.norm(torch.randn(3, 4, 32).bfloat16()).dtype == (
                torch.float32
            )
            loss = masked_loss(batch.images.bfloat16(), batch.images + 1, batch.valid, batch.valid)
    assert rough.dtype == torch.float32
    assert loss.dtype == torch.float32
    assert (rough - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"images": torch.zeros(2, 6, 3, 7, 10)}, "blue, green, red, nir"),
        ({"days": torch.zeros(2, 5)}, r"must be \(B, T\)"),
        ({"valid": torch.ones(2, 6, 7, 10)}, "True where usable"),
        ({"valid": torch.ones(2, 6, 10, 7, dtype=torch.bool)}, "True where usable"),
    ],
    ids=["bands", "days", "dtype", "transposed"],
)
def test_wrong_batches_are_refused(make_network, make_batch, change, says):
    batch = dataclasses.replace(make_batch(), **change)
    with pytest.raises(InputError, match=says):
        make_network()(batch.images, batch.days, batch.valid)


def test_normalisation_that_cannot_be_is_refused(make_config):
    encoder = Encoder(make_config())
    with pytest.raises(InputError, match="one finite number for each"):
        encoder.set_normalisation([0.1], [0.1])
    with pytest.raises(InputError, match="must be positive"):
        encoder.set_normalisation([0.1] * 4, [0.1, 0.0, 0.1, 0.1])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("heads", 3),
        ("dropout", 1.0),
        ("mode", "exact"),
        ("positions", "doy"),
        ("bands", ("red", "red")),
        ("classes", 256),
        ("layers", 0),
        ("widths", (16,)),
    ],
)
def test_recipes_that_cannot_be_are_refused(make_config, field, value):
    with pytest.raises(InputError, match=field):
        make_config(**{field: value})
