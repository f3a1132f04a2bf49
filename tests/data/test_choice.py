"""The parcels to visit: one of each kind of season, and none where one was."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from scipy.cluster.vq import kmeans2
from scipy.spatial.distance import cdist

from stcln_geo.data.choice import choose_parcels, fill_gaps
from stcln_geo.errors import InputError


def clumps(sizes: list[int], *, seed: int = 0, dates: int = 9) -> tuple[np.ndarray, np.ndarray]:
    """Return profiles in clumps far apart, shuffled, (P, D), and which clump each is of."""
    rng = np.random.default_rng(seed)
    kind = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = 3.0 * np.eye(len(sizes), dates)
    return centres[kind] + rng.normal(0, 0.05, (len(kind), dates)), kind


def test_gaps_are_filled_as_pandas_fills_them() -> None:
    profiles = np.random.default_rng(3).random((23, 11)).astype(np.float32)
    profiles[np.random.default_rng(4).random(profiles.shape) < 0.6] = np.nan
    profiles[np.isnan(profiles).all(axis=1), 5] = 0.25
    expected = pandas.DataFrame(profiles.astype(float)).interpolate(axis=1, limit_direction="both")
    np.testing.assert_allclose(fill_gaps(profiles), expected.to_numpy(), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_each_kind_of_season_gets_one_visit_and_the_most_frequent_comes_first(seed: int) -> None:
    sizes = [31, 4, 17, 1, 9]
    profiles, kind = clumps(sizes, seed=seed)
    found = choose_parcels(profiles, len(sizes), seed=seed)
    assert kind[found.chosen].tolist() == [0, 2, 4, 1, 3]
    assert found.stands_for.tolist() == [31, 17, 9, 4, 1]
    np.testing.assert_array_equal(kind[found.chosen][found.group], kind)
    for at in found.chosen:
        own = np.flatnonzero(kind == kind[at])
        from_mean = np.linalg.norm(profiles[own] - profiles[own].mean(axis=0), axis=1)
        assert at == own[from_mean.argmin()], "the most typical one"


def test_the_groups_are_as_tight_as_those_of_scipy() -> None:
    profiles = np.random.default_rng(8).normal(size=(157, 5))
    found = choose_parcels(profiles, 11, seed=2)
    means = np.array([profiles[found.group == one].mean(axis=0) for one in range(11)])
    ours = (cdist(profiles, means).min(axis=1) ** 2).sum()
    theirs = min(
        (cdist(profiles, kmeans2(profiles, 11, minit="++", seed=seed)[0]).min(axis=1) ** 2).sum()
        for seed in range(20)
    )
    assert ours < 1.1 * theirs


@pytest.mark.filterwarnings("ignore:One of the clusters is empty")
def test_of_several_beginnings_the_tightest_is_kept() -> None:
    """Kinds so near each other that most single tries join two: as the best of five of scipy."""
    ours = theirs = 0.0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        kind = np.repeat(np.arange(12), rng.integers(5, 40, 12))
        profiles = rng.normal(size=(12, 9))[kind] + rng.normal(0, 0.3, (len(kind), 9))
        found = choose_parcels(profiles, 12, seed=seed)
        means = np.array([profiles[found.group == one].mean(axis=0) for one in range(12)])
        ours += (cdist(profiles, means).min(axis=1) ** 2).sum()
        tries = [kmeans2(profiles, 12, iter=50, minit="++", seed=one)[0] for one in range(5)]
        theirs += min((cdist(profiles, each).min(axis=1) ** 2).sum() for each in tries)
    assert ours < 1.05 * theirs


@pytest.mark.parametrize("known", [0.0, 0.2])
def test_the_scale_of_the_profiles_has_no_say(known: float) -> None:
    rng = np.random.default_rng(12)
    profiles, visited = rng.normal(size=(61, 4)), rng.random(61) < known
    found = choose_parcels(profiles, 9, visited=visited)
    for scale in (2.0**-12, 2.0**9):  # powers of two, so that nothing is rounded otherwise
        again = choose_parcels(scale * profiles, 9, visited=visited)
        np.testing.assert_array_equal(again.chosen, found.chosen)
        np.testing.assert_array_equal(again.group, found.group)


def test_parcels_with_the_season_of_a_visited_one_are_stood_for() -> None:
    profiles, kind = clumps([8, 5, 3])
    profiles = np.round(profiles)  # all of a kind alike
    visited = np.zeros(len(kind), dtype=bool)
    visited[np.flatnonzero(kind == 0)[3]] = True
    for count in range(1, 8):
        found = choose_parcels(profiles, count, visited=visited)
        others = np.setdiff1d(np.flatnonzero(kind == 0), found.chosen)
        assert (found.group[others] == -1).all()
        if count >= 2:
            assert set(kind[found.chosen]) >= {1, 2}, "where none was, first"


def test_where_one_was_visited_none_is() -> None:
    sizes = [31, 4, 17, 3, 9]
    profiles, kind = clumps(sizes)
    visited = np.zeros(len(kind), dtype=bool)
    visited[np.flatnonzero(kind == 0)[:2]] = True
    visited[np.flatnonzero(kind == 4)[0]] = True
    found = choose_parcels(profiles, 3, visited=visited)
    assert kind[found.chosen].tolist() == [2, 1, 3]
    assert found.stands_for.tolist() == [17, 4, 3]
    np.testing.assert_array_equal(found.group >= 0, np.isin(kind, [1, 2, 3]))


@pytest.mark.parametrize("known", [0.0, 0.3])
@pytest.mark.parametrize(("parcels", "kinds"), [(1, 1), (7, 7), (40, 6), (53, 53)])
def test_any_number_can_be_chosen_also_of_parcels_with_the_same_season(
    parcels: int, kinds: int, known: float
) -> None:
    rng = np.random.default_rng(parcels)
    profiles = rng.random((kinds, 4))[rng.integers(kinds, size=parcels)]
    visited = rng.random(parcels) < known
    visited[0] = False
    for count in sorted({1, (parcels + 1) // 2, int((~visited).sum())}):
        if count > (~visited).sum():
            continue
        found = choose_parcels(profiles, count, visited=visited, seed=5)
        assert len(np.unique(found.chosen)) == len(found.chosen) == count
        assert not visited[found.chosen].any()
        assert (np.diff(found.stands_for) <= 0).all()
        np.testing.assert_array_equal(found.group[found.chosen], np.arange(count))
        again = choose_parcels(profiles, count, visited=visited, seed=5)
        np.testing.assert_array_equal(found.chosen, again.chosen)


@pytest.mark.parametrize("count", [0, -1, 6])
def test_more_than_there_are_cannot_be_chosen(count: int) -> None:
    visited = np.arange(9) < 4
    with pytest.raises(InputError, match=f"Cannot choose {count} parcels: it must be 1 to 5"):
        choose_parcels(np.zeros((9, 3)), count, visited=visited)
