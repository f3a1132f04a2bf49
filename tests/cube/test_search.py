"""Search: paging of an API, static catalogs, duplicates, and what is left out and why."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from copy import deepcopy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapely.geometry import Polygon, box, mapping, shape

from stcln_geo.catalog import Catalog, ItemProperties, load_catalog
from stcln_geo.cube.granules import describe_item, drop_duplicates
from stcln_geo.cube.plan import plan_cube
from stcln_geo.cube.search import search_items, select_items
from stcln_geo.cube.selection import Selection
from stcln_geo.cube.snapshot import read_items, write_items
from stcln_geo.cube.spec import CubeSpec
from stcln_geo.cube.time_range import parse_time_range
from stcln_geo.errors import (
    CatalogError,
    InputError,
    NothingFoundError,
    SearchError,
    StclnGeoWarning,
)
from stcln_geo.region import Region


def item(number: int, **changes: Any) -> dict[str, Any]:
    """A scene near 4 E, 50 N, one day after another from 2020-01-01."""
    day = np.datetime64("2020-01-01") + number
    made = {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": f"S2A_{number:03d}",
        "collection": "s2",
        "geometry": mapping(box(4.0, 50.0, 4.2, 50.2)),
        "bbox": [4.0, 50.0, 4.2, 50.2],
        "properties": {"datetime": f"{day}T10:30:00Z", "platform": "sentinel-2a"},
        "assets": {"red": {"href": f"https://example.org/{number}/red.tif"}},
        "links": [],
    }
    made.update(changes)
    return made


class Server:
    """A minimal STAC API; `fault` makes it misbehave as real ones do."""

    def __init__(
        self,
        items: list[dict[str, Any]],
        *,
        page: int = 3,
        fault: str = "",
        raw: bytes | None = None,
    ) -> None:
        self.items, self.page, self.fault = items, page, fault
        self.searches: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, content: Any, status: int = 200, pause: int | None = None) -> None:
                body = json.dumps(content).encode()
                if raw is not None and self.command == "POST":
                    body = raw
                self.send_response(status)
                if pause is not None:
                    self.send_header("Retry-After", str(pause))
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.reply(outer.landing())

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                query = json.loads(self.rfile.read(length))
                outer.searches.append(query)
                if outer.fault == "busy" and len(outer.searches) == 2:
                    self.reply({"message": "slow down"}, 429)
                elif outer.fault == "pause" and len(outer.searches) == 1:
                    self.reply({"message": "slow down"}, 503, pause=1)
                elif outer.fault == "down":
                    self.reply({"message": "wrong"}, 400)
                else:
                    self.reply(outer.answer(query))

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def landing(self) -> dict[str, Any]:
        core = "https://api.stacspec.org/v1.0.0"
        search = {"rel": "search", "href": f"{self.url}search", "method": "POST",
                  "type": "application/geo+json"}  # fmt: skip
        return {
            "type": "Catalog", "stac_version": "1.0.0", "id": "tiny", "description": "tiny",
            "conformsTo": [f"{core}/core", f"{core}/item-search"],
            "links": [{"rel": "self", "href": self.url}, {"rel": "root", "href": self.url}, search],
        }  # fmt: skip

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        start = int(query.get("token", 0))
        found = self.items[start : start + self.page]
        following = 0 if self.fault in {"same page", "new links"} else start + self.page
        if self.fault == "page twice" and len(self.searches) == 2:
            found, following = self.items[start - self.page : start], start
            query = {**query, "again": True}
        if self.fault == "new links":
            query = {**query, "number": len(self.searches)}
        links = []
        if following < len(self.items):
            links = [{"rel": "next", "href": f"{self.url}search", "method": "POST",
                      "body": {**query, "token": following}}]  # fmt: skip
        return {"type": "FeatureCollection", "features": found, "links": links}


@pytest.fixture
def serve() -> Iterator[Any]:
    servers: list[Server] = []

    def start(*args: Any, **options: Any) -> Server:
        servers.append(Server(*args, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


REGION = Region.from_bbox((4.05, 50.05, 4.1, 50.1))


def test_all_pages_are_read_with_the_query_in_each(serve: Any):
    server = serve([item(number) for number in range(11)], page=3)
    snapshot = search_items(load_catalog(server.url), "s2", REGION, "2020-01-01/2020-12-31")
    assert [found["id"] for found in snapshot.items] == [f"S2A_{n:03d}" for n in range(11)]
    assert len(server.searches) == 4
    for query in server.searches:
        assert query["collections"] == ["s2"]
        # An hour more, in which a pass that began in time may end.
        assert query["datetime"] == "2020-01-01T00:00:00Z/2021-01-01T00:59:59.999999Z"
        asked = shape(query["intersects"])
        assert asked.contains(REGION.geometry.buffer(0.01))
        assert not asked.contains(REGION.geometry.buffer(0.1))


def test_a_busy_server_is_asked_again(serve: Any):
    server = serve([item(number) for number in range(7)], page=3, fault="busy")
    assert len(search_items(load_catalog(server.url), "s2", REGION)) == 7
    assert len(server.searches) == 4


def test_a_server_that_repeats_its_page_does_not_hang_and_is_reported(serve: Any):
    server = serve([item(number) for number in range(7)], page=3, fault="same page")
    with pytest.warns(StclnGeoWarning, match=r"repeats itself at page 2, after 3 items"):
        snapshot = search_items(load_catalog(server.url), "s2", REGION)
    assert len(snapshot) == 3
    assert len(server.searches) == 2


def test_a_refusing_server_is_named(serve: Any):
    server = serve([item(0)], fault="down")
    with pytest.raises(SearchError, match="Cannot search 'tiny'"):
        search_items(load_catalog(server.url), "s2", REGION)


def test_an_unreachable_server_is_named(serve: Any):
    with pytest.raises(CatalogError, match="Cannot fetch http://127"):
        load_catalog("http://127.0.0.1:9/")


def test_what_the_server_should_have_left_out_is_left_out(serve: Any):
    far = item(3, geometry=mapping(box(8, 50, 8.2, 50.2)), bbox=[8, 50, 8.2, 50.2])
    server = serve(
        [item(0), item(1, collection="s1"), item(2, assets={"vv": {"href": "x"}}), far, item(400)]
    )
    snapshot = search_items(load_catalog(server.url), "s2", REGION, "2020-01-01/2020-06-01")
    assert [found["id"] for found in snapshot.items] == ["S2A_000"]
    assert snapshot.seen == 5
    assert {entry.item: entry.reason for entry in snapshot.dropped} == {
        "S2A_001": "is of collection s1",
        "S2A_002": "has no asset of a Sentinel-2 band",
        "S2A_003": "lies outside the region",
        "S2A_400": "lies outside the time range",
    }


def test_nothing_found_says_what_was_seen(serve: Any):
    server = serve([item(0), item(1)])
    with pytest.raises(SearchError, match=r"2 items were seen \(2 lies outside the time range\)"):
        search_items(load_catalog(server.url), "s2", REGION, "2021-01-01/2021-06-01")


def test_an_api_needs_a_region():
    catalog = Catalog(name="x", kind="api", endpoint="http://127.0.0.1:9/")
    with pytest.raises(SearchError, match="Give --bbox or --region"):
        search_items(catalog, "s2")


def test_flanders_is_whole_and_other_sensors_are_left_out(flanders: Path):
    snapshot = search_items(load_catalog(flanders))
    assert len(snapshot) == 72
    assert snapshot.seen == 152
    assert snapshot.collection == "flanders-2019"
    assert {entry.reason for entry in snapshot.dropped} == {"has no asset of a Sentinel-2 band"}
    for found in snapshot.items:
        assert all(Path(asset["href"]).is_file() for asset in found["assets"].values())


def test_time_range_is_inclusive(flanders: Path):
    snapshot = search_items(load_catalog(flanders), time_range="2018-11-22/2018-11-27")
    assert [str(g.time)[:10] for g in snapshot.granules] == ["2018-11-22", "2018-11-27"]
    one = search_items(load_catalog(flanders), time_range="2018-11-22")
    assert len(one) == 1


@pytest.mark.parametrize("text", ["2020", "2020-01-01/x", "a/b/c", "2020-13-01/2020-12-01"])
def test_bad_time_ranges_are_named(text: str):
    with pytest.raises(InputError, match="START/END"):
        parse_time_range(text)


def test_time_range_ends_before_it_starts():
    with pytest.raises(InputError, match="ends before"):
        parse_time_range("2020-02-01/2020-01-01")
    assert parse_time_range("../2020-01-01").start is None


def test_snapshot_survives_the_disk(flanders: Path, shared: Path, tmp_path: Path):
    items = list(search_items(load_catalog(flanders)).items[:5])
    for name in ("planetary-computer", "cdse"):
        folder = shared / "data" / "stac_items" / name / "sentinel-2-l2a"
        recorded = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
        profile = load_catalog(name).profile("sentinel-2-l2a")
        write_items(tmp_path / f"{name}.parquet", recorded)
        back = {found["id"]: found for found in read_items(tmp_path / f"{name}.parquet")}
        for found in recorded:
            assert describe_item(back[found["id"]], profile) == describe_item(found, profile)
    write_items(tmp_path / "items.parquet", items)
    for before, after in zip(items, read_items(tmp_path / "items.parquet"), strict=True):
        for key in ("red", "scl"):
            for field in ("href", "proj:transform", "raster:bands"):
                assert list(after["assets"][key][field]) == list(before["assets"][key][field])
        assert after["properties"]["s2:processing_baseline"] == "02.14"


def earth_search(shared: Path, name: str) -> dict[str, Any]:
    folder = shared / "data" / "stac_items" / "earth-search-v1" / "sentinel-2-l2a"
    return json.loads((folder / f"{name}.json").read_text())


def test_duplicates_newest_baseline_wins_and_halves_stay(shared: Path):
    profile = load_catalog("earth-search").profile("sentinel-2-l2a")
    first = earth_search(shared, "S2A_32UMU_20200305_0_L2A")

    again = deepcopy(first)
    again["id"] = "S2A_32UMU_20200305_1_L2A"
    again["properties"]["s2:processing_baseline"] = "05.00"
    again["properties"]["s2:sequence"] = "1"
    strip = "S2A_OPER_MSI_L2A_DS_S2RP_20230601T000000_S20200305T103211_N05.00"
    again["properties"]["s2:datastrip_id"] = strip

    half = deepcopy(first)
    half["id"] = "S2A_32UMU_20200305_2_L2A"
    other = "S2A_OPER_MSI_L2A_DS_SGS__20200305T132101_S20200305T103642_N02.14"
    half["properties"]["s2:datastrip_id"] = other

    late = deepcopy(first)
    late["id"] = "S2A_32UMU_20200305_3_L2A"
    late["properties"]["s2:generation_time"] = "2020-03-06T13:21:01.000000Z"
    neighbour = earth_search(shared, "S2A_32UNU_20200305_0_L2A")

    everything = [first, again, half, late, neighbour]
    for order in (everything, everything[::-1]):
        kept, dropped = drop_duplicates(describe_item(one, profile) for one in order)
        assert {granule.item for granule in kept} == {again["id"], half["id"], neighbour["id"]}
        assert {entry.item: entry.reason for entry in dropped} == {
            first["id"]: f"older processing of {again['id']}",
            late["id"]: f"older processing of {again['id']}",
        }


def test_neighbours_without_a_tile_name_are_not_duplicates():
    profile = load_catalog("cdse").profile("sentinel-2-l2a")
    west, east = item(0), item(0, id="S2A_east", bbox=[4.2, 50, 4.4, 50.2])
    kept, dropped = drop_duplicates(describe_item(one, profile) for one in (west, east))
    assert len(kept) == 2
    assert not dropped


def test_orbit_and_baseline_are_read_from_the_product_name(shared: Path):
    profile = load_catalog("earth-search").profile("sentinel-2-l2a")
    granule = describe_item(earth_search(shared, "S2A_13TDE_20231008_0_L2A"), profile)
    assert (granule.orbit, granule.baseline, granule.tile) == (141, "05.09", "13TDE")
    assert granule.crs == "EPSG:32613"
    assert granule.bounds is not None
    assert granule.bounds[2] - granule.bounds[0] == 109800


def test_a_page_given_twice_is_passed_over(serve: Any):
    server = serve([item(number) for number in range(7)], page=3, fault="page twice")
    assert len(search_items(load_catalog(server.url), "s2", REGION)) == 7
    assert len(server.searches) == 4


def test_pages_that_bring_nothing_new_under_ever_new_links_end(serve: Any):
    server = serve([item(number) for number in range(7)], page=3, fault="new links")
    with pytest.warns(StclnGeoWarning, match=r"repeats itself at page 4, after 3 items"):
        assert len(search_items(load_catalog(server.url), "s2", REGION)) == 3
    assert len(server.searches) == 4


def test_the_pause_a_server_asks_for_is_kept(serve: Any):
    server = serve([item(0)], fault="pause")
    started = time.monotonic()
    assert len(search_items(load_catalog(server.url), "s2", REGION)) == 1
    assert time.monotonic() - started > 1
    assert len(server.searches) == 2


@pytest.mark.parametrize(
    ("choice", "kept"),
    [
        ({"tiles": ("31UES",)}, [0, 1]),
        ({"tiles": ("MGRS-31UES", "t9VXK")}, [0, 1, 2]),
        ({"orbits": (8,)}, [1]),
        ({"max_cloud": 20}, [0, 2]),
        ({"max_cloud": 0}, []),
        ({}, [0, 1, 2, 3]),
    ],
)
def test_static_catalogs_are_selected_from_too(choice: Any, kept: list[int]):
    properties = [
        {"grid:code": "MGRS-31UES", "sat:relative_orbit": 51, "eo:cloud_cover": 20},
        {"grid:code": "MGRS-31UES", "sat:relative_orbit": 8, "eo:cloud_cover": 20.1},
        {"s2:mgrs_tile": "09VXK", "sat:relative_orbit": 51, "eo:cloud_cover": 3},
        {"s2:mgrs_tile": "31UFS"},
    ]
    profile = load_catalog("cdse").profile("sentinel-2-l2a")
    names = {"tile": ("grid:code", "s2:mgrs_tile"), "orbit": ("sat:relative_orbit",)}
    profile = profile.model_copy(update={"properties": ItemProperties(**names)})
    found = []
    for number, more in enumerate(properties):
        made = item(number)
        made["properties"] |= more
        granule = describe_item(made, profile)
        if Selection(**choice).reason_to_drop(made, granule) is None:
            found.append(number)
    assert found == kept


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"tiles": ("31UEI",)}, "'31UEI'.*--tiles 31UES"),
        ({"orbits": (144,)}, "orbit 144.*1 to 143"),
        ({"max_cloud": 101}, "101 % cloud.*0 to 100"),
    ],
)
def test_bad_selections_are_named(choice: Any, message: str):
    with pytest.raises(InputError, match=message):
        Selection(**choice)


def test_a_region_across_the_antimeridian_finds_scenes_on_both_sides(serve: Any):
    places = [(179.6, 180.0), (-180.0, -179.7), (178.0, 179.0), (-10.0, 10.0)]
    made = [
        item(number, geometry=mapping(box(west, -17, east, -16)), bbox=[west, -17, east, -16])
        for number, (west, east) in enumerate(places)
    ]
    server = serve(made)
    region = Region.from_bbox("179.7,-16.8,-179.9,-16.5")
    found = search_items(load_catalog(server.url), "s2", region)
    assert [one["id"] for one in found.items] == ["S2A_000", "S2A_001"]
    asked = shape(server.searches[0]["intersects"])
    assert asked.geom_type == "MultiPolygon"
    assert asked.bounds[0] == -180
    assert asked.bounds[2] == 180
    # A region that only comes near it is grown over it.
    near = Region.from_bbox("179.9,-16.8,179.999,-16.5")
    found = search_items(load_catalog(server.url), "s2", near)
    assert [one["id"] for one in found.items] == ["S2A_000", "S2A_001"]


@pytest.mark.parametrize("east", [-179.51, 180.49], ids=["jumping", "beyond 180"])
def test_footprints_that_a_provider_did_not_split_at_the_antimeridian_count(
    serve: Any, east: float
):
    # Earth Search has both (earth-search#28, #39); in a plane the first lies around the Earth.
    ring = [(179.46, -18.16), (east, -18.15), (east, -17.15), (179.44, -17.17), (179.46, -18.16)]
    made = item(1, geometry=mapping(Polygon(ring)))
    server = serve([made])
    for bbox in (
        "179.6,-17.9,179.8,-17.6",
        "-179.9,-17.9,-179.8,-17.6",
        "179.9,-17.9,-179.9,-17.6",
    ):
        snapshot = search_items(load_catalog(server.url), "s2", Region.from_bbox(bbox))
        assert [one["id"] for one in snapshot.items] == ["S2A_001"]
        assert snapshot.granules[0].geometry.area == pytest.approx(1.04, abs=0.02)
    for bbox in ("100,-17.9,101,-17.6", "179.1,-17.9,179.3,-17.6", "-179.4,-17.9,-179.2,-17.6"):
        with pytest.raises(NothingFoundError, match="1 lies outside the region"):
            search_items(load_catalog(server.url), "s2", Region.from_bbox(bbox))


def set_at(content: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with one value replaced."""
    made = json.loads(json.dumps(content))
    place: Any = made
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return made


