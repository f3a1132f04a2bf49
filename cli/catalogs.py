"""``stcln-geo catalogs``: the STAC providers that are described."""

from __future__ import annotations

from typing import Annotated

import typer

from ._common import say

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List and show the STAC providers that are described.",
)


@app.command("list")
def list_catalogs() -> None:
    """List the shipped catalogs and their collections."""
    from ..catalog import shipped_catalogs

    for name, catalog in shipped_catalogs().items():
        collections = ", ".join(catalog.collections) or "any"
        say(f"{name:20} {catalog.title}; collections: {collections}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A shipped name, a YAML file, a folder or address.")],
) -> None:
    """Print a catalog as YAML: where it is, its bands and what its numbers mean.

    The output can be saved, changed and given to --catalog.
    """
    import yaml

    from ..catalog import load_catalog, shipped_catalogs

    catalog = shipped_catalogs().get(name) or load_catalog(name)
    content = catalog.model_dump(mode="json", exclude_defaults=True)
    say(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip())
