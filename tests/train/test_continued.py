"""Pre-training that goes on from other weights: what is carried, begins anew, and is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from stcln_geo.cli.main import invoke
from stcln_geo.errors import CheckpointError, CubeError, InputError
from stcln_geo.model.checkpoint import load_model, read_metadata, save_checkpoint
from stcln_geo.model.config import StclnConfig
from stcln_geo.model.reference import MTLCC_BANDS, PASTIS_BANDS
from stcln_geo.model.stcln import Encoder, MaskedPretrainer, Stcln
from stcln_geo.storage import public_name
from stcln_geo.train.config import PretrainConfig, load_config
from stcln_geo.train.pretrain import _make_task, _prepare, plan_pretrain, pretrain
from stcln_geo.train.ranks import Ranks
from stcln_geo.train.start import lacks_statistics

from .test_training import assert_same_weights, figures, kill_after, weights

SIZES: dict[str, Any] = {"widths": (8, 16), "layers": 1, "heads": 2, "feedforward": 32}
BANDS = ("green", "red", "nir", "swir16")
FIRST = "encoder.convolutions.blocks.0.convolution.weight"
HEAD = ("reconstruction.weight", "reconstruction.bias")
PUBLIC = ("model_card.md", "model_card.json", "report.html")


def recipe(**options: Any) -> PretrainConfig:
    named = {key.replace("__", "."): value for key, value in options.items()}
    own = {
        "data.chip": 16, "batch_size": 4, "seed": 5, "validation.every": 3, "validation.chips": 0,
        "masking.gate": False, "steps": 1,
    }  # fmt: skip
    return load_config(PretrainConfig, overrides={**own, **named})


def write_source(
    path: Path, kind: type[Stcln | Encoder | MaskedPretrainer] = MaskedPretrainer, **options: Any
) -> Path:
    """Write weights of which no two are alike, of the bands of the cube."""
    torch.manual_seed(11)
    network = kind(
        StclnConfig(bands=BANDS, classes=3 if kind is Stcln else 0, **{**SIZES, **options})
    )
    encoder = network if isinstance(network, Encoder) else network.encoder
    encoder.set_normalisation([0.11, 0.12, 0.33, 0.24], [0.05, 0.06, 0.17, 0.08])
    for name, value in network.state_dict().items():
        if "running" in name or name == "token":
            value.uniform_(0.2, 0.9)
    return save_checkpoint(path, network, season_start="09-01")


def first_weights(cube: Path, config: PretrainConfig) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Give the weights before the first step, and what was said of them."""
    prepared = _prepare([cube], config, device="cpu", ranks=Ranks(), run=None)
    task, report = _make_task(prepared, workers=1, begin=True, ranks=Ranks())
    task.stream.close()
    return task.network.state_dict(), (*prepared.notes, *report)


