"""Write MTLCC as it lies on disk, in small, in all its forms; knows nothing of the importer.

TFRecords are framed, checksummed and serialized here by hand: the checksum bit by bit from the
polynomial of CRC-32C, the Example as protocol buffers.
"""

from __future__ import annotations

import gzip
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import rasterio
from rasterio.transform import from_origin

CLASSES = """0|unknown
1|sugar beet
2|summer oat
3|meadow
5|rape
8|hop
26|maize
"""
"""classes.txt of the release, shortened."""

IDS = (0, 1, 2, 3, 5, 8, 26)


@dataclass(kw_only=True)
class Tile:
    """A tile as it was written; frames in the order of the file."""

    id: int
    year: int
    x10: np.ndarray
    """(T, Y, X, 4) int64."""
    x20: np.ndarray
    x60: np.ndarray
    doy: np.ndarray
    """(T,) day of the year, -1 for frames that fill up."""
    labels: np.ndarray
    """(Y, X) raw class ids."""
    origin: tuple[int, int]
    """x and y of the upper left corner, EPSG:32632."""

    @property
    def dates(self) -> list[str]:
        """YYYY-MM-DD of each frame, empty for padding."""
        first = np.datetime64(f"{self.year}-01-01")
        return [str(first + int(day) - 1) if day > 0 else "" for day in self.doy]


