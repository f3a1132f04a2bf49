"""What pre-training hides, and how it scores what the network puts in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

MaskStrategy = Literal["space-time", "time", "block", "tube", "band-group"]
"""What is drawn by itself, and hidden as a whole or not at all.

- `space-time`: an observation, which is one pixel on one date (Qin et al. 2025)
- `time`: a date of a chip
- `block`: a square of pixels on one date
- `tube`: a square of pixels on all dates (tubes: Tong et al. 2022, arXiv 2203.12602)
- `band-group`: the bands of one group in a square of pixels on one date
"""

SQUARE_STRATEGIES: tuple[MaskStrategy, ...] = ("block", "tube", "band-group")
"""Those that draw squares."""


def make_mask(
    images: Tensor,
    valid: Tensor | None,
    *,
    mask_ratio: float,
    red: int | None,
    nir: int | None,
    generator: torch.Generator | Sequence[torch.Generator],
    strategy: MaskStrategy = "space-time",
    block: int = 4,
    groups: Sequence[int] | None = None,
    gate: bool = True,
    ndvi_above: float = 0.2,
    share_above: float = 0.9,
) -> Tensor:
    """Draw which values to hide, among those that `hideable` allows.

    Parameters
    ----------
    images : (B, T, C, H, W) float. Reflectance; anything, NaN included, where invalid.
    valid : (B, T, H, W) bool. True where usable; None: everywhere. Only valid ones are hidden.
    mask_ratio, generator, strategy, block, groups
        As in `draw_mask`.
    red, nir, gate, ndvi_above, share_above
        As in `hideable`.

    Returns
    -------
    (B, T, H, W) bool on the device of `images`, True where all bands are hidden; of `band-group`
    (B, T, C, H, W) bool, True where hidden.
    """
    mask = draw_mask(
        images.shape,
        mask_ratio=mask_ratio,
        generator=generator,
        strategy=strategy,
        block=block,
        groups=groups,
    ).to(images.device)
    allowed = hideable(
        images, valid, red=red, nir=nir, gate=gate, ndvi_above=ndvi_above, share_above=share_above
    )
    return mask & (allowed if mask.ndim == 4 else allowed[:, :, None])


def draw_mask(
    shape: Sequence[int],
    *,
    mask_ratio: float,
    generator: torch.Generator | Sequence[torch.Generator],
    strategy: MaskStrategy = "space-time",
    block: int = 4,
    groups: Sequence[int] | None = None,
) -> Tensor:
    """Draw a mask for a batch, whatever is in it.

    Each value is hidden with the probability `mask_ratio`. Squares are those of a grid whose
    corner is drawn too, for each date (of `tube`: sample; of `band-group`: date and group) anew:
    so the edge of a chip cuts some, no place of a chip is hidden more often than another, and the
    network cannot learn where squares end.

    Parameters
    ----------
    shape : (B, T, C, H, W)
    mask_ratio : chance of each draw, in (0, 1).
    generator : the source of chance, or one for each sample. With one of its own, on the CPU, the
        mask of a sample depends on neither the other samples nor the dates that follow: not on
        the batch it is in, and how that is padded.
    block : side of a square (pixels), of the strategies that draw squares.
    groups : (C,) the number of each band's group, from 0; for `band-group` only.

    Returns
    -------
    (B, T, H, W) bool on the device of the generator, True where all bands are hidden; of
    `band-group` (B, T, C, H, W) bool, True where hidden.

    Raises
    ------
    InputError
        If an option is not allowed.
    """
    _check(shape, mask_ratio=mask_ratio, strategy=strategy, block=block, groups=groups)
    batch, dates, _, height, width = shape
    own = [generator] * batch if isinstance(generator, torch.Generator) else generator
    if strategy == "space-time":
        draws = torch.stack([_uniform(one, dates, height, width) for one in own])
        return draws < mask_ratio
    if strategy == "time":
        draws = torch.stack([_uniform(one, dates, 1, 1) for one in own])
        return (draws < mask_ratio).expand(batch, dates, height, width).contiguous()

    numbers = list(groups) if groups is not None and strategy == "band-group" else [0]
    kinds = max(numbers) + 1
    planes = 1 if strategy == "tube" else dates * kinds
    mask = torch.stack(
        [
            _draw_squares(planes, height, width, side=block, mask_ratio=mask_ratio, generator=one)
            for one in own
        ]
    )
    if strategy == "band-group":
        # (B, T*G, H, W) -> (B, T, G, H, W) -> (B, T, C, H, W)
        return mask.view(batch, dates, kinds, height, width)[:, :, numbers]
    return mask.expand(batch, dates, height, width).contiguous()


def hideable(
    images: Tensor,
    valid: Tensor | None,
    *,
    red: int | None,
    nir: int | None,
    gate: bool = True,
    ndvi_above: float = 0.2,
    share_above: float = 0.9,
) -> Tensor:
    """Find the observations that may be hidden: valid ones, on dates that pass the gate.

    The gate keeps dates whole on which little grows: a date of a sample is hidden from only where
    more than `share_above` of its valid pixels have an NDVI above `ndvi_above`. It needs `red` and
    `nir`; without one of them nothing is gated, which the caller should say.

    Parameters
    ----------
    images, valid
        As in `make_mask`.
    red, nir : places of these bands on the channel axis; None where the cube lacks one.
    gate : True gates, False allows every date.

    Returns
    -------
    (B, T, H, W) bool. True where it may be hidden.
    """
    batch, dates, _, height, width = images.shape
    if valid is None:
        valid = torch.ones((batch, dates, height, width), dtype=torch.bool, device=images.device)
    if not gate or red is None or nir is None:
        return valid
    green = vegetated_dates(
        images[:, :, red], images[:, :, nir], valid, ndvi_above=ndvi_above, share_above=share_above
    )
    return valid & green[:, :, None, None]


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
    """Average the squared error over the values that are hidden and valid.

    Parameters
    ----------
    reconstruction, target : (B, T, C, H, W) float, in normalised units.
    mask : (B, T, H, W) or (B, T, C, H, W) bool. True where hidden; without a band axis in all
        bands.
    valid : (B, T, H, W) bool. True where usable; None: everywhere.

    Returns
    -------
    float32 scalar; 0, with zero gradients, when nothing is hidden.
    """
    hidden = hidden_values(mask, valid)
    error = hidden_errors(reconstruction, target, hidden)
    # All bands of an observation count, also where one entry stands for all.
    values = hidden.sum() * (reconstruction.shape[2] // hidden.shape[2])
    return error.sum() / values.clamp(min=1)


def hidden_values(mask: Tensor, valid: Tensor | None) -> Tensor:
    """Return what is hidden and valid, (B, T, 1 or C, H, W) bool; parameters as in `masked_loss`.

    One entry stands for all bands where they are hidden together.
    """
    by_band = mask if mask.ndim == 5 else mask[:, :, None]
    return by_band if valid is None else by_band & valid[:, :, None]


def hidden_errors(reconstruction: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Return the squared error of each value, (B, T, C, H, W) float32; 0 where not hidden.

    `hidden` as `hidden_values` gives it; `target` may be NaN elsewhere.
    """
    with torch.autocast(device_type=reconstruction.device.type, enabled=False):
        wide = torch.promote_types(reconstruction.dtype, torch.float32)
        # Chosen before squaring: an invalid target may be NaN, and NaN times 0 is NaN.
        return torch.where(hidden, reconstruction.to(wide) - target.to(wide), 0.0).square()


