"""Kernels for GPUs against the plain parts: by the interpreter of Triton, and on a GPU."""

import copy

import pytest
import torch
import torch.nn.functional as F

from stcln_geo.model import Stcln, StclnConfig, fused, layers
from stcln_geo.model.space import _maximum_over_time

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton", reason="Triton is not installed: its kernels cannot be tried")

# Sequences, dates, width, heads: ragged, and one date; a width that is no power of two.
SHAPES = [(5, 7, 32, 2), (3, 33, 48, 3), (4, 1, 32, 2)]


@pytest.fixture(autouse=True)
def kernels_run(monkeypatch):
    if DEVICE == "cpu":
        monkeypatch.setattr(fused, "usable", lambda x, dates=1: x.dtype != torch.float64)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(4)


def draw(*shape):
    return torch.randn(*shape, device=DEVICE, requires_grad=True)


def draw_valid(sequences, dates, *, one_at_least):
    valid = torch.rand(sequences, dates, device=DEVICE) > 0.4
    valid[0] = False
    if one_at_least:
        valid[:, 0] = True
    return valid


def assert_same(results, expected, inputs, gradients):
    """Compare results, and gradients of inputs."""
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(results, inputs, gradients)
    theirs = torch.autograd.grad(expected, inputs, gradients)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1, other.abs().max()))


