"""The published metric and ours, on cases counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stcln_geo.errors import InputError
from stcln_geo.report.metrics import confusion_matrix, metrics_from_confusion
from stcln_geo.report.published import published_metrics


def counted(pairs: dict[tuple[int, int], int], *, classes: int) -> np.ndarray:
    """Return a confusion matrix from pixels by (truth, prediction)."""
    truth = np.repeat([pair[0] for pair in pairs], list(pairs.values()))
    prediction = np.repeat([pair[1] for pair in pairs], list(pairs.values()))
    return confusion_matrix(truth, prediction, classes=classes)


PASTIS = {
    (0, 0): 50, (0, 1): 7,  # background: not scored, whatever was predicted
    (19, 2): 9,  # void
    (1, 1): 6, (1, 2): 2, (1, 0): 4,  # meadow, some of it taken for background
    (2, 2): 5, (2, 1): 1, (2, 19): 2,  # wheat, some of it taken for void
    (3, 0): 3,  # corn, never found
    (5, 8): 1, (5, 5): 1,  # rapeseed, one pixel taken for grapevine, which does not occur
}  # fmt: skip


def test_pastis_by_hand() -> None:
    found = published_metrics(counted(PASTIS, classes=20), rule="pastis")
    assert found.pixels == 12 + 8 + 3 + 2
    assert found.overall_accuracy == pytest.approx((6 + 5 + 0 + 1) / 25)
    # Predictions of 0, 19 and 8 are missing from the unions: corn has none left, and drops out.
    meadow, wheat, rapeseed = 6 / (6 + 2 + 1), 5 / (5 + 2 + 1), 1 / 1
    assert found.miou == pytest.approx((meadow + wheat + rapeseed) / 3)
    assert found.classes == 4
    # F1 over 1, 2, 3, 5 and the strays 0, 8, 19.
    f1 = [2 * 6 / (12 + 7), 2 * 5 / (8 + 7), 0, 2 * 1 / (2 + 1), 0, 0, 0]
    assert found.f1 == pytest.approx(np.mean(f1))
    chance = (12 * 7 + 8 * 7 + 3 * 0 + 2 * 1) / 25**2
    assert found.kappa == pytest.approx((12 / 25 - chance) / (1 - chance))


def test_ours_counts_what_the_published_rule_leaves_out() -> None:
    """The same pixels, scored over classes 1 to 18 with every wrong prediction an error."""
    counts = counted(PASTIS, classes=20)
    counts[[0, 19]] = 0  # the truth is ignored here too: such pixels carry no target
    ours = metrics_from_confusion(counts)
    assert ours.overall_accuracy == pytest.approx(12 / 25)
    assert ours.iou[1] == pytest.approx(6 / (12 + 7 - 6)), "taken for background is an error"
    assert ours.iou[2] == pytest.approx(5 / (8 + 7 - 5))
    assert ours.iou[3] == 0
    assert ours.iou[5] == pytest.approx(1 / 2)
    assert ours.macro_miou < published_metrics(counts, rule="pastis").miou


def test_mtlcc_by_hand() -> None:
    pairs = {
        (0, 3): 11,  # unknown
        (3, 3): 8, (3, 0): 5,  # meadow; what is taken for unknown disappears
        (4, 4): 2, (4, 3): 2,
        (6, 0): 4,  # disappears altogether
    }  # fmt: skip
    found = published_metrics(counted(pairs, classes=18), rule="mtlcc")
    assert found.pixels == 12
    assert found.overall_accuracy == pytest.approx(10 / 12)
    assert found.miou == pytest.approx((8 / 10 + 2 / 4) / 2)
    assert found.f1 == pytest.approx((2 * 8 / (8 + 10) + 2 * 2 / (4 + 2)) / 2)

    strict = counted(pairs, classes=18)
    strict[0] = 0
    ours = metrics_from_confusion(strict)
    assert ours.overall_accuracy == pytest.approx(10 / 21)
    assert ours.iou[3] == pytest.approx(8 / 15)
    assert ours.iou[6] == 0


def test_where_nothing_strays_the_two_agree() -> None:
    rng = np.random.default_rng(5)
    counts = np.zeros((20, 20), dtype=np.int64)
    counts[1:19, 1:19] = rng.integers(1, 50, (18, 18))
    ours = metrics_from_confusion(counts)
    for rule in ("pastis", "mtlcc"):
        theirs = published_metrics(counts[:19, :19] if rule == "mtlcc" else counts, rule=rule)
        assert theirs.overall_accuracy == pytest.approx(ours.overall_accuracy)
        assert theirs.miou == pytest.approx(ours.macro_miou)
        assert theirs.f1 == pytest.approx(ours.macro_f1)
        assert theirs.kappa == pytest.approx(ours.kappa)


def test_nothing_to_score() -> None:
    found = published_metrics(np.zeros((20, 20), dtype=np.int64), rule="pastis")
    assert math.isnan(found.miou)
    assert math.isnan(found.overall_accuracy)
    assert found.pixels == 0


@pytest.mark.parametrize(
    ("shape", "rule", "words"),
    [
        ((18, 18), "pastis", "19 included"), ((3, 4), "mtlcc", "square"),
        ((20, 20), "eurocrops", "one of"),
    ],
    ids=["too few", "not square", "unknown"],
)  # fmt: skip
def test_what_cannot_be_scored(shape: tuple[int, int], rule: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        published_metrics(np.zeros(shape, dtype=np.int64), rule=rule)  # type: ignore[arg-type]
