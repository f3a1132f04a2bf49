"""Losses are what their papers say, leave ignored pixels out, and add up over batches."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch

from stcln_geo.errors import InputError
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.losses import (
    ClassWeights,
    LossKind,
    classification_error,
    make_class_weights,
    weight_of,
)

WEIGHTS = torch.tensor([0.5, 1.0, 2.0])
KINDS = get_args(LossKind)


def make_chips(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four chips of 5 x 7 px and three classes: one with a single pixel, one with none."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(4, 3, 5, 7, generator=generator)
    target = torch.randint(0, 3, (4, 5, 7), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.4] = -100
    target[0][target[0] == 1] = -100
    target[2] = -100
    target[2, 3, 4] = 2
    target[3] = -100
    return logits, target


def mean_error(
    logits: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, kind: LossKind = "dice"
) -> float:
    """Divide as a step does."""
    total = classification_error(logits, target, weights=weights, kind=kind)
    return float(total / weight_of(target, weights))


def focal_by_pixel(logits: torch.Tensor, target: torch.Tensor, gamma: float) -> float:
    total = 0.0
    for chip, row, col in itertools.product(*map(range, target.shape)):
        truth = int(target[chip, row, col])
        if truth != -100:
            scores = [math.exp(value) for value in logits[chip, :, row, col].tolist()]
            share = scores[truth] / sum(scores)
            total += float(WEIGHTS[truth]) * (1 - share) ** gamma * -math.log(share)
    return total


def dice_by_chip(logits: torch.Tensor, target: torch.Tensor) -> float:
    total = 0.0
    for chip in range(len(target)):
        known = target[chip] != -100
        shares, truth = logits[chip].softmax(0)[:, known].double(), target[chip][known]
        errors, says = [], []
        for code in truth.unique().tolist():
            mine = truth == code
            overlap = 2 * float(shares[code][mine].sum())
            errors.append(1 - overlap / (float(shares[code].sum()) + int(mine.sum())))
            says.append(float(WEIGHTS[code]))
        if says:
            mean = sum(say * error for say, error in zip(says, errors, strict=True)) / sum(says)
            total += mean * float(WEIGHTS[truth].sum())
    return total


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_the_sum_over_pixels(gamma: float) -> None:
    logits, target = make_chips()

    found = classification_error(logits, target, weights=WEIGHTS, kind="focal", gamma=gamma)

    assert float(found) == pytest.approx(focal_by_pixel(logits, target, gamma), rel=1e-5)
    if gamma == 0:
        entropy = classification_error(logits, target, weights=WEIGHTS)
        assert float(found) == pytest.approx(float(entropy), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_the_weighted_sum_over_pixels(smoothing: float) -> None:
    logits, target = make_chips()

    found = classification_error(logits, target, weights=WEIGHTS, label_smoothing=smoothing)

    total = 0.0
    for chip, row, col in itertools.product(*map(range, target.shape)):
        truth = int(target[chip, row, col])
        if truth != -100:
            scores = logits[chip, :, row, col].double()
            costs = -WEIGHTS * (scores - scores.logsumexp(0))
            total += float((1 - smoothing) * costs[truth] + smoothing * costs.mean())
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_focal_has_a_gradient_where_the_network_is_sure() -> None:
    logits = torch.tensor([200.0, 0.0, 0.0]).view(1, 3, 1, 1).requires_grad_()
    for truth in (0, 1):
        target = torch.full((1, 1, 1), truth)
        error = classification_error(logits, target, weights=WEIGHTS, kind="focal", gamma=0.5)
        (gradient,) = torch.autograd.grad(error, logits)
        assert torch.isfinite(gradient).all()
        assert bool(gradient.abs().max() > 0.1) == (truth == 1)


def test_dice_is_a_number_for_each_chip() -> None:
    logits, target = make_chips()

    found = classification_error(logits, target, weights=WEIGHTS, kind="dice")

    assert float(found) == pytest.approx(dice_by_chip(logits, target), rel=1e-5)
    assert 0 < mean_error(logits, target, WEIGHTS) < 1
    # By hand: p(true) is 3/4 on one pixel of each of two classes, and 1/4 on a second of class 0.
    sure = math.log(3)
    by_hand = torch.tensor([[sure, 0.0], [0.0, sure], [0.0, sure]]).T.view(1, 2, 1, 3)
    truth = torch.tensor([[[0, 1, 0]]])
    dice = (2 * (0.75 + 0.25) / (1.25 + 2), 2 * 0.75 / (1.75 + 1))
    error = mean_error(by_hand, truth, torch.ones(2))
    assert error == pytest.approx(1 - sum(dice) / 2, rel=1e-6)
    right = 50.0 * torch.nn.functional.one_hot(truth, 2).movedim(-1, 1)
    assert mean_error(right, truth, torch.ones(2)) == pytest.approx(0, abs=1e-6)


def test_both_is_the_sum_of_both() -> None:
    logits, target = make_chips()

    def error(kind: LossKind, smoothing: float = 0.0) -> float:
        return float(
            classification_error(
                logits, target, weights=WEIGHTS, kind=kind, label_smoothing=smoothing
            )
        )

    both = error("cross-entropy+dice", 0.1)
    assert both == pytest.approx(error("cross-entropy", 0.1) + error("dice"), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_chips_add_up_however_they_are_cut(kind: LossKind) -> None:
    logits, target = make_chips()

    whole = classification_error(logits, target, weights=WEIGHTS, kind=kind)
    parts = [
        classification_error(logits[part], target[part], weights=WEIGHTS, kind=kind)
        for part in (slice(0, 1), slice(1, 4))
    ]

    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-6)
    counted = sum(float(WEIGHTS[code]) for code in target[target != -100].tolist())
    assert float(weight_of(target, WEIGHTS)) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_ignored_pixels_take_no_part(kind: LossKind) -> None:
    logits, target = make_chips()
    other = torch.where((target == -100)[:, None], 9 * torch.randn_like(logits), logits)
    found = []
    for values in (logits, other):
        leaf = values.clone().requires_grad_()
        error = classification_error(leaf, target, weights=WEIGHTS, kind=kind)
        found.append((float(error.detach()), *torch.autograd.grad(error, leaf)))

    assert found[1][0] == pytest.approx(found[0][0], rel=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-7)
    assert not found[0][1].movedim(1, -1)[target == -100].any()
    assert found[0][1].movedim(1, -1)[target != -100].abs().sum(-1).min() > 0
    none = torch.full_like(target, -100)
    assert float(classification_error(logits, none, weights=WEIGHTS, kind=kind)) == 0
    assert float(weight_of(none, WEIGHTS)) == 0


def test_weights_by_effective_number() -> None:
    pixels = [10, 0, 1000, 100_000]

    found = make_class_weights("effective-number", pixels, beta=0.99)

    raw = [(1 - 0.99) / (1 - 0.99**count) if count else 0.0 for count in pixels]
    assert found.tolist() == pytest.approx([value / (sum(raw) / 3) for value in raw], rel=1e-5)
    # Beyond 1 / (1 - beta) pixels, more change little; without any such end it is 1 / n.
    assert float(found[2] / found[3]) == pytest.approx(1, rel=1e-3)
    nearly = make_class_weights("effective-number", pixels, beta=1 - 1e-12)
    assert float(nearly[0] / nearly[3]) == pytest.approx(10_000, rel=1e-3)
    alike = make_class_weights("effective-number", pixels, beta=0)
    assert alike.tolist() == [1, 0, 1, 1]
    root = make_class_weights("inverse-sqrt", pixels)
    assert float(root[0] / root[3]) == pytest.approx(100)
    assert float(root.sum()) == pytest.approx(3)
    assert make_class_weights("none", pixels).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", get_args(ClassWeights))
@pytest.mark.parametrize("beta", [0, 0.9])
def test_a_class_of_one_pixel_occurs_and_weighs_most(kind: ClassWeights, beta: float) -> None:
    found = make_class_weights(kind, [1, 7, 0, 40], beta=beta)

    assert found.dtype == torch.float32
    assert float(found[[0, 1, 3]].mean()) == pytest.approx(1)
    assert float(found[0]) == float(found.max()) >= float(found[1]) >= float(found[3]) > 0


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_low_precision_are_judged_in_float32(kind: LossKind) -> None:
    logits, target = make_chips()
    low = logits.bfloat16()

    found = classification_error(low, target, weights=WEIGHTS, kind=kind)

    assert found.dtype == torch.float32
    exact = classification_error(low.double().float(), target, weights=WEIGHTS, kind=kind)
    assert float(found) == pytest.approx(float(exact), rel=1e-6)


@pytest.mark.parametrize("kind", ["focal", "dice"])
def test_smoothing_without_cross_entropy_is_refused(kind: str) -> None:
    options: dict[str, Any] = {"loss.kind": kind, "loss.label_smoothing": 0.1}
    with pytest.raises(InputError, match=rf"belongs to cross-entropy, and kind is {kind}"):
        load_config(FinetuneConfig, overrides=options)
    load_config(FinetuneConfig, overrides={**options, "loss.kind": "cross-entropy+dice"})
