"""Checkpoints come back as they went, and nothing in a file is ever run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import pickle
import struct
import time
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from typer.testing import CliRunner

from stcln_geo.errors import CheckpointError, InputError, MissingFileError, OutputError
from stcln_geo.model import (
    Encoder,
    MaskedPretrainer,
    Stcln,
    StclnConfig,
    load_encoder_into,
    load_model,
    read_metadata,
    save_checkpoint,
)
from stcln_geo.model.checkpoint import set_temperature

LEGEND = json.dumps(
    [
        {"code": code, "value": str(code + 10), "name": f"céréale {code}", "color": "#11aa33"}
        for code in range(5)
    ],
    ensure_ascii=False,
)


def save(path, network, **changes):
    described = {
        "legend": LEGEND if isinstance(network, Stcln) else None,
        "provenance": {"run": "spring", "seed": 3, "miou": 0.41},
        "chip": 32,
        "halo": 4,
        "trained_days": (12, 301),
        "season_start": "09-01",
    }
    return save_checkpoint(path, network, **{**described, **changes})


@pytest.fixture
def saved(tmp_path, make_network):
    return save(tmp_path / "model.safetensors", make_network())


def redescribe(path, change):
    """Replace what a checkpoint tells of itself; a text stands for the whole of it."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    told = change(json.loads(header["__metadata__"]["stcln_geo"]))
    header["__metadata__"]["stcln_geo"] = told if isinstance(told, str) else json.dumps(told)
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


class TestRoundTrip:
    @pytest.mark.parametrize("kind", [Stcln, MaskedPretrainer, Encoder])
    def test_weights_and_description(self, tmp_path, make_config, kind):
        network = kind(make_config())
        network.train()
        path = save(tmp_path / "deep" / "model.safetensors", network)
        loaded, info = load_model(path), read_metadata(path)
        assert type(loaded) is kind
        assert not loaded.training
        for name, value in network.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
        assert info.config == loaded.config == network.config
        assert info.legend == (LEGEND if kind is Stcln else None)
        assert (info.chip, info.halo, info.trained_days) == (32, 4, (12, 301))
        assert info.season_start == "09-01"
        assert info.provenance == {"run": "spring", "seed": 3, "miou": 0.41}
        assert info.parameters == sum(weight.numel() for weight in network.parameters())
        assert not info.published

    def test_same_outputs(self, saved, make_network, make_batch):
        batch = make_batch()
        with torch.no_grad():
            before = make_network().eval()(batch.images, batch.days, batch.valid)
            after = load_model(saved)(batch.images, batch.days, batch.valid)
        assert torch.equal(before, after)

    def test_zscore_is_told(self, saved):
        info = read_metadata(saved)
        assert info.mean == pytest.approx([0.1, 0.12, 0.1, 0.3])
        assert info.std == pytest.approx([0.08, 0.1, 0.12, 0.1])
        assert info.bands == ("blue", "green", "red", "nir")

    def test_same_weights_give_the_same_file(self, saved, make_network):
        again = save(saved.with_name("again.safetensors"), make_network())
        assert again.read_bytes() == saved.read_bytes()
        digest = hashlib.sha256(saved.read_bytes()).hexdigest()
        assert read_metadata(saved).sha256 == digest

    def test_encoder_of_a_classifier(self, tmp_path, make_network):
        network = make_network()
        path = save(tmp_path / "e.safetensors", network, kind="encoder", legend=None)
        assert isinstance(load_model(path), Encoder)

    def test_run_directory(self, tmp_path, make_network):
        with pytest.raises(MissingFileError, match=r"checkpoints/best\.safetensors"):
            load_model(tmp_path)
        last = save(tmp_path / "checkpoints" / "last.safetensors", make_network())
        assert read_metadata(tmp_path).path == last
        best = save(tmp_path / "checkpoints" / "best.safetensors", make_network())
        assert read_metadata(tmp_path).path == best

    def test_presets(self):
        counts = {
            name: sum(
                weight.numel()
                for weight in Stcln(StclnConfig.preset(name, bands=tuple("abcd"), classes=5))
                .parameters()
            )
            for name in ("tiny", "base")
        }  # fmt: skip
        assert counts["tiny"] < 50_000 < 3_000_000 < counts["base"]
        with pytest.raises(InputError, match="tiny, base, large"):
            StclnConfig.preset("huge", bands=("red",))

    def test_a_preset_is_known_by_its_sizes(self):
        for name in ("tiny", "base", "large"):
            config = StclnConfig.preset(name, bands=("red", "nir"), classes=3, mode="reference")
            assert config.preset_name == name
        assert dataclasses.replace(config, layers=config.layers + 1).preset_name is None


