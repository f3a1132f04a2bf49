"""What inference does for speed changes nothing: it equals the plain ways that training takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stcln_geo.model import Stcln, inference
from stcln_geo.model.inference import prepare_layers
from stcln_geo.model.layers import ConvBlock, TransformerLayer
from stcln_geo.model.stcln import Encoder

precisions = pytest.mark.parametrize(
    ("dtype", "atol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
masking = pytest.mark.parametrize("masked", [True, False], ids=["valid", "all"])


def plainly(network, *inputs):
    """Run in evaluation as if a backward pass followed."""
    with torch.enable_grad():
        return network(*inputs).detach()


def quickly(network, *inputs):
    with torch.inference_mode():
        return network(*inputs).clone()


@precisions
@masking
def test_a_folded_norm_equals_the_norm(dtype, atol, masked):
    torch.manual_seed(0)
    block = ConvBlock(3, 11).to(dtype).eval()
    for tensor in (block.norm.weight, block.norm.bias, block.norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(block.norm.running_var, 0.1, 4.0)
    x = torch.randn(2, 3, 7, 9, dtype=dtype)
    valid = torch.rand(2, 1, 7, 9) > 0.4 if masked else None
    folded = quickly(block, x, valid)
    torch.testing.assert_close(folded, plainly(block, x, valid), atol=atol, rtol=0)
    weight, bias = block.norm.fold(block.convolution.weight)
    assert weight.shape == (11, 3, 3, 3)
    assert bias.count_nonzero() == 11


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@precisions
@masking
def test_prepared_layers_equal_the_layers(monkeypatch, dtype, atol, masked, packed):
    if not packed:
        monkeypatch.setattr(inference, "_pack", lambda _: None)
    torch.manual_seed(0)
    layers = nn.ModuleList([TransformerLayer(32, 4, 64, 0.1) for _ in range(2)]).to(dtype).eval()
    x = torch.randn(13, 7, 32, dtype=dtype)
    keys = torch.rand(13, 7) > 0.5
    keys[:, 2] = True
    keys = keys if masked else None
    expected, found = x, x.clone()
    with torch.inference_mode():
        for layer, ready in zip(layers, prepare_layers(layers, x), strict=True):
            expected, found = layer(expected, keys), ready(found, keys)
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


@masking
@pytest.mark.parametrize("dates", [5, 30])
def test_prepared_layers_in_bfloat16_are_no_rougher_than_autocast(masked, dates):
    """Against float64, the plain attention of bfloat16 errs no more than the fused one."""
    torch.manual_seed(0)
    layer = TransformerLayer(64, 4, 128, 0.0).eval()
    nn.init.normal_(layer.attention.projection.weight, std=0.25)  # weights far from uniform
    x = torch.randn(50, dates, 64)
    keys = torch.rand(50, dates) > 0.4
    keys[:, 1] = True
    keys = keys if masked else None
    exact = copy.deepcopy(layer).double()
    with torch.inference_mode():
        truth = exact(x.double(), keys)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused = layer(x, keys)
            (ready,) = prepare_layers([layer], x)
            plain = ready(x.clone(), keys)
    assert plain.dtype == torch.float32
    fused_error, plain_error = ((made - truth).abs().mean() for made in (fused, plain))
    assert 0 < plain_error < 1.5 * fused_error


@precisions
@masking
@pytest.mark.parametrize("mode", ["geo", "reference"])
def test_inference_equals_evaluation_with_gradients(
    make_network, make_batch, mode, masked, dtype, atol
):
    network, batch = make_network(mode=mode, dtype=dtype).eval(), make_batch(dtype=dtype)
    inputs = (batch.images, batch.days, batch.valid if masked else None)
    torch.testing.assert_close(
        quickly(network, *inputs), plainly(network, *inputs), atol=atol, rtol=0
    )


def test_the_ways_without_gradients_are_taken(make_network, make_batch, monkeypatch):
    """Else the other tests here would compare a thing with itself."""
    network, batch = make_network().eval(), make_batch()
    seen = []
    monkeypatch.setattr(ConvBlock, "_folded", lambda self, x, valid: seen.append(1) or x)
    with pytest.raises(RuntimeError):  # bands in place of features fit nothing further on
        quickly(network, batch.images, batch.days, batch.valid)
    assert len(seen) == 4
    plainly(network, batch.images, batch.days, batch.valid)
    quickly(copy.deepcopy(network).train(), batch.images, batch.days, batch.valid)
    assert len(seen) == 4


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_equal_inputs_give_equal_bits_and_stay_as_they_are(make_network, make_batch, precision):
    network, batch = make_network("base").eval(), make_batch()
    before = copy.deepcopy(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        first = quickly(network, batch.images, batch.days, batch.valid)
        again = quickly(network, batch.images, batch.days, batch.valid)
    assert torch.equal(first, again)
    for name in ("images", "days", "valid"):
        assert torch.equal(getattr(batch, name), getattr(before, name)), name


def test_nothing_outlives_a_pass(make_network, make_batch):
    """Weights and statistics that change between two passes count at once."""
    network, batch = make_network().eval(), make_batch()
    inputs = (batch.images, batch.days, batch.valid)
    first = quickly(network, *inputs)
    with torch.no_grad():
        network.encoder.convolutions.blocks[2].norm.running_mean.add_(0.3)
        network.encoder.temporal.layers[0].expand.weight.mul_(1.5)
    changed = quickly(network, *inputs)
    assert (changed - first).abs().max() > 1e-3
    torch.testing.assert_close(changed, plainly(network, *inputs), atol=1e-5, rtol=0)


def test_features_before_the_transformer_are_not_written_over(make_config, make_batch):
    torch.manual_seed(0)
    encoder, batch = Encoder(make_config()).eval(), make_batch()
    inputs = encoder.normalise(batch.images, batch.valid)
    with torch.inference_mode():
        found = encoder.encode(inputs, batch.days, batch.valid)
    with torch.enable_grad():
        expected = encoder.encode(inputs, batch.days, batch.valid)
    torch.testing.assert_close(found.spatial, expected.spatial.detach(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.temporal, expected.temporal.detach(), atol=1e-5, rtol=0)


@pytest.mark.slow
def test_bfloat16_and_float32_agree_in_the_labels_of_a_trained_network(make_config):
    """Classes are told by the date of their green peak; one pixel in a hundred may differ."""
    torch.manual_seed(0)
    network = Stcln(make_config()).train()
    network.encoder.set_normalisation([0.3] * 4, [0.2] * 4)
    days = torch.arange(12)[None].expand(4, -1) * 25

    def chips(seed):
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.randint(5, (4, 4, 4), generator=generator)
        labels = blocks.repeat_interleave(5, 1).repeat_interleave(5, 2)
        peak = 40.0 + 50 * labels[:, None]
        green = torch.exp(-(((days[:, :, None, None] - peak) / 60) ** 2))[:, :, None]
        images = 0.2 + 0.4 * green + 0.08 * torch.randn(4, 12, 4, 20, 20, generator=generator)
        return images, torch.rand(4, 12, 20, 20, generator=generator) > 0.3, labels

    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(80):
        images, valid, labels = chips(step)
        nn.functional.cross_entropy(network(images, days, valid), labels).backward()
        optimiser.step()
        optimiser.zero_grad()
    network.eval()
    assert network.attention.gate.abs() > 1e-3
    agreeing = correct = 0.0
    for seed in (1000, 1001, 1002):
        images, valid, labels = chips(seed)
        exact = quickly(network, images, days, valid).argmax(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = quickly(network, images, days, valid).argmax(1)
        agreeing += (exact == rough).float().mean().item() / 3
        correct += (exact == labels).float().mean().item() / 3
    assert correct > 0.8
    assert agreeing >= 0.99
