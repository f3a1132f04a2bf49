"""Addresses: private hosts, local files, redirects and secrets, from catalogs that are not ours."""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import rasterio
import yaml
from odc.geo.geobox import GeoBox
from pydantic import ValidationError

from stcln_geo import documents
from stcln_geo.bucket import refusal
from stcln_geo.catalog import Access, Catalog, load_catalog
from stcln_geo.cli.main import invoke
from stcln_geo.cube import read
from stcln_geo.cube.addresses import (
    asset_access,
    check_address,
    follow_redirects,
    is_private,
    redact,
    without_secrets,
)
from stcln_geo.cube.build import build_cube
from stcln_geo.cube.plan import plan_cube
from stcln_geo.cube.read import AssetReader, AssetReadError
from stcln_geo.cube.search import search_items
from stcln_geo.cube.snapshot import read_items
from stcln_geo.documents import read_json
from stcln_geo.errors import CatalogError, InputError, SearchError, UnsafeAddressError
from stcln_geo.grid import Window, geobox_from_window
from stcln_geo.storage import location
from stcln_geo.web import resolves_private

FAR = Access()


@pytest.mark.parametrize(
    "host",
    ["localhost", "a.localhost", "127.0.0.1", "127.1", "2130706433", "0x7f.1", "0.0.0.0", "::1",
     "::ffff:10.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1",
     "169.254.169.254", "fe80::1", "fd00::1", "printer.local", "printer.local.", "nas",
     "100.64.0.1", "metadata.google.internal"],
)  # fmt: skip
def test_private_hosts_are_recognised_and_refused(host: str):
    assert is_private(host)
    href = f"http://[{host}]/red.tif" if ":" in host else f"http://{host}/red.tif"
    with pytest.raises(UnsafeAddressError, match="--allow-host"):
        check_address(href, FAR, what="asset red")
    check_address(href, Access(allow_hosts=(host.rstrip("."),)), what="asset red")


@pytest.mark.parametrize("host", ["172.32.0.1", "8.8.8.8", "example.org", "2606:4700::1111"])
def test_public_hosts_are_not_private(host: str):
    assert not is_private(host)


@pytest.mark.parametrize(
    "href",
    ["/etc/passwd", "red.tif", "../red.tif", "file:///etc/passwd", "/vsicurl/http://10.0.0.1/x",
     "/vsizip/x.zip", "vrt:///etc/x.tif", "GTIFF_DIR:1:/etc/x.tif", "<VRTDataset/>",
     "zip+https://example.org/x.zip", "HTTP://example.org/x.tif", "ftp://example.org/x.tif", ""],
)  # fmt: skip
def test_local_forms_are_read_only_for_catalogs_that_are_files(href: str, tmp_path: Path):
    api = Catalog(name="x", kind="api", endpoint="https://example.org/")
    with pytest.raises(UnsafeAddressError, match="Download the catalog"):
        check_address(href, asset_access(api), what="asset red")
    on_disk = Catalog(name="x", kind="static", endpoint=str(tmp_path / "catalog.json"))
    check_address(href, asset_access(on_disk), what="asset red")


def test_a_catalog_on_a_private_host_may_use_that_host_and_no_other():
    access = asset_access(Catalog(name="x", kind="api", endpoint="http://127.0.0.1:8080/stac"))
    check_address("http://127.0.0.1:9000/red.tif", access, what="asset red")
    with pytest.raises(UnsafeAddressError, match=r"private host '10\.0\.0\.1'"):
        check_address("http://10.0.0.1/red.tif", access, what="asset red")


def test_a_name_that_leads_to_a_private_number_is_not_asked(monkeypatch: pytest.MonkeyPatch):
    def resolve(host: str, *_: Any) -> list[Any]:
        return [(2, 1, 6, "", ("127.0.0.1", 0))]

    resolves_private.cache_clear()
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    with pytest.raises(UnsafeAddressError, match=r"private host 'rebind\.example\.org'"):
        follow_redirects("http://rebind.example.org/red.tif", FAR)
    resolves_private.cache_clear()


