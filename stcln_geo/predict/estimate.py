"""About how long a prediction takes, before it is begun: measured, not guessed.

Where shards of the run are done, their pace is known. Otherwise a few windows, spread over the
region, are read and labelled on the spot. Pixels that are fetched from a search come at a pace
that only the run itself shows.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cube.store import open_season
from ..errors import InputError, UnreadableError
from ..execution import Execution, available_cores
from ..grid import Window
from ..model.device import choose_device
from ..progress import duration_text
from .files import shard_path
from .folder import read_json
from .forward import Network, Sample
from .stitch import group_pieces, pieces_of
from .windows import Job, job_of, read_samples

if TYPE_CHECKING:
    from .plan import PredictionPlan

__all__ = ["TimeEstimate", "estimate_time"]

_PLACES = 8
"""Windows that are looked at: as few dates are clear at one place as at another."""

_SECONDS = 3.0
"""About how long windows are run to be timed."""

_WINDOWS = 64
"""Windows that are timed at most, by then; a GPU takes as many at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeEstimate:
    """How long the labelling of what is left takes, without the start of workers."""

    seconds: float
    """Of the whole run; with a scheduler, whose workers are not known, of one worker."""
    shards: int
    """That are left to label."""
    done: int
    """Shards that were done before, whose pace was taken; 0: windows were measured."""
    measured: int
    """Windows that were measured."""
    device: str
    """What they were measured on."""
    on_scheduler: bool

    def __str__(self) -> str:
        """Say it in a line."""
        if not self.shards:
            return "all shards are labelled"
        basis = (
            f"at the pace of the {self.done} shards that are done"
            if self.done
            else f"as {self.measured} windows took on this machine's {self.device} just now"
        )
        if self.on_scheduler:
            return (
                f"about {duration_text(self.seconds)} of one worker's thread or GPU, {basis}; "
                "with more of them as much less"
            )
        return f"about {duration_text(self.seconds)} to label, {basis}"


def estimate_time(
    plan: PredictionPlan, *, execution: Execution | None = None, out: str | Path | None = None
) -> TimeEstimate | None:
    """Return about how long a plan takes; nothing is written.

    Parameters
    ----------
    execution
        Where it will run. Workers of a scheduler are taken to be as fast as this machine.
    out
        Folder of the product: shards of the run that are done there count.

    Returns
    -------
    TimeEstimate
        Or None where nothing tells: pixels are yet to be fetched, the places that were looked at
        have none, or this machine lacks the device.
    """
    execution = execution or Execution()
    workers = max(execution.workers, 1)
    manifests = [] if out is None else _done(plan, Path(out))
    places = {Window(*one["shard"]) for one in manifests}
    left = [shard for shard in plan.shards if shard not in places]
    area = sum(shard.area for shard in plan.shards)
    windows = plan.window_count * sum(shard.area for shard in left) / area
    paced = [one for one in manifests if one["windows"]]
    measured, device = 0, ""
    if not left:
        each = 0.0
    elif paced:
        took = sum(one["seconds"]["total"] for one in paced)
        each = took / sum(one["windows"] for one in paced) / workers
    else:
        found = _measure(plan, workers=workers, threads=execution.threads_per_task)
        if found is None:
            return None
        each, measured, device = found
    # The last round of shards takes as long as a full one.
    rounds = math.ceil(len(left) / workers) * workers / max(len(left), 1)
    return TimeEstimate(
        seconds=each * windows * rounds,
        shards=len(left),
        done=len(paced),
        measured=measured,
        device=device,
        on_scheduler=execution.scheduler is not None,
    )


def _done(plan: PredictionPlan, out: Path) -> list[dict[str, Any]]:
    """Return the manifests of the shards of this run that are in a folder."""
    found = (read_json(shard_path(out, shard, "json")) for shard in plan.shards)
    return [one for one in found if one is not None and one.get("run") == plan.run_hash]


def _measure(plan: PredictionPlan, *, workers: int, threads: int) -> tuple[float, int, str] | None:
    """Return the seconds of a window with all workers at it, how many were timed, on what."""
    if plan.source is not None:
        return None
    job = job_of(plan.to_json())
    try:
        choose_device(job.identity["device"])
    except InputError:
        return None  # as where a map is planned on another machine than those that make it
    samples, read_seconds = _read(plan, job)
    if not samples:
        return None
    network = job.network()
    # All that will run at the same time here runs at the same time now: cores share memory.
    lanes = min(workers * threads, available_cores())
    alone = [_time(network, job, samples[:1], 1) for _ in range(2)][-1]
    count = min(max(int(_SECONDS * lanes / alone), lanes), _WINDOWS)
    chosen = list(itertools.islice(itertools.cycle(samples), count))
    labelled = _time(network, job, chosen, lanes) / count
    return max(labelled, read_seconds / workers), count, network.device


def _read(plan: PredictionPlan, job: Job) -> tuple[list[Sample], float]:
    """Read windows here and there; return them, and the seconds for the pixels of a core."""
    samples: list[Sample] = []
    season = open_season(plan.cube, plan.season)
    started, pixels = time.perf_counter(), 0
    shards = plan.shards[:: -(-len(plan.shards) // _PLACES)]
    for shard in shards:
        pieces = pieces_of(shard, job.lattice, job.inside(shard))
        for piece in pieces[len(pieces) // 3 :: -(-len(pieces) * len(shards) // _PLACES)]:
            (group,) = group_pieces([piece], size=1, stride=job.lattice.stride)
            with contextlib.suppress(UnreadableError):  # the run sets its shard aside
                found = read_samples(season, group, plan.bands)
                samples += [one for one in found if one is not None]
            # Chunks are decoded whole, and in a run few are decoded for two blocks.
            side = -(-job.lattice.window // plan.chunk) + 1
            pixels += (side * plan.chunk) ** 2
    seconds = time.perf_counter() - started
    return samples, seconds * job.lattice.stride**2 / max(pixels, 1)


def _time(network: Network, job: Job, samples: list[Sample], lanes: int) -> float:
    started = time.perf_counter()
    for _ in network.label(samples, job.recipe, threads=lanes, batch_size=job.batch_size):
        pass
    return time.perf_counter() - started
