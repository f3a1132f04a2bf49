"""Exported programs give the module's logits, say what they are, and are never run by us."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from stcln_geo.cli.main import app
from stcln_geo.errors import CheckpointError, InputError
from stcln_geo.model import (
    MaskedPretrainer,
    Stcln,
    export_checkpoint,
    load_model,
    read_metadata,
    save_checkpoint,
)
from stcln_geo.model import program as program_module
from stcln_geo.model.mlm import item_path

LEGEND = json.dumps(
    [
        {"code": code, "value": str(code + 10), "name": f"céréale {code}", "color": "#11aa33"}
        for code in range(5)
    ],
    ensure_ascii=False,
)
PROVENANCE = {
    "trained": "finetune",
    "cubes": [{"cube": "a.zarr", "season": "2018-09-01"}],
    "init": {"path": "runs/pre", "sha256": "ab" * 32, "kind": "pretrainer"},
}
SIZES = [(1, 1, 7, 10), (3, 9, 7, 10), (2, 30, 5, 8), (4, 2, 3, 11), (1, 2, 2, 3)]
"""Samples, dates, height, width: none of them those that the graph was captured with."""


def save(path: Path, network) -> Path:
    return save_checkpoint(
        path, network, legend=LEGEND, provenance=PROVENANCE, chip=32, halo=4,
        trained_days=(12, 301), season_start="09-01",
    )  # fmt: skip


def make_inputs(samples: int, dates: int, height: int, width: int):
    """Images with NaN where not valid; a date never valid, a pixel never valid."""
    generator = torch.Generator().manual_seed(samples * 100 + dates)
    images = torch.rand(samples, dates, 4, height, width, generator=generator) * 0.5
    valid = torch.rand(samples, dates, height, width, generator=generator) > 0.4
    valid[0, dates // 2] = False
    valid[:, :, 1, 2] = False
    images = torch.where(valid[:, :, None], images, torch.nan)
    days = torch.randint(0, 365, (samples, dates), generator=generator).sort(1).values
    return images, days, valid


def assert_same_logits(network, run) -> None:
    """`run` does what the network does, for sizes it has never seen and without a valid pixel."""
    for size in SIZES:
        inputs = make_inputs(*size)
        with torch.no_grad():
            expected = network(*inputs)
        torch.testing.assert_close(run(*inputs), expected, rtol=0, atol=1e-5, msg=str(size))
    images, days, valid = make_inputs(2, 4, 7, 10)
    valid[1] = False
    with torch.no_grad():
        expected = network(images, days, valid)
    found = run(images, days, valid)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_network) -> Path:
    return save(tmp_path_factory.mktemp("weights") / "wheat.safetensors", make_network())


@pytest.fixture(scope="module")
def pt2(saved, tmp_path_factory) -> Path:
    """Made by the command, once."""
    out = tmp_path_factory.mktemp("program") / "wheat.pt2"
    made = CliRunner().invoke(app, ["checkpoint", "export", str(saved), str(out)])
    assert made.exit_code == 0, made.output
    assert f"{out}: classifier of {saved}" in made.output
    assert f"{out}.stac.json: STAC item" in made.output
    return out


@pytest.mark.slow
class TestProgram:
    def test_geo_equals_the_module(self, saved, pt2):
        run = torch.export.load(pt2).module()
        with torch.no_grad():
            assert_same_logits(load_model(saved), run)

    def test_reference_equals_the_module(self, tmp_path, make_network):
        network = make_network(mode="reference", positions="index")
        out = tmp_path / "reference.pt2"
        export_checkpoint(save(tmp_path / "reference.safetensors", network), out)
        with torch.no_grad():
            assert_same_logits(network.eval(), torch.export.load(out).module())

    def test_it_says_what_the_weights_say(self, saved, pt2):
        told, info = read_metadata(saved), read_metadata(pt2, programs=True)
        assert info.format == "pt2"
        for field in (
            "kind", "config", "mean", "std", "legend", "chip", "halo", "trained_days",
            "season_start", "parameters",
        ):  # fmt: skip
            assert getattr(info, field) == getattr(told, field), field
        assert info.provenance == {**PROVENANCE, "exported_from": told.sha256}

    def test_no_paths_of_this_machine(self, pt2):
        with zipfile.ZipFile(pt2) as archive:
            for name in archive.namelist():
                assert str(Path(program_module.__file__).parent).encode() not in archive.read(name)

    def test_networks_are_not_loaded_from_it(self, pt2):
        with pytest.raises(CheckpointError, match=r"exported program.*exported from"):
            load_model(pt2)
        with pytest.raises(CheckpointError, match=r"exported program.*exported from"):
            read_metadata(pt2)

    def test_a_program_is_known_by_its_content_too(self, pt2, tmp_path):
        (tmp_path / "wheat.program").write_bytes(pt2.read_bytes())
        assert read_metadata(tmp_path / "wheat.program", programs=True).format == "pt2"

    def test_formats_that_contradict_the_name_or_do_not_exist(self, saved, tmp_path):
        with pytest.raises(InputError, match=r"its name says onnx.*\.pt2"):
            export_checkpoint(saved, tmp_path / "wheat.onnx", file_format="pt2")
        with pytest.raises(InputError, match="safetensors, pt2, onnx"):
            export_checkpoint(saved, tmp_path / "wheat", file_format="tflite")

    def test_only_classifiers(self, saved, tmp_path, make_config):
        pretrainer = save_checkpoint(tmp_path / "p.safetensors", MaskedPretrainer(make_config()))
        with pytest.raises(CheckpointError, match="this pretrainer has none"):
            export_checkpoint(pretrainer, tmp_path / "p.pt2")
        with pytest.raises(CheckpointError, match="an encoder has none"):
            export_checkpoint(saved, tmp_path / "e.pt2", encoder=True)
        assert export_checkpoint(pretrainer, tmp_path / "copy.safetensors").item is None


class TestReading:
    """What a file holds is read, never run."""

    @pytest.mark.slow
    def test_pickles_in_a_program_are_not_touched(self, pt2, tmp_path):
        hostile, mark = tmp_path / "hostile.pt2", tmp_path / "was-run"

        class Trap:
            def __reduce__(self):
                return (Path.touch, (mark,))

        with zipfile.ZipFile(pt2) as source, zipfile.ZipFile(hostile, "w") as target:
            for entry in source.infolist():
                own = entry.filename.endswith("/extra/stcln_geo.json")
                target.writestr(entry, source.read(entry) if own else pickle.dumps(Trap()))
        assert read_metadata(hostile, programs=True).kind == "classifier"
        assert not mark.exists()

    @pytest.mark.parametrize("name", ["other.pt2", "other.onnx"])
    @pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and so on", b"\x08\xff", b"\x3a\x7f"])
    def test_damaged_files(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="Cannot describe"):
            read_metadata(tmp_path / name, programs=True)

    def test_another_program(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
            archive.writestr("other/models/model.json", "{}")
        with pytest.raises(CheckpointError, match="another program wrote it"):
            read_metadata(tmp_path / "other.pt2", programs=True)

    def test_the_metadata_of_onnx_are_read_without_onnx(self, tmp_path, saved):
        """A message written by hand: version, a graph of some bytes, metadata, a fixed number."""
        with_graph = b"\x08\x0a" + b"\x3a\x03abc" + pair("other", "x")
        description = _description(saved)
        file = tmp_path / "by-hand.onnx"
        file.write_bytes(with_graph + pair("stcln_geo", description) + b"\x7d\0\0\0\0")
        assert read_metadata(file, programs=True).config == read_metadata(saved).config
        file.rename(tmp_path / "by-hand")
        assert read_metadata(tmp_path / "by-hand", programs=True).format == "onnx"


def pair(key: str, value: str) -> bytes:
    content = b"".join(
        bytes([tag]) + varint(len(text.encode())) + text.encode()
        for tag, text in ((0x0A, key), (0x12, value))
    )
    return b"\x72" + varint(len(content)) + content


def varint(number: int) -> bytes:
    low, high = number & 0x7F, number >> 7
    return bytes([low | 0x80]) + varint(high) if high else bytes([low])


def _description(saved: Path) -> str:
    info = read_metadata(saved)
    return json.dumps(
        {
            "format": 1, "kind": info.kind, "config": info.config.to_dict(), "legend": None,
            "chip": 32, "halo": 4, "trained_days": [12, 301], "season_start": "09-01",
            "provenance": {}, "zscore": {"mean": info.mean, "std": info.std},
        }
    )  # fmt: skip


class TestOnnx:
    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["geo", "reference"])
    def test_onnxruntime_gives_the_logits_of_the_module(self, make_network, tmp_path, mode):
        reason = "ONNX is not exported here: pip install 'stcln-geo[onnx]' onnxruntime"
        for package in ("onnx", "onnxscript"):
            pytest.importorskip(package, reason=reason)
        onnxruntime = pytest.importorskip("onnxruntime", reason=reason)
        positions = "days" if mode == "geo" else "index"
        saved = save(tmp_path / "wheat.safetensors", make_network(mode=mode, positions=positions))
        out = tmp_path / "wheat.onnx"
        made = export_checkpoint(saved, out)
        session = onnxruntime.InferenceSession(out.read_bytes())
        assert [one.name for one in session.get_inputs()] == ["images", "days", "valid"]

        def run(*inputs: torch.Tensor) -> torch.Tensor:
            named = zip(("images", "days", "valid"), inputs, strict=True)
            feed = {name: np.asarray(value) for name, value in named}
            return torch.from_numpy(session.run(["logits"], feed)[0])

        assert_same_logits(load_model(saved), run)
        assert made.info.format == "onnx"
        assert made.info.legend == LEGEND
        assert str(Path(program_module.__file__).parent).encode() not in out.read_bytes()

    def test_without_onnx_the_extra_is_named(self, saved, tmp_path, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(InputError, match=r"onnx and onnxscript.*stcln-geo\[onnx\]"):
            export_checkpoint(saved, tmp_path / "wheat.onnx")
        assert not (tmp_path / "wheat.onnx").exists()


class TestItem:
    """The STAC item beside the file, read with pystac."""

    def read(self, exported: Path):
        pystac = pytest.importorskip("pystac")
        return pystac.Item.from_file(str(item_path(exported)))

    @pytest.mark.slow
    def test_it_is_a_valid_stac_item(self, pt2):
        item = self.read(pt2)
        extensions, item.stac_extensions = item.stac_extensions, []
        # The schema of STAC itself comes with pystac; those of extensions are on the web.
        assert item.validate()
        assert "https://stac-extensions.github.io/mlm/v1.4.0/schema.json" in extensions

    @pytest.mark.slow
    def test_pystac_reads_the_extension(self, pt2):
        from pystac.extensions.classification import Classification
        from pystac.extensions.mlm import MLMExtension

        told = MLMExtension.ext(self.read(pt2))
        assert told.mlm_name == "STCLN wheat"
        assert (told.architecture, told.tasks) == ("STCLN", ["semantic-segmentation"])
        assert told.framework == "PyTorch"
        assert told.accelerator is None
        assert told.pretrained is True
        assert told.pretrained_source == f"sha256:{'ab' * 32}"
        images, days, valid = told.input
        assert images.bands == ["blue", "green", "red", "nir"]
        assert images.input.shape == [-1, -1, 4, -1, -1]
        assert images.input.dim_order == ["batch", "time", "bands", "height", "width"]
        # The network does it itself: who did it before would do it twice.
        assert images.value_scaling is None
        assert (days.input.dim_order, valid.input.data_type) == (["batch", "time"], "uint8")
        (output,) = told.output
        assert output.result.shape == [-1, 5, -1, -1]
        assert output.result.dim_order[1] == "class"
        classes = [Classification(one) for one in output.properties["classification:classes"]]
        assert [one.value for one in classes] == [0, 1, 2, 3, 4]
        assert classes[2].description == "céréale 2"
        assert classes[2].color_hint == "11AA33"

    @pytest.mark.slow
    def test_what_the_extension_requires_is_there(self, pt2):
        """Version 1.4: named bands are described, and a model asset tells its artifact type."""
        item = json.loads(item_path(pt2).read_text())
        properties = item["properties"]
        assert item["assets"]["model"]["bands"] == properties["bands"]
        statistics = {band["name"]: band["statistics"] for band in properties["bands"]}
        assert list(statistics) == properties["mlm:input"][0]["bands"]
        assert statistics["nir"] == pytest.approx({"mean": 0.3, "stddev": 0.1})
        for array in [one["input"] for one in properties["mlm:input"]] + [
            properties["mlm:output"][0]["result"]
        ]:
            assert len(array["shape"]) == len(array["dim_order"]) == len(set(array["dim_order"]))
        model = item["assets"]["model"]
        assert model["mlm:artifact_type"] == "torch.export.save"
        assert "mlm:model" in model["roles"]
        assert (pt2.parent / model["href"]).resolve() == pt2.resolve()
        assert model["file:size"] == pt2.stat().st_size
        assert model["file:checksum"] == "1220" + read_metadata(pt2, programs=True).sha256
        assert properties["stcln_geo:provenance"]["exported_from"]

    @pytest.mark.slow
    def test_dates_are_those_of_training(self, pt2):
        properties = json.loads(item_path(pt2).read_text())["properties"]
        assert properties["datetime"] is None
        assert properties["start_datetime"] == "2018-09-13T00:00:00Z"
        assert properties["end_datetime"] == "2019-06-29T00:00:00Z"

    @pytest.mark.parametrize(
        "provenance",
        [{}, {"cubes": "a.zarr", "init": "pre"}, {"cubes": [1, {"season": "spring"}]}],
        ids=["none", "texts", "odd"],
    )
    def test_weights_without_legend_or_history(self, tmp_path, make_network, provenance):
        """Anybody may write any provenance."""
        bare = save_checkpoint(
            tmp_path / "7.safetensors", make_network(), provenance=provenance, trained_days=(1, 2)
        )
        out = tmp_path / "out" / "7.safetensors"
        item = json.loads(export_checkpoint(bare, out).item.read_text())
        properties = item["properties"]
        assert properties["datetime"] == properties["created"]
        assert "mlm:pretrained" not in properties
        assert properties["mlm:output"][0]["classification:classes"][1]["name"] == "class-1"
        assert item["assets"]["model"]["mlm:artifact_type"] == "safetensors.torch.save_file"
        assert self.read(out).id == "7.safetensors"


class TestCommand:
    @pytest.mark.slow
    def test_info_of_a_program(self, pt2):
        told = CliRunner().invoke(app, ["checkpoint", "info", str(pt2)])
        assert told.exit_code == 0, told.output
        assert "pt2 program: images (B, T, 4, H, W)" in told.output
        names = ", ".join(f"céréale {code}" for code in range(5))
        assert f"classes: {names}" in " ".join(told.output.split())
        as_json = CliRunner().invoke(app, ["checkpoint", "info", "--json", str(pt2)])
        assert json.loads(as_json.output)["format"] == "pt2"

    def test_format_beside_the_name(self, saved, tmp_path):
        out = tmp_path / "wheat.weights"
        arguments = ["checkpoint", "export", str(saved), str(out), "--format", "safetensors"]
        made = CliRunner().invoke(app, arguments)
        assert made.exit_code == 0, made.output
        assert isinstance(load_model(out), Stcln)
