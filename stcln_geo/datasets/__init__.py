"""Published sets as stacks: PASTIS and MTLCC, from their files as downloaded.

The order of the modules: ``georeference``, ``pixels`` and ``tfrecord`` know no set; ``plan``
is what will be written; ``pastis`` and ``mtlcc`` look a set through and read its sites; ``run``
carries a plan out, so that it can be stopped and run again. The names below are loaded when first
used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["ImportPlan", "ImportReport", "import_dataset", "plan_mtlcc", "plan_pastis"]

if TYPE_CHECKING:
    from .mtlcc import plan_mtlcc
    from .pastis import plan_pastis
    from .plan import ImportPlan
    from .run import ImportReport, import_dataset

_HOMES = {
    "ImportPlan": ".plan",
    "ImportReport": ".run",
    "import_dataset": ".run",
    "plan_mtlcc": ".mtlcc",
    "plan_pastis": ".pastis",
}


def __getattr__(name: str) -> Any:
    """Load a public name, and what it needs, when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
