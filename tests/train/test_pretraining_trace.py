"""Pre-training in `reference` mode on imported PASTIS makes the losses of a plain published loop.

The loop here is written from the description of the published system alone: the plain network of
`plain_network`, frames as they lie on disk, frames that are missing in a batch as zeros after
normalisation, one number in all bands of what is hidden, the squared error of hidden entries.
Taken from our run are the first weights, which chips form a batch, and the seeds of the masks; the
gate of the masks looks at reflectance here too, as the protocol's notes say.
"""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stcln_geo.data.batch import Batch
from stcln_geo.datasets import import_dataset, plan_pastis
from stcln_geo.model.checkpoint import load_model, read_metadata, save_checkpoint
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.reference import PASTIS_BANDS
from stcln_geo.model.stcln import MaskedPretrainer
from stcln_geo.train.config import PretrainConfig, load_config
from stcln_geo.train.pretrain import _make_task, _prepare, pretrain
from stcln_geo.train.ranks import Ranks
from stcln_geo.train.task import step_seed

from ..datasets.make_pastis import Square, make_square, write_pastis
from .plain_network import FEEDFORWARD, HEADS, LAYERS, WIDTHS, PlainPretrainer

CHIP, STEPS, SEED, CLIP = 8, 20, 7, 1.6
RATE = 1e-4
"""As published. Higher ones make more of the rounding of gradients that nearly cancel out."""
RED, NIR = PASTIS_BANDS.index("red"), PASTIS_BANDS.index("nir")
BARE = (0, 3, 8, 64)
"""Pixels of each chip of 64 that are not green, by date in turn; 7 or more keep the date whole."""


@pytest.fixture(scope="module")
def squares() -> dict[str, Square]:
    """Three squares of fold 5 with four to seven dates, and one of another fold."""
    rng = np.random.default_rng(3)
    made = [
        make_square(number, fold=fold, tile="t31tfj", dates=dates, side=4 * CHIP, rng=rng)
        for number, fold, dates in ((20001, 5, 4), (20002, 5, 6), (20003, 5, 7), (20004, 2, 5))
    ]
    for square in made:
        # Where nothing was measured, the published loader reads a number.
        square.series[square.series == -10_000] = 0
        for date, frame in enumerate(square.series):
            green = np.ones(CHIP * CHIP, dtype=bool)
            green[: BARE[date % len(BARE)]] = False
            green = np.tile(rng.permutation(green).reshape(CHIP, CHIP), (4, 4))
            red, nir = rng.integers(200, 800, green.shape), rng.integers(3000, 6000, green.shape)
            frame[RED] = np.where(green, red, nir)
            frame[NIR] = nir
    return {str(square.id): square for square in made}