def make_tile(
    number: int, *, year: int, dates: int, side: int, rng: np.random.Generator, padding: int = 0
) -> Tile:
    """Return a tile of random pixels whose dates increase, with padding at its end."""
    days = np.sort(rng.choice(np.arange(1, 366), dates, replace=False))
    frames = dates + padding
    x10, x20, x60 = (
        rng.integers(1, 20_000, (frames, side // factor, side // factor, bands))
        for factor, bands in ((1, 4), (2, 6), (6, 3))
    )
    x10[0, 0, :3] = 0  # not measured
    for values in (x10, x20, x60):
        values[dates:] = 0
    return Tile(
        id=number, year=year, x10=x10, x20=x20, x60=x60,
        doy=np.concatenate([days, np.full(padding, -1)]),
        labels=rng.choice(IDS, (side, side)),
        origin=(680_000 + 480 * (number % 50), 5_380_000 - 480 * (number // 50)),
    )  # fmt: skip


# --- TFRecords ----------------------------------------------------------------------------------


def crc32c(content: bytes) -> int:
    """Checksum of Castagnoli's polynomial, by table."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _entry(number: int) -> int:
    for _ in range(8):
        number = (number >> 1) ^ (0x82F63B78 if number & 1 else 0)
    return number


_TABLE = [_entry(number) for number in range(256)]


def masked(content: bytes) -> bytes:
    crc = crc32c(content)
    rotated = ((crc >> 15) | (crc << 17)) & 0xFFFFFFFF
    return struct.pack("<I", (rotated + 0xA282EAD8) % 2**32)


def frame(content: bytes) -> bytes:
    """A record of a TFRecord file."""
    head = struct.pack("<Q", len(content))
    return head + masked(head) + content + masked(content)


def varint(number: int) -> bytes:
    number %= 2**64
    out = bytearray()
    while True:
        number, low = number >> 7, number & 0x7F
        out.append(low | (0x80 if number else 0))
        if not number:
            return bytes(out)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def bytes_feature(content: bytes) -> bytes:
    return message(1, message(1, content))


def ints_feature(numbers: tuple[int, ...], *, packed: bool = True) -> bytes:
    if packed:
        return message(3, message(1, b"".join(varint(number) for number in numbers)))
    return message(3, b"".join(varint(1 << 3) + varint(number) for number in numbers))


def example(features: dict[str, bytes]) -> bytes:
    entries = [
        message(1, message(1, name.encode()) + message(2, feature))
        for name, feature in features.items()
    ]
    return message(1, b"".join(entries))


def record_of(tile: Tile, *, labels_in_time: bool = True) -> bytes:
    """The Example of a tile: raw int64 with shapes, labels repeated in every frame."""
    frames = len(tile.doy)
    labels = np.repeat(tile.labels[None], frames, axis=0) if labels_in_time else tile.labels
    features: dict[str, bytes] = {}
    for name, values in {
        "x10": tile.x10, "x20": tile.x20, "x60": tile.x60, "labels": labels,
    }.items():  # fmt: skip
        features[f"{name}/data"] = bytes_feature(values.astype("<i8").tobytes())
        features[f"{name}/shape"] = ints_feature(values.shape)
    years = np.where(tile.doy > 0, tile.year, -1)
    features["dates/doy"] = bytes_feature(tile.doy.astype("<i8").tobytes())
    features["dates/year"] = bytes_feature(years.astype("<i8").tobytes())
    features["dates/shape"] = ints_feature((frames,))
    return example(features)


def write_records(root: Path, tiles: list[Tile], **options: Any) -> Path:
    """Write ``data16`` and ``data17`` of gzipped TFRecords, with all that lies beside them."""
    for tile in tiles:
        folder = root / f"data{tile.year % 100}"
        folder.mkdir(parents=True, exist_ok=True)
        content = frame(record_of(tile, **options))
        (folder / f"{tile.id}.tfrecord.gz").write_bytes(gzip.compress(content, 1, mtime=0))
    write_beside(root, tiles, places=True)
    return root


# --- GeoTIFFs -----------------------------------------------------------------------------------


def write_tifs(
    root: Path,
    tiles: list[Tile],
    *,
    tree: Literal["published", "converter"] = "published",
    placed: bool = True,
    places: bool = False,
) -> Path:
    """Write one year's folder of GeoTIFFs: the loaders' tree, or that of ``tfrecord2tif``.

    Parameters
    ----------
    placed
        True where images carry CRS and transform; else they lie at 0, 0 without a CRS.
    places
        True writes geotransforms.csv.
    """
    for tile in tiles:
        folder = root / "data" / str(tile.id) if tree == "published" else root / str(tile.id)
        folder.mkdir(parents=True, exist_ok=True)
        for group, size, values in (("10m", 10, tile.x10), ("20m", 20, tile.x20),
                                    ("60m", 60, tile.x60)):  # fmt: skip
            for number, date in enumerate(tile.dates):
                text = date.replace("-", "")
                name = f"{text}_{group}.tif" if tree == "published" else f"{group}/{text}.tif"
                (folder / name).parent.mkdir(exist_ok=True)
                _write(folder / name, np.moveaxis(values[number], -1, 0).astype("uint16"),
                       tile.origin, size, placed)  # fmt: skip
        name = "y.tif" if tree == "published" else "labels.tif"
        _write(folder / name, tile.labels[None].astype("uint16"), tile.origin, 10, placed)
    write_beside(root, tiles, places=places)
    return root


def _write(
    path: Path, values: np.ndarray, origin: tuple[int, int], size: int, placed: bool
) -> None:
    where: dict[str, Any] = {}
    if placed:
        where = {"crs": "EPSG:32632", "transform": from_origin(*origin, size, size)}
    with rasterio.open(
        path, "w", driver="GTiff", count=len(values), height=values.shape[1],
        width=values.shape[2], dtype="uint16", **where,
    ) as image:  # fmt: skip
        image.write(values)


def write_beside(root: Path, tiles: list[Tile], *, places: bool) -> None:
    """Write classes.txt, tileids and geotransforms.csv; the splits name a tile that is absent."""
    (root / "classes.txt").write_text(CLASSES)
    (root / "tileids").mkdir(exist_ok=True)
    ids = sorted({tile.id for tile in tiles})
    for name, chosen in {
        "train_fold0": [*ids[:-2], 99_999], "test_fold0": ids[-2:-1], "eval": ids[-1:],
    }.items():  # fmt: skip
        (root / "tileids" / f"{name}.tileids").write_text("".join(f"{one}\n" for one in chosen))
    if places:
        rows = [
            f"{tile.id},{tile.origin[0]},10.0,0.0,{tile.origin[1]},0.0,-10.0,32632"
            for tile in {tile.id: tile for tile in tiles}.values()
        ]
        (root / "geotransforms.csv").write_text("\n".join(rows) + "\n")
