"""Catalogs: the shipped descriptions fit real items, and mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stcln_geo.catalog import load_catalog, shipped_catalogs
from stcln_geo.cube.contract import BANDS
from stcln_geo.cube.granules import band_assets
from stcln_geo.errors import CatalogError, InputError

RECORDED = {
    "earth-search": ("earth-search-v1", ["sentinel-2-l2a", "sentinel-2-c1-l2a"]),
    "planetary-computer": ("planetary-computer", ["sentinel-2-l2a"]),
    "cdse": ("cdse", ["sentinel-2-l2a"]),
}


def test_shipped_names_are_the_providers():
    assert set(shipped_catalogs()) == {"earth-search", "planetary-computer", "cdse", "static"}


@pytest.mark.parametrize("name", sorted(RECORDED))
def test_band_names_are_common_names_and_assets_differ(name: str):
    for profile in load_catalog(name).collections.values():
        assert set(profile.bands) <= set(BANDS)
        keys = [band.asset for band in profile.bands.values()]
        assert len(set(keys)) == len(keys) >= 12


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
            found = band_assets(item, profile)
            assert set(found) == {*profile.bands, "scl"}, file.name
            for band, key in found.items():
                described = profile.scl if band == "scl" else profile.bands[band]
                assert item["assets"][key].get("gsd", described.resolution) == described.resolution


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


def test_user_yaml_is_read(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "name: mine\nkind: api\nendpoint: https://example.org/stac\n"
        "collections:\n  s2:\n    bands:\n      red: {asset: R, resolution: 10}\n"
    )
    catalog = load_catalog(file)
    assert catalog.profile("s2").bands["red"].asset == "R"
    assert catalog.default_collection() == "s2"


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
    ],
    ids=["no endpoint", "typo", "kind", "list", "broken", "refused"],
)
def test_bad_yaml_is_named(tmp_path: Path, text: str, message: str):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(CatalogError, match=message):
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
