"""The minimum mapping unit: a local rule, the same however the map is cut."""

from __future__ import annotations

import json
from collections import Counter, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely

from stcln_geo.cog import validate_cog
from stcln_geo.cube.store import open_season
from stcln_geo.errors import InputError
from stcln_geo.execution import Execution
from stcln_geo.model.checkpoint import read_metadata
from stcln_geo.predict import PredictSpec, plan_prediction, predict_region
from stcln_geo.predict import run as run_module
from stcln_geo.predict import sieve as sieve_module
from stcln_geo.predict.sieve import MOST_PIXELS, ROUNDS, sieve, sieve_for

CPU = {"device": "cpu", "precision": "float32", "min_clear": 1, "seam_audit": 0}
PIXELS = 7
HECTARES = 0.07


def pixels(path: Path) -> np.ndarray:
    with rasterio.open(path) as source:
        return source.read(1)


def sides(y: int, x: int, shape: tuple[int, int]) -> list[tuple[int, int]]:
    around = ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1))
    return [(b, a) for b, a in around if 0 <= b < shape[0] and 0 <= a < shape[1]]


def patches_by_hand(classes: np.ndarray) -> list[list[tuple[int, int]]]:
    """Fill from every pixel over its sides."""
    seen = classes == 255
    found = []
    for start in np.ndindex(*classes.shape):
        if seen[start]:
            continue
        seen[start] = True
        queue, patch = deque([start]), []
        while queue:
            place = queue.popleft()
            patch.append(place)
            for other in sides(*place, classes.shape):
                if not seen[other] and classes[other] == classes[place]:
                    seen[other] = True
                    queue.append(other)
        found.append(patch)
    return found


def sieve_by_hand(classes: np.ndarray, least: int) -> np.ndarray:
    """The rule, patch by patch and pixel by pixel, over the whole map at once."""
    small = [patch for patch in patches_by_hand(classes) if len(patch) < least]
    result = classes.copy()
    waiting = {place for patch in small for place in patch}
    for _ in range(ROUNDS):
        settled = {}
        for patch in small:
            if patch[0] not in waiting:
                continue
            borders = Counter(
                int(result[other])
                for place in patch
                for other in sides(*place, classes.shape)
                if other not in waiting and result[other] != 255
            )
            if borders:
                best = min(borders, key=lambda code: (-borders[code], code))
                settled |= dict.fromkeys(patch, best)
        for place, code in settled.items():
            result[place] = code
        waiting -= set(settled)
    return result


