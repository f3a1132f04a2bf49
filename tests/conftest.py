"""Fixtures that all tests share."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from .dask_cluster import Cluster

# A busy machine is no failure.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files of slow tests that take longest: no core waits for one at the end."""
    minutes: Counter[Path] = Counter()
    for item in items:
        if mark := item.get_closest_marker("slow"):
            minutes[item.path] += mark.kwargs.get("minutes", 0.3)
    items.sort(key=lambda item: -minutes[item.path])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real scenes and golden numbers beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("../shared is absent: real scenes and golden numbers lie there")
    return SHARED


@pytest.fixture(scope="session")
def flanders(shared: Path) -> Path:
    """Static catalog of real Sentinel-2 scenes over 64 x 64 px in Flanders."""
    return shared / "data" / "flanders_2019"


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Golden numbers of the published network."""
    return shared / "golden"


@pytest.fixture(params=[signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def ending_signal(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """Signals that end a command, heard as usual: those who run tests may ignore them (nohup)."""
    number: signal.Signals = request.param
    usual = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
    before = signal.signal(number, usual)
    yield number
    assert signal.getsignal(number) is usual
    signal.signal(number, before)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an S3 server of this session, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "server.log").open("w")
    plain = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=log, stderr=log, env=plain,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{address}/moto-api/").close()
            break
        except urllib.error.URLError:
            assert server.poll() is None, "the S3 server stopped"
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
    yield address
    server.kill()
    server.wait()
    log.close()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address ``s3://bucket`` of a new, empty bucket, with the environment that leads to it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-word")
    bucket = f"b{uuid.uuid4().hex[:12]}"
    signed = "AWS4-HMAC-SHA256 Credential=tester/20260101/us-east-1/s3/aws4_request"
    request = urllib.request.Request(
        f"{s3_server}/{bucket}",
        method="PUT",
        headers={"Authorization": f"{signed}, SignedHeaders=host, Signature=none"},
    )
    urllib.request.urlopen(request).close()
    return f"s3://{bucket}"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A Dask scheduler of its own process, without workers yet."""
    # A busy machine takes longer to start one, which is no reason for a warning here.
    monkeypatch.setattr("stcln_geo.workers._LONELY_SECONDS", 300.0)
    folder = tmp_path / "cluster"
    folder.mkdir()
    made = Cluster(folder)
    yield made
    made.close()
