"""What a checkpoint or an exported program says about itself, and its form as JSON.

A file of ours holds one JSON text: format version, kind, configuration, legend, temperature, chip,
trained days, season start and provenance. Nothing in it is ever run.
"""

from __future__ import annotations

import calendar
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import CheckpointError, InputError, OutputError
from ..legend import Legend
from ..storage import Location, location
from .config import StclnConfig
from .ensemble import Ensemble
from .reference import Kind
from .stcln import Encoder, MaskedPretrainer, Stcln

TROPIC = 23.4
"""Degrees of latitude; nearer to the equator rain, not the sun, makes the year of the crops."""
_UTM = {"EPSG:326": "north", "EPSG:327": "south"}
"""Hemisphere by the beginning of a UTM zone's code."""

FORMAT = 1
"""Version of the description; a reader refuses newer ones."""
HEADER = "stcln_geo"
"""Name of the description where a file format keeps texts by name."""
FileFormat = Literal["safetensors", "pt2", "onnx"]
MODULES: dict[Kind, type[Stcln | Encoder | MaskedPretrainer]] = {
    "classifier": Stcln,
    "encoder": Encoder,
    "pretrainer": MaskedPretrainer,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    path: Location
    """The file or object itself, also when a run directory was asked about."""
    kind: Kind
    config: StclnConfig
    mean: tuple[float, ...]
    """(C,) reflectance: z-score of the bands."""
    std: tuple[float, ...]
    """(C,) reflectance."""
    legend: str | None
    """JSON of the legend; None for networks without classes, and for published weights."""
    ignored: str | None
    """JSON of a legend of the classes that training left out; None for none."""
    temperature: float | None
    """What logits are divided by before a probability is made of them; None for nothing."""
    chip: int | None
    """Side in pixels of the chips it was trained on."""
    halo: int | None
    """Context pixels per side that it was chosen with."""
    trained_days: tuple[int, int] | None
    """First and last of `days` seen in training."""
    season_start: str | None
    """MM-DD from which `days` count."""
    provenance: Mapping[str, Any]
    """Where the weights come from; plain JSON values."""
    sha256: str
    """Of the whole file: names the checkpoint in manifests."""
    published: bool
    """True for a file of the published system."""
    silent: tuple[str, ...] = ()
    """Source values of the classes in ``legend`` that no pixel was learnt as."""
    dropped: tuple[str, ...] = ()
    """Entries of a published file that no output depends on."""
    format: FileFormat = "safetensors"
    """What the file is: weights, or a program that runs without this package."""
    members: int = 1
    """Networks that answer together. Above 1 it is an ensemble: ``mean`` and ``std`` are then those
    of the first, and ``temperature`` divides what all say together."""

    @property
    def bands(self) -> tuple[str, ...]:
        """Common names in the order of the channel axis."""
        return self.config.bands

    @property
    def levels(self) -> tuple[str, ...]:
        """What reflectance it was trained on, ``surface`` or ``top-of-atmosphere``, if known."""
        cubes = self.provenance.get("cubes")
        found = [cube.get("level") for cube in cubes or () if isinstance(cube, Mapping)]
        return tuple(sorted({level for level in found if isinstance(level, str)}))

    def season_start_at(self, latitude: float | None) -> str | None:
        """Return when a season like those it was trained on starts at a latitude, ``MM-DD``.

        As its cubes of that hemisphere do; where it has none, half a year later than those of the
        other. So far as all of them lie in UTM zones and one start is theirs; else, and between
        the tropics, on the day that the checkpoint tells.

        Parameters
        ----------
        latitude
            In degrees; None where it is not known.
        """
        if self.season_start is None or latitude is None or abs(latitude) < TROPIC:
            return self.season_start
        starts: dict[str, set[str]] = {"north": set(), "south": set()}
        for cube in self.provenance.get("cubes") or ():
            told = cube.get("crs") if isinstance(cube, Mapping) else None
            for system in told if isinstance(told, list) else [told]:
                if str(system)[:8] not in _UTM:
                    return self.season_start
                start = str(cube.get("season", self.season_start))[-5:]
                starts[_UTM[str(system)[:8]]].add(start)
        here, there = ("south", "north") if latitude < 0 else ("north", "south")
        if len(starts[here]) == 1:
            return starts[here].pop()
        if not starts[here] and len(starts[there]) == 1:
            return half_a_year_later(starts[there].pop())
        return self.season_start

    @property
    def parameters(self) -> int:
        """Number of parameters that training moves."""
        with torch.device("meta"):
            module = make_module(self.kind, self.config, self.members)
            return sum(weight.numel() for weight in module.parameters())


def make_module(
    kind: Kind, config: StclnConfig, members: int = 1
) -> Stcln | Ensemble | Encoder | MaskedPretrainer:
    """Build what a checkpoint describes, with random weights."""
    return MODULES[kind](config) if members == 1 else Ensemble.of(config, members)


def half_a_year_later(start: str) -> str:
    """Return the day (``MM-DD``) half a year after another.

    >>> half_a_year_later("09-01"), half_a_year_later("08-31")
    ('03-01', '02-28')
    """
    month, day = (int(part) for part in start.split("-"))
    month = (month + 5) % 12 + 1
    return f"{month:02d}-{min(day, calendar.monthrange(2001, month)[1]):02d}"


def to_json(
    path: Path,
    *,
    kind: Kind,
    config: StclnConfig,
    legend: str | None,
    ignored: str | None,
    temperature: float | None,
    chip: int | None,
    halo: int | None,
    trained_days: tuple[int, int] | None,
    season_start: str | None,
    provenance: Mapping[str, Any],
    silent: Sequence[str] = (),
    zscore: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    members: int = 1,
) -> str:
    """Write the description that `path` will hold.

    Parameters
    ----------
    zscore : mean and deviation of the bands, each (C,) in reflectance, where no tensor holds them.

    Raises
    ------
    InputError
        If the provenance holds what JSON cannot.
    """
    description = {
        "format": FORMAT,
        "kind": kind,
        "config": config.to_dict(),
        "legend": None if legend is None else json.loads(legend),
        "ignored": None if ignored is None else json.loads(ignored),
        "temperature": None if temperature is None else float(temperature),
        "chip": chip,
        "halo": halo,
        "trained_days": None if trained_days is None else [int(day) for day in trained_days],
        "season_start": season_start,
        "provenance": dict(provenance),
    }
    if silent:
        description["silent"] = list(silent)
    if members > 1:
        description["members"] = members
    if zscore is not None:
        description["zscore"] = {"mean": list(zscore[0]), "std": list(zscore[1])}
    try:
        return json.dumps(description, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"Cannot save {path}: the provenance holds a value that JSON cannot ({error}). "
            "Numbers must be finite. Pass strings, numbers, lists and dicts."
        ) from error


def from_json(
    path: Path,
    text: str,
    *,
    sha256: str,
    state: Mapping[str, torch.Tensor] | None = None,
    file_format: FileFormat = "safetensors",
) -> CheckpointInfo:
    """Read the description that `path` holds.

    Parameters
    ----------
    state : the tensors of the file, which hold the z-score; None: the description does.

    Raises
    ------
    CheckpointError
        If it is not what this version writes.
    """
    try:
        told = json.loads(text, parse_constant=_refuse_constant)
        if told["format"] > FORMAT:
            raise CheckpointError(
                f"Cannot read the checkpoint {path}: its format is {told['format']}, and this "
                f"version reads up to {FORMAT}. A newer stcln-geo wrote it. Update stcln-geo."
            )
        kind: Kind = told["kind"]
        members = _as_members(told.get("members", 1), kind)
        prefix = "" if MODULES[kind] is Encoder else "encoder."
        prefix = prefix if members == 1 else f"members.0.{prefix}"
        config = StclnConfig.from_dict(told["config"])
        if state is None:
            mean, std = told["zscore"]["mean"], told["zscore"]["std"]
        else:
            mean, std = state[f"{prefix}mean"].tolist(), state[f"{prefix}std"].tolist()
        if not len(mean) == len(std) == len(config.bands):
            raise ValueError("the z-score is not of these bands")
        if not (all(map(math.isfinite, (*mean, *std))) and min(std) > 0):
            raise ValueError("the z-score has deviations that are not above 0, or no numbers")
        legend = _as_text(told["legend"])
        if legend is not None and len(Legend.from_json(legend)) != config.classes:
            raise ValueError(f"the legend has not the {config.classes} classes of the network")
        # Files of earlier versions have none.
        ignored = _as_text(told.get("ignored"))
        if ignored is not None:
            Legend.from_json(ignored)
        provenance = told["provenance"]
        if not isinstance(provenance, dict):
            raise TypeError("provenance is no object")
        days = told["trained_days"]
        return CheckpointInfo(
            path=path,
            kind=kind,
            config=config,
            mean=tuple(float(value) for value in mean),
            std=tuple(float(value) for value in std),
            legend=legend,
            ignored=ignored,
            temperature=_as_temperature(told.get("temperature")),
            chip=_as_pixels("chip", told["chip"], least=1),
            halo=_as_pixels("halo", told["halo"], least=0),
            trained_days=None if days is None else (int(days[0]), int(days[1])),
            season_start=_as_month_and_day(told["season_start"]),
            provenance=provenance,
            sha256=sha256,
            published=False,
            silent=tuple(str(value) for value in told.get("silent", ())),
            format=file_format,
            members=members,
        )
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"Cannot read the checkpoint {path}: its description is not what stcln-geo writes "
            f"({type(error).__name__}: {error}). Each field must be there with its type. "
            "Write the checkpoint again."
        ) from error


def _as_text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _as_pixels(name: str, value: Any, *, least: int) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} {value!r} is no number of pixels")
    return value


def _as_members(value: Any, kind: Kind) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"members {value!r} is no number of networks")
    if value > 1 and kind != "classifier":
        raise ValueError(f"{value} members, and only classifiers answer together")
    return value


def _as_month_and_day(value: Any) -> str | None:
    if value is None:
        return None
    if re.fullmatch(r"\d\d-\d\d", value) is None:
        raise ValueError(f"season_start {value!r} is not MM-DD")
    return str(value)


def _as_temperature(value: Any) -> float | None:
    if value is None:
        return None
    temperature = float(value)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature {temperature} is not above 0")
    return temperature


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: readers see all of it or nothing."""
    if not isinstance(location(path), Path):
        raise InputError(
            f"Cannot write {location(path)}: checkpoints are read from a bucket, and written there "
            "by training alone. Name a file of this machine, and copy it."
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"Cannot write the checkpoint {path}: {error.strerror or error}. The folder must be "
            "writable and have room. Choose another path, or make room."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
