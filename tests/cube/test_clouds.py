"""Clear sky: classes, margins, and independence of block borders."""

from __future__ import annotations

import numpy as np
import pytest

from stcln_geo.cube.clouds import CloudSpec, clear_sky
from stcln_geo.errors import InputError


def naive(scl: np.ndarray, spec: CloudSpec) -> np.ndarray:
    """Look at every neighbour of every pixel."""
    pad = spec.padding
    height, width = scl.shape[0] - 2 * pad, scl.shape[1] - 2 * pad
    clear = np.zeros((height, width), dtype=bool)
    for y in range(height):
        for x in range(width):
            good = scl[y + pad, x + pad] in spec.clear
            for dy in range(-pad, pad + 1):
                for dx in range(-pad, pad + 1):
                    code, far = scl[y + pad + dy, x + pad + dx], dy * dy + dx * dx
                    if code in (8, 9, 10) and far <= spec.cloud_margin**2:
                        good = False
                    if code == 3 and far <= spec.shadow_margin**2:
                        good = False
            clear[y, x] = good
    return clear


@pytest.mark.parametrize(("cloud", "shadow"), [(0, 0), (2, 2), (3, 1), (0, 2)])
def test_equals_looking_at_every_neighbour(cloud: int, shadow: int):
    rng = np.random.default_rng(3)
    spec = CloudSpec(cloud_margin=cloud, shadow_margin=shadow)
    shape = (29 + 2 * spec.padding, 31 + 2 * spec.padding)
    share = [0.02] * 4 + [0.78] + [0.02] * 7
    scl = rng.choice(np.arange(12), p=share, size=shape).astype("uint8")
    result = clear_sky(scl, spec)
    assert 0.05 < result.mean() < 0.95
    np.testing.assert_array_equal(result, naive(scl, spec))


def test_parts_with_padding_equal_the_whole():
    rng = np.random.default_rng(4)
    spec = CloudSpec(cloud_margin=4, shadow_margin=2)
    pad = spec.padding
    scl = rng.choice([4, 4, 4, 4, 4, 4, 9, 3], size=(53, 47)).astype("uint8")
    whole = clear_sky(np.pad(scl, pad), spec)
    padded = np.pad(scl, pad)
    for top in range(0, 53, 13):
        part = clear_sky(padded[top : top + 13 + 2 * pad, :], spec)
        np.testing.assert_array_equal(part, whole[top : top + 13])


def test_a_class_called_clear_casts_no_margin():
    scl = np.full((9, 9), 4, dtype="uint8")
    scl[4, 4] = 10
    spec = CloudSpec(clear=(4, 10), cloud_margin=2, shadow_margin=0)
    assert clear_sky(scl, spec).all()
    assert not clear_sky(scl, CloudSpec(cloud_margin=2, shadow_margin=0))[2, 2]


@pytest.mark.parametrize(
    "choice", [{"clear": ()}, {"clear": (4, 12)}, {"cloud_margin": -1}, {"shadow_margin": 51}]
)
def test_bad_choices_are_refused(choice: dict):
    with pytest.raises(InputError, match="must be"):
        CloudSpec(**choice)
