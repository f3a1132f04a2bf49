"""Blocks bound memory and change nothing: every cut gives what the whole gives."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stcln_geo.model import layers


def run(network, batch, valid, *, grad):
    with torch.set_grad_enabled(grad):
        return network(batch.images, batch.days, valid)


@pytest.mark.parametrize("masked", [True, False], ids=["valid", "all"])
@pytest.mark.parametrize("mode", ["geo", "reference"])
def test_inference_in_small_blocks_equals_the_whole(make_network, make_batch, mode, masked):
    network = make_network(mode=mode, dtype=torch.float64).eval()
    batch = make_batch(dtype=torch.float64)
    valid = batch.valid if masked else None
    whole = run(network, batch, valid, grad=False)

    calls = {"dates": 0, "series": 0}
    network.encoder.convolutions.register_forward_hook(
        lambda *_: calls.update(dates=calls["dates"] + 1)
    )
    network.encoder.temporal.register_forward_hook(
        lambda *_: calls.update(series=calls["series"] + 1)
    )
    date_bytes = 4 * 2 * 7 * 10 * network.config.dim
    network.encoder.slice_bytes = 4 * date_bytes  # 6 dates as 4 + 2
    network.encoder.max_sequences = 13  # 140 series as 10 x 13 + 10
    network.attention.affinity_bytes = 8 * 2 * 70 * 11  # 70 queries as 6 x 11 + 4
    cut = run(network, batch, valid, grad=False)
    assert calls == {"dates": 2, "series": 11}
    torch.testing.assert_close(cut, whole, atol=1e-12, rtol=0)


def test_training_in_small_blocks_has_the_gradients_of_the_whole(make_network, make_batch):
    whole = make_network(dtype=torch.float64).train()
    cut = copy.deepcopy(whole)
    cut.encoder.max_sequences = 23
    cut.attention.affinity_bytes = 8 * 2 * 70 * 11
    batch = make_batch(dtype=torch.float64)
    for network in (whole, cut):
        logits = network(batch.images, batch.days, batch.valid)
        torch.nn.functional.cross_entropy(logits, batch.labels).backward()
    for (name, one), other in zip(whole.named_parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0, msg=name)


def test_training_recomputes_affinities_instead_of_keeping_them(make_network, make_batch):
    """Several blocks: no N x N, and no block x N either, is saved for the backward pass."""
    network, batch = make_network().train(), make_batch()

    def largest_saved() -> int:
        sizes = [0]

        def keep(tensor):
            if tensor.ndim == 3 and tensor.shape[-1] == 70 >= tensor.shape[-2]:
                sizes.append(tensor.shape[-2])
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(network, batch, batch.valid, grad=True)
        return max(sizes)

    assert largest_saved() == 70
    network.attention.affinity_bytes = 4 * 2 * 70 * 11
    assert largest_saved() == 0


def test_no_attention_call_gets_more_sequences_than_kernels_take():
    assert layers.MAX_SEQUENCES == 32768


_PATCH = """
import torch
from dataclasses import replace
from stcln_geo.model import Stcln, StclnConfig
from stcln_geo.train.memory import peak_memory
bands = tuple("abcdefghij")
config = replace(StclnConfig.preset("base", bands=bands, classes=20), layers=1)
network = Stcln(config).eval()
torch.nn.init.constant_(network.attention.gate, 0.5)
images = torch.rand(1, 61, 10, 128, 128)
valid = torch.rand(1, 61, 128, 128) > 0.3
with torch.inference_mode():
    logits = network(images, 6 * torch.arange(61)[None], valid)
assert logits.shape == (1, 20, 128, 128) and logits.isfinite().all()
# Not of the process that started this one, with which ru_maxrss begins.
print(peak_memory("cpu"))
"""


@pytest.mark.slow(minutes=4)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is asked of /proc")
def test_a_whole_pastis_patch_fits_in_memory():
    """128 x 128 pixels and 61 dates through `base`, in a process of its own, torch included.

    Features before and after the transformer are 1 GB each: hardly anything else may be held.
    Its layers run one after another in the same memory, so one of them shows what three take.
    """
    done = subprocess.run(
        [sys.executable, "-c", _PATCH], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3e9