def speckled(shape: tuple[int, int], seed: int, *, noise: float = 0.2) -> np.ndarray:
    """Fields with specks, and gaps without a class."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 4, (shape[0] // 11 + 1, shape[1] // 13 + 1))
    values = coarse.repeat(11, 0).repeat(13, 1)[: shape[0], : shape[1]].astype(np.uint8)
    spots = generator.random(shape) < noise
    values[spots] = generator.integers(0, 4, int(spots.sum()))
    values[generator.random(shape) < 0.03] = 255
    values[: shape[0] // 4, : shape[1] // 3] = 255
    return values


@pytest.mark.parametrize("noise", [0.05, 0.4, 0.7], ids=["fields", "specks", "noise"])
@pytest.mark.parametrize("least", [2, 5, 23])
def test_the_sieve_equals_the_rule_by_hand(
    noise: float, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sieve_module, "_TILE", 37)
    classes = speckled((83, 101), seed=least, noise=noise)
    expected = sieve_by_hand(classes, least)
    assert np.array_equal(sieve(classes, least), expected)
    assert (expected != classes).any()
    assert np.array_equal(expected == 255, classes == 255), "no class comes or goes"
    large = [patch for patch in patches_by_hand(classes) if len(patch) >= least]
    for patch in large:
        place = tuple(np.array(patch).T)
        assert np.array_equal(expected[place], classes[place]), "no such patch loses a pixel"
    for patch in patches_by_hand(expected):
        place = tuple(np.array(patch).T)
        if (expected[place] != classes[place]).any():
            assert len(patch) >= least, "what was merged is not small any more"


@pytest.mark.parametrize("least", [2, 4, 9])
def test_nothing_beyond_the_reach_has_a_say_and_something_at_its_end_may(least: int) -> None:
    reach = (ROUNDS + 1) * (least - 1)
    side = 2 * reach + 1
    for seed in range(40):
        classes = speckled((side, side), seed, noise=1.0)
        far = np.random.default_rng(seed).integers(0, 4, (side + 6, side + 6)).astype(np.uint8)
        far[3:-3, 3:-3] = classes
        assert sieve(far, least)[reach + 3, reach + 3] == sieve(classes, least)[reach, reach]
    # The longest way: a line of small patches, each of N - 1 pixels, to a patch that has just N.
    line = [0, *[1] * (least - 1), *[2] * (least - 1), *[3] * (least - 1)]
    decisive = np.array([line[1:] + [0] * least], dtype=np.uint8)
    assert sieve(decisive, least)[0, 0] == 0
    shorter = decisive[:, :reach]
    assert sieve(shorter, least)[0, 0] == 1


def test_ties_islands_and_diagonals() -> None:
    nothing = 255
    classes = np.array(
        [
            [3, 3, 3, nothing, 1, 1],
            [3, 0, 2, 2, nothing, 1],
            [3, 3, 2, 2, nothing, nothing],
            [nothing, nothing, nothing, nothing, nothing, 2],
        ],
        dtype=np.uint8,
    )
    assert sieve(classes, 2)[1, 1] == 3, "three sides against one"
    assert sieve(classes, 2)[3, 5] == 2, "an island keeps its class"
    assert np.array_equal(sieve(classes, 4)[:2, 4:], classes[:2, 4:]), "corners do not join"
    tied = np.array([[2, 2, 2], [2, 2, 0], [1, 1, 0], [1, 1, 1]], dtype=np.uint8)
    merged = sieve(tied, 3)
    assert merged[1, 2] == merged[2, 2] == 1, "two sides each: the lowest code"
    assert np.array_equal(sieve(classes, 1), classes)


def test_hectares_become_pixels() -> None:
    assert sieve_for(0.25, resolution=10).pixels == 25
    assert sieve_for(0.251, resolution=10).pixels == 26
    assert sieve_for(0.1 + 0.2, resolution=10).pixels == 30
    assert sieve_for(0.5, resolution=20).pixels == 13
    assert sieve_for(0.5, resolution=20).reach == 48
    for hectares in (0.0, -1.0, 0.01, float("nan")):
        with pytest.raises(InputError, match=r"no patch is smaller than one.*more than 0\.01"):
            sieve_for(hectares, resolution=10)
    with pytest.raises(InputError, match=r"257 pixels of 10 m.*--min-mapping-unit 2\.56 or less"):
        sieve_for(2.565, resolution=10)
    with pytest.raises(InputError, match=r"unit of inf ha.*--min-mapping-unit 2\.56 or less"):
        sieve_for(float("inf"), resolution=10)
    assert sieve_for(2.56, resolution=10).pixels == MOST_PIXELS


@pytest.fixture(scope="module")
def plain(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("plain") / "map"
    return predict_region(world.cube, world.checkpoint, out, spec=PredictSpec(**CPU))


@pytest.fixture(scope="module")
def by_hand(plain: Any) -> np.ndarray:
    """The map without a sieve, then the rule by hand; the law of what the product must be."""
    return sieve_by_hand(pixels(plain.classes), PIXELS)


@pytest.mark.parametrize(
    ("shard_size", "workers", "writer"),
    [
        pytest.param(16, 0, "auto", marks=pytest.mark.slow),
        pytest.param(40, 2, "auto", marks=pytest.mark.slow), (256, 0, "auto"),
        (4096, 0, "parallel"),
    ],
    ids=["16", "40-two-workers", "256", "segments"],
)  # fmt: skip
def test_the_map_is_the_same_for_any_shard_and_worker(
    world: Any, plain: Any, by_hand: np.ndarray, tmp_path: Path,
    shard_size: int, workers: int, writer: Any,
) -> None:  # fmt: skip
    spec = PredictSpec(
        shard_size=shard_size, cog_writer=writer, min_mapping_unit=HECTARES,
        outputs=("entropy",), **CPU,
    )  # fmt: skip
    product = predict_region(
        world.cube, world.checkpoint, tmp_path, spec=spec, execution=Execution(workers=workers)
    )
    assert np.array_equal(pixels(product.classes), by_hand)
    before = pixels(plain.classes)
    changed = by_hand != before
    assert changed.sum() > 50
    quality = pixels(tmp_path / "qa.tif")
    assert np.array_equal(quality == 6, changed)
    assert np.array_equal(quality[~changed], pixels(plain.out / "qa.tif")[~changed])
    for name in ("confidence.tif", "observations.tif"):
        assert np.array_equal(pixels(tmp_path / name), pixels(plain.out / name)), name
    for path in tmp_path.glob("*.tif"):
        assert validate_cog(path) == ([], [])
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["sieve"] == {
        "hectares": HECTARES, "pixels": PIXELS, "rounds": 3, "reach": 24,
        "merged_pixels": int(changed.sum()),
    }  # fmt: skip
    assert product.quality["merged into its surroundings"] == changed.sum()
    assert "pixels changed their class (quality code 6)" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_with_blending_and_smoothing_too(world: Any, tmp_path: Path) -> None:
    common = {**CPU, "blend": True, "smooth": "majority"}
    plain = predict_region(
        world.cube, world.checkpoint, tmp_path / "plain", spec=PredictSpec(**common)
    )
    expected = sieve_by_hand(pixels(plain.classes), 12)
    assert (expected != pixels(plain.classes)).any()
    for size in (40, 256):
        spec = PredictSpec(min_mapping_unit=0.12, shard_size=size, **common)
        made = predict_region(world.cube, world.checkpoint, tmp_path / str(size), spec=spec)
        assert np.array_equal(pixels(made.classes), expected)


def test_two_regions_agree_where_they_overlap_but_for_the_reach(
    world: Any, by_hand: np.ndarray, tmp_path: Path
) -> None:
    top, left = -world.extent.row * 10.0, world.extent.col * 10.0
    part = shapely.box(left + 50, top - 900, left + 700, top - 50)
    made = predict_region(
        world.cube, world.checkpoint, tmp_path, region=part,
        spec=PredictSpec(min_mapping_unit=HECTARES, **CPU),
    )  # fmt: skip
    reach = sieve_for(HECTARES, resolution=10).reach
    inner = slice(5 + reach, 90 - reach), slice(5 + reach, 70 - reach)
    found = pixels(made.classes)[reach:-reach, reach:-reach]
    assert found.shape == by_hand[inner].shape
    assert found.size > 500
    assert np.array_equal(found, by_hand[inner])


def test_an_interrupted_run_sieves_what_is_left(
    world: Any, by_hand: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PredictSpec(shard_size=40, min_mapping_unit=HECTARES, keep_shards=True, **CPU)
    whole = run_module.sieve_shard
    done: list[Any] = []

    def stop_in_the_third(task: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(task)
        return whole(task)

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "sieve_shard", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shards/*sieved*")}
    assert len(stamps) == 6
    again = predict_region(world.cube, world.checkpoint, tmp_path, spec=spec)
    assert again.resumed_shards == 6
    assert np.array_equal(pixels(again.classes), by_hand)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())

    # A damaged result is made again, and so is that of every shard that saw another one.
    (tmp_path / "classes.tif").unlink()
    first = min(stamps)
    (tmp_path / "shards" / f"{first.name.split('.')[0]}.sieved-qa.tif").write_bytes(b"")
    assert np.array_equal(
        pixels(predict_region(world.cube, world.checkpoint, tmp_path, spec=spec).classes), by_hand
    )


def test_the_plan_says_it_and_is_another_run(world: Any) -> None:
    season, info = open_season(world.cube), read_metadata(world.checkpoint)
    without = plan_prediction(season, info, PredictSpec())
    plan = plan_prediction(season, info, PredictSpec(min_mapping_unit=0.5))
    assert "patches     of fewer than 50 px (0.5 ha)" in str(plan)
    assert "196 px around it" in str(plan)
    assert "patches" not in str(without)
    assert plan.run_hash != without.run_hash
    with pytest.raises(InputError, match=r"at most 256"):
        plan_prediction(season, info, PredictSpec(min_mapping_unit=25))
