"""What a progress bar tells of a call."""

from __future__ import annotations

import time

import pytest

from stcln_geo import progress_bar


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
