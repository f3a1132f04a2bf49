"""A map made directly from a search is the map of the cube, and leaves no pixels behind."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import zarr
from shapely.geometry import Polygon, box

from stcln_geo.cli.main import invoke
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.layout import Layout
from stcln_geo.cube.read import read_ledger
from stcln_geo.cube.request import SearchRequest, plan_request
from stcln_geo.cube.spec import CubeSpec
from stcln_geo.errors import InputError, OutputError, TaskError
from stcln_geo.execution import Execution
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.predict import (
    Prediction,
    PredictSpec,
    plan_search,
    predict_region,
    predict_search,
)
from stcln_geo.predict import blocks as blocks_module
from stcln_geo.predict import fetch as fetch_module
from stcln_geo.predict import plan as plan_module
from stcln_geo.predict.forward import Network
from stcln_geo.predict.plan import PredictionPlan
from stcln_geo.region import Region

from ..cube.conftest import Archive
from ..cube.test_addresses import Redirecting
from ..dask_cluster import Cluster

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
            "31UFS": (0, 0, 90, 84), "31UFT": (22, 56, 84, 90),
        }.items():  # fmt: skip
            if tile == "31UFT" and index in (1, 4):
                continue
            ground = rng.integers(300, 5000, (height // 6 + 1, width // 6 + 1))
            fine = np.kron(ground, np.ones((6, 6), dtype=int))[:height, :width]
            fine = fine + rng.integers(0, 400, fine.shape)
            scl = rng.choice([4, 5, 4, 5, 6, 9, 3], size=(height // 10 + 1, width // 10 + 1))
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
    corners = [(113, -97), (803, -59), (784, -603), (402, -641), (91, -488)]
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


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Makes maps of the source, with and without a cube."""

    source: Source
    folder: Path
    scratch: Path

    reference: Prediction
    """The map of the cube by the usual recipe."""

    def of_cube(
        self, cube: CubeSpec, name: str = "of-cube", *, season: str | None = None, **options: Any
    ) -> Prediction:
        path = self.folder / f"{name}.zarr"
        if not path.exists():
            build_cube(plan_request(self.source.search(), cube), path)
        return predict_region(
            path, self.source.checkpoint, self.folder / name, season=season,
            spec=PredictSpec(**CPU | options),
        )  # fmt: skip

    def direct(
        self, name: str, *, cube: CubeSpec | None = None, execution: Execution | None = None,
        search: SearchRequest | None = None, season: str | None = None, overwrite: bool = False,
        **options: Any,
    ) -> Prediction:  # fmt: skip
        return predict_search(
            search or self.source.search(), self.source.checkpoint, self.folder / name,
            cube=cube or recipe(), scratch=self.scratch, execution=execution, season=season,
            overwrite=overwrite, spec=PredictSpec(**CPU | options),
        )  # fmt: skip

    def run(self, name: str) -> dict[str, Any]:
        return json.loads((self.folder / name / "run.json").read_text())


