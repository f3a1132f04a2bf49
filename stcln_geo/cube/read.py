"""Read one window of one asset onto the cube's grid, or say exactly why not.

Where the file's pixels are squares of whole pixels of the grid, its numbers are read as they are;
otherwise GDAL warps them without approximating. Addresses are signed when they are opened.
Failures are sorted into kinds, retried where that can help, and recorded.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import os
import random
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..catalog import Access
from ..errors import InputError, UnsafeAddressError
from ..grid import Window
from ..storage import Location, S3Path, write_file, writing
from .addresses import follow_redirects, redact
from .hosts import asked_pause, hold_back, host_gate
from .open_files import open_file
from .pixels import Pixels
from .signing import Tokens

if TYPE_CHECKING:
    from odc.geo.geobox import GeoBox

__all__ = [
    "AssetReadError",
    "AssetReader",
    "FailureKind",
    "LedgerEntry",
    "Resampling",
    "append_ledger",
    "entries_since",
    "read_ledger",
]

Resampling = Literal["nearest", "bilinear", "cubic", "average"]
"""How reflectance is brought onto another grid; scene classes are always taken by nearest."""

FailureKind = Literal["gone", "denied", "transient", "corrupt"]
"""Missing for good; not allowed; the network or server; the file itself."""

_ATTEMPTS: Mapping[str, int] = {"gone": 1, "denied": 2, "transient": 4, "corrupt": 2}
"""Tries until a failure of that kind is final; each kind is counted by itself."""

_MORE_ATTEMPTS_FAR: Mapping[str, int] = {"denied": 1, "corrupt": 1}
"""Tries more where the file is far away: a signature may have run out, an answer been cut."""

_PAUSE_SECONDS = 0.5
_TOLERANCE_PIXELS = 1e-12
"""Small enough that GDAL places every pixel by itself, so that no pixel depends on the window it
is read in (with 0 a WarpedVRT cannot be opened, with 0.125 a quarter of the pixels differ)."""

_METRES_PER_DEGREE = 111_320.0
_GDAL_OPTIONS = {
    # GDAL's cache of blocks would grow to a twentieth of the machine's memory in every process,
    # outside any budget, and a block reads each window once. Bytes, for the whole process.
    "GDAL_CACHEMAX": 64_000_000,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_TIMEOUT": "120",
    "GDAL_HTTP_CONNECTTIMEOUT": "20",
    "GDAL_HTTP_MERGE_CONSECUTIVE_RANGES": "YES",
    "GDAL_INGESTED_BYTES_AT_OPEN": "32768",
}
_ASK_AGAIN_SECONDS = 3600.0
_MOST_KNOWN = 50_000
_leads_to: dict[tuple[str, tuple[str, ...], tuple[str, ...]], tuple[float, str]] = {}
"""When, and where, addresses were found to lead in this process: tasks read the same files and need
not ask each time. Forgotten at a failure, and after an hour."""

_failed: Counter[str] = Counter()
"""Failed reads of each address in this process: GDAL remembers failures, and must not."""

_SIGNS: tuple[tuple[FailureKind, str], ...] = (
    ("denied", r"\b(401|403|409)\b|access ?denied|forbidden|credentials|permission denied"),
    ("transient", r"\b(429|500|502|503|504)\b|timed? ?out|could not resolve|couldn.t connect"
                  r"|connection|curl error|reset by peer|temporarily|max retries"),
    ("gone", r"\b404\b|does not exist|no such file|not found"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerEntry:
    """One asset that could not be read."""

    item: str
    asset: str
    href: str
    kind: FailureKind
    error: str
    attempts: int
    window: tuple[int, int, int, int]
    """Row, column, height, width counted from the cube's first pixel."""
    time: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )


class AssetReadError(RuntimeError):
    """An asset could not be read; says which kind of failure, after how many attempts."""

    def __init__(self, href: str, kind: FailureKind, attempts: int, reason: str) -> None:
        """Keep the parts of the message."""
        super().__init__(href, kind, attempts, reason)
        self.href, self.kind, self.attempts, self.reason = href, kind, attempts, reason

    def __str__(self) -> str:
        """Return one sentence."""
        return f"{self.href} is {self.kind} after {self.attempts} attempts: {self.reason}"


