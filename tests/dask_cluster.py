"""A Dask cluster of real processes, for the tests of what happens to workers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent


class Cluster:
    """A scheduler and workers, each a process of its own, as on a real cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self._processes: list[subprocess.Popen[bytes]] = []
        self.scheduler = self._start(
            "distributed.cli.dask_scheduler", "--host", self.address, "--no-dashboard"
        )
        wait_until_open(self.address, self.scheduler)

    def worker(
        self, *options: str, nanny: bool = False, first: str = ""
    ) -> subprocess.Popen[bytes]:
        """Start a worker; ``first`` is a statement that it begins with."""
        keep = ["--nanny"] if nanny else ["--no-nanny"]
        return self._start(
            "distributed.cli.dask_worker", self.address, "--nthreads", "1", "--no-dashboard",
            "--death-timeout", "20", *keep, *options, first=first,
        )  # fmt: skip

    def _start(self, module: str, *options: str, first: str = "") -> subprocess.Popen[bytes]:
        code = f"{first}\nimport sys; from {module} import main; sys.exit(main())"
        process = subprocess.Popen(
            [sys.executable, "-c", code, *options],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
            stderr=subprocess.DEVNULL,
        )
        self._processes.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_until_open(address: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until somebody answers: a client gives up sooner than a busy machine starts one."""
    port = int(address.rpartition(":")[2])
    deadline = time.monotonic() + 300
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, f"the scheduler ended with {process.returncode}"
            assert time.monotonic() < deadline, "the scheduler does not answer"
            time.sleep(0.05)


def wait_for_workers(cluster: Cluster, count: int) -> None:
    from distributed import Client

    with Client(cluster.address, set_as_default=False) as client:
        client.wait_for_workers(count, timeout=120)
