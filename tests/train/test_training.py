"""Training learns, resumes exactly, and never looks at labels of other splits."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from safetensors.torch import load_file

from stcln_geo.cube.contract import SPLITS
from stcln_geo.cube.store import FieldTable, open_season, write_fields, write_split
from stcln_geo.errors import CheckpointError, CubeError, InputError, LabelError, OutputError
from stcln_geo.model.checkpoint import load_model, read_metadata
from stcln_geo.train import journal as journal_module
from stcln_geo.train.config import FinetuneConfig, PretrainConfig, load_config
from stcln_geo.train.finetune import finetune, plan_finetune
from stcln_geo.train.loading import hold_out
from stcln_geo.train.pretrain import plan_pretrain, pretrain
from stcln_geo.train.scoring import count_confusion
from stcln_geo.train.seeds import finetune_seeds
from stcln_geo.train.task import rate_factor

SMALL: dict[str, Any] = {
    "model.preset": "tiny",
    "model.widths": [8, 16],
    "model.layers": 1,
    "model.heads": 2,
    "model.feedforward": 32,
    "data.chip": 16,
    "batch_size": 4,
    "seed": 5,
}


def finetune_config(**options: Any) -> FinetuneConfig:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return load_config(FinetuneConfig, overrides={**SMALL, "validation.every": 3, **named})


def pretrain_config(**options: Any) -> PretrainConfig:
    named = {key.replace("__", "."): value for key, value in options.items()}
    base = {**SMALL, "validation.every": 3, "masking.gate": False}
    return load_config(PretrainConfig, overrides={**base, **named})


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"{name}.safetensors")


def assert_same_weights(one: Path, other: Path, name: str = "last") -> None:
    first, second = weights(one, name), weights(other, name)
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-6, msg=key)


def figures(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "samples_per_second", "data_wait")
    return [
        {key: value for key, value in json.loads(line).items() if key not in timed}
        for line in lines
    ]


def kill_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Make training stop dead in the middle of a round, as a kill does."""
    end = journal_module.Journal.on_train_batch_end

    def dying(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> None:
        end(self, trainer, *args, **kwargs)
        if args[0].step == step:
            raise RuntimeError("killed")

    monkeypatch.setattr(journal_module.Journal, "on_train_batch_end", dying)


def test_learns_a_separable_cube(small_cube: Path, tmp_path: Path) -> None:
    result = finetune(
        small_cube,
        tmp_path / "run",
        finetune_config(steps=60, validation__every=20, optimiser__learning_rate=5e-3),
    )

    assert result.steps == 60
    assert result.best is not None
    # Three classes of equal size: guessing the commonest gives an IoU of 1/3 for one, 0 for two.
    assert result.best > 0.7
    losses = [record["train_loss"] for record in figures(tmp_path / "run")]
    assert losses[-1] < 0.6 * losses[0]


def test_pretraining_lowers_the_error_of_hidden_pixels(small_cube: Path, tmp_path: Path) -> None:
    result = pretrain(
        [small_cube],
        tmp_path / "run",
        # Single pixels, which their neighbours tell: few steps are enough to see it learn.
        pretrain_config(
            steps=45, validation__every=9, optimiser__learning_rate=5e-3,
            masking__strategy="space-time", masking__mask_ratio=0.4,
        ),
    )  # fmt: skip

    records = figures(tmp_path / "run")
    assert records[-1]["validation_loss"] < 0.8 * records[0]["validation_loss"]
    assert result.best == min(record["validation_loss"] for record in records)
    assert 0.35 < records[0]["hidden_share"] < 0.45
    info = read_metadata(tmp_path / "run")
    assert info.kind == "pretrainer"
    assert info.season_start == "09-01"
    assert info.chip == 16


@pytest.mark.parametrize("stopped_at", [2, 7, 9], ids=["before first save", "mid", "at a save"])
def test_resumed_finetuning_equals_uninterrupted(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at: int
) -> None:
    config = finetune_config(steps=11, model__dropout=0.3)
    whole = finetune(small_cube, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        kill_after(patch, stopped_at)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(small_cube, tmp_path / "parts", config)
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["status"] == "failed"

    resumed = finetune(small_cube, tmp_path / "parts", config)

    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", "best")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    assert (resumed.best, resumed.best_step, resumed.steps) == (
        whole.best,
        whole.best_step,
        whole.steps,
    )


def test_killed_between_writing_figures_and_saving(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(steps=9)
    finetune(small_cube, tmp_path / "whole", config)
    save = journal_module.Journal._save_resumable

    def dying(self: Any, task: Any) -> None:
        if task.step == 6:
            raise RuntimeError("killed")
        save(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(journal_module.Journal, "_save_resumable", dying)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(small_cube, tmp_path / "parts", config)
    assert len(figures(tmp_path / "parts")) == 2

    finetune(small_cube, tmp_path / "parts", config)

    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", "best")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_resumed_pretraining_equals_uninterrupted(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = pretrain_config(
        steps=8, data__memory_gb=0.0006, data__max_dates=4, masking__strategy="band-group",
        masking__schedule="cosine", masking__mask_ratio_start=0.2,
    )  # fmt: skip
    pretrain([small_cube], tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(RuntimeError, match="killed"):
            pretrain([small_cube], tmp_path / "parts", config)

    pretrain([small_cube], tmp_path / "parts", config, workers=3)

    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")
    for name in ("errors.csv", "reconstructions/chips.npz", "reconstructions/chip-1.png"):
        files = [tmp_path / run / name for run in ("whole", "parts")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_where_new_options_are_at_their_defaults(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finetune_config(steps=5)
    finetune(small_cube, tmp_path / "whole", config)
    with monkeypatch.context() as patch:
        kill_after(patch, 4)
        with pytest.raises(RuntimeError, match="killed"):
            finetune(small_cube, tmp_path / "parts", config)
    file = tmp_path / "parts" / "config.toml"
    # As before these options came.
    newer = ("compile = ", "label_smoothing = ")
    written = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in written if not line.startswith(newer)))
    assert len(file.read_text().splitlines()) == len(written) - 2

    other = finetune_config(steps=5, loss__label_smoothing=0.1)
    with pytest.raises(InputError, match=r"options differ: loss\.label_smoothing was 0\.0, is 0"):
        finetune(small_cube, tmp_path / "parts", other)
    finetune(small_cube, tmp_path / "parts", config)

    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


_CHILD = """
import sys
import torch
torch.set_num_threads(1)
from stcln_geo.train.config import FinetuneConfig, load_config
from stcln_geo.train.finetune import finetune
import time
cube, out, file = sys.argv[1:]
finetune(
    cube, out, load_config(FinetuneConfig, file=file), progress=lambda *_: time.sleep(0.1)
)
"""


@pytest.mark.slow
def test_kill_9_and_resume(small_cube: Path, tmp_path: Path) -> None:
    from stcln_geo.train.config import to_toml

    config = finetune_config(steps=14)
    file = tmp_path / "options.toml"
    file.write_text(to_toml(config))
    out = tmp_path / "run"
    child = subprocess.Popen([sys.executable, "-c", _CHILD, str(small_cube), str(out), str(file)])
    try:
        deadline = time.monotonic() + 300
        while not (out / "checkpoints" / "last.ckpt").is_file():
            assert child.poll() is None, "the child ended before its first save"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.15)
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.wait()
    before = json.loads((out / "run.json").read_text())
    assert before["status"] == "running"
    held = json.loads((tmp_path / "run.lock").read_text())
    assert held["pid"] == child.pid
    left = out / "checkpoints" / ".last.ckpt.part"
    left.write_bytes(b"half a save")

    resumed = finetune(small_cube, out, config)

    finetune(small_cube, tmp_path / "whole", config)
    assert resumed.steps == 14
    assert not left.exists()
    assert not (tmp_path / "run.lock").exists()
    assert_same_weights(out, tmp_path / "whole")
    assert figures(out) == figures(tmp_path / "whole")


def test_interrupt_is_passed_on_and_can_be_resumed(small_cube: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 5:
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    config = finetune_config(steps=7)

    with pytest.raises(KeyboardInterrupt):
        finetune(small_cube, tmp_path / "run", config, progress=interrupt)

    assert signal.getsignal(signal.SIGINT) is before
    calls: list[tuple[int, int]] = []
    finetune(small_cube, tmp_path / "run", config, progress=lambda *call: calls.append(call[:2]))
    assert calls == [(3, 7), (4, 7), (5, 7), (6, 7), (7, 7)]  # first, where it goes on from


def test_a_full_disk_is_named_and_the_last_save_stays(small_cube: Path, tmp_path: Path) -> None:
    config, before = finetune_config(steps=5), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(done: int, total: int, what: str) -> None:
        if done == 4:
            # Room for small files, and for a part of the next save.
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    try:
        with pytest.raises(OutputError, match=r"Cannot write .*last\.ckpt: File too large.*again"):
            finetune(small_cube, tmp_path / "run", config, save_every=0, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    checkpoints = tmp_path / "run" / "checkpoints"
    # No part of it takes the room that is lacking.
    names = {"best.safetensors", "last.ckpt", "last.safetensors"}
    assert {child.name for child in checkpoints.iterdir()} == names
    # It may go on elsewhere, where precision=auto is another one: then its notes say so.
    environment = tmp_path / "run" / "environment.json"
    environment.write_text(environment.read_text().replace('"cpu"', '"cuda"'))
    finetune(small_cube, tmp_path / "run", config)
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert notes == ["Begun on cuda, float32; continued on cpu, float32."]
    finetune(small_cube, tmp_path / "whole", config)
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


@pytest.mark.parametrize("train", [pretrain, finetune])
def test_dates_that_the_network_does_not_look_at_are_not_moved(
    small_cube: Path, tmp_path: Path, train: Any
) -> None:
    make = pretrain_config if train is pretrain else finetune_config
    config = make(**{"model.positions": "index", "data.shift_days": 9})
    with pytest.raises(InputError, match="shift_days=9: the network's positions are the indices"):
        train([small_cube] if train is pretrain else small_cube, tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


def test_told_to_end_it_saves_first(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a script of sbatch, without srun: one process, whatever the job reserved."""
    for name, value in {"JOB_ID": "77", "JOB_NAME": "train", "NTASKS": "4", "NNODES": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    taken = []

    def end(done: int, total: int, what: str) -> None:
        if done == 5:
            taken.append(signal.getsignal(signal.SIGUSR1))
            assert callable(signal.getsignal(signal.SIGTERM))
            signal.raise_signal(signal.SIGTERM)

    config = finetune_config(steps=7)

    with pytest.raises(KeyboardInterrupt):
        finetune(small_cube, tmp_path / "run", config, progress=end)

    # Not Lightning's, which writes files of its own and puts the job into the queue again.
    assert taken == [signal.SIG_DFL]
    calls: list[tuple[int, int]] = []
    finetune(small_cube, tmp_path / "run", config, progress=lambda *call: calls.append(call[:2]))
    assert calls == [(5, 7), (6, 7), (7, 7)]
    finetune(small_cube, tmp_path / "whole", config)
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_who_listens_to_the_end_hears_it_after_the_save(small_cube: Path, tmp_path: Path) -> None:
    class Told(Exception):
        pass

    def listen(number: int, _: object) -> None:
        raise Told

    def end(done: int, total: int, what: str) -> None:
        if done == 2:
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, listen)
    try:
        with pytest.raises(Told):
            finetune(small_cube, tmp_path / "run", finetune_config(steps=4), progress=end)
        assert signal.getsignal(signal.SIGTERM) is listen
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()


def test_finished_run_is_left_alone(small_cube: Path, tmp_path: Path) -> None:
    config = finetune_config(steps=3)
    first = finetune(small_cube, tmp_path / "run", config)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    again = finetune(small_cube, tmp_path / "run", config)

    assert again.already
    assert not first.already
    assert (again.best, again.steps) == (first.best, first.steps)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_second_command_into_a_run_is_refused(
    kind: str, small_cube: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    refusals: list[str] = []

    def begin(**options: Any) -> None:
        if kind == "pretrain":
            pretrain([small_cube], run, pretrain_config(steps=2), **options)
        else:
            finetune(small_cube, run, finetune_config(steps=2), **options)

    def try_again(*_: Any) -> None:
        before = (run / "run.json").read_bytes()
        with pytest.raises(InputError, match=r"one command at a time.*--out.*remove") as caught:
            begin(overwrite=True)
        refusals.append(str(caught.value))
        assert (run / "run.json").read_bytes() == before

    begin(progress=try_again)
    assert refusals
    assert all(f"process {os.getpid()} on" in refusal for refusal in refusals)
    assert not (tmp_path / "run.lock").exists()
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


def test_run_directory_holds_what_was_done(small_cube: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(small_cube, run, finetune_config(steps=4))

    assert {child.name for child in run.iterdir()} == {
        "config.toml",
        "environment.json",
        "metrics.jsonl",
        "steps.jsonl",
        "model_card.md",
        "model_card.json",
        "curves.png",
        "run.json",
        "checkpoints",
    }
    assert {child.name for child in (run / "checkpoints").iterdir()} == {
        "best.safetensors",
        "last.safetensors",
        "last.ckpt",
    }
    told = json.loads((run / "run.json").read_text())
    assert (told["status"], told["kind"], told["steps"]) == ("finished", "finetune", 4)
    assert told["splits"]["train"]["fields"] + told["splits"]["test"]["fields"] < 20
    assert "never their labels" in told["transductive"]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert environment["cubes"][0]["season"] == "2018-09-01"
    info = read_metadata(run)
    assert info.legend is not None
    assert info.provenance["splits"]["train_chosen"] == told["splits"]["train_chosen"]
    config = load_config(FinetuneConfig, file=run / "config.toml")
    assert config.steps == 4
    assert config.model.bands == ("green", "red", "nir", "swir16")


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_cube_built_otherwise_under_the_same_sky_is_other_data(
    new_cube: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """Grid, dates and clouds of a rebuilt cube are as before; its pixels need not be."""
    cube, run = new_cube(), tmp_path / "run"

    def train() -> None:
        if kind == "pretrain":
            pretrain([cube], run, pretrain_config(steps=3))
        else:
            finetune(cube, run, finetune_config(steps=3))

    name_build(cube, "a" * 64)
    train()
    train()
    name_build(cube, "b" * 64)
    with pytest.raises(InputError, match=r"its data changed since it was begun \(built\)"):
        train()
    forget_identity(run, "built")
    train()


def name_build(cube: Path, fingerprint: str) -> None:
    """Note what a build notes of a season: the hash of all that it was built from."""
    group = zarr.open_group(open_season(cube).cube / open_season(cube).folder, mode="r+")
    group.attrs["fingerprint"] = fingerprint


def forget_identity(run: Path, key: str) -> None:
    """Make the run's record one of an earlier version, which did not hold the key."""
    told = json.loads((run / "run.json").read_text())
    del told["identity"][key]
    (run / "run.json").write_text(json.dumps(told))


def test_another_recipe_or_other_data_in_the_same_folder_is_refused(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    cube = new_cube()
    run = tmp_path / "run"
    finetune(cube, run, finetune_config(steps=3))

    with pytest.raises(InputError, match=r"steps was 3, is 4.*--overwrite"):
        finetune(cube, run, finetune_config(steps=4))
    with pytest.raises(InputError, match="holds a finetune run, and this is pretrain"):
        pretrain([cube], run, pretrain_config(steps=3))
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    from stcln_geo.cube.store import write_split
    from stcln_geo.data.split import split_fields

    write_split(season, split_fields(season.fields, seed=99))
    with pytest.raises(InputError, match=r"its data changed since it was begun \(labels\)"):
        finetune(cube, run, finetune_config(steps=3))
    assert not finetune(cube, run, finetune_config(steps=3), overwrite=True).already
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds other files \(thesis.txt\)"):
        finetune(cube, tmp_path / "other", finetune_config(steps=3))


def relabel(cube: Path, splits: set[str]) -> None:
    """Give the fields of some splits another class, without changing anything else."""
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    assert season.legend is not None
    fields = season.fields
    moved = np.isin(fields.split, [SPLITS[name] for name in splits])
    code = np.where(moved, (fields.code + 1) % len(season.legend), fields.code).astype(np.uint8)
    labels = np.concatenate([[255], code]).astype(np.uint8)[season.parcels[:]]
    table = FieldTable(number=fields.number, code=code, pixels=fields.pixels, split=fields.split)
    write_fields(
        season, labels=labels, parcels=season.parcels[:], fields=table, legend=season.legend
    )


def test_labels_of_test_fields_change_nothing_and_those_of_train_fields_do(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    config = finetune_config(steps=6)
    plain, test_changed, train_changed = new_cube("a"), new_cube("b"), new_cube("c")
    relabel(test_changed, {"test"})
    relabel(train_changed, {"train"})

    for name, path in (("a", plain), ("b", test_changed), ("c", train_changed)):
        finetune(path, tmp_path / name, config)

    first, second, third = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert figures(tmp_path / "a") == figures(tmp_path / "b")
    assert not all(torch.equal(first[key], third[key]) for key in first)


def test_labels_of_validation_fields_move_no_weight(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    config = finetune_config(steps=6)
    plain, changed = new_cube("a"), new_cube("b")
    relabel(changed, {"validation"})

    finetune(plain, tmp_path / "a", config)
    finetune(changed, tmp_path / "b", config)

    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert figures(tmp_path / "a") != figures(tmp_path / "b")


def test_begins_from_a_pretrained_encoder(small_cube: Path, tmp_path: Path) -> None:
    pretrain([small_cube], tmp_path / "pre", pretrain_config(steps=3))
    config = finetune_config(
        init=str(tmp_path / "pre"), steps=1, optimiser__encoder_factor=0.0, model__preset=None
    )
    before = weights(tmp_path / "pre", "best")

    finetune(small_cube, tmp_path / "fine", config)

    after = weights(tmp_path / "fine")
    held = [key for key in before if key.startswith("encoder.") and "running" not in key]
    assert len(held) > 10
    for key in held:
        if "num_batches" not in key:
            assert torch.equal(before[key], after[key]), key
    assert not torch.equal(
        load_model(tmp_path / "fine").classifier.weight.detach(),
        torch.zeros_like(after["classifier.weight"]),
    )
    info = read_metadata(tmp_path / "fine")
    assert info.mean == read_metadata(tmp_path / "pre").mean
    assert info.provenance["init"]["sha256"] == read_metadata(tmp_path / "pre").sha256


@pytest.mark.skipif(
    torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="a CUDA build of torch wants a driver where it is told of GPUs",
)
def test_seeds_outside_are_left_alone_and_other_gpus_too(
    small_cube: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with many: torch asks all of them for their generators, and warns of it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    before = torch.initial_seed()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fork_rng.*")

        plan_finetune(small_cube, finetune_config(steps=1), device="cpu")
        finetune(small_cube, tmp_path / "run", finetune_config(steps=1), device="cpu")
        pretrain([small_cube], tmp_path / "pre", pretrain_config(steps=1), device="cpu")

    assert torch.initial_seed() == before


def test_what_a_run_lacks_is_said_before_it_begins(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    cube = new_cube()
    season = open_season(cube, mode="r+")
    assert season.fields is not None
    code, split = season.fields.code, season.fields.split
    # One class without a field to train on, another one with a single field.
    split = np.where((code == 1) & (split == SPLITS["train"]), SPLITS["unused"], split)
    first = np.flatnonzero((code == 2) & (split == SPLITS["train"]))[0]
    others = (code == 2) & (split == SPLITS["train"]) & (np.arange(len(code)) != first)
    write_split(season, np.where(others, SPLITS["unused"], split).astype(np.uint8))
    season.reflectance[:, 3] = 1234

    plan = plan_finetune(cube, finetune_config(steps=1, labels__fields_per_class=2))

    said = " ".join(plan.notes)
    assert "No training fields of crop 1: the network has an output" in said
    assert "Fewer than 2 training fields: crop 2 (1)." in said
    assert "Never varies in the training chips: swir16." in said
    finetune(cube, tmp_path / "run", finetune_config(steps=1, labels__ignore=["crop 1"]))
    told = tmp_path / "run" / "run.json"
    told.write_text(told.read_text().replace('"finished"', '"running"'))
    again = plan_finetune(cube, finetune_config(steps=1, init=str(tmp_path / "run")))
    said = " ".join(again.notes)
    assert "The run begun from is not finished" in said
    assert "attention over space and classes begin anew" in said
    # The checkpoint brings mean and deviation.
    assert "Never varies" not in said
    assert "Fewer than" not in said


def test_bands_are_matched_by_name_with_the_checkpoint_begun_from(
    small_cube: Path, new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    pretrain([small_cube], tmp_path / "pre", pretrain_config(steps=1))
    start = weights(tmp_path / "pre", "best")
    other = new_cube(bands=("nir", "blue", "red"))
    config = {"init": str(tmp_path / "pre"), "steps": 1, "optimiser__encoder_factor": 0.0}
    first = "encoder.convolutions.blocks.0.convolution.weight"

    fewer = finetune(other, tmp_path / "fewer", finetune_config(**config))
    named = finetune(
        other, tmp_path / "named", finetune_config(**config, model__bands=["blue", "nir", "red"])
    )

    # Pre-trained on green, red, nir, swir16; by default what both know, in the checkpoint's order.
    info = read_metadata(tmp_path / "fewer")
    assert info.bands == ("red", "nir")
    assert torch.equal(weights(tmp_path / "fewer")[first], start[first][:, [1, 2]])
    assert info.mean == pytest.approx(start["encoder.mean"][[1, 2]].tolist())
    said = " ".join(fewer.notes)
    assert "The cube lacks green, swir16" in said
    assert "does not know blue of the cube: not used" in said

    info = read_metadata(tmp_path / "named")
    assert info.bands == ("blue", "nir", "red")
    begun = weights(tmp_path / "named")[first]
    assert torch.equal(begun[:, 1:], start[first][:, [2, 1]])
    assert not begun[:, 0].any()
    assert info.mean[1:] == pytest.approx(start["encoder.mean"][[2, 1]].tolist())
    # The mean of the band that was never seen is that of the cube: 0.3 - 0.2 ndvi.
    assert 0.15 < info.mean[0] < 0.3
    assert any("does not know blue: their weights begin at zero" in note for note in named.notes)


def test_reflectance_of_another_level_is_told(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    surface, above = new_cube("surface"), new_cube("above", level="top-of-atmosphere", seed=1)
    mixed = pretrain([surface, above], tmp_path / "mixed", pretrain_config(steps=1))
    assert any("surface and at the top of the atmosphere are mixed" in one for one in mixed.notes)

    pretrain([above], tmp_path / "pre", pretrain_config(steps=1))
    config = finetune_config(init=str(tmp_path / "pre"), steps=1)
    for cube, told in ((surface, True), (above, False)):
        notes = finetune(cube, tmp_path / cube.stem, config).notes
        assert any("trained on top-of-atmosphere refl" in note for note in notes) == told
    assert read_metadata(tmp_path / "mixed").levels == ("surface", "top-of-atmosphere")


def test_checkpoint_that_does_not_fit_is_refused(
    small_cube: Path, new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    pretrain([small_cube], tmp_path / "pre", pretrain_config(steps=1))
    init = str(tmp_path / "pre")

    with pytest.raises(CheckpointError, match=r"it knows the bands green, red.*run has blue"):
        finetune(new_cube(bands=("blue",)), tmp_path / "a", finetune_config(init=init, steps=1))
    with pytest.raises(CubeError, match=r"lacks band .coastal. required by model\.bands"):
        finetune(
            small_cube,
            tmp_path / "b",
            finetune_config(init=init, steps=1, model__bands=["red", "coastal"]),
        )
    with pytest.raises(CheckpointError, match="The sizes of the encoders must agree"):
        finetune(small_cube, tmp_path / "c", finetune_config(init=init, steps=1, model__layers=2))


def test_several_cubes_and_no_gate_without_red(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    bands = ("nir", "swir16")
    one = new_cube("a", bands=bands, split=False)
    other = new_cube("b", bands=bands, seed=1, shape_yx=(33, 70), season="2019-09-01")

    result = pretrain([one, other], tmp_path / "run", pretrain_config(steps=2, masking__gate=True))

    assert any("No vegetation gate" in note for note in result.notes)
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert told["chips"] + told["validation_chips"] == 20 + 15
    assert len(read_metadata(tmp_path / "run").provenance["cubes"]) == 2


def test_a_gate_that_hides_nothing_is_an_error(
    new_cube: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"masking\.gate=false"):
        pretrain([new_cube(bare=True)], tmp_path / "run", pretrain_config(masking__gate=True))


def test_hold_out_keeps_each_chip_in_one_part(small_cube: Path) -> None:
    from stcln_geo.data.chips import plan_chips

    plan = plan_chips(open_season(small_cube), chip=16)
    assert len(plan.row) == 20

    held = hold_out(20, most=64, seed=0)
    parts = [[chip for unit in plan.choose(kept) for chip in unit.chips] for kept in (~held, held)]

    assert len(parts[1]) == 20 // 8
    assert set(parts[0]).isdisjoint(parts[1])
    assert set(parts[0] + parts[1]) == {chip for unit in plan for chip in unit.chips}
    assert (hold_out(20, most=1, seed=0) != hold_out(20, most=1, seed=1)).any()


def test_early_stop_keeps_the_best(small_cube: Path, tmp_path: Path) -> None:
    config = finetune_config(
        steps=60, validation__every=1, validation__patience=2, optimiser__learning_rate=1e-7
    )

    result = finetune(small_cube, tmp_path / "run", config)

    assert result.stopped_early
    assert result.steps == result.best_step + 2
    assert_same_weights_of_step(tmp_path / "run", result.best_step)
    assert finetune(small_cube, tmp_path / "run", config).already


def assert_same_weights_of_step(run: Path, step: int) -> None:
    assert read_metadata(run / "checkpoints" / "best.safetensors").provenance["step"] == step


def test_seeds_differ_and_are_summed_up(small_cube: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    summary = finetune_seeds(
        small_cube, tmp_path / "runs", finetune_config(steps=3, labels__fields_per_class=1),
        seeds=3, progress=lambda *call: calls.append(call),
    )  # fmt: skip

    done = [done for done, _, _ in calls]
    assert done == sorted(done)
    assert set(range(1, 10)) <= set(done), "steps of all seeds are counted together"
    assert {total for _, total, _ in calls} == {9}
    assert calls[-1][2].startswith("seed 3 of 3, loss ")
    best = [result.best for result in summary.runs]
    assert summary.mean == pytest.approx(np.mean(best))
    assert summary.deviation == pytest.approx(np.std(best, ddof=1))
    told = json.loads((tmp_path / "runs" / "summary.json").read_text())
    assert [run["run"] for run in told["runs"]] == ["seed-5", "seed-6", "seed-7"]
    one = json.loads((tmp_path / "runs" / "seed-5" / "run.json").read_text())
    assert one["splits"]["train_chosen"]["fields"] == 3
    first, second = weights(tmp_path / "runs" / "seed-5"), weights(tmp_path / "runs" / "seed-6")
    assert not torch.equal(first["classifier.weight"], second["classifier.weight"])


def test_plans_write_nothing_and_say_what_it_takes(small_cube: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in tmp_path.iterdir())

    plans = [
        plan_pretrain([small_cube], pretrain_config(steps=7)),
        plan_finetune(small_cube, finetune_config(steps=7)),
    ]

    for plan in plans:
        text = "\n".join(plan.lines())
        assert f"{plan.parameters:,} parameters" in text
        assert "steps = 7" in text
        assert plan.batch_shape[0] == 4
        assert plan.batch_shape[2:] == (4, 16, 16)
        assert plan.eta == pytest.approx(7 * plan.seconds_per_step)
        assert plan.seconds_per_step > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_unusable_labels_are_refused(new_cube: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="labels split CUBE"):
        finetune(new_cube(split=False), tmp_path / "run", finetune_config(steps=1))
    with pytest.raises(InputError, match="devices are auto, cpu, cuda"):
        pretrain([new_cube("b")], tmp_path / "run", pretrain_config(steps=1), device="tpu")


def test_confusion_counts_judged_pixels() -> None:
    logits = torch.zeros(1, 3, 2, 2)
    logits[0, 2] = 1.0
    target = torch.tensor([[[0, 2], [-100, 2]]])

    assert count_confusion(logits, target).tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 2]]


def test_schedule_rises_and_falls() -> None:
    options = finetune_config(optimiser__warmup=0.1).optimiser
    factors = [rate_factor(step, steps=100, options=options) for step in range(100)]

    assert factors[:10] == sorted(factors[:10])
    assert factors[10] == pytest.approx(1.0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0.01 <= factors[-1] < 0.02
    flat = finetune_config(optimiser__schedule="constant", optimiser__warmup=0).optimiser
    assert {rate_factor(step, steps=100, options=flat) for step in range(100)} == {1.0}
    assert not any(math.isnan(factor) for factor in factors)
