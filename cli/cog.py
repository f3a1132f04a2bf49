"""``stcln-geo cog``: check cloud-optimized GeoTIFFs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import say, warn

__all__ = ["app"]

app = typer.Typer(
    help="Check cloud-optimized GeoTIFFs.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@app.callback()
def _group() -> None:
    """Check cloud-optimized GeoTIFFs."""


@app.command()
def validate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A class or confidence map.")],
    legend: Annotated[
        Path | None, typer.Option(help="Legend file; default: the legend stored in the map.")
    ] = None,
) -> None:
    """Check the layout and the content of a map.

    Beyond the usual checks of offsets: every tile decodes, every value is a class or nodata,
    overviews show only classes that lie below them, palette and names are there. Exits with 1
    where something is wrong.
    """
    from ..cog import validate_cog
    from ..legend import Legend

    errors, warnings = validate_cog(file, legend=None if legend is None else Legend.read(legend))
    for text in warnings:
        warn(text)
    for text in errors:
        say(f"Error: {text}")
    if errors or warnings:
        raise typer.Exit(1)
    say(f"{file} is a valid cloud-optimized GeoTIFF.")
