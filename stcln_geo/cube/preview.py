"""Pictures and animations of a season, from its overview."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError, OutputError
from ..storage import Location
from .store import Season, open_season

__all__ = ["write_animation", "write_preview"]

_THUMBNAIL_PIXELS = 180
_SINGLE_PIXELS = 1200
_COLUMNS = 8
_FRAME_PIXELS = 720
_BAR = 22
"""Height of the strip under a frame (pixels), with the date and a mark of the time of year."""

_BAR_COLOUR = "#e3b505"
_FORMATS = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}


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
        If the season has no such date, or the file's name does not end in ``.png``.
    """
    from PIL import Image

    if Path(out).suffix.lower() != ".png":
        raise InputError(
            f"Cannot write a preview to {out}: it is a PNG, so that its name must end in .png. "
            "Correct it."
        )
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
        captions = _captions(opened, days)
        sheet = _sheet([_enlarged(picture, _THUMBNAIL_PIXELS) for picture in pictures], captions)
    return _save(Path(out), [Image.fromarray(sheet)], format="PNG")


def write_animation(
    cube: str | Location,
    out: str | Path,
    *,
    season: str | None = None,
    min_clear: float = 0.0,
    milliseconds: int = 600,
) -> Path:
    """Write the dates of a season as an animation, each frame with its day.

    Frames come from the overview: no pixel of the cube is decoded. A bar under the image moves
    with the time of the season.

    Parameters
    ----------
    out
        ``.gif``, ``.webp`` or ``.png`` (an animated PNG).
    min_clear
        Leave out dates on which a smaller share of the pixels, 0 to 1, is clear.
    milliseconds
        How long a frame stays.

    Raises
    ------
    InputError
        If the file's kind is unknown, or no date is clear enough.
    """
    out = Path(out)
    if out.suffix.lower() not in _FORMATS:
        raise InputError(
            f"Cannot write an animation to {out}: its name must end in "
            f"{', '.join(_FORMATS)}. Name it for example season.gif."
        )
    if not 0 <= min_clear <= 1 or not 20 <= milliseconds <= 60_000:
        raise InputError(
            f"Cannot animate with min_clear={min_clear:g} and {milliseconds} ms a frame: min_clear "
            "is a share of the pixels, 0 to 1, and a frame stays 20 to 60000 ms. Use for example "
            "--min-clear 0.3."
        )
    opened = open_season(cube, season)
    clear = _clear_shares(opened)
    chosen = np.flatnonzero(clear >= min_clear)
    if not chosen.size:
        raise InputError(
            f"Cannot animate season {opened.name}: none of its {len(clear)} dates has "
            f"{min_clear:.0%} clear pixels; the clearest has {clear.max():.0%}. Lower --min-clear."
        )
    captions = _captions(opened, [str(day) for day in opened.time.astype("datetime64[D]")])
    length = max(int(opened.days[-1]), 1)
    pictures = np.moveaxis(opened.overview[:], 1, -1)  # (T, 3, h, w) -> (T, h, w, 3)
    frames = [
        _frame(_enlarged(pictures[index], _FRAME_PIXELS), captions[index],
               float(opened.days[index]) / length)
        for index in chosen
    ]  # fmt: skip
    kind = _FORMATS[out.suffix.lower()]
    if kind == "GIF":
        frames = _with_one_palette(frames)
    return _save(
        out, frames, format=kind, save_all=True, append_images=frames[1:], duration=milliseconds,
        loop=0, **({"quality": 85, "method": 4} if kind == "WEBP" else {}),
    )  # fmt: skip


def _clear_shares(season: Season) -> np.ndarray:
    """Return the share of clear pixels on each date: (T,) float."""
    shares: np.ndarray = season.coverage[:].sum(axis=(1, 2)) / math.prod(season.shape_yx)
    return shares


def _captions(season: Season, days: list[str]) -> list[str]:
    return [f"{day}  {share:.0%}" for day, share in zip(days, _clear_shares(season), strict=True)]


def _frame(picture: np.ndarray, caption: str, moment: float) -> Any:
    """Return an image with a strip under it: the date, and a bar up to the time of the season."""
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    frame = Image.new("RGB", (max(width, 130), height + _BAR), "black")
    frame.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(frame)
    draw.rectangle((0, height, max(round(frame.width * moment) - 1, 0), height + 2), _BAR_COLOUR)
    draw.text((4, height + 7), f"{caption} clear", fill="white")
    return frame


def _with_one_palette(frames: list[Any]) -> list[Any]:
    """Give all frames the colours of all together: palettes of their own would flicker."""
    from PIL import Image

    small = [frame.resize((64, 64)) for frame in frames]
    # The bar is thin: without a share of its own it would lose its colour.
    sample = Image.new("RGB", (64, 64 * len(small) + 16), _BAR_COLOUR)
    for index, frame in enumerate(small):
        sample.paste(frame, (0, 64 * index))
    palette = sample.quantize(254)
    return [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]


def _save(out: Path, frames: list[Any], **options: Any) -> Path:
    """Write under a temporary name, then rename."""
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        frames[0].save(part, **options)
        part.replace(out)
    except OSError as error:
        raise OutputError(
            f"Cannot write the picture {out}: {error}. Choose a folder that is writable."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
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
