"""Estimators: published examples, a case by hand, and the coverage of their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stcln_geo.errors import InputError
from stcln_geo.report.area import estimate_accuracy
from stcln_geo.report.metrics import confusion_matrix, metrics_from_confusion

OLOFSSON = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
"""Sample counts of Olofsson et al. 2014, table 8: rows the map, columns the reference."""
OLOFSSON_PIXELS = np.array([200_000, 150_000, 3_200_000, 6_450_000])

STEHMAN = {
    "strata": "A" * 10 + "B" * 10 + "C" * 10 + "D" * 10,
    "map": "A" * 7 + "B" * 3 + "A" + "B" * 11 + "C" * 6 + "BB" + "D" * 10,
    "truth": "AAAAACBABC" + "ABBBBBAABB" + "CCCCCDDBBA" + "DDDDDDDCCB",
}
"""Forty pixels in the manner of Stehman 2014: strata that are not the map's classes.

The map's classes in C were set so that the published estimates come out; what this sample tests
of its own are the standard errors.
"""


def units(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the truth and the map of each unit of counts (map, truth)."""
    mapped, truth = np.nonzero(counts)
    number = counts[mapped, truth]
    return np.repeat(truth, number), np.repeat(mapped, number)


def codes(letters: str) -> np.ndarray:
    return np.array(["ABCD".index(letter) for letter in letters])


def producers_variances() -> list[float]:
    """Equation 7 of Olofsson et al. 2014, written out."""
    number, pixels = OLOFSSON.sum(axis=1), OLOFSSON_PIXELS
    columns = (pixels[:, None] * OLOFSSON / number[:, None]).sum(axis=0)
    found = []
    for j in range(4):
        user = OLOFSSON[j, j] / number[j]
        producer = pixels[j] * user / columns[j]
        first = pixels[j] ** 2 * (1 - producer) ** 2 * user * (1 - user) / (number[j] - 1)
        share = np.delete(OLOFSSON[:, j] / number, j)
        others = np.delete(pixels**2, j) * share * (1 - share) / np.delete(number - 1, j)
        found.append((first + producer**2 * others.sum()) / columns[j] ** 2)
    return found


def test_published_example_with_the_maps_classes_as_strata():
    truth, mapped = units(OLOFSSON)
    found = estimate_accuracy(
        truth, mapped, classes=4, strata=mapped, stratum_areas=OLOFSSON_PIXELS
    )
    half = [1.96 * one.standard_error for one in (found.overall_accuracy, *found.users_accuracy)]
    assert found.overall_accuracy.value == pytest.approx(0.947, abs=5e-4)
    assert [round(one.value, 2) for one in found.users_accuracy] == [0.88, 0.73, 0.93, 0.96]
    assert [round(one, 2) for one in half] == [0.02, 0.07, 0.10, 0.04, 0.02]
    assert [round(one.value, 2) for one in found.producers_accuracy] == [0.75, 0.85, 0.93, 0.96]
    for one, variance in zip(found.producers_accuracy, producers_variances(), strict=True):
        assert one.standard_error == pytest.approx(math.sqrt(variance))
    # A pixel of 30 m has 0.09 ha: deforestation 21,158 ha -+ 6,158 ha, and so on.
    hectares = [one.times(OLOFSSON_PIXELS.sum() * 0.09) for one in found.area_share]
    assert [round(one.value) for one in hectares] == [21158, 11686, 285770, 581386]
    half = [round(1.96 * one.standard_error) for one in hectares]
    assert half == pytest.approx([6158, 3756, 15510, 16282], abs=1)


def producers_error_of_b() -> float:
    """Equation 28 of Stehman 2014 for the producer's accuracy of B, with variances per stratum."""
    strata, mapped, truth = (np.array(list(STEHMAN[name])) for name in ("strata", "map", "truth"))
    x = (truth == "B").astype(float)
    y = x * (mapped == "B")
    pixels = {"A": 40_000, "B": 30_000, "C": 20_000, "D": 10_000}
    total_y = sum(n * y[strata == h].mean() for h, n in pixels.items())
    total_x = sum(n * x[strata == h].mean() for h, n in pixels.items())
    ratio, variance = total_y / total_x, 0.0
    for h, n in pixels.items():
        here = np.cov(y[strata == h], x[strata == h])
        spread = here[0, 0] + ratio**2 * here[1, 1] - 2 * ratio * here[0, 1]
        variance += n**2 * (1 - 10 / n) * spread / 10
    return math.sqrt(variance) / total_x


def test_published_example_with_other_strata():
    found = estimate_accuracy(
        codes(STEHMAN["truth"]),
        codes(STEHMAN["map"]),
        classes=4,
        strata=codes(STEHMAN["strata"]),
        stratum_areas=np.array([40_000, 30_000, 20_000, 10_000]),
        stratum_units=np.array([40_000, 30_000, 20_000, 10_000]),
    )
    figures = (
        found.area_share[0], found.area_share[2], found.overall_accuracy,
        found.users_accuracy[1], found.producers_accuracy[1],
    )  # fmt: skip
    assert [round(one.value, 3) for one in figures] == [0.35, 0.20, 0.63, 0.574, 0.794]
    assert [round(one.standard_error, 3) for one in figures[:4]] == [0.082, 0.064, 0.085, 0.125]
    assert figures[4].standard_error == pytest.approx(producers_error_of_b())
    assert found.proportions[2, 1] == pytest.approx(0.08)


