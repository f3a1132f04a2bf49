"""Networks that answer together answer with the mean of their probabilities."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stcln_geo.cli.main import app
from stcln_geo.errors import CheckpointError, InputError, MissingFileError
from stcln_geo.model import (
    Ensemble,
    MaskedPretrainer,
    Stcln,
    export_checkpoint,
    join_checkpoints,
    load_encoder_into,
    load_model,
    read_metadata,
    save_checkpoint,
)

LEGEND = json.dumps(
    [
        {"code": code, "value": str(code + 10), "name": f"crop {code}", "color": "#11aa33"}
        for code in range(5)
    ]
)
TEMPERATURES = (1.7, None, 0.6)


def stirred(network: Stcln, seed: int) -> Stcln:
    """Return the network with other weights and another z-score."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
        network.classifier.weight.mul_(6)
        network.encoder.mean.add_(0.01 * seed)
    return network.eval()


def save(path: Path, network: torch.nn.Module, **changes: Any) -> Path:
    told = {
        "legend": LEGEND, "chip": 32, "halo": 4, "trained_days": (12, 301),
        "season_start": "09-01", "provenance": {"seed": 3, "cubes": [{"fingerprint": "a"}]},
    }  # fmt: skip
    return save_checkpoint(path, network, **{**told, **changes})


@pytest.fixture
def saved(tmp_path: Path, make_network: Any) -> list[Path]:
    """Three checkpoints of one recipe, as of three seeds."""
    days = ((12, 301), (5, 290), (20, 330))
    cubes = ([{"fingerprint": "a"}], [{"fingerprint": "a"}], [{"fingerprint": "b"}])
    return [
        save(
            tmp_path / f"{seed}.safetensors", stirred(make_network(), seed),
            temperature=TEMPERATURES[seed], trained_days=days[seed],
            provenance={"seed": seed, "cubes": cubes[seed]},
        )
        for seed in range(3)
    ]  # fmt: skip


def mean_probability(paths: list[Path], batch: Any) -> np.ndarray:
    """Return (B, K, H, W) float64, by numpy."""
    found = []
    for path, temperature in zip(paths, TEMPERATURES, strict=True):
        network = load_model(path)
        with torch.no_grad():
            logits = network(batch.images, batch.days, batch.valid).numpy().astype(np.float64)
        powers = np.exp(logits / (temperature or 1.0))
        found.append(powers / powers.sum(axis=1, keepdims=True))
    return np.mean(found, axis=0)


def test_softmax_of_its_answer_is_the_mean_of_the_members_probabilities(
    saved: list[Path], tmp_path: Path, make_batch: Any
) -> None:
    batch = make_batch()
    info = join_checkpoints(saved, tmp_path / "all.safetensors")
    network = load_model(info.path)
    assert isinstance(network, Ensemble)
    with torch.no_grad():
        found = network(batch.images, batch.days, batch.valid)
        height, width = batch.images.shape[-2:]
        embedded = network.embed(batch.images, batch.days, batch.valid)
        assert embedded.shape == (2, height * width, 3 * network.config.dim)
        assert embedded.shape[-1] == network.embedding_dim
        assert torch.equal(network.classify(embedded, (height, width)), found)
    expected = mean_probability(saved, batch)
    np.testing.assert_allclose(found.softmax(dim=1).numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.exp().numpy(), expected, atol=1e-6)  # logarithms of it
    assert len(np.unique(expected.argmax(axis=1))) > 1


def test_a_class_that_no_member_thinks_possible_has_a_finite_answer(make_network: Any) -> None:
    networks = [make_network(), make_network()]
    for network in networks:
        with torch.no_grad():
            network.classifier.bias[0] = -1e6
    images, days = torch.rand(1, 3, 4, 5, 6), torch.arange(3)[None]
    with torch.no_grad():
        assert Ensemble([one.eval() for one in networks]).eval()(images, days).isfinite().all()


@pytest.mark.parametrize("unlike", [0, 1, 2])
def test_networks_that_are_not_alike_do_not_answer_together(unlike: int, make_network: Any) -> None:
    networks = [make_network() for _ in range(3)]
    assert Ensemble(networks).config == networks[0].config
    networks[unlike] = make_network(classes=4)
    with pytest.raises(InputError, match="Cannot join 3 networks"):
        Ensemble(networks)
    with pytest.raises(InputError, match="Cannot join 1 networks"):
        Ensemble(networks[:1])


def test_the_file_tells_what_its_members_are(
    saved: list[Path], tmp_path: Path, make_network: Any
) -> None:
    one = read_metadata(saved[0])
    info = join_checkpoints(saved, tmp_path / "all.safetensors")
    assert (info.kind, info.members, info.parameters) == ("classifier", 3, 3 * one.parameters)
    assert (info.config, info.legend, info.mean, info.std) == (
        one.config, one.legend, one.mean, one.std,
    )  # fmt: skip
    assert (info.trained_days, info.temperature, info.chip, info.halo) == ((5, 330), None, 32, 4)
    assert info.provenance["cubes"] == [{"fingerprint": "a"}, {"fingerprint": "b"}]
    members = info.provenance["members"]
    assert [member["seed"] for member in members] == [0, 1, 2]
    assert [member["sha256"] for member in members] == [read_metadata(p).sha256 for p in saved]
    assert one.members == 1
    state, parts = load_model(info.path).state_dict(), [load_model(path) for path in saved]
    for place, part in enumerate(parts):
        for name, tensor in part.state_dict().items():
            assert torch.equal(state[f"members.{place}.{name}"], tensor), name


