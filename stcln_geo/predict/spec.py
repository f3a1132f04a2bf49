"""How to predict: the options, and the rules they obey."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ..cube.contract import FEWEST_CLEAR
from ..errors import InputError
from ..model.device import Device, Precision
from .outputs import OPTIONAL
from .segments import SEGMENT_SIDE
from .smooth import SMOOTHINGS, Smoothing, SmoothingMethod

__all__ = ["CogWriter", "PredictSpec"]

_SMOOTHNESS = 20.0

CogWriter = Literal["auto", "parallel", "gdal"]
"""What makes the maps of the shards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictSpec:
    """How to predict.

    The classes depend on ``window``, ``halo``, ``min_clear``, ``blend``, the smoothing, the
    minimum mapping unit and the mask, and on nothing else here.

    Parameters
    ----------
    window
        Side of what the network sees (pixels); None = the chip it was trained on.
    halo
        Context on each side that is seen but labelled by the neighbour (pixels); None = what the
        checkpoint was chosen with, else 4.
    min_clear
        Pixels with fewer clear dates get no class.
    blend
        Merge windows where they overlap, by weights that the lattice fixes; else each pixel is
        labelled by the one window whose core owns it.
    smooth
        "majority" or "bayesian": smooth the probabilities before the classes are decided.
    smooth_window
        Side of the neighbourhood (pixels), odd; None = 7, or what the halo allows.
    smoothness
        Bayesian smoothing: variance of the logits that is taken for noise.
    min_mapping_unit
        Patches of one class of less area (hectares) take the class of their surroundings; None =
        all stay. See ``sieve``.
    mask
        Raster that says which pixels are mapped.
    mask_values
        Its values that are mapped; None = all but 0 and nodata.
    outputs
        Further layers: "probabilities", "entropy", "margin", "embeddings".
    seam_audit
        Windows that are labelled again on a shifted lattice, to measure the seams; 0 = none,
        None = 16, or fewer where that would take more than a tenth of the run.
    shard_size
        Side of the squares that are labelled and kept on their own (pixels); None = 4096, less
        for small regions.
    device, precision
        "auto" takes a GPU if there is one, and bf16 where the hardware is faster at it.
    batch_size
        Windows per batch on a GPU; None = as many as fit, at most 64.
    memory
        Bytes that one worker may use in all; None = 4 GiB.
    keep_shards
        Keep the shards' files once the map is whole.
    cog_writer
        "parallel" copies what the workers compressed, and needs shards that are a multiple of
        4096 px; "gdal" decodes and compresses all pixels again; "auto" is parallel where it can.
        Layers of several bands are always written by GDAL.
    """

    window: int | None = None
    halo: int | None = None
    min_clear: int = FEWEST_CLEAR
    blend: bool = False
    smooth: SmoothingMethod | None = None
    smooth_window: int | None = None
    smoothness: float = _SMOOTHNESS
    min_mapping_unit: float | None = None
    mask: Path | None = None
    mask_values: tuple[int, ...] | None = None
    outputs: tuple[str, ...] = ()
    seam_audit: int | None = None
    shard_size: int | None = None
    device: Device = "auto"
    precision: Precision = "auto"
    batch_size: int | None = None
    memory: int | None = None
    keep_shards: bool = False
    cog_writer: CogWriter = "auto"

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = {
            "min_clear": 1, "shard_size": 1, "batch_size": 1, "memory": 1, "window": 1, "halo": 0,
            "smooth_window": 1, "seam_audit": 0,
        }  # fmt: skip
        for name, smallest in least.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise InputError(
                    f"Cannot predict with {name}={value}: it must be {smallest} or more. "
                    f"Correct --{name.replace('_', '-')}."
                )
        choices = {
            "device": get_args(Device),
            "precision": get_args(Precision),
            "smooth": (None, *SMOOTHINGS),
            "cog_writer": get_args(CogWriter),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"Cannot predict with {name}={getattr(self, name)!r}: it must be one of "
                    f"{', '.join(filter(None, allowed))}. Correct --{name.replace('_', '-')}."
                )
        if self.cog_writer == "parallel" and (self.shard_size or SEGMENT_SIDE) % SEGMENT_SIDE:
            raise InputError(
                f"Cannot write the maps with cog_writer='parallel' and shard_size="
                f"{self.shard_size}: its shards are multiples of {SEGMENT_SIDE} px, so that they "
                "make overviews without their neighbours. Leave --shard-size out, or take "
                "--cog-writer gdal."
            )
        unknown = [name for name in self.outputs if name not in OPTIONAL]
        if unknown:
            raise InputError(
                f"Cannot write the output {unknown[0]!r}: besides what every map has there are "
                f"{', '.join(OPTIONAL)}. Correct --outputs."
            )
        if self.smooth_window is not None and (self.smooth is None or self.smooth_window % 2 == 0):
            rule = "it must be odd" if self.smooth else "nothing is smoothed without --smooth"
            raise InputError(
                f"Cannot use smooth_window={self.smooth_window}: {rule}. Correct --smooth-window."
            )
        if not self.smoothness > 0:
            raise InputError(
                f"Cannot use smoothness={self.smoothness}: a variance is more than 0. "
                "Correct --smoothness."
            )
        if self.smoothness != _SMOOTHNESS and self.smooth != "bayesian":
            raise InputError(
                f"Cannot use smoothness={self.smoothness}: only Bayesian smoothing has one, and "
                f"smooth is {self.smooth}. Add --smooth bayesian, or leave --smoothness out."
            )
        if self.mask_values is not None and (self.mask is None or not self.mask_values):
            raise InputError(
                f"Cannot use mask_values={self.mask_values}: they are values of a mask, and at "
                "least one. Give --mask too."
            )

    def smoothing(self, halo: int) -> Smoothing | None:
        """Return the smoothing, or None; its neighbourhood must lie within the halo (pixels).

        Raises
        ------
        InputError
            If it reaches further.
        """
        if self.smooth is None:
            return None
        side = self.smooth_window or min(7, 2 * halo + 1)
        if side // 2 > halo or side < 3:
            raise InputError(
                f"Cannot smooth over {side} px with a halo of {halo} px: the neighbourhood of each "
                f"pixel must lie within its window, so it is 3 to {2 * halo + 1} px. "
                "Choose a smaller --smooth-window or a larger --halo."
            )
        return Smoothing(method=self.smooth, window=side, smoothness=self.smoothness)
