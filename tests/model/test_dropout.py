"""Dropping by drawn gaps: the law of dropout, and the gradients of plain products with a mask."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stcln_geo.model import dropout
from stcln_geo.model.dropout import add_dropped, draw_places, drop, drop_after_relu
from stcln_geo.model.layers import TransformerLayer


def test_each_value_is_dropped_by_itself_with_the_same_chance():
    torch.manual_seed(0)
    rounds, values, share = 4000, 7, 0.3
    dropped = torch.zeros(rounds, values)
    for row in dropped:
        row[draw_places(values, share)] = 1
    together = dropped.T @ dropped / rounds
    expected = torch.full((values, values), share**2).fill_diagonal_(share)
    spread = (expected * (1 - expected) / rounds).sqrt()
    assert ((together - expected).abs() < 4.5 * spread).all()


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97])
def test_places_ascend_within_the_values_and_are_as_many_as_they_should(share):
    torch.manual_seed(1)
    values = 100_003
    places = draw_places(values, share)
    assert places.dtype == torch.int64
    assert (places.diff() > 0).all()
    assert places[0] >= 0
    assert places[-1] < values
    assert abs(len(places) - values * share) < 5 * math.sqrt(values * share * (1 - share))
    half = (places < values // 2).sum()
    assert abs(half - values * share / 2) < 5 * math.sqrt(values * share * (1 - share) / 2)


def test_more_gaps_are_drawn_until_the_last_value(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count: torch.zeros(count))  # every gap is 1
    assert torch.equal(draw_places(1009, 0.1), torch.arange(1009))


def with_mask(x, places, scale):
    mask = torch.full_like(x, scale).flatten()
    mask[places] = 0.0
    return x * mask.view_as(x)


@pytest.mark.parametrize("name", ["drop", "drop after relu", "add dropped"])
def test_results_and_gradients_are_those_of_a_mask(monkeypatch, name):
    generator = torch.Generator().manual_seed(2)
    places = torch.tensor([0, 5, 6, 11, 41])
    monkeypatch.setattr(dropout, "draw_places", lambda values, share: places)
    base, other, weight = (
        torch.randn(6, 7, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    both = {
        "drop": lambda x, y: (drop(x + y, 0.2), with_mask(x + y, places, 1.0)),
        "drop after relu": lambda x, y: (
            drop_after_relu(x + y, 0.2),
            with_mask((x + y).relu(), places, 1.0),
        ),
        "add dropped": lambda x, y: (add_dropped(x, y, 0.2), x + with_mask(y, places, 1.25)),
    }[name]
    found = []
    for index in range(2):
        x, y = base.clone().requires_grad_(), other.clone().requires_grad_()
        made = both(x, y)[index]
        (made * weight).sum().backward()
        found.append((made.detach(), x.grad, y.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, atol=1e-14, rtol=0)


@pytest.mark.parametrize("masked", [True, False], ids=["keys", "all"])
@pytest.mark.parametrize("dates", [7, 19])
def test_a_layer_in_training_is_the_plain_layer_with_the_same_drops(monkeypatch, dates, masked):
    """Against products with masks made of the places that the layer drew."""
    torch.manual_seed(3)
    share, heads, dim = 0.2, 4, 32
    layer = TransformerLayer(dim, heads, 48, share).double().train()
    oracle = copy.deepcopy(layer)
    x = torch.randn(11, dates, dim, dtype=torch.float64)
    weight = torch.randn_like(x)
    keys = torch.rand(11, dates) > 0.5
    keys[:, 3] = True
    keys = keys if masked else None

    drawn = []

    def draw(values, share):
        drawn.append(draw_places(values, share))
        return drawn[-1]

    monkeypatch.setattr(dropout, "draw_places", draw)
    found = layer(x, keys)
    (found * weight).sum().backward()
    assert len(drawn) == 4

    scale = 1 / (1 - share)
    q, k, v = (
        oracle.attention.projection(x).view(11, dates, 3, heads, -1).permute(2, 0, 3, 1, 4)
    )  # (S, heads, T, D/heads)
    logits = q @ k.transpose(-1, -2) / math.sqrt(dim // heads)
    if keys is not None:
        logits = logits.masked_fill(~keys[:, None, None], -torch.inf)
    weights = logits.softmax(-1)
    # Short rows are padded where they are drawn: what falls there drops nothing.
    padded = max(dropout.VECTOR, dates)
    kept = torch.ones(11 * heads, dates, padded, dtype=torch.float64)
    kept.view(-1)[drawn[0]] = 0.0
    weights = weights * kept.view(11, heads, dates, padded)[..., :dates] * scale
    mixed = (weights @ v).transpose(1, 2).reshape(x.shape)
    y = oracle.attention_norm(x + with_mask(oracle.attention.output(mixed), drawn[1], scale))
    hidden = with_mask(oracle.expand(y).relu(), drawn[2], scale)
    expected = oracle.feedforward_norm(y + with_mask(oracle.contract(hidden), drawn[3], scale))
    (expected * weight).sum().backward()

    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    for (name, one), other in zip(layer.named_parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-11, rtol=0, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_one_seed_repeats_and_recomputing_draws_the_same(make_network, make_batch, precision):
    network, batch = make_network(dropout=0.3).train(), make_batch()

    def gradients(seed, *, recompute):
        trained = copy.deepcopy(network)
        trained.encoder.temporal.recompute = recompute
        torch.manual_seed(seed)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = trained(batch.images, batch.days, batch.valid)
        nn.functional.cross_entropy(logits, batch.labels).backward()
        return torch.cat([weight.grad.flatten() for weight in trained.parameters()])

    first = gradients(1, recompute=False)
    assert first.isfinite().all()
    assert torch.equal(first, gradients(1, recompute=False))
    assert torch.equal(first, gradients(1, recompute=True))
    assert (first - gradients(2, recompute=False)).abs().max() > 1e-4