class TestWriting:
    def test_a_failed_write_leaves_the_old_file(self, saved, make_network, monkeypatch):
        before = saved.read_bytes()

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("pathlib.Path.replace", full)
        with pytest.raises(OutputError, match="No space left"):
            save(saved, make_network())
        assert saved.read_bytes() == before
        assert os.listdir(saved.parent) == [saved.name]

    def test_kind_must_fit(self, tmp_path, make_network):
        with pytest.raises(InputError, match="Stcln is no pretrainer"):
            save(tmp_path / "m.safetensors", make_network(), kind="pretrainer")

    def test_legend_must_fit(self, tmp_path, make_network):
        short = json.dumps(json.loads(LEGEND)[:3])
        with pytest.raises(InputError, match="legend has 3 classes, and the classifier 5"):
            save(tmp_path / "m.safetensors", make_network(), legend=short)

    def test_provenance_must_be_plain(self, tmp_path, make_network):
        with pytest.raises(InputError, match="JSON"):
            save(tmp_path / "m.safetensors", make_network(), provenance={"loss": float("nan")})


class Trap:
    """Creates a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class TestRefusals:
    @pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
    @pytest.mark.parametrize("place", ["value", "whole"])
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
    def test_code_in_a_file_is_never_run(self, tmp_path, form, place):
        trap = Trap(tmp_path / "sprung")
        content = trap if place == "whole" else {"model_state_dict": {}, "extra": trap}
        path = tmp_path / "model_best.tar"
        if form == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        with pytest.raises(CheckpointError, match="nothing in them is ever run"):
            load_model(path)
        with pytest.raises(CheckpointError, match="nothing in them is ever run"):
            read_metadata(path)
        assert not trap.path.exists()
        # The trap works: only the refusal keeps it from springing.
        if form == "pickle":
            pickle.loads(path.read_bytes())
            assert trap.path.exists()

    @pytest.mark.parametrize("keep", [0, 5, 100, 0.5, 0.999])
    def test_truncated_safetensors(self, saved, keep):
        content = saved.read_bytes()
        size = keep if isinstance(keep, int) else int(keep * len(content))
        saved.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="cut short or damaged"):
            load_model(saved)

    @pytest.mark.parametrize("keep", [0, 100, 0.5, 0.999])
    def test_truncated_published_file(self, golden, tmp_path, keep):
        content = (golden / "pastis_checkpoint_99.encoder.tar").read_bytes()
        path = tmp_path / "cut.tar"
        path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
        with pytest.raises(CheckpointError, match="damaged"):
            load_model(path)

    def test_foreign_files(self, tmp_path):
        save_file({"a": torch.zeros(2)}, tmp_path / "foreign.safetensors")
        with pytest.raises(CheckpointError, match="another program wrote it"):
            load_model(tmp_path / "foreign.safetensors")
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(CheckpointError, match="damaged, or holds objects"):
            load_model(tmp_path / "notes.txt")
        with zipfile.ZipFile(tmp_path / "some.zip", "w") as file:
            file.writestr("a", "b")
        with pytest.raises(CheckpointError, match="damaged, or holds objects"):
            load_model(tmp_path / "some.zip")
        torch.save([torch.zeros(2)], tmp_path / "list.pt")
        with pytest.raises(CheckpointError, match="holds a list"):
            load_model(tmp_path / "list.pt")
        with pytest.raises(MissingFileError, match=r"gone\.safetensors"):
            load_model(tmp_path / "gone.safetensors")

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ({"epoch": 3, "model_state_dict": [torch.zeros(2)]}, "holds epoch, model_state_dict"),
            ({"model_state_dict": {"linear.weight": 3.0}}, "holds model_state_dict"),
            ({7: torch.zeros(2)}, "holds 7"),
            ({"layer": torch.zeros(2)}, "unknown entries layer"),
            ({}, "must hold the whole network"),
        ],
        ids=["list", "numbers", "numbered", "other names", "nothing"],
    )
    def test_dictionaries_that_are_no_published_weights(self, tmp_path, content, says):
        torch.save(content, tmp_path / "other.tar")
        with pytest.raises(CheckpointError, match=says):
            load_model(tmp_path / "other.tar")

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"format": 99}, "Update stcln-geo"),
            ({"kind": "segmenter"}, "segmenter"),
            ({"config": {"bands": ["red"], "depth": 3}}, "unknown fields depth"),
            ({"config": {"bands": ["red"], "layers": "three"}}, "wrong"),
            ({"trained_days": 5}, "not what stcln-geo writes"),
            ({"trained_days": []}, "not what stcln-geo writes"),
            ({"legend": "x"}, "not what stcln-geo writes"),
            ({"legend": []}, "holds no class"),
            ({"legend": [{"value": "1"}]}, "has not the"),
            ({"legend": [{"value": str(n), "color": "red"} for n in range(5)]}, "colour 'red'"),
            ({"ignored": [1]}, "not what stcln-geo writes"),
            ({"chip": "<b>"}, "chip '<b>' is no number of pixels"),
            ({"chip": 0}, "chip 0 is no number"),
            ({"halo": -1}, "halo -1 is no number"),
            ({"season_start": "spring"}, "not MM-DD"),
            ({"season_start": 901}, "not what stcln-geo writes"),
            ({"provenance": ["spring"]}, "provenance is no object"),
            ({"provenance": {"miou": float("nan")}}, "NaN is no number of JSON"),
        ],
    )
    def test_damaged_descriptions(self, saved, change, says):
        redescribe(saved, lambda told: told | change)
        with pytest.raises(CheckpointError, match=says):
            read_metadata(saved)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"feedforward": 10**12}, "wrong shape"),
            ({"feedforward": 10**19}, "Cannot load"),
            ({"widths": [16, 2**40]}, "Cannot load"),
            ({"layers": 10**9}, "must lie in 1..1000"),
            ({"layers": 2.5}, "whole number"),
            ({"classes": True}, "whole number"),
            ({"affinity_dates": "9"}, "whole number"),
            ({"sta": 1}, "true or false"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("read", [read_metadata, load_model])
    def test_absurd_networks_are_not_built(self, saved, change, says, read):
        redescribe(saved, lambda told: told | {"config": told["config"] | change})
        begun = time.monotonic()
        with pytest.raises(CheckpointError, match=says):
            read(saved)
        assert time.monotonic() - begun < 5

    def test_a_description_nested_without_end(self, saved):
        redescribe(saved, lambda told: "[" * 200_000)
        with pytest.raises(CheckpointError, match="RecursionError"):
            read_metadata(saved)

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
    def test_a_zscore_that_divides_by_nothing(self, tmp_path, make_network, value):
        network = make_network()
        network.encoder.std[0] = value
        save(tmp_path / "model.safetensors", network)
        with pytest.raises(CheckpointError, match="z-score"):
            load_model(tmp_path / "model.safetensors")

    def test_description_that_does_not_fit_its_weights(self, saved):
        content = saved.read_bytes()
        saved.write_bytes(content.replace(b'\\"layers\\": 2', b'\\"layers\\": 3'))
        with pytest.raises(CheckpointError, match=r"missing: .*temporal\.layers\.2"):
            load_model(saved)

    def test_unknown_published_entries(self, golden, tmp_path):
        state = torch.load(golden / "pastis_checkpoint_99.encoder.tar", weights_only=True)
        torch.save(state | {"inc.extra": torch.zeros(1)}, tmp_path / "a.tar")
        with pytest.raises(CheckpointError, match=r"unknown entries inc\.extra"):
            load_model(tmp_path / "a.tar")
        del state["temporal_encoder.in_norm.bias"]
        torch.save(state, tmp_path / "b.tar")
        with pytest.raises(CheckpointError, match=r"missing: temporal\.norm\.bias"):
            load_model(tmp_path / "b.tar")
        del state["inc.double_conv.0.weight"]
        torch.save(state, tmp_path / "c.tar")
        with pytest.raises(CheckpointError, match="is missing"):
            load_model(tmp_path / "c.tar")

    def test_published_bands_must_be_known(self, golden, tmp_path):
        state = torch.load(golden / "pastis_checkpoint_99.encoder.tar", weights_only=True)
        state["inc.double_conv.0.weight"] = torch.zeros(32, 4, 3, 3)
        torch.save(state, tmp_path / "four.tar")
        with pytest.raises(CheckpointError, match="takes 4 bands"):
            load_model(tmp_path / "four.tar")


class TestTemperature:
    def test_is_kept_and_set_without_touching_anything_else(self, tmp_path, make_network):
        path = save(tmp_path / "a.safetensors", make_network(), ignored=LEGEND, temperature=1.5)
        before, weights = read_metadata(path), load_model(path).state_dict()
        assert before.temperature == 1.5
        assert before.ignored == LEGEND

        set_temperature(path, 0.8)

        after = read_metadata(path)
        assert after.temperature == 0.8
        assert dataclasses.replace(after, temperature=1.5, sha256=before.sha256) == before
        assert after.sha256 != before.sha256
        for name, value in load_model(path).state_dict().items():
            assert torch.equal(value, weights[name]), name
        assert [child.name for child in tmp_path.iterdir()] == ["a.safetensors"]

    def test_files_of_earlier_versions_have_none(self, tmp_path, saved):
        with safe_open(saved, framework="pt") as file:
            told = json.loads(file.metadata()["stcln_geo"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        del told["temperature"], told["ignored"]
        old = tmp_path / "old.safetensors"
        save_file(state, old, metadata={"stcln_geo": json.dumps(told)})
        assert read_metadata(old).temperature is None
        assert read_metadata(old).ignored is None
        load_model(old)

    @pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
    def test_must_be_positive(self, tmp_path, saved, make_network, value):
        with pytest.raises(InputError, match="finite"):
            save(tmp_path / "b.safetensors", make_network(), temperature=value)
        with pytest.raises(InputError, match="finite number above 0"):
            set_temperature(saved, value)


class TestStartingFromAnEncoder:
    @pytest.mark.parametrize("kind", [Stcln, MaskedPretrainer, Encoder])
    def test_from_any_kind(self, tmp_path, make_config, make_network, kind):
        source = kind(make_config())
        path = save(tmp_path / "source.safetensors", source)
        target = make_network()
        report = load_encoder_into(target, path)
        encoder = source if isinstance(source, Encoder) else source.encoder
        for name, value in encoder.state_dict().items():
            assert torch.equal(target.encoder.state_dict()[name], value), name
        assert len(report) == 1
        assert "4 of 4 bands" in report[0]

    def test_bands_are_matched_by_name(self, saved, make_config):
        theirs = load_model(saved).encoder
        target = Encoder(make_config(bands=("nir", "swir16", "red")))
        first = target.convolutions.blocks[0].convolution.weight
        report = load_encoder_into(target, saved)
        source = theirs.convolutions.blocks[0].convolution.weight
        assert torch.equal(first[:, 0], source[:, 3])
        assert not first[:, 1].any()
        assert torch.equal(first[:, 2], source[:, 2])
        assert target.mean.tolist() == pytest.approx([0.3, 0.0, 0.1])
        assert target.std.tolist() == pytest.approx([0.1, 1.0, 0.12])
        assert any("swir16" in line and "begin at zero" in line for line in report)
        assert any("blue, green" in line and "not used" in line for line in report)

    def pair(self, saved, make_config, bands):
        """The checkpoint's encoder, and one of other bands that began from it."""
        target = Encoder(make_config(bands=bands)).eval()
        target.set_normalisation([0.5] * len(bands), [0.2] * len(bands))
        load_encoder_into(target, saved)
        return load_model(saved).encoder, target

    def test_a_band_left_out_is_the_band_at_its_mean(self, saved, make_config, make_batch):
        theirs, ours = self.pair(saved, make_config, ("blue", "red", "nir"))
        batch = make_batch()
        at_mean = batch.images.clone()
        at_mean[:, :, 1] = theirs.mean[1]

        expected = theirs(at_mean, batch.days, batch.valid)
        found = ours(batch.images[:, :, [0, 2, 3]], batch.days, batch.valid)

        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert (theirs(batch.images, batch.days, batch.valid) - expected).abs().max() > 1e-2

    def test_bands_in_another_order_give_the_same_features(self, saved, make_config, make_batch):
        theirs, ours = self.pair(saved, make_config, ("nir", "blue", "red", "green"))
        batch = make_batch()

        expected = theirs(batch.images, batch.days, batch.valid)
        found = ours(batch.images[:, :, [3, 0, 2, 1]], batch.days, batch.valid)

        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        by_place = ours(batch.images, batch.days, batch.valid)
        assert (by_place - expected).abs().max() > 1e-2

    def test_a_band_never_seen_changes_nothing_at_first_and_can_learn(
        self, saved, make_config, make_batch
    ):
        theirs, ours = self.pair(saved, make_config, ("swir16", "blue", "green", "red", "nir"))
        batch = make_batch()
        images = torch.cat([torch.rand_like(batch.images[:, :, :1]), batch.images], dim=2)

        found = ours(images, batch.days, batch.valid)

        expected = theirs(batch.images, batch.days, batch.valid)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert ours.mean[0] == 0.5, "as the caller set it"
        found.square().sum().backward()
        gradient = ours.convolutions.blocks[0].convolution.weight.grad
        assert gradient[:, 0].abs().max() > 0

    def test_published_mtlcc_sets_the_zscore_to_none(self, golden, tmp_path):
        state = torch.load(golden / "pastis_checkpoint_99.encoder.tar", weights_only=True)
        state["inc.double_conv.0.weight"] = torch.randn(32, 13, 3, 3)
        torch.save(state, tmp_path / "mtlcc.tar")
        encoder = Encoder(StclnConfig.preset("base", bands=("red", "nir")))
        encoder.set_normalisation([0.2] * 2, [0.1] * 2)
        load_encoder_into(encoder, tmp_path / "mtlcc.tar")
        assert encoder.mean.tolist() == [0.0, 0.0]
        assert encoder.std.tolist() == [1.0, 1.0]
        first = encoder.convolutions.blocks[0].convolution.weight
        assert torch.equal(first, state["inc.double_conv.0.weight"][:, [0, 3]])

    def test_no_shared_band(self, saved, make_config):
        with pytest.raises(CheckpointError, match="At least one must be shared"):
            load_encoder_into(Encoder(make_config(bands=("vv", "vh"))), saved)

    def test_sizes_must_agree(self, saved, make_config):
        with pytest.raises(CheckpointError, match=r"layers 2 \(network: 3\)"):
            load_encoder_into(Encoder(make_config(layers=3)), saved)

    @pytest.mark.parametrize("imported", [False, True])
    def test_published_pastis_keeps_the_zscore_and_tells_of_the_mode(
        self, golden, tmp_path, imported
    ):
        path = golden / "pastis_checkpoint_99.encoder.tar"
        if imported:
            path = save_checkpoint(tmp_path / "imported.safetensors", load_model(path))
        config = StclnConfig.preset("base", bands=read_metadata(path).bands, classes=3)
        network = Stcln(config)
        network.encoder.set_normalisation([0.2] * 10, [0.1] * 10)
        report = load_encoder_into(network, path)
        assert network.encoder.mean.tolist() == pytest.approx([0.2] * 10)
        assert any("z-score stays" in line for line in report)
        assert any("mode='reference'" in line for line in report)
        assert any("positions='index'" in line for line in report)


