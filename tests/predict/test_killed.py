"""Twenty kills at random moments, of workers, schedulers and clients: the map does not notice."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import rasterio

from ..dask_cluster import TESTS, Cluster, wait_for_workers
from .test_run import PRODUCT

pytestmark = pytest.mark.slow(minutes=5)

SEED = int(os.environ.get("STCLN_GEO_KILL_SEED", "20181122"))
KILLS = {"worker": 7, "scheduler": 6, "client": 7}
OPTIONS = (
    "--device", "cpu", "--precision", "float32", "--shard-size", "12", "--seam-audit", "0",
    "--outputs", "embeddings",
)  # fmt: skip
PATIENCE = 900
"""Seconds after which something hangs."""

WATCH = """
import os, sys

def _watch(event, arguments):
    # A shard that is computed begins with a temporary file for its embeddings.
    if event == "open" and isinstance(arguments[0], str) and "w" in str(arguments[1]):
        folder, name = os.path.split(arguments[0])
        if ".embeddings.npy." in name and folder.endswith("/shards"):
            shard = name[1:].partition(".embeddings")[0]
            with open({log!r}, "a") as file:
                file.write(os.path.basename(os.path.dirname(folder)) + " " + shard + "\\n")

sys.addaudithook(_watch)
"""
"""Statements after which a process notes each shard that it begins to compute."""


@dataclass
class Game:
    """Clients, workers and schedulers, the kills to come, and what was begun and when."""

    world: Any
    folder: Path
    rng: np.random.Generator
    deck: list[str]
    cluster: Cluster | None = None
    crew: list[subprocess.Popen[bytes]] = field(default_factory=list)
    struck: Counter[str] = field(default_factory=Counter)
    excused: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often a shard of a map was in flight at a kill."""

    def __post_init__(self) -> None:
        (self.folder / "site").mkdir()
        (self.folder / "scratch").mkdir()
        (self.folder / "site" / "sitecustomize.py").write_text(self.watch)

    @property
    def log(self) -> Path:
        return self.folder / "begun.log"

    @property
    def watch(self) -> str:
        return WATCH.format(log=str(self.log))

    def begun(self) -> Counter[tuple[str, str]]:
        """How often each shard of each map was begun."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter((line.split()[0], line.split()[1]) for line in lines)

    def start(self, out: Path, executor: str) -> subprocess.Popen[bytes]:
        """Start ``stcln-geo predict``, as a user does."""
        options: list[str] = []
        if executor == "cluster":
            options = ["--scheduler", self.ready_cluster().address]
        elif executor != "here":
            options = ["--workers", executor]
        command = [
            sys.executable, "-c", "from stcln_geo.cli.main import run; run()", "predict",
            str(self.world.cube), "--checkpoint", str(self.world.checkpoint), "--out", str(out),
            *OPTIONS, *options,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PYTHONPATH": f"{self.folder / 'site'}:{TESTS.parent}",
            "TMPDIR": str(self.folder / "scratch"),
        }
        with (self.folder / "said").open("wb") as said:
            return subprocess.Popen(command, env=environment, stdout=said, stderr=said)

    def ready_cluster(self) -> Cluster:
        if self.cluster is None:
            self.cluster = Cluster(self.folder)
            self.crew = []
            for _ in range(self.rng.integers(1, 4)):
                self.add_worker()
            wait_for_workers(self.cluster, 1)
        return self.cluster

    def add_worker(self) -> None:
        assert self.cluster is not None
        scratch = str(self.folder / "scratch")
        self.crew.append(self.cluster.worker("--local-directory", scratch, first=self.watch))

    def close_cluster(self) -> None:
        if self.cluster is not None:
            self.cluster.close()
        self.cluster = None

    def executor_for(self, kills: list[str]) -> str:
        """Return somewhere to run where the next kills can be done, up to the one that ends it."""
        ends = next((index for index, kind in enumerate(kills) if kind != "worker"), len(kills))
        kinds = set(kills[: ends + 1])
        choices = ["cluster"]
        if "scheduler" not in kinds:
            choices.append("2")
        if "worker" not in kinds and "scheduler" not in kinds:
            choices += ["1", "here"]
        return str(self.rng.choice(choices))

    def wait(self, client: subprocess.Popen[bytes], out: Path, shards: int) -> bool:
        """Wait for a random moment between now and the end; False where the client ended first."""
        target = self.rng.integers(len(done(out)), shards + 1)
        deadline = time.monotonic() + PATIENCE
        while len(done(out)) < target or not (out / "plan.json").exists():
            if client.poll() is not None:
                return False
            assert time.monotonic() < deadline, (self.folder / "said").read_text()
            time.sleep(0.01)
        time.sleep(self.rng.uniform(0, 0.4))
        return client.poll() is None

    def strike(self, kind: str, client: subprocess.Popen[bytes], out: Path) -> bool:
        """Kill one; return True if that ends the client."""
        family = psutil.Process(client.pid).children(recursive=True)
        if kind == "client":
            client.kill()
        elif kind == "scheduler":
            assert self.cluster is not None
            self.cluster.scheduler.kill()
        elif self.cluster is not None and not family:
            victim = self.crew.pop(self.rng.integers(len(self.crew)))
            victim.kill()
            victim.wait()
        else:
            local = [one for one in family if "spawn_main" in " ".join(one.cmdline())]
            if not local:
                return False  # they are just being started
            victim = self.rng.choice(local)
            victim.kill()
            victim.wait(60)
        self.deck.pop(0)
        self.struck[kind] += 1
        if kind != "worker":
            client.wait(PATIENCE)
            _, alive = psutil.wait_procs(family, timeout=300)
            assert not alive, f"{alive} outlive their client"
        if kind == "scheduler":
            self.close_cluster()
        # What died with the one that was killed may have begun its last shard a moment later.
        finished = done(out)
        for name, shard in self.begun():
            if name == out.name and shard not in finished:
                self.excused[name, shard] += 1
        if kind == "worker" and self.cluster is not None and not family:
            self.add_worker()
        return kind != "worker"


def done(out: Path) -> set[str]:
    return {path.stem for path in out.glob("shards/*.json")}


def pixels(out: Path, name: str) -> np.ndarray:
    with rasterio.open(out / f"{name}.tif") as source:
        return source.read(1)


def sha256(out: Path) -> str:
    return hashlib.sha256(pixels(out, "classes").tobytes()).hexdigest()


def play(game: Game, out: Path, shards: int, kills: int) -> None:
    """Kill and resume one map until it is finished."""
    while True:
        ahead = game.deck[:kills]
        client, kind = game.start(out, game.executor_for(ahead)), ""
        while ahead and game.wait(client, out, shards):
            kind, before = ahead[0], len(game.deck)
            ended = game.strike(kind, client, out)
            if len(game.deck) < before:
                ahead, kills = ahead[1:], kills - 1
            if ended:
                break
        code = client.wait(PATIENCE)
        said = (game.folder / "said").read_text()
        if code == 0:
            return
        # A scheduler that is killed before the client found it cannot be reached.
        sentence = {1: "Lost the Dask scheduler", 2: "Cannot reach the Dask scheduler"}
        if kind == "scheduler":
            assert sentence[code] in said
            assert "Traceback" not in said
        else:
            assert (kind, code) == ("client", -9), said


def test_twenty_kills_and_one_map(world: Any, tmp_path: Path) -> None:
    print(f"STCLN_GEO_KILL_SEED={SEED}")
    rng = np.random.default_rng(SEED)
    deck = [kind for kind, count in KILLS.items() for _ in range(count)]
    game = Game(world=world, folder=tmp_path, rng=rng, deck=rng.permutation(deck).tolist())
    undisturbed = tmp_path / "undisturbed"
    assert game.start(undisturbed, "here").wait(PATIENCE) == 0
    shards = len(done(undisturbed))
    assert set(game.begun().values()) == {1}
    assert len(game.begun()) == shards > 50
    maps = []
    try:
        while game.deck:
            out = tmp_path / f"map-{len(maps)}"
            maps.append(out)
            play(game, out, shards, int(rng.integers(2, 7)))
    finally:
        game.close_cluster()
    assert dict(game.struck) == KILLS
    begun = game.begun()
    for out in maps:
        assert sha256(out) == sha256(undisturbed)
        mine, theirs = (pixels(one, "confidence").astype(int) for one in (out, undisturbed))
        assert np.abs(mine - theirs).max() <= 1
        assert {path.name for path in out.iterdir()} == {*PRODUCT, "embeddings.zarr"}
        assert {path.suffix for path in (out / "shards").iterdir()} == {".json"}
        assert done(out) == done(undisturbed)
        twice = {
            shard: times - 1 - game.excused[out.name, shard]
            for (name, shard), times in begun.items()
            if name == out.name and times > 1 + game.excused[out.name, shard]
        }
        assert not twice, "computed again though no kill found them in flight"
    # Otherwise this shows nothing: kills came before, amid and after the shards.
    assert len(maps) > 2
    assert sum(times > 1 for times in begun.values()) > 0
    left = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
    assert {path.suffix for path in left} <= {".lock", ".dirlock"}, "Dask's own"
