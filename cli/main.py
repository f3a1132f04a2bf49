"""The ``stcln-geo`` command: mounts the verbs and turns errors into sentences."""

from __future__ import annotations

import contextlib
import errno
import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

__all__ = ["app", "run"]

_GROUPS = {
    "catalogs": "List, show and probe the STAC providers that are described.",
    "cube": "Plan, build, check and look at cubes.",
    "labels": "Burn field labels into a cube and split them by field.",
    "checkpoint": "Import published weights; describe, join and export checkpoints.",
    "archive": "Assemble archives of many sites and seasons.",
    "import": "Import the published sets PASTIS and MTLCC.",
    "protocol": "List and show how published sets are split, trained on and judged.",
    "cog": "Check cloud-optimized GeoTIFFs.",
    "evaluate": "Score a network on held-out fields, or a map on points or parcels.",
}
_VERBS = {
    "demo": "Run the whole path on a simulated region, or on a catalog folder.",
    "simulate": "Write a simulated Sentinel-2 archive.",
    "pretrain": "Pre-train the network on a cube without labels.",
    "finetune": "Fine-tune the network on few labelled fields.",
    "experiment": "Run the paper's experiments, with several seeds and intervals.",
    "predict": "Map a whole region into cloud-optimized GeoTIFFs.",
    "parcels": "Write what a map says about each parcel.",
    "polygons": "Write a map as polygons.",
}
_MODULES = {"import": "import_"}
"""Modules of verbs that cannot have the verb's name."""

_ORDER = (
    "demo", "simulate", "catalogs", "cube", "archive", "import", "protocol", "labels", "pretrain",
    "finetune", "evaluate", "experiment", "predict", "parcels", "polygons", "checkpoint", "cog",
)  # fmt: skip


_SIGNALS = 128
_INTERRUPTED = 130
_CONTINUES = "Interrupted. Run the same command again: it continues where it stopped."


class _LazyGroup(TyperGroup):
    """Imports a verb's module when the verb is used; the overview needs none of them."""

    def list_commands(self, ctx: Any) -> list[str]:
        """List the verbs in the order of the data's path."""
        return list(_ORDER)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return the command of a verb, importing its module only to run or describe it."""
        if cmd_name not in _ORDER:
            return super().get_command(ctx, cmd_name)
        return load_command(cmd_name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command of these words; of one that does not exist, name those like it."""
        word = args[0] if args else "-"
        if not ctx.resilient_parsing and not word.startswith("-") and word not in _ORDER:
            ctx.fail(f"No such command {word!r}.{_like(word)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the overview from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, {**_GROUPS, **_VERBS}[name]) for name in _ORDER])


def _like(word: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(word, _ORDER)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def load_command(name: str) -> Any:
    """Import the module of a verb and return its click command."""
    module = importlib.import_module(f".{_MODULES.get(name, name)}", __package__)
    command: Any
    if name in _GROUPS:
        command = typer.main.get_group(module.app)
    else:
        single = typer.Typer(add_completion=False, rich_markup_mode=None)
        single.command(name=name)(getattr(module, name))
        command = typer.main.get_command(single)
    command.name = name
    return command


app = typer.Typer(
    name="stcln-geo",
    cls=_LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        from .. import __version__

        typer.echo(f"stcln-geo {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """From a STAC search to a crop map of a whole region, with few labels."""


def run(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 failed, 2 a user's mistake, 130 interrupted.

    Above that, 128 and the number of the signal that ended it, as 143 for SIGTERM.
    """
    _say_warnings_plainly()
    code = invoke(sys.argv[1:] if arguments is None else arguments)
    if code > _SIGNALS:
        # Said here, once: the demo runs commands within a command.
        _complain(_CONTINUES)
    sys.exit(code)


def invoke(arguments: list[str]) -> int:
    """Run one command in this process and return its exit code."""
    from ._common import ending_on_signals

    with ending_on_signals() as got:
        code = _invoke(arguments)
    return _SIGNALS + got[0] if got and code == _INTERRUPTED else code


def _invoke(arguments: list[str]) -> int:
    from ..errors import StclnGeoError, TaskError

    command = typer.main.get_command(app)
    try:
        # Commands that start processes of themselves repeat the arguments: hence obj.
        outcome = command.main(
            args=arguments, prog_name="stcln-geo", standalone_mode=False, obj=list(arguments)
        )
    except StclnGeoError as error:
        _complain(str(error))
        return 1 if isinstance(error, TaskError) else 2
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):  # standard error may go to the same disk
            _complain(
                f"Cannot write {error.filename or 'what is printed or saved'}: {error.strerror}. "
                "Free some room, and run the same command again."
            )
        return 1
    except Exception as error:
        shown = getattr(error, "show", None)
        if shown is None:
            raise
        shown()  # click's own complaint about a wrong flag or a missing argument
        return int(getattr(error, "exit_code", 2))
    return outcome if isinstance(outcome, int) else 0


def _say_warnings_plainly() -> None:
    """Show our own warnings as lines for people, without the place in the code."""
    import warnings

    from ..errors import StclnGeoWarning

    usual = warnings.showwarning

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: Any = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if issubclass(category, StclnGeoWarning):
            from ._common import warn

            warn(str(message))
        else:
            usual(message, category, filename, lineno, file, line)

    warnings.showwarning = show


def _complain(text: str) -> None:
    from ._common import console, visible

    console(stderr=True).print(f"Error: {visible(text)}", style="red", markup=False)
