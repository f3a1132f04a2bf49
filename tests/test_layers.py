"""The layers hold: a lower layer never imports a higher one, and heavy libraries stay in place.

The imports are read from the source with `ast`, so a broken layer is found even where the import
sits inside a function. Imports under ``if TYPE_CHECKING:`` count as imports of our own layers
(a type is a dependency too) but not as imports of a heavy library, since they never run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOT_PACKAGE = "stcln_geo"

LAYERS = {
    "antimeridian": 0,
    "bucket": 0,
    "errors": 0,
    "grid": 0,
    "heap": 0,
    "spreadsheet": 0,
    "web": 0,
    "documents": 1,
    "catalog": 1,
    "catalog_description": 1,
    "region": 1,
    "saves": 1,
    "storage": 1,
    "legend": 1,
    "lock": 1,
    "progress": 1,
    "execution": 1,
    "fitness": 1,
    "workers": 1,
    "cube": 2,
    "datasets": 2,
    "model": 2,
    "cog": 2,
    "simulate": 2,
    "archive": 3,
    "data": 4,
    "export": 4,
    "maps": 4,
    "train": 5,
    "predict": 5,
    "report": 5,
    "experiments": 6,
    "cli": 7,
}
"""Unit (module or package directly under the import root) -> layer."""

DATA_ONLY = {"catalogs"}
"""Packages that hold data files and may import nothing of ours."""

SIBLING_EXCEPTIONS = {("datasets", "cube"), ("simulate", "cube")}
"""Pairs (importer, imported) allowed inside layer 2: they use the cube's contract."""

TORCH_UNITS = {"model", "data", "train", "predict", "experiments"}
"""Units that may import torch when they are imported."""

HEAVY_FOR_MODEL = {"xarray", "dask", "distributed", "rasterio", "zarr", "geopandas", "rioxarray"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import statement, resolved to an absolute dotted name."""

    importer: str
    """Dotted name of the importing module, for example ``stcln_geo.cube.store``."""
    name: str
    """Dotted name of what is imported, as far as it is known to be a module."""
    at_import_time: bool
    """True where the statement runs when the importer is imported."""
    type_checking: bool
    """True where the statement stands under ``if TYPE_CHECKING:`` and never runs."""
    line: int

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]


def source_files() -> dict[str, Path]:
    """Map each of our modules' dotted names to its file."""
    places = {
        ROOT_PACKAGE: ROOT / "stcln_geo",
        f"{ROOT_PACKAGE}.cli": ROOT / "cli",
        f"{ROOT_PACKAGE}.catalogs": ROOT / "catalogs",
    }
    files = {}
    for package, folder in places.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            files[".".join((package, *parts))] = path
    return files


FILES = source_files()


def unit_of(module: str) -> str | None:
    """Return the unit of one of our modules; None for the root package or a foreign module."""
    parts = module.split(".")
    return parts[1] if parts[0] == ROOT_PACKAGE and len(parts) > 1 else None


def is_type_checking(test: ast.expr) -> bool:
    return (isinstance(test, ast.Name) and test.id == "TYPE_CHECKING") or (
        isinstance(test, ast.Attribute) and test.attr == "TYPE_CHECKING"
    )


def imports_of(module: str, path: Path) -> list[Import]:
    """List every import of a source file, wherever it stands."""
    is_package = path.name == "__init__.py"
    found: list[Import] = []

    def absolute(node: ast.ImportFrom) -> list[str]:
        base = node.module or ""
        if node.level:
            anchor = module.split(".")
            drop = node.level - (1 if is_package else 0)
            anchor = anchor[: len(anchor) - drop]
            base = ".".join([*anchor, *([base] if base else [])])
        # `from stcln_geo import grid` imports a module; `from numpy import array` a name.
        return [
            f"{base}.{alias.name}"
            if f"{base}.{alias.name}" in FILES or base == ROOT_PACKAGE
            else base
            for alias in node.names
        ]

    def visit(node: ast.AST, *, at_import_time: bool, type_checking: bool) -> None:
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = absolute(node)
        found.extend(
            Import(
                importer=module,
                name=name,
                at_import_time=at_import_time,
                type_checking=type_checking,
                line=getattr(node, "lineno", 0),
            )
            for name in names
        )
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                visit(child, at_import_time=False, type_checking=True)
            for child in node.orelse:
                visit(child, at_import_time=at_import_time, type_checking=type_checking)
            return
        for child in ast.iter_child_nodes(node):
            visit(
                child,
                at_import_time=at_import_time and not deferred,
                type_checking=type_checking,
            )

    visit(ast.parse(path.read_text()), at_import_time=True, type_checking=False)
    return found


@cache
def all_imports() -> list[Import]:
    return [item for module, path in FILES.items() for item in imports_of(module, path)]


def listed(broken: list[Import]) -> str:
    return "\n".join(f"{i.importer}:{i.line} imports {i.name}" for i in broken)


def edges() -> list[tuple[str, str, Import]]:
    """Return every import that leaves one of our units for another of ours."""
    pairs = []
    for item in all_imports():
        importer, imported = unit_of(item.importer), unit_of(item.name)
        if importer and imported and imported in LAYERS and importer != imported:
            pairs.append((importer, imported, item))
    return pairs


def test_the_walk_sees_the_code() -> None:
    """Guard the guard: known imports are found and resolved, so an empty walk cannot pass."""
    assert len(FILES) > 20
    assert len(edges()) > 20
    assert any(i.importer == "stcln_geo.grid" and i.top == "odc" for i in all_imports())
    assert any(unit == "cli" for unit, _, _ in edges())


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch", ("torch", True, False)),
        ("def f():\n    import torch", ("torch", False, False)),
        ("class A:\n    import torch", ("torch", True, False)),
        ("if TYPE_CHECKING:\n    import torch", ("torch", False, True)),
        ("try:\n    from . import store\nfinally: ...", ("stcln_geo.cube.store", True, False)),
        ("from ..grid import Window", ("stcln_geo.grid", True, False)),
        ("from stcln_geo import grid", ("stcln_geo.grid", True, False)),
    ],
    ids=["plain", "function", "class", "typing", "relative", "parent", "root"],
)
def test_the_walk_reads_each_form(
    tmp_path: Path, source: str, expected: tuple[str, bool, bool]
) -> None:
    path = tmp_path / "contract.py"
    path.write_text(source)
    (item,) = imports_of("stcln_geo.cube.contract", path)
    assert (item.name, item.at_import_time, item.type_checking) == expected


