"""The cubes of tests/train, here too."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_SPEC = importlib.util.spec_from_file_location(
    "stcln_geo_test_cubes", Path(__file__).parents[1] / "train" / "conftest.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_CUBES = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CUBES)

cube = _CUBES.cube
new_cube = _CUBES.new_cube