@pytest.fixture(scope="session")
def reference(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Prediction:
    folder = tmp_path_factory.mktemp("reference")
    build_cube(plan_request(source.search(), recipe()), folder / "cube.zarr")
    return predict_region(
        folder / "cube.zarr", source.checkpoint, folder / "map", spec=PredictSpec(**CPU)
    )


@pytest.fixture
def maps(source: Source, tmp_path: Path, scratch: Path, reference: Prediction) -> Maps:
    return Maps(source=source, folder=tmp_path, scratch=scratch, reference=reference)


def test_the_map_is_the_cubes(maps: Maps, small_blocks: None) -> None:
    expected = maps.reference
    assert expected.pixels > 2_500
    assert len([code for code, n in expected.histogram.items() if code != 255 and n]) > 2
    for size in (32, 1000):
        found = maps.direct(f"direct-{size}", shard_size=size)
        assert digest(found.out) == digest(expected.out), size
        assert found.quality == expected.quality
        assert list(maps.scratch.iterdir()) == []
    told = maps.run("direct-1000")["source"]
    assert told["asset_windows"] > 0
    assert len(told["items"]) == 12
    assert {(one["offset_dn"], one["scenes"]) for one in told["offsets"]} == {(0, 7), (-1000, 5)}
    item = json.loads((maps.folder / "direct-1000" / "item.json").read_text())
    assert item["properties"]["stcln_geo:items"] == told["items"]
    assert (maps.folder / "direct-1000" / item["assets"]["items"]["href"]).is_file()
    assert "12 scenes on 7 dates" in (maps.folder / "direct-1000" / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["median", "medoid", "least-cloudy"])
def test_composites_are_the_cubes(maps: Maps, small_blocks: None, composite: str) -> None:
    cube = recipe(composite=composite, period="P1M", resampling="cubic")
    expected = maps.of_cube(cube)
    assert expected.pixels > 1_000
    found = maps.direct("direct", cube=cube, shard_size=32)
    assert digest(found.out) == digest(expected.out)


@pytest.mark.slow
def test_every_way_of_merging_is_the_cubes(maps: Maps, small_blocks: None, tmp_path: Path) -> None:
    mask = tmp_path / "cropland.tif"
    keep = (np.indices((60, 60)).sum(axis=0) % 7 > 1).astype("uint8")
    with rasterio.open(
        mask, "w", driver="GTiff", dtype="uint8", count=1, height=60, width=60, crs="EPSG:32631",
        transform=rasterio.transform.from_origin(LEFT, TOP, 20, 20),
    ) as file:  # fmt: skip
        file.write(keep, 1)
    options: dict[str, Any] = {
        "blend": True, "smooth": "bayesian", "smooth_window": 3, "mask": mask, "seam_audit": 3,
        "outputs": ("probabilities", "entropy", "margin", "embeddings"), "min_clear": 2,
    }  # fmt: skip
    expected = maps.of_cube(recipe(), **options)
    found = maps.direct("direct", shard_size=56, **options)
    layers = (*LAYERS, "probabilities", "entropy", "margin")
    assert digest(found.out, layers) == digest(expected.out, layers)
    assert found.seam_audit == expected.seam_audit
    assert found.seam_audit is not None
    stores = [
        zarr.open_group(product.out / "embeddings.zarr", mode="r")["embedding"][:]
        for product in (found, expected)
    ]
    assert np.array_equal(stores[0], stores[1], equal_nan=True)
    assert list(maps.scratch.iterdir()) == []


@pytest.mark.slow
def test_engines_agree(maps: Maps, cluster: Cluster) -> None:
    expected = maps.reference
    local = maps.direct("local", shard_size=32, execution=Execution(workers=2))
    cluster.worker()
    cluster.worker("--nthreads", "2")
    remote = maps.direct("remote", shard_size=56, execution=Execution(scheduler=cluster.address))
    assert digest(local.out) == digest(remote.out) == digest(expected.out)
    assert list(maps.scratch.iterdir()) == []


def stored(folder: Path) -> dict[Path, int]:
    """Return the bytes of the files of pixels in scratch."""
    arrays = ("reflectance", "valid", "coverage", "overview")
    files = [file for name in arrays for file in folder.glob(f"*/*/*/{name}/c/**/*")]
    return {file: file.stat().st_size for file in files if file.is_file()}


def test_scratch_is_bounded_and_gone(maps: Maps, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[dict[Path, int]] = []
    write, run = fetch_module.write_shard, Network._launch

    def watched(season: Any, *arguments: Any, **arrays: Any) -> None:
        assert len(list(maps.scratch.glob("*.lock"))) == 1, "of one shard at a time"
        write(season, *arguments, **arrays)
        held.append(stored(maps.scratch))

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)  # so that fetching runs ahead as far as it may
        return run(*arguments, **options)

    monkeypatch.setattr(Network, "_launch", slow)
    monkeypatch.setattr(fetch_module, "write_shard", watched)
    # Many small blocks and groups, as a large region has large ones.
    monkeypatch.setattr(fetch_module, "fetch_layout", lambda *_: Layout(chunk=16, shard=16))
    monkeypatch.setattr(fetch_module, "plan_fetch", lambda *_, **__: (16, 64))
    monkeypatch.setattr(plan_module, "_READ", 16)
    monkeypatch.setattr(plan_module, "_LEAST_CHUNKS", 0)
    tall = box(LEFT + 100, TOP - 860, LEFT + 300, TOP - 20)
    search = maps.source.search(region=Region.from_projected(tall, "EPSG:32631", source="tall"))
    maps.direct("direct", search=search)
    assert len(held) > 12
    assert not held[2].keys() & held[-1].keys(), "the first blocks are gone before the last come"
    plan = plan_search(
        search, read_metadata(maps.source.checkpoint), PredictSpec(**CPU),
        out=maps.folder / "direct", cube=recipe(),
    )  # fmt: skip
    most = max(sum(files.values()) for files in held)
    assert most <= plan.fetching.scratch_bytes
    # Counted after a block is written: another one may have been removed in between.
    assert most / 2 < maps.run("direct")["source"]["scratch_bytes"] <= most
    assert list(maps.scratch.iterdir()) == []


@pytest.fixture
def web(source: Source) -> Iterator[tuple[str, list[str]]]:
    """The source on the web: its address, and what was asked for."""
    handler = type("Handler", (Redirecting,), {"asked": []})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(source.archive))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    server.shutdown()
    server.server_close()


