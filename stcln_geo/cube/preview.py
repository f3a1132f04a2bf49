"""Pictures of a season, from its overview."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ..errors import InputError, OutputError
from ..storage import Location
from .store import open_season

__all__ = ["write_preview"]

_THUMBNAIL_PIXELS = 180
_SINGLE_PIXELS = 1200
_COLUMNS = 8


def write_preview(
    cube: str | Location, out: str | Path, *, season: str | None = None, date: str | None = None
) -> Path:
    """Write a sheet of all dates of a season, or one date, as PNG.

    Parameters
    ----------
    date
        ``YYYY-MM-DD``; None draws all dates, each under its day and its share of clear pixels.

    Raises
    ------
    InputError
        If the season has no such date.
    """
    from PIL import Image

    opened = open_season(cube, season)
    days = [str(day) for day in opened.time.astype("datetime64[D]")]
    if date is not None and date not in days:
        raise InputError(
            f"Cannot draw {date}: season {opened.name} has no such date. It has: {', '.join(days)}."
        )
    pictures = np.moveaxis(opened.overview[:], 1, -1)  # (T, 3, h, w) -> (T, h, w, 3)
    if date is not None:
        sheet = _enlarged(pictures[days.index(date)], _SINGLE_PIXELS)
    else:
        clear = opened.coverage[:].sum(axis=(1, 2)) / math.prod(opened.shape_yx)
        captions = [f"{day}  {share:.0%}" for day, share in zip(days, clear, strict=True)]
        sheet = _sheet([_enlarged(picture, _THUMBNAIL_PIXELS) for picture in pictures], captions)
    out = Path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(sheet).save(out, format="PNG")
    except OSError as error:
        raise OutputError(
            f"Cannot write the picture {out}: {error}. Choose a folder that is writable."
        ) from error
    return out


def _enlarged(picture: np.ndarray, target: int) -> np.ndarray:
    """Repeat pixels until the longer side is about ``target``; (h, w, 3) uint8."""
    factor = max(target // max(picture.shape[:2]), 1)
    return np.repeat(np.repeat(picture, factor, axis=0), factor, axis=1)


def _sheet(pictures: list[np.ndarray], captions: list[str]) -> np.ndarray:
    """Lay pictures of one size out in rows, each above its caption."""
    from PIL import Image, ImageDraw

    height, width = pictures[0].shape[:2]
    cell_height, cell_width = height + 18, max(width, 110) + 6
    columns = min(_COLUMNS, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = (index % columns) * cell_width, (index // columns) * cell_height
        sheet.paste(Image.fromarray(picture), (left, top))
        draw.text((left, top + height + 3), caption, fill="black")
    return np.asarray(sheet)