def test_a_case_by_hand():
    """Two strata of 60 and 40 percent; 3 of 4 and 4 of 5 units are right."""
    truth = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0])
    mapped = np.array([0, 0, 0, 0, 1, 1, 1, 1, 1])
    found = estimate_accuracy(
        truth, mapped, classes=2, strata=mapped, stratum_areas=np.array([60.0, 40.0])
    )
    assert found.overall_accuracy.value == pytest.approx(0.6 * 0.75 + 0.4 * 0.8)
    variance = 0.36 * 0.75 * 0.25 / 3 + 0.16 * 0.8 * 0.2 / 4
    assert found.overall_accuracy.standard_error == pytest.approx(math.sqrt(variance))
    np.testing.assert_allclose(found.proportions, [[0.45, 0.08], [0.15, 0.32]])
    assert found.area_share[0].value == pytest.approx(0.53)
    assert found.producers_accuracy[0].value == pytest.approx(0.45 / 0.53)
    assert found.iou[0].value == pytest.approx(0.45 / (0.45 + 0.08 + 0.15))
    assert found.f1[0].value == pytest.approx(2 * 0.45 / (0.53 + 0.60))
    low = found.overall_accuracy.value - 1.959964 * math.sqrt(variance)
    assert found.overall_accuracy.lower == pytest.approx(low, abs=1e-6)
    assert found.overall_accuracy.upper <= 1


def test_sizes_weigh_units_and_equal_sizes_change_nothing():
    truth, mapped = units(OLOFSSON)
    options = {"classes": 4, "strata": mapped, "stratum_areas": OLOFSSON_PIXELS}
    plain = estimate_accuracy(truth, mapped, **options)
    equal = estimate_accuracy(truth, mapped, sizes=np.full(len(truth), 7.0), **options)
    np.testing.assert_allclose(plain.proportions, equal.proportions)
    assert plain.producers_accuracy[0].standard_error == pytest.approx(
        equal.producers_accuracy[0].standard_error
    )
    found = estimate_accuracy(
        np.array([0, 0]), np.array([0, 1]), classes=2, strata=np.zeros(2, int),
        stratum_areas=np.array([1.0]), sizes=np.array([3.0, 1.0]),
    )  # fmt: skip
    assert found.overall_accuracy.value == 0.75


def test_what_the_sample_does_not_give_is_nan():
    truth, mapped = np.array([0, 0, 1, 0]), np.array([0, 0, 1, 1])
    found = estimate_accuracy(
        truth, mapped, classes=3, strata=mapped, stratum_areas=np.array([50.0, 30.0, 20.0])
    )
    assert found.covered == pytest.approx(0.8)
    assert math.isnan(found.users_accuracy[2].value)
    assert found.proportions.sum() == pytest.approx(1)
    single = estimate_accuracy(
        truth[1:3], mapped[1:3], classes=2, strata=mapped[1:3], stratum_areas=np.array([5.0, 5.0])
    )
    assert math.isnan(single.overall_accuracy.standard_error)
    assert single.overall_accuracy.to_json()["lower"] is None


def test_a_unit_alone_in_its_stratum_leaves_no_error_to_what_it_contributes_to():
    truth, mapped = np.array([0, 0, 1, 1, 1]), np.array([0, 0, 0, 1, 1])
    found = estimate_accuracy(
        truth, mapped, classes=2, strata=np.array([0, 0, 0, 0, 1]),
        stratum_areas=np.array([50.0, 10.0]),
    )  # fmt: skip
    errors = (found.overall_accuracy, found.users_accuracy[1], found.producers_accuracy[1])
    assert all(math.isnan(one.standard_error) for one in errors)
    assert all(math.isfinite(one.value) for one in errors)
    assert found.users_accuracy[0].standard_error > 0
    # A mistake counts in the denominators alone: of what it is mapped as, and of what it is.
    wrong = estimate_accuracy(
        np.append(truth, 0), np.append(mapped, 2), classes=3, strata=np.array([0, 0, 0, 0, 0, 1]),
        stratum_areas=np.array([50.0, 10.0]),
    )  # fmt: skip
    assert math.isnan(wrong.users_accuracy[2].standard_error)
    assert math.isnan(wrong.producers_accuracy[0].standard_error)
    assert math.isfinite(wrong.users_accuracy[0].standard_error)
    assert math.isfinite(wrong.producers_accuracy[1].standard_error)
    two = estimate_accuracy(
        truth[1:3], mapped[1:3], classes=2, strata=np.zeros(2, int), stratum_areas=np.array([1.0])
    )
    assert two.overall_accuracy.standard_error == pytest.approx(math.sqrt(0.5 * 0.5 / (2 - 1)))