def test_an_export_of_it_is_the_same(saved: list[Path], tmp_path: Path, make_batch: Any) -> None:
    info = join_checkpoints(saved, tmp_path / "all.safetensors")
    copy = export_checkpoint(info.path, tmp_path / "copy.safetensors").info
    batch = make_batch()
    with torch.no_grad():
        ours, theirs = (
            load_model(path)(batch.images, batch.days, batch.valid)
            for path in (info.path, copy.path)
        )
    assert torch.equal(ours, theirs)
    assert copy.members == 3


@pytest.mark.slow
def test_a_program_of_it_gives_its_answer(
    saved: list[Path], tmp_path: Path, make_batch: Any
) -> None:
    info = join_checkpoints(saved[:2], tmp_path / "two.safetensors")
    told = export_checkpoint(info.path, tmp_path / "two.pt2").info
    assert (told.members, told.parameters) == (2, info.parameters)
    run = torch.export.load(tmp_path / "two.pt2").module()
    batch = make_batch(dates=9, height=5, width=8)
    with torch.no_grad():
        expected = load_model(info.path)(batch.images, batch.days, batch.valid)
        found = run(batch.images, batch.days, batch.valid)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_is_not_of_one_recipe_is_not_joined(
    saved: list[Path], tmp_path: Path, make_network: Any
) -> None:
    out = tmp_path / "all.safetensors"
    other = LEGEND.replace("crop 3", "maize")
    unlike = {
        r"they differ \(legend": save(tmp_path / "l.safetensors", make_network(), legend=other),
        r"they differ \(season start 03-01 and 09-01\)": save(
            tmp_path / "s.safetensors", make_network(), season_start="03-01"
        ),
        r"they differ \(layers 3 and 2\)": save(tmp_path / "c.safetensors", make_network(layers=3)),
        "is a pretrainer": save_checkpoint(
            tmp_path / "p.safetensors", MaskedPretrainer(make_network().config)
        ),
        "same weights": Path(shutil.copy(saved[0], tmp_path / "copy.safetensors")),
        "an ensemble of 2": join_checkpoints(saved[:2], tmp_path / "two.safetensors").path,
    }
    for said, path in unlike.items():
        with pytest.raises(CheckpointError, match=said):
            join_checkpoints([saved[0], path], out)
    with pytest.raises(InputError, match="Cannot join 1 networks"):
        join_checkpoints(saved[:1], out)
    assert not out.exists()


def test_the_file_keeps_all_that_its_members_have_in_common(
    tmp_path: Path, make_network: Any
) -> None:
    left_out = LEGEND.replace("crop", "weed")
    cubes = (
        {"fingerprint": "a", "season": "2018-09-01"},
        {"season": "2018-09-01", "fingerprint": "a"},
    )
    paths = [
        save(
            tmp_path / f"{seed}.safetensors", stirred(make_network(), seed), ignored=left_out,
            silent=["d", "new"], trained_days=None if seed == 0 else (12, 301), chip=48, halo=5,
            provenance={"seed": seed, "cubes": [cubes[seed % 2]]} if seed else {},
        )
        for seed in range(3)
    ]  # fmt: skip
    one = read_metadata(paths[0])
    info = join_checkpoints(paths, tmp_path / "all.safetensors")
    for name in ("legend", "ignored", "silent", "season_start", "chip", "halo"):
        assert getattr(info, name) == getattr(one, name) not in (None, ()), name
    assert info.trained_days == (12, 301), "those of the members that tell theirs"
    assert len(info.provenance["cubes"]) == 1, "the same cube, whatever the order of its keys"
    untold = [
        save(tmp_path / f"u{seed}.safetensors", stirred(make_network(), seed), trained_days=None)
        for seed in range(2)
    ]
    assert join_checkpoints(untold, tmp_path / "u.safetensors").trained_days is None
    nameless = save(tmp_path / "n.safetensors", make_network(), legend=None)
    with pytest.raises(CheckpointError, match="single classifiers with a legend"):
        join_checkpoints([nameless, paths[0]], tmp_path / "no.safetensors")


def test_a_network_starts_from_one_and_not_from_all(
    saved: list[Path], tmp_path: Path, make_network: Any
) -> None:
    info = join_checkpoints(saved, tmp_path / "all.safetensors")
    with pytest.raises(CheckpointError, match="an ensemble of 3 networks"):
        load_encoder_into(make_network().encoder, info.path)


def test_the_command_joins_the_seeds_of_a_folder(saved: list[Path], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed, status in enumerate(("finished", "running", "finished")):
        folder = runs / f"seed-{seed}"
        (folder / "checkpoints").mkdir(parents=True)
        saved[seed].rename(folder / "checkpoints" / "best.safetensors")
        (folder / "run.json").write_text(json.dumps({"status": status}))
    with pytest.raises(MissingFileError, match=r"a folder of 3 seeds.*checkpoint ensemble"):
        load_model(runs)
    out = tmp_path / "all.safetensors"
    done = CliRunner().invoke(app, ["checkpoint", "ensemble", str(runs), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert [member["seed"] for member in read_metadata(out).provenance["members"]] == [0, 2]
    assert "2 networks of" in done.output
    shown = CliRunner().invoke(app, ["checkpoint", "info", str(out)]).output
    assert "classifier, an ensemble of 2, " in shown


@pytest.mark.parametrize("command", ["ensemble", "export"])
def test_a_bucket_is_not_taken_for_a_folder(
    saved: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    out = "s3://bucket/x.safetensors"
    words = [*map(str, saved), "--out", out] if command == "ensemble" else [str(saved[0]), out]
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["checkpoint", command, *words])
    assert isinstance(done.exception, InputError)
    assert f"Cannot write {out}" in str(done.exception)
    assert sorted(tmp_path.iterdir()) == before