SOUND = item(
    1,
    properties={"datetime": "2020-01-02T10:30:00Z", "platform": "sentinel-2a",
                "sat:relative_orbit": 51, "proj:code": "EPSG:32631"},
    assets={"red": {"href": "https://example.org/1/red.tif", "gsd": 10, "roles": ["data"],
                    "proj:shape": [10980, 10980],
                    "proj:transform": [10, 0, 600000, 0, -10, 5600040],
                    "raster:bands": [{"scale": 0.0001, "offset": -0.1, "nodata": 0}]}},
)  # fmt: skip
ABSURD: list[Any] = [
    float("nan"), float("inf"), -1e308, 10**30, -1, "x", "9" * 400, [], [None], [float("nan")] * 6,
    [1e308] * 6, ["a"] * 6, {"a": 1}, True, "+proj=utm +nadgrids=/etc/passwd",
]  # fmt: skip
PLACES: list[tuple[Any, ...]] = [
    ("id",), ("geometry",), ("geometry", "type"), ("geometry", "coordinates"),
    ("geometry", "coordinates", 0, 0), ("properties",), ("properties", "sat:relative_orbit"),
    ("properties", "platform"), ("properties", "proj:code"), ("assets",), ("assets", "red"),
    ("assets", "red", "href"), ("assets", "red", "gsd"), ("assets", "red", "roles"),
    ("assets", "red", "proj:shape"), ("assets", "red", "proj:shape", 0),
    ("assets", "red", "proj:transform"), ("assets", "red", "proj:transform", 0),
    ("assets", "red", "raster:bands"), ("assets", "red", "raster:bands", 0, "scale"),
    ("assets", "red", "raster:bands", 0, "offset"), ("assets", "red", "raster:bands", 0, "nodata"),
    ("links",), ("bbox",),
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: ".".join(map(str, place)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_one_absurd_item_does_not_keep_the_others_from_being_planned(
    place: tuple[Any, ...], tmp_path: Path, flanders: Path
):
    api = load_catalog(flanders).model_copy(
        update={"kind": "api", "endpoint": "https://example.org/"}
    )
    good = set_at(SOUND, ("id",), "good") | {"properties": {**SOUND["properties"]}}
    good["properties"]["datetime"] = "2020-01-05T10:30:00Z"
    region = Region.from_bbox((4.42, 50.53, 4.43, 50.54))
    for value in ABSURD:
        if place[-1] == "href" and isinstance(value, str):
            continue  # an address that a build must not read stops it
        snapshot = select_items([set_at(SOUND, place, value), good], api, region=None)
        ids = [one["id"] for one in snapshot.items]
        assert "good" in ids
        for dropped in snapshot.dropped:
            assert dropped.reason.startswith("is malformed") or "band" in dropped.reason
        # What is kept is sound enough for all that follows.
        write_items(tmp_path / "items.parquet", snapshot.items)
        assert [one["id"] for one in read_items(tmp_path / "items.parquet")] == ids
        plan_cube(snapshot, region, CubeSpec(bands=("red",), keep_scl=False))


@pytest.mark.parametrize(
    "answer",
    [b"<html>Please log in</html>", b"[]", b"3", b"\xff\xfe", b"[" * 100_000,
     b'{"features": 5}', b'{"features": [1, null]}', b'{"features": [{"id": "a"}], "links": 5}',
     b'{"features": [{"id": "a"}], "links": [3]}'],
    ids=lambda answer: answer[:30].decode(errors="replace"),
)  # fmt: skip
def test_an_answer_that_is_none_is_a_failed_search(serve: Any, answer: bytes):
    server = serve([], raw=answer)
    with pytest.raises(SearchError, match=r"Cannot search 'tiny' at http"):
        search_items(load_catalog(server.url), "s2", REGION, "2020-01-01/2020-12-31")


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "{", "3"])
def test_a_document_that_is_none_is_named(tmp_path: Path, text: str):
    (tmp_path / "catalog.json").write_text(text)
    with pytest.raises(CatalogError, match=r"catalog\.json"):
        load_catalog(tmp_path)


