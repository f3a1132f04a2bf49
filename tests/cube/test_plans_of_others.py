"""Cubes and catalog descriptions of others: what they say is never run, nor does it lead out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
import rasterio
import yaml

from stcln_geo.catalog import Access, load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube.append import append_cube
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.plan import plan_cube
from stcln_geo.cube.planned import CubePlan
from stcln_geo.cube.repair import repair_cube
from stcln_geo.cube.search import search_items
from stcln_geo.errors import CatalogError, CubeError

PYTHON = {"GDAL_VRT_ENABLE_PYTHON": "YES"}


@pytest.fixture
def cube(planted: Any, tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "c.zarr"
    assert invoke(["cube", "build", "--catalog", planted.location, str(path)]) == 0
    return path


def _program(image: Path, folder: Path, mark: Path) -> str:
    """Write a VRT in place of an image, with a program that writes a file; return its path."""
    with rasterio.open(image) as source:
        crs, grid, (height, width) = source.crs.to_wkt(), source.transform.to_gdal(), source.shape
    code = f"def run(i, out, *a, **k):\n    open({str(mark)!r}, 'w').close()\n    out[:] = 1\n"
    (folder / "a.vrt").write_text(
        f"""<VRTDataset rasterXSize="{width}" rasterYSize="{height}">
  <SRS>{escape(crs)}</SRS><GeoTransform>{", ".join(map(str, grid))}</GeoTransform>
  <VRTRasterBand dataType="UInt16" band="1" subClass="VRTDerivedRasterBand">
    <PixelFunctionType>run</PixelFunctionType>
    <PixelFunctionLanguage>Python</PixelFunctionLanguage>
    <PixelFunctionCode><![CDATA[{code}]]></PixelFunctionCode>
    <SimpleSource><SourceFilename>{image}</SourceFilename></SimpleSource>
  </VRTRasterBand>