def _check(
    shape: Sequence[int],
    *,
    mask_ratio: float,
    strategy: MaskStrategy,
    block: int,
    groups: Sequence[int] | None,
) -> None:
    """Raise InputError where an option of `draw_mask` is not allowed."""
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
    if strategy in SQUARE_STRATEGIES and block < 1:
        raise InputError(
            f"Cannot make a mask: block={block} must be the side of a square in pixels, at least "
            "1. Pass for example block=4."
        )
    if strategy == "band-group" and (groups is None or len(groups) != shape[2] or min(groups) < 0):
        raise InputError(
            f"Cannot make a mask by groups of bands: groups={groups} must be the number of a "
            f"group, from 0, for each of {shape[2]} bands. Pass groups=group_numbers(bands)."
        )


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _draw_squares(
    planes: int,
    height: int,
    width: int,
    *,
    side: int,
    mask_ratio: float,
    generator: torch.Generator,
) -> Tensor:
    """Draw the squares of a grid on each plane, (planes, H, W) bool; the grid begins anywhere."""
    rows, cols = ((side + size - 2) // side + 1 for size in (height, width))
    # Plane after plane, so that further ones do not change the first.
    draws = _uniform(generator, planes, 2 + rows * cols)
    corner = (draws[:, :2, None] * side).long()  # (planes, 2, 1)
    row, col = (
        (corner[:, axis] + torch.arange(size, device=draws.device)) // side
        for axis, size in enumerate((height, width))
    )
    hidden = draws[:, 2:].view(planes, rows, cols) < mask_ratio
    plane = torch.arange(planes, device=draws.device)[:, None, None]
    return hidden[plane, row[:, :, None], col[:, None, :]]