def test_links_of_a_catalog_to_such_a_name_are_not_asked(
    planted: Any, web: Any, monkeypatch: pytest.MonkeyPatch
):
    url, asked = web
    inside = url.replace("127.0.0.1", "rebind.example.org")
    known = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **more: Any) -> list[Any]:
        return known("127.0.0.1" if host == "rebind.example.org" else host, *rest, **more)

    resolves_private.cache_clear()
    monkeypatch.setattr("socket.getaddrinfo", resolve)
    for rel in ("item", "child"):
        document = {"type": "Catalog", "id": "x",
                    "links": [{"rel": rel, "href": f"{inside}/archive/S2_1.json"}]}  # fmt: skip
        (planted.folder / "own.json").write_text(json.dumps(document))
        location = f"{url}/archive/own.json"
        with pytest.raises(UnsafeAddressError, match=r"private host 'rebind\.example\.org'"):
            search_items(load_catalog(location))
    assert "/archive/S2_1.json" not in asked
    allowed = load_catalog(location, allow_hosts=("rebind.example.org",))
    with pytest.raises(SearchError):
        search_items(allowed)
    assert "/archive/S2_1.json" in asked
    resolves_private.cache_clear()


class Redirecting(SimpleHTTPRequestHandler):
    """Serves a folder; ``/to?URL`` redirects."""

    asked: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        type(self).asked.append(self.path)
        if not self.path.startswith("/to?"):
            super().do_GET()
            return
        self.send_response(302)
        self.send_header("Location", self.path[4:])
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    handler = type("Handler", (Redirecting,), {"asked": []})
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    "target",
    ["http://169.254.169.254/latest/meta-data", "http://localhost:1/x", "file:///etc/passwd",
     "/to?/to?http://10.0.0.1/"],
)  # fmt: skip
def test_redirects_to_where_an_asset_may_not_be_are_not_followed(web: Any, target: str):
    url, asked = web
    grid = geobox_from_window(Window(0, 0, 4, 4), crs="EPSG:32631", resolution=10)
    reader = AssetReader(Access(allow_hosts=("127.0.0.1",)), pause=0)
    with pytest.raises(AssetReadError, match=r"private host|only http\(s\)") as error:
        reader.read(f"{url}/to?{target}", grid)
    assert (error.value.kind, error.value.attempts) == ("denied", 1)
    assert all(path.startswith("/to?") for path in asked)


def test_a_process_asks_once_where_an_asset_leads(
    planted: Any, web: Any, monkeypatch: pytest.MonkeyPatch
):
    url, _ = web
    grid = geobox_from_window(Window(0, 0, 4, 4), crs="EPSG:32631", resolution=10)
    asked = []

    def follow(href: str, access: Access) -> str:
        asked.append(href)
        return follow_redirects(href, access)

    monkeypatch.setattr(read, "follow_redirects", follow)
    href, access = f"{url}/to?/archive/S2_1_red.tif", Access(allow_hosts=("127.0.0.1",))
    for _ in range(2):
        AssetReader(access, pause=0).read(href, grid)
    assert asked == [href]
    # Who allows less does not profit from what another was told.
    with pytest.raises(AssetReadError, match="private host"):
        AssetReader(FAR, pause=0).read(href, grid)
    assert asked == [href] * 2
    # A failure is a reason to ask again.
    file = planted.folder / "S2_2_red.tif"
    file.rename(planted.folder / "away.tif")
    other = href.replace("S2_1", "S2_2")
    with pytest.raises(AssetReadError, match="gone"):
        AssetReader(access, pause=0).read(other, grid)
    (planted.folder / "away.tif").rename(file)
    AssetReader(access, pause=0).read(other, grid)
    assert asked[2:] == [other] * 2


def test_redirects_that_turn_in_circles_end(web: Any):
    url, asked = web
    access = Access(allow_hosts=("127.0.0.1",))
    with pytest.raises(UnsafeAddressError, match="more than 5 times"):
        follow_redirects(f"{url}/to?" * 1 + "/to?" * 20 + "/x", access)
    assert len(asked) == 5
    assert follow_redirects(f"{url}/to?/x.tif", access) == f"{url}/x.tif"


