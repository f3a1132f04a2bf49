"""Several ranks do what one does with the whole batch; who a process is, is read with care."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stcln_geo.cube.store import open_season, write_split
from stcln_geo.errors import InputError
from stcln_geo.train.ranks import Ranks, find_ranks

WORKER = Path(__file__).parent / "rank_worker.py"


def start(cube: Path, folder: Path, *, rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return subprocess.Popen([sys.executable, str(WORKER), str(cube), str(folder)], env=environment)


@pytest.fixture(scope="module")
def found(small_cube: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        start(small_cube, folder, rank=rank, size=size, port=port)
        for rank, size in ((0, 2), (1, 2), (0, 1))
    ]
    assert [one.wait(timeout=300) for one in started] == [0, 0, 0]
    return {
        name: torch.load(folder / f"{name}.pt", weights_only=True)
        for name in ("0-of-1", "0-of-2", "1-of-2")
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    ["pretrain geo", "finetune geo", "finetune reference", "finetune geo cross-entropy+dice"],
)
def test_two_ranks_with_half_the_batch_equal_one_with_all_of_it(
    found: dict[str, Any], case: str
) -> None:
    one = found["0-of-1"][case]
    for rank in ("0-of-2", "1-of-2"):
        two = found[rank][case]
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["counted"] == pytest.approx(one["counted"], rel=1e-6)
        for key, gradient in one["gradients"].items():
            torch.testing.assert_close(
                two["gradients"][key], gradient, rtol=1e-8, atol=1e-10, msg=key
            )
        for key, buffer in one["buffers"].items():
            torch.testing.assert_close(two["buffers"][key], buffer, rtol=1e-5, atol=1e-6, msg=key)
    assert any(float(gradient.abs().max()) > 1e-3 for gradient in one["gradients"].values())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["pretrain geo", "finetune geo"])
def test_validation_sees_each_chip_once_over_all_ranks(found: dict[str, Any], case: str) -> None:
    one = found["0-of-1"][case]["figures"]
    # None where nothing was hidden, as in months without a date.
    known = {name: value for name, value in one.items() if value is not None}
    assert known
    for rank in ("0-of-2", "1-of-2"):
        two = found[rank][case]["figures"]
        assert two.keys() == one.keys()
        assert {name: value for name, value in two.items() if value is not None} == pytest.approx(
            known, rel=1e-5
        )


@pytest.mark.slow
def test_the_same_chips_are_drawn_over_all_ranks(found: dict[str, Any]) -> None:
    one = found["0-of-1"]["drawn"]
    assert len({name for name, _, _ in one}) == 4
    for rank in ("0-of-2", "1-of-2"):
        for (name, dates, made), (other, others, again) in zip(
            one, found[rank]["drawn"], strict=True
        ):
            assert (name, dates) == (other, others)
            # The weights' statistics are those of a step that the ranks shared.
            torch.testing.assert_close(again, made, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.slow
def test_ranks_fit_one_temperature(found: dict[str, Any]) -> None:
    one = found["0-of-1"]["fitted"]
    assert 1 < one["temperature"] < 20
    assert one["pixels"] == 40
    assert 0.1 < one["error_before"] != one["error_after"]
    assert found["0-of-2"]["fitted"] == pytest.approx(one, rel=1e-6)
    assert found["1-of-2"]["fitted"] == found["0-of-2"]["fitted"]


@pytest.mark.slow
def test_ranks_see_disjoint_chips_and_as_many_steps(found: dict[str, Any]) -> None:
    first, second = found["0-of-2"]["steps"], found["1-of-2"]["steps"]

    assert len(first) == len(second)
    one = {place for batch in found["0-of-1"]["steps"] for place in batch}
    shares = [{place for batch in steps for place in batch} for steps in (first, second)]
    assert shares[0].isdisjoint(shares[1])
    assert shares[0] | shares[1] == one
    assert len(one) == 20


@pytest.mark.slow
def test_rank_0_speaks_for_all(found: dict[str, Any]) -> None:
    assert [found[name]["told"] for name in ("0-of-2", "1-of-2")] == [0, 0]
    assert found["1-of-2"]["gathered"] == [0, 1]


@pytest.mark.slow
def test_two_ranks_are_one_owner_of_their_run(found: dict[str, Any]) -> None:
    for name, owner in (("0-of-1", "0-of-1"), ("0-of-2", "0-of-2"), ("1-of-2", "0-of-2")):
        assert f"process {found[owner]['pid']} on" in found[name]["refusal"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("there", "codes", "told"),
    [
        ("gone.zarr", (1, 2), ("lost another rank", "Cannot open the cube .*gone.zarr")),
        ("split.zarr", (2, 2), ("rank 1 was given other labels than rank 0",) * 2),
    ],
    ids=["no data", "other data"],
)
def test_ranks_whose_data_are_not_alike_do_not_train(
    there: str, codes: tuple[int, int], told: tuple[str, str], small_cube: Path, tmp_path: Path
) -> None:
    """As where each machine has a copy of its own, and no launcher ends the other ranks."""
    copy = shutil.copytree(small_cube, tmp_path / "split.zarr")
    season = open_season(copy, mode="r+")
    assert season.fields is not None
    write_split(season, np.roll(season.fields.split, 1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = "from stcln_geo.cli.main import run; run()"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", command, "finetune", str(cube), "--out", str(tmp_path / "run"),
             "--preset", "tiny", "--steps", "2", "--device", "cpu"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE, text=True,
        )
        for rank, cube in enumerate((small_cube, tmp_path / there))
    ]  # fmt: skip
    said = [one.communicate(timeout=300)[1] for one in started]

    assert tuple(one.returncode for one in started) == codes, said
    for text, part in zip(said, told, strict=True):
        assert re.search(part, text)
        assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


def test_who_this_is() -> None:
    torchrun = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node-a", "MASTER_PORT": "29500",
    }  # fmt: skip
    ranks = find_ranks(torchrun)

    assert ranks == Ranks(rank=5, size=8, local_rank=1, local_size=4, address="node-a", port=29500)
    assert ranks.nodes == 2
    assert not ranks.first
    assert find_ranks({}) == Ranks()
    # The variables of a job, without srun: one process.
    assert find_ranks({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Ranks()
    with pytest.raises(InputError, match="invalid literal"):
        find_ranks({**torchrun, "RANK": "first"})
    with pytest.raises(InputError, match="as many processes as the others"):
        find_ranks({**torchrun, "LOCAL_WORLD_SIZE": "3"})


def test_who_this_is_under_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3",
        "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "12345",
        "SLURM_NTASKS": "4",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)

    ranks = find_ranks()

    assert (ranks.rank, ranks.size, ranks.local_rank, ranks.local_size) == (3, 4, 1, 2)
    assert ranks.address == "gpu07"
    assert ranks.port > 1024
