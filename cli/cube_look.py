"""``stcln-geo cube info``, ``validate`` and ``preview``: look at a cube and check it."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from ._common import say, warn
from ._cube_options import SeasonOption

__all__ = ["info", "preview", "validate"]


def info(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="Folder of the cube.")],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON, with each date and how clear it is.")
    ] = False,
) -> None:
    """Describe a cube: grid, bands, seasons, dates, labels.

    A date counts as clear in 'gap' where it is at least half as clear as the clearest one.
    """
    import json

    from ..cube.info import describe_cube

    told = describe_cube(cube)
    if as_json:
        typer.echo(json.dumps(told, indent=2))
        return
    for season in told["seasons"]:
        _say_season(season)
    for one in told["unfinished"]:
        command = "cube append' or 'cube repair" if one["change"] else "cube build"
        warn(f"{one['season']}.building is unfinished: run the same '{command}' command again.")


def _say_season(season: dict[str, Any]) -> None:
    from ..cube.info import longest_gap

    dates = season["dates"]
    first, last = (dates[end]["time"][:10] for end in (0, -1))
    say(f"Season {season['season']}: {len(dates)} dates, {first} to {last}")
    say(
        f"  grid    {season['crs']}, {season['resolution']:g} m, {season['width']} x "
        f"{season['height']} px; chunks {season['chunk']} px, shards {season['shard']} px"
    )
    say(f"  bands   {', '.join(season['bands'])}")
    if season["level"] != "surface":
        say(f"  level   {season['level']} reflectance")
    if season["composite"]:
        say(f"  dates   {season['composite']} of each {season['period']}")
    say(f"  clear   {season['clear']:.1%} of all pixels and dates")
    gap = longest_gap(dates)
    if gap is not None:
        before, after = map(datetime.date.fromisoformat, gap)
        days = (after - before).days
        say(f"  gap     {days} days at most between clear dates, {before} to {after}")
    if season["cloud_mask"]:
        weights = season["cloud_mask_weights"]
        version = f", weights {weights:g}" if weights is not None else ""
        say(f"  clouds  {season['cloud_mask']}{version}")
    for key in ("catalog", "collection", "region"):
        if season[key]:
            say(f"  {key:7} {season[key]}")
    suspect = season["offset_suspect"]
    if suspect:
        named = f"{', '.join(suspect[:5])}{' ...' if len(suspect) > 5 else ''}"
        say(f"  suspect {len(suspect)} dates whose offset is in doubt: {named}")
    labels = season["labels"]
    if labels is not None:
        names = ", ".join(labels["classes"])
        say(f"  labels  {labels['fields']} fields of {len(labels['classes'])} classes: {names}")


def validate(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="Folder of the cube.")],
    season: Annotated[
        str | None, typer.Option("--season", help="Season (YYYY-MM-DD); by default all.")
    ] = None,
) -> None:
    """Check that a cube keeps the cube contract.

    Every breach is named with its remedy. Exits with 1 if there is one.
    """
    from ..cube.contract import validate_cube
    from ..cube.dataset import open_cube
    from ..cube.store import choose_season, list_seasons

    names = [choose_season(cube, season)] if season is not None else list_seasons(cube)
    if not names:
        choose_season(cube, None)
    broken = False
    for name in names:
        errors, warnings = validate_cube(open_cube(cube, name, mask_and_scale=False))
        for text in warnings:
            warn(f"{name}: {text}")
        for text in errors:
            say(f"{name}: {text}")
        say(f"{name}: {'breaks the contract' if errors else 'keeps the contract'}")
        broken = broken or bool(errors)
    if broken:
        raise typer.Exit(1)


def preview(
    cube: Annotated[Path, typer.Argument(metavar="CUBE", help="Folder of the cube.")],
    out: Annotated[Path | None, typer.Argument(metavar="OUT.png", help="Picture to write.")] = None,
    season: SeasonOption = None,
    date: Annotated[
        str | None,
        typer.Option("--date", metavar="YYYY-MM-DD", help="One date; by default a sheet of all."),
    ] = None,
    animate: Annotated[
        Path | None,
        typer.Option("--animate", metavar="FILE", help="Write an animation: .gif, .webp or .png."),
    ] = None,
    min_clear: Annotated[
        float | None,
        typer.Option(
            "--min-clear", help="Of an animation: least share of clear pixels of a date, 0 to 1."
        ),
    ] = None,
    frame_ms: Annotated[
        int | None,
        typer.Option(
            "--frame-ms", help="Of an animation: milliseconds a frame stays. Default: 600."
        ),
    ] = None,
) -> None:
    """Draw the dates of a season, as a sheet or an animation.

    Both come from the overview that the cube stores, so no pixel is decoded.
    """
    from ..cube.preview import write_animation, write_preview
    from ..errors import InputError

    if out is None and animate is None:
        raise InputError(
            f"Cannot draw {cube}: no file was named. Give OUT.png for a sheet of all dates, or "
            "--animate FILE.gif."
        )
    if date is not None and out is None:
        raise InputError(
            f"Cannot use --date {date} with --animate alone: an animation shows all dates. Name "
            "OUT.png for a picture of that date, or leave --date out."
        )
    if animate is None and (min_clear is not None or frame_ms is not None):
        raise InputError(
            f"Cannot use --{'frame-ms' if min_clear is None else 'min-clear'} without --animate: "
            "it is of an animation. Add --animate FILE.gif, or leave it out."
        )
    if out is not None:
        say(f"{write_preview(cube, out, season=season, date=date)}")
    if animate is not None:
        made = write_animation(
            cube,
            animate,
            season=season,
            min_clear=0.0 if min_clear is None else min_clear,
            milliseconds=600 if frame_ms is None else frame_ms,
        )
        say(f"{made}")
