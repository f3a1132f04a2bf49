"""Offsets: the rule chosen for real items, and the arithmetic on planted numbers."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stcln_geo.catalog import (
    BaselineRule,
    CollectionProfile,
    OffsetRule,
    load_catalog,
    shipped_catalogs,
)
from stcln_geo.cube.contract import FILL
from stcln_geo.cube.granules import band_assets, describe_item
from stcln_geo.cube.radiometry import Radiometry, harmonise, resolve_offset

CASES = [
    # Flag true although -0.1 is declared: the pixels already lack the offset.
    ("earth-search", "earth-search-v1/sentinel-2-l2a/S2A_13TDE_20231008_0_L2A", "red", 0,
     "already applied"),
    ("earth-search", "earth-search-v1/sentinel-2-l2a/S2B_24MUV_20250731_0_L2A", "red", 0,
     "already applied"),
    # Flag false before baseline 04.00: 0 is declared.
    ("earth-search", "earth-search-v1/sentinel-2-l2a/S2A_32UMU_20200305_0_L2A", "red", 0,
     "declared"),
    # Collection 1 keeps raw numbers and has no flag.
    ("earth-search", "earth-search-v1/sentinel-2-c1-l2a/S2B_T20EPT_20250731T131905_L2A", "nir08",
     -1000, "declared"),
    ("planetary-computer",
     "planetary-computer/sentinel-2-l2a/S2B_MSIL2A_20240419T095549_R122_T46XES_20240419T123824",
     "B04", -1000, "baseline"),
    ("planetary-computer",
     "planetary-computer/sentinel-2-l2a/S2A_MSIL2A_20190101T000001_R116_T58UFE_20201007T214651",
     "B04", 0, "none"),
    ("cdse", "cdse/sentinel-2-l2a/S2A_MSIL2A_20200301T090901_N0500_R050_T35UPU_20230630T033416",
     "B04_10m", -1000, "declared"),
    ("cdse", "cdse/sentinel-2-l2a/S2C_MSIL2A_20250330T100051_N0511_R122_T33UWP_20250330T145914",
     "B8A_20m", -1000, "declared"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "file", "key", "dn", "source"), CASES)
def test_recorded_items_resolve(name: str, file: str, key: str, dn: int, source: str, shared: Path):
    item = json.loads((shared / "data" / "stac_items" / f"{file}.json").read_text())
    profile = load_catalog(name).profile(item["collection"])
    baseline = describe_item(item, profile).baseline
    found = resolve_offset(item, key, profile, baseline=baseline)
    assert (found.offset, found.source, found.factor, found.nodata) == (dn, source, 1.0, 0)
    given = resolve_offset(item, key, profile, baseline=baseline, override=-0.05)
    assert (given.offset, given.source) == (-500, "given by the user")


def expected_offsets() -> list[dict[str, str]]:
    with (Path(__file__).parent / "expected_offsets.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_expected_table_names_every_recorded_item(shared: Path):
    recorded = {file.stem for file in (shared / "data" / "stac_items").glob("*/*/*.json")}
    assert {row["item"] for row in expected_offsets()} == recorded
    assert len(expected_offsets()) == len(recorded)


@pytest.mark.parametrize("row", expected_offsets(), ids=lambda row: row["item"])
def test_recorded_items_meet_the_expected_table(row: dict[str, str], shared: Path):
    name = f"*/{row['collection']}/{row['item']}.json"
    item = json.loads(next((shared / "data" / "stac_items").glob(name)).read_text())
    if row["catalog"] == "static":
        profile = shipped_catalogs()["static"].defaults
    else:
        catalog = load_catalog(row["catalog"])
        # Collections that are not described have no reflectance whatever the rules are.
        known = row["collection"] in catalog.collections
        profile = catalog.profile(row["collection"] if known else "sentinel-2-l2a")
        if profile.measures == "backscatter":
            assert row["reflectance_dn"] == ""
            return
    baseline = describe_item(item, profile).baseline
    assets = band_assets(item, profile)
    reflectance = [key for band, key in assets.items() if band != "scl"]
    assert bool(reflectance) == bool(row["reflectance_dn"])
    for key in reflectance:
        found = resolve_offset(item, key, profile, baseline=baseline)
        assert found.offset == int(row["reflectance_dn"]), key
    # All resolutions and twins too, with or without an override.
    for key in item["assets"]:
        if re.match("scl|aot|wvp", key, re.IGNORECASE):
            for override in (None, -0.1):
                found = resolve_offset(item, key, profile, baseline=baseline, override=override)
                assert found.offset == int(row["other_dn"]), key


def test_the_first_rule_that_holds_decides():
    """All rules on or off, and what they ask for there or not: 2^7 cases."""
    for rules in itertools.product((False, True), repeat=7):
        given, flagged, flag, declared, number, since, new = rules
        rule = OffsetRule(
            applied_property="applied" if flagged else None,
            declared=declared,
            baseline=BaselineRule(since="04.00", offset=-0.3) if since else None,
        )
        asset = {"raster:bands": [{"offset": -0.2} if number else {}]}
        item = {"properties": {"applied": flag}, "assets": {"B04": asset}}
        found = resolve_offset(
            item, "B04", CollectionProfile(offset=rule), override=-0.1 if given else None,
            baseline="04.00" if new else "03.01",
        )  # fmt: skip
        holding = [
            (-1000, "given by the user", given),
            (0, "already applied", flagged and flag),
            (-2000, "declared", declared and number),
            (-3000, "baseline", since and new),
            (0, "none", True),
        ]
        assert (found.offset, found.source) == next(one[:2] for one in holding if one[2]), rules
        bare = resolve_offset({}, "B04", CollectionProfile(offset=rule), baseline="03.01")
        assert bare.offset == 0


@pytest.mark.parametrize(
    ("baseline", "dn"),
    [("03.01", 0), ("04.00", -1000), ("05.09", -1000), ("05.10", -1000), ("10.00", -1000), ("", 0)],
)
def test_baselines_are_compared_as_versions(baseline: str, dn: int):
    rule = OffsetRule(baseline=BaselineRule(since="04.00", offset=-0.1))
    profile = CollectionProfile(offset=rule)
    assert resolve_offset({}, "red", profile, baseline=baseline).offset == dn


def test_values_shift_keep_negatives_and_are_cut():
    raw = np.array([[0, 1, 999, 1000, 1001, 33767, 33768, 40000, 65535]], dtype=np.uint16)
    values, usable = harmonise(raw, Radiometry(offset=-1000))
    np.testing.assert_array_equal(values, [[FILL, -999, -1, 0, 1, 32767, 32767, 32767, 32767]])
    np.testing.assert_array_equal(usable, [[False] + [True] * 5 + [False] * 3])
    assert values.dtype == np.int16


def test_other_scales_are_converted():
    raw = np.array([[0, 1000, 20000]], dtype=np.uint16)
    values, usable = harmonise(raw, Radiometry(offset=-2000, factor=0.275))
    np.testing.assert_array_equal(values, [[FILL, -1725, 3500]])
    np.testing.assert_array_equal(usable, [[False, True, True]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [1.0, 10_000.0])
def test_floats_that_are_not_finite_are_no_data(dtype: str, factor: float):
    reflectance = np.array([[np.nan, np.inf, -np.inf, 0, 0.30004, 0.30006, 9.9]])
    raw = (reflectance * 10_000 / factor).astype(dtype)
    values, usable = harmonise(raw, Radiometry(offset=-1000, factor=factor))
    np.testing.assert_array_equal(values, [[FILL, FILL, FILL, FILL, 2000, 2001, 32767]])
    np.testing.assert_array_equal(usable, [[False] * 4 + [True, True, False]])


@pytest.mark.parametrize("offset", [0, -1000, -32768, 300])
@pytest.mark.parametrize("factor", [1.0, 2.0, 0.275])
@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_every_number_is_scaled_shifted_and_cut_by_one_rule(dtype: str, factor: float, offset: int):
    """Also where all numbers fit into 16 bits, and in an empty window."""
    generator = np.random.default_rng(5)
    low, high = (-32768, 32767) if dtype == "int16" else (0, 65535)
    wide = np.r_[low, 0, 7, 32767, high, generator.integers(low, high, 300)].astype(dtype)
    for raw in (wide[:, None], wide[np.abs(wide) < 9000][None], wide[:0][None]):
        values, usable = harmonise(raw, Radiometry(offset=offset, factor=factor, nodata=7))
        for source, value, good in zip(raw.flat, values.flat, usable.flat, strict=True):
            exact = round(float(source) * factor + offset)
            expected = FILL if source == 7 else min(max(exact, FILL + 1), 32767)
            assert (value, good) == (expected, bool(source != 7 and FILL < exact <= 32767))


BAND = {"scale": 2e-4, "offset": 0.01, "nodata": 7}
PREFIXED = {"raster:scale": 2e-4, "raster:offset": 0.01}


@pytest.mark.parametrize(
    "asset",
    [
        {"raster:bands": [BAND]},
        {"bands": [{**PREFIXED, "nodata": 7}]},
        {"bands": [PREFIXED], "nodata": 7},
        {**PREFIXED, "bands": [{"name": "B04"}], "nodata": 7},
        {**PREFIXED, "bands": ["B04"], "nodata": 7},
    ],
    ids=["STAC 1.0", "1.1 in the band", "1.1 mixed", "1.1 in the asset", "names for bands"],
)
def test_declared_scale_and_nodata_are_used(asset: dict[str, Any]):
    profile = CollectionProfile(offset=OffsetRule(declared=True))
    found = resolve_offset({"assets": {"red": asset}}, "red", profile)
    assert (found.factor, found.offset, found.nodata) == (2.0, 100, 7)
