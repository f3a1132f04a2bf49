"""Rectangles of arrays are those that Zarr reads; damaged chunks are named."""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from stcln_geo.cube.store import open_season
from stcln_geo.data import blocks
from stcln_geo.data.blocks import ShardReader, ZarrReader, open_reader
from stcln_geo.data.chips import ChipDataset, plan_chips
from stcln_geo.data.shard_index import OVERHEAD, IndexCache
from stcln_geo.data.source import open_source
from stcln_geo.data.stream import OrderedStream, ProblemLog, TrainingStream
from stcln_geo.errors import ChunkError, InputError

SEASON = "2018-09-01"


@pytest.mark.parametrize("name", ["reflectance", "valid", "labels"])
def test_shards_are_read_as_zarr_reads_them(cube: Path, name: str) -> None:
    place = cube / SEASON / name
    array = zarr.open_array(place, mode="r")
    reader = open_reader(array, place)
    assert isinstance(reader, ShardReader)
    generator = np.random.default_rng(0)

    for _ in range(25):
        bounds = [sorted(generator.integers(0, size + 1, 2)) for size in array.shape]
        selection = tuple(slice(int(low), int(high)) for low, high in bounds)
        expected = np.asarray(array[selection])
        for found in (reader, ZarrReader(array, place), pickle.loads(pickle.dumps(reader))):
            values = found.read(selection)
            assert values.dtype == expected.dtype
            assert np.array_equal(values, expected)


def test_what_was_never_written_is_the_fill_value(tmp_path: Path) -> None:
    array = zarr.create_array(
        tmp_path / "a", shape=(3, 50, 70), chunks=(3, 16, 16), shards=(3, 32, 32), dtype="int16",
        fill_value=-7, compressors=zarr.codecs.BloscCodec(cname="lz4"),
    )  # fmt: skip
    array[:, 16:32, :16] = 5
    reader = open_reader(array, tmp_path / "a")
    assert isinstance(reader, ShardReader)

    whole = reader.read((slice(0, 3), slice(0, 50), slice(0, 70)))

    assert np.array_equal(whole, array[:])
    assert (whole == -7).mean() == 1 - 3 * 256 / whole.size


@pytest.fixture
def holed(tmp_path: Path) -> zarr.Array:
    """3 x 4 shards of 3 x 3 chunks, ragged at the edges: a shard and some chunks have nothing."""
    array = zarr.create_array(
        tmp_path / "holed", shape=(100, 130), chunks=(12, 12), shards=(36, 36), dtype="int32",
        fill_value=0, compressors=zarr.codecs.BloscCodec(cname="lz4"),
    )  # fmt: skip
    values = np.random.default_rng(3).integers(1, 1 << 30, (100, 130))
    values[36:72, 36:72] = 0
    values[12:36, 84:96] = 0
    array[:] = values
    return array


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, int]]:
    """Each read of a part of a file: the file, and the bytes asked for."""
    reads: list[tuple[Path, int]] = []
    read = blocks._read_range

    def counted(file: Path, offset: int, length: int) -> bytes:
        reads.append((file, length))
        return read(file, offset, length)

    monkeypatch.setattr(blocks, "_read_range", counted)
    return reads


def test_a_rectangle_asks_each_file_once(
    holed: zarr.Array, tmp_path: Path, asked: list[tuple[Path, int]]
) -> None:
    reader = open_reader(holed, tmp_path / "holed")
    whole = (slice(0, 100), slice(0, 130))
    files = sorted(path for path in (tmp_path / "holed" / "c").rglob("*") if path.is_file())
    assert len(files) == 11

    for index_reads in (len(files), 0):
        asked.clear()
        assert np.array_equal(reader.read(whole), holed[:])
        assert len(asked) == len(files) + index_reads
        assert sorted({file for file, _ in asked}) == files


