"""``stcln-geo catalogs``: the STAC providers that are described."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ._common import say, warn

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="List, show and probe the STAC providers that are described.",
)


Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="A shipped name, a YAML file, a folder or address."),
]


@app.command("list")
def list_catalogs() -> None:
    """List the shipped catalogs and their collections."""
    from ..catalog import shipped_catalogs

    for name, catalog in shipped_catalogs().items():
        collections = ", ".join(catalog.collections) or "any"
        say(f"{name:20} {catalog.title}; collections: {collections}")


@app.command()
def show(
    name: Name,
) -> None:
    """Print a catalog as YAML.

    It says where the catalog is, its bands and what its numbers mean. The output can be saved,
    changed and given to --catalog. A password or key in the endpoint's address is not shown.
    """
    import yaml

    from ..catalog import load_catalog, shipped_catalogs
    from ..web import redact

    catalog = shipped_catalogs().get(name) or load_catalog(name)
    content = catalog.model_dump(mode="json", exclude_defaults=True)
    plain = redact(catalog.endpoint or "")
    if plain != (catalog.endpoint or ""):
        content["endpoint"] = plain
        warn(
            "The endpoint holds a secret, which is not shown: put it in again where you save this."
        )
    say(yaml.safe_dump(content, sort_keys=False, allow_unicode=True).rstrip())


@app.command()
def probe(
    name: Name,
    collection: Annotated[
        str | None, typer.Option("--collection", help="Collection id; by default every one.")
    ] = None,
    bbox: Annotated[
        str | None, typer.Option("--bbox", metavar="W,S,E,N", help="Where to look for an item.")
    ] = None,
    region: Annotated[
        Path | None, typer.Option("--region", help="The same as polygons in a vector file.")
    ] = None,
    time: Annotated[
        str | None, typer.Option("--time", metavar="START/END", help="When to look for an item.")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A private host that assets may be on; repeatable."),
    ] = None,
) -> None:
    """Compare a live provider with its description.

    Searches one item per collection, compares asset names, pixel sizes, nodata, scale and offset,
    and reads a small window of one band. Exits with 1 where they contradict each other.
    """
    from ..catalog import load_catalog
    from ..cube.probe import probe_catalog
    from ..cube.time_range import parse_time_range
    from ..errors import InputError
    from ..region import Region
    from ..web import redact

    if bbox is not None and region is not None:
        raise InputError(
            f"Cannot use --bbox {bbox} and --region {region} together: a probe looks in one "
            "region. Give one of them."
        )
    area = Region.from_file(region) if region is not None else None
    if bbox is not None:
        area = Region.from_bbox(bbox)
    findings = probe_catalog(
        load_catalog(name, allow_hosts=allow_host or ()), collection, area, parse_time_range(time)
    )
    headings = ("", "collection", "what", "described", "found")
    rows = [
        ("ok" if one.agrees else "NO", one.collection, one.what, one.described, one.found)
        for one in findings
    ]
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(4)]
    for row in (headings, *rows):
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        say("  ".join([*cells, row[4]]).rstrip())
    wrong = sum(not one.agrees for one in findings)
    if wrong:
        say(f"{wrong} of {len(findings)} findings contradict the description of '{redact(name)}'.")
        raise typer.Exit(1)
    say(f"All {len(findings)} findings agree with the description of '{redact(name)}'.")
