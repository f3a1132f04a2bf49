"""Fixtures that all tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real scenes and golden numbers beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: real scenes and golden numbers lie there")
    return SHARED


@pytest.fixture(scope="session")
def flanders(shared: Path) -> Path:
    """Static catalog of real Sentinel-2 scenes over 64 x 64 px in Flanders."""
    return shared / "data" / "flanders_2019"


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Golden numbers of the published network."""
    return shared / "golden"
