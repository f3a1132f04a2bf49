"""Fine-tuning in `reference` mode on imported PASTIS makes the losses of a plain published loop.

The loop here is written from the description of the published system alone: the plain network of
`plain_network`, frames and classes as they lie on disk, frames that are missing in a batch as zeros
after normalisation, no masks, classes 0 and 19 with the weight 0.
Only the first weights, and which chips form a batch, are taken from our run.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stcln_geo.data.site_split import SiteLists
from stcln_geo.data.split_labels import SplitSpec, split_labels
from stcln_geo.datasets import import_dataset, plan_pastis
from stcln_geo.model.checkpoint import load_model, read_metadata, save_checkpoint
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.reference import PASTIS_BANDS
from stcln_geo.model.stcln import Encoder
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.evaluate import evaluate_run
from stcln_geo.train.finetune import finetune
from stcln_geo.train.finetune_setup import make_finetune_task, prepare_finetune
from stcln_geo.train.ranks import Ranks

from ..datasets.make_pastis import Square, make_square, write_pastis
from .plain_network import FEEDFORWARD, HEADS, LAYERS, WIDTHS, PlainClassifier

CHIP, STEPS = 8, 20


@pytest.fixture(scope="module")
def squares() -> dict[str, Square]:
    """Three squares to train on and one to choose by, with four to seven dates."""
    rng = np.random.default_rng(3)
    made = [
        make_square(number, fold=fold, tile="t31tfj", dates=dates, side=4 * CHIP, rng=rng)
        for number, fold, dates in ((20001, 1, 4), (20002, 1, 6), (20003, 1, 7), (20004, 2, 5))
    ]
    for square in made:
        # Where nothing was measured, the published loader reads a number.
        square.series[square.series == -10_000] = 0
    return {str(square.id): square for square in made}


@pytest.fixture(scope="module")
def imported(squares: dict[str, Square], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    write_pastis(folder / "PASTIS", list(squares.values()))
    import_dataset(plan_pastis(folder / "PASTIS"), folder / "pastis.zarr")
    lists = SiteLists(train=("20001", "20002", "20003", "20003"), validation=("20004",))
    split_labels(folder / "pastis.zarr", SplitSpec(lists=lists))
    return folder / "pastis.zarr"


def recipe(**more: Any) -> FinetuneConfig:
    options: dict[str, Any] = {
        "steps": STEPS, "batch_size": 2, "precision": "float32", "model.mode": "reference",
        "data.chip": CHIP, "data.halo": 0, "data.max_dates": 0, "data.augment": False,
        "labels.chips": [[0, 0], [1, 1]], "labels.silent": ["0", "19"],
        "loss.class_weights": "none", "optimiser.name": "adam", "optimiser.learning_rate": 1e-3,
        "optimiser.schedule": "constant", "optimiser.warmup": 0.0, "optimiser.clip": 0.0,
    }  # fmt: skip
    return load_config(FinetuneConfig, overrides={**options, **more})


def test_losses_are_those_of_the_published_loop(
    imported: Path, squares: dict[str, Square], tmp_path: Path
) -> None:
    told = json.loads((imported.parent / "PASTIS" / "NORM_S2_patch.json").read_text())["Fold_1"]
    mean, std = (np.array(told[name], dtype=np.float32) for name in ("mean", "std"))
    torch.manual_seed(4)
    encoder = Encoder(
        StclnConfig(
            bands=PASTIS_BANDS, widths=WIDTHS, layers=LAYERS, heads=HEADS, feedforward=FEEDFORWARD,
            dropout=0.0, mode="reference", positions="index",
        )
    )  # fmt: skip
    encoder.set_normalisation((mean * 1e-4).tolist(), (std * 1e-4).tolist())
    save_checkpoint(tmp_path / "first.safetensors", encoder)
    config = recipe(init=str(tmp_path / "first.safetensors"))

    finetune(imported, tmp_path / "run", config)
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]

    prepared = prepare_finetune(imported, config, device="cpu", ranks=Ranks(), run=None)
    task, _ = make_finetune_task(prepared, workers=1, begin=True, ranks=Ranks())
    plain = PlainClassifier()
    plain.take(task.network.state_dict())
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-3)
    weights = torch.ones(20)
    weights[[0, 19]] = 0
    theirs, lengths = [], set()
    with closing(task.stream), closing(task.stream.batches(0, STEPS)) as batches:
        for batch in batches:
            series, classes = [], []
            for source in batch.sources:
                assert source is not None
                square, part = squares[str(source.site)], source.window
                values = square.series[:, :, part.rows, part.cols].astype("float32")
                series.append((values - mean[:, None, None]) / std[:, None, None])
                classes.append(square.target[0, part.rows, part.cols].astype("int64"))
            longest = max(len(one) for one in series)
            lengths.add(tuple(len(one) for one in series))
            padded = [np.pad(one, ((0, longest - len(one)), *[(0, 0)] * 3)) for one in series]
            loss = nn.functional.cross_entropy(
                plain(torch.from_numpy(np.stack(padded))),
                torch.from_numpy(np.stack(classes)),
                weight=weights,
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            theirs.append(loss.item())

    assert len(ours) == len(theirs) == STEPS
    assert any(one != other for one, other in lengths), "no batch was padded"
    assert plain.gate.item() != 0
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


@pytest.mark.parametrize("positions", ["index", "days"])
def test_published_pretrained_weights_begin_a_run(
    golden: Path, imported: Path, tmp_path: Path, positions: str
) -> None:
    """A file of the published form is begun from; days are another scale, and that is said."""
    init = golden / "pastis_checkpoint_99.encoder.tar"
    config = recipe(
        init=str(init), steps=1,
        **{"model.positions": positions, "labels.chips": [[0, 0]],
           "optimiser.learning_rate": 1e-9},
    )  # fmt: skip
    result = finetune(imported, tmp_path / "run", config)

    begun, now = load_model(init).state_dict(), load_model(tmp_path / "run").state_dict()
    for name in ("convolutions.blocks.0.convolution.weight", "temporal.layers.2.expand.weight"):
        torch.testing.assert_close(now[f"encoder.{name}"], begun[name], atol=1e-6, rtol=0)
    info = read_metadata(tmp_path / "run")
    assert (info.config.mode, info.config.positions) == ("reference", positions)
    # The published file holds no mean and deviation: those of the imported bands are measured.
    assert min(info.mean) > 0.3
    said = "trained with positions='index', this has 'days'"
    assert any(said in note for note in result.notes) == (positions == "days")


@pytest.mark.slow
def test_a_window_is_judged_without_the_dates_of_others(imported: Path, tmp_path: Path) -> None:
    """The published network has no mask for dates that a batch mate brings; the test had none."""
    finetune(imported, tmp_path / "run", recipe(steps=1))
    found = [
        evaluate_run(
            tmp_path / "run", imported, split="train", batch_size=size, pictures=False
        ).metrics.confusion
        for size in (1, 8)
    ]
    assert found[0].sum() > 0
    assert (found[0] == found[1]).all()
