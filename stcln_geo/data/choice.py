"""Choose the fields to visit before any label is known: one of each kind of season.

Parcels are grouped by how green they are through the season, by k-means, and of each group the
parcel nearest to its mean is visited. With a small budget typical samples teach more than unusual
ones (Hacohen, Dekel and Weinshall 2022, "Active Learning on a Budget", which groups what a
self-supervised network makes of images). Parcels that were visited before stay as centres that
nothing moves, so that the new ones go where none is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError

__all__ = ["Choice", "choose_parcels", "fill_gaps"]

_TRIES = 5
_ROUNDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which of P parcels to visit, and for which others each of them stands."""

    chosen: NDArray[np.intp]
    """(N,) positions of the parcels to visit, those that stand for most others first."""
    group: NDArray[np.intp]
    """(P,) position in ``chosen`` of the parcel that stands for each; -1 where one does that was
    visited before."""

    @property
    def stands_for(self) -> NDArray[np.intp]:
        """(N,) parcels that each of the chosen ones stands for, itself among them."""
        return np.bincount(self.group[self.group >= 0], minlength=len(self.chosen))


def fill_gaps(profiles: NDArray[np.floating]) -> NDArray[np.float64]:
    """Join what was seen before and after each gap of (P, D) profiles by a straight line.

    Before the first and after the last value the nearest one stands. Rows need a value each.
    """
    filled = np.array(profiles, dtype=np.float64)
    days = np.arange(filled.shape[1])
    for row in np.flatnonzero(np.isnan(filled).any(axis=1)):
        seen = ~np.isnan(filled[row])
        filled[row] = np.interp(days, days[seen], filled[row, seen])
    return filled


def choose_parcels(
    profiles: NDArray[np.floating],
    count: int,
    *,
    visited: NDArray[np.bool_] | None = None,
    seed: int = 0,
) -> Choice:
    """Choose parcels whose seasons stand for those of all.

    Parameters
    ----------
    profiles
        (P, D) one row a parcel, without gaps.
    count
        Parcels to choose.
    visited
        (P,) True where a parcel needs no visit: it stands for those near it, and is not chosen.
    seed
        Another seed begins from other centres.

    Raises
    ------
    InputError
        If ``count`` is below 1 or above the number of parcels not visited.
    """
    points = np.ascontiguousarray(profiles, dtype=np.float64)
    known = np.zeros(len(points), dtype=bool) if visited is None else np.asarray(visited)
    left = int((~known).sum())
    if not 1 <= count <= left:
        raise InputError(
            f"Cannot choose {count} parcels: it must be 1 to {left}, the parcels that can be "
            "visited and have not been. Ask for fewer, or give more parcels."
        )
    taken = _distance(points, points[known])
    best: tuple[float, NDArray[np.float64]] | None = None
    for attempt in range(_TRIES):
        rng = np.random.default_rng((seed, attempt))
        centres = _settle(points, _spread(points, count, taken, rng), taken)
        error = float((np.minimum(_nearest(points, centres)[1], taken) ** 2).sum())
        if best is None or error < best[0]:
            best = (error, centres)
    assert best is not None
    return _typical(points, best[1], known, taken)


def _nearest(
    points: NDArray[np.float64], centres: NDArray[np.float64]
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return which centre is nearest to each point, the first of equals, and how far it is."""
    from scipy.cluster.vq import vq

    nearest, distance = vq(points, centres)
    return nearest.astype(np.intp), distance


def _distance(points: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far the nearest centre is from each point; infinity without any."""
    return _nearest(points, centres)[1] if len(centres) else np.full(len(points), np.inf)


def _spread(
    points: NDArray[np.float64], count: int, taken: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Draw first centres, each with a chance as the squared distance to those there are."""
    far = taken.copy()
    centres = []
    for _ in range(count):
        chance = np.where(np.isinf(far), 1.0, far**2)
        total = chance.sum()
        at = int(rng.choice(len(points), p=chance / total)) if total > 0 else 0
        centres.append(points[at])
        far = np.minimum(far, np.linalg.norm(points - points[at], axis=1))
    return np.array(centres)


def _settle(
    points: NDArray[np.float64], centres: NDArray[np.float64], taken: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Move centres to the means of their groups until nothing changes (Lloyd's algorithm)."""
    before = None
    for _ in range(_ROUNDS):
        nearest, distance = _nearest(points, centres)
        own = np.where(distance < taken, nearest, -1)
        if before is not None and np.array_equal(own, before):
            break
        before = own
        held = own >= 0
        size = np.bincount(own[held], minlength=len(centres))
        some = size > 0
        centres = centres.copy()
        for column in range(points.shape[1]):
            sums = np.bincount(own[held], weights=points[held, column], minlength=len(centres))
            centres[some, column] = sums[some] / size[some]
        # A group that lost all its parcels begins anew where none is near.
        apart = np.argsort(-np.minimum(distance, taken), kind="stable")
        centres[~some] = points[apart[: int((~some).sum())]]
    return centres


def _typical(
    points: NDArray[np.float64],
    centres: NDArray[np.float64],
    known: NDArray[np.bool_],
    taken: NDArray[np.float64],
) -> Choice:
    """Choose the parcel nearest to each centre, and say for which parcels it stands."""
    free = ~known
    chosen: list[int] = []
    for centre in centres:
        distance = np.where(free, np.linalg.norm(points - centre, axis=1), np.inf)
        at = int(distance.argmin())
        chosen.append(at)
        free[at] = False
    nearest, distance = _nearest(points, points[chosen])
    group = np.where(distance < taken, nearest, -1)
    # Of parcels with the very same season, each of those chosen stands for itself.
    group[chosen] = np.arange(len(chosen))
    order = np.argsort(-np.bincount(group[group >= 0], minlength=len(chosen)), kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return Choice(
        chosen=np.asarray(chosen, dtype=np.intp)[order],
        group=np.where(group >= 0, place[group], -1),
    )
