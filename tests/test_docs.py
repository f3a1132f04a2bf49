"""The papers are true of the code: commands exist, links resolve, the site builds strictly."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from stcln_geo.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "stcln-geo"
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")], key=lambda path: path.as_posix()
)
GENERATED = ("reference/",)
"""Pages that the build writes; links to them are checked by the strict build."""

TREE = typer.main.get_command(app)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One command line found in a page."""

    page: Path
    text: str
    whole: bool
    """True in a block: to be run as it stands. False inside a sentence: a name, maybe a part."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text}"


def blocks(page: Path) -> list[str]:
    """Return the fenced blocks of shell commands in a page."""
    pattern = r"^```(?:bash|console|sh|shell)\n(.*?)^```"
    return re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)


def command_lines() -> list[Line]:
    """Collect every use of our command in the pages."""
    found = []
    for page in PAGES:
        for block in blocks(page):
            for raw in block.replace("\\\n", " ").splitlines():
                text = raw.strip().removeprefix("$ ")
                if text.startswith(f"{COMMAND} "):
                    found.append(Line(page=page, text=" ".join(text.split()), whole=True))
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        found.extend(
            Line(page=page, text=" ".join(span.split()), whole=False)
            for span in re.findall(rf"`({COMMAND} [^`]+)`", prose)
        )
    return found


LINES = command_lines()


def check(line: Line) -> None:
    """Raise unless verbs, options and, for a whole line, the arguments exist and suffice."""
    command, words = TREE, shlex.split(line.text, comments=True)[1:]
    path = COMMAND
    context = command.context_class(command, info_name=path)
    while hasattr(command, "list_commands") and words and not words[0].startswith("-"):
        known = command.list_commands(context)
        # As click does it: a group may have a command that is meant where none is named.
        try:
            verb, found, words = command.resolve_command(context, words)
        except Exception as error:
            raise AssertionError(
                f"{line}: no command {words[0]!r} under {path!r}; there are {known}"
            ) from error
        command, path = found, f"{path} {verb}"
        context = command.context_class(command, info_name=path)
    if hasattr(command, "list_commands"):
        assert not line.whole or words, f"{line}: {path!r} needs a command after it"
    values, rest, _ = command.make_parser(context).parse_args(words)
    assert not rest, f"{line}: arguments that nothing takes: {rest}"
    if line.whole and "--help" not in words:
        given = {name for name, value in values.items() if value not in (None, (), "")}
        missing = [p.name for p in command.params if p.required and p.name not in given]
        assert not missing, f"{line}: missing {missing}"


def test_the_pages_use_the_command() -> None:
    verbs = {" ".join(line.text.split()[1:3]) for line in LINES if line.whole}
    for path in ("cube build", "cube plan", "labels burn", "labels split", "cog validate"):
        assert path in verbs
    for verb in ("demo", "pretrain", "finetune", "evaluate", "predict"):
        assert any(text.split()[0] == verb for text in verbs)


@pytest.mark.parametrize("line", LINES, ids=str)
def test_every_command_in_the_pages_exists(line: Line) -> None:
    check(line)


@pytest.mark.parametrize(
    "text",
    ["stcln-geo cub build", "stcln-geo cube build --no-such-option x", "stcln-geo cube"],
    ids=["verb", "option", "half"],
)
def test_a_wrong_command_would_be_found(text: str) -> None:
    with pytest.raises(Exception, match=r"no command|No such option|needs a command"):
        check(Line(page=ROOT / "README.md", text=text, whole=True))


def parsed(line: Line) -> dict[str, object]:
    """Return the values of a whole line's options, converted as the command would get them."""
    command, words = TREE, shlex.split(line.text, comments=True)[1:]
    context = command.context_class(command, info_name=COMMAND)
    while hasattr(command, "list_commands"):
        _, command, words = command.resolve_command(context, words)
        context = command.context_class(command, info_name=COMMAND)
    return command.make_context(COMMAND, words).params


