"""What the benchmarks share: processes with their peak memory, Dask's tasks, HTTP requests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """What a process took and told."""

    seconds: float
    memory: int
    """Peak of the resident memory of the process and all its children together (bytes)."""
    largest: int
    """Peak of the largest of these processes (bytes)."""
    own: int
    """Peak of the process itself: of the client and the scheduler, where it starts workers."""
    largest_child: int
    """Peak of the largest of its children; 0 without any."""
    told: dict[str, Any]
    """Its last line, JSON."""


def measure_process(arguments: Sequence[str | Path]) -> Measured:
    """Run a Python script in its own process and sample its memory."""
    import psutil

    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True
    )
    peak = own = child = 0
    done = threading.Event()

    def sample() -> None:
        nonlocal peak, own, child
        root = psutil.Process(process.pid)
        while not done.wait(SAMPLE_SECONDS):
            total = 0
            with contextlib.suppress(psutil.NoSuchProcess):
                total = root.memory_info().rss
                own = max(own, total)
                for member in root.children(recursive=True):
                    resident = member.memory_info().rss
                    total += resident
                    child = max(child, resident)
            peak = max(peak, total)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    text, _ = process.communicate()
    seconds = time.perf_counter() - started
    done.set()
    sampler.join()
    if process.returncode:
        raise SystemExit(f"{arguments[0]} failed with exit code {process.returncode}")
    return Measured(
        seconds=seconds, memory=peak, largest=max(own, child), own=own, largest_child=child,
        told=json.loads(text.strip().splitlines()[-1]),
    )  # fmt: skip


def load() -> float:
    """Return the processes that wanted a core, on average over the last minute."""
    return os.getloadavg()[0]


COUNT_FILE = "STCLN_GEO_BENCHMARK_TASKS"


@contextlib.contextmanager
def count_tasks() -> Iterator[Counter[str]]:
    """Count the tasks, by label, of the schedulers that are started meanwhile; filled at the end.

    These schedulers are not ours to reach: this file is their preload, see ``dask_setup``.
    """
    import dask

    counted: Counter[str] = Counter()
    with tempfile.NamedTemporaryFile("r") as file:
        os.environ[COUNT_FILE] = file.name
        try:
            with dask.config.set({"distributed.scheduler.preload": [__file__]}):
                yield counted
        finally:
            del os.environ[COUNT_FILE]
        names = {line.rstrip("\n") for line in file}
    counted.update(name.split("-")[0] for name in names)


def dask_setup(scheduler: Any) -> None:
    """Write down the name of every task that a scheduler meets; called by Dask."""
    from distributed.diagnostics.plugin import SchedulerPlugin

    class Tasks(SchedulerPlugin):
        def transition(self, key: str, start: str, finish: str, *_: Any, **__: Any) -> None:
            if finish == "processing":
                with open(os.environ[COUNT_FILE], "a") as file:
                    file.write(f"{key}\n")

    scheduler.add_plugin(Tasks())


@dataclass
class RangeServer:
    """Serves a folder over HTTP with byte ranges, and keeps what was asked for."""

    url: str
    requests: Counter[str] = field(default_factory=Counter)
    """Path below the folder -> requests, HEAD included."""


@contextlib.contextmanager
def range_server(folder: Path) -> Iterator[RangeServer]:
    """Serve a folder on a free port of the loopback."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """Keep quiet."""

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            name = self.path.split("?")[0].lstrip("/")
            file = folder / name
            size = file.stat().st_size if file.is_file() else None
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            first = int(match[1]) if match else 0
            if size is None or first >= size:
                self.send_response(404 if size is None else 416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            last = min(int(match[2] or size), size - 1) if match else size - 1
            with lock:
                counted.requests[name] += 1
            self.send_response(206 if match else 200)
            self.send_header("Accept-Ranges", "bytes")
            if match:
                self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            if self.command != "HEAD":
                with file.open("rb") as source:
                    source.seek(first)
                    self.wfile.write(source.read(last + 1 - first))

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:
            """Say nothing of connections that the reader closed."""

    http = Server(("127.0.0.1", 0), Handler)
    counted = RangeServer(url=f"http://127.0.0.1:{http.server_address[1]}")
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield counted
    finally:
        http.shutdown()
        http.server_close()
