"""Describe an archive as a table for people."""

from __future__ import annotations

from ..cube.stack import is_stack, open_stack
from ..cube.store import open_season
from ..storage import Location, location, tree_bytes
from .index import list_members, open_archive, unfinished_seasons
from .plan import size_text

__all__ = ["describe_archive"]


def describe_archive(path: str | Location) -> str:
    """Return a line per season: sites, hectares, dates, clear fraction, labels, bytes on disk."""
    path = location(path)
    archive = open_archive(path)
    index = archive.index
    heights, widths = (index["shape"].map(lambda shape, axis=axis: shape[axis]) for axis in (0, 1))
    table = index.assign(
        hectares=heights * widths * index["resolution"] ** 2 / 1e4,
        weight=heights * widths * index["dates"],
    )
    kinds = index.groupby("kind")["path"].nunique()
    members = ", ".join(f"{count} {kind}s" for kind, count in sorted(kinds.items()))
    lines = [
        f"{path}: {len(index)} site-seasons of {index['id'].nunique()} sites in {members}",
        f"  bands   {', '.join(archive.bands) or 'none that all members have'}",
        f"  zones   {', '.join(sorted(set(index['crs'])))}",
        f"  {'season':12}{'sites':>8}{'hectares':>12}{'dates':>12}{'clear':>8}{'fields':>10}"
        f"{'on disk':>10}",
    ]
    for season, rows in table.groupby("season"):
        few, many = int(rows["dates"].min()), int(rows["dates"].max())
        clear = (rows["clear_fraction"] * rows["weight"]).sum() / max(rows["weight"].sum(), 1)
        members_of = [archive.member(member) for member in sorted(set(rows["path"]))]
        fields = _fields_text([_fields(member, str(season)) for member in members_of])
        size = sum(tree_bytes(member / str(season)) for member in members_of)
        dates = str(few) if few == many else f"{few}-{many}"
        lines.append(
            f"  {season:12}{len(rows):>8}{rows['hectares'].sum():>12,.0f}{dates:>12}{clear:>8.1%}"
            f"{fields:>10}{size_text(size):>10}"
        )
    unfinished = [
        f"{member}/{name}"
        for member in list_members(path)
        for name in unfinished_seasons(archive.member(member))
    ]
    if unfinished:
        lines.append(
            f"  unfinished: {', '.join(unfinished)}; run the same 'archive create' command again"
        )
    return "\n".join(lines)


def _fields(place: Location, season: str) -> int | None:
    """Return the labelled fields of a member's season; None where labels were not counted."""
    opened = open_stack(place, season) if is_stack(place, season) else open_season(place, season)
    if opened.legend is None:
        return 0
    # Number 0 are pixels between the fields.
    return None if opened.fields is None else int((opened.fields.number > 0).sum())


def _fields_text(counts: list[int | None]) -> str:
    known = sum(count or 0 for count in counts)
    if None in counts:
        return f"{known:,} + ?"
    return f"{known:,}" if known else "-"
