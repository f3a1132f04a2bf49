"""A STAC API with its assets, in the form of three providers, that can be told to misbehave.

Items have the keys, properties and raster declarations of Earth Search, Planetary Computer and
CDSE, over small planted COGs. What goes wrong, and where, follows from a seed. Every fault passes,
unless an asset is told to stay lost.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import rasterio
from pyproj import Transformer
from rasterio.transform import from_origin

from stcln_geo.catalog import Access, Catalog, shipped_catalogs

Provider = Literal["earth-search", "planetary-computer", "cdse"]
PROVIDERS: tuple[Provider, ...] = ("earth-search", "planetary-computer", "cdse")
FAULTS = ("429", "503", "hang", "cut", "corrupt", "expired")

ORIGIN = (600000, 5600040)
CRS = "EPSG:32631"
SIDE = 60
"""Pixels of 20 m."""
BANDS = {"blue": "B02", "red": "B04", "nir": "B08", "swir16": "B11"}


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A scene: what its pixels are (cube numbers), and how its provider stores it."""

    day: str
    tile: str = "31UFS"
    orbit: int = 51
    baseline: str = "05.09"
    generation: str = "20210101T120000"
    sensing: str = "T104500"
    seed: int = 0
    cloud: float = 10.0
    applied: bool = False
    """Earth Search: the offset was removed from the pixels, although it is declared."""

    @property
    def raw_offset(self) -> int:
        return 0 if self.applied or self.baseline < "04.00" else 1000

    @property
    def product(self) -> str:
        date = self.day.replace("-", "")
        return (
            f"S2A_MSIL2A_{date}{self.sensing}_N{self.baseline.replace('.', '')}_R{self.orbit:03d}"
            f"_T{self.tile}_{self.generation}"
        )

    def pixels(self, band: str) -> np.ndarray:
        """Cube numbers of a band; some negative, some missing (0 in the file)."""
        rng = np.random.default_rng([self.seed, sorted(BANDS).index(band)])
        side = SIDE if band == "swir16" else 2 * SIDE
        values = rng.integers(200, 4000, (side, side))
        values[5:7, 5:9] = -50
        return values

    def scl(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 99])
        classes = rng.choice([4, 5, 6], size=(SIDE, SIDE)).astype("uint8")
        classes[20:26, 30:40] = 9
        return classes


@dataclass(kw_only=True)
class Asked:
    """What the server was asked for."""

    searches: list[dict[str, Any]] = field(default_factory=list)
    assets: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    pauses_broken: int = 0
    """Requests for an asset that came before the pause it had asked for was over."""
    most_at_once: int = 0