class TestCommands:
    def run(self, *arguments):
        from stcln_geo.cli.checkpoint import app

        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_import_then_info(self, golden, tmp_path):
        source, out = golden / "pastis_model_best.tar", tmp_path / "pastis.safetensors"
        done = self.run("import", source, out)
        assert done.exit_code == 0, done.output
        assert "3,248,341 parameters" in done.output
        assert "61 unused entries dropped" in done.output
        imported = load_model(out).state_dict()
        for name, value in load_model(source).state_dict().items():
            assert torch.equal(imported[name], value), name

        told = json.loads(self.run("info", out, "--json").output)
        assert told["kind"] == "classifier"
        assert told["config"]["mode"] == "reference"
        assert told["provenance"]["file"] == "pastis_model_best.tar"
        assert told["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
        assert "rededge1" in self.run("info", out).output

    def test_import_takes_published_files_only(self, saved, tmp_path):
        done = self.run("import", saved, tmp_path / "out.safetensors")
        assert isinstance(done.exception, CheckpointError)
        assert not (tmp_path / "out.safetensors").exists()

    def test_export(self, tmp_path, make_network):
        save(tmp_path / "checkpoints" / "best.safetensors", make_network())
        for options, kind in (((), Stcln), (("--encoder",), Encoder)):
            out = tmp_path / f"{kind.__name__}.safetensors"
            done = self.run("export", tmp_path, out, *options)
            assert done.exit_code == 0, done.output
            assert type(load_model(out)) is kind
            assert read_metadata(out).chip == 32
        assert read_metadata(tmp_path / "Stcln.safetensors").legend == LEGEND
        best = tmp_path / "checkpoints" / "best.safetensors"
        before = best.read_bytes()
        refused = self.run("export", tmp_path, best, "--encoder")
        assert "that is the checkpoint itself" in str(refused.exception)
        assert best.read_bytes() == before
