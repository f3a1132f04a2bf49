from __future__ import annotations

import pytest
import torch

from stcln_geo.errors import InputError
from stcln_geo.model.device import autocast_for, choose_device, choose_precision


def test_automatic_choices_fit_the_hardware():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_precision("float32", "cuda", width=256) == "float32"
    assert choose_precision("bf16", "cpu", width=32) == "bf16"


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "wide", "narrow"),
    [
        (True, True, "bf16", "bf16"), (True, False, "bf16", "bf16"),
        (False, True, "bf16", "float32"), (False, False, "float32", "float32"),
        (None, None, "float32", "float32"),
    ],
)  # fmt: skip
def test_a_cpu_takes_bfloat16_where_it_is_faster_at_it(
    monkeypatch: pytest.MonkeyPatch, amx: bool | None, avx512_bf16: bool | None, wide: str,
    narrow: str,
) -> None:  # fmt: skip
    """None: a version of torch that cannot tell."""
    told = {"_is_amx_tile_supported": amx, "_is_avx512_bf16_supported": avx512_bf16}
    for name, answer in told.items():
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if answer is not None:
            monkeypatch.setattr(torch.cpu, name, lambda answer=answer: answer, raising=False)
    assert choose_precision("auto", "cpu", width=256) == wide
    assert choose_precision("auto", "cpu", width=32) == narrow


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