def test_every_asset_is_read_a_bounded_number_of_times(
    maps: Maps, web: tuple[str, list[str]]
) -> None:
    address, asked = web
    search = maps.source.search(catalog=f"{address}/catalog.json", allow_hosts=("127.0.0.1",))
    built = build_cube(plan_request(search, recipe()), maps.folder / "web.zarr")
    cube = Counter(path for path in asked if path.endswith(".tif"))
    asked.clear()
    # By another name: what this process has read of an address, GDAL has no need to ask for again.
    search = maps.source.search(
        catalog=f"{address.replace('127.0.0.1', 'localhost')}/catalog.json",
        allow_hosts=("localhost",),
    )
    maps.direct("direct", search=search, shard_size=32)
    direct = Counter(path for path in asked if path.endswith(".tif"))
    run = maps.run("direct")
    planned = plan_search(
        search, read_metadata(maps.source.checkpoint), PredictSpec(**CPU, shard_size=32),
        out=maps.folder / "direct", cube=recipe(),
    )  # fmt: skip
    # One window of each asset for each shard that it meets: here one block is a shard.
    assert run["source"]["asset_windows"] <= planned.fetching.windows
    assert planned.fetching.windows <= run["shards"] * built.windows_read
    assert direct.keys() == cube.keys()
    most = max(cube.values())
    assert max(direct.values()) <= run["shards"] * most
    asked.clear()
    maps.direct("direct", search=search, shard_size=32)
    assert asked == [], "a finished map asks for nothing, not even the search"


@pytest.fixture
def broken(source: Source, tmp_path: Path) -> SearchRequest:
    """A copy of the source in which one file is no image."""
    archive = tmp_path / "broken"
    shutil.copytree(source.archive, archive)
    (archive / "S2_31UFT_3_nir.tif").write_bytes(b"nothing")
    return source.search(catalog=str(archive))


