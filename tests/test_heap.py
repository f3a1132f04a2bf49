"""What the C library does with freed memory, as the system counts it."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")

_COUNT = """
import resource

import psutil
import torch

from stcln_geo.heap import keep_memory


def pages() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def rounds() -> int:
    # Four sizes, all above the 32 MB from which glibc asks the system for each by itself.
    for turn in range(8):
        if turn == 3:
            before = pages()
        held = [torch.ones(million * 1_000_000) for million in (11, 9, 10, 10)]
        del held
    return pages() - before


process = psutil.Process()
usual = rounds()
start = process.memory_info().rss
with keep_memory():
    kept = rounds()
    held = process.memory_info().rss - start
print(usual, kept, held, process.memory_info().rss - start)
"""


def test_kept_memory_is_not_asked_for_again_and_is_given_back_at_the_end():
    """Pages of 4 kB are handed out few times; by glibc's own rules, anew for each array."""
    told = subprocess.run(
        [sys.executable, "-c", _COUNT], check=True, capture_output=True, text=True
    ).stdout
    usual, kept, held, left = (int(word) for word in told.split())
    everything = 5 * 160_000_000 // 4096
    assert usual > 0.9 * everything
    assert kept < 0.2 * everything
    assert held > 150_000_000
    assert left < 5_000_000