_POINTING = {
    "vrt": """<VRTDataset rasterXSize="{side}" rasterYSize="{side}"><SRS>{crs}</SRS>
        <GeoTransform>{transform}</GeoTransform><VRTRasterBand dataType="UInt16" band="1">
        <SimpleSource><SourceFilename relativeToVRT="0">{file}</SourceFilename>
        <SourceBand>1</SourceBand></SimpleSource></VRTRasterBand></VRTDataset>""",
    "warped vrt": """<VRTDataset rasterXSize="{side}" rasterYSize="{side}"
        subClass="VRTWarpedDataset"><SRS>{crs}</SRS><GeoTransform>{transform}</GeoTransform>
        <VRTRasterBand dataType="UInt16" band="1" subClass="VRTWarpedRasterBand"/>
        <GDALWarpOptions><SourceDataset relativeToVRT="0">{file}</SourceDataset>
        <BandList><BandMapping src="1" dst="1"/></BandList></GDALWarpOptions></VRTDataset>""",
    "wms": """<GDAL_WMS><Service name="TMS"><ServerUrl>file://{file}</ServerUrl></Service>
        <DataWindow><UpperLeftX>0</UpperLeftX><UpperLeftY>90</UpperLeftY><LowerRightX>90</LowerRightX>
        <LowerRightY>0</LowerRightY><SizeX>{side}</SizeX><SizeY>{side}</SizeY></DataWindow>
        <Projection>EPSG:4326</Projection><BandsCount>1</BandsCount></GDAL_WMS>""",
}


@pytest.mark.parametrize("kind", _POINTING)
def test_a_file_of_the_web_cannot_point_at_files_of_this_machine(
    planted: Any, web: Any, tmp_path: Path, kind: str
):
    url, _ = web
    private = planted.folder / "S2_1_red.tif"
    with rasterio.open(private) as source:
        grid = GeoBox(source.shape, source.transform, str(source.crs))
        told = {
            "file": private, "crs": source.crs, "side": source.width,
            "transform": ",".join(map(str, source.transform.to_gdal())),
        }  # fmt: skip
    (tmp_path / "red.tif").write_text(_POINTING[kind].format(**told))
    reader = AssetReader(Access(allow_hosts=("127.0.0.1",)), pause=0)
    with pytest.raises(AssetReadError, match="not recognized as being in a supported"):
        reader.read(f"{url}/red.tif", grid)
    if kind == "vrt":
        # A catalog of files may: its files are this machine's already.
        own = AssetReader(Access(local_files=True), pause=0).read(str(tmp_path / "red.tif"), grid)
        assert own.max() > 0


def test_jpeg_2000_of_the_web_is_read(planted: Any, web: Any, tmp_path: Path):
    url, _ = web
    with rasterio.open(planted.folder / "S2_1_red.tif") as source:
        grid, values = GeoBox(source.shape, source.transform, str(source.crs)), source.read()
        profile = {**source.profile, "driver": "JP2OpenJPEG", "REVERSIBLE": "YES", "QUALITY": 100}
    wanted = ("width", "height", "count", "dtype", "crs", "transform", "driver", "REVERSIBLE",
              "QUALITY")  # fmt: skip
    kept = {name: profile[name] for name in wanted}
    with rasterio.open(tmp_path / "red.jp2", "w", **kept) as made:
        made.write(values)
    reader = AssetReader(Access(allow_hosts=("127.0.0.1",)), pause=0)
    assert (reader.read(f"{url}/red.jp2", grid) == values[0]).all()


# --- whole builds ---


def test_a_static_catalog_on_the_web_cannot_name_files_of_this_machine(
    planted: Any, web: Any, tmp_path: Path
):
    url, _ = web
    location = f"{url}/archive/catalog.json"
    assert len(search_items(load_catalog(location))) == 3
    file = planted.folder / "S2_1.json"
    item = json.loads(file.read_text())
    item["assets"]["red"]["href"] = f"file://{planted.folder}/S2_1_red.tif"
    file.write_text(json.dumps(item))
    with pytest.raises(UnsafeAddressError, match="asset red of item S2_1"):
        plan_cube(search_items(load_catalog(location)))
    # The same catalog as files may.
    plan_cube(search_items(load_catalog(planted.location)))
    catalog = json.loads((planted.folder / "catalog.json").read_text())
    catalog["links"].append({"rel": "child", "href": "file:///etc/passwd"})
    (planted.folder / "catalog.json").write_text(json.dumps(catalog))
    with pytest.raises(UnsafeAddressError, match="Cannot use a link of"):
        search_items(load_catalog(location))


def test_a_document_from_the_web_has_an_end(
    web: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    url, _ = web
    told = {"type": "Catalog", "id": "Étang", "links": []}
    (tmp_path / "small.json").write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "large.json").write_bytes(b" " * 70_000 + b"{}")
    monkeypatch.setattr(documents, "_MOST_BYTES", 2**16)
    assert read_json(f"{url}/small.json") == told
    with pytest.raises(CatalogError, match=r"large\.json.*no STAC document is so large"):
        read_json(f"{url}/large.json")


