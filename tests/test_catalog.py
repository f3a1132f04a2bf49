"""Catalogs: the shipped descriptions fit real items, and mistakes are named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stcln_geo.catalog import load_catalog, shipped_catalogs
from stcln_geo.cube.contract import BANDS
from stcln_geo.cube.granules import band_assets
from stcln_geo.errors import CatalogError, InputError

RECORDED = {
    "earth-search": ("earth-search-v1", ["sentinel-2-l2a", "sentinel-2-c1-l2a", "sentinel-2-l1c"]),
    "planetary-computer": ("planetary-computer", ["sentinel-2-l2a", "sentinel-1-rtc"]),
    "cdse": ("cdse", ["sentinel-2-l2a"]),
}


def test_shipped_names_are_the_providers():
    assert set(shipped_catalogs()) == {"earth-search", "planetary-computer", "cdse", "static"}


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_band_names_are_common_names_and_assets_differ(name: str):
    for profile in load_catalog(name).collections.values():
        keys = [band.asset for band in profile.bands.values()]
        assert len(set(keys)) == len(keys)
        if profile.measures == "reflectance":
            assert set(profile.bands) <= set(BANDS)
            assert len(keys) == (13 if profile.level == "top-of-atmosphere" else 12)
            assert (profile.scl is None) == (profile.level == "top-of-atmosphere")


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_recorded_items_have_every_described_asset(name: str, shared: Path):
    folder, collections = RECORDED[name]
    catalog = load_catalog(name)
    for collection in collections:
        profile = catalog.profile(collection)
        files = sorted((shared / "data" / "stac_items" / folder / collection).glob("*.json"))
        assert files
        for file in files:
            item = json.loads(file.read_text())
            if set(item["assets"]) == {"thumbnail"}:
                continue  # L1C of 2017: its pixels are listed nowhere
            found = band_assets(item, profile)
            scl = {"scl"} if profile.scl is not None else set()
            assert set(found) == {*profile.bands, *scl}, file.name
            for band, key in found.items():
                described = profile.scl if band == "scl" else profile.bands[band]
                asset = item["assets"][key]
                bands = asset.get("raster:bands", [{}])[0]
                size = asset.get("gsd") or bands.get("spatial_resolution", described.resolution)
                assert size == described.resolution
                assert bands.get("nodata", profile.nodata) == (
                    0 if band == "scl" else profile.nodata
                )


@pytest.mark.parametrize(
    ("folder", "collection", "expected"),
    [
        ("earth-search-v1", "sentinel-2-l2a", "red"),
        ("planetary-computer", "sentinel-2-l2a", "B04"),
        ("cdse", "sentinel-2-l2a", "B04_10m"),
    ],
)
def test_static_profile_recognises_the_keys_of_every_provider(
    folder: str, collection: str, expected: str, shared: Path
):
    profile = shipped_catalogs()["static"].defaults
    file = sorted((shared / "data" / "stac_items" / folder / collection).glob("*.json"))[0]
    found = band_assets(json.loads(file.read_text()), profile)
    assert found["red"] == expected
    assert len(found) == 13
    assert "scl" in found


def test_folder_file_and_catalog_json_are_the_same_catalog(flanders: Path):
    by_folder = load_catalog(flanders)
    assert by_folder == load_catalog(flanders / "catalog.json")
    assert by_folder.kind == "static"
    assert by_folder.name == "flanders-2019-catalog"


def test_the_description_in_the_how_to_is_whole(tmp_path: Path):
    page = Path(__file__).parents[1] / "docs" / "how-to" / "own-catalog.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    file = tmp_path / "mine.yaml"
    file.write_text(block)
    profile = load_catalog(file).profile("sentinel-2-l2a")
    assert set(profile.bands) == {"red", "nir", "swir16"}
    assert profile.offset.baseline is not None


def test_user_yaml_is_read(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nkind: api\nendpoint: https://example.org/stac\n"
        "collections:\n  s2:\n    bands:\n      red: {asset: R, resolution: 10}\n"
    )
    catalog = load_catalog(file)
    assert catalog.profile("s2").bands["red"].asset == "R"
    assert catalog.default_collection() == "s2"


_MINE = "name: x\nkind: api\nendpoint: https://e.org\ncollections:\n"


def test_a_collection_may_be_read_otherwise_than_its_catalog():
    catalog = load_catalog("earth-search", allow_hosts=("NAS",))
    plain, paid = catalog.access_of("sentinel-2-l2a"), catalog.access_of("sentinel-2-l1c")
    assert (plain.kind, plain.gdal["AWS_REGION"]) == ("open", "us-west-2")
    assert "AWS_NO_SIGN_REQUEST" in plain.gdal
    assert paid.gdal["AWS_REQUEST_PAYER"] == "requester"
    assert paid.gdal["AWS_REGION"] == "eu-central-1"
    assert "AWS_NO_SIGN_REQUEST" not in paid.gdal
    assert plain.allow_hosts == paid.allow_hosts == ("nas",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nkind: api\n", "needs an endpoint"),
        ("name: x\nkind: api\nendpoint: https://e.org\ncolections: {}\n", "colections"),
        ("name: x\nkind: ftp\n", "kind"),
        ("- a\n- b\n", "must be a mapping"),
        ("a: [\n", "as YAML"),
        (
            "name: x\nkind: api\nendpoint: https://catalogue.dataspace.copernicus.eu/stac\n",
            "--catalog cdse",
        ),
        (
            f"{_MINE}  s1:\n    bands:\n      vv: {{asset: vv, resolution: 10}}\n",
            r"collections\.s1: .* vv are a radar's; such a collection needs 'measures: back",
        ),
        (
            f"{_MINE}  s1:\n    measures: backscatter\n"
            "    bands:\n      red: {asset: r, resolution: 10}\n",
            r"bands red are no polarisation; backscatter has hh, hv, vh, vv",
        ),
        (f"{_MINE}  s2: {{level: L1C}}\n", r"collections\.s2\.level: .*'top-of-atmosphere'"),
        (
            f"{_MINE}  s2: {{access: {{gdal: {{AWS_SECRET_ACCESS_KEY: x}}}}}}\n",
            r"collections\.s2\.access\.gdal: .*AWS_SECRET_ACCESS_KEY is a secret",
        ),
        (f"{_MINE}  s2: {{access: {{kind: sas}}}}\n", r"collections\.s2\.access: .* token_url"),
        (f"{_MINE}  s2: {{}}\npreferred: s3\n", "preferred is 's3', but the collections are s2"),
    ],
    ids=[
        "no endpoint",
        "typo",
        "kind",
        "list",
        "broken",
        "refused",
        "radar band",
        "optical band",
        "level",
        "secret",
        "sas",
        "preferred",
    ],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(CatalogError, match=message):
        load_catalog(file)


@pytest.mark.parametrize("endpoint", ["scenes", "scenes/catalog.json", "whole"])
def test_a_described_folder_lies_beside_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
):
    folder = tmp_path / "mine" / "scenes"
    folder.mkdir(parents=True)
    (folder / "catalog.json").write_text('{"type": "Catalog", "id": "own", "links": []}')
    place = str(folder) if endpoint == "whole" else endpoint
    (tmp_path / "mine" / "own.yaml").write_text(f"name: own\nkind: static\nendpoint: {place}\n")
    monkeypatch.chdir(tmp_path)

    assert load_catalog("mine/own.yaml").endpoint == str(folder / "catalog.json")


def test_a_described_folder_must_be_there(tmp_path: Path):
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nkind: static\n")
    with pytest.raises(CatalogError, match="kind static and names no endpoint"):
        load_catalog(file)
    (tmp_path / "empty").mkdir()
    file.write_text("name: own\nkind: static\nendpoint: empty\n")
    with pytest.raises(CatalogError, match=r"empty as a catalog: it holds no catalog\.json"):
        load_catalog(file)


def test_unknown_names_and_empty_folders_say_what_to_do(tmp_path: Path):
    with pytest.raises(CatalogError, match="earth-search"):
        load_catalog("no-such-catalog")
    with pytest.raises(CatalogError, match=r"no catalog\.json"):
        load_catalog(tmp_path)
    with pytest.raises(CatalogError, match="Give that folder"):
        load_catalog("static")
    (tmp_path / "catalog.json").write_text("{")
    with pytest.raises(CatalogError, match="as JSON"):
        load_catalog(tmp_path)
    (tmp_path / "catalog.json").write_text('{"type": "Feature"}')
    with pytest.raises(CatalogError, match="type is 'Feature'"):
        load_catalog(tmp_path)


def test_collections_are_chosen_only_where_there_is_one():
    with pytest.raises(CatalogError, match="sentinel-2-c1-l2a"):
        load_catalog("earth-search").default_collection()
    assert load_catalog("cdse").default_collection() == "sentinel-2-l2a"
    with pytest.raises(InputError, match="landsat"):
        load_catalog("cdse").profile("landsat")