WHOLE = [
    line
    for line in LINES
    if line.whole and "--help" not in line.text and not line.text.startswith(f"{COMMAND} -")
]


@pytest.mark.parametrize("line", WHOLE, ids=str)
def test_the_values_in_the_pages_are_taken(line: Line) -> None:
    """Numbers are numbers, the collection is known, and options of a training are options."""
    from stcln_geo.catalog import shipped_catalogs
    from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config

    values = parsed(line)
    catalog = shipped_catalogs().get(str(values.get("catalog")))
    # Of repair it is the catalog of other scenes, found by tile and time.
    if catalog is not None and "cube repair" not in line.text:
        assert (values.get("collection") or catalog.default_collection()) in catalog.collections
    for kind, verb in ((PretrainConfig, "pretrain"), (FinetuneConfig, "finetune")):
        given = [str(text) for text in values.get("assignments") or ()]
        if line.text.split()[1] == verb:
            load_config(kind, assignments=given)
        elif line.text.split()[1] == "experiment":
            mine = [text.removeprefix(f"{verb}.") for text in given if text.startswith(f"{verb}.")]
            load_config(kind, assignments=mine)


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


FOREIGN = {
    "--gpus", "--gpus-per-task", "--interface", "--lifetime", "--mem-per-cpu", "--full-check",
    "--memory-limit", "--strict", "--study",
}  # fmt: skip
"""Options of SLURM, Dask, GDAL's validator and a study that the prose names."""


def test_every_option_in_the_prose_exists() -> None:
    known = set(FOREIGN)
    stack = [TREE]
    while stack:
        command = stack.pop()
        known |= {name for parameter in command.params for name in parameter.opts}
        known |= {"--help", "--install-completion", "--show-completion"}
        if hasattr(command, "list_commands"):
            context = command.context_class(command, info_name=COMMAND)
            names = command.list_commands(context)
            stack += [command.get_command(context, name) for name in names]
    unknown = {
        f"{page.relative_to(ROOT)}: {option}"
        for page in PAGES
        if page.name not in {"benchmarks.md", "CHANGELOG.md", "CONTRIBUTING.md"}
        for span in re.findall(r"`([^`]+)`", prose(page))
        for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)
        if option not in known
    }
    assert unknown == set()


def test_options_of_training_and_their_defaults_are_those_of_the_code() -> None:
    """`section.key` in the prose exists; a table that states a default states the code's."""
    from stcln_geo.train.config import FinetuneConfig, PretrainConfig

    def defaults(key: str) -> list[object]:
        section, name = key.split(".")
        sections = [getattr(kind(), section, None) for kind in (PretrainConfig, FinetuneConfig)]
        return [getattr(part, name) for part in sections if hasattr(part, name)]

    sections = "model|data|optimiser|validation|loss|labels|masking"
    stated = 0
    for page in (ROOT / "docs").rglob("*.md"):
        text = prose(page)
        for key in re.findall(rf"`((?:{sections})\.[a-z_]+)\b", text):
            assert defaults(key), f"{page.name}: {key}"
        for table in re.findall(
            r"^\| option \| default \|.*?(?=^$)", text, re.DOTALL | re.MULTILINE
        ):
            for key, value in re.findall(r"^\| `([\w.]+)`[^|]*\| ([^|]+?) \|", table, re.MULTILINE):
                mine = {str(default).lower() for default in defaults(key)}
                mine |= {text.removesuffix(".0") for text in mine}
                assert value in mine, f"{page.name}: {key} is {value}; in the code {mine}"
                stated += 1
    assert stated > 10