def test_redirects_of_a_static_catalog_are_checked(planted: Any, web: Any):
    url, asked = web
    location = f"{url}/archive/catalog.json"
    inside = url.replace("127.0.0.1", "localhost")
    with pytest.raises(UnsafeAddressError, match="private host 'localhost'"):
        load_catalog(f"{url}/to?{inside}/archive/catalog.json")
    with pytest.raises(UnsafeAddressError, match=r"only http\(s\)"):
        load_catalog(f"{url}/to?file:///etc/passwd")
    assert all(path.startswith("/to?") for path in asked)
    catalog = json.loads((planted.folder / "catalog.json").read_text())
    catalog["links"] = [{"rel": "child", "href": f"{url}/to?{inside}/archive/collection.json"}]
    collection = json.loads((planted.folder / "collection.json").read_text())
    for link in collection["links"]:
        link["href"] = f"{url}/archive/{link['href']}"
    (planted.folder / "collection.json").write_text(json.dumps(collection))
    (planted.folder / "catalog.json").write_text(json.dumps(catalog))
    with pytest.raises(UnsafeAddressError, match="--allow-host localhost"):
        search_items(load_catalog(location))
    assert "/archive/collection.json" not in asked
    assert len(search_items(load_catalog(location, allow_hosts=("localhost",)))) == 3


def test_private_assets_of_a_local_catalog_need_allow_host(
    planted: Any, web: Any, tmp_path: Path, capsys: Any
):
    url, _ = web
    for file in planted.folder.glob("S2_*.json"):
        text = file.read_text().replace('"./S2', f'"{url}/archive/S2')
        file.write_text(text)
    build = ["cube", "build", "--catalog", planted.location, str(tmp_path / "c.zarr")]
    assert invoke(build) == 2
    assert "private host '127.0.0.1'" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "c.zarr").exists()
    assert invoke([*build, "--allow-host", "127.0.0.1"]) == 0


def test_item_ids_never_become_paths(planted: Any, tmp_path: Path):
    for number, name in enumerate(("../../evil", "/tmp/evil", "a/b\0c")):
        file = planted.folder / f"S2_{number}.json"
        item = json.loads(file.read_text())
        file.write_text(json.dumps({**item, "id": name}))
    inside = tmp_path / "deep" / "er" / "c.zarr"
    before = {path for path in tmp_path.rglob("*")}
    build_cube(plan_cube(search_items(load_catalog(planted.location))), inside)
    new = {path for path in tmp_path.rglob("*")} - before
    assert all(path == inside or inside in path.parents or path in inside.parents for path in new)
    assert not [path for path in new if "evil" in path.name or "b" in path.parts[-1:]]


SECRET = "hUsHhUsH"


def test_secrets_are_taken_out_of_texts():
    assert redact(f"https://me:{SECRET}@h.org/x?a=1&sig={SECRET}&b=2") == (
        "https://...@h.org/x?a=1&sig=...&b=2"
    )
    assert SECRET not in redact(f"got /x?X-Amz-Signature={SECRET} and ?token={SECRET}")
    assert redact(f"https://me:a@{SECRET}@h.org/x@y") == "https://...@h.org/x@y"
    assert redact("https://h.org/?mail=a@b.org&bbox=1") == "https://h.org/?mail=a@b.org&bbox=1"


@pytest.mark.parametrize(
    "name",
    ["sig", "api-key", "X-API-Key", "access-token", "id_token", "client_secret", "auth", "authkey",
     "Authorization", "jwt", "passwd", "x-oss-signature", "x-oss-credential", "OSSAccessKeyId",
     "q-signature", "hdnts", "%73ig"],
)  # fmt: skip
def test_secrets_have_many_names(name: str):
    for sign in "?&#":
        href = f"https://h.org/a.tif{'?a=1' * (sign == '&')}{sign}{name}={SECRET}"
        assert SECRET not in redact(href)
        told = without_secrets({"assets": {"B04": {"href": href}}}, FAR)["assets"]["B04"]
        assert SECRET not in json.dumps(told)
        assert told["signed_by"] == name.replace("%73", "s")


