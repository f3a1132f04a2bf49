"""bfloat16 gives the labels of float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stcln_geo.cube.store import open_season
from stcln_geo.data.chips import ChipDataset, plan_chips
from stcln_geo.data.stream import OrderedStream
from stcln_geo.model.checkpoint import load_model
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.finetune import finetune


@pytest.mark.slow
def test_labels_of_a_trained_network_agree(cube: Path, tmp_path: Path) -> None:
    options = {
        "model.preset": "tiny", "data.chip": 16, "batch_size": 8, "steps": 120, "seed": 1,
        "optimiser.learning_rate": 3e-3,
    }  # fmt: skip
    result = finetune(cube, tmp_path / "run", load_config(FinetuneConfig, overrides=options))
    assert result.best is not None
    assert result.best > 0.8
    network: Any = load_model(tmp_path / "run")
    assert abs(float(network.attention.gate.detach())) > 1e-3, "attention over space counts"
    season = open_season(cube)
    dataset = ChipDataset([season], plan_chips(season, chip=16), bands=season.bands)

    same = seen = 0
    with torch.inference_mode():
        for batch in OrderedStream(dataset, batch_size=8, memory=0):
            labels = []
            for half in (False, True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    logits = network(batch.images(), batch.days, batch.valid)
                labels.append(logits.argmax(1))
            counted = batch.valid.any(1)
            seen += int(counted.sum())
            same += int((labels[0] == labels[1])[counted].sum())

    assert seen > 8000
    assert same / seen >= 0.99