def test_every_make_target_in_the_pages_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        word
        for page in PAGES
        for block in blocks(page)
        for line in block.splitlines()
        if line.startswith("make ")
        for word in line.split()[1:2]
    }
    assert {"demo", "test"} <= named
    assert named <= targets


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the table of contents makes them."""
    from markdown.extensions.toc import slugify

    headings = re.findall(r"^#+ +(.*?)\s*$", page.read_text(), flags=re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_internal_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        place = (page.parent / name).resolve() if name else page
        if (ROOT / "docs") in place.parents:
            inside = place.relative_to(ROOT / "docs").as_posix()
            if inside.startswith(GENERATED):
                continue
        if not place.exists() or (anchor and anchor not in slugs(place)):
            broken.append(target)
    assert not broken


def test_no_page_is_left_out_of_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in text] == []


def test_glossary_is_in_alphabetical_order() -> None:
    lines = (ROOT / "docs" / "glossary.md").read_text().splitlines()
    terms = [lines[index - 1] for index, line in enumerate(lines) if line.startswith(":   ")]
    assert len(terms) > 20
    assert terms == sorted(terms, key=str.lower)


def test_files_that_the_pages_print_can_be_read(tmp_path: Path) -> None:
    """Legends, options of training, lists of sites, catalogs: as a reader would save them."""
    from stcln_geo.catalog import load_catalog
    from stcln_geo.data.site_split import read_site_lists
    from stcln_geo.legend import Legend
    from stcln_geo.train.config import PretrainConfig, load_config

    read = dict.fromkeys(("legend", "options", "sites", "catalog"), 0)
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for kind, block in re.findall(
            r"^ *```(text|toml|yaml)\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE
        ):
            text = textwrap.dedent(block)
            file = tmp_path / f"file.{kind}"
            file.write_text(text)
            if text.startswith("value,name"):
                legend = Legend.read(file)
                assert len(legend) < len(text.splitlines()) - 1, "the page is about groups"
                read["legend"] += 1
            elif kind == "toml" and text.startswith("train"):
                assert read_site_lists(file)
                read["sites"] += 1
            elif kind == "toml":
                load_config(PretrainConfig, file=file)
                read["options"] += 1
            elif kind == "yaml" and "collections:" in text:
                assert load_catalog(file).collections
                read["catalog"] += 1
    assert min(read.values()) > 0, read


def test_python_examples_compile() -> None:
    pattern = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
    examples = [(page, block) for page in PAGES for block in pattern.findall(page.read_text())]
    assert examples
    for page, block in examples:
        compile(block, str(page), "exec")


def test_python_examples_call_what_exists_as_it_can_be_called() -> None:
    """Names that are imported exist, and calls of them bind to their signatures."""
    calls = 0
    for page in PAGES:
        names: dict[str, object] = {}
        for block in re.findall(
            r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE
        ):
            tree = ast.parse(block)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("stcln_geo"):
                    module = importlib.import_module(node.module or "")
                    names |= {alias.name: getattr(module, alias.name) for alias in node.names}
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) in names:
                    keywords = {word.arg: None for word in node.keywords if word.arg}
                    if len(keywords) == len(node.keywords):
                        inspect.signature(names[node.func.id]).bind(*node.args, **keywords)
                        calls += 1
    assert calls > 15


def hooks() -> Any:
    """Return the module that writes the reference pages."""
    pytest.importorskip("mkdocs")
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_package_has_a_reference_page() -> None:
    import stcln_geo

    packages = {path.parent.name for path in (ROOT / "stcln_geo").glob("*/__init__.py")}
    assert {name for _, name, _ in hooks().PYTHON_PAGES} == {"stcln_geo", *packages}
    assert {"__version__", *hooks().public_names()} == set(stcln_geo.__all__)


def test_every_option_of_training_is_explained() -> None:
    """The page has what --print-config prints, with the same defaults, and a meaning of each."""
    import tomllib

    from stcln_geo.train.config import FinetuneConfig, PretrainConfig, to_toml

    rows = hooks().option_rows()
    assert [key for key, (_, meaning) in rows.items() if len(meaning) < 10] == []

    def flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in values.items():
            if isinstance(value, dict) and (value or not prefix):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    for column, kind in enumerate((PretrainConfig, FinetuneConfig)):
        printed = dict(flat(tomllib.loads(to_toml(kind()))))
        stated = {
            key: json.loads(defaults[column])
            for key, (defaults, _) in rows.items()
            if defaults[column] not in ("", "\N{EN DASH}")
        }
        assert stated == printed


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    """Every page, every link and every docstring passes; the references hold what exists."""
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    cli = (tmp_path / "reference" / "cli" / "index.html").read_text()
    context = TREE.context_class(TREE, info_name=COMMAND)
    for verb in TREE.list_commands(context):
        assert f"{COMMAND} {verb}" in cli
    cubes = (tmp_path / "reference" / "python" / "cube" / "index.html").read_text()
    assert "stcln_geo.cube.contract.validate_cube" in cubes


def test_the_own_dataset_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the example as it is printed, on a small netCDF, and find the values in the cube."""
    import numpy as np
    import xarray as xr

    from stcln_geo import open_cube, validate_cube

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    shape = (3, 41, 37)
    values = {
        name: (("time", "y", "x"), rng.uniform(0.02, 0.5, shape).astype("float32"))
        for name in ("B02", "B03", "B04", "B08")
    }
    coordinates = {
        "time": np.array(["2020-10-01", "2021-03-05", "2021-06-20"], dtype="datetime64[ns]"),
        "y": 5_600_000.0 - 10.0 * np.arange(shape[1]) - 5.0,
        "x": 500_000.0 + 10.0 * np.arange(shape[2]) + 5.0,
    }
    images = xr.Dataset(values, coords=coordinates)
    images.to_netcdf("region_2021.nc", engine="scipy")

    page = (ROOT / "docs" / "how-to" / "own-dataset.md").read_text()
    example, of_stackstac = re.findall(
        r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE
    )
    assert "stackstac.stack(" in of_stackstac
    exec(compile(example, "own-dataset.md", "exec"), {})

    cube = open_cube("region.zarr")
    assert validate_cube(cube)[0] == []
    assert list(cube["band"].to_numpy()) == ["blue", "green", "red", "nir"]
    inside = cube["reflectance"].sel(y=images["y"], x=images["x"])
    for name, band in (("B02", "blue"), ("B08", "nir")):
        np.testing.assert_allclose(inside.sel(band=band), images[name], atol=6e-5)
    assert bool(cube["valid"].sel(y=images["y"], x=images["x"]).all())


