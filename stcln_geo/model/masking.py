"""What pre-training hides, and how it scores what the network puts in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

MaskStrategy = Literal["space-time", "time"]
"""`space-time` draws each (sample, date, pixel) by itself; `time` draws whole dates of a sample."""


def make_mask(
    images: Tensor,
    valid: Tensor | None,
    *,
    mask_ratio: float,
    red: int | None,
    nir: int | None,
    generator: torch.Generator | Sequence[torch.Generator],
    strategy: MaskStrategy = "space-time",
    gate: bool = True,
    ndvi_above: float = 0.2,
    share_above: float = 0.9,
) -> Tensor:
    """Draw which observations to hide; all bands of an observation are hidden together.

    The gate keeps dates whole on which little grows: a date of a sample is hidden from only where
    more than `share_above` of its valid pixels have an NDVI above `ndvi_above`. It needs `red` and
    `nir`; without one of them nothing is gated, which the caller should say.

    Parameters
    ----------
    images : (B, T, C, H, W) float. Reflectance; anything, NaN included, where invalid.
    valid : (B, T, H, W) bool. True where usable; None: everywhere. Only valid ones are hidden.
    mask_ratio : chance of each draw, in (0, 1).
    red, nir : places of these bands on the channel axis; None where the cube lacks one.
    generator : the source of chance, or one for each sample, so that a sample's mask does not
        depend on the batch it is in; may live on another device than `images`.

    Returns
    -------
    (B, T, H, W) bool on the device of `images`. True where hidden.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise InputError(
            f"Cannot make a mask: mask_ratio={mask_ratio} must lie between 0 and 1, both excluded. "
            "The published value is 0.4."
        )
    if strategy not in get_args(MaskStrategy):
        raise InputError(
            f"Cannot make a mask: strategy={strategy!r} must be one of "
            f"{', '.join(get_args(MaskStrategy))}. Pass one of these."
        )
    batch, dates, _, height, width = images.shape
    shape = (batch, dates, height, width) if strategy == "space-time" else (batch, dates, 1, 1)
    if isinstance(generator, torch.Generator):
        draws = torch.rand(shape, generator=generator, device=generator.device)
    else:
        draws = torch.stack(
            [torch.rand(shape[1:], generator=one, device=one.device) for one in generator]
        )
    mask = (draws < mask_ratio).to(images.device).expand(batch, dates, height, width)
    if valid is not None:
        mask = mask & valid
    if gate and red is not None and nir is not None:
        green_dates = vegetated_dates(
            images[:, :, red],
            images[:, :, nir],
            valid,
            ndvi_above=ndvi_above,
            share_above=share_above,
        )
        mask = mask & green_dates[:, :, None, None]
    return mask.contiguous()


def vegetated_dates(
    red: Tensor,
    nir: Tensor,
    valid: Tensor | None,
    *,
    ndvi_above: float = 0.2,
    share_above: float = 0.9,
) -> Tensor:
    """Find the dates on which nearly all of a chip is green, (B, T) bool.

    `red` and `nir` are reflectance (B, T, H, W); `valid` (B, T, H, W) bool, None: everywhere.
    Dark pixels, where the two do not add up to a positive number, are not green; a date without
    a valid pixel is not either.
    """
    # nir - red > t * (nir + red) is NDVI > t without the division.
    total = nir + red
    green = (nir - red > ndvi_above * total) & (total > 0)
    if valid is None:
        return green.flatten(2).float().mean(2) > share_above
    pixels = valid.flatten(2).sum(2)
    share = (green & valid).flatten(2).sum(2) / pixels.clamp(min=1)
    return share > share_above


def masked_loss(
    reconstruction: Tensor, target: Tensor, mask: Tensor, valid: Tensor | None
) -> Tensor:
    """Average the squared error over hidden, valid observations and all their bands.

    Parameters
    ----------
    reconstruction, target : (B, T, C, H, W) float, in normalised units.
    mask : (B, T, H, W) bool. True where hidden.
    valid : (B, T, H, W) bool. True where usable; None: everywhere.

    Returns
    -------
    float32 scalar; 0, with zero gradients, when nothing is hidden.
    """
    hidden = mask if valid is None else mask & valid
    with torch.autocast(device_type=reconstruction.device.type, enabled=False):
        wide = torch.promote_types(reconstruction.dtype, torch.float32)
        # Chosen before squaring: an invalid target may be NaN, and NaN times 0 is NaN.
        error = torch.where(hidden[:, :, None], reconstruction.to(wide) - target.to(wide), 0.0)
        values = hidden.sum() * reconstruction.shape[2]
        return error.square().sum() / values.clamp(min=1)
