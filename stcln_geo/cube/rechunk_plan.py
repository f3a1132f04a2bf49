"""What writing a cube in another layout comes to: which layout, which shards, how much memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import CubeError, InputError
from ..grid import tiles
from ..storage import Location, location
from .layout import Codec, Layout
from .store import Season, choose_season, list_seasons, open_season

__all__ = ["RechunkPlan", "plan_rechunk"]

_FIXED_BYTES = 200_000_000
_COPIES = 2.5
"""A shard in memory: as read, as written, and as it is compressed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RechunkPlan:
    """What a rechunk does; ``str`` is for people."""

    source: Location
    out: Location
    layout: Layout
    seasons: tuple[Season, ...]

    def shard_bytes(self, season: Season) -> int:
        """Return the memory (bytes) that copying one shard takes."""
        height, width = (min(self.layout.shard, side) for side in season.shape_yx)
        values = height * width * len(season.time) * (2 * len(season.bands) + 2)
        return round(_COPIES * values) + _FIXED_BYTES

    def __str__(self) -> str:
        layout = self.layout
        dates = "all dates" if layout.dates is None else f"{layout.dates} dates"
        lines = [
            f"{self.source} -> {self.out}: chunks of {layout.chunk} px and {dates} in shards of "
            f"{layout.shard} px, codec {layout.codec}"
        ]
        for season in self.seasons:
            old = season.layout
            pixels = math.prod(season.reflectance.shape) * 2 + math.prod(season.valid.shape)
            lines.append(
                f"  {season.name}: {len(tiles(season.shape_yx, layout.shard))} shards (was chunks "
                f"of {old.chunk} px in {len(tiles(season.shape_yx, old.shard))} shards of "
                f"{old.shard} px), {pixels / 1e9:.3g} GB before compression"
            )
        return "\n".join(lines)


def plan_rechunk(
    cube: str | Location,
    out: str | Location,
    *,
    chunk: int | None = None,
    shard: int | None = None,
    dates: int | None = None,
    codec: Codec = "zstd",
) -> RechunkPlan:
    """Plan another layout; writes nothing. The parameters are those of `rechunk_cube`."""
    cube, out = location(cube), location(out)
    names = list_seasons(cube) or [choose_season(cube, None)]
    seasons = tuple(open_season(cube, name) for name in names)
    unfinished = sorted(folder.name for folder in cube.glob("*.building"))
    if unfinished:
        raise CubeError(
            f"Cannot rechunk {cube}: {', '.join(unfinished)} is unfinished, and what is in it "
            "would be lost. Finish it with the command that began it."
        )
    if f"{out.resolve()}/".startswith(f"{cube.resolve()}/"):
        raise InputError(
            f"Cannot rechunk {cube} into {out}: a cube is not changed in place. "
            "Choose another path."
        )
    first = seasons[0].layout
    chunk = first.chunk if chunk is None else chunk
    if shard is None:
        shard = -(-first.shard // max(chunk, 1)) * chunk
    layout = Layout(chunk=chunk, shard=shard, dates=dates, codec=codec)
    return RechunkPlan(source=cube, out=out, layout=layout, seasons=seasons)
