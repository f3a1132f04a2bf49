"""Design a stratified random sample of a map: how many points, in which class, where.

The map's classes are the strata. Sizes follow Cochran's formula as in Olofsson et al. 2014
(doi 10.1016/j.rse.2014.02.015, eq. 13); within a stratum every pixel has the same chance. The
map is read twice, by strips: once to count, once to find the pixels whose rank within their
stratum was drawn.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..cube.store import write_json
from ..errors import InputError, MissingFileError, OutputError
from ..maps.classmap import ClassAreas, ClassMap, open_class_map
from ..maps.vector import check_target, write_vector
from .sizing import allocate, count_needed, standard_error

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

__all__ = [
    "Allocation",
    "Design",
    "SamplePlan",
    "SampleSpec",
    "design_path",
    "plan_sample",
    "read_design",
    "write_sample",
]

Allocation = Literal["proportional", "equal", "neyman"]

_RARE = 50
"""Points a rare class gets at least, where the count allows: the least that is recommended."""
_EXPECTED = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """Recipe for a sample."""

    count: int | None = None
    """Points in all; or give ``target_error``."""
    target_error: float | None = None
    """Standard error of the overall accuracy that is wanted, such as 0.01."""
    expected: Mapping[str, float] = field(default_factory=dict)
    """User's accuracy expected, by class name; ``""`` stands for all others (0.8)."""
    allocation: Allocation = "proportional"
    """proportional to area; equal; neyman: to area times sqrt(U (1 - U)) of what is expected."""
    minimum: int | None = None
    """Points each class has at least; by default 50, or half of an equal share if that is less."""
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePlan:
    """How many points each class of a map gets."""

    class_map: ClassMap
    spec: SampleSpec
    areas: ClassAreas
    points: NDArray[np.int64]
    """(K,) points by class code; 0 for classes that do not occur."""
    minimum: int
    expected: NDArray[np.float64]
    """(K,) user's accuracy expected."""

    needed: int | None = None
    """Points with which this allocation would reach the target, where it does not."""

    @property
    def expected_error(self) -> float:
        """Standard error of the overall accuracy if what is expected holds."""
        return standard_error(self.points, self.expected, self.areas)

    def lines(self) -> list[str]:
        """Return the plan as lines of text for people."""
        total = self.areas.areas.sum()
        lines = [
            f"{int(self.points.sum())} points, {self.spec.allocation}, at least {self.minimum} a "
            f"class, seed {self.spec.seed}; map {self.class_map.path}",
            f"{'class':<24}{'share %':>9}{'area ha':>14}{'pixels':>15}{'points':>8}",
        ]
        for entry in self.class_map.legend.classes:
            code = entry.code
            lines.append(
                f"{entry.name[:23]:<24}{100 * self.areas.areas[code] / total:>9.2f}"
                f"{self.areas.areas[code] / 1e4:>14,.1f}{int(self.areas.pixels[code]):>15,}"
                f"{int(self.points[code]):>8}"
            )
        lines.append(
            f"Standard error of the overall accuracy, if user's accuracies are as expected: "
            f"{100 * self.expected_error:.2f} points."
        )
        if self.needed is not None:
            lines.append(
                f"That misses the target error of {self.spec.target_error:g}: so many points reach "
                "it only where Neyman's rule alone shares them out. With this allocation and "
                f"minimum it takes --count {self.needed}."
            )
        return lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The strata a sample was drawn from, as its design file tells."""

    path: Path
    column: str
    """Column of the points that holds the stratum."""
    strata: tuple[str, ...]
    """Stratum as text, as it stands in the column."""
    names: tuple[str, ...]
    areas: NDArray[np.float64]
    """(H,) square metres."""
    pixels: NDArray[np.int64]
    """(H,) pixels."""
    map_name: str


def plan_sample(class_map: ClassMap | str | Path, spec: SampleSpec) -> SamplePlan:
    """Count the map's pixels and allocate points to its classes.

    Raises
    ------
    InputError
        If the recipe contradicts itself or the map.
    """
    opened = class_map if isinstance(class_map, ClassMap) else open_class_map(class_map)
    _check(spec)
    expected = _expected(spec, opened)
    areas = opened.count_pixels()
    there = areas.pixels > 0
    if not there.any():
        raise InputError(
            f"Cannot sample {opened.path}: none of its pixels has a class. Give a map with labels."
        )
    share = areas.areas[there] / areas.areas.sum()
    spread = np.sqrt(expected[there] * (1 - expected[there]))
    count = spec.count
    if count is None:
        # Cochran 1977, eq. 5.25; eq. 13 of Olofsson et al. where the map is large.
        assumed = float((share * spread).sum())
        finite = float((share * spread**2).sum()) / areas.pixels.sum()
        count = math.ceil(assumed**2 / (float(spec.target_error or 0) ** 2 + finite))
        count = max(count, 2 * int(there.sum()))
    weights = {"proportional": share, "equal": np.ones(len(share)), "neyman": share * spread}

    def share_out(count: int) -> tuple[NDArray[np.int64], int]:
        minimum = spec.minimum
        if minimum is None:
            equal = spec.allocation == "equal"
            minimum = 0 if equal else min(_RARE, count // (2 * len(share)))
        points = np.zeros(len(opened.legend), dtype=np.int64)
        points[there] = allocate(
            weights[spec.allocation], count, minimum=minimum, available=areas.pixels[there]
        )
        return points, minimum

    points, minimum = share_out(count)
    needed = None
    if spec.target_error is not None:
        needed = count_needed(
            lambda count: standard_error(share_out(count)[0], expected, areas),
            spec.target_error,
            least=count,
            most=int(areas.pixels.sum()),
        )
    return SamplePlan(
        class_map=opened,
        spec=spec,
        areas=areas,
        points=points,
        minimum=minimum,
        expected=expected,
        needed=needed,
    )


def write_sample(plan: SamplePlan, out: str | Path, *, overwrite: bool = False) -> Path:
    """Draw the points of a plan and write them, with the design beside them.

    Each point is the centre of its pixel, with ``point_id``, ``stratum`` (class code),
    ``stratum_name``, ``inclusion_probability``, ``weight`` (pixels it stands for), ``x`` and
    ``y`` in the map's CRS, ``lon`` and ``lat``, and an empty ``reference`` to be filled in. The
    order is random. ``<name>.design.json`` holds the strata; ``evaluate_map`` reads it.

    Parameters
    ----------
    out
        ``.gpkg``, ``.parquet`` or ``.geoparquet``.
    overwrite
        True replaces a file that exists, with all that was filled in.
    """
    out = check_target(out)
    if out.exists() and not overwrite:
        raise OutputError(
            f"Cannot write the points to {out}: the file exists, and its reference may be filled "
            "in already. Choose another name, or pass --overwrite."
        )
    frame = _draw(plan)
    write_vector(frame, out)
    write_json(design_path(out), _design(plan, out))
    return out


def design_path(points: str | Path) -> Path:
    """Return where the design of a file of points lies."""
    return Path(points).with_suffix(".design.json")


def read_design(path: str | Path) -> Design:
    """Read a design file: JSON with ``strata``, each with stratum, pixels and area_m2.

    Files made by hand may leave out everything else; ``column`` is ``stratum`` by default.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(
            f"Cannot read the design {path}: there is no such file. `stcln-geo evaluate design` "
            "writes it beside the points."
        )
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        rows = told["strata"]
        design = Design(
            path=path,
            column=str(told.get("column", "stratum")),
            strata=tuple(str(row["stratum"]) for row in rows),
            names=tuple(str(row.get("name", row["stratum"])) for row in rows),
            areas=np.array([float(row["area_m2"]) for row in rows]),
            pixels=np.array([int(row["pixels"]) for row in rows], dtype=np.int64),
            map_name=str(told.get("map", "another map")),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"Cannot read the design {path}: {error!r}. It must be JSON with a list 'strata' of "
            "records with stratum, pixels and area_m2. Write it with `stcln-geo evaluate design`."
        ) from error
    if len(set(design.strata)) < len(rows) or not rows or not (design.areas > 0).all():
        raise InputError(
            f"Cannot use the design {path}: it needs one stratum or more, each once and with an "
            "area above 0. Correct the list 'strata'."
        )
    return design