@pytest.mark.slow
def test_a_broken_asset_fails_its_shards_then_is_left_out(
    maps: Maps, broken: SearchRequest
) -> None:
    with pytest.raises(TaskError, match=r"shards failed.*ledger\.jsonl.*--on-error skip"):
        maps.direct("direct", search=broken, shard_size=32)
    entries = read_ledger(maps.folder / "direct" / "search" / "ledger.jsonl")
    assert {(one.item, one.asset, one.kind) for one in entries} == {
        ("S2_31UFT_3", "nir", "corrupt")
    }
    run = maps.run("direct")
    assert 0 < len(run["failed_shards"]) < run["shards"]
    assert run["quality"]["failed shard"] > 0
    assert list(maps.scratch.iterdir()) == []

    skip = recipe(on_error="skip", max_failed_fraction=0.05)
    with pytest.raises(TaskError, match=r"1 of 12 scenes.*S2_31UFT_3.*is 0\.05.*larger share"):
        maps.direct("direct", search=broken, shard_size=32, cube=skip)
    found = maps.direct("direct", search=broken, shard_size=32, cube=recipe(on_error="skip"))
    assert found.resumed_shards > 0, "shards that never saw the scene are kept"
    assert maps.run("direct")["source"]["left_out"] == ["S2_31UFT_3"]
    path = maps.folder / "skipped.zarr"
    build_cube(plan_request(broken, recipe(on_error="skip")), path)
    expected = predict_region(
        path, maps.source.checkpoint, maps.folder / "skipped", spec=PredictSpec(**CPU)
    )
    assert digest(found.out) == digest(expected.out)

    # Who asks for all scenes again does not get the map that lacks one.
    shutil.copy(maps.source.archive / "S2_31UFT_3_nir.tif", broken.catalog)
    mended = maps.direct("direct", search=broken, shard_size=32)
    assert maps.run("direct")["source"]["left_out"] == []
    assert digest(mended.out) == digest(maps.reference.out)


