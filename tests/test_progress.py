"""What a progress bar tells of a call."""

from __future__ import annotations

import time

import pytest

from stcln_geo import progress_bar
from stcln_geo.progress import duration_text


@pytest.mark.parametrize("first", [0, 1, 147])
def test_what_an_earlier_call_has_done_does_not_shorten_the_eta(first, monkeypatch, capsys):
    """Ten a second, whatever was there before."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress_bar("pretrain") as advance:
        for done in range(first, 400):
            now += 0.1
            advance(done, 400, "loss")
    lines = [line for line in capsys.readouterr().err.splitlines() if "eta" in line]
    assert len(lines) > 3
    for line in lines:
        done, left = int(line.split("/")[0].split()[-1]), int(line.split("eta ")[1].split()[0])
        assert left == pytest.approx((400 - done) / 10, abs=1)


def test_the_eta_of_a_next_run_is_that_of_its_own_pace(monkeypatch, capsys):
    """As of seeds: two runs of 300 steps, ten a second; then 40 windows, one in two seconds."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with progress_bar("finetune") as advance:
        for total, pace in ((300, 0.1), (300, 0.1), (40, 2.0)):
            for done in range(total):
                now += pace
                advance(done, total, "loss")
    lines = [line for line in capsys.readouterr().err.splitlines() if "eta" in line]
    assert len(lines) > 15
    for line in lines:
        done, total = (int(part) for part in line.split(" loss")[0].split()[-1].split("/"))
        left = int(line.split("eta ")[1].split()[0])
        assert left == pytest.approx((total - done) * (0.1 if total == 300 else 2), abs=1)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (99.4, "99 s"),
        (100, "1 min 40 s"),
        (3599.6, "1 h 00 min"),
        (165_742, "46 h 02 min"),
        (172_800, "2 d 00 h"),
    ],
)
def test_times_are_for_people(seconds, text):
    assert duration_text(seconds) == text