def with_norm(norm):
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    return norm.to(DEVICE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sequences", "dates", "dim", "heads"), [SHAPES[0], (2, 33, 32, 2)])
def test_attention_is_that_of_torch(sequences, dates, dim, heads, masked):
    projected = draw(sequences, dates, 3 * dim)
    keys = draw_valid(sequences, dates, one_at_least=True) if masked else None
    parts = projected.view(sequences, dates, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mask = None if keys is None else keys[:, None, None, :]
    expected = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    expected = expected.transpose(1, 2).reshape(sequences, dates, dim)
    made = fused.attend(projected, heads, keys, 0.0)
    assert_same([made], [expected], [projected], [torch.randn_like(made)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sequences", "dates", "dim", "heads"), SHAPES)
def test_a_sum_is_normalised_in_two_types(sequences, dates, dim, heads, masked):
    x, change = draw(sequences, dates, dim), draw(sequences, dates, dim)
    norm = with_norm(layers.FullLayerNorm(dim))
    valid = draw_valid(sequences, dates, one_at_least=False) if masked else None
    expected = norm(x + change)
    if valid is not None:
        expected = expected * valid[..., None]
    low = x.detach().bfloat16()
    wide, narrow = fused.add_norm(x, change, norm, 0.0, low=low, valid=valid)
    torch.testing.assert_close(narrow.float(), expected, rtol=1e-2, atol=1e-2)
    gradient = torch.randn_like(wide)
    inputs = [x, change, norm.weight, norm.bias]
    assert_same([wide], [expected], inputs, [gradient])

    # Gradients of both results add up.
    both = fused.add_norm(x, change, norm, 0.0, low=low, valid=valid)
    mine = torch.autograd.grad(both, inputs, [gradient, gradient.bfloat16()])
    total = gradient + gradient.bfloat16().float()
    expected = norm(x + change) if valid is None else norm(x + change) * valid[..., None]
    for one, other in zip(mine, torch.autograd.grad(expected, inputs, total), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sequences", "dates", "dim", "heads"), SHAPES)
def test_groups_are_normalised_over_valid_dates(sequences, dates, dim, heads, masked):
    x, table = draw(sequences, dates, dim), torch.randn(2, dates, dim, device=DEVICE)
    sample = torch.randint(2, (sequences,), device=DEVICE)
    norm = with_norm(layers.PixelGroupNorm(dim, heads))
    valid = draw_valid(sequences, dates, one_at_least=False) if masked else None
    into = torch.empty_like(x.detach()), torch.empty_like(x.detach(), dtype=torch.bfloat16)
    wide, narrow = fused.group_norm(x, norm, valid, table, sample, into=into)
    torch.testing.assert_close(narrow, wide.bfloat16())
    expected = norm(x, valid) + table[sample]
    inputs = [x, norm.weight, norm.bias]
    assert_same([wide], [expected], inputs, [torch.randn_like(wide)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("sequences", "dates", "dim", "heads"), SHAPES)
def test_the_largest_of_the_valid_dates(sequences, dates, dim, heads, masked):
    x = draw(sequences, dates, dim).detach()
    valid = draw_valid(sequences, dates, one_at_least=False) if masked else None
    expected = _maximum_over_time(x[None], None if valid is None else valid[None])[0]
    torch.testing.assert_close(fused.maximum_over_dates(x, valid), expected, rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_with_relu_follows_the_valid_pixels(masked):
    x = draw(4, 24, 5, 7)
    norm = with_norm(layers.MaskedBatchNorm2d(24))
    plain = copy.deepcopy(norm)
    # As of one sample: a view whose values do not lie in order.
    valid = (torch.rand(5, 7, 4, device=DEVICE) > 0.3).permute(2, 0, 1)[:, None] if masked else None
    expected = F.relu(plain(x, valid))
    if valid is not None:
        expected = expected * valid
    made = norm.with_relu(x, valid)
    gradient = torch.randn_like(made)
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
    mine = torch.autograd.grad(made, [x, norm.weight, norm.bias], gradient)
    theirs = torch.autograd.grad(expected, [x, plain.weight, plain.bias], gradient)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    for one, other in zip(norm.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_valid_pixel_running_statistics_stay():
    norm = with_norm(layers.MaskedBatchNorm2d(16))
    before = [buffer.clone() for buffer in norm.buffers()]
    nothing = torch.zeros(2, 1, 3, 3, dtype=torch.bool, device=DEVICE)
    assert not norm.with_relu(draw(2, 16, 3, 3), nothing).any()
    for one, other in zip(norm.buffers(), before, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_dropout_keeps_its_share_and_repeats_with_its_seed():
    x = torch.randn(40, 100, device=DEVICE)
    torch.manual_seed(1)
    made = fused.relu_drop(x.clone(), 0.3)
    above = x > 0
    kept = made > 0
    torch.testing.assert_close(made[kept], x[kept], rtol=0, atol=0)
    assert not kept[~above].any()
    assert kept[above].float().mean().item() == pytest.approx(0.7, abs=0.05)
    torch.manual_seed(1)
    torch.testing.assert_close(fused.relu_drop(x.clone(), 0.3), made, rtol=0, atol=0)
    assert not torch.equal(fused.relu_drop(x.clone(), 0.3), made)


def test_what_is_dropped_of_a_change_has_no_gradient():
    x, change = draw(6, 9, 32), draw(6, 9, 32)
    norm = with_norm(layers.FullLayerNorm(32))
    wide, _ = fused.add_norm(x, change, norm, 0.4, low=x.detach())
    gradient = torch.randn_like(wide)
    of_x, of_change = torch.autograd.grad(wide, [x, change], gradient)
    kept = of_change != 0
    assert kept.float().mean().item() == pytest.approx(0.6, abs=0.06)
    expected = norm(x + change * kept / 0.6)
    torch.testing.assert_close(wide, expected, rtol=1e-4, atol=1e-5)
    theirs = torch.autograd.grad(expected, [x, change], gradient)
    torch.testing.assert_close(of_x, theirs[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(of_change, theirs[1], rtol=1e-4, atol=1e-5)


def test_dropped_weights_of_attention_have_the_gradients_of_differences():
    projected = draw(2, 5, 3 * 32)
    direction, gradient = torch.randn_like(projected), torch.randn(2, 5, 32, device=DEVICE)

    def run(x):
        torch.manual_seed(3)
        return fused.attend(x, 2, None, 0.3)

    assert not torch.equal(run(projected), fused.attend(projected, 2, None, 0.0))
    (made,) = torch.autograd.grad(run(projected), projected, gradient)
    with torch.no_grad():
        step = 1e-2 * direction
        apart = run(projected + step).double() - run(projected - step).double()
    slope = (apart * gradient).sum() / 2e-2
    torch.testing.assert_close((made.double() * direction).sum(), slope, rtol=5e-3, atol=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["geo", "reference"])
def test_the_network_is_the_same_with_kernels_and_without(monkeypatch, mode):
    """Dropout off: loss, gradients, and logits with and without gradients; one sample."""
    config = StclnConfig.preset("tiny", bands=tuple("abcde"), classes=4, mode=mode)
    network = Stcln(config).to(DEVICE)
    with torch.no_grad():
        network.attention.gate.fill_(0.5)
    images = torch.rand(1, 5, 5, 4, 6, device=DEVICE)
    days = 6 * torch.arange(5, device=DEVICE)[None]
    valid = torch.rand(1, 5, 4, 6, device=DEVICE) > 0.4
    valid[:, :, 0, 0] = False
    labels = torch.randint(4, (1, 4, 6), device=DEVICE)

    def run():
        own = copy.deepcopy(network).train()
        loss = F.cross_entropy(own(images, days, valid), labels)
        loss.backward()
        own.eval()
        with torch.inference_mode():
            logits = own(images, days, valid)
        torch.testing.assert_close(own(images, days, valid), logits, rtol=1e-4, atol=1e-4)
        return [loss.detach(), logits, *(weight.grad for weight in own.parameters())]

    mine = run()
    monkeypatch.setattr(fused, "usable", lambda x, dates=1: False)
    for one, other in zip(mine, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * max(1e-3, other.abs().max()))
