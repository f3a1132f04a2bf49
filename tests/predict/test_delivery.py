"""Maps in object storage, on a real server on loopback: the map of a folder, whole or not there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import rasterio

from stcln_geo.cli.main import invoke
from stcln_geo.errors import InputError, OutputError, StorageError
from stcln_geo.predict import PredictSpec, delivery, predict_region, predict_search
from stcln_geo.storage import S3Path, list_files, location

from .test_direct import Source, source

__all__ = ["source"]

QUICK = PredictSpec(device="cpu", precision="float32", min_clear=1, seam_audit=0, shard_size=64)


@pytest.fixture
def local(world: Any, tmp_path: Path) -> Path:
    return predict_region(world.cube, world.checkpoint, tmp_path / "map", spec=QUICK).out


def files(folder: Path | S3Path) -> set[str]:
    return {name for name in list_files(folder) if not name.startswith("shards/")}


def pixels(content: bytes) -> bytes:
    with rasterio.MemoryFile(content) as file, file.open() as opened:
        return bytes(opened.read().tobytes())


def test_a_map_in_a_bucket_is_that_of_a_folder(
    world: Any, local: Path, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"{s3}/maps/map"
    product = predict_region(world.cube, world.checkpoint, address, spec=QUICK)
    where = location(address)
    assert product.out == where
    assert product.classes == where / "classes.tif"

    assert files(where) == files(local) | {"delivery.json"}
    for layer in ("classes", "confidence", "qa", "observations"):
        name = f"{layer}.tif"
        assert pixels((where / name).read_bytes()) == pixels((local / name).read_bytes()), layer
    told = json.loads((where / "delivery.json").read_text())
    assert told["run"] == json.loads((local / "run.json").read_text())["run"]
    for name, one in told["files"].items():
        content = (where / name).read_bytes()
        assert len(content) == one["bytes"]
        assert hashlib.sha256(content).hexdigest() == one["sha256"]
    # The item is named after the map, not after the folder it was made in.
    assert json.loads((where / "item.json").read_text())["id"] == f"map-{world.season.name}"
    assert not (tmp_path / "stcln-geo-work").exists()

    again = predict_region(world.cube, world.checkpoint, address, spec=QUICK)
    assert again.histogram == product.histogram
    assert again.resumed_shards > 0
    assert not (tmp_path / "stcln-geo-work").exists(), "nothing was made again"


def test_what_is_not_whole_is_delivered_again(
    world: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, work = f"{s3}/maps/map", tmp_path / "work"
    upload, sent = delivery.upload_file, []

    def break_off(source: Path, target: S3Path, **options: Any) -> None:
        if len(sent) == 3:
            raise StorageError("the server went away")
        sent.append(target)
        upload(source, target, **options)

    with monkeypatch.context() as broken:
        broken.setattr(delivery, "upload_file", break_off)
        with pytest.raises(StorageError, match="went away"):
            predict_region(world.cube, world.checkpoint, address, spec=QUICK, work=work)
    where = location(address)
    assert not (where / "delivery.json").is_file()
    made = (work / "map" / "classes.tif").stat().st_mtime_ns

    predict_region(world.cube, world.checkpoint, address, spec=QUICK, work=work)
    assert (where / "delivery.json").is_file()
    assert (work / "map" / "classes.tif").stat().st_mtime_ns == made, "kept, not made again"

    # An object that was cut short is noticed.
    (where / "qa.tif").unlink()
    predict_region(world.cube, world.checkpoint, address, spec=QUICK, work=work)
    assert (where / "qa.tif").read_bytes() == (work / "map" / "qa.tif").read_bytes()


@pytest.mark.slow
def test_another_run_is_refused_and_replaced_when_asked(
    world: Any, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"{s3}/maps/map"
    rich = PredictSpec(
        device="cpu", precision="float32", min_clear=1, seam_audit=0, outputs=("entropy",)
    )
    predict_region(world.cube, world.checkpoint, address, spec=rich)
    where = location(address)
    from stcln_geo.storage import write_file

    write_file(where / "notes.txt", b"mine")
    with pytest.raises(OutputError, match="holds the map of another run"):
        predict_region(world.cube, world.checkpoint, address, spec=QUICK)
    predict_region(world.cube, world.checkpoint, address, spec=QUICK, overwrite=True)
    assert "entropy.tif" not in files(where), "a layer that the new map lacks"
    assert (where / "notes.txt").read_bytes() == b"mine"


@pytest.mark.slow
def test_a_search_is_remembered_by_the_bucket(
    source: Source, s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"{s3}/maps/search"
    first = predict_search(source.search(), source.checkpoint, address, spec=QUICK)
    assert not (tmp_path / "stcln-geo-work").exists()
    # The same images, though the work folder is gone: the map is there already.
    again = predict_search(source.search(), source.checkpoint, address, spec=QUICK)
    assert again.histogram == first.histogram
    assert again.resumed_shards > 0
    assert not (tmp_path / "stcln-geo-work").exists(), "nothing was made, nothing is left"
    assert {"search/items.parquet", "delivery.json"} <= files(location(address))


def test_command_line(
    world: Any, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = [
        "predict", str(world.cube), "--checkpoint", str(world.checkpoint), "--out",
        f"{s3}/maps/map", "--device", "cpu", "--min-clear", "1", "--seam-audit", "0",
    ]  # fmt: skip
    polygons = ["--polygons", str(tmp_path / "fields.gpkg")]
    assert invoke([*command, *polygons]) == 0
    assert f"{s3}/maps/map: the whole map" in capsys.readouterr().out
    assert (tmp_path / "fields.gpkg").exists()
    assert invoke(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert invoke([*command, *polygons]) == 2
    assert "aws s3 sync" in capsys.readouterr().err
    assert invoke([*command, "--out", str(tmp_path / "map"), "--work", str(tmp_path)]) == 2
    assert "Leave --work out" in capsys.readouterr().err


def test_a_bucket_that_does_not_exist_is_named_before_anything_is_made(
    world: Any, s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    arguments = ["predict", str(world.cube), "--checkpoint", str(world.checkpoint)]
    assert invoke([*arguments, "--out", f"{s3}-missing/map"]) == 2
    assert "there is no bucket" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_needs_no_work_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Leave --work out"):
        delivery.destination(tmp_path / "map", tmp_path / "work")
