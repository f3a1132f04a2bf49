"""Metrics agree with hand-worked cases and with torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stcln_geo.errors import InputError
from stcln_geo.report.metrics import confusion_matrix, metrics_from_confusion


def test_counts_rows_truth_columns_prediction() -> None:
    truth = np.array([[0, 0, 1], [2, 255, 1]], dtype=np.uint8)
    prediction = np.array([[0, 1, 1], [0, 2, 2]], dtype=np.uint8)

    confusion = confusion_matrix(truth, prediction, classes=3)

    assert confusion.tolist() == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]


def test_figures_by_hand() -> None:
    # Class 0: 6 right of 8 true, 9 predicted; class 1: 5 of 8, 7; class 2: 3 of 4, 4.
    metrics = metrics_from_confusion(np.array([[6, 1, 1], [3, 5, 0], [0, 1, 3]]))

    assert metrics.overall_accuracy == pytest.approx(14 / 20)
    assert metrics.iou == pytest.approx([6 / 11, 5 / 10, 3 / 5])
    assert metrics.f1 == pytest.approx([12 / 17, 10 / 15, 6 / 8])
    assert metrics.users_accuracy == pytest.approx([6 / 9, 5 / 7, 3 / 4])
    assert metrics.producers_accuracy == pytest.approx([6 / 8, 5 / 8, 3 / 4])
    assert metrics.macro_miou == pytest.approx((6 / 11 + 5 / 10 + 3 / 5) / 3)
    assert metrics.macro_f1 == pytest.approx((12 / 17 + 10 / 15 + 6 / 8) / 3)
    chance = (8 * 9 + 8 * 7 + 4 * 4) / 400
    assert metrics.kappa == pytest.approx((0.7 - chance) / (1 - chance))
    assert metrics.support.tolist() == [8, 8, 4]
    assert metrics.pixels == 20


def test_class_absent_from_truth_and_prediction_stays_out_of_the_means() -> None:
    with_absent = metrics_from_confusion(np.array([[4, 0, 1], [0, 0, 0], [2, 0, 3]]))
    without = metrics_from_confusion(np.array([[4, 1], [2, 3]]))

    assert math.isnan(with_absent.iou[1])
    assert math.isnan(with_absent.f1[1])
    assert with_absent.macro_miou == pytest.approx(without.macro_miou)
    assert with_absent.macro_f1 == pytest.approx(without.macro_f1)
    assert with_absent.kappa == pytest.approx(without.kappa)


def test_macro_figures_over_the_first_classes_leave_all_else_as_it_is() -> None:
    whole = metrics_from_confusion(np.array([[6, 1, 1], [3, 5, 0], [0, 1, 3]]))

    part = whole.over(2)

    assert part.macro_miou == pytest.approx((6 / 11 + 5 / 10) / 2)
    assert part.macro_f1 == pytest.approx((12 / 17 + 10 / 15) / 2)
    assert part.overall_accuracy == whole.overall_accuracy == whole.summary()["overall_accuracy"]
    assert part.summary()["macro_miou"] == part.macro_miou
    assert part.iou.tolist() == whole.iou.tolist()


def test_agreement_by_chance_alone_has_no_kappa() -> None:
    alike = metrics_from_confusion(np.array([[5, 0], [0, 0]]))

    assert alike.overall_accuracy == 1
    assert math.isnan(alike.kappa)


def test_class_never_found_and_class_wrongly_predicted_count_as_zero() -> None:
    metrics = metrics_from_confusion(np.array([[4, 0, 1], [2, 0, 0], [0, 0, 0]]))

    assert metrics.iou.tolist() == pytest.approx([4 / 7, 0.0, 0.0])
    assert metrics.macro_miou == pytest.approx(4 / 21)
    assert math.isnan(metrics.users_accuracy[1])
    assert math.isnan(metrics.producers_accuracy[2])


def test_agrees_with_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    classification = pytest.importorskip("torchmetrics.functional.classification")
    generator = np.random.default_rng(7)
    truth = generator.integers(0, 5, 1234)
    prediction = np.where(generator.random(1234) < 0.6, truth, generator.integers(0, 5, 1234))
    metrics = metrics_from_confusion(confusion_matrix(truth, prediction, classes=5))
    pair = torch.from_numpy(prediction), torch.from_numpy(truth)
    none = {"num_classes": 5, "average": "none"}

    assert metrics.confusion.tolist() == (
        classification.multiclass_confusion_matrix(*pair, num_classes=5).tolist()
    )
    for ours, name in (
        (metrics.iou, "jaccard_index"),
        (metrics.f1, "f1_score"),
        (metrics.users_accuracy, "precision"),
        (metrics.producers_accuracy, "recall"),
    ):
        theirs = getattr(classification, f"multiclass_{name}")(*pair, **none)
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5, err_msg=name)
    kappa = classification.multiclass_cohen_kappa(*pair, num_classes=5)
    assert metrics.kappa == pytest.approx(float(kappa), rel=1e-5)


def test_summary_and_records_hold_no_nan() -> None:
    metrics = metrics_from_confusion(np.zeros((2, 2), dtype=np.int64))

    assert set(metrics.summary().values()) == {None}
    assert metrics.per_class(("a", "b"))[1] == {
        "code": 1,
        "name": "b",
        "iou": None,
        "f1": None,
        "users_accuracy": None,
        "producers_accuracy": None,
        "support_pixels": 0,
    }


def test_truth_beyond_the_classes_is_left_out_with_any_prediction() -> None:
    truth, prediction = np.array([2, 0, -1, 255, 1]), np.array([9, 0, -5, 1, 0])

    assert confusion_matrix(truth, prediction, classes=2).tolist() == [[1, 0], [1, 0]]
    assert not confusion_matrix(truth[2:4], prediction[2:4], classes=2).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint32])
def test_figures_are_of_shares_whatever_the_number_of_pixels(dtype: type) -> None:
    counts = np.array([[6, 1, 1], [3, 5, 0], [0, 1, 3]], dtype=dtype)

    few, many = (metrics_from_confusion(counts.astype(np.int64) * factor) for factor in (1, 10**15))

    assert many.summary() == pytest.approx(few.summary())
    np.testing.assert_allclose(many.iou, few.iou)
    small = metrics_from_confusion(counts)
    assert small.summary() == few.summary()
    assert small.confusion.dtype == small.support.dtype == np.int64


@pytest.mark.filterwarnings("error")
def test_what_has_no_figure_warns_of_nothing() -> None:
    nowhere = metrics_from_confusion(np.array([[4, 0, 1], [0, 0, 0], [2, 0, 3]]))

    assert np.isnan(nowhere.iou).tolist() == [False, True, False]
    assert math.isnan(nowhere.users_accuracy[1])
    assert math.isnan(metrics_from_confusion(np.zeros((2, 2), dtype=int)).macro_miou)


def test_refuses_what_would_flatter_or_mislead() -> None:
    for wrong in (255, 2, -1):
        with pytest.raises(InputError, match=f"prediction {wrong}:"):
            confusion_matrix(np.array([0, 1]), np.array([0, wrong]), classes=2)
    with pytest.raises(InputError, match="counts of 0 or more"):
        metrics_from_confusion(np.array([[4, -1], [0, 2]]))
    with pytest.raises(InputError, match="one prediction a pixel"):
        confusion_matrix(np.array([0, 1]), np.array([0]), classes=2)
    for shape in ((2, 3), (2, 2, 2), (4,)):
        with pytest.raises(InputError, match="square"):
            metrics_from_confusion(np.zeros(shape, dtype=np.int64))
    with pytest.raises(InputError, match="2 classes with 1 names"):
        metrics_from_confusion(np.eye(2, dtype=np.int64)).per_class(("a",))
