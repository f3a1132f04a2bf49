"""Write the reference pages while the site is built.

The command line reference comes from the typer application itself, and the Python reference
from the packages in the source tree, so neither can fall behind the code. No page is written to
disk: MkDocs holds them in memory.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import json
import sys
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "stcln_geo"
COMMAND = "stcln-geo"

PYTHON_PAGES = (
    ("The public names", "stcln_geo", "What `import stcln_geo` gives, and the small nouns."),
    ("Cubes", "cube", "From a STAC search to a Zarr cube."),
    ("Archives", "archive", "Many sites over many seasons, with one index."),
    ("Datasets", "datasets", "Published sets as cubes."),
    ("Simulation", "simulate", "A simulated Sentinel-2 archive."),
    ("The network", "model", "STCLN, masking and checkpoints."),
    ("Samples", "data", "Where cubes meet torch."),
    ("Training", "train", "Pre-training, fine-tuning, evaluation."),
    ("Prediction", "predict", "Wall-to-wall maps."),
    ("Maps", "maps", "Parcels and polygons of a finished map."),
    ("COGs", "cog", "Cloud-optimized GeoTIFFs: write and check."),
    ("Export", "export", "Cubes as files for GDAL and QGIS."),
    ("Experiments", "experiments", "Arms, seeds, tables with intervals."),
    ("Reports", "report", "Metrics and reports."),
)
"""Title, folder under the package, first sentence; folders that do not exist are left out."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages into the navigation."""
    pages = [{"Command line": "reference/cli.md"}, {"Training options": "reference/options.md"}]
    pages += [{title: f"reference/python/{name}.md"} for title, name, _ in existing_pages()]
    assert config.nav is not None
    config.nav.append({"Reference": pages})
    return config


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    files.append(File.generated(config, "reference/cli.md", content=cli_page()))
    files.append(File.generated(config, "reference/options.md", content=options_page()))
    for title, name, sentence in existing_pages():
        page = python_page(title, name, sentence)
        files.append(File.generated(config, f"reference/python/{name}.md", content=page))
    return files


# --- the Python reference ------------------------------------------------------------------


def existing_pages() -> list[tuple[str, str, str]]:
    """Return the pages whose package exists."""
    return [page for page in PYTHON_PAGES if page[1] == "stcln_geo" or (PACKAGE / page[1]).is_dir()]


def python_page(title: str, name: str, sentence: str) -> str:
    """Return a page that documents each module of a package."""
    lines = [f"# {title}", "", sentence, ""]
    if name == "stcln_geo":
        modules = [f"stcln_geo.{path.stem}" for path in public_modules(PACKAGE)]
        lines += ["Import these from `stcln_geo`:", "", "| name | what it does |", "|---|---|"]
        lines += [
            f"| [`{public}`][{target}] | {cell(first_sentence(public))} |"
            for public, target in sorted(public_names().items())
        ]
        lines.append("")
    else:
        modules = [f"stcln_geo.{name}.{path.stem}" for path in public_modules(PACKAGE / name)]
    for module in modules:
        lines += [
            f"## `{module}`",
            "",
            f"::: {module}",
            "    options:",
            "      heading_level: 3",
            "",
        ]
    return "\n".join(lines)


def public_modules(folder: Path) -> list[Path]:
    """Return the modules of a folder whose name has no underscore in front."""
    return [path for path in sorted(folder.glob("*.py")) if not path.stem.startswith("_")]


def public_names() -> dict[str, str]:
    """Map each public name of the root package to the dotted name of its definition.

    The names are resolved by importing the package, as a user would.
    """
    import stcln_geo

    targets = {}
    for name in stcln_geo.__all__:
        value = getattr(stcln_geo, name)
        module = getattr(value, "__module__", None)
        if module and module.startswith("stcln_geo.") and defines(module, name):
            targets[name] = f"{module}.{name}"
    return targets


def first_sentence(name: str) -> str:
    """Return the first line of what a public name says of itself, its double backticks single."""
    import stcln_geo

    return (inspect.getdoc(getattr(stcln_geo, name)) or "").partition("\n")[0].replace("``", "`")


def defines(module: str, name: str) -> bool:
    """Tell whether a module's source defines a public function or class of this name."""
    source = sys.modules[module].__file__
    tree = ast.parse(Path(source or "").read_text())
    return any(
        isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name for node in tree.body
    )


# --- the options of training ----------------------------------------------------------------


def options_page() -> str:
    """Return the page with every option of pre-training and fine-tuning, by section."""
    lines = ["# Training options", "", ABOUT_OPTIONS, ""]
    rows = option_rows()
    for section in dict.fromkeys(key.rpartition(".")[0] for key in rows):
        lines += [f"## `{section}`" if section else "## Of the whole run", ""]
        lines += ["| option | pre-training | fine-tuning | meaning |", "|---|---|---|---|"]
        for key, (defaults, meaning) in rows.items():
            if key.rpartition(".")[0] == section:
                shown = " | ".join(code(text) if text else "" for text in defaults)
                lines.append(f"| {code(key)} | {shown} | {cell(meaning)} |")
        lines.append("")
    return "\n".join(lines)


