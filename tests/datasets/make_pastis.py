"""Write PASTIS as it lies on disk, in small; knows nothing of the importer.

Files, names, shapes, dtypes and the two spellings of dates are those of the published set; series
are random, so that no two frames, bands or squares can be mistaken for one another.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pyproj import Transformer

TILES = {"t30uxv": 32630, "t31tfj": 32631, "T31TFM": 32631, "t32ulu": 32632}
"""UTM zone of each tile, in both spellings that are met."""

ORIGINS = {
    "t30uxv": (610_000, 5_560_000),
    "t31tfj": (620_010, 4_890_000),
    "T31TFM": (640_000, 5_190_020),
    "t32ulu": (310_000, 5_400_000),
}
"""UTM coordinates (x, y) somewhere in each tile, on the grid of 10 m."""


@dataclass(kw_only=True)
class Square:
    """A square as it was written."""

    id: int
    fold: int
    tile: str
    dates: list[int]
    """YYYYMMDD of each frame, in the order of the file."""
    series: np.ndarray
    target: np.ndarray
    parcels: np.ndarray
    ring: list[tuple[float, float]]
    """Footprint in EPSG:2154."""
    crs: str
    origin: tuple[float, float]
    """x and y of the upper left corner of the pixels."""
    radar: dict[str, tuple[list[int], np.ndarray]] = field(default_factory=dict)
    """PASTIS-R: dates and (T, 3, Y, X) float16 of S1A and S1D."""


def make_square(
    number: int,
    *,
    fold: int,
    tile: str,
    dates: int,
    side: int,
    rng: np.random.Generator,
    placed: Literal["utm", "lambert93"] = "utm",
) -> Square:
    """Return a square of random pixels whose dates increase."""
    west, north = ORIGINS[tile]
    west, north = west + 2000 * (number % 7), north - 3000 * (number % 5)
    edge = 10.0 * side
    corners = [(west, north), (west + edge, north), (west + edge, north - edge),
               (west, north - edge)]  # fmt: skip
    crs = f"EPSG:{TILES[tile]}"
    if placed == "utm":
        transform = Transformer.from_crs(crs, "EPSG:2154", always_xy=True).transform
        corners = [transform(x, y) for x, y in corners]
    else:
        crs, west, north = "EPSG:2154", 700_003.0, 6_700_007.0
        corners = [(west, north), (west + edge, north), (west + edge, north - edge),
                   (west, north - edge)]  # fmt: skip
    days = np.sort(rng.choice(425, dates, replace=False))
    stamps = np.datetime64("2018-09-17") + days
    series = rng.integers(-200, 12_000, (dates, 10, side, side)).astype("int16")
    series[0, 3, :2, :3] = -10_000  # nothing measured, as Theia writes it
    parcels = np.zeros((side, side), dtype="int32")
    target = np.zeros((3, side, side), dtype="uint8")
    step = max(side // 4, 2)
    for row in range(0, side - step, step):
        for col in range(0, side - step, step):
            field = (slice(row, row + step - 1), slice(col, col + step - 1))
            # Registers count in the millions, and not in the order of the picture.
            parcels[field] = 1_000_000 + int(rng.integers(0, 8_000_000))
            target[:, field[0], field[1]] = rng.integers(1, 20)
    target[0, 0, 0], target[0, 0, -1] = 19, 0
    target[1:] = rng.integers(0, 255, target[1:].shape)  # other channels are nobody's concern
    return Square(
        id=number, fold=fold, tile=tile,
        dates=[int(str(stamp).replace("-", "")) for stamp in stamps], series=series,
        target=target, parcels=parcels, ring=[*corners, corners[0]], crs=crs,
        origin=(float(west), float(north)),
    )  # fmt: skip


def add_radar(square: Square, name: str, images: int, rng: np.random.Generator) -> None:
    """Give a square a series of Sentinel-1, as PASTIS-R has: two bands and their difference."""
    side = square.series.shape[-1]
    days = np.sort(rng.choice(425, images, replace=False))
    dates = [int(str(np.datetime64("2018-09-02") + day).replace("-", "")) for day in days]
    values = rng.uniform(-25, -5, (images, 2, side, side)).astype("float16")
    values[0, 0, 0, 0] = np.nan
    series = np.concatenate([values, values[:, :1] - values[:, 1:]], axis=1)
    square.radar[name] = (dates, series)


def write_pastis(
    root: Path, squares: list[Square], *, dates_as: Literal["dict", "text"] = "dict"
) -> Path:
    """Write squares as the published set has them, and return the folder."""
    for folder in ("DATA_S2", "ANNOTATIONS", "INSTANCE_ANNOTATIONS"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    features: list[dict[str, Any]] = []
    for square in squares:
        np.save(root / "DATA_S2" / f"S2_{square.id}.npy", square.series)
        np.save(root / "ANNOTATIONS" / f"TARGET_{square.id}.npy", square.target)
        np.save(root / "ANNOTATIONS" / f"ParcelIDs_{square.id}.npy", square.parcels)
        table = {str(frame): date for frame, date in enumerate(square.dates)}
        features.append(
            {
                "type": "Feature",
                "id": str(square.id),
                "properties": {
                    "ID_PATCH": square.id,
                    "Fold": square.fold,
                    "TILE": square.tile,
                    "N_Parcel": len(np.unique(square.parcels)) - 1,
                    "Parcel_Cover": float((square.parcels > 0).mean()),
                    "dates-S2": table if dates_as == "dict" else json.dumps(table),
                    **write_radar(root, square, dates_as),
                },
                "geometry": {"type": "MultiPolygon", "coordinates": [[square.ring]]},
            }
        )
    (root / "metadata.geojson").write_text(
        json.dumps({"type": "FeatureCollection", "features": features})
    )
    norm = {}
    for fold in range(1, 6):
        mine = [square.series.astype("float64") for square in squares if square.fold == fold]
        means = [one.mean(axis=(0, 2, 3)) for one in mine] or [np.zeros(10)]
        stds = [one.std(axis=(0, 2, 3)) for one in mine] or [np.ones(10)]
        norm[f"Fold_{fold}"] = {
            "mean": np.mean(means, axis=0).tolist(),
            "std": np.mean(stds, axis=0).tolist(),
        }
    (root / "NORM_S2_patch.json").write_text(json.dumps(norm))
    return root


def write_radar(root: Path, square: Square, dates_as: str) -> dict[str, Any]:
    """Write the series of Sentinel-1 that a square has, and return their dates."""
    columns = {}
    for name, (dates, series) in square.radar.items():
        (root / f"DATA_{name}").mkdir(exist_ok=True)
        np.save(root / f"DATA_{name}" / f"{name}_{square.id}.npy", series)
        (root / f"NORM_{name}_patch.json").write_text(
            json.dumps({"Fold_1": {"mean": [-10.9, -17.3, 6.4], "std": [3.3, 3.2, 3.3]}})
        )
        table = {str(frame): date for frame, date in enumerate(dates)}
        columns[f"dates-{name}"] = table if dates_as == "dict" else json.dumps(table)
    return columns


def squares_of_folds(folds: Mapping[int, int], *, side: int, seed: int) -> list[Square]:
    """Make squares with four to six dates, given the fold of each number, in all four tiles."""
    rng, tiles = np.random.default_rng(seed), list(TILES)
    return [
        make_square(
            number, fold=fold, tile=tiles[int(str(number)[0]) - 1], dates=4 + number % 3, side=side,
            rng=rng,
        )
        for number, fold in folds.items()
    ]  # fmt: skip


def awkward_squares(side: int = 24, seed: int = 0) -> list[Square]:
    """Return seven squares: 38 to 61 dates, unsorted, repeated and impossible dates among them."""
    rng = np.random.default_rng(seed)
    kinds = [
        (40_003, 4, "t32ulu", 45, "utm"),
        (10_000, 1, "t30uxv", 38, "utm"),
        (20_001, 2, "t31tfj", 61, "utm"),
        (30_002, 3, "T31TFM", 41, "utm"),
        (10_005, 5, "t30uxv", 40, "lambert93"),
        (20_006, 1, "t31tfj", 39, "utm"),
        (30_007, 2, "T31TFM", 43, "utm"),
    ]
    squares = [
        make_square(number, fold=fold, tile=tile, dates=dates, side=side, rng=rng, placed=placed)
        for number, fold, tile, dates, placed in kinds
    ]
    by_id = {square.id: square for square in squares}
    order = rng.permutation(61)
    by_id[20_001].dates = [by_id[20_001].dates[place] for place in order]
    by_id[30_002].dates[7] = by_id[30_002].dates[6]
    by_id[20_006].dates[3] = 20190231
    return squares