@pytest.mark.parametrize(
    "query", ["width=2", "monkey=1", "author=x", "design=1", "keyword=x", "assets=sp"]
)
def test_other_parameters_stay(query: str):
    href = f"https://h.org/a.tif?{query}"
    item = {"assets": {"B04": {"href": href}}}
    assert without_secrets(item, FAR) == item


def test_addresses_that_are_none_and_relative_ones_keep_no_secret():
    assets = {
        "a": {"href": f"http://[me:{SECRET}@x?sig={SECRET}"},
        "b": {"href": f"b?sig={SECRET}"},
    }
    assert SECRET not in json.dumps(without_secrets({"assets": assets}, FAR))


def test_a_read_that_fails_tells_no_token(web: Any, tmp_path: Path):
    url, _ = web
    (tmp_path / "token").write_text(
        json.dumps({"token": f"se=2099&sig={SECRET}", "msft:expiry": "2099-01-01T00:00:00Z"})
    )
    with socket.socket() as silent:
        # Bound, but nobody listens.
        silent.bind(("127.0.0.1", 0))
        access = Access(
            kind="sas", token_url=f"{url}/token", sign_hosts=("127.0.0.1",),
            allow_hosts=("127.0.0.1",),
        )  # fmt: skip
        href = f"http://127.0.0.1:{silent.getsockname()[1]}/box/a.tif"
        grid = geobox_from_window(Window(0, 0, 4, 4), crs="EPSG:32631", resolution=10)
        with pytest.raises(AssetReadError, match="refused") as error:
            AssetReader(access, pause=0).read(href, grid)
    assert "sig=..." in error.value.reason
    assert SECRET not in f"{error.value}"


def test_the_address_of_a_catalog_is_told_without_its_secret(web: Any, tmp_path: Path, capsys: Any):
    url, _ = web
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "item.json").write_text("{}")
    (tmp_path / "text.json").write_text("text")
    mine = url.replace("://", f"://me:{SECRET}@")
    for name in ("none", "list", "item", "text"):
        for address in (f"{mine}/{name}.json", f"{url}/{name}.json?api-key={SECRET}"):
            assert invoke(["catalogs", "show", address]) == 2
            shown = capsys.readouterr()
            assert f"/{name}.json" in shown.err.replace("\n", "")
            assert SECRET not in shown.out + shown.err


def test_the_secret_of_an_endpoint_is_used_and_not_shown(web: Any, tmp_path: Path, capsys: Any):
    file = tmp_path / "mine.yaml"
    endpoint = f"https://me:{SECRET}@e.org/v1?api_key={SECRET}"
    file.write_text(yaml.safe_dump({"name": "x", "kind": "api", "endpoint": endpoint}))
    assert load_catalog(file).endpoint == endpoint
    assert invoke(["catalogs", "show", str(file)]) == 0
    shown = capsys.readouterr()
    assert "endpoint: https://...@e.org/v1?api_key=..." in shown.out
    assert "endpoint holds a secret" in shown.err
    assert SECRET not in shown.out + shown.err


def test_signatures_are_left_out_where_reading_signs_and_refused_elsewhere(planted: Any):
    href = "https://acc.blob.core.windows.net/box/a.tif"
    sas = Access(kind="sas", token_url="https://example.org/{account}/{container}")
    signed = {"assets": {"B04": {"href": f"{href}?se=2020&sig={SECRET}"}}}
    assert without_secrets(signed, sas) == {"assets": {"B04": {"href": href}}}
    signed["assets"]["B04"]["href"] = href.replace("acc.", f"me:{SECRET}@acc.") + f"#sig={SECRET}"
    assert without_secrets(signed, sas) == {"assets": {"B04": {"href": href}}}
    file = planted.folder / "S2_1.json"
    item = json.loads(file.read_text())
    item["assets"]["red"]["href"] = f"https://example.org/a.tif?X-Amz-Signature={SECRET}"
    item["assets"]["other"] = {"href": f"https://me:{SECRET}@example.org/a.tif"}
    item["assets"]["nir"]["alternate"] = {"s3": {"href": f"https://example.org/?sig={SECRET}"}}
    file.write_text(json.dumps(item))
    snapshot = search_items(load_catalog(planted.location))
    assert SECRET not in json.dumps(snapshot.items)
    with pytest.raises(UnsafeAddressError, match=r"secret \(X-Amz-Signature\)") as error:
        plan_cube(snapshot)
    assert SECRET not in str(error.value)


