"""``stcln-geo protocol``: list and show how published sets are split, trained on and judged."""

from __future__ import annotations

from typing import Annotated

import typer

from ._common import say

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help=(
        "List and show protocols: how a set is split, trained on and judged.\n\n"
        "`labels split`, `pretrain`, `finetune` and `evaluate` follow one with --protocol NAME; "
        "`experiment protocol` does all of it, for all rounds."
    ),
)


@app.command(name="list")
def list_all() -> None:
    """List the protocols that come with the package."""
    from ..train.protocol import list_protocols, load_protocol

    for name in list_protocols():
        protocol = load_protocol(name)
        say(f"{name:<18}{protocol.title}")
        if protocol.rounds:
            say(f"{'':<18}rounds: {', '.join(f'{name}:{one.name}' for one in protocol.rounds)}")


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="Name, one round as pastis-official:fold-1, or path of a .toml file.",
        ),
    ],
    toml: Annotated[
        bool, typer.Option("--toml", help="Print the file, as a start for one of your own.")
    ] = False,
) -> None:
    """Say what a protocol sets, and where it is from.

    Notes tell how it differs from what was published.
    """
    from ..train.protocol import load_protocol, read_protocol_text

    protocol = load_protocol(name)
    if toml:
        say(read_protocol_text(name).rstrip())
        return
    for line in protocol.lines():
        say(line)
