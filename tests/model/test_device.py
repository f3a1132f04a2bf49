from __future__ import annotations

import pytest
import torch

from stcln_geo.errors import InputError
from stcln_geo.model.device import autocast_for, choose_device, choose_precision


def test_automatic_choices_fit_the_hardware():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    amx = getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    assert choose_precision("auto", "cpu") == ("bf16" if amx else "float32")
    assert choose_precision("float32", "cuda") == "float32"


def test_unknown_devices_are_named():
    with pytest.raises(InputError, match="devices are auto, cpu, cuda"):
        choose_device("tpu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_autocast_multiplies_at_the_precision(precision, dtype):
    ones = torch.ones(3, 3)
    with autocast_for(precision, "cpu"):
        assert (ones @ ones).dtype == dtype


def test_float32_on_a_gpu_keeps_its_digits_in_convolutions_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The switch, which is there without a GPU as well."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with autocast_for("float32", "cuda"):
        assert not torch.backends.cudnn.allow_tf32
    assert torch.backends.cudnn.allow_tf32