def _check(spec: SampleSpec) -> None:
    if (spec.count is None) == (spec.target_error is None):
        raise InputError(
            f"Cannot size a sample with count={spec.count} and target error={spec.target_error}: "
            "exactly one of them is needed. Give --count, or --target-error such as 0.01."
        )
    if spec.count is not None and spec.count < 1:
        raise InputError(f"Cannot draw {spec.count} points: at least 1 is needed. Raise --count.")
    if spec.target_error is not None and not 0 < spec.target_error < 0.5:
        raise InputError(
            f"Cannot aim at a standard error of {spec.target_error:g}: it is a share between 0 and "
            "0.5, both excluded. 0.01 means that the overall accuracy is known to about 2 points."
        )
    if spec.allocation not in ("proportional", "equal", "neyman"):
        raise InputError(
            f"Cannot allocate points by {spec.allocation!r}: choose proportional, equal or neyman."
        )
    if (spec.minimum is not None and spec.minimum < 0) or spec.seed < 0:
        raise InputError(
            f"Cannot use minimum={spec.minimum} and seed={spec.seed}: both are 0 or more."
        )


def _expected(spec: SampleSpec, class_map: ClassMap) -> NDArray[np.float64]:
    """Return the user's accuracy expected of each class."""
    names = class_map.legend.names
    unknown = [name for name in spec.expected if name not in ("", *names)]
    wrong = [value for value in spec.expected.values() if not 0 <= value <= 1]
    if unknown or wrong:
        raise InputError(
            f"Cannot expect {dict(spec.expected)}: an accuracy lies between 0 and 1, and the map's "
            f"classes are {', '.join(names)}. Write --expected 0.8, or --expected '{names[0]}=0.8'."
        )
    others = spec.expected.get("", _EXPECTED)
    return np.array([spec.expected.get(name, others) for name in names])


