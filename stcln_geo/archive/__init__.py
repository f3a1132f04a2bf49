"""Archives: many sites over many years, as stacks and cubes with one index.

The order of the modules: ``sites`` (where), ``spec`` (what), ``searches`` (which scenes), ``plan``
(what it costs), ``create`` (do it), ``index`` and ``members`` (what is there), ``sample`` (propose
the sites). The names below are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "ArchiveSpec",
    "add_members",
    "create_archive",
    "open_archive",
    "plan_archive",
    "read_sites",
    "sample_sites",
    "validate_archive",
]

if TYPE_CHECKING:
    from .create import create_archive
    from .index import open_archive
    from .members import add_members
    from .plan import plan_archive
    from .sample import sample_sites
    from .sites import read_sites
    from .spec import ArchiveSpec
    from .validate import validate_archive

_HOMES = {
    "ArchiveSpec": ".spec",
    "add_members": ".members",
    "create_archive": ".create",
    "open_archive": ".index",
    "plan_archive": ".plan",
    "read_sites": ".sites",
    "sample_sites": ".sample",
    "validate_archive": ".validate",
}


def __getattr__(name: str) -> Any:
    """Load a public name, and what it needs, when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted(__all__)
