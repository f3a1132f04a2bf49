"""Carry out the runs of an experiment: one after the other, or several at once.

What is finished is found finished and left alone, and an interrupted run goes on from its last
save, because each run is made by the functions that the commands use.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from ..data.source import open_source
from ..errors import StclnGeoError, TaskError
from ..execution import ProgressHook, available_cores
from ..model.checkpoint import find_checkpoint, read_metadata
from ..storage import Location
from ..train.evaluate import evaluate_run
from ..train.evaluation import folder_elsewhere
from ..train.finetune import finetune
from ..train.pretrain import pretrain
from ..train.provenance import fingerprints_of
from ..train.run_directory import read_summary
from .design import View
from .settings import Settings
from .steps import FinetuneStep, PretrainStep, Steps

__all__ = ["carry_out_steps", "evaluation_file"]

Step = PretrainStep | FinetuneStep

_SAVE_MINUTES = 2.0
_JUDGED_AT_ONCE = 16
"""Windows of the usual size; a whole site is judged by itself."""
_WATCH_SECONDS = 2.0


def carry_out_steps(
    steps: Steps,
    settings: Settings,
    *,
    progress: ProgressHook | None = None,
    on_done: Callable[[Step, bool], None] | None = None,
) -> None:
    """Make all runs that are not finished, and judge them.

    Parameters
    ----------
    on_done
        Told each run as it ends, and whether there was anything left to do.

    Raises
    ------
    TaskError
        If runs failed; all others have finished then.
    StclnGeoError
        The first error that is the user's to correct, as a run raised it.
    """
    total, done = steps.count, 0

    def told(step: Step, worked: bool) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, step.title)
        if on_done is not None:
            on_done(step, worked)

    for wave in (steps.pretrain, steps.finetune):
        if settings.jobs > 1 and len(wave) > 1:
            _carry_out_at_once(wave, settings, told)
        else:
            for step in wave:
                inner = None
                if progress is not None:
                    inner = _within(progress, step.title, done=done, total=total)
                told(step, carry_out(step, settings, progress=inner))


def carry_out(step: Step, settings: Settings, *, progress: ProgressHook | None = None) -> bool:
    """Make and judge one run; return False where all of it was there."""
    if isinstance(step, PretrainStep):
        made = pretrain(
            step.cubes, step.out, step.config, device=settings.device, workers=settings.workers,
            save_every=_SAVE_MINUTES, progress=progress,
        )  # fmt: skip
        return not made.already
    data = step.open()
    result = finetune(
        data, step.out, step.config, device=settings.device, workers=settings.workers,
        save_every=_SAVE_MINUTES, progress=progress,
    )  # fmt: skip
    worked = not result.already
    for view in step.views:
        if not _is_judged(step, view):
            evaluate_run(
                step.out, data, season=step.season_of(view),
                dates=view.choice(step.season_of(view)), device=settings.device,
                workers=settings.workers, batch_size=_JUDGED_AT_ONCE,
                pictures=len(step.views) == 1, protocol=step.protocol, forest=bool(step.forest),
            )  # fmt: skip
            worked = True
    return worked


def evaluation_file(step: FinetuneStep, view: View) -> Location:
    """Return where the figures of a run are, of one view."""
    season = step.season_of(view)
    choice = view.choice(season)
    named = "" if step.protocol is None else f"-{step.protocol.name.replace(':', '-')}"
    begin = f"evaluation-test{named}"
    cut = "" if choice is None else choice.suffix(season)
    if season == step.season:
        return step.out / f"{begin}{cut}" / "metrics.json"
    return folder_elsewhere(step.out, begin, step.cube, season, cut) / "metrics.json"


def _is_judged(step: FinetuneStep, view: View) -> bool:
    """Return True where the weights that there are were judged, and all of it was written."""
    file = evaluation_file(step, view)
    if not file.is_file():
        return False
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # A protocol of one's own may judge otherwise than before, under the same name.
    rule = None if step.protocol is None else step.protocol.evaluation.model_dump(mode="json")
    if rule != found.get("judged_by"):
        return False
    if step.forest and found.get("baseline") is None:
        return False
    # A run goes on with its own season only as it was; that of others may have been split again.
    season = step.season_of(view)
    if season != step.season:
        there = fingerprints_of(open_source(step.cube, season))
        if there != found.get("judged_on"):
            return False
    return bool(found.get("sha256") == read_metadata(find_checkpoint(step.out)).sha256)


def _within(progress: ProgressHook, title: str, *, done: int, total: int) -> ProgressHook:
    """Tell of the steps of a run beside the runs that are done."""

    def advance(at: int, of: int, what: str) -> None:
        progress(done, total, f"{title}: step {at}/{of} {what}")

    return advance


def _carry_out_at_once(
    wave: Sequence[Step], settings: Settings, told: Callable[[Step, bool], None]
) -> None:
    """Make several runs at once, each in a process."""
    jobs = min(settings.jobs, len(wave))
    threads = max(available_cores() // jobs, 1)
    failures: list[tuple[Step, BaseException]] = []
    with _pool(jobs, threads) as pool:
        running: dict[Future[bool], Step] = {
            pool.submit(_carry_out_there, step, settings): step for step in wave
        }
        while running:
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                step = running.pop(future)
                error = future.exception()
                if error is None:
                    told(step, future.result())
                elif isinstance(error, StclnGeoError) and not isinstance(error, TaskError):
                    raise error
                else:
                    failures.append((step, error))
    if failures:
        listed = "; ".join(f"{step.out}: {_say(error)}" for step, error in failures[:3])
        raise TaskError(
            f"Cannot finish the experiment: {len(failures)} of {len(wave)} runs failed ({listed}). "
            "The other runs are finished. Look at the run.json of those that failed; the same "
            "command again makes only these, with fewer --jobs if memory ran out."
        )


@contextlib.contextmanager
def _pool(jobs: int, threads: int) -> Iterator[ProcessPoolExecutor]:
    """Give a pool whose processes end with this one; on an error, at once."""
    pool = ProcessPoolExecutor(
        jobs,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_set_up,
        initargs=(threads, os.getpid()),
    )
    try:
        yield pool
    except BaseException:
        # Runs save as they go: what is cut off here goes on with the same command.
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
    pool.shutdown()


def _set_up(threads: int, parent: int) -> None:
    """Share the cores out, and end where the process that asked is gone."""
    import torch

    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _carry_out_there(step: Step, settings: Settings) -> bool:
    return carry_out(step, settings)


def _say(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process, or another one beside it, was killed"
    return f"{type(error).__name__}: {error}"


def finished(step: Step) -> bool:
    """Return True where a run is finished; its evaluations may be missing."""
    return read_summary(step.out).get("status") == "finished"