class AssetReader:
    """Reads windows of assets; may be used by several threads.

    Parameters
    ----------
    access
        What the catalog says about reading its pixels.
    """

    def __init__(self, access: Access | None = None, *, pause: float = _PAUSE_SECONDS) -> None:
        """Prepare; nothing is opened yet."""
        self._access = access or Access()
        self._pause = pause
        self._tokens = Tokens(self._access)
        self.reads = 0
        """Asset windows read so far."""

    def read(
        self, href: str, geobox: GeoBox, *, resampling: Resampling = "nearest", nodata: int = 0
    ) -> np.ndarray:
        """Return the pixels of a grid, (H, W) in the file's dtype; see ``fetch``."""
        height, width = (int(size) for size in geobox.shape)
        pixels = self.fetch(href, geobox, resampling=resampling, nodata=nodata)
        return pixels.on_grid(Window(0, 0, height, width))

    def fetch(
        self, href: str, geobox: GeoBox, *, resampling: Resampling = "nearest", nodata: int = 0
    ) -> Pixels:
        """Return what the pixels of a grid are made of: the file's own, where they lie on it.

        Parameters
        ----------
        nodata
            Number that means no data in the file, and beyond its edges in the result.

        Raises
        ------
        AssetReadError
            If the asset cannot be read, after retrying where that can help.
        """
        failures: Counter[FailureKind] = Counter()
        while True:
            try:
                with (
                    host_gate(href, self._access.max_connections),
                    _environment(self._access, href, fresh=_failed[href] > 0),
                ):
                    address = _anew(self._resolved(href), _failed[href])
                    pixels = _fetch_once(address, geobox, resampling, nodata)
            except UnsafeAddressError as error:
                raise AssetReadError(href, "denied", 1, str(error)) from error
            except InputError:
                raise
            except Exception as error:  # GDAL, the network and the signer all fail here
                reason = _reason(error, href)
                kind = _kind_of(reason)
                failures[kind] += 1
                _failed[href] += 1
                _leads_to.pop(self._asked(href), None)
                if failures[kind] >= _most_attempts(kind, href):
                    raise AssetReadError(href, kind, failures.total(), reason[:500]) from error
                self._prepare_retry(href, kind, reason, failures.total())
                continue
            self.reads += 1
            return pixels

    def _resolved(self, href: str) -> str:
        """Return the signed address that a read may go to, every step on the way checked."""
        signed = self._tokens.sign(href)
        if signed != href:
            # Signed addresses change; where they lead is settled by their host.
            return follow_redirects(signed, self._access)
        known = _leads_to.get(self._asked(href))
        if known is None or time.monotonic() - known[0] > _ASK_AGAIN_SECONDS:
            known = time.monotonic(), follow_redirects(href, self._access)
            if len(_leads_to) >= _MOST_KNOWN:
                _leads_to.clear()
            _leads_to[self._asked(href)] = known
        return known[1]

    def _asked(self, href: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        """Return what the answer of `follow_redirects` depends on."""
        return href, self._access.allow_hosts, self._access.direct_hosts

    def _prepare_retry(self, href: str, kind: FailureKind, reason: str, failed: int) -> None:
        """Wait as long as the host asks for, or a little longer each time; renew what is stale."""
        if kind == "denied":
            self._tokens.forget(href)
        pause = self._pause * 2 ** (failed - 1) * (1 + random.random() / 4)
        # A refusal in the middle of a file looks like a broken file.
        if kind == "corrupt" or re.search(r"\b(429|503)\b", reason):
            asked = asked_pause(self._tokens.sign(href))
            if asked is not None:
                hold_back(href, asked)
                return
        time.sleep(pause)


def append_ledger(path: Location, entry: LedgerEntry) -> None:
    """Add a line to a ledger (JSON lines); safe for several processes.

    Nothing can be appended to an object: there each line is one of its own, below the path.
    """
    line = json.dumps(asdict(entry)) + "\n"
    if isinstance(path, S3Path):
        write_file(path / f"{time.time_ns():020d}-{uuid.uuid4().hex}.json", line.encode())
        return
    with writing(path):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def read_ledger(path: Location) -> list[LedgerEntry]:
    """Return the failures recorded so far; none if there is no ledger."""
    if isinstance(path, S3Path):
        lines = [piece.read_text() for piece in path.iterdir()]
    else:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    entries = []
    for line in lines:
        content = json.loads(line)
        entries.append(LedgerEntry(**{**content, "window": tuple(content["window"])}))
    return entries


def entries_since(before: list[LedgerEntry], now: list[LedgerEntry]) -> tuple[LedgerEntry, ...]:
    """Return what a ledger has more than before; clocks of several machines may disagree."""
    known = Counter(before)
    new = []
    for entry in now:
        if known[entry]:
            known[entry] -= 1
        else:
            new.append(entry)
    return tuple(new)


def _fetch_once(href: str, geobox: GeoBox, resampling: Resampling, nodata: int) -> Pixels:
    from rasterio.enums import Resampling as Method
    from rasterio.vrt import WarpedVRT

    height, width = (int(size) for size in geobox.shape)
    with open_file(href) as source:
        place = _on_grid(source, geobox)
        if place is not None and _is_plain(place.step, resampling, nodata, source.dtypes[0]):
            return _read_own(source, place, (height, width), resampling, nodata)
        x_scale, y_scale = _target_pixels_per_source_pixel(source, geobox)
        with WarpedVRT(
            source,
            crs=_crs(geobox),
            transform=geobox.affine,
            height=height,
            width=width,
            resampling=Method[resampling],
            src_nodata=nodata,
            nodata=nodata,
            tolerance=_TOLERANCE_PIXELS,
            # GDAL would guess these from the shape of the window, and blur by them.
            XSCALE=f"{x_scale:.6g}",
            YSCALE=f"{y_scale:.6g}",
        ) as warped:
            pixels: np.ndarray = warped.read(1)
    return Pixels(values=pixels, row=0, col=0, nodata=nodata)


def _target_pixels_per_source_pixel(source: Any, geobox: GeoBox) -> tuple[float, float]:
    """Return how much finer the grid is than the file, along x and y; the same for all windows."""
    x_size, y_size = source.res
    if source.crs is not None and source.crs.is_geographic:
        latitude = (source.bounds.top + source.bounds.bottom) / 2
        y_size *= _METRES_PER_DEGREE
        x_size *= _METRES_PER_DEGREE * max(math.cos(math.radians(latitude)), 0.01)
    resolution = float(geobox.affine.a)
    return x_size / resolution, y_size / resolution


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a file lies on a grid, in the grid's pixels."""

    row: int
    col: int
    step: int
    """Pixels of the grid along the side of one of the file."""


def _on_grid(source: Any, geobox: GeoBox) -> _Place | None:
    """Return where a file lies, if each of its pixels is a square of whole pixels of the grid."""
    theirs, ours = source.transform, geobox.affine
    step = round(theirs.a / ours.a)
    expected = (step * ours.a, step * ours.b, step * ours.d, step * ours.e)
    if step < 1 or (theirs.a, theirs.b, theirs.d, theirs.e) != expected:
        return None
    col, row = (theirs.c - ours.c) / ours.a, (theirs.f - ours.f) / ours.e
    if col != round(col) or row != round(row) or not _same_crs(source.crs, geobox.crs):
        return None
    return _Place(round(row), round(col), step)


def _is_plain(step: int, resampling: Resampling, nodata: int, dtype: str) -> bool:
    """Return True where whole numbers give what GDAL would, exactly, see ``Pixels``."""
    if step == 1 or resampling == "nearest":
        return True
    exact = nodata == 0 and dtype in {"uint8", "uint16"}
    return resampling == "bilinear" and step == 2 and exact


def _same_crs(theirs: Any, ours: Any) -> bool:
    if theirs is None:
        return False
    epsg = theirs.to_epsg()
    return bool(epsg == ours.epsg if epsg and ours.epsg else theirs.to_wkt() == ours.to_wkt())


def _crs(geobox: GeoBox) -> Any:
    from rasterio.crs import CRS

    crs: Any = geobox.crs
    return CRS.from_epsg(crs.epsg) if crs.epsg else CRS.from_wkt(crs.to_wkt())


def _read_own(
    source: Any, place: _Place, shape: tuple[int, int], resampling: Resampling, nodata: int
) -> Pixels:
    """Read the file's own pixels under a grid, and those beside them that it needs."""
    from rasterio.windows import Window as FileWindow

    (height, width), step = shape, place.step
    smooth = step > 1 and resampling != "nearest"
    reach = int(smooth)
    top = min(max(-place.row // step - reach, 0), source.height)
    left = min(max(-place.col // step - reach, 0), source.width)
    bottom = min(-(-(height - place.row) // step) + reach, source.height)
    right = min(-(-(width - place.col) // step) + reach, source.width)
    if bottom > top and right > left:
        values = source.read(1, window=FileWindow(left, top, right - left, bottom - top))
    else:
        values = np.empty((0, 0), dtype=source.dtypes[0])
    return Pixels(
        values=values, row=place.row + top * step, col=place.col + left * step, nodata=nodata,
        step=step, smooth=smooth,
    )  # fmt: skip


@contextlib.contextmanager
def _environment(access: Access, href: str, *, fresh: bool) -> Iterator[None]:
    """Set GDAL's options; ``fresh`` forgets what GDAL remembers of a failed address."""
    import rasterio

    options: dict[str, Any] = {**_GDAL_OPTIONS, **access.gdal}
    if fresh and "://" in href:
        scheme = "/vsis3/" if href.startswith("s3://") else "/vsicurl/"
        options["CPL_VSIL_CURL_NON_CACHED"] = scheme
    with rasterio.Env(**options):
        yield


def _reason(error: BaseException, href: str) -> str:
    """Return the chain of messages, without the address or a part of it (it may carry a token)."""
    parts: list[str] = []
    current: BaseException | None = error
    while current is not None:
        text = str(current) or type(current).__name__
        text = re.sub(rf"\S*{re.escape(href)}[^\s'\"]*", "the file", text)
        text = re.sub(r"https?://\S+", "the address", text).replace(os.path.basename(href), "")
        text = redact(text)
        if text not in parts:
            parts.append(text)
        current = current.__cause__ or current.__context__
    return "; ".join(parts)


def _anew(href: str, failed: int) -> str:
    """Return a web address that GDAL has not seen yet: it never sends what follows the hash."""
    if not failed or not href.startswith(("http://", "https://")):
        return href
    return f"/vsicurl/{href}#{failed}"


def _most_attempts(kind: FailureKind, href: str) -> int:
    return _ATTEMPTS[kind] + (_MORE_ATTEMPTS_FAR.get(kind, 0) if "://" in href else 0)


def _kind_of(reason: str) -> FailureKind:
    for kind, signs in _SIGNS:
        if re.search(signs, reason, re.IGNORECASE):
            return kind
    return "corrupt"