ABOUT_OPTIONS = """
`pretrain` and `finetune` take any of these by `--set KEY=VALUE`, or from a TOML file by `--config`, where the part before the last point
is the table: `[optimiser]` with `warmup = 0.1`. Values are those of TOML. The columns give the defaults; \u2013 where the command has no such
option, nothing where the default depends on data, preset or checkpoint. `--print-config` prints what a run would take.
"""


def option_rows() -> dict[str, tuple[tuple[str, str], str]]:
    """Return the defaults (pre-training, fine-tuning) and the meaning of each option, by key."""
    from stcln_geo.train.config import FinetuneConfig, PretrainConfig

    found = [dict(options_of(kind)) for kind in (PretrainConfig, FinetuneConfig)]
    keys = list(dict.fromkeys([*found[0], *found[1]]))
    keys.sort(key=lambda key: (key.rpartition(".")[0] != "", 0))
    absent = ("\u2013", "")
    return {
        key: (
            tuple(options.get(key, absent)[0] for options in found),
            next(options[key][1] for options in found if key in options),
        )
        for key in keys
    }


def options_of(kind: Any, prefix: str = "") -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the key, default and meaning of each option of a recipe, its sections included."""
    meanings = attribute_docs(kind)
    for name, field in kind.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if hasattr(type(default), "model_fields"):
            yield from options_of(type(default), f"{prefix}{name}.")
        else:
            text = json.dumps(default) if default is not None else ""
            values = ", ".join(f"`{value}`" for value in choices_of(field.annotation))
            meaning = meanings.get(name, "") + (f" Values: {values}." if values else "")
            yield prefix + name, (text, meaning)


def choices_of(annotation: Any) -> list[str]:
    """Return the texts that a type allows, if it allows no others (None does not count)."""
    if typing.get_origin(annotation) is typing.Literal:
        return [str(value) for value in typing.get_args(annotation)]
    inner = [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return choices_of(inner[0]) if len(inner) == 1 else []


def attribute_docs(kind: Any) -> dict[str, str]:
    """Return what stands under the attributes of a class and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if base.__module__.startswith("stcln_geo."):
            (tree,) = ast.parse(inspect.getsource(base)).body
            for field, text in itertools.pairwise(tree.body):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    docs[field.target.id] = ast.literal_eval(text.value).replace("``", "`")
    return docs


# --- the command line reference ------------------------------------------------------------


FOR_SCRIPTS = """
`stcln-geo COMMAND --help` prints the same in a terminal, and `stcln-geo --install-completion` lets the shell complete commands and options.

## For scripts

| exit code | meaning |
|---|---|
| 0 | done, or nothing to do |
| 1 | part of the work failed and the rest is done, or `validate`, `probe` or `repair` found something wrong |
| 2 | what was asked for cannot be done: a wrong option or file, a full disk. One sentence says why, and the remedy |
| 130 | interrupted: the same command goes on |

Results go to standard output; progress, warnings and errors to standard error. Figures are better read from files than from what is printed:
`evaluate --json FILE`, `checkpoint info --json`, `run.json` of each run and map, `accuracy.json` of a map.
"""


def command_tree() -> Any:
    """Return the click command that the typer application stands for."""
    import typer

    return typer.main.get_command(importlib.import_module("stcln_geo.cli.main").app)


def cli_page() -> str:
    """Return the page with every command, its arguments and its options."""
    root = command_tree()
    lines = ["# Command line", "", paragraphs(root.help), "", FOR_SCRIPTS, ""]
    lines += command_lines(root, COMMAND, level=2)
    return "\n".join(lines) + "\n"


def command_lines(command: Any, path: str, *, level: int) -> list[str]:
    """Return the lines for a command and, where it is a group, for its commands."""
    context = command.context_class(command, info_name=path)
    children = subcommands(command, context)
    lines: list[str] = []
    if path != COMMAND:
        lines += [f"{'#' * level} `{path}`", "", paragraphs(command.help), ""]
    if not children:
        usage = command.get_usage(context).removeprefix("Usage:").split()
        lines += ["```text", " ".join(usage), "```", ""]
    rows = [
        (record[0], record[1])
        for parameter in command.get_params(context)
        if not getattr(parameter, "hidden", False)
        and parameter.name not in {"help", "install_completion", "show_completion"}
        and (record := parameter.get_help_record(context)) is not None
    ]
    if rows:
        lines += ["| name | meaning |", "|---|---|"]
        lines += [f"| {code(name)} | {cell(text)} |" for name, text in rows]
        lines.append("")
    for name, child in children.items():
        lines += command_lines(child, f"{path} {name}", level=min(level + (path != COMMAND), 6))
    return lines


def subcommands(command: Any, context: Any) -> dict[str, Any]:
    """Return the visible commands of a group, in its order; empty for a plain command."""
    if not hasattr(command, "list_commands"):
        return {}
    children = {name: command.get_command(context, name) for name in command.list_commands(context)}
    return {name: child for name, child in children.items() if not child.hidden}


def paragraphs(text: str | None) -> str:
    """Return a help text as Markdown: the marks that keep lines apart in a terminal go."""
    return (text or "").replace("\b", "").replace("\f", "").strip()


def cell(text: str) -> str:
    """Escape a text for a table cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[")


def code(text: str) -> str:
    """Return a name as inline code that a table cell can hold."""
    escaped = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return f"<code>{escaped.replace('|', '&#124;')}</code>"
