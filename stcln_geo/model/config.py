"""The recipe of a network: everything needed to build it again, and nothing about its weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from ..errors import InputError

Mode = Literal["geo", "reference"]
Positions = Literal["days", "index"]
PresetName = Literal["tiny", "base", "large"]

_MOST_LAYERS = 1000
"""Far more than anybody trains; a damaged description must not ask for millions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StclnConfig:
    """Describe one STCLN network.

    The transformer runs at the width of the second convolution pair (`widths[1]`), as in the
    published network, so there is no separate model width.
    """

    bands: tuple[str, ...]
    """Common STAC names, in the order of the channel axis."""
    classes: int = 0
    """Length of the legend. 0 for a network without a classifier (pre-training)."""
    widths: tuple[int, int] = (32, 256)
    """Channels after the first and the second pair of convolutions."""
    layers: int = 3
    """Transformer layers of the temporal encoder."""
    heads: int = 8
    """Attention heads; also the groups of the group normalisation before the transformer."""
    feedforward: int = 1024
    """Hidden width of each transformer layer's feed-forward part."""
    dropout: float = 0.1
    """Share of activations dropped in training, in [0, 1). Attention, its output, feed-forward."""
    mode: Mode = "geo"
    """`geo` leaves invalid observations out everywhere; `reference` is the published behaviour."""
    positions: Positions = "days"
    """What the network was trained to see as `days`: days since the season's start, or 0..T-1."""
    affinity_dates: int = 30
    """Number of dates at which `geo` and `reference` give equal spatial affinities."""
    position_base: float = 1000.0
    """Base of the geometric progression of the sinusoids' wavelengths."""
    sta: bool = True
    """False classifies each pixel without the spatiotemporal attention (STA), to see what it is
    worth: from the projected maximum over time alone."""

    def __post_init__(self) -> None:
        """Refuse recipes that no network can follow."""
        problems = list(self._problems())
        if problems:
            raise InputError(
                f"Cannot describe a network: {'; '.join(problems)}. "
                "Correct these fields of StclnConfig, or start from StclnConfig.preset(...)."
            )

    def _problems(self) -> list[str]:
        found = []
        for name in ("classes", "layers", "heads", "feedforward", "affinity_dates"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                found.append(f"{name}={value!r} is of a wrong type: it must be a whole number")
        if not isinstance(self.sta, bool):
            found.append(f"sta={self.sta!r} is of a wrong type: it must be true or false")
        if found:
            return found
        if not self.bands or len(set(self.bands)) != len(self.bands):
            found.append(f"bands={self.bands!r} must be one or more distinct names")
        if self.classes < 0 or self.classes > 255:
            found.append(f"classes={self.classes} must lie in 0..255 (255 marks no data in maps)")
        if len(self.widths) != 2 or min(self.widths, default=0) < 1:
            found.append(f"widths={self.widths!r} must be two positive numbers")
        elif self.heads < 1 or self.widths[1] % (2 * self.heads):
            found.append(
                f"widths[1]={self.widths[1]} must be a multiple of twice heads={self.heads} "
                "(each head carries pairs of sine and cosine)"
            )
        if not 1 <= self.layers <= _MOST_LAYERS:
            found.append(f"layers={self.layers} must lie in 1..{_MOST_LAYERS}")
        if self.feedforward < 1:
            found.append(f"feedforward={self.feedforward} must be at least 1")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout={self.dropout} must lie in [0, 1)")
        if self.mode not in get_args(Mode):
            found.append(f"mode={self.mode!r} must be one of {', '.join(get_args(Mode))}")
        if self.positions not in get_args(Positions):
            found.append(
                f"positions={self.positions!r} must be one of {', '.join(get_args(Positions))}"
            )
        if self.affinity_dates < 1:
            found.append(f"affinity_dates={self.affinity_dates} must be at least 1")
        if not 1.0 < self.position_base < math.inf:
            found.append(f"position_base={self.position_base} must be finite and greater than 1")
        return found

    @property
    def dim(self) -> int:
        """Width of the features: channels of the convolutions' output and of the transformer."""
        return self.widths[1]

    @classmethod
    def preset(
        cls, name: PresetName, *, bands: tuple[str, ...], classes: int = 0, mode: Mode = "geo"
    ) -> StclnConfig:
        """Take a named size: `tiny` for demos on a CPU, `base` as published, `large`.

        In `reference` mode the positions are indices, as published.
        """
        positions: Positions = "index" if mode == "reference" else "days"
        return cls(
            bands=tuple(bands), classes=classes, mode=mode, positions=positions, **_sizes_of(name)
        )

    def resized(self, preset: PresetName) -> StclnConfig:
        """Return the same network in a named size."""
        return replace(self, **_sizes_of(preset))

    @property
    def preset_name(self) -> PresetName | None:
        """The preset of these sizes; None where they are of no preset."""
        for name, sizes in _SIZES.items():
            own = {field: getattr(self, field) for field in sizes if field != "dropout"}
            if own.items() <= sizes.items():
                return name
        return None

    def to_dict(self) -> dict[str, Any]:
        """Turn into plain values that JSON can hold."""
        values = asdict(self)
        return {**values, "bands": list(self.bands), "widths": list(self.widths)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StclnConfig:
        """Build from what `to_dict` gave; unknown, missing and wrongly typed fields are errors."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown or "bands" not in values:
            what = f"unknown fields {', '.join(unknown)}" if unknown else "the field 'bands' lacks"
            raise InputError(
                f"Cannot read a network's description: {what}. Known fields are "
                f"{', '.join(sorted(known))}. A newer version may have written it: update."
            )
        try:
            return cls(
                **{
                    **values,
                    "bands": tuple(str(band) for band in values["bands"]),
                    "widths": tuple(int(width) for width in values.get("widths", (32, 256))),
                }
            )
        except (TypeError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"Cannot read a network's description: {dict(values)!r} holds a value of a wrong "
                f"type ({error}). Fields have the types of StclnConfig. Write the file again."
            ) from error


# `tiny` trains in a fraction of a second a step on two CPU cores (4 chips of 32 px, 16 dates);
# dropout would cost a tenth of that. `base` is the published network; `large` keeps its head width.
_SIZES: dict[PresetName, dict[str, Any]] = {
    "tiny": {"widths": (16, 32), "layers": 2, "heads": 2, "feedforward": 64, "dropout": 0.0},
    "base": {"widths": (32, 256), "layers": 3, "heads": 8, "feedforward": 1024},
    "large": {"widths": (64, 512), "layers": 6, "heads": 16, "feedforward": 2048},
}


def _sizes_of(preset: PresetName) -> dict[str, Any]:
    if preset not in _SIZES:
        raise InputError(
            f"Cannot choose the preset {preset!r}: presets are {', '.join(_SIZES)}. "
            "Pass one of these, or give the fields of StclnConfig one by one."
        )
    return _SIZES[preset]