def test_a_static_catalog_whose_links_have_no_end_is_refused(tmp_path: Path):
    # The folder holds itself: each name of the same catalog is a new one.
    (tmp_path / "round").symlink_to(tmp_path, target_is_directory=True)
    links = [{"rel": "child", "href": "./round/catalog.json"}]
    document = {"type": "Catalog", "id": "x", "links": links}
    (tmp_path / "catalog.json").write_text(json.dumps(document))
    with pytest.raises(CatalogError, match="more than 24 catalogs below its root"):
        search_items(load_catalog(tmp_path))


def test_a_static_catalog_may_hold_what_is_no_link_or_item(tmp_path: Path):
    links = [3, None, {"rel": "item"}, {"rel": "item", "href": 5}]
    texts = {"a": "{}", "b": '{"assets": 5}', "c": '{"assets": {"red": 5}, "id": "c"}',
             "d": json.dumps(item(1))}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
        links.append({"rel": "item", "href": f"./{name}.json"})
    document = {"type": "Catalog", "id": "x", "links": links}
    (tmp_path / "catalog.json").write_text(json.dumps(document))
    snapshot = search_items(load_catalog(tmp_path))
    assert [one["id"] for one in snapshot.items] == ["S2A_001"]
    assert snapshot.seen == 3  # two without an id are one


@pytest.mark.parametrize(
    ("one", "other"),
    [(1, "x"), ([1], "x"), (1, {"a": 1}), ({"a": 1}, {"a": "x"}), ("\ud800", "x"), (10**30, 1),
     (None, 3)],
    ids=str,
)  # fmt: skip
def test_fields_of_several_types_survive_the_disk(tmp_path: Path, one: Any, other: Any):
    items = [item(1), item(2)]
    for made, value in zip(items, (one, other), strict=True):
        made["properties"] |= {"note": value, "created": "yesterday"}
        made["assets"]["red"]["note"] = value
        made["other:field"] = value
    del items[1]["bbox"]
    write_items(tmp_path / "items.parquet", items, [{"url": "https://example.org"}])
    back = read_items(tmp_path / "items.parquet")
    assert [made["id"] for made in back] == ["S2A_001", "S2A_002"]
    assert [made["assets"]["red"]["href"] for made in back] == [
        made["assets"]["red"]["href"] for made in items
    ]
    for made in back:
        assert made["properties"]["datetime"].startswith("2020-01-0")
        assert made["bbox"] == [4.0, 50.0, 4.2, 50.2]
    if not isinstance(one, type(None)):
        assert back[0]["properties"]["note"] == json.dumps(one).strip('"')
