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
    "CubeSpec",
    "FinetuneConfig",
    "PretrainConfig",
    "Region",
    "SearchRequest",
    "SplitSpec",
    "__version__",
    "append_cube",
    "build_cube",
    "burn_labels",
    "evaluate_map",
    "evaluate_run",
    "export_cube",
    "finetune",
    "load_model",
    "open_cube",
    "plan_cube",
    "plan_request",
    "predict_region",
    "pretrain",
    "progress_bar",
    "repair_cube",
    "split_labels",
    "validate_cube",
    "write_cube",
]

if TYPE_CHECKING:
    from .cube.append import append_cube
    from .cube.build import build_cube
    from .cube.contract import validate_cube
    from .cube.dataset import open_cube, write_cube
    from .cube.labels import burn_labels
    from .cube.plan import plan_cube
    from .cube.repair import repair_cube
    from .cube.request import SearchRequest, plan_request
    from .cube.spec import CubeSpec
    from .data.split_labels import SplitSpec, split_labels
    from .export.files import export_cube
    from .model.checkpoint import load_model
    from .predict.run import predict_region
    from .progress import progress_bar
    from .region import Region
    from .report.accuracy import evaluate_map
    from .train.config import FinetuneConfig, PretrainConfig
    from .train.evaluate import evaluate_run
    from .train.finetune import finetune
    from .train.pretrain import pretrain

_HOMES = {
    "CubeSpec": ".cube.spec",
    "FinetuneConfig": ".train.config",
    "PretrainConfig": ".train.config",
    "Region": ".region",
    "SearchRequest": ".cube.request",
    "SplitSpec": ".data.split_labels",
    "append_cube": ".cube.append",
    "build_cube": ".cube.build",
    "burn_labels": ".cube.labels",
    "evaluate_map": ".report.accuracy",
    "evaluate_run": ".train.evaluate",
    "export_cube": ".export.files",
    "finetune": ".train.finetune",
    "load_model": ".model.checkpoint",
    "open_cube": ".cube.dataset",
    "plan_cube": ".cube.plan",
    "plan_request": ".cube.request",
    "predict_region": ".predict.run",
    "pretrain": ".train.pretrain",
    "progress_bar": ".progress",
    "repair_cube": ".cube.repair",
    "split_labels": ".data.split_labels",
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
