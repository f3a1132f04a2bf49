"""Fetch the pixels that windows need, block by block, while earlier ones are labelled.

The windows of a task are read group by group, in the rows of the lattice. A thread builds what
they need, by the code that builds cubes, into a season in scratch that covers these groups only;
the windows are then read from it as from any cube. The thread stays ahead of the reader by about
one row of blocks, and a block is removed when its last group has been read: so scratch never
holds more than the rows at work, and nothing once the task ends.

Ahead means within a task, not across tasks: which task a Dask worker gets next is not known to
it, and with blocks well below a shard the network waits only for the first of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..catalog import Access
from ..cube.block import read_block
from ..cube.pixels import Pixels
from ..cube.planned import Scene
from ..cube.read import AssetReader
from ..cube.scenes import Readers
from ..cube.scratch import scratch_folder, sweep_scratch
from ..cube.store import Season, create_season, write_shard
from ..errors import OutputError
from ..grid import Window, geobox_from_window
from .blocks import Block, cut_blocks, fetch_layout, plan_fetch
from .source import Fetched, Supply
from .stitch import Group

__all__ = ["Feed"]

_CUBE = "pixels.zarr"


class Feed(contextlib.AbstractContextManager["Feed"]):
    """The pixels of groups, which must be asked for in their order."""

    def __init__(
        self, supply: Supply, groups: Sequence[Group], *, threads: int, fetched: Fetched
    ) -> None:
        """Cut the work; nothing is read yet."""
        self._supply, self._threads, self._fetched = supply, threads, fetched
        self._plan = supply.plan
        self._position = {id(group): index for index, group in enumerate(groups)}
        areas = [group.area.intersection(self._plan.window) for group in groups]
        self._grid = areas[0]
        for area in areas:
            self._grid = self._grid.union(area) if not area.is_empty else self._grid
        self._layout = fetch_layout(self._plan, self._grid.shape_yx)
        shape = plan_fetch(
            self._plan, self._grid.shape_yx, layout=self._layout, memory=supply.memory
        )
        self._blocks = cut_blocks(areas, self._grid, shape_yx=shape, shard=self._layout.shard)
        self._reach = _reach(
            [group.cell.row for group in groups], max(shape[0], groups[0].cell.height)
        )
        self._changed = threading.Condition()
        self._current = 0
        self._done: set[int] = set()
        self._removed: set[int] = set()
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._stored = 0
        self._ends = contextlib.ExitStack()

    def __enter__(self) -> Feed:
        """Make an empty season in scratch, and begin to fill it."""
        sweep_scratch(self._supply.scratch)
        with self._ends:
            folder = self._ends.enter_context(scratch_folder(self._supply.scratch))
            with self._room():
                self._season = self._create(folder / _CUBE)
            thread = threading.Thread(target=self._work, name="fetch", daemon=True)
            thread.start()
            self._ends.callback(thread.join)
            self._ends = self._ends.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop, and remove the scratch."""
        self.stop()
        self._ends.close()

    def stop(self) -> None:
        """Fetch no more; whoever waits for pixels gets an error."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Stop at the end of a context, so that a reader in a thread is not waited for."""
        try:
            yield
        finally:
            self.stop()

    @contextlib.contextmanager
    def pixels_of(self, group: Group) -> Iterator[Season]:
        """Wait for a group's pixels, and give the season to read them from.

        Raises
        ------
        AssetReadError
            If an asset cannot be read, and scenes are not left out.
        OutputError
            If there is no room in scratch.
        """
        index = self._position[id(group)]
        wanted = [n for n, block in enumerate(self._blocks) if block.first <= index <= block.last]
        started = time.monotonic()
        with self._changed:
            self._current = index
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._done.issuperset(wanted) or self._error or self._stopped.is_set()
            )
            if not self._done.issuperset(wanted):
                raise self._error or _StoppedError
        self._fetched.waited_seconds += time.monotonic() - started
        yield self._season
        for number in wanted:
            if self._blocks[number].last == index:
                self._remove(number)

    def _create(self, path: Path) -> Season:
        (season,) = self._plan.seasons
        return create_season(
            path,
            season.name,
            geobox=geobox_from_window(
                self._grid, crs=self._plan.crs, resolution=self._plan.spec.resolution
            ),
            time=season.time,
            bands=self._plan.bands,
            aoi=self._plan.aoi,
            layout=self._layout,
        )

    def _work(self) -> None:
        readers = _StoppableReaders(self._plan.access, self._stopped)
        started = time.monotonic()
        try:
            for number, block in enumerate(self._blocks):
                with self._changed:
                    idle = time.monotonic()
                    self._changed.wait_for(
                        lambda first=block.first: (  # type: ignore[misc]
                            self._stopped.is_set() or first <= self._reach[self._current]
                        )
                    )
                    started += time.monotonic() - idle
                if self._stopped.is_set():
                    return
                self._fetch(block, readers)
                with self._changed:
                    self._done.add(number)
                    self._changed.notify_all()
        except BaseException as error:  # raised again where the pixels are waited for
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            self._fetched.reads += readers.reads
            self._fetched.seconds += time.monotonic() - started

    def _fetch(self, block: Block, readers: Readers) -> None:
        """Build a block as a cube's, and write its storage shards."""
        (season,) = self._plan.seasons
        area = block.area.shift(self._grid.row, self._grid.col)
        pixels = read_block(
            dataclasses.replace(self._plan, window=area),
            season,
            readers,
            folder=self._supply.folder,
            skip_failures=self._supply.skip_failures,
            threads=self._threads,
        )
        self._fetched.left_out.update(pixels.left_out)
        self._fetched.audits.append(pixels.audit)
        with self._room():
            for cell in block.cells:
                part = pixels.arrays.part(cell.relative_to(block.area))
                write_shard(
                    self._season, cell, reflectance=part["reflectance"], valid=part["valid"]
                )
                self._count(sum(path.stat().st_size for path in self._files(cell)))

    def _remove(self, number: int) -> None:
        if number in self._removed:
            return
        self._removed.add(number)
        for cell in self._blocks[number].cells:
            for path in self._files(cell):
                self._count(-path.stat().st_size)
                path.unlink()

    def _files(self, cell: Window) -> list[Path]:
        """Return the files of a storage shard: none of an array whose pixels are all empty."""
        folder = Path(str(self._season.cube)) / self._season.folder
        side = self._layout.shard
        places = f"{cell.row // side}/{cell.col // side}"
        dims = {"reflectance": 4, "valid": 3, "coverage": 3, "overview": 4}
        files = [folder / name / "c" / ("0/" * (n - 2) + places) for name, n in dims.items()]
        return [path for path in files if path.is_file()]

    def _count(self, size: int) -> None:
        with self._changed:
            self._stored += size
            self._fetched.scratch_bytes = max(self._fetched.scratch_bytes, self._stored)

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OutputError as error:
            raise OutputError(
                f"{error} This is scratch for pixels on their way to the network: --scratch names "
                "another folder for it."
            ) from error


def _reach(rows: Sequence[int], ahead: int) -> list[int]:
    """Return, for each group, the last one whose pixels are fetched while it is read.

    Parameters
    ----------
    rows
        First row of each group's cell, increasing.
    ahead
        How many rows further may be fetched.
    """
    ends = np.searchsorted(rows, np.asarray(rows) + ahead, side="right") - 1
    return [max(int(end), index + 1) for index, end in enumerate(ends)]


class _StoppedError(RuntimeError):
    """The task has ended; its pixels are wanted no more."""


class _StoppableReaders(Readers):
    """Readers that read nothing more once a task has ended."""

    def __init__(self, access: Access, stopped: threading.Event) -> None:
        super().__init__(access)
        self._stop = stopped

    def of(self, scene: Scene) -> AssetReader:
        return _StoppableReader(super().of(scene), self._stop)


class _StoppableReader(AssetReader):
    """One of them: passes on to the reader that it stands for."""

    def __init__(self, reader: AssetReader, stopped: threading.Event) -> None:
        super().__init__()
        self._reader, self._stop = reader, stopped

    def fetch(self, *args: Any, **options: Any) -> Pixels:
        if self._stop.is_set():
            raise _StoppedError
        return self._reader.fetch(*args, **options)