class HostileStac:
    """Serves planted scenes; with a seed, not without trouble."""

    def __init__(
        self,
        folder: Path,
        provider: Provider,
        scenes: list[Planted],
        *,
        seed: int | None = None,
        token_seconds: float = 3600,
        lost: str | None = None,
        page: int = 2,
    ) -> None:
        self.folder, self.provider, self.page = folder, provider, page
        self.asked = Asked()
        self.lost = lost
        self.token_seconds = token_seconds
        self.slow_seconds = 0.0
        self.redirect_to: str | None = None
        self.redirect_page: tuple[int, str] | None = None
        """Number of a search, counted from 1, and the address that it is sent on to."""
        self._seed = seed
        self._hostile = seed is not None
        self._waiting: dict[str, list[str]] = {}
        self._busy_until: dict[str, float] = {}
        self._page_repeated = False
        self._search_faults = ["429", "drop", "503"] if self._hostile else []
        self._running = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.items = [self._write(scene) for scene in scenes]

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def collection(self) -> str:
        return "sentinel-2-l2a"

    def catalog(self, **access: Any) -> Catalog:
        """The shipped description of the provider, at this server."""
        shipped = shipped_catalogs()[self.provider]
        options = {"GDAL_HTTP_TIMEOUT": "1", "GDAL_HTTP_CONNECTTIMEOUT": "1"}
        if self.provider == "planetary-computer":
            access = {
                "kind": "sas",
                "token_url": self.url + "/token/{account}/{container}",
                "sign_hosts": ("127.0.0.1",),
                **access,
            }
        return shipped.model_copy(
            update={"endpoint": f"{self.url}/", "access": Access(gdal=options, **access)}
        )

    # --- scenes ---

    def _write(self, scene: Planted) -> dict[str, Any]:
        assets: dict[str, Any] = {}
        for band, number in BANDS.items():
            values = scene.pixels(band)
            raw = (values + scene.raw_offset).clip(1).astype("uint16")
            raw[-3:] = 0
            size = 20 if band == "swir16" else 10
            assets |= self._asset(scene, band, number, raw, size)
        assets |= self._asset(scene, "scl", "SCL", scene.scl(), 20)
        if self.provider == "cdse":
            aot = np.full((SIDE, SIDE), 200, "uint16")
            assets |= self._asset(scene, "aot", "AOT", aot, 20)
        left, top = ORIGIN
        bounds = (left, top - 20 * SIDE, left + 20 * SIDE, top)
        west, south, east, north = Transformer.from_crs(
            CRS, "EPSG:4326", always_xy=True
        ).transform_bounds(*bounds, densify_pts=21)
        ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
        return {
            "type": "Feature",
            "stac_version": "1.1.0" if self.provider == "cdse" else "1.0.0",
            "id": self.item_id(scene),
            "collection": self.collection,
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "bbox": [west, south, east, north],
            "properties": self._properties(scene),
            "assets": assets,
            "links": [{"rel": "self", "href": f"{self.url}/items/{self.item_id(scene)}"}],
        }

    def item_id(self, scene: Planted) -> str:
        if self.provider == "earth-search":
            return f"S2A_{scene.tile}_{scene.day.replace('-', '')}_{scene.seed}_L2A"
        if self.provider == "planetary-computer":
            return re.sub(r"_N\d{4}", "", scene.product)
        return scene.product

    def key(self, band: str) -> str:
        number = {**BANDS, "scl": "SCL", "aot": "AOT"}[band]
        if self.provider == "earth-search":
            return band
        if self.provider == "planetary-computer":
            return number
        return f"{number}_{20 if band in {'swir16', 'scl', 'aot'} else 10}m"

    def _asset(
        self, scene: Planted, band: str, number: str, array: np.ndarray, size: int
    ) -> dict[str, Any]:
        path = f"box/{self.item_id(scene)}/{number}_{size}m.tif"
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(
            file, "w", driver="COG", dtype=array.dtype.name, count=1, height=array.shape[0],
            width=array.shape[1], crs=CRS, nodata=0, compress="deflate", blocksize=128,
            overview_resampling="nearest", transform=from_origin(*ORIGIN, size, size),
        ) as target:  # fmt: skip
            target.write(array, 1)
        entry: dict[str, Any] = {
            "href": f"{self.url}/{path}",
            "gsd": size,
            "roles": ["data", "reflectance", "sampling:original"],
            "type": "image/tiff; application=geotiff; profile=cloud-optimized",
            "proj:shape": list(array.shape),
            "proj:transform": [size, 0, ORIGIN[0], 0, -size, ORIGIN[1]],
        }
        offset = -0.1 if scene.baseline >= "04.00" else 0
        if self.provider == "earth-search":
            band_entry: dict[str, Any] = {"nodata": 0, "data_type": array.dtype.name}
            if band != "scl":
                band_entry |= {"scale": 0.0001, "offset": offset}
            entry["raster:bands"] = [band_entry]
        elif self.provider == "cdse":
            entry |= {"proj:code": CRS, "nodata": 0, "data_type": array.dtype.name}
            if band != "scl":
                entry |= {"raster:scale": 0.0001, "raster:offset": offset}
        return {self.key(band): entry}

    def _properties(self, scene: Planted) -> dict[str, Any]:
        hour, minute, second = (scene.sensing[i : i + 2] for i in (1, 3, 5))
        date = scene.day.replace("-", "")
        strip = f"S2A_OPER_MSI_L2A_DS_2APS_{scene.generation}_S{date}{scene.sensing}"
        strip += f"_N{scene.baseline}"
        take = f"GS2A_{date}{scene.sensing}_043324_N{scene.baseline}"
        made = datetime.strptime(scene.generation, "%Y%m%dT%H%M%S").isoformat() + "Z"
        common = {
            "datetime": f"{scene.day}T{hour}:{minute}:{second}.024000Z",
            "eo:cloud_cover": scene.cloud,
            "constellation": "sentinel-2",
        }
        if self.provider == "earth-search":
            return common | {
                "platform": "sentinel-2a", "proj:epsg": 32631, "grid:code": f"MGRS-{scene.tile}",
                "s2:processing_baseline": scene.baseline, "s2:generation_time": made,
                "s2:product_uri": f"{scene.product}.SAFE", "s2:datatake_id": take,
                "s2:datastrip_id": strip, "s2:sequence": str(scene.seed),
                "earthsearch:boa_offset_applied": scene.applied,
            }  # fmt: skip
        if self.provider == "planetary-computer":
            return common | {
                "platform": "Sentinel-2A", "proj:epsg": 32631, "s2:mgrs_tile": scene.tile,
                "s2:processing_baseline": scene.baseline, "s2:generation_time": made,
                "s2:product_uri": f"{scene.product}.SAFE", "s2:datatake_id": take,
                "s2:datastrip_id": strip, "sat:relative_orbit": scene.orbit,
            }  # fmt: skip
        return common | {
            "platform": "sentinel-2a", "grid:code": f"MGRS-{scene.tile}",
            "processing:version": scene.baseline, "processing:datetime": made,
            "eopf:datatake_id": take, "eopf:datastrip_id": strip,
            "sat:relative_orbit": scene.orbit,
            # One recorded answer has this where a list belongs.
            "storage:refs": "\U000112d5F",
        }  # fmt: skip

    # --- faults ---

    def fault(self, path: str) -> str | None:
        """The next thing to go wrong with an asset; each goes wrong at most twice."""
        with self._lock:
            if path not in self._waiting:
                kinds = [kind for kind in FAULTS if kind != "expired" or self.signed]
                # A silent server costs a second each time.
                weights = [3, 0.5, 2, 0.3, 2, 2, 2][: len(kinds) + 1]
                # By path, so that the order of the requests does not matter.
                chance = random.Random(f"{self._seed} {path}")
                chosen = chance.choices([None, *kinds], weights, k=2)
                self._waiting[path] = [kind for kind in chosen if kind is not None]
                self.asked.faults.update(self._waiting[path])
            return self._waiting[path].pop() if self._waiting[path] else None

    @property
    def signed(self) -> bool:
        return self.provider == "planetary-computer"

    def enter(self) -> None:
        with self._lock:
            self._running += 1
            self.asked.most_at_once = max(self.asked.most_at_once, self._running)

    def leave(self) -> None:
        with self._lock:
            self._running -= 1

    def signature(self) -> tuple[str, float]:
        moment = int((time.time() + self.token_seconds) * 1000)
        return f"se={moment}&sig=SECRET{moment}", moment / 1000

    def may_read(self, query: str) -> bool:
        given = dict(parse_qsl(query))
        moment = int(given.get("se", 0))
        return given.get("sig") == f"SECRET{moment}" and time.time() * 1000 < moment

    # --- search ---

    def search_fault(self) -> str | None:
        with self._lock:
            return self._search_faults.pop() if self._search_faults else None

    def landing(self) -> dict[str, Any]:
        core = "https://api.stacspec.org/v1.0.0"
        language = "http://www.opengis.net/spec/cql2/1.0/conf/cql2-json"
        return {
            "type": "Catalog", "stac_version": "1.0.0", "id": self.provider, "description": "x",
            "conformsTo": [f"{core}/core", f"{core}/item-search", f"{core}/item-search#query",
                           f"{core}/item-search#filter", language],
            "links": [
                {"rel": "self", "href": f"{self.url}/"}, {"rel": "root", "href": f"{self.url}/"},
                {"rel": "search", "href": f"{self.url}/search", "method": "POST",
                 "type": "application/geo+json"},
            ],
        }  # fmt: skip

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        """A page; a hostile server gives one page twice, and ignores filters."""
        start = int(query.get("token", 0))
        size = min(self.page, int(query.get("limit", self.page)))
        found = self.items[start : start + size]
        following = start + size
        if self._hostile and start and not self._page_repeated:
            self._page_repeated = True
            found = self.items[start - size : start]
            following = start
        links = []
        if following < len(self.items):
            body = {**query, "token": following, "again": self._page_repeated}
            link = {"rel": "next", "href": f"{self.url}/search", "method": "POST", "body": body}
            links = [link]
        return {"type": "FeatureCollection", "features": found, "links": links}