def test_no_more_is_read_at_once_than_may_be_and_little_for_nothing(
    holed: zarr.Array, tmp_path: Path, asked: list[tuple[Path, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    reader = open_reader(holed, tmp_path / "holed")
    part = (slice(5, 95), slice(20, 119))  # chunks at the edge are padded, and so smaller
    reader.read(part)
    # Noise does not get smaller, so that a chunk has its bytes and a header.
    least, most = 12 * 12 * 4, 12 * 12 * 4 + 32
    monkeypatch.setattr(blocks, "_RUN_BYTES", 3 * most)
    monkeypatch.setattr(blocks, "_GAP_BYTES", 0)
    asked.clear()

    assert np.array_equal(reader.read(part), holed[part])

    touched = math.prod(-(-one.stop // 12) - one.start // 12 for one in part)
    empty = 9 + 2  # the shard without a file, and the chunks of the second hole
    assert max(length for _, length in asked) <= 3 * most
    assert max(length for _, length in asked) > 2 * least
    assert least <= sum(length for _, length in asked) / (touched - empty) <= most


def test_the_indices_of_all_arrays_have_one_bound(
    holed: zarr.Array, tmp_path: Path, asked: list[tuple[Path, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    index = 9 * 16 + 4
    kept = IndexCache(5 * (9 * 16 + OVERHEAD))
    monkeypatch.setattr(blocks, "_indices", kept)
    readers = [open_reader(holed, tmp_path / "holed") for _ in range(3)]
    corners = [(slice(row, row + 1), slice(0, 1)) for row in (0, 40, 80)]

    for reader in readers:
        for corner in corners:
            assert np.array_equal(reader.read(corner), holed[corner])
            assert kept.held <= kept.most
    assert [length for _, length in asked].count(index) == 9
    asked.clear()
    for reader, again in ((readers[2], 0), (readers[0], 3)):
        for corner in corners:
            reader.read(corner)
        assert [length for _, length in asked].count(index) == again
        asked.clear()


@pytest.mark.parametrize(
    "options",
    [
        {"shards": None},
        {"compressors": zarr.codecs.ZstdCodec()},
        {"shards": None, "zarr_format": 2},
        {"dtype": ">i2"},
    ],
    ids=["no shards", "zstd", "zarr 2", "big-endian"],
)
def test_other_layouts_are_read_through_zarr(tmp_path: Path, options: dict) -> None:
    form = {"shape": (20, 30), "chunks": (5, 10), "shards": (10, 10), "dtype": "int16", **options}
    array = zarr.create_array(tmp_path / "a", **form)
    array[:] = np.arange(600).reshape(20, 30)

    reader = open_reader(array, tmp_path / "a")

    assert np.array_equal(reader.read((slice(3, 17), slice(0, 30))), array[3:17])


def damage(cube: Path, name: str = "reflectance", *, index: bool = False) -> Path:
    """Overwrite the header of the first chunk of the last shard, or the end of its index."""
    file = max((cube / SEASON / name / "c").rglob("*"), key=lambda path: (path.is_file(), path))
    content = bytearray(file.read_bytes())
    if index:
        content[-6:] = b"\xff" * 6
    else:
        content[:16] = bytes(16)
    file.write_bytes(content)
    return file


@pytest.fixture
def damaged(cube: Path, tmp_path: Path) -> Path:
    shutil.copytree(cube, tmp_path / "damaged.zarr")
    damage(tmp_path / "damaged.zarr")
    return tmp_path / "damaged.zarr"


def dataset_of(path: Path, **options: object) -> ChipDataset:
    season = open_season(path)
    return ChipDataset([season], plan_chips(season, chip=16), bands=season.bands, **options)


def test_damaged_labels_are_named_with_what_mends_them(cube: Path, tmp_path: Path) -> None:
    shutil.copytree(cube, tmp_path / "damaged.zarr")
    damage(tmp_path / "damaged.zarr", "parcels")
    with pytest.raises(ChunkError, match=r"of parcels in .*, or burn the labels again\.$"):
        list(open_source(tmp_path / "damaged.zarr").label_tiles())


@pytest.mark.parametrize("index", [False, True])
def test_a_damaged_chunk_is_named(cube: Path, tmp_path: Path, index: bool) -> None:
    shutil.copytree(cube, tmp_path / "damaged.zarr")
    damage(tmp_path / "damaged.zarr", index=index)
    dataset = dataset_of(tmp_path / "damaged.zarr")

    with pytest.raises(
        ChunkError, match=rf"chunk 0\.0\.2\.\d of reflectance in .*damaged.zarr, season {SEASON}"
    ):
        list(OrderedStream(dataset, batch_size=4, memory=0))

    place = tmp_path / "damaged.zarr" / SEASON / "reflectance"
    with pytest.raises(ChunkError, match="of reflectance in"):
        ZarrReader(zarr.open_array(place, mode="r"), place).read(
            (slice(0, 8), slice(0, 4), slice(64, 86), slice(64, 101))
        )


def test_damaged_chunks_are_blank_and_counted_once(cube: Path, damaged: Path) -> None:
    noted: list[str] = []
    log = ProblemLog(most=1, note=noted.append)
    whole = list(OrderedStream(dataset_of(cube), batch_size=6, memory=0))
    stream = OrderedStream(
        dataset_of(damaged, bad_chunks="skip"), batch_size=6, memory=0, problems=log
    )

    for _ in range(2):
        blank = 0
        for expected, batch in zip(whole, stream, strict=True):
            for chip in range(len(batch)):
                if not batch.valid[chip].any():
                    blank += 1
                    continue
                dates = int(expected.valid[chip].any(dim=(1, 2)).sum())
                same = batch.reflectance[chip, :dates] == expected.reflectance[chip, :dates]
                assert same.all()
        assert 1 <= blank <= 4
    assert len(noted) == len(log.problems) == 1

    with pytest.raises(ChunkError, match="1 chunks are damaged, and at most 0"):
        list(
            OrderedStream(
                dataset_of(damaged, bad_chunks="skip"), batch_size=6, memory=0,
                problems=ProblemLog(most=0),
            )
        )  # fmt: skip


def test_batches_with_damaged_chunks_can_be_entered_anywhere(damaged: Path) -> None:
    def run(start: int, count: int) -> tuple[list[bytes], list[str]]:
        log = ProblemLog()
        stream = TrainingStream(
            dataset_of(damaged, bad_chunks="skip"), batch_size=5, seed=2, memory=400_000,
            problems=log,
        )  # fmt: skip
        batches = [batch.reflectance.numpy().tobytes() for batch in stream.batches(start, count)]
        stream.close()
        return batches, log.problems

    whole, problems = run(0, 18)
    assert len(problems) == 1
    # What is read ahead of the last batch does not count.
    assert sum(len(run(step, 1)[1]) for step in range(9)) >= 1
    assert run(7, 11)[0] == whole[7:]


def test_a_missing_server_or_file_is_not_damage(cube: Path, tmp_path: Path) -> None:
    shutil.copytree(cube, tmp_path / "gone.zarr")
    dataset = dataset_of(tmp_path / "gone.zarr", bad_chunks="skip")
    file = damage(tmp_path / "gone.zarr")
    file.unlink()
    file.mkdir()

    with pytest.raises(OSError, match="directory"):
        list(OrderedStream(dataset, batch_size=4, memory=0))


def in_fork(task) -> str:
    """Run a task in a forked process and return what it raised."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            task()
            told = "nothing raised"
        except BaseException as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writing, told.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        return pipe.read()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_copy_is_refused_and_does_not_hang(cube: Path) -> None:
    dataset = dataset_of(cube)
    training = TrainingStream(dataset, batch_size=4, seed=0, memory=10**9)
    ordered = OrderedStream(dataset, batch_size=4, memory=10**9)
    next(iter(training.batches(0, 1)))

    for task in (
        lambda: next(training.batches(1, 1)),
        lambda: next(iter(ordered)),
        lambda: dataset.read(0),
    ):
        assert "InputError: Cannot read chips in process" in in_fork(task)
        assert "spawn" in in_fork(task)
    training.close()


@pytest.mark.slow
def test_a_loader_with_workers_is_refused_by_fork_and_works_by_spawn(cube: Path) -> None:
    import torch

    class Chips(torch.utils.data.Dataset):
        def __init__(self, dataset: ChipDataset) -> None:
            self.dataset = dataset

        def __len__(self) -> int:
            return len(self.dataset.units)

        def __getitem__(self, index: int) -> int:
            return int(self.dataset.read(index)[0].valid.sum())

    with pytest.raises(InputError, match="num_workers=0"):
        list(
            torch.utils.data.DataLoader(
                Chips(dataset_of(cube)), num_workers=1, multiprocessing_context="fork"
            )
        )
    spawned = multiprocessing.get_context("spawn")
    with spawned.Pool(1) as pool:
        dataset = dataset_of(cube)
        assert pool.apply(dataset.read, (0,))[0].days.tolist() == dataset.read(0)[0].days.tolist()
