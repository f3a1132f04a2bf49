"""Print the oldest version that each dependency may have, as constraints for pip.

``python tests/floors.py > floors.txt; pip install -c floors.txt .`` shows whether they still
suffice. Torch is left out: of old versions the public index has CUDA builds of several GB only.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
LEFT_OUT = {"torch"}


def floors() -> dict[str, str]:
    """Map the names of what is always installed to the versions after ``>=``."""
    found = {}
    for line in tomllib.loads(PYPROJECT.read_text())["project"]["dependencies"]:
        match = re.fullmatch(r"([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", line)
        if match is None:
            raise SystemExit(f"{PYPROJECT.name}: {line!r} has no floor; write it as name>=version.")
        found[match[1]] = match[2]
    return found


if __name__ == "__main__":
    for name, version in floors().items():
        if name not in LEFT_OUT:
            print(f"{name}=={version}")
