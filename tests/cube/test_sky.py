"""Clouds by OmniCloudMask: the same wherever the work is cut, and what becomes of its classes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from stcln_geo.catalog import load_catalog
from stcln_geo.cli.main import app
from stcln_geo.cube.block import BlockPixels, read_block
from stcln_geo.cube.clouds import CloudSpec, clear_sky, sky_classes
from stcln_geo.cube.cost import count_reads, task_bytes
from stcln_geo.cube.plan import CubePlan, CubeSpec, crop_plan, plan_cube
from stcln_geo.cube.scenes import Readers
from stcln_geo.cube.search import search_items
from stcln_geo.cube.sky import SKY_LATTICE, find_sky, omnicloudmask, prepare_sky
from stcln_geo.cube.store import list_seasons, open_season
from stcln_geo.errors import InputError
from stcln_geo.grid import Lattice, Window

from .conftest import Archive

OMNI = CloudSpec(source="omnicloudmask", cloud_margin=3, shadow_margin=1)
BANDS = {"red": 10, "green": 10, "nir": 10, "swir16": 20}
STRIDE = SKY_LATTICE.stride
INSTALLED = importlib.util.find_spec("omnicloudmask") is not None
needs_library = pytest.mark.skipif(not INSTALLED, reason="omnicloudmask is not installed")


def all_seen(picture: np.ndarray) -> np.ndarray:
    """Return classes that depend on every pixel of the picture, and on no position."""
    known = picture != 0
    mean = [
        band[there].mean() if there.any() else 0 for band, there in zip(picture, known, strict=True)
    ]
    wide = ndimage.uniform_filter(picture[0], 101, mode="constant")
    found = np.zeros(picture.shape[1:], dtype=np.uint8)
    found[picture[1] > 1.9 * mean[1]] = 2
    found[picture[2] > 1.9 * mean[2]] = 3
    found[(wide > mean[0]) & (picture[0] > 1.8 * mean[0])] = 1
    return found


def plant(archive: Archive, *, with_scl: bool = True, drop: tuple[str, ...] = ()) -> Archive:
    """Add two scenes across a corner where four cores of the model's lattice meet."""
    rng = np.random.default_rng(11)
    left = (60_000 // STRIDE) * STRIDE * 10 - 440
    top = (559_700 // STRIDE) * STRIDE * 10 + 400
    for day in (1, 11):
        pixels = {
            name: rng.integers(1, 4000, (102 * 10 // size, 104 * 10 // size)).astype("uint16")
            for name, size in BANDS.items()
        }
        pixels["red"][60:75, 10:30] = 0
        scl = rng.choice(
            [0, 1, 2, 3, 4, 5, 8, 11], p=[0.02] * 4 + [0.4, 0.4, 0.02, 0.1], size=(51, 52)
        ).astype("uint8")
        archive.add(
            f"S2_{day}", f"2019-03-{day:02d}T10:50:00", pixels=pixels, bands=BANDS, drop=drop,
            scl=scl if with_scl else None, origin=(left, top),
        )  # fmt: skip
    return archive


def plan_of(archive: Archive, **choices: Any) -> CubePlan:
    snapshot = search_items(load_catalog(archive.location))
    near = CloudSpec(source="omnicloudmask", cloud_margin=1, shadow_margin=0)
    spec = {"clouds": near, "lattice": Lattice(window=8, halo=1), **choices}
    return plan_cube(snapshot, None, CubeSpec(**spec))


def read(plan: CubePlan, folder: Path) -> tuple[BlockPixels, int]:
    readers = Readers(plan.access)
    pixels = read_block(
        plan, plan.seasons[0], readers,
        folder=folder, skip_failures=False, threads=2, model=all_seen,
    )  # fmt: skip
    return pixels, readers.reads


# --- the lattice ---


def test_classes_depend_neither_on_the_block_nor_on_the_region():
    rng = np.random.default_rng(5)
    world = Window(-2 * STRIDE - 400, STRIDE - 500, 2700, 2600)
    bands = [rng.integers(0, 4000, world.shape_yx).astype("uint16") for _ in range(3)]

    def found(area: Window) -> np.ndarray:
        seen = SKY_LATTICE.cover(area)
        inside = seen.relative_to(world)
        assert world.contains(seen)
        return find_sky([band[inside.rows, inside.cols] for band in bands], seen, area, all_seen)

    region = Window(-STRIDE - 171, 2 * STRIDE - 130, 301, 283)
    whole = found(region)
    assert np.bincount(whole.ravel(), minlength=4).min() > 100
    for side in (128, 256):
        for row in range(0, 301, side):
            for col in range(0, 283, side):
                block = Window(row, col, side, side).intersection(Window(0, 0, 301, 283))
                part = found(block.shift(region.row, region.col))
                np.testing.assert_array_equal(part, whole[block.rows, block.cols])
    other = region.shift(57, -41)
    shared = region.intersection(other)
    here, there = shared.relative_to(region), shared.relative_to(other)
    np.testing.assert_array_equal(found(other)[there.rows, there.cols], whole[here.rows, here.cols])
    # Shown the region alone, the same model finds something else: the law above is not empty.
    inside = region.relative_to(world)
    alone = all_seen(np.stack([b[inside.rows, inside.cols] for b in bands]).astype("float32"))
    assert (alone != whole).any()


@pytest.mark.parametrize("with_scl", [True, False], ids=["scl", "no-scl"])
def test_a_cube_is_the_same_in_any_blocks(tmp_path: Path, with_scl: bool):
    plan = plan_of(plant(Archive(tmp_path / "archive"), with_scl=with_scl))
    height, width = plan.window.shape_yx
    cores = SKY_LATTICE.cores(plan.window)
    assert len(cores) == 4, "the corner of four cores lies in the cube"
    whole, _ = read(plan, tmp_path)
    assert 0.02 < whole.arrays.valid.mean() < 0.9
    for row in range(0, height, 48):
        for col in range(0, width, 56):
            block = Window(row, col, 48, 56).intersection(Window(0, 0, height, width))
            part = crop_plan(plan, block.shift(plan.window.row, plan.window.col), region="part")
            if not part.seasons:
                assert not whole.arrays.valid[..., block.rows, block.cols].any()
                continue
            arrays = read(part, tmp_path)[0].arrays
            here = (..., block.rows, block.cols)
            np.testing.assert_array_equal(arrays.valid, whole.arrays.valid[here])
            np.testing.assert_array_equal(arrays.reflectance, whole.arrays.reflectance[here])


def test_pixels_beside_the_mask_are_those_of_a_cube_without_it(tmp_path: Path):
    archive = plant(Archive(tmp_path / "archive"))
    masked = read(plan_of(archive), tmp_path)[0].arrays
    plain = read(plan_of(archive, clouds=CloudSpec()), tmp_path)[0].arrays
    np.testing.assert_array_equal(masked.reflectance, plain.reflectance)
    np.testing.assert_array_equal(masked.scl, plain.scl)
    assert (masked.valid != plain.valid).any()


def test_bands_of_the_mask_are_read_once_and_not_stored(tmp_path: Path):
    archive = plant(Archive(tmp_path / "archive"))
    plan = plan_of(archive, bands=("red", "swir16"))
    pixels, reads = read(plan, tmp_path)
    assert pixels.arrays.reflectance.shape[1] == 2
    assert reads == 2 * len({"red", "swir16", "green", "nir", "scl"})
    block = Window(0, 0, *plan.window.shape_yx)
    assert count_reads(plan, plan.seasons[0], [block]) == reads
    # The other bands change nothing of the mask where all are measured.
    wide = plan_of(archive, bands=("red", "green", "nir", "swir16"))
    np.testing.assert_array_equal(pixels.arrays.valid, read(wide, tmp_path)[0].arrays.valid)


# --- the classes ---


def test_the_model_decides_the_sky_and_the_scene_classes_the_ground():
    spec = CloudSpec(source="omnicloudmask", cloud_margin=0, shadow_margin=0)
    scl = np.repeat(np.arange(12, dtype="uint8")[None], 4, axis=0)
    found = np.repeat(np.arange(4, dtype="uint8")[:, None], 12, axis=1)
    clear = clear_sky(sky_classes(found, scl, spec), spec)
    assert not clear[1:].any(), "cloud, thin cloud and shadow"
    assert list(np.flatnonzero(~clear[0])) == [0, 1], "no data and saturated pixels"
    assert clear_sky(sky_classes(found, None, spec), spec)[0].all()
    no_snow = CloudSpec(source="omnicloudmask", clear=(4, 10), cloud_margin=0, shadow_margin=0)
    clear = clear_sky(sky_classes(found, scl, no_snow), no_snow)
    assert list(np.flatnonzero(clear[0])) == [2, 3, 4, 8, 9, 10]
    assert clear[2].all(), "thin cloud is class 10, which was called clear"
    assert not clear[[1, 3]].any()


def test_clouds_and_shadows_keep_their_own_margins():
    found = np.zeros((31, 33), dtype="uint8")
    found[10, 10], found[20, 24] = 1, 3
    clear = clear_sky(sky_classes(found, None, OMNI), OMNI)
    pad = OMNI.padding
    rows, cols = np.mgrid[pad : 31 - pad, pad : 33 - pad]
    cloud = (rows - 10) ** 2 + (cols - 10) ** 2 <= OMNI.cloud_margin**2
    shadow = (rows - 20) ** 2 + (cols - 24) ** 2 <= OMNI.shadow_margin**2
    np.testing.assert_array_equal(clear, ~(cloud | shadow))


# --- the plan ---


def test_the_plan_tells_the_mask_and_comes_back_from_json(tmp_path: Path):
    archive = plant(Archive(tmp_path / "archive"), with_scl=False)
    plan = plan_of(archive)
    again = CubePlan.from_json(plan.to_json())
    assert again.scenes == plan.scenes
    assert again.spec == plan.spec
    assert again.fingerprint == plan.fingerprint
    assert plan.cloud_mask == "omnicloudmask"
    assert "OmniCloudMask (weights 4), 1 px from clouds, 0 px from shadows; no scene" in str(plan)
    plain = plan_of(archive, clouds=CloudSpec())
    assert plain.cloud_mask == "none"
    assert plain.fingerprint != plan.fingerprint
    assert "source" not in plain.to_json()["spec"]["clouds"], "as stored by earlier builds"
    assert task_bytes(plan, plan.seasons[0], 512) > task_bytes(plain, plain.seasons[0], 512) + 1e9


def test_what_cannot_be_masked_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"no item of .* has the bands green"):
        plan_of(plant(Archive(tmp_path / "a"), drop=("green",)))
    with pytest.raises(InputError, match="at 60 m: it knows pixels of 5 to 50 m"):
        plan_of(plant(Archive(tmp_path / "b")), resolution=60.0)
    with pytest.raises(InputError, match="must be scl or omnicloudmask"):
        CloudSpec(source="fmask")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="version 3 of OmniCloudMask's weights"):
        CloudSpec(source="omnicloudmask", weights=3)


@pytest.mark.skipif(INSTALLED, reason="omnicloudmask is installed")
def test_without_the_extra_nothing_is_written(tmp_path: Path):
    archive = plant(Archive(tmp_path / "archive"))
    out = tmp_path / "cube.zarr"
    result = CliRunner().invoke(
        app,
        ["cube", "build", str(out), "--catalog", archive.location, "--cloud-mask", "omnicloudmask"],
    )
    assert result.exit_code == 2 or isinstance(result.exception, InputError)
    assert "stcln-geo[omnicloudmask]" in result.output + str(result.exception)
    assert not out.exists()


# --- the library itself ---


@needs_library
def test_the_library_is_shown_one_picture_and_gives_its_classes():
    import torch

    class Bright(torch.nn.Module):
        """Scores class c by band c, of what the library scaled; class 0 by zero."""

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            return torch.cat([torch.zeros_like(batch[:, :1]), batch - 1], dim=1)

    rng = np.random.default_rng(2)
    side = SKY_LATTICE.window
    picture = rng.integers(1, 4000, (3, side, side)).astype("float32")
    picture[:, :40, :] = 0
    found = omnicloudmask(OMNI, custom_models=[Bright()], inference_device="cpu")(picture)
    known = picture[:, 40:]
    mean, spread = (getattr(known, of)(axis=(1, 2), keepdims=True) for of in ("mean", "std"))
    scores = np.concatenate([np.zeros((1, *known.shape[1:])), (known - mean) / spread - 1])
    assert not found[:40].any(), "no data is no cloud"
    assert (found[40:] == scores.argmax(axis=0)).mean() > 0.9999, "but for equal scores"
    assert np.bincount(found.ravel(), minlength=4).min() > 1000


@needs_library
def test_lacking_weights_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import huggingface_hub.constants

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"weights, version 4, are not in .* cannot be fetched"):
        prepare_sky(OMNI)


@needs_library
@pytest.mark.slow
def test_a_cube_by_the_library_from_weights_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The published networks, with numbers by chance in place of the weights."""
    import csv

    import segmentation_models_pytorch as smp
    import torch
    from omnicloudmask.download_models import get_model_data_dir, model_index_path
    from safetensors.torch import save_file

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    torch.manual_seed(0)
    with model_index_path.open() as file:
        networks = [row for row in csv.DictReader(file) if float(row["version"]) == OMNI.weights]
    for row in networks:
        network = smp.Unet(row["timm_model_name"], encoder_weights=None, in_channels=3, classes=4)
        numbers = {name: value.contiguous() for name, value in network.state_dict().items()}
        save_file(numbers, get_model_data_dir() / row["file_name"])
    archive = plant(Archive(tmp_path / "archive"), with_scl=False)
    west, _, _, north = archive.items[0]["bbox"]
    inside = f"{west + 0.0001},{north - 0.0003},{west + 0.0004},{north - 0.0001}"
    out = tmp_path / "cube.zarr"
    arguments = [
        "cube", "build", str(out), "--catalog", archive.location, "--bbox", inside,
        "--time", "2019-03-01/2019-03-02", "--cloud-mask", "omnicloudmask", "--window", "8",
        "--halo", "1",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    season = open_season(out, list_seasons(out)[0])
    assert season.attrs["cloud_mask"] == "omnicloudmask"
    assert season.attrs["cloud_mask_weights"] == OMNI.weights
    assert (
        "clouds  omnicloudmask, weights 4"
        in CliRunner().invoke(app, ["cube", "info", str(out)]).output
    )
