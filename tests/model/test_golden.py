"""Parity with numbers of the published network, in `reference` mode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from stcln_geo.model import (
    Encoder,
    MaskedPretrainer,
    Stcln,
    load_encoder_into,
    load_model,
    masked_loss,
    read_metadata,
    vegetated_dates,
)
from stcln_geo.model.reference import MTLCC_BANDS, PASTIS_BANDS, our_name


@pytest.fixture(scope="module")
def classifier(golden) -> Stcln:
    return load_model(golden / "pastis_model_best.tar")


@pytest.fixture(scope="module")
def numbers(golden) -> dict[str, np.ndarray]:
    with np.load(golden / "pastis_classifier_io.npz") as file:
        return dict(file)


def test_logits(classifier, numbers):
    with torch.no_grad():
        logits = classifier(torch.tensor(numbers["x"]), torch.tensor(numbers["positions"]))
    torch.testing.assert_close(logits, torch.tensor(numbers["logits"]), atol=1e-4, rtol=0)


def test_loss_and_gradient_norms(classifier, numbers):
    """The golden gradients were taken in evaluation mode: running statistics, no dropout."""
    classifier.zero_grad()
    logits = classifier(torch.tensor(numbers["x"]), torch.tensor(numbers["positions"]))
    loss = nn.functional.cross_entropy(
        logits, torch.tensor(numbers["y"]), weight=torch.tensor(numbers["class_weights"])
    )
    loss.backward()
    assert loss.item() == pytest.approx(float(numbers["loss"]), rel=1e-5)
    weights = dict(classifier.named_parameters())
    assert len(weights) == len(numbers["grad_names"])
    for name, norm in zip(numbers["grad_names"], numbers["grad_norms"], strict=True):
        ours = weights.pop(our_name(str(name), "classifier"))
        assert ours.grad.norm().item() == pytest.approx(norm, rel=1e-4), name


def test_live_parameters(classifier, golden):
    assert sum(weight.numel() for weight in classifier.parameters()) == 3_248_341
    info = read_metadata(golden / "pastis_model_best.tar")
    assert info.parameters == 3_248_341
    assert info.kind == "classifier"
    assert info.bands == PASTIS_BANDS
    assert info.config.classes == 20
    assert info.published
    # 129 entries: 56 parameters and 12 batch statistics are live.
    assert len(info.dropped) == 129 - 56 - 12
    assert {name.removeprefix("utae.").split(".")[0] for name in info.dropped} == {
        "up3",
        "temporal_encoder",
    }


def test_bare_encoder(golden):
    path = golden / "pastis_checkpoint_99.encoder.tar"
    encoder = load_model(path)
    assert isinstance(encoder, Encoder)
    assert not encoder.training
    assert len(read_metadata(path).dropped) == 123 - 50 - 12
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, 10, 5, 7), torch.arange(3)[None])
    assert features.shape == (1, 3, 256, 5, 7)


def test_mtlcc_bands_are_told_from_the_count(golden, tmp_path):
    state = torch.load(golden / "pastis_checkpoint_99.encoder.tar", weights_only=True)
    state["inc.double_conv.0.weight"] = torch.randn(32, 13, 3, 3)
    torch.save(state, tmp_path / "mtlcc.tar")
    assert read_metadata(tmp_path / "mtlcc.tar").bands == MTLCC_BANDS


@pytest.fixture(scope="module")
def pretrainer(golden) -> MaskedPretrainer:
    path = golden / "pastis_checkpoint_99.encoder.tar"
    network = MaskedPretrainer(read_metadata(path).config)
    load_encoder_into(network, path)
    with np.load(golden / "pastis_pretrain_head.npz") as head, torch.no_grad():
        network.token.copy_(torch.tensor(head["MASK_TOKEN"]))
        network.reconstruction.weight.copy_(torch.tensor(head["linear.weight"]))
        network.reconstruction.bias.copy_(torch.tensor(head["linear.bias"]))
    return network.eval()


def test_reconstruction_and_its_loss(golden, pretrainer):
    with np.load(golden / "pastis_pretrain_io.npz") as file:
        numbers = {name: torch.tensor(file[name]) for name in file.files}
    with torch.no_grad():
        made = pretrainer(numbers["x"], numbers["positions"], None, numbers["hidden"])
        loss = masked_loss(made, pretrainer.normalise(numbers["x"]), numbers["hidden"], None)
    torch.testing.assert_close(made, numbers["reconstruction"], atol=1e-5, rtol=1e-5)
    assert loss.item() == pytest.approx(float(numbers["loss"]), rel=1e-5)


def test_gate_opens_on_the_dates_that_hide_something(golden):
    with np.load(golden / "pastis_pretrain_io.npz") as file:
        x, hidden = torch.tensor(file["x"]), file["hidden"]
    red, nir = PASTIS_BANDS.index("red"), PASTIS_BANDS.index("nir")
    open_dates = vegetated_dates(x[:, :, red], x[:, :, nir], None)
    np.testing.assert_array_equal(open_dates.numpy(), hidden.any((2, 3)))


def test_published_pretrained_form(golden, pretrainer, tmp_path):
    """The third published form: encoder, mask token and both heads, one of them dead."""
    encoder = torch.load(golden / "pastis_checkpoint_99.encoder.tar", weights_only=True)
    with np.load(golden / "pastis_pretrain_head.npz") as head:
        state = {f"utae.{name}": value for name, value in encoder.items()} | {
            name: torch.tensor(head[name]) for name in head.files
        }
    torch.save({"epoch": 3, "model_state_dict": state}, tmp_path / "pretrained.tar")
    loaded = load_model(tmp_path / "pretrained.tar")
    info = read_metadata(tmp_path / "pretrained.tar")
    assert info.kind == "pretrainer"
    assert info.provenance["epoch"] == 3
    assert {"midlinear.weight", "midlinear.bias"} <= set(info.dropped)
    for name, value in pretrainer.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, msg=name)