@pytest.mark.slow(minutes=1.5)
def test_the_path_in_python_runs_and_goes_on(tmp_path: Path) -> None:
    """The blocks of the page, as one script: its areas are those of the map; again, all is kept."""
    import numpy as np
    import rasterio

    page = (ROOT / "docs" / "tutorials" / "in-python.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "path.py").write_text("\n".join(examples))
    command = [sys.executable, "-W", "error::RuntimeWarning", "path.py"]
    # Another test runs beside it: threads that wait for each other would take minutes.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> list[str]:
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    first = run()
    weights = tmp_path / "runs" / "finetune" / "checkpoints" / "best.safetensors"
    trained = weights.stat().st_mtime_ns
    with rasterio.open(tmp_path / "map" / "classes.tif") as made:
        pixels = np.bincount(made.read(1).ravel(), minlength=256)
    told = {
        name: float(hectares)
        for name, hectares in re.findall(
            r"^([A-Z][a-z ]+?) +([\d.]+)$", "\n".join(first), flags=re.M
        )
    }
    assert len(told) >= 2
    assert sum(told.values()) == pytest.approx(pixels[:255].sum() / 100, abs=0.05 * len(told))
    assert sorted(told.values()) == pytest.approx(
        sorted(n / 100 for n in pixels[:255] if n), abs=0.051
    )
    again = run()
    assert any("is complete" in line for line in again)
    assert weights.stat().st_mtime_ns == trained
    assert [line for line in again if line.split()[0] == "[["] == [
        line for line in first if line.split()[0] == "[["
    ]
    assert again[-len(told) - 1 :] == first[-len(told) - 1 :]
