"""Clouds and shadows found by OmniCloudMask in a scene's red, green and near infrared.

The model scales each picture by the picture's own mean and spread, so what it finds depends on
the picture it is shown. Here the pictures are the windows of one lattice, fixed in the CRS, and
each is shown alone: no pixel's class depends on the block, the region or the shard it is built in.

Wright, N., Duncan, J. M. A., Callow, J. N., Thompson, S. E. & George, R. J. (2025): Training
sensor-agnostic deep learning models for remote sensing: achieving state-of-the-art cloud and
cloud shadow identification with OmniCloudMask. Remote Sensing of Environment 322, 114694.
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..errors import InputError
from ..grid import Lattice, Window
from .clouds import CloudSpec

__all__ = [
    "SKY_BANDS",
    "SKY_BYTES",
    "SKY_LATTICE",
    "SKY_RESOLUTIONS",
    "SkyModel",
    "find_sky",
    "omnicloudmask",
    "prepare_sky",
]

SKY_BANDS = ("red", "green", "nir")
"""What the model is shown, in its order."""

SKY_RESOLUTIONS = (5.0, 50.0)
"""Finest and coarsest pixels (metres) that the model knows."""

SKY_BYTES = 1_500_000_000
"""Memory of the libraries, the weights and one picture's features, more than was seen on a CPU."""

SKY_LATTICE = Lattice(window=1024, halo=160)
"""Pictures of 1024 px, of which the inner 704 px are kept. The library itself proposes pictures of
1000 px that overlap by 300; its network needs sides of whole 32 px."""

_OVERLAP = 2 * SKY_LATTICE.halo

SkyModel = Callable[[np.ndarray], np.ndarray]
"""From a picture, (3, H, W) float32 with 0 where there is no data, to its (H, W) uint8 classes:
0 clear, 1 thick cloud, 2 thin cloud, 3 shadow."""

_one_at_a_time = threading.Lock()
"""A picture takes gigabytes, and all cores."""


def find_sky(
    bands: Sequence[np.ndarray], read: Window, area: Window, model: SkyModel
) -> np.ndarray:
    """Return the model's classes in an area, one window of the lattice after another.

    Parameters
    ----------
    bands : three (H, W) arrays, red, green and near infrared, 0 where there is no data.
    read
        Where they lie in absolute pixels: ``SKY_LATTICE.cover(area)``.
    area
        In absolute pixels.

    Returns
    -------
    (H, W) uint8 of the area: 0 clear or no data, 1 thick cloud, 2 thin cloud, 3 shadow.
    """
    found = np.zeros(area.shape_yx, dtype=np.uint8)
    for core in SKY_LATTICE.cores(area):
        window = SKY_LATTICE.window_of(core)
        seen = window.relative_to(read)
        picture = np.stack([band[seen.rows, seen.cols] for band in bands]).astype(np.float32)
        kept = core.intersection(area)
        from_, to = kept.relative_to(window), kept.relative_to(area)
        if picture[:, from_.rows, from_.cols].any():
            found[to.rows, to.cols] = model(picture)[from_.rows, from_.cols]
    return found


def omnicloudmask(clouds: CloudSpec, **options: Any) -> SkyModel:
    """Return the model, from the library's weights.

    Parameters
    ----------
    options
        Handed to ``omnicloudmask.predict_from_array``, such as ``custom_models``.
    """

    def model(picture: np.ndarray) -> np.ndarray:
        from omnicloudmask import predict_from_array

        with _one_at_a_time, warnings.catch_warnings():
            # Where a third of a picture is no data the library cuts it again, and says so: that
            # too depends on the picture alone.
            warnings.filterwarnings("ignore", message="Significant no-data areas")
            found: np.ndarray = predict_from_array(
                picture,
                patch_size=SKY_LATTICE.window,
                patch_overlap=_OVERLAP,
                # More at a time would be added up in any order.
                batch_size=1,
                inference_dtype="fp32",
                no_data_value=0,
                model_version=clouds.weights,
                **options,
            )
        classes: np.ndarray = found[0].astype(np.uint8)
        return classes

    return model


def prepare_sky(clouds: CloudSpec) -> None:
    """Make sure that the model can run here; its weights are fetched if they are not there yet.

    Raises
    ------
    InputError
        If the library is missing, or its weights are and cannot be fetched.
    """
    if clouds.source != "omnicloudmask":
        return
    if importlib.util.find_spec("omnicloudmask") is None:
        raise InputError(
            "Cannot mask clouds with --cloud-mask omnicloudmask: the package omnicloudmask is not "
            "installed, and it runs the model. Install it with pip install "
            "'stcln-geo[omnicloudmask]', or use --cloud-mask scl."
        )
    from omnicloudmask.download_models import get_model_data_dir, get_models

    try:
        get_models(model_version=clouds.weights)
    except Exception as error:  # the network, the host and the disk all fail here
        reason = str(error).strip().splitlines()
        raise InputError(
            f"Cannot mask clouds with OmniCloudMask: its weights, version {clouds.weights:g}, are "
            f"not in {get_model_data_dir()} and cannot be fetched "
            f"({reason[0] if reason else type(error).__name__}). On a machine with network, run "
            "python -c 'from omnicloudmask.download_models import get_models; "
            f"get_models(model_version={clouds.weights:g})' with the same version of the package, "
            "and copy its *.safetensors files into that folder."
        ) from error