@pytest.fixture(scope="module")
def imported(squares: dict[str, Square], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trace")
    write_pastis(folder / "PASTIS", list(squares.values()))
    import_dataset(plan_pastis(folder / "PASTIS"), folder / "pastis.zarr")
    return folder / "pastis.zarr"


def recipe(**more: Any) -> PretrainConfig:
    options: dict[str, Any] = {
        "seed": SEED, "steps": STEPS, "batch_size": 4, "precision": "float32",
        "model.mode": "reference", "data.folds": [5], "data.chip": CHIP, "data.halo": 0,
        "data.max_dates": 0, "data.augment": False, "data.drop_dates": 0.0, "data.prefix": 0.0,
        "data.min_clear": 0.0, "masking.mask_ratio": 0.4, "masking.strategy": "space-time",
        "masking.gate": True, "validation.chips": 0,
        "optimiser.name": "adam", "optimiser.learning_rate": RATE,
        "optimiser.schedule": "constant", "optimiser.warmup": 0.0, "optimiser.clip": CLIP,
    }  # fmt: skip
    return load_config(PretrainConfig, overrides={**options, **more})


class Loop:
    """What the published loop shows of a batch: its frames, and which of them are visible."""

    def __init__(self, squares: dict[str, Square], mean: np.ndarray, std: np.ndarray) -> None:
        self.squares, self.mean, self.std = squares, mean[:, None, None], std[:, None, None]
        self.green: list[bool] = []
        self.lengths: set[tuple[int, ...]] = set()

    def show(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return frames (B, T, C, H, W), and (B, T, 1, H, W) 1 where visible, else 0."""
        series, visible = [], []
        for source, place in zip(batch.sources, batch.samples, strict=True):
            assert source is not None
            part = source.window
            values = self.squares[str(source.site)].series[:, :, part.rows, part.cols]
            values = values.astype("float32")
            series.append((values - self.mean) / self.std)
            ndvi = (values[:, NIR] - values[:, RED]) / (values[:, NIR] + values[:, RED] + 1e-20)
            green = (ndvi > 0.2).mean((1, 2)) > 0.9
            self.green += green.tolist()
            chance = torch.Generator().manual_seed(step_seed(SEED, 2, place))
            shown = torch.rand(ndvi.shape, generator=chance).numpy() >= 0.4
            shown[~green] = True
            visible.append(shown[:, None].astype("float32"))
        longest = max(len(one) for one in series)
        self.lengths.add(tuple(len(one) for one in series))
        fill = [((0, longest - len(one)), *[(0, 0)] * 3) for one in series]
        frames = np.stack([np.pad(one, more) for one, more in zip(series, fill, strict=True)])
        shown = np.stack(
            [np.pad(one, more, constant_values=1) for one, more in zip(visible, fill, strict=True)]
        )
        return torch.from_numpy(frames), torch.from_numpy(shown)


def test_losses_are_those_of_the_published_loop(
    imported: Path, squares: dict[str, Square], tmp_path: Path
) -> None:
    told = json.loads((imported.parent / "PASTIS" / "NORM_S2_patch.json").read_text())["Fold_5"]
    mean, std = (np.array(told[name], dtype=np.float32) for name in ("mean", "std"))
    torch.manual_seed(4)
    network = MaskedPretrainer(
        StclnConfig(
            bands=PASTIS_BANDS, widths=WIDTHS, layers=LAYERS, heads=HEADS, feedforward=FEEDFORWARD,
            dropout=0.0, mode="reference", positions="index",
        )
    )  # fmt: skip
    network.encoder.set_normalisation((mean * 1e-4).tolist(), (std * 1e-4).tolist())
    # As of a network that was trained before, so that it counts from the first step.
    network.token.data.fill_(0.4)
    save_checkpoint(tmp_path / "first.safetensors", network)
    config = recipe(init=str(tmp_path / "first.safetensors"))

    pretrain([imported], tmp_path / "run", config)
    lines = (tmp_path / "run" / "steps.jsonl").read_text().splitlines()
    ours = [json.loads(line)["loss"] for line in lines]

    prepared = _prepare([imported], config, device="cpu", ranks=Ranks(), run=None)
    task, _ = _make_task(prepared, workers=1, begin=True, ranks=Ranks())
    plain, loop = PlainPretrainer(), Loop(squares, mean, std)
    plain.take(task.network.state_dict())
    optimiser = torch.optim.Adam(plain.parameters(), lr=RATE)
    theirs, norms = [], []
    with closing(task.stream), closing(task.stream.batches(0, STEPS)) as batches:
        for batch in batches:
            frames, visible = loop.show(batch)
            hidden = (1 - visible).expand_as(frames)
            error = (plain(frames, visible) - frames).square() * hidden
            loss = error.sum() / (hidden.sum() + 1e-20)
            optimiser.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)))
            optimiser.step()
            theirs.append(loss.item())

    assert len(ours) == len(theirs) == STEPS
    assert any(len(set(dates)) > 1 for dates in loop.lengths), "no batch was padded"
    assert 0.3 < np.mean(loop.green) < 0.9
    assert min(norms) < CLIP < max(norms)
    assert ours[-1] < ours[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    token = load_file(tmp_path / "run" / "checkpoints" / "last.safetensors")["token"]
    assert abs(plain.token.item() - 0.4) > RATE
    assert token.item() == pytest.approx(plain.token.item(), abs=RATE / 2)


@pytest.mark.parametrize("form", ["sttrans", "utae"])
def test_published_pretrained_weights_go_on_with_days(
    form: str, golden: Path, imported: Path, tmp_path: Path
) -> None:
    """Both published forms; the bare encoder has no reconstruction to go on with."""
    encoder = torch.load(golden / "pastis_checkpoint_99.encoder.tar", weights_only=True)
    with np.load(golden / "pastis_pretrain_head.npz") as file:
        head = {name: torch.tensor(file[name]) for name in file.files}
    init = tmp_path / f"checkpoint_99.{form}.tar"
    whole = {f"utae.{name}": value for name, value in encoder.items()} | head
    torch.save(encoder if form == "utae" else {"epoch": 99, "model_state_dict": whole}, init)
    config = recipe(
        init=str(init), steps=1, batch_size=1,
        **{"model.mode": None, "optimiser.learning_rate": 1e-9},
    )  # fmt: skip
    result = pretrain([imported], tmp_path / "run", config)

    now = load_model(tmp_path / "run").state_dict()
    begun = load_model(init).state_dict()
    prefix = "encoder." if form == "utae" else ""
    for name in ("convolutions.blocks.0.convolution.weight", "temporal.layers.2.expand.weight"):
        expected = begun[f"encoder.{name}".removeprefix(prefix)]
        torch.testing.assert_close(now[f"encoder.{name}"], expected, atol=1e-6, rtol=0)
    if form == "sttrans":
        for ours, theirs in (
            ("token", "MASK_TOKEN"),
            ("reconstruction.weight", "linear.weight"),
            ("reconstruction.bias", "linear.bias"),
        ):
            torch.testing.assert_close(now[ours], head[theirs], atol=1e-6, rtol=0)
    info = read_metadata(tmp_path / "run")
    assert (info.kind, info.config.mode, info.config.positions) == ("pretrainer", "geo", "days")
    assert info.config.heads == 8
    # The published file holds no mean and deviation: those of the imported bands are measured.
    assert min(info.mean) > 0.03
    assert info.provenance["init"]["source"] == "published"
    said = " ".join(result.notes)
    assert "trained with positions='index', this has 'days'" in said
    assert ("mask token begin anew" in said) == (form == "utae")