def _draw(plan: SamplePlan) -> GeoDataFrame:
    """Return the points in random order."""
    import geopandas
    import pandas
    from pyproj import Transformer

    pixels, points = plan.areas.pixels, plan.points
    code = np.repeat(np.arange(len(points)), points)
    rows, cols = (np.concatenate(parts) for parts in zip(*_find(plan), strict=True))
    order = np.random.default_rng([plan.spec.seed, len(points)]).permutation(len(code))
    code, rows, cols = code[order], rows[order], cols[order]
    transform = plan.class_map.transform
    x = transform.a * (cols + 0.5) + transform.b * (rows + 0.5) + transform.c
    y = transform.d * (cols + 0.5) + transform.e * (rows + 0.5) + transform.f
    crs = plan.class_map.crs.to_wkt()
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(x, y)
    names = np.array(plan.class_map.legend.names, dtype=object)
    table = {
        "point_id": np.arange(1, len(code) + 1),
        "stratum": code,
        "stratum_name": pandas.array(names[code], dtype="string"),
        "inclusion_probability": points[code] / pixels[code],
        "weight": pixels[code] / points[code],
        "x": x,
        "y": y,
        "lon": lon,
        "lat": lat,
        "reference": pandas.array([None] * len(code), dtype="string"),
    }
    return geopandas.GeoDataFrame(table, geometry=geopandas.points_from_xy(x, y), crs=crs)


def _find(plan: SamplePlan) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return rows and columns of the pixels drawn in each class.

    Pixels of a class have a rank, row by row; ranks are drawn, and found in a second pass. So the
    choice depends on map, count and seed alone, not on how the map is read.
    """
    ranks = [
        np.sort(np.random.default_rng([plan.spec.seed, 0, code]).choice(
            int(plan.areas.pixels[code]), int(number), replace=False, shuffle=False
        ))
        if number else np.empty(0, dtype=np.int64)
        for code, number in enumerate(plan.points)
    ]  # fmt: skip
    found: list[list[NDArray[np.int64]]] = [[np.empty(0, dtype=np.int64)] for _ in ranks]
    passed = np.zeros(len(ranks), dtype=np.int64)
    width = plan.class_map.shape_yx[1]
    with plan.class_map.reader() as reader:
        for strip in plan.class_map.strips():
            codes = reader.read(strip).reshape(-1)
            counts = np.bincount(codes, minlength=256)
            for code, mine in enumerate(ranks):
                first, last = np.searchsorted(mine, [passed[code], passed[code] + counts[code]])
                if last > first:
                    places = np.flatnonzero(codes == code)[mine[first:last] - passed[code]]
                    found[code].append(places + strip.row * width)
                passed[code] += counts[code]
    flat = [np.concatenate(parts) for parts in found]
    return [(places // width, places % width) for places in flat]


def _design(plan: SamplePlan, out: Path) -> dict[str, Any]:
    class_map, spec = plan.class_map, plan.spec
    return {
        "points": out.name,
        "map": class_map.name,
        "column": "stratum",
        "allocation": spec.allocation,
        "count": int(plan.points.sum()),
        "minimum": plan.minimum,
        "target_error": spec.target_error,
        "seed": spec.seed,
        "crs": class_map.crs.to_string(),
        "shape": list(class_map.shape_yx),
        "transform": [float(value) for value in tuple(class_map.transform)[:6]],
        "area_note": plan.areas.note,
        "strata": [
            {
                "stratum": entry.code,
                "name": entry.name,
                "value": entry.value,
                "pixels": int(plan.areas.pixels[entry.code]),
                "area_m2": float(plan.areas.areas[entry.code]),
                "points": int(plan.points[entry.code]),
                "expected_users_accuracy": float(plan.expected[entry.code]),
            }
            for entry in class_map.legend.classes
            if plan.areas.pixels[entry.code] > 0
        ],
    }
