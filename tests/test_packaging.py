"""The names, the version, the package list and the start-up cost agree with what is promised."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "lightning", "dask", "distributed", "xarray", "rasterio", "geopandas", "zarr")


@pytest.fixture(scope="module")
def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def folder_of(package: str) -> Path:
    """Return the folder that installs as `package`."""
    for name in ("cli", "catalogs"):
        root = f"stcln_geo.{name}"
        if package == root or package.startswith(f"{root}."):
            return ROOT.joinpath(name, *package.split(".")[2:])
    return ROOT.joinpath(*package.split("."))


def test_package_list_equals_the_folders(project) -> None:
    listed = project["tool"]["setuptools"]["packages"]
    found = {"stcln_geo"}
    for place, prefix in (("stcln_geo", ""), ("cli", "stcln_geo."), ("catalogs", "stcln_geo.")):
        for path in (ROOT / place).rglob("*.py"):
            parts = path.parent.relative_to(ROOT).parts
            found.add(prefix + ".".join(parts))
    assert len(listed) == len(set(listed))
    assert set(listed) == found


def test_every_package_has_an_init(project) -> None:
    bare = [
        name
        for name in project["tool"]["setuptools"]["packages"]
        if not (folder_of(name) / "__init__.py").is_file()
    ]
    assert bare == []


def test_package_dirs_point_at_the_folders(project) -> None:
    directories = project["tool"]["setuptools"]["package-dir"]
    assert directories["stcln_geo"] == "stcln_geo"
    assert directories["stcln_geo.cli"] == "cli"
    assert directories["stcln_geo.catalogs"] == "catalogs"


def test_catalog_files_are_packaged(project) -> None:
    from importlib.resources import files

    patterns = project["tool"]["setuptools"]["package-data"]["stcln_geo.catalogs"]
    shipped = {path.name for pattern in patterns for path in (ROOT / "catalogs").glob(pattern)}
    assert shipped
    reachable = {
        entry.name
        for entry in files("stcln_geo.catalogs").iterdir()
        if entry.name.endswith((".yaml", ".yml"))
    }
    assert reachable == shipped


def test_protocol_files_are_packaged(project) -> None:
    from stcln_geo.train.protocol import list_protocols

    patterns = project["tool"]["setuptools"]["package-data"]["stcln_geo.train"]
    folder = ROOT / "stcln_geo" / "train"
    shipped = {path.stem for pattern in patterns for path in folder.glob(pattern)}
    assert shipped == {path.stem for path in (folder / "protocols").iterdir()}
    assert set(list_protocols()) == shipped
    assert "pastis-2" in shipped


def test_the_three_names_agree(project) -> None:
    table = project["project"]
    assert table["name"] == "stcln-geo"
    assert table["scripts"] == {"stcln-geo": "stcln_geo.cli.main:run"}
    assert importlib.metadata.distribution("stcln-geo").name == "stcln-geo"
    import stcln_geo

    assert stcln_geo.__name__ == "stcln_geo"


def test_version_has_a_single_source(project) -> None:
    import stcln_geo

    assert importlib.metadata.version("stcln-geo") == stcln_geo.__version__
    assert re.fullmatch(r"\d+\.\d+(\.\d+)?([a-z]+\d+)?(\.dev\d+)?", stcln_geo.__version__)
    pinned = re.compile(rf"""(?<![\w.]){re.escape(stcln_geo.__version__)}(?![\w.])""")
    assignments = [
        path.name
        for path in (ROOT / "pyproject.toml", ROOT / "stcln_geo" / "__init__.py")
        for line in path.read_text().splitlines()
        if re.match(r"\s*(__)?version(__)?\s*[:=]", line) and pinned.search(line)
    ]
    assert len(assignments) == 1, assignments


def test_public_names_are_listed_and_exist() -> None:
    import stcln_geo

    promised = {
        "load_model",
        "open_cube",
        "write_cube",
        "validate_cube",
        "plan_cube",
        "build_cube",
        "predict_region",
        "evaluate_map",
    }
    assert promised <= set(stcln_geo.__all__)
    assert set(stcln_geo.__all__) <= set(dir(stcln_geo))
    for name in stcln_geo.__all__:
        assert getattr(stcln_geo, name) is not None


def test_command_answers_and_names_its_version() -> None:
    import stcln_geo

    script = Path(sys.executable).with_name("stcln-geo")
    assert script.is_file(), "the package is not installed: pip install -e ."
    result = subprocess.run([script, "--version"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert stcln_geo.__version__ in result.stdout


def test_import_of_the_package_is_light() -> None:
    code = f"import sys, stcln_geo; print([m for m in {HEAVY!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("stcln_geo.data.split_labels", ("torch", "lightning", "dask")),
        ("stcln_geo.train.protocol", ("lightning", "dask")),
        ("stcln_geo.train.evaluate", ("lightning", "dask")),
        ("stcln_geo.predict", ("lightning",)),
    ],
)
def test_commands_that_do_not_train_begin_without_what_training_takes(
    module: str, absent: tuple[str, ...]
) -> None:
    """Torch and Lightning take seconds to load."""
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_help_loads_no_heavy_library() -> None:
    """`stcln-geo --help` answers from typer alone: every verb is listed, nothing heavy loads."""
    code = (
        "import sys\n"
        "sys.argv = ['stcln-geo', '--help']\n"
        "from stcln_geo.cli.main import run\n"
        "try:\n"
        "    run()\n"
        "except SystemExit as end:\n"
        "    status = end.code or 0\n"
        "else:\n"
        "    status = 0\n"
        f"print('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])\n"
        "sys.exit(status)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "HEAVY []" in result.stdout, result.stdout
    for verb in ("cube", "labels", "pretrain", "finetune", "evaluate", "predict", "demo"):
        assert verb in result.stdout


def test_citation_and_licence_agree_with_the_project(project) -> None:
    import yaml

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == project["project"]["license"] == "Apache-2.0"
    assert any(r.get("doi") == "10.1016/j.jag.2025.104426" for r in citation["references"])
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0, January 2004" in licence
