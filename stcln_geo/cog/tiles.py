"""Compress and decompress the square tiles of a TIFF."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import InputError, OutputError
from .pyramid import NODATA

__all__ = ["Compression", "TileCodec"]

Compression = Literal["zstd", "deflate"]
"""How tiles are compressed: zstd decodes faster, deflate is read by older programs too."""

_TIFF_CODES = {"zstd": 50000, "deflate": 8}
_LEVELS = {"zstd": 9, "deflate": 6}  # GDAL's own defaults


@dataclass(frozen=True, slots=True, kw_only=True)
class TileCodec:
    """How the pixels of a tile become bytes.

    Zstandard comes from numcodecs, which every Zarr store needs anyway, and deflate from zlib;
    both let other threads work meanwhile.

    Parameters
    ----------
    size
        Side of a tile (pixels), a multiple of 16 as TIFF demands.
    level
        Effort; None = 9 for zstd, 6 for deflate.
    predictor
        Store differences between neighbours in a row: smaller for smooth values, such as
        percents, and larger for classes.
    """

    size: int = 512
    compression: Compression = "zstd"
    level: int | None = None
    predictor: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.size < 16 or self.size % 16:
            raise InputError(
                f"Cannot make tiles of {self.size} px: TIFF demands a multiple of 16. Choose 512."
            )
        if self.compression not in _TIFF_CODES:
            raise InputError(
                f"Cannot compress with {self.compression!r}: it must be one of "
                f"{', '.join(_TIFF_CODES)}. Correct the compression."
            )

    @property
    def tiff_compression(self) -> int:
        """Value of the TIFF tag Compression."""
        return _TIFF_CODES[self.compression]

    @property
    def tiff_predictor(self) -> int:
        """Value of the TIFF tag Predictor."""
        return 2 if self.predictor else 1

    @property
    def effort(self) -> int:
        """Compression level that is used."""
        return _LEVELS[self.compression] if self.level is None else self.level

    def encode(self, values: np.ndarray) -> bytes:
        """Return the bytes of a tile.

        Parameters
        ----------
        values : (H, W) uint8, at most ``size`` pixels a side; the rest is filled with nodata.

        Raises
        ------
        OutputError
            If the compressor fails; a tile is never left out silently.
        """
        tile = values
        if values.shape != (self.size, self.size):
            tile = np.full((self.size, self.size), NODATA, dtype=np.uint8)
            tile[: values.shape[0], : values.shape[1]] = values
        if self.predictor:
            tile = np.concatenate([tile[:, :1], tile[:, 1:] - tile[:, :-1]], axis=1)
        try:
            data = self._compress(np.ascontiguousarray(tile))
        except (RuntimeError, ValueError, TypeError, zlib.error) as error:
            raise OutputError(
                f"Cannot compress a tile of {self.size} px with {self.compression} at level "
                f"{self.effort}: {error}. Choose another level or compression."
            ) from error
        if not data:
            raise OutputError(
                f"Cannot compress a tile of {self.size} px: {self.compression} returned nothing. "
                "Check the installation of numcodecs, or choose the compression deflate."
            )
        return data

    def decode(self, data: bytes) -> np.ndarray:
        """Return the pixels of a tile, (size, size) uint8.

        Raises
        ------
        InputError
            If the bytes are no such tile.
        """
        try:
            raw = self._decompress(data)
        except (RuntimeError, ValueError, zlib.error) as error:
            raise InputError(
                f"Cannot decode a tile: {error}. Its bytes were changed; write the file again."
            ) from error
        if len(raw) != self.size**2:
            raise InputError(
                f"Cannot decode a tile: it holds {len(raw)} pixels instead of {self.size**2}. "
                "Its bytes were changed; write the file again."
            )
        tile = np.frombuffer(raw, dtype=np.uint8).reshape(self.size, self.size)
        return np.cumsum(tile, axis=1, dtype=np.uint8) if self.predictor else tile

    def _compress(self, tile: np.ndarray) -> bytes:
        if self.compression == "deflate":
            return zlib.compress(tile.tobytes(), self.effort)
        from numcodecs import Zstd

        return bytes(Zstd(level=self.effort).encode(tile))

    def _decompress(self, data: bytes) -> bytes:
        if self.compression == "deflate":
            return zlib.decompress(data)
        from numcodecs import Zstd

        return bytes(Zstd().decode(data))
