"""Plans tell what will be done, and refuse what cannot be."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import shapely

from stcln_geo.cube.store import open_season
from stcln_geo.errors import CheckpointError, CubeError, InputError
from stcln_geo.grid import Window
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.stcln import MaskedPretrainer
from stcln_geo.predict import PredictionPlan, PredictSpec, plan_prediction, predict_region
from stcln_geo.predict.direct import season_start_for
from stcln_geo.region import Region


def plan(world: Any, **options: Any) -> PredictionPlan:
    region = options.pop("region", None)
    checkpoint = options.pop("checkpoint", world.checkpoint)
    return plan_prediction(
        world.season, read_metadata(checkpoint), PredictSpec(**options), region=region
    )


def test_the_extent_is_the_box_of_the_region_not_the_padded_cube(world: Any) -> None:
    made = plan(world)
    assert made.extent == world.extent
    assert world.season.window.contains(made.extent)
    assert world.season.window != made.extent
    assert made.lattice == world.lattice, "window and halo come from the checkpoint"


def test_shards_tile_the_extent(world: Any) -> None:
    made = plan(world, shard_size=40)
    assert sum(shard.area for shard in made.all_shards) == made.extent.area
    assert all(made.extent.contains(shard) for shard in made.all_shards)


def test_shards_outside_the_region_are_left_out(world: Any) -> None:
    region = Region.from_projected(
        shapely.union(
            shapely.box(500_200, 5_600_200, 500_240, 5_600_250),
            shapely.box(500_800, 5_599_400, 500_850, 5_599_420),
        ),
        world.crs,
        source="test",
    )
    made = plan(world, shard_size=16, region=region)
    assert 0 < len(made.shards) < len(made.all_shards) / 4
    assert f"{len(made.shards)} of about 16 px, " in str(made)


def test_window_count_is_near_the_truth(world: Any) -> None:
    assert plan(world).window_count == pytest.approx(137, abs=8)


def test_the_plan_prints_itself(world: Any) -> None:
    text = str(plan(world))
    for part in ("75 x 101 px", "EPSG:32631", "halo 4 px", "stride 8 px", "4 classes", "nir, red"):
        assert part in text
    assert "2018-09-21 to 2019-06-29" in text


def test_memory_bounds_what_is_read_at_once(world: Any) -> None:
    usual = plan(world)
    memory = usual.fixed_bytes + 4_000_000
    made = plan(world, memory=memory)
    assert made.fixed_bytes < made.memory_bytes <= memory
    assert made.block_size < usual.block_size
    blended = plan(world, memory=memory, blend=True)
    assert blended.memory_bytes <= memory
    assert blended.block_size < made.block_size, "the sums take their share"
    assert "of --memory" not in str(made)
    least = plan(world, memory=1)
    assert least.block_size == 2 * world.season.layout.chunk, "a few chunks at least"
    assert "a worker takes more than the 0.0 MB of --memory" in str(least)


def test_what_a_worker_takes_grows_with_its_threads_and_its_shard(world: Any) -> None:
    def fixed(threads: int, shard_size: int) -> int:
        spec = PredictSpec(shard_size=shard_size)
        info = read_metadata(world.checkpoint)
        return plan_prediction(world.season, info, spec, threads=threads).fixed_bytes

    assert fixed(1, 40) < fixed(3, 40)
    assert fixed(1, 40) < fixed(1, 80)


def test_what_a_map_takes_grows_with_its_layers(world: Any) -> None:
    """One byte more a pixel, then two (classes and qa twice), then four classes."""
    plans = [
        plan(world), plan(world, outputs=("entropy",)), plan(world, min_mapping_unit=0.07),
        plan(world, outputs=("probabilities",)),
        plan(world, outputs=("probabilities",), min_mapping_unit=0.07),
    ]  # fmt: skip
    for less, more in pairwise(plans):
        assert less.disk_bytes < more.disk_bytes
        assert less.fixed_bytes < more.fixed_bytes


def test_the_run_is_told_by_what_decides_the_map(world: Any) -> None:
    same = plan(world).run_hash
    assert plan(world, memory=10**6, keep_shards=True, batch_size=3).run_hash == same
    others = [
        plan(world, min_clear=2), plan(world, halo=3), plan(world, precision="bf16"),
        plan(world, region=Region.from_projected(
            shapely.box(500_200, 5_600_000, 500_300, 5_600_100), world.crs, source="test")),
    ]  # fmt: skip
    assert len({same, *(other.run_hash for other in others)}) == 5


def test_a_rebuilt_season_is_another_run(world: Any, tmp_path: Path) -> None:
    twin = world.make_season(tmp_path / "twin.zarr", world.region_polygon())
    info = read_metadata(world.checkpoint)
    assert plan_prediction(twin, info, PredictSpec()).run_hash == plan(world).run_hash
    shard = Window(0, 0, twin.layout.shard, twin.layout.shard)
    changed = open_season(twin.cube, mode="r+")
    changed.coverage[0, shard.row, shard.col] += 1
    assert plan_prediction(twin, info, PredictSpec()).run_hash != plan(world).run_hash


def test_missing_bands_are_named(world: Any, tmp_path: Path) -> None:
    season = world.make_season(
        tmp_path / "c.zarr", shapely.box(500_200, 5_600_000, 500_300, 5_600_100),
        bands=("blue", "green", "red"),
    )  # fmt: skip
    with pytest.raises(
        CubeError, match=r"lacks band 'nir' required by checkpoint .*The cube has: "
    ):
        plan_prediction(season, read_metadata(world.checkpoint), PredictSpec())


@pytest.mark.parametrize("kind", ["pretrainer", "encoder"])
def test_networks_without_classes_are_refused(world: Any, tmp_path: Path, kind: str) -> None:
    config = StclnConfig(bands=("red",), widths=(4, 8), layers=1, heads=2, feedforward=8)
    path = world.save(tmp_path / "n.safetensors", MaskedPretrainer(config), kind=kind, legend=None)
    with pytest.raises(CheckpointError, match="finetune CUBE --init"):
        plan(world, checkpoint=path)


def test_a_classifier_without_names_is_refused(world: Any, tmp_path: Path) -> None:
    path = world.save(tmp_path / "n.safetensors", world.make_network(4), legend=None)
    with pytest.raises(CheckpointError, match="without a legend"):
        plan(world, checkpoint=path)


def test_a_season_that_does_not_exist(world: Any, tmp_path: Path) -> None:
    with pytest.raises(CubeError, match=r"season '2020-09-01'.*does not exist"):
        predict_region(world.cube, world.checkpoint, tmp_path, season="2020-09-01")


def test_a_region_elsewhere(world: Any) -> None:
    region = Region.from_bbox((10.0, 45.0, 10.1, 45.1))
    with pytest.raises(InputError, match="does not meet the region of"):
        plan(world, region=region)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"min_clear": 0}, "min_clear=0"),
        ({"min_clear": 9}, "8 date.*--min-clear 8"),
        ({"smooth": "median"}, "majority, bayesian"),
        ({"smooth": "majority", "smooth_window": 11}, "3 to 9 px"),
        ({"smooth": "majority", "smooth_window": 4}, "odd"),
        ({"smooth_window": 5}, "without --smooth"),
        ({"smooth": "bayesian", "smoothness": 0.0}, "more than 0"),
        ({"smoothness": 5.0}, "smoothness=5.0.*Add --smooth bayesian"),
        ({"smooth": "majority", "smoothness": 5.0}, "smooth is majority"),
        ({"outputs": ("colours",)}, "probabilities, entropy, margin"),
        ({"mask_values": (1,)}, "Give --mask too"),
        ({"seam_audit": -1}, "--seam-audit"),
        ({"shard_size": 0}, "--shard-size"),
        ({"halo": -1}, "halo=-1"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"precision": "int4"}, "auto, float32, bf16"),
        ({"window": 8, "halo": 4}, "core"),
    ],
)
def test_bad_numbers(world: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        plan(world, **options)


def test_what_fits_badly_is_said(world: Any, tmp_path: Path) -> None:
    assert plan(world).warnings == ()
    path = world.save(
        tmp_path / "n.safetensors",
        world.make_network(4),
        trained_days=(100, 200),
        season_start="01-01",
    )
    made = plan(world, checkpoint=path, window=24)
    texts = made.warnings
    assert all(f"\n  warning     {text}" in str(made) for text in texts)
    for text, part in zip(texts, ("--window 16", "days 20 to 301", "from 01-01"), strict=True):
        assert part in text


@pytest.mark.parametrize(
    ("systems", "start", "told"),
    [
        (["EPSG:32631"], "09-01", None),
        (["EPSG:32755"], "03-01", None),
        ([["EPSG:32754", "EPSG:32755"]], "02-28", "from 02-28 on the other.*--season-start 08-28"),
        (["EPSG:32755"], "09-01", "from 09-01 on the other.*--season-start 03-01"),
        (["EPSG:32755", "EPSG:32631 from 2019-09-01"], "03-01", None),
        (["EPSG:32755", "EPSG:32631 from 2019-10-01"], "09-01", "--season-start 10-01"),
        # Where several start there, or the place is not told, the checkpoint's day counts.
        (["EPSG:32632", "EPSG:32631 from 2019-09-01"], "10-01", "from 10-01, so"),
        (["EPSG:2154"], "09-01", None),
    ],
)
def test_on_the_other_hemisphere_the_year_is_half_a_year_off(
    world: Any, tmp_path: Path, systems: list[Any], start: str, told: str | None
) -> None:
    # The season of the world starts on 1 September, in zone 31 of the north.
    cubes = [
        dict(zip(("crs", "season"), crs.split(" from "), strict=False))
        if isinstance(crs, str)
        else {"crs": crs}
        for crs in systems
    ]
    path = world.save(
        tmp_path / "n.safetensors", world.make_network(4), season_start=start,
        provenance={"cubes": cubes},
    )  # fmt: skip
    texts = plan(world, checkpoint=path).warnings
    assert len(texts) == (told is not None)
    assert told is None or re.search(told, texts[0])
    # Between the tropics the sun does not say when the year begins.
    trained = read_metadata(path)
    assert {trained.season_start_at(latitude) for latitude in (-20.0, 0.0, 20.0, None)} == {start}
    if systems == ["EPSG:32631"]:
        # A map without a cube begins its season where none is asked for.
        found = [season_start_for(trained, Region.from_bbox((149, south, 150, south + 1)))
                 for south in (-33, -10, 33)]  # fmt: skip
        assert found == ["03-01", "09-01", "09-01"]


def test_windows_that_reach_beyond_the_cube_are_noted(world: Any) -> None:
    assert plan(world).notes == ()
    made = plan(world, window=48, halo=8)
    assert "reach beyond the cube" in made.notes[0]
    assert made.notes[0] in str(made)


def test_seasons_that_differ_from_training_are_explained(world: Any, tmp_path: Path) -> None:
    cube = {"resolution": 20.0, "dates": 12, "level": "top-of-atmosphere"}
    changes: dict[str, Any] = {"provenance": {"cubes": [cube]}, "trained_days": (5, 500)}
    path = world.save(tmp_path / "n.safetensors", world.make_network(4), **changes)
    texts = plan(world, checkpoint=path).warnings
    told = (
        "a part of days 5 to 500",
        "10 m but .* pixels of 20 m",
        "surface reflectance but .* top-of-atmosphere reflectance",
    )
    for text, part in zip(texts, told, strict=True):
        assert re.search(part, text)

    network = world.make_network(4, mode="reference")
    path = world.save(
        tmp_path / "r.safetensors", network, provenance={"cubes": [{**cube, "resolution": 10.0}]}
    )
    expects = network.config.positions == "index"
    texts = plan(world, checkpoint=path).warnings
    assert any("8 dates but the network was trained on 12" in text for text in texts) == expects