def _handler(server: HostileStac) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle()

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def reply_json(self, content: Any) -> None:
            self.reply(json.dumps(content).encode(), Content_Type="application/json")

        def do_POST(self) -> None:
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.searches.append(query)
            number, target = server.redirect_page or (0, "")
            if number == len(server.asked.searches):
                self.reply(b"", 307, Location=target)
                return
            match server.search_fault():
                case "429":
                    self.reply(b"{}", 429, Retry_After="1")
                case "503":
                    self.reply(b"{}", 503)
                case "drop":
                    self.close_connection = True
                case _:
                    self.reply_json(server.answer(query))

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            if parts.path == "/":
                self.reply_json(server.landing())
            elif parts.path.startswith("/token/"):
                server.asked.tokens += 1
                token, expiry = server.signature()
                moment = datetime.fromtimestamp(expiry, UTC).isoformat()
                self.reply_json({"token": token, "msft:expiry": moment})
            else:
                self._asset(parts.path, parts.query)

        def _asset(self, path: str, query: str) -> None:
            server.asked.assets[path] += 1
            server.enter()
            time.sleep(server.slow_seconds)
            # Before the answer: who has it may ask again at once.
            server.leave()
            file = server.folder / path.lstrip("/")
            if not file.is_file() or path.endswith(server.lost or "\0"):
                self.reply(b"", 404)
                return
            if server.redirect_to is not None:
                self.reply(b"", 302, Location=server.redirect_to)
                return
            if server.signed and not server.may_read(query):
                self.reply(b"AuthenticationFailed", 403)
                return
            # Nothing goes wrong with the one byte asked for before a read or after a refusal.
            probing = self.headers.get("Range") == "bytes=0-0"
            left = server._busy_until.get(path, 0.0) - time.monotonic()
            # GDAL may ask once more while it opens the file; a new attempt comes later than that.
            if not probing and 0.05 < left < 0.7:
                server.asked.pauses_broken += 1
            fault = server.fault(path) if server._hostile and not probing else None
            self._answer(file.read_bytes(), path, fault)

        def _answer(self, content: bytes, path: str, fault: str | None) -> None:
            if fault == "429" or time.monotonic() < server._busy_until.get(path, 0.0):
                server._busy_until.setdefault(path, time.monotonic() + 1)
                self.reply(b"", 429, Retry_After="1")
            elif fault == "503":
                self.reply(b"", 503)
            elif fault == "expired":
                self.reply(b"AuthenticationFailed", 403)
            elif fault == "hang":
                time.sleep(1.5)
                self.close_connection = True
            else:
                self._bytes(content, fault)

        def _bytes(self, content: bytes, fault: str | None) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first = int(match[1]) if match else 0
            last = min(int(match[2] or len(content)), len(content) - 1) if match else None
            part = content[first : last + 1] if last is not None else content
            if first >= len(content):
                self.reply(b"", 416)
                return
            if fault == "corrupt":
                part = bytes(len(part))
            self.send_response(206 if match else 200)
            self.send_header("Accept-Ranges", "bytes")
            if last is not None:
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if self.command == "HEAD":
                return
            self.wfile.write(part[: len(part) // 2] if fault == "cut" else part)
            self.close_connection = fault == "cut"

    return Handler