</VRTDataset>"""
    )
    return str(folder / "a.vrt")


def test_gdal_would_run_the_program_of_a_file(planted: Any, tmp_path: Path):
    mark = tmp_path / "run"
    path = _program(next(planted.folder.rglob("*.tif")), tmp_path, mark)
    with rasterio.open(path) as source, pytest.raises(rasterio.errors.RasterioIOError):
        source.read()
    assert not mark.exists()
    # What the other tests are about: one option of a catalog is enough.
    with rasterio.Env(**PYTHON), rasterio.open(path) as source:
        source.read()
    assert mark.exists()


@pytest.mark.parametrize(
    "name",
    ["GDAL_VRT_ENABLE_PYTHON", "gdal_vrt_enable_python", "PYTHONSO", "GDAL_DRIVER_PATH",
     "GDAL_PYTHON_DRIVER_PATH", "GDAL_HTTP_COOKIEJAR", "GDAL_HTTP_HEADER_FILE", "AWS_CONFIG_FILE",
     "CPL_LOG", "GDAL_VRT_RAWRASTERBAND_ALLOWED_SOURCE", "session", "AWS_REGION\n"],
)  # fmt: skip
def test_a_catalog_sets_no_option_that_runs_or_writes_something(name: str, tmp_path: Path):
    access = {"gdal": {name: "/x", "AWS_REGION": "eu-central-1"}}
    content = {"name": "x", "kind": "api", "endpoint": "https://e.org/", "access": access}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CatalogError, match="cannot be set by a catalog"):
        load_catalog(tmp_path / "x.yaml")


def test_a_catalog_sets_how_files_are_reached():
    options = {
        "AWS_S3_ENDPOINT": "e.org", "AWS_VIRTUAL_HOSTING": "FALSE", "GDAL_HTTP_MAX_RETRY": "3",
        "GDAL_HTTPS_PROXY": "proxy:80", "CPL_VSIL_CURL_CHUNK_SIZE": "65536", "VSI_CACHE": "YES",
        "GDAL_INGESTED_BYTES_AT_OPEN": "1000000", "GDAL_NUM_THREADS": "2",
        "GS_NO_SIGN_REQUEST": "YES", "AZURE_NO_SIGN_REQUEST": "YES", "OPJ_NUM_THREADS": "1",
    }  # fmt: skip
    assert Access(gdal=options).gdal == options


def test_a_cube_cannot_make_gdal_run_a_program(cube: Path, tmp_path: Path, capsys: Any):
    mark = tmp_path / "run"
    content = json.loads((cube / "build.json").read_text())
    for season in content["plan"]["seasons"]:
        for scene in (scene for date in season["dates"] for scene in date["scenes"]):
            image = Path(scene["bands"][0]["href"])
            scene["bands"][0]["href"] = _program(image, tmp_path, mark)
    # A stranger makes it fit; access is no part of it.
    content["fingerprint"] = CubePlan.from_json(content["plan"]).fingerprint
    content["plan"]["access"] |= {"gdal": PYTHON, "local_files": True}
    (cube / "build.json").write_text(json.dumps(content))
    for manifest in (cube / "manifests").rglob("*.json"):
        told = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**told, "left_out": ["S2_0", "S2_1", "S2_2"]}))
    assert invoke(["cube", "repair", str(cube)]) == 2
    assert "GDAL_VRT_ENABLE_PYTHON cannot be set" in " ".join(capsys.readouterr().err.split())
    assert not mark.exists()


def test_the_other_catalog_of_a_scene_cannot_either(planted: Any):
    plan = plan_cube(search_items(load_catalog(planted.location))).to_json()
    plan["seasons"][0]["dates"][0]["scenes"][0]["substitute"] = {
        "catalog": "x", "item": "i", "baseline": "05.00", "access": {"gdal": PYTHON},
    }  # fmt: skip
    with pytest.raises(CubeError, match="GDAL_VRT_ENABLE_PYTHON cannot be set"):
        CubePlan.from_json(plan)


@pytest.mark.parametrize("name", ["../../victim", "..", "2019-09-01/../..", "/tmp", "", "2019-9-1"])
def test_a_season_is_a_date_and_no_path(name: str, planted: Any):
    plan = plan_cube(search_items(load_catalog(planted.location))).to_json()
    plan["seasons"][0]["name"] = name
    with pytest.raises(CubeError, match=r"seasons are named by their first day, YYYY-MM-DD"):
        CubePlan.from_json(plan)


@pytest.mark.parametrize("command", ["append", "repair", "build"])
def test_a_cube_cannot_make_a_command_delete_another_folder(
    command: str, cube: Path, planted: Any, tmp_path: Path
):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "precious.txt").write_text("years of work")

    content = json.loads((cube / "build.json").read_text())
    # Counted from the cube's folder of manifests.
    content["plan"]["seasons"][0]["name"] = "../../../victim"
    (cube / "build.json").write_text(json.dumps(content))
    plan = plan_cube(search_items(load_catalog(planted.location)))
    runs = {
        "append": lambda: append_cube(cube, "2030-01-01"),
        "repair": lambda: repair_cube(cube),
        "build": lambda: build_cube(plan, cube),
    }
    with pytest.raises(CubeError, match="seasons are named by their first day"):
        runs[command]()
    assert (victim / "precious.txt").read_text() == "years of work"


@pytest.mark.parametrize("lacks", ["spec", "access", "window", "seasons"])
def test_a_plan_that_is_none_is_told_in_a_sentence(lacks: str, planted: Any):
    plan = plan_cube(search_items(load_catalog(planted.location))).to_json()
    with pytest.raises(CubeError, match=r"Cannot use the plan of a cube: KeyError"):
        CubePlan.from_json({key: value for key, value in plan.items() if key != lacks})
    with pytest.raises(CubeError, match=r"Cannot use the plan of a cube"):
        CubePlan.from_json({**plan, lacks: 7})