@pytest.mark.slow
def test_a_resumed_run_keeps_to_its_search(maps: Maps, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = maps.folder / "changing"
    shutil.copytree(maps.source.archive, catalog)
    search = maps.source.search(catalog=str(catalog))
    seen: list[Any] = []
    run = Network._launch

    def stopped(*arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == 40:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Network, "_launch", stopped)
        with pytest.raises(KeyboardInterrupt):
            maps.direct("direct", search=search, shard_size=32)
    assert list(maps.scratch.iterdir()) == []
    collection = json.loads((catalog / "collection.json").read_text())
    collection["links"] = collection["links"][:-2]
    (catalog / "collection.json").write_text(json.dumps(collection))

    found = maps.direct("direct", search=search, shard_size=32)
    assert found.resumed_shards > 0
    assert len(maps.run("direct")["source"]["items"]) == 12
    assert digest(found.out) == digest(maps.reference.out)
    with pytest.raises(OutputError, match=r"another run \(different: .*fingerprint"):
        maps.direct("direct", search=search, shard_size=32, cube=recipe(offset=0.01))
    fresh = maps.direct("direct", search=search, shard_size=32, overwrite=True)
    assert len(maps.run("direct")["source"]["items"]) == 10
    assert digest(fresh.out) != digest(maps.reference.out)


@pytest.mark.slow
def test_a_killed_run_is_resumed_and_leaves_no_scratch(maps: Maps) -> None:
    code = (
        "import sys; from pathlib import Path; from shapely import from_wkt\n"
        "from stcln_geo.predict import *; from stcln_geo.region import Region\n"
        "from stcln_geo.cube.request import SearchRequest\n"
        "area = Region.from_projected(from_wkt(sys.argv[5]), 'EPSG:32631', source='the test')\n"
        "predict_search(SearchRequest(catalog=sys.argv[1], region=area), sys.argv[2], sys.argv[3],"
        "scratch=Path(sys.argv[4]), spec=PredictSpec("
        "shard_size=16, device='cpu', precision='float32', min_clear=1, seam_audit=0))"
    )
    source, out = maps.source, maps.folder / "direct"
    arguments = [
        str(source.archive), str(source.checkpoint), str(out), str(maps.scratch),
        source.region.native.wkt,
    ]  # fmt: skip
    for shards in (1, 4):
        with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
            deadline = time.monotonic() + 120
            while len(list(out.glob("shards/*.json"))) < shards or not any(maps.scratch.iterdir()):
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
    assert not (out / "run.json").exists()
    found = predict_search(
        source.search(), source.checkpoint, out, scratch=maps.scratch,
        spec=PredictSpec(**CPU, shard_size=16),
    )  # fmt: skip
    assert found.resumed_shards >= 4
    assert digest(out) == digest(maps.reference.out)
    assert list(maps.scratch.iterdir()) == []
    assert not [path for path in out.rglob(".*")]


def test_fetching_takes_half_of_the_memory_and_reading_what_is_left(
    source: Source, tmp_path: Path
) -> None:
    info, search = read_metadata(source.checkpoint), source.search()

    def plan(memory: int | None) -> PredictionPlan:
        spec = PredictSpec(**CPU, memory=memory)
        return plan_search(search, info, spec, out=tmp_path / "out", cube=recipe())

    memory = 2 * plan(None).fixed_bytes + 6_000_000
    made = plan(memory)
    assert made.source is not None
    assert made.source.memory == memory // 2
    assert made.memory_bytes <= memory
    half = replace(made.spec, memory=memory // 2)
    assert made.block_size == replace(made, source=None, spec=half).block_size
    assert made.block_size < replace(made, source=None).block_size


def test_seasons_and_bands_must_fit(maps: Maps) -> None:
    with pytest.raises(InputError, match=r"Cannot map 2 seasons at once.*2018-10-15.*--season"):
        maps.direct("out", cube=recipe(season_start="10-15"))
    with pytest.raises(InputError, match=r"Cannot map season '2017-09-01'.*are of 2018-09-01"):
        maps.direct("out", season="2017-09-01")
    with pytest.raises(InputError, match=r"the bands nir, red: the checkpoint.*needs green too"):
        maps.direct("out", cube=recipe(bands=("nir", "red")))
    with pytest.raises(InputError, match=r"Cannot fetch pixels with .*Give more --memory"):
        maps.direct("out", memory=1_000_000, shard_size=1000)
    assert not (maps.folder / "out").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::stcln_geo.errors.StclnGeoWarning")
def test_one_of_two_seasons(maps: Maps) -> None:
    cube = recipe(season_start="02-15")
    expected = maps.of_cube(cube, season="2019-02-15")
    found = maps.direct("direct", cube=cube, season="2019-02-15")
    assert expected.pixels > 0
    assert digest(found.out) == digest(expected.out)


def arguments(source: Source, out: Path, *more: str) -> list[str]:
    return [
        "predict", "--catalog", str(source.archive), "--bbox", "4.4147,50.5366,4.4226,50.5412",
        "--checkpoint", str(source.checkpoint), "--out", str(out), "--device", "cpu",
        "--seam-audit", "0", *more,
    ]  # fmt: skip


def test_the_command(
    source: Source, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "map"
    more = ("--scratch", str(scratch), "--shard-size", "40")
    assert invoke(arguments(source, out, "--dry-run", *more)) == 0
    shown = capsys.readouterr().out
    for words in (
        "Catalog     planted-catalog", "Season      2018-09-01: 7 dates", "shards      ",
        "asset windows", "scratch     at most", str(scratch), "windows     about",
    ):  # fmt: skip
        assert words in shown
    assert not out.exists()
    assert invoke(arguments(source, out, *more)) == 0
    assert "pixels labelled" in capsys.readouterr().out
    assert invoke(arguments(source, out, *more)) == 0
    assert f"Continuing {out} with the images it began with" in capsys.readouterr().out
    assert list(scratch.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], "neither a cube nor a catalog"),
        (["cube.zarr", "--catalog", "x", "--bbox", "1,2,3,4"], "--catalog, --bbox with the cube"),
        (["cube.zarr", "--composite", "none"], "--composite with the cube"),
        (["--catalog", "nowhere", "--bbox", "1,2,3,4"], "nowhere"),
        (["--catalog", "x", "--bbox", "1,2,3"], "four numbers W,S,E,N"),
        (["--catalog", "x", "--on-error", "maybe"], "fail or skip"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str],
    words: str,
) -> None:  # fmt: skip
    rest = ["--checkpoint", str(source.checkpoint), "--out", str(tmp_path / "out")]
    assert invoke(["predict", *command, *rest]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
