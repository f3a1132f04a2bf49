"""Planted scenes on both sides of a zone line, and six sites among them, in two seasons."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shapely.geometry import shape

from stcln_geo.archive.create import create_archive
from stcln_geo.archive.plan import ArchivePlan, plan_archive
from stcln_geo.archive.sites import Site, place_site
from stcln_geo.archive.spec import ArchiveSpec

from ..cube.conftest import Archive

WEST, EAST = "EPSG:32631", "EPSG:32632"
ORIGINS = {WEST: (711600, 5599320), EAST: (286820, 5599260)}
"""Both scenes cross the line between the zones, 6 E."""

SEASONS = ("2018-09-01", "2019-09-01")
DAYS = {
    WEST: ("2018-10-01", "2019-03-02", "2019-10-05"),
    EAST: ("2018-10-01", "2019-03-07", "2019-06-01", "2020-04-01"),
}
PLACES = {
    "w1": (5.9915, 50.4990), "w2": (5.9955, 50.4965), "w3": (5.9995, 50.4999),
    "e1": (6.0015, 50.4965), "e2": (6.0060, 50.4990), "e3": (6.0085, 50.4960),
}  # fmt: skip
SIZE = 32


def plant(folder: Path) -> Archive:
    """Scenes of 166 x 166 px; that of 2019-03-02 has only the south, with w2 alone of its zone."""
    archive = Archive(folder)
    rng = np.random.default_rng(3)
    for zone, days in DAYS.items():
        for day in days:
            scl = rng.choice([4, 5], (83, 83)).astype("uint8")
            row, col = rng.integers(5, 60, 2)
            scl[row : row + 9, col : col + 14] = 9
            top, side = ORIGINS[zone][1], 83
            if day == "2019-03-02":
                top, side, scl = top - 1140, 26, scl[:26]
            archive.add(
                f"S{zone[-2:]}_{day}", f"{day}T10:50:00", crs=zone, scl=scl,
                origin=(ORIGINS[zone][0], top),
                pixels={
                    "red": rng.integers(200, 4000, (2 * side, 166)).astype("uint16"),
                    "swir16": rng.integers(200, 5000, (side, 83)).astype("uint16"),
                },
                properties={"grid:code": f"MGRS-{zone[-2:]}UFS"},
            )  # fmt: skip
    return archive


def make_spec(catalog: str, **choices: Any) -> ArchiveSpec:
    return ArchiveSpec(**{"catalog": catalog, "years": (2018, 2019), "size": SIZE, **choices})


def make_sites(size: int = SIZE, names: tuple[str, ...] = tuple(PLACES)) -> list[Site]:
    return [place_site(name, *PLACES[name], size=size) for name in names]


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Archive:
    """Scenes that no test changes."""
    return plant(tmp_path_factory.mktemp("planted") / "catalog")


SMALL_SHARDS = ("stcln_geo.cube.stack._SHARD_BYTES", 40_000)


@pytest.fixture
def two_per_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make shards so small that two sites fill one: a stack has several."""
    monkeypatch.setattr(*SMALL_SHARDS)


@pytest.fixture(scope="session")
def whole_plan(planted: Archive, tmp_path_factory: pytest.TempPathFactory) -> ArchivePlan:
    """An archive built without disturbance; no test changes it."""
    path = tmp_path_factory.mktemp("whole") / "archive"
    plan = plan_archive(make_sites(), make_spec(planted.location), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*SMALL_SHARDS)
        create_archive(plan)
    return plan


class Server:
    """A STAC API over planted scenes, with their files; counts what it is asked for."""

    def __init__(self, archive: Archive) -> None:
        self.searches: list[dict[str, Any]] = []
        self.requests: Counter[str] = Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Accept-Ranges", "bytes")
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def do_POST(self) -> None:
                query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.searches.append(query)
                self.reply(json.dumps(outer.answer(query)).encode())

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                outer.requests[self.path] += 1
                if self.path == "/":
                    self.reply(json.dumps(outer.landing()).encode())
                    return
                file = archive.folder / self.path.lstrip("/")
                if not file.is_file():
                    self.reply(b"", 404)
                    return
                body = file.read_bytes()
                asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if asked is None:
                    self.reply(body)
                    return
                first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
                told = f"bytes {first}-{last}/{len(body)}"
                self.reply(body[first : last + 1], 206, Content_Range=told)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/"
        self.items = [self._absolute(item) for item in archive.items]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def _absolute(self, item: dict[str, Any]) -> dict[str, Any]:
        assets = {
            key: {**asset, "href": self.url + asset["href"].removeprefix("./")}
            for key, asset in item["assets"].items()
        }
        return {**item, "assets": assets}

    def landing(self) -> dict[str, Any]:
        core = "https://api.stacspec.org/v1.0.0"
        search = {"rel": "search", "href": f"{self.url}search", "method": "POST",
                  "type": "application/geo+json"}  # fmt: skip
        return {
            "type": "Catalog", "stac_version": "1.0.0", "id": "planted", "description": "planted",
            "conformsTo": [f"{core}/core", f"{core}/item-search"],
            "links": [{"rel": "self", "href": self.url}, {"rel": "root", "href": self.url}, search],
        }  # fmt: skip

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        start, end = query["datetime"].split("/")
        area = shape(query["intersects"])
        found = [
            item
            for item in self.items
            if start <= item["properties"]["datetime"] <= end
            and shape(item["geometry"]).intersects(area)
        ]
        return {"type": "FeatureCollection", "features": found, "links": []}


@pytest.fixture
def server(planted: Archive) -> Iterator[Server]:
    started = Server(planted)
    yield started
    started.http.shutdown()
    started.http.server_close()