@pytest.mark.parametrize("bands", [None, ("nir", "green", "swir16", "red")])
def test_step_0_is_the_checkpoint_bit_for_bit_bands_by_name(
    bands: tuple[str, ...] | None, small_cube: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source.safetensors")
    before = load_model(source).state_dict()

    after, said = first_weights(small_cube, recipe(init=str(source), model__bands=bands))

    places = [BANDS.index(band) for band in bands or BANDS]
    assert before.keys() == after.keys()
    for name, value in before.items():
        expected = value
        if name == FIRST:
            expected = value[:, places]
        elif name in HEAD or name in ("encoder.mean", "encoder.std"):
            expected = value[places]
        assert torch.equal(after[name], expected), name
    assert "reconstruction of 4 bands carried too" in said[-1]
    assert not any("trained with" in note for note in said)


def test_bands_of_the_data_decide_and_new_ones_begin_anew(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source.safetensors")
    before = load_model(source).state_dict()
    other = new_cube(bands=("nir", "blue", "red"))

    fewer, said = first_weights(other, recipe(init=str(source)))

    # By default what both know, in the checkpoint's order.
    assert torch.equal(fewer[FIRST], before[FIRST][:, [1, 2]])
    assert torch.equal(fewer[HEAD[0]], before[HEAD[0]][[1, 2]])
    assert any("Not all data have green, swir16, which" in note for note in said)
    assert any("does not know blue of the data: not used" in note for note in said)

    named: dict[str, Any] = {"model__bands": ["blue", "nir", "red"]}
    config = recipe(init=str(source), **named)
    more, said = first_weights(other, config)
    scratch, _ = first_weights(
        other, recipe(**{f"model__{key}": value for key, value in SIZES.items()}, **named)
    )
    assert torch.equal(more[FIRST][:, 1:], before[FIRST][:, [2, 1]])
    assert not more[FIRST][:, 0].any()
    for name in HEAD:
        assert torch.equal(more[name][1:], before[name][[2, 1]])
        assert torch.equal(more[name][0], scratch[name][0])
    assert torch.equal(more["encoder.mean"][1:], before["encoder.mean"][[2, 1]])
    assert torch.equal(more["encoder.mean"][0], scratch["encoder.mean"][0])
    assert any("the reconstruction of blue begins anew" in note for note in said)


@pytest.mark.parametrize("kind", [Encoder, Stcln])
def test_weights_without_a_reconstruction_give_the_encoder_alone(
    kind: type[Encoder | Stcln], small_cube: Path, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source.safetensors", kind)
    before = load_model(source).state_dict()
    prefix = "encoder." if kind is Encoder else ""

    after, said = first_weights(small_cube, recipe(init=str(source)))
    scratch, _ = first_weights(
        small_cube, recipe(**{f"model__{key}": value for key, value in SIZES.items()})
    )

    carried = [name for name in after if name.startswith("encoder.")]
    assert all(torch.equal(after[name], before[name.removeprefix(prefix)]) for name in carried)
    for name in ("token", *HEAD):
        assert torch.equal(after[name], scratch[name])
    assert "reconstruction and mask token begin anew" in said[-1]


def test_mode_and_positions_are_the_runs_own_and_that_is_said_everywhere(
    small_cube: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "old.safetensors", mode="reference", positions="index")
    shared = ["pretrain", str(small_cube), "--steps", "1", "--chip", "16", "--batch-size", "4"]
    shared += ["--workers", "1", "--track", "none", "--set", "masking.gate=false"]
    shared += ["--set", "validation.chips=0"]
    (tmp_path / "options.toml").write_text(f'init = "{source}"\n')
    run = tmp_path / "run"
    told = "the checkpoint was trained with positions='index', this has 'days'"

    named = [*shared, "--out", str(run), "--init", str(source)]
    assert invoke([*named, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert told in shown
    assert "mask token and reconstruction of 4 bands carried too" in shown
    assert not run.exists()
    assert invoke(named) == 0
    assert told in capsys.readouterr().out

    info = read_metadata(run)
    assert (info.config.mode, info.config.positions) == ("geo", "days")
    assert info.provenance["init"] == {
        "path": public_name(source), "sha256": read_metadata(source).sha256, "kind": "pretrainer",
        "source": "stcln-geo", "mode": "reference", "positions": "index",
    }  # fmt: skip
    card = (run / "model_card.md").read_text()
    assert told in card
    assert f">{public_name(source)}<" in (run / "report.html").read_text()
    assert "reference mode, positions as index, stcln-geo)" in card
    assert "geo mode, positions as days" in card
    # What is given away tells what things are called, not where they lie.
    for path in (info.path, *(run / name for name in PUBLIC)):
        content = path.read_bytes()
        assert small_cube.name.encode() in content, path
        for folder in (tmp_path, small_cube.parent.resolve()):
            assert str(folder).encode() not in content, path

    # The same from a file of options; and the checkpoint's own settings, where they are asked for.
    for more in (["--config", str(tmp_path / "options.toml")], ["--set", f"init={source}"]):
        own = ["--set", "model.mode=reference", "--dry-run"]
        assert invoke([*shared, "--out", str(run), *more, *own]) == 0
        shown = capsys.readouterr().out
        assert "encoder from" in shown
        assert "trained with" not in shown


def test_a_continued_run_resumes_as_if_nothing_had_happened(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source.safetensors")
    config = recipe(init=str(source), steps=7, model__dropout=0.2)
    whole = pretrain([small_cube], tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain([small_cube], tmp_path / "parts", config)

    write_source(source, dropout=0.5)
    with pytest.raises(InputError, match=r"changed since it was begun \(init\).*checkpoint"):
        pretrain([small_cube], tmp_path / "parts", config)
    write_source(source)
    resumed = pretrain([small_cube], tmp_path / "parts", config)

    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert resumed.steps == whole.steps == 7
    told = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("whole", "parts")]
    assert told[0]["notes"] == told[1]["notes"] == list(whole.notes)
    assert pretrain([small_cube], tmp_path / "parts", config).already

    # The run can be gone on from, too, and is not deleted by doing so.
    again = recipe(init=str(tmp_path / "parts"))
    begun, _ = first_weights(small_cube, again)
    best = weights(tmp_path / "parts", "best")
    assert all(torch.equal(begun[name], best[name]) for name in best)
    with pytest.raises(InputError, match="is part of that run"):
        pretrain([small_cube], tmp_path / "parts", again, overwrite=True)
    assert weights(tmp_path / "parts", "best").keys() == best.keys()


@pytest.mark.parametrize(
    ("crs", "season", "mode", "told"),
    [
        ("EPSG:32731", "2019-03-01", "geo", False),
        ("EPSG:32731", "2018-09-01", "geo", True),
        ("EPSG:32631", "2019-03-01", "geo", True),
        ("EPSG:32631", "2019-03-01", "reference", False),
    ],
    ids=["half a year later in the south", "the same day in the south", "another day", "by number"],
)
def test_days_from_different_times_of_the_year_are_told(
    small_cube: Path, new_cube: Callable[..., Path], crs: str, season: str, mode: str, told: bool
) -> None:
    other = new_cube("other", crs=crs, season=season)
    prepared = _prepare(
        [small_cube, other], recipe(model__mode=mode), device="cpu", ranks=Ranks(), run=None
    )
    notes = [note for note in prepared.notes if "different times of the year" in note]
    assert len(notes) == told
    assert all("09-01 in" in note and f"{season[5:]} in {other.name}" in note for note in notes)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    small_cube: Path,
    new_cube: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_source(tmp_path / "source.safetensors")
    out = tmp_path / "run"
    for options, said in (
        (["--init", str(source), "--set", "model.heads=4"], "heads 2 (network: 4)"),
        (["--init", str(source), "--preset", "tiny"], "name neither preset nor sizes"),
        (["--init", str(tmp_path / "none.tar")], "Cannot find the checkpoint"),
        (["--init", str(small_cube)], "Cannot find a checkpoint in"),
        (["--set", "init=3"], "init: "),
    ):
        assert invoke(["pretrain", str(small_cube), "--out", str(out), *options]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
    with pytest.raises(CheckpointError, match=r"knows the bands green, red.*run has blue"):
        plan_pretrain([new_cube(bands=("blue",))], recipe(init=str(source)))
    with pytest.raises(CubeError, match=r"lacks band .coastal."):
        plan_pretrain([small_cube], recipe(init=str(source), model__bands=["red", "coastal"]))
    assert not out.exists()


def test_weights_without_a_zscore_have_one_measured(tmp_path: Path) -> None:
    """Imported PASTIS weights, as the published file, know no mean; those of MTLCC need none."""
    published: dict[str, Any] = {"mode": "reference", "positions": "index", **SIZES}
    found = {}
    for name, bands in (("pastis", PASTIS_BANDS), ("mtlcc", MTLCC_BANDS)):
        encoder = Encoder(StclnConfig(bands=bands, **published))
        found[name] = read_metadata(save_checkpoint(tmp_path / f"{name}.safetensors", encoder))
    assert lacks_statistics(("red", "nir"), found["pastis"])
    assert not lacks_statistics(("red", "nir"), found["mtlcc"])
    assert lacks_statistics(("red", "vv"), found["mtlcc"])
    own = read_metadata(write_source(tmp_path / "own.safetensors"))
    assert not lacks_statistics(("red", "nir"), own)
    assert lacks_statistics(("red",), None)
