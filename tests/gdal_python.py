"""Ask GDAL's own Python, which Debian installs for its own interpreter (python3-gdal).

rasterio brings a GDAL without validator and bindings. Where the package is absent the tests that
ask are skipped, unless STCLN_GEO_REQUIRE_GDAL is set, as it is in ``.ci/run``.

``python tests/gdal_python.py --check`` says whether it is there, by its exit code.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

VALIDATOR = "osgeo_utils.samples.validate_cloud_optimized_geotiff"
_PYTHON = "/usr/bin/python3"


@functools.cache
def is_installed() -> bool:
    """Return True where the validator and the bindings can be imported."""
    if not Path(_PYTHON).exists():
        return False
    finished = _run("-c", f"import {VALIDATOR}")
    return finished.returncode == 0


def gdal_validates(path: Path) -> None:
    """Let GDAL's own validator look at every tile; it must have neither error nor warning."""
    _require()
    finished = _run("-m", VALIDATOR, "--full-check=yes", str(path))
    said = finished.stdout + finished.stderr
    assert finished.returncode == 0, said
    assert "is a valid cloud optimized GeoTIFF" in said
    assert "warning" not in said.lower(), said


def gdal_names(path: Path) -> dict[str, Any]:
    """Return what GDAL reads of a class map's names and colours.

    Returns
    -------
    dict
        "categories" (names by pixel value), "table" (rows of value and class of the raster
        attribute table), "colors" (red, green, blue, alpha of the values 0 to 255), "nodata".
    """
    _require()
    code = """
import json, sys
from osgeo import gdal
gdal.UseExceptions()
dataset = gdal.Open(sys.argv[1])
band = dataset.GetRasterBand(1)
table, colors = band.GetDefaultRAT(), band.GetColorTable()
print(json.dumps({
    "categories": band.GetCategoryNames(),
    "table": [[table.GetValueAsInt(row, 0), table.GetValueAsString(row, 1)]
              for row in range(table.GetRowCount())],
    "colors": [colors.GetColorEntry(value) for value in range(colors.GetCount())],
    "nodata": band.GetNoDataValue(),
}))
"""
    finished = _run("-c", code, str(path))
    assert finished.returncode == 0, finished.stderr
    told: dict[str, Any] = json.loads(finished.stdout)
    return told


def _require() -> None:
    import pytest

    if is_installed():
        return
    reason = "GDAL's own Python is absent: install the Debian package python3-gdal"
    if os.environ.get("STCLN_GEO_REQUIRE_GDAL"):
        pytest.fail(reason)
    pytest.skip(reason)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The virtual environment's modules are of another Python.
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [_PYTHON, *arguments], capture_output=True, text=True, check=False, env=plain
    )


if __name__ == "__main__":
    sys.exit(0 if sys.argv[1:] == ["--check"] and is_installed() else 1)
