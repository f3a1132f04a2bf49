"""The image for workers, and the how-tos for clusters: what can be tried without one."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rasterio
import yaml

from stcln_geo import __version__

from .dask_cluster import Cluster, wait_for_workers

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "how-to"


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions: name and the rest, lines joined."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")
    ]
    text = "\n".join(lines).replace("\\\n", " ")
    return [
        (name, " ".join(rest.split()))
        for name, _, rest in (line.partition(" ") for line in text.splitlines() if line.strip())
    ]


def rests(name: str) -> list[str]:
    return [rest for found, rest in instructions() if found == name]


def blocks(page: str, language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return re.findall(pattern, (PAGES / page).read_text(), flags=re.DOTALL | re.MULTILINE)


def sent_to_docker(path: str) -> bool:
    """Return True unless .dockerignore keeps a path out; the last pattern that fits decides."""
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        parts = [path, *(str(one) for one in Path(path).parents if str(one) != ".")]
        variants = (pattern, pattern.removeprefix("**/"))
        names = [*parts, *(Path(one).name for one in parts)] if "**/" in pattern else parts
        if any(fnmatch.fnmatchcase(one, variant) for one in names for variant in variants):
            kept = line.startswith("!")
    return kept


def test_the_image_is_built_of_files_that_exist_and_are_sent() -> None:
    known = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "LABEL", "USER", "CMD"}
    assert {name for name, _ in instructions()} <= known
    sources = [
        source
        for rest in rests("COPY")
        if not rest.startswith("--from=")
        for source in rest.split()[:-1]
    ]
    assert {"stcln_geo", "cli", "catalogs", "pyproject.toml"} <= set(sources)
    for source in sources:
        assert (ROOT / source).exists(), source
        assert sent_to_docker(source), source
    assert sent_to_docker("stcln_geo/predict/run.py")
    for left_out in (
        ".git",
        ".venv",
        "tests/conftest.py",
        "stcln_geo/__pycache__",
        "stcln_geo/cli",
    ):
        assert not sent_to_docker(left_out), left_out


def test_the_image_holds_all_that_the_package_is_made_of() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    folders = {
        (ROOT / project["tool"]["setuptools"]["package-dir"].get(name, name.replace(".", "/")))
        for name in project["tool"]["setuptools"]["packages"]
    }
    copied = {source for rest in rests("COPY") for source in rest.split()[:-1]}
    for folder in folders:
        assert folder.relative_to(ROOT).parts[0] in copied, folder
    for named in [project["project"]["readme"], *project["project"]["license-files"]]:
        assert named in copied


def test_the_image_has_the_version_python_and_torch_of_the_project() -> None:
    assert f"VERSION={__version__}" in rests("ARG")
    tags = re.findall(r"stcln-geo:(\d[\w.]*)", (ROOT / "Dockerfile").read_text())
    tags += re.findall(r"stcln-geo:(\d[\w.]*)", (PAGES / "kubernetes.md").read_text())
    assert len(tags) > 5
    assert set(tags) == {__version__}
    assert {rest.split()[0] for rest in rests("FROM")} == {"python:3.11-slim"}
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    grep = subprocess.run(
        ["grep", "^torch==", "constraints.txt"], cwd=ROOT, capture_output=True, text=True
    )
    assert grep.stdout.strip() == torch
    assert any("grep '^torch==' constraints.txt" in rest for rest in rests("RUN"))


def test_the_image_does_not_run_as_root() -> None:
    names = [name for name, _ in instructions()]
    assert rests("USER") == ["stcln"]
    assert names.index("USER") > max(
        place for place, name in enumerate(names) if name in ("RUN", "COPY")
    )


@pytest.mark.slow
def test_what_the_image_starts_is_a_worker_of_the_scheduler_in_the_environment(
    cluster: Cluster,
) -> None:
    (command,) = (json.loads(rest) for rest in rests("CMD"))
    assert command[0] == "dask"
    worker = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=cluster.folder,
        env={**os.environ, "DASK_SCHEDULER_ADDRESS": cluster.address},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_workers(cluster, 1)
    finally:
        worker.terminate()
        worker.wait(20)


def test_the_objects_for_kubernetes_fit_one_another() -> None:
    cluster, job, training = (yaml.safe_load(block) for block in blocks("kubernetes.md", "yaml"))
    (scheduler,) = cluster["spec"]["scheduler"]["spec"]["containers"]
    pod = cluster["spec"]["worker"]["spec"]
    (worker,) = pod["containers"]
    client_pod = job["spec"]["template"]["spec"]
    (client,) = client_pod["containers"]
    assert scheduler["image"] == worker["image"] == client["image"]
    assert worker["volumeMounts"] == client["volumeMounts"]
    assert pod["volumes"] == client_pod["volumes"]
    assert worker["envFrom"] == client["envFrom"]
    assert pod["securityContext"] == client_pod["securityContext"] == {"fsGroup": 1000}
    selector = cluster["spec"]["scheduler"]["service"]["selector"]
    assert selector["dask.org/cluster-name"] == cluster["metadata"]["name"]
    address = f"--scheduler=tcp://{cluster['metadata']['name']}-scheduler:8786"
    assert address in client["args"]
    from .test_docs import Line, check

    check(Line(page=PAGES / "kubernetes.md", text=shlex.join(client["args"]), whole=True))
    pod = training["spec"]["template"]["spec"]
    (trainer,) = pod["containers"]
    assert (trainer["image"], trainer["envFrom"]) == (client["image"], client["envFrom"])
    assert pod["securityContext"] == client_pod["securityContext"]
    (mount,), (volume,) = trainer["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert f"--work={mount['mountPath']}" in trainer["args"]
    check(Line(page=PAGES / "kubernetes.md", text=shlex.join(trainer["args"]), whole=True))
    assert check_dask(scheduler["args"])
    assert check_dask([one.replace("$(DASK_WORKER_NAME)", "name") for one in worker["args"]])


def check_dask(words: list[str]) -> bool:
    """Return True where Dask has the command and its options; raise what click says if not."""
    from distributed.cli import dask_scheduler, dask_worker

    command = {"scheduler": dask_scheduler.main, "worker": dask_worker.main}[words[1]]
    command.make_context(words[1], words[2:], resilient_parsing=False)
    return words[0] == "dask"


def test_dask_commands_of_the_pages_exist() -> None:
    found = 0
    for page in ("dask.md", "slurm.md", "several-gpus.md"):
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.strip().removesuffix("&").split("dask ", 1)
                if len(words) == 2 and re.match(r"(scheduler|worker) ?", words[1]):
                    found += check_dask(["dask", *shlex.split(words[1])])
    assert found >= 5


@pytest.mark.slow
def test_the_slurm_job_runs_but_for_slurm(tmp_path: Path) -> None:
    """The script as printed; ``srun`` starts two workers here, as SLURM would on its nodes."""
    from .predict.conftest import CRS, World, make_network, make_season, region_polygon

    legend = _legend()
    season = make_season(tmp_path / "region.zarr", region_polygon())
    world = World(season=season, checkpoint=tmp_path / "runs" / "finetune.pt", legend=legend)
    world.save(tmp_path / "runs" / "finetune" / "model.safetensors", make_network(len(legend)))
    (script,) = (block for block in blocks("slurm.md", "bash") if block.startswith("#!/bin/bash"))
    assert "#SBATCH --ntasks=32" in script
    script = script.replace("runs/finetune", "runs/finetune/model.safetensors")
    (tmp_path / "map.sh").write_text(script)
    tools = {
        "srun": 'for task in 1 2; do "$@" & done\nwait',
        "dask": f'exec {sys.executable} -m dask "$@"',
        "python": f'exec {sys.executable} "$@"',
        "stcln-geo": f"exec {sys.executable} -c 'from stcln_geo.cli.main import run; run()' \"$@\"",
    }
    places = tmp_path / "venv" / "bin"
    places.mkdir(parents=True)
    for name, body in tools.items():
        (places / name).write_text(f"#!/bin/sh\n{body}\n")
        (places / name).chmod(0o755)
    (places / "activate").write_text(f'PATH="{places}:$PATH"\n')
    done = subprocess.run(
        ["bash", "map.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env={**os.environ, "SLURM_JOB_ID": "7", "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with rasterio.open(tmp_path / "map" / "classes.tif") as source:
        assert source.crs.to_string() == CRS
        assert (source.read(1) != 255).sum() > 1000
    assert not list(tmp_path.glob("scheduler-*.json"))


def _legend() -> Any:
    from stcln_geo.legend import Legend

    return Legend.from_values([f"crop {number}" for number in range(4)])
