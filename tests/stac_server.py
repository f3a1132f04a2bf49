"""A real STAC API over simulated scenes: stac-fastapi-pgstac, PostgreSQL with PostGIS, and assets.

Everything is made afresh in temporary folders and listens on this machine alone, on ports that
the system chooses: a database cluster that runs as an unprivileged user, `pypgstac` to fill it,
the API under uvicorn, and a file server with byte ranges. By hand:

    python tests/stac_server.py ARCHIVE...     serves folders that `stcln-geo simulate` wrote
    python tests/stac_server.py --check        says what is missing; exits with 1 if something is
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib.util
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODULES = ("pypgstac", "stac_fastapi.pgstac", "uvicorn", "psycopg")
DATABASE = "stac"
OWNER = "owner"
_START_SECONDS = 60.0
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class MissingSoftwareError(RuntimeError):
    """Something that this machine must have is not there."""


def missing() -> str | None:
    """Say what this machine lacks, and how to get it; None if it has everything."""
    lacking = [name for name in MODULES if _absent(name)]
    if lacking:
        return (
            f"Python packages are missing: {', '.join(lacking)}. Install them with "
            "pip install -c constraints.txt -e '.[test-stac]'."
        )
    try:
        binaries = _binaries()
    except MissingSoftwareError as error:
        return str(error)
    share = subprocess.run(
        [_config(binaries), "--sharedir"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not (Path(share) / "extension" / "postgis.control").is_file():
        return (
            f"PostGIS is missing for the PostgreSQL in {binaries}. Install it, on Debian with "
            f"apt-get install postgresql-{binaries.parent.name}-postgis-3."
        )
    if os.geteuid() == 0 and _unprivileged() is None:
        return "There is no user 'postgres' or 'nobody' that PostgreSQL could run as."
    return None


class StacServer:
    """The database, the API and the assets; `close` ends them, and so does the end of the process.

    Parameters
    ----------
    assets
        Folder whose files are served; the addresses of the items' assets are below it.
    """

    def __init__(self, assets: Path) -> None:
        self._assets = assets
        self._ends = contextlib.ExitStack()
        self.api = ""
        """Address of the STAC API."""
        self.files = ""
        """Address of the folder of assets."""
        self.folder: Path | None = None
        """Where the database lies; it stays behind a process that was killed."""
        self.processes: list[int] = []
        """Ids of what was started."""

    def __enter__(self) -> StacServer:
        lacking = missing()
        if lacking is not None:
            raise MissingSoftwareError(lacking)
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything and remove the database."""
        self._ends.close()

    def load(self, collection: dict[str, Any], items: list[dict[str, Any]]) -> None:
        """Put a collection and its items into the database, in place of the same ids."""
        plain = {**collection, "links": []}
        with tempfile.TemporaryDirectory() as folder:
            for kind, documents in (("collections", [plain]), ("items", items)):
                file = Path(folder) / f"{kind}.ndjson"
                file.write_text("".join(json.dumps(one) + "\n" for one in documents))
                self._pypgstac("load", kind, str(file), "--method", "upsert")

    def _start(self) -> None:
        self.files = self._ends.enter_context(_file_server(self._assets))
        folder = self.folder = Path(tempfile.mkdtemp(prefix="stcln-geo-stac-"))
        self._ends.callback(shutil.rmtree, folder, ignore_errors=True)
        self._password = secrets.token_hex(16)
        cluster = _Cluster(folder, self._password)
        self._port = cluster.start(self._ends)
        self.processes.append(cluster.pid)
        self._sql("postgres", f"CREATE DATABASE {DATABASE}")
        self._sql(DATABASE, "CREATE EXTENSION postgis; CREATE EXTENSION btree_gist")
        self._pypgstac("migrate")
        self.api = self._start_api(folder)

    def _start_api(self, folder: Path) -> str:
        log = folder / "api.log"
        settings = {
            "PGHOST": "127.0.0.1", "PGPORT": str(self._port), "PGUSER": OWNER,
            "PGPASSWORD": self._password, "PGDATABASE": DATABASE, "DB_MAX_CONN_SIZE": "4",
        }  # fmt: skip
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "--factory", "--host", "127.0.0.1",
                 "--port", "0", "--timeout-graceful-shutdown", "2",
                 "stac_fastapi.pgstac.app:create_app"],
                env={**os.environ, **settings}, stdin=subprocess.DEVNULL, stdout=sink,
                stderr=sink, cwd=folder, preexec_fn=_dies_with_us(signal.SIGKILL),
            )  # fmt: skip
        self.processes.append(process.pid)
        self._ends.callback(_end, process, signal.SIGTERM)

        def address() -> str | None:
            match = re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())
            return match[1] if match else None

        return f"{_wait(address, process, log)}/"

    def _sql(self, database: str, statement: str) -> None:
        import psycopg

        with psycopg.connect(self._address(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def _pypgstac(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "pypgstac.pypgstac", *arguments]
        settings = {
            "PGHOST": "127.0.0.1", "PGPORT": str(self._port), "PGUSER": OWNER,
            "PGPASSWORD": self._password, "PGDATABASE": DATABASE,
        }  # fmt: skip
        done = subprocess.run(
            command, env={**os.environ, **settings}, capture_output=True, text=True, timeout=300
        )
        if done.returncode != 0:
            raise RuntimeError(f"pypgstac {arguments[0]} failed: {done.stderr[-2000:]}")

    def _address(self, database: str) -> str:
        return f"postgresql://{OWNER}:{self._password}@127.0.0.1:{self._port}/{database}"


class _Cluster:
    """A PostgreSQL cluster of its own, which may lose its data when the machine stops."""

    def __init__(self, folder: Path, password: str) -> None:
        self._data = folder / "data"
        self._log = folder / "postgres.log"
        self._password = password
        self._binaries = _binaries()
        self._user = _unprivileged() if os.geteuid() == 0 else None
        self._folder = folder
        self.pid = 0

    def start(self, ends: contextlib.ExitStack) -> int:
        """Make and start the cluster, which ends with the stack; return its port."""
        secret = self._folder / "password"
        secret.write_text(self._password)
        if self._user is not None:
            for path in (self._folder, secret):
                shutil.chown(path, self._user)
        subprocess.run(
            [self._binaries / "initdb", "-D", self._data, "-U", OWNER, "-E", "UTF8", "--no-locale",
             "--no-sync", "--auth=scram-sha-256", f"--pwfile={secret}"],
            check=True, capture_output=True, timeout=120, **self._as_user(),
        )  # fmt: skip
        secret.unlink()
        for attempt in range(3):
            port = _free_port()
            with self._log.open("wb") as sink:
                process = subprocess.Popen(
                    [self._binaries / "postgres", "-D", self._data, "-h", "127.0.0.1",
                     "-p", str(port), "-k", "", "-F", "-c", "full_page_writes=off",
                     "-c", "shared_buffers=64MB", "-c", "jit=off"],
                    stdin=subprocess.DEVNULL, stdout=sink, stderr=sink,
                    # At once, without the shutdown that nobody would wait for.
                    preexec_fn=_dies_with_us(signal.SIGQUIT), **self._as_user(),
                )  # fmt: skip
            ends.callback(_end, process, signal.SIGINT)
            self.pid = process.pid
            try:
                _wait(functools.partial(self._answers, port), process, self._log)
            except RuntimeError:
                # Somebody else may have taken the port in between.
                if attempt == 2 or "in use" not in self._log.read_text():
                    raise
                continue
            return port
        raise RuntimeError("unreachable")

    def _answers(self, port: int) -> bool | None:
        import psycopg

        address = f"postgresql://{OWNER}:{self._password}@127.0.0.1:{port}/postgres"
        try:
            psycopg.connect(address, connect_timeout=5).close()
        except psycopg.OperationalError:
            return None
        return True

    def _as_user(self) -> dict[str, Any]:
        if self._user is None:
            return {}
        import grp
        import pwd

        entry = pwd.getpwnam(self._user)
        groups = [one.gr_gid for one in grp.getgrall() if self._user in one.gr_mem]
        return {
            "user": entry.pw_uid,
            "group": entry.pw_gid,
            "extra_groups": groups,
            "cwd": self._folder,
        }


class _RangeHandler(SimpleHTTPRequestHandler):
    """Serves a folder with byte ranges, as object stores do."""

    protocol_version = "HTTP/1.1"

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if asked is None or not path.is_file():
            super().do_GET()
            return
        size = path.stat().st_size
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first > last:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        with path.open("rb") as file:
            file.seek(first)
            part = file.read(last - first + 1)
        self.send_response(206)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


@contextlib.contextmanager
def _file_server(folder: Path) -> Iterator[str]:
    handler = functools.partial(_RangeHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def read_archive(folder: Path, address: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the collection and the items of a simulated archive, with their assets at an address.

    Parameters
    ----------
    address
        Where the archive's folder is served.
    """
    collection = json.loads((folder / "collection.json").read_text())
    items = []
    for link in collection["links"]:
        if link["rel"] != "item":
            continue
        file = folder / link["href"]
        item = json.loads(file.read_text())
        below = file.parent.resolve().relative_to(folder.resolve())
        for asset in item["assets"].values():
            asset["href"] = f"{address}/{(below / asset['href']).as_posix()}"
        items.append({**item, "links": []})
    return collection, items


def _absent(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:
        return True


def _binaries() -> Path:
    """Return the newest folder that holds PostgreSQL's programs."""
    folders = list(Path("/usr/lib/postgresql").glob("*/bin"))
    folders.sort(key=lambda path: float(path.parent.name), reverse=True)
    on_path = shutil.which("initdb")
    if on_path is not None:
        folders.append(Path(on_path).resolve().parent)
    for folder in folders:
        if (folder / "initdb").is_file() and (folder / "postgres").is_file():
            return folder
    raise MissingSoftwareError(
        "PostgreSQL is missing. Install it with PostGIS, on Debian with "
        "apt-get install postgresql-15 postgresql-15-postgis-3."
    )


def _config(binaries: Path) -> Path:
    return binaries / "pg_config"


def _unprivileged() -> str | None:
    import pwd

    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name).pw_name
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _dies_with_us(how: signal.Signals) -> Callable[[], None] | None:
    """Return what makes a new process end when this one is killed (Linux only)."""
    if _LIBC is None:
        return None
    parent, prctl = os.getpid(), _LIBC.prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(how))
        if os.getppid() != parent:
            os._exit(1)

    return ask


def _wait(answer: Callable[[], Any], process: subprocess.Popen[bytes], log: Path) -> Any:
    """Return the first answer that is not None."""
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        found = answer()
        if found is not None:
            return found
        time.sleep(0.05)
    program = Path(str(process.args[0])).name  # type: ignore[index]
    raise RuntimeError(f"{program} did not start: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Ask a process to end, and insist."""
    if process.poll() is not None:
        return
    process.send_signal(how)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main() -> int:
    """Serve archives until Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("archive", nargs="*", type=Path, help="folder that simulate wrote")
    parser.add_argument("--check", action="store_true", help="only say what is missing")
    chosen = parser.parse_args()
    lacking = missing()
    if lacking is not None:
        print(lacking)
        return 1
    if chosen.check:
        print("PostgreSQL, PostGIS and the Python packages are there.")
        return 0
    folders = [folder.resolve() for folder in chosen.archive]
    absent = [folder for folder in folders if not (folder / "collection.json").is_file()]
    if absent or not folders:
        print(f"Give folders that 'stcln-geo simulate' wrote; not one: {[*map(str, absent)]}")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    shared = Path(os.path.commonpath(folders))
    with contextlib.suppress(KeyboardInterrupt), StacServer(shared) as server:
        for folder in folders:
            below = folder.relative_to(shared).as_posix()
            server.load(*read_archive(folder, f"{server.files}/{below}".removesuffix("/.")))
        ready = {
            "api": server.api,
            "files": server.files,
            "folder": str(server.folder),
            "processes": server.processes,
        }
        print(json.dumps(ready), flush=True)
        signal.pause()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
