"""An archive of different dates, bands, seasons and CRS trains in one run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stcln_geo.archive.members import add_members
from stcln_geo.errors import ChunkError, InputError
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.train.config import PretrainConfig, load_config, to_toml
from stcln_geo.train.loading import plan_loading
from stcln_geo.train.pretrain import pretrain

_SPEC = importlib.util.spec_from_file_location(
    "stcln_geo_test_corpus", Path(__file__).parents[1] / "data" / "test_corpus.py"
)
assert _SPEC is not None
assert _SPEC.loader is not None
_CORPUS = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_CORPUS)


def config(**options: object) -> PretrainConfig:
    return PretrainConfig.model_validate(
        {
            "steps": 4,
            "batch_size": 6,
            "model": {"preset": "tiny", "widths": (8, 16), "layers": 1, "heads": 2},
            "masking": {"gate": False},
            "validation": {"every": 2},
            "data": {"chip": 16, **options},
        }
    )


def damage(cube: Path, season: str) -> None:
    """Overwrite the beginning of the first chunk of a shard."""
    file = cube / season / "reflectance" / "c" / "0" / "0" / "0" / "0"
    content = file.read_bytes()
    file.write_bytes(bytes(16) + content[16:])


def test_stacks_and_cubes_train_together_and_damage_is_counted(
    small_cube: Path, new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    stack = _CORPUS.make_stack(tmp_path / "sites.zarr")
    other = new_cube("other", season="2020-09-01", bands=("nir", "red", "green"), dates=9)
    damage(other, "2020-09-01")
    add_members(tmp_path / "archive", [stack, other])
    given = [tmp_path / "archive", small_cube]
    run = tmp_path / "run"

    with pytest.raises(ChunkError, match=r"chunk 0\.0\.0\.0 of reflectance in .*other\.zarr"):
        pretrain(given, run, config(min_clear=1.0))
    recipe = config(
        min_clear=1.0, bad_chunks="skip", max_bad_fraction=0.5, weights={"years": {"2020": 3.0}}
    )
    result = pretrain(given, run, recipe, overwrite=True)

    assert result.steps == 4
    told = json.loads((run / "run.json").read_text())
    assert told["data"]["sources"] == 3
    assert told["data"]["sites"] == 9
    assert told["data"]["chips_left_out_empty"] >= 4
    assert 0 < told["data"]["chip_dates_empty"] < told["data"]["chip_dates"]
    assert told["epoch_chips"] > told["chips"]
    assert [problem.split(":")[0] for problem in told["bad_chunks"]] == [
        f"Cannot read chunk 0.0.0.0 of reflectance in {other}, season 2020-09-01"
    ]
    metadata = read_metadata(run)
    assert metadata.config.bands == ("red", "nir", "green")
    assert [cube["kind"] for cube in metadata.provenance["cubes"]] == ["stack", "cube", "cube"]
    assert metadata.provenance["cubes"][0]["crs"] == ["EPSG:32631", "EPSG:32720"]
    assert load_config(PretrainConfig, file=run / "config.toml").data == recipe.data


def test_too_little_memory_is_an_error_that_says_how_much(small_cube: Path) -> None:
    loading = plan_loading([small_cube], config(memory_gb=0.0005))

    with pytest.raises(InputError, match=r"in 0\.0005 GB with 2 threads: they need at least"):
        loading.streams(batch_size=6, workers=2)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_what_is_held_stays_within_the_memory(new_cube: Callable[..., Path], share: float) -> None:
    cube = new_cube(shape_yx=(160, 160))
    whole = plan_loading([cube], config())
    needed = whole.working(batch_size=2, workers=1)
    memory = needed + int(whole.dataset.bytes_per_unit.sum() * share)
    loading = plan_loading([cube], config(memory_gb=memory / 1e9))
    # Chips to judge on are kept in an eighth of the memory at most, and those to mix get the rest.
    mixed = memory - loading.working(batch_size=2, workers=1)
    assert memory - needed <= mixed < memory
    stream, validation = loading.streams(batch_size=2, workers=1)
    assert validation is not None
    assert not stream.order.resident

    most = 0
    for _ in stream.batches(0, 15):
        # What is still being read is not counted: at some steps that may be all.
        held = sum(
            chip.nbytes
            for units in stream._groups.values()
            for future in units.values()
            if future.done() and not future.cancelled()
            for chip in future.result()
        )
        assert held <= mixed
        most = max(most, held)
    stream.close()
    assert most > 0


def test_weights_are_written_and_read_back() -> None:
    recipe = config(weights={"cubes": {'odd "name"*': 0.5}, "regions": {"1,2,3,4": 2.0}})
    file = to_toml(recipe)

    assert 'weights = {"cubes" = {"odd \\"name\\"*" = 0.5}' in file
    assigned = load_config(
        PretrainConfig, assignments=["data.weights.years.2018=2", "data.balance=sources"]
    )
    assert assigned.data.weights.years == {"2018": 2.0}
    assert assigned.data.balance == "sources"
