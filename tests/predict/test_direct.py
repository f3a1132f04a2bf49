"""A map made directly from a search is the map of the cube, and leaves no pixels behind."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from shapely.geometry import Polygon

from stcln_geo.cube.build import build_cube
from stcln_geo.cube.request import SearchRequest, plan_request
from stcln_geo.cube.spec import CubeSpec
from stcln_geo.predict import Prediction, PredictSpec, predict_region, predict_search
from stcln_geo.predict import blocks as blocks_module
from stcln_geo.region import Region

from ..cube.conftest import Archive

LEFT, TOP = 600_000, 5_600_040
BANDS = {"red": 10, "nir": 10, "green": 20}
DAYS = (
    "2018-10-01", "2018-11-20", "2019-01-05", "2019-03-01", "2019-04-11", "2019-05-30",
    "2019-06-08",
)  # fmt: skip
CPU = {"device": "cpu", "precision": "float32", "min_clear": 1, "seam_audit": 0}
LAYERS = ("classes", "confidence", "qa", "observations")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A catalog of planted scenes, and a checkpoint that fits."""

    archive: Path
    checkpoint: Path
    region: Region

    def search(self, **changes: Any) -> SearchRequest:
        return SearchRequest(**{"catalog": str(self.archive), "region": self.region} | changes)


def plant(folder: Path) -> Archive:
    """Add two tiles that overlap, on seven days, with other offsets and other clouds."""
    rng = np.random.default_rng(11)
    archive = Archive(folder)
    for index, day in enumerate(DAYS):
        for tile, (row, col, height, width) in {
            "31UFS": (0, 0, 150, 132), "31UFT": (38, 76, 120, 140),
        }.items():  # fmt: skip
            if tile == "31UFT" and index in (1, 4):
                continue
            ground = rng.integers(300, 5000, (height // 6 + 1, width // 6 + 1))
            fine = np.kron(ground, np.ones((6, 6), dtype=int))[:height, :width]
            fine = fine + rng.integers(0, 400, fine.shape)
            scl = rng.choice([4, 5, 4, 5, 6, 9, 3], size=(height // 10, width // 10 + 1))
            archive.add(
                f"S2_{tile}_{index}",
                f"{day}T10:50:{index:02}",
                pixels={
                    "red": (fine % 3100 + 1).astype("uint16"),
                    "nir": (fine + 1200).astype("uint16"),
                    "green": (fine[::2, ::2] % 2700 + 200).astype("uint16"),
                },
                scl=np.kron(scl, np.ones((5, 5), dtype=int))[: height // 2, : width // 2],
                origin=(LEFT + 10 * col, TOP - 10 * row),
                offset=-0.1 if tile == "31UFT" else 0.0,
                properties={"grid:code": f"MGRS-{tile}", "eo:cloud_cover": 10 * index},
                bands=BANDS,
            )
    return archive


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, world: Any) -> Source:
    archive = plant(tmp_path_factory.mktemp("direct") / "archive")
    corners = [(113, -97), (1893, -59), (1984, -1303), (702, -1441), (91, -888)]
    area = Polygon([(LEFT + x, TOP + y) for x, y in corners])
    return Source(
        archive=archive.folder,
        checkpoint=world.checkpoint,
        region=Region.from_projected(area, "EPSG:32631", source="the test"),
    )


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let small regions be fetched in many blocks."""
    monkeypatch.setattr(blocks_module, "_SHARD", 64)
    monkeypatch.setattr(blocks_module, "_WIDEST", 64)
    monkeypatch.setattr(blocks_module, "_HIGHEST", 64)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    folder = tmp_path / "scratch"
    folder.mkdir()
    return folder


def recipe(**changes: Any) -> CubeSpec:
    """What both ways build: the checkpoint's bands, the lattice of the prediction."""
    from .conftest import LATTICE

    return CubeSpec(**{"bands": ("nir", "red", "green"), "lattice": LATTICE} | changes)


def digest(folder: Path, names: tuple[str, ...] = LAYERS) -> dict[str, str]:
    """Return the SHA-256 of each decoded layer, with where it lies."""
    found = {}
    for name in names:
        with rasterio.open(folder / f"{name}.tif") as raster:
            values = raster.read()
            place = f"{raster.crs}{raster.transform}{values.shape}".encode()
        found[name] = hashlib.sha256(place + values.tobytes()).hexdigest()
    return found


def by_cube(source: Source, tmp_path: Path, cube: CubeSpec, spec: PredictSpec) -> Prediction:
    """Build the cube, then predict: what direct maps are compared with."""
    path = tmp_path / "reference.zarr"
    build_cube(plan_request(source.search(), cube), path)
    return predict_region(path, source.checkpoint, tmp_path / "reference", spec=spec)


def test_the_map_is_the_cubes(
    source: Source, tmp_path: Path, scratch: Path, small_blocks: None
) -> None:
    expected = by_cube(source, tmp_path, recipe(), PredictSpec(**CPU))
    assert expected.pixels > 10_000
    assert len([code for code, n in expected.histogram.items() if code != 255 and n]) > 2
    for size in (64, 100, 1000):
        out = tmp_path / f"direct-{size}"
        found = predict_search(
            source.search(), source.checkpoint, out, cube=recipe(), scratch=scratch,
            spec=PredictSpec(**CPU, shard_size=size, memory=2 * 10**9),
        )  # fmt: skip
        assert digest(out) == digest(expected.out), size
        assert found.quality == expected.quality
        assert list(scratch.iterdir()) == []
