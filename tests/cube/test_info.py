"""What is told of a cube: the time in which nothing was seen, and how clear each date is."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from stcln_geo.cube.info import longest_gap


def dates(*told: tuple[str, float]) -> list[dict[str, Any]]:
    return [{"time": f"{day}T10:56:01Z", "clear": clear} for day, clear in told]


@pytest.mark.parametrize("seed", range(8))
def test_in_the_longest_gap_lies_no_date_that_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    days = np.sort(rng.choice(360, 23, replace=False)).tolist()
    clear = rng.choice([0.0, 0.1, 0.3, 0.4, 0.6, 0.8], 23).tolist()
    told = [str(date(2018, 9, 1) + timedelta(day)) for day in days]
    # 0.4 counts beside 0.8: half is enough.
    seen = [day for day, share in zip(told, clear, strict=True) if share >= max(clear) / 2]
    lengths = {
        pair: (date.fromisoformat(pair[1]) - date.fromisoformat(pair[0])).days
        for pair in pairwise(seen)
    }
    found = longest_gap(dates(*zip(told, clear, strict=True)))
    assert found is not None
    assert lengths[found] == max(lengths.values())


def test_two_dates_make_a_gap_and_nothing_seen_makes_none() -> None:
    two = (("2019-03-01", 0.02), ("2019-03-11", 0.01))
    assert longest_gap(dates(*two)) == ("2019-03-01", "2019-03-11")
    assert longest_gap(dates(*two, ("2019-03-21", 0.05))) is None, "one date counts"
    assert longest_gap(dates(("2019-03-01", 0.0), ("2019-03-11", 0.0))) is None
    assert longest_gap([]) is None