def test_no_secret_reaches_the_disk(planted: Any, tmp_path: Path, capsys: Any, caplog: Any):
    item_file = planted.folder / "S2_1.json"
    item = json.loads(item_file.read_text())
    item["assets"]["thumbnail"] = {"href": f"https://example.org/t.png?sig={SECRET}"}
    item["links"] = [{"rel": "self", "href": f"https://me:{SECRET}@example.org/S2_1"}]
    item_file.write_text(json.dumps(item))
    out = tmp_path / "c.zarr"
    assert invoke(["cube", "build", "--catalog", planted.location, str(out)]) == 0
    assert {one["id"] for one in read_items(out / "items.parquet")} == {"S2_0", "S2_1", "S2_2"}
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err + caplog.text


def test_secrets_do_not_belong_into_a_catalog_file(tmp_path: Path):
    file = tmp_path / "mine.yaml"
    options = {"AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "eu-central-1"}
    content = {
        "name": "x",
        "kind": "api",
        "endpoint": "https://e.org/",
        "access": {"gdal": options},
    }
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(CatalogError, match="AWS_SECRET_ACCESS_KEY is a secret") as error:
        load_catalog(file)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("GDAL_HTTP_BEARER", SECRET), ("GDAL_HTTP_COOKIE", f"s={SECRET}"),
     ("GS_OAUTH2_PRIVATE_KEY", SECRET), ("GDAL_HTTP_KEYPASSWD", SECRET), ("SWIFT_KEY", SECRET),
     ("GDAL_HTTP_PROXY", f"http://me:{SECRET}@proxy:80"),
     ("GDAL_HTTPS_PROXY", f"me:{SECRET}@proxy"), ("GDAL_HTTP_PROXYUSERPWD", SECRET),
     ("CPL_VSIL_URL", f"https://h.org/?token={SECRET}")],
)  # fmt: skip
def test_no_option_of_a_catalog_file_is_a_secret(name: str, value: str):
    content = {"name": "x", "kind": "api", "endpoint": "https://e.org/"}
    with pytest.raises(ValidationError, match=f"{name} is a secret") as error:
        Catalog.model_validate({**content, "access": {"gdal": {name: value}}})
    assert SECRET not in error.value.errors()[0]["msg"]


def test_options_that_are_no_secret_are_taken():
    options = {
        "GDAL_HTTP_COOKIEFILE": "/home/me/cookies", "GDAL_HTTP_NETRC_FILE": "/home/me/.netrc",
        "AWS_NO_SIGN_REQUEST": "YES", "GDAL_HTTP_PROXY": "proxy.example.org:3128",
        "GDAL_HTTPS_PROXY": "http://proxy:80", "GDAL_HTTP_AUTH": "BASIC", "AWS_PROFILE": "mine",
    }  # fmt: skip
    assert Access(gdal=options).gdal == options


@pytest.mark.parametrize(
    "address",
    [f"https://me:{SECRET}@e.org/sign/{{account}}", f"https://e.org/?subscription-key={SECRET}"],
)
def test_addresses_of_a_catalog_file_that_cubes_keep_hold_no_secret(tmp_path: Path, address: str):
    content = {"name": "x", "kind": "api", "endpoint": "https://e.org/"}
    for part in (
        {"access": {"kind": "sas", "token_url": address}},
        {"defaults": {"replace_href": {"s3://EODATA": address}}},
    ):
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**content, **part}))
        with pytest.raises(CatalogError, match="holds a secret and would be stored") as error:
            load_catalog(tmp_path / "mine.yaml")
        assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "address",
    [f"s3://AKIAME:{SECRET}@bucket/c.zarr", f"s3://bucket/c.zarr?X-Amz-Signature={SECRET}",
     f"https://me:{SECRET}@e.org/c.zarr"],
)  # fmt: skip
def test_a_location_holds_no_key(address: str, capsys: Any):
    for given in (address, Path(address)):
        with pytest.raises(InputError, match="a password, key or signature in it") as error:
            location(given)
        assert SECRET not in str(error.value)
    assert invoke(["cube", "info", address]) == 2
    assert SECRET not in capsys.readouterr().err


def test_the_key_in_an_endpoint_is_not_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    for why in ("<Code>NoSuchBucket</Code>", "status code: 500 Internal", "Connection refused"):
        told = str(refusal("s3://bucket/c.zarr", "bucket", OSError(why)))
        assert "127.0.0.1:9" in told
        assert SECRET not in told