def test_every_unit_has_a_layer() -> None:
    units = {unit for module in FILES if (unit := unit_of(module)) is not None}
    assert units - set(LAYERS) - DATA_ONLY == set()


def test_lower_layers_never_import_higher_ones() -> None:
    broken = [item for low, high, item in edges() if LAYERS[low] < LAYERS[high]]
    assert not broken, listed(broken)


def test_layer_two_packages_are_independent() -> None:
    broken = [
        item
        for one, other, item in edges()
        if LAYERS[one] == LAYERS[other] == 2 and (one, other) not in SIBLING_EXCEPTIONS
    ]
    assert not broken, listed(broken)


def test_train_and_predict_never_import_one_another() -> None:
    broken = [item for one, other, item in edges() if {one, other} == {"train", "predict"}]
    assert not broken, listed(broken)


def test_units_form_no_cycle() -> None:
    graph: dict[str, set[str]] = {unit: set() for unit in LAYERS}
    for importer, imported, _ in edges():
        graph[importer].add(imported)
    done: set[str] = set()

    def visit(unit: str, path: tuple[str, ...]) -> None:
        assert unit not in path, f"cycle: {' -> '.join((*path, unit))}"
        if unit not in done:
            for other in sorted(graph[unit]):
                visit(other, (*path, unit))
            done.add(unit)

    for unit in LAYERS:
        visit(unit, ())


def test_catalogs_hold_data_only() -> None:
    broken = [
        i for i in all_imports() if unit_of(i.importer) in DATA_ONLY and i.top != "__future__"
    ]
    assert not broken, listed(broken)


def test_model_knows_no_cubes() -> None:
    broken = [
        i for i in all_imports() if unit_of(i.importer) == "model" and i.top in HEAVY_FOR_MODEL
    ]
    assert not broken, listed(broken)


def test_torch_is_imported_late_elsewhere() -> None:
    broken = [
        i
        for i in all_imports()
        if i.top in {"torch", "lightning", "torchmetrics"}
        and i.at_import_time
        and unit_of(i.importer) not in TORCH_UNITS
    ]
    assert not broken, listed(broken)


def test_xarray_meets_torch_in_data_only() -> None:
    """Outside `data`, no module loads both libraries while it is imported."""
    tops: dict[str, set[str]] = {}
    for item in all_imports():
        if item.at_import_time:
            tops.setdefault(item.importer, set()).add(item.top)
    both = [
        module
        for module, names in tops.items()
        if {"xarray", "torch"} <= names and unit_of(module) != "data"
    ]
    assert not both, both


def test_only_the_command_line_prints() -> None:
    broken = []
    for module, path in FILES.items():
        if unit_of(module) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            text = ast.unparse(node.func)
            if text in {"print", "pprint", "sys.stdout.write", "sys.stderr.write"}:
                broken.append(f"{module}:{node.lineno} calls {text}")
    assert not broken, "\n".join(broken)


def test_only_the_command_line_knows_typer_and_rich() -> None:
    """But for the bar that Python users ask for, which is that of the commands."""
    broken = [
        i
        for i in all_imports()
        if i.top in {"typer", "click", "rich"}
        and unit_of(i.importer) != "cli"
        and (i.top, unit_of(i.importer)) != ("rich", "progress")
    ]
    assert not broken, listed(broken)


def test_light_modules_load_no_torch() -> None:
    """Import every module outside the torch units in a fresh interpreter: no torch appears."""
    modules = [m for m in FILES if unit_of(m) not in TORCH_UNITS]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules:\n"
        "        sys.exit(f'{name} loads torch')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
