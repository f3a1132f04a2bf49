"""Several processes for one run: started here by --devices, or by torchrun or srun outside."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from ..errors import InputError, TaskError
from ._common import ToldToEnd

__all__ = ["is_first_rank", "share_out"]

_LIFELINE = "STCLN_GEO_LIFELINE"
_GRACE_S = 5.0
_MISTAKE = 2
"""Exit code of a user's mistake."""
_COMMAND = "import sys; from stcln_geo.cli.main import invoke; sys.exit(invoke(sys.argv[1:]))"


def is_first_rank() -> bool:
    """Return True in the process that talks to the user."""
    if "WORLD_SIZE" in os.environ:
        return os.environ.get("RANK", "0") == "0"
    return not _in_srun() or os.environ.get("SLURM_PROCID", "0") == "0"


def share_out(
    arguments: Sequence[str], *, devices: int | None, nodes: int | None, device: str
) -> int | None:
    """Start a process for each device and wait for them; return their exit code.

    Parameters
    ----------
    arguments
        The command line, for the processes to repeat.
    devices
        GPUs of this node, or processes where the run is on the CPU; None: as many as were started.

    Returns
    -------
    None where this process shall train itself: it is alone, or one of those started.

    Raises
    ------
    InputError
        If that many devices are not there, or several nodes are asked for without a launcher.
    """
    if "WORLD_SIZE" in os.environ or _in_srun():
        _watch_parent()
        _check_started(devices, nodes)
        return None
    if (nodes or 1) > 1:
        raise InputError(
            f"Cannot train on --nodes {nodes} from here: the processes on other nodes must be "
            "started there. Use torchrun or srun (docs: Train on several GPUs and machines)."
        )
    if devices is None or devices == 1:
        return None
    _check_devices(devices, device)
    return _run_all(arguments, devices)


def _watch_parent() -> None:
    """End this process when the one that started it for --devices is gone, however it went."""
    handle = os.environ.pop(_LIFELINE, None)
    if handle is None:
        return

    def wait() -> None:
        with contextlib.suppress(OSError):
            # Nobody writes: this returns when the other end is closed.
            os.read(int(handle), 1)
        os._exit(1)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def _in_srun() -> bool:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def _check_started(devices: int | None, nodes: int | None) -> None:
    from ..train.ranks import find_ranks

    ranks = find_ranks()
    for option, wanted, there in (
        ("--devices", devices, ranks.local_size),
        ("--nodes", nodes, ranks.nodes),
    ):
        if wanted is not None and wanted != there:
            raise InputError(
                f"Cannot train with {option} {wanted}: the launcher started {ranks.size} processes "
                f"on {ranks.nodes} nodes, which makes {there}. Leave {option} out, or ask the "
                "launcher for as many."
            )


def _check_devices(devices: int, device: str) -> None:
    if devices < 1:
        raise InputError(
            f"Cannot train with --devices {devices}: it must be 1 or more. Use --devices 2."
        )
    if device == "cpu":
        return
    import torch

    there = torch.cuda.device_count()
    if there == 0 and device == "auto":
        return
    if devices > there:
        raise InputError(
            f"Cannot train with --devices {devices}: torch finds {there} GPUs here. Ask for at "
            "most as many, or use --device cpu."
        )


def _run_all(arguments: Sequence[str], devices: int) -> int:
    """Run the ranks; the first that fails ends them all. Only rank 0 writes to the terminal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    lifeline, held = os.pipe()
    threads = max((os.cpu_count() or 1) // devices, 1)
    common = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "WORLD_SIZE": str(devices),
        "LOCAL_WORLD_SIZE": str(devices),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _LIFELINE: str(lifeline),
    }
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, held)
        stack.callback(os.close, lifeline)
        errors: list[IO[bytes] | None] = [None]
        errors += [stack.enter_context(tempfile.TemporaryFile()) for _ in range(devices - 1)]
        ranks: list[subprocess.Popen[bytes]] = []
        stack.callback(_stop, ranks)
        for rank in range(devices):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            started = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, *arguments],
                env=environment,
                pass_fds=(lifeline,),
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=errors[rank],
            )
            ranks.append(started)
        try:
            failed = _wait(ranks)
        except KeyboardInterrupt as error:
            # The terminal has interrupted the ranks too; who was told to end alone tells them.
            if not isinstance(error, ToldToEnd):
                _let_end(ranks)
            raise
        codes = {rank: ranks[rank].returncode for rank in failed}
        if codes.get(0) != _MISTAKE:
            # All ranks say the same of a user's mistake.
            for rank in failed:
                _repeat(rank, errors[rank])
    killed = [rank for rank, code in codes.items() if code < 0]
    if killed:
        raise _killed(killed[0], devices, -codes[killed[0]])
    return next(iter(codes.values()), 0)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Return the ranks that fail, as soon as one does; none when all have ended well."""
    while True:
        codes = [rank.poll() for rank in ranks]
        if all(code == 0 for code in codes):
            return []
        if any(codes):
            # The others soon notice, and may say why.
            time.sleep(0.5)
            return [rank for rank, process in enumerate(ranks) if process.poll()]
        time.sleep(0.1)


def _stop(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """End the ranks that are left, by force if need be."""
    for end in (subprocess.Popen.terminate, subprocess.Popen.kill):
        for rank in ranks:
            if rank.poll() is None:
                end(rank)
        _let_end(ranks)


def _let_end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait until the ranks have ended, but not for long."""
    deadline = time.monotonic() + _GRACE_S
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def _repeat(rank: int, told: IO[bytes] | None) -> None:
    """Show what a rank wrote; rank 0 has shown it itself."""
    if told is None:
        return
    told.seek(0)
    text = told.read().decode(errors="replace").strip()
    if text:
        sys.stderr.write(f"Rank {rank}: {text}\n")


def _killed(rank: int, ranks: int, signal_number: int) -> TaskError:
    return TaskError(
        f"Cannot go on training: rank {rank} of {ranks} was ended by signal {signal_number}. A "
        "run needs all of its ranks, so the others were ended too. If nobody did that, memory may "
        "have run out (the kernel's log says so). Run the same command again: it goes on from the "
        "last save."
    )
