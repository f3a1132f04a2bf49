"""From a STAC search to a crop map of a whole region, with few labels.

The path of the data is the order of the packages: ``cube`` (STAC to Zarr), ``data`` (Zarr to
torch), ``model`` (the STCLN network), ``train``, ``predict``, ``cog``, ``report``. The names
below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "append_cube",
    "build_cube",
    "evaluate_map",
    "export_cube",
    "load_model",
    "open_cube",
    "plan_cube",
    "predict_region",
    "repair_cube",
    "validate_cube",
    "write_cube",
]

if TYPE_CHECKING:
    from .cube.append import append_cube
    from .cube.build import build_cube
    from .cube.contract import validate_cube
    from .cube.dataset import open_cube, write_cube
    from .cube.plan import plan_cube
    from .cube.repair import repair_cube
    from .export.files import export_cube
    from .model.checkpoint import load_model
    from .predict.run import predict_region
    from .report.accuracy import evaluate_map

_HOMES = {
    "append_cube": ".cube.append",
    "build_cube": ".cube.build",
    "evaluate_map": ".report.accuracy",
    "export_cube": ".export.files",
    "load_model": ".model.checkpoint",
    "open_cube": ".cube.dataset",
    "plan_cube": ".cube.plan",
    "predict_region": ".predict.run",
    "repair_cube": ".cube.repair",
    "validate_cube": ".cube.contract",
    "write_cube": ".cube.dataset",
}


def __getattr__(name: str) -> Any:
    """Load a public name, and what it needs, when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