def test_a_simple_sample_estimates_the_figures_of_its_own_confusion():
    rng = np.random.default_rng(3)
    truth = rng.choice([0, 1, 3], 211, p=[0.5, 0.3, 0.2])
    mapped = np.where(rng.random(211) < 0.7, truth, rng.choice([0, 1, 2], 211))
    found = estimate_accuracy(
        truth, mapped, classes=5, strata=np.zeros(211, int), stratum_areas=np.array([7.0])
    )
    figures = metrics_from_confusion(confusion_matrix(truth, mapped, classes=5))
    assert found.overall_accuracy.value == pytest.approx(figures.overall_accuracy)
    for name in ("users_accuracy", "producers_accuracy", "f1", "iou"):
        values = [one.value for one in getattr(found, name)]
        np.testing.assert_allclose(values, getattr(figures, name), err_msg=name)
    for one, other in ((found, figures), (found.over(3), figures.over(3))):
        assert one.macro_f1 == pytest.approx(other.macro_f1)
        assert one.macro_miou == pytest.approx(other.macro_miou)
    np.testing.assert_allclose(found.proportions, figures.confusion / 211)
    shares = [one.value for one in found.area_share]
    np.testing.assert_allclose(shares, figures.support / 211)


@pytest.mark.parametrize("strata", ["map", "other", "simple", "sized"])
def test_intervals_cover_the_truth_as_often_as_they_say(strata):
    """Draw 600 samples from a known population: 95 % intervals cover it in about 95 %."""
    rng = np.random.default_rng(8)
    size = 30_000
    truth = rng.choice(3, size, p=[0.6, 0.3, 0.1])
    wrong = rng.random(size) < np.array([0.1, 0.25, 0.3])[truth]
    mapped = np.where(wrong, (truth + rng.integers(1, 3, size)) % 3, truth)
    stratum = {
        "map": mapped,
        "other": np.where(rng.random(size) < 0.7, mapped, rng.integers(0, 3, size)),
        "simple": np.zeros(size, int),
        "sized": np.zeros(size, int),
    }[strata]
    sizes = np.ones(size)
    if strata == "sized":
        sizes = rng.gamma(2.0, 1.0, size) * np.array([1.0, 2.0, 0.5])[truth] + 0.1
    areas = np.bincount(stratum, weights=sizes)
    weighted = np.zeros((3, 3))
    np.add.at(weighted, (truth, mapped), sizes / sizes.sum())
    right = np.diag(weighted)
    goals = [right.sum(), *(right / weighted.sum(0)), *(right / weighted.sum(1)), *weighted.sum(1)]
    members = [np.flatnonzero(stratum == one) for one in range(len(areas))]
    each = 150 if len(areas) > 1 else 800

    hits, values = np.zeros(len(goals)), []
    runs = 600
    for _ in range(runs):
        picked = np.concatenate([rng.choice(one, each, replace=False) for one in members])
        found = estimate_accuracy(
            truth[picked], mapped[picked], classes=3, strata=stratum[picked],
            stratum_areas=areas, stratum_units=np.bincount(stratum), sizes=sizes[picked],
        )  # fmt: skip
        figures = [found.overall_accuracy, *found.users_accuracy, *found.producers_accuracy,
                   *found.area_share]  # fmt: skip
        hits += [one.lower <= goal <= one.upper for one, goal in zip(figures, goals, strict=True)]
        values.append([one.value for one in figures])
    # The estimates have no bias, and the coverage is near 95 % (standard error 0.9 %).
    np.testing.assert_allclose(np.mean(values, axis=0), goals, atol=0.01)
    assert (hits / runs > 0.91).all(), hits / runs
    assert (hits / runs < 0.99).all(), hits / runs


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"truth": np.array([0, 3])}, "truth of a unit is 3"),
        ({"predicted": np.array([1, -1])}, "map of a unit is -1"),
        ({"strata": np.array([0, 1])}, "stratum of a unit is 1"),
        ({"truth": np.array([0])}, "lengths"),
        ({"stratum_areas": np.array([0.0])}, "no area"),
        ({"sizes": np.array([1.0, 0.0])}, "no area"),
        ({"confidence_level": 1.0}, "between 0 and 1"),
        ({"confidence_level": 0.0}, "between 0 and 1"),
    ],
    ids=["class", "no class", "stratum", "length", "area", "size", "level", "no level"],
)
def test_what_is_no_sample_is_refused(change, said):
    values = {
        "truth": np.array([0, 1]), "predicted": np.array([0, 1]), "classes": 2,
        "strata": np.zeros(2, int), "stratum_areas": np.array([1.0]), **change,
    }  # fmt: skip
    truth, predicted = values.pop("truth"), values.pop("predicted")
    with pytest.raises(InputError, match=said):
        estimate_accuracy(truth, predicted, **values)
