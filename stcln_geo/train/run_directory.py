"""The run directory: all that a training run was given, did and found.

::

    RUN/config.toml            the recipe, settled; --config reads it back
    RUN/environment.json       versions, machine, cubes with their fingerprints
    RUN/metrics.jsonl          one line a validation
    RUN/steps.jsonl            one line a step: its loss and learning rate
    RUN/curves.png
    RUN/errors.csv             pre-training: errors of the best weights, by month and band
    RUN/reconstructions/       pre-training: chips.npz and pictures of what these weights fill in
    RUN/report.html            pre-training: all of it on one page
    RUN/bad_chunks.jsonl       damaged chunks that were left out, where there are any
    RUN/tensorboard/           the same for TensorBoard
    RUN/model_card.md, .json   what the weights are, how they came about and how good they are
    RUN/checkpoints/           best.safetensors, last.safetensors, last.ckpt (to resume)
    RUN/run.json               status, best figure, counts, notes
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from ..errors import InputError, MissingFileError, OutputError
from ..storage import Location
from .config import TrainConfig, load_config, to_toml

__all__ = [
    "MADE",
    "Begun",
    "RunDirectory",
    "cannot_write",
    "is_finished",
    "read_environment",
    "read_summary",
]

Begun = Literal["new", "resume", "finished"]

MADE = (
    "config.toml",
    "environment.json",
    "metrics.jsonl",
    "steps.jsonl",
    "tensorboard",
    "wandb",
    "model_card.md",
    "model_card.json",
    "curves.png",
    "errors.csv",
    "reconstructions",
    "report.html",
    "bad_chunks.jsonl",
    "run.json",
    "checkpoints",
)
"""What training makes in a run's folder."""


class RunDirectory:
    """A folder that holds one training run.

    Parameters
    ----------
    path
        The folder; need not exist.
    where
        Where the run is kept, if not there: its address in a bucket.
    on_save
        Called after each save, when a later process could go on from what the folder holds.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        where: Location | None = None,
        on_save: Callable[[], None] | None = None,
    ) -> None:
        self.path = Path(path)
        self.where: Location = self.path if where is None else where
        self._on_save = on_save
        self.checkpoints = self.path / "checkpoints"
        self.resume_file = self.checkpoints / "last.ckpt"
        self.best_file = self.checkpoints / "best.safetensors"
        self.last_file = self.checkpoints / "last.safetensors"
        self.curves_file = self.path / "curves.png"
        self.errors_file = self.path / "errors.csv"
        self.reconstructions_file = self.path / "reconstructions" / "chips.npz"
        self.report_file = self.path / "report.html"
        self.problems_file = self.path / "bad_chunks.jsonl"
        self._config = self.path / "config.toml"
        self._environment = self.path / "environment.json"
        self._metrics = self.path / "metrics.jsonl"
        self._steps = self.path / "steps.jsonl"
        self._run = self.path / "run.json"

    @property
    def status(self) -> str | None:
        """``running``, ``finished``, ``failed``; None where no run was begun."""
        return self.summary().get("status")

    def summary(self) -> dict[str, Any]:
        """Return what run.json holds; empty where there is none."""
        return read_summary(self.path)

    def environment(self) -> dict[str, Any]:
        """Return what environment.json holds; empty where there is none."""
        return read_environment(self.path)

    @property
    def identifier(self) -> str:
        """A name of this run that no other run has, for services that collect runs."""
        return str(self.summary().get("id", ""))

    def recipe(self) -> dict[str, Any]:
        """Return what config.toml holds; empty where there is none."""
        if not self._config.is_file():
            return {}
        return tomllib.loads(self._config.read_text(encoding="utf-8"))

    def settled(self, key: str) -> Any:
        """Return a value of the recipe of the run that was begun here; None where there is none."""
        return self.recipe().get(key) if self._run.is_file() else None

    def begin(
        self,
        *,
        kind: str,
        config: TrainConfig,
        environment: Mapping[str, Any],
        identity: Mapping[str, Any],
        summary: Mapping[str, Any],
        overwrite: bool = False,
    ) -> Begun:
        """Start a run here, or find the one to go on with.

        Parameters
        ----------
        config
            The settled recipe.
        identity
            What besides the recipe must be the same to go on: fingerprints of the data.
        summary
            First content of run.json.
        overwrite
            True deletes an earlier run, with its evaluations.

        Returns
        -------
        ``new``; ``resume`` where a run can go on from its last checkpoint; ``finished`` where
        there is nothing left to do.

        Raises
        ------
        InputError
            If the folder holds another run, or files that no run wrote.
        """
        if overwrite:
            self._clear()
        if self._run.is_file():
            self._check_same(kind=kind, config=config, identity=identity)
            if self.status == "finished":
                return "finished"
            if self.resume_file.is_file():
                self.update(status="running", error=None, notes=self._notes_of(environment))
                return "resume"
        elif self.path.is_dir() and any(self.path.iterdir()):
            names = sorted(child.name for child in self.path.iterdir())[:5]
            if not set(names) <= set(MADE):
                raise InputError(
                    f"Cannot write a run into {self.where}: it holds other files "
                    f"({', '.join(names)}). A run has a folder of its own. Choose another --out."
                )
        write_text(self._config, to_toml(config))
        write_text(self._environment, json.dumps(dict(environment), indent=1) + "\n")
        # Of a run that was stopped before its first save.
        self.problems_file.unlink(missing_ok=True)
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        write_text(self._metrics, "")
        write_text(self._steps, "")
        write_text(
            self._run,
            _to_json(
                {
                    "status": "running",
                    "kind": kind,
                    "id": secrets.token_hex(8),
                    "identity": dict(identity),
                    **summary,
                }
            ),
        )
        return "new"

    def _notes_of(self, environment: Mapping[str, Any]) -> list[str]:
        """Return the notes of a run that goes on; where it now runs otherwise, with that."""
        notes = list(self.summary().get("notes", []))
        now, before = (
            f"{one.get('device')}, {one.get('precision')}"
            for one in (environment, self.environment())
        )
        said = f"Begun on {before}; continued on {now}."
        return notes if now == before or said in notes else [*notes, said]

    def saved(self) -> None:
        """Say that the folder holds all that a later process needs to go on."""
        if self._on_save is not None:
            self._on_save()

    def update(self, **values: Any) -> None:
        """Change entries of run.json."""
        write_text(self._run, _to_json({**self.summary(), **values}))

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        _append(self._metrics, [record])

    def log_steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Append lines to steps.jsonl."""
        _append(self._steps, records)

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl; a line cut short by a kill is left out."""
        return _read_lines(self._metrics)

    def step_records(self) -> list[dict[str, Any]]:
        """Return the lines of steps.jsonl; a line cut short by a kill is left out."""
        return _read_lines(self._steps)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after ``step``, which a resumed run will write again."""
        for path in (self._metrics, self._steps):
            kept = [record for record in _read_lines(path) if record["step"] <= step]
            write_text(path, "".join(json.dumps(record) + "\n" for record in kept))

    def _check_same(self, *, kind: str, config: TrainConfig, identity: Mapping[str, Any]) -> None:
        before = self.summary()
        if before.get("kind") != kind:
            raise InputError(
                f"Cannot go on in {self.where}: it holds a {before.get('kind')} run, and this is "
                f"{kind}. A run directory holds one run. {self._remedy}"
            )
        old, new = self._begun_with(type(config)), to_toml(config)
        if old != new:
            raise InputError(
                f"Cannot go on in {self.where}: its options differ: {_difference(old, new)}. A "
                f"run goes on only with the options it was begun with. {self._remedy}"
            )
        earlier, now = before.get("identity", {}), dict(identity)
        for key in ("label_pixels", "built"):
            if key not in earlier:
                # Runs of earlier versions did not tell it.
                now.pop(key, None)
        if earlier != now:
            changed = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
            raise InputError(
                f"Cannot go on in {self.where}: its data changed since it was begun "
                f"({', '.join(sorted(changed))}). A run goes on only with the same pixels, labels, "
                f"split and checkpoint to begin from. {self._remedy}"
            )

    def _begun_with(self, kind: type[TrainConfig]) -> str:
        """Return the recipe of the run; options that came with later versions at their defaults."""
        try:
            return to_toml(load_config(kind, file=self._config))
        except MissingFileError:
            return ""
        except InputError:
            return self._config.read_text(encoding="utf-8")

    @property
    def _remedy(self) -> str:
        # A run of an experiment, which has no such option, meets the same.
        return (
            f"Choose another --out, or begin anew: with --overwrite where the command has it, else "
            f"by deleting {self.where}."
        )

    def _clear(self) -> None:
        try:
            for name in MADE:
                target = self.path / name
                if target.is_dir():
                    shutil.rmtree(target)
                else:
                    target.unlink(missing_ok=True)
            for folder in self.path.glob("evaluation-*"):
                shutil.rmtree(folder)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def _append(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(dict(one), allow_nan=False) + "\n" for one in records)
    except OSError as error:
        raise cannot_write(path, error) from error


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_finished(path: Location) -> bool:
    """Return False where a folder is that of a run that is still to go on."""
    told = read_summary(path)
    return not told or told.get("status") == "finished"


def read_summary(path: Location) -> dict[str, Any]:
    """Return what the run.json of a run says, wherever it lies; empty where there is none."""
    return _read_json(path / "run.json")


def read_environment(path: Location) -> dict[str, Any]:
    """Return what the environment.json of a run says; empty where there is none."""
    return _read_json(path / "environment.json")


def _read_json(file: Location) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return found


def _difference(old: str, new: str) -> str:
    """Name the lines that differ, each with its section."""
    before, after = _by_key(old), _by_key(new)
    changed = [
        f"{key} was {before.get(key, 'unset')}, is {after.get(key, 'unset')}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    return "; ".join(changed[:5]) + more


def _by_key(text: str) -> dict[str, str]:
    values, section = {}, ""
    for line in text.splitlines():
        if line.startswith("["):
            section = line.strip("[]") + "."
        elif line:
            key, _, value = line.partition(" = ")
            values[section + key] = value
    return values


def _to_json(value: Mapping[str, Any]) -> str:
    return json.dumps(dict(value), indent=1, allow_nan=False) + "\n"


def cannot_write(path: Path, error: OSError) -> OutputError:
    """Return the error for a file of a run that cannot be written."""
    return OutputError(
        f"Cannot write {path}: {error.strerror or error}. The folder must be writable and have "
        "room. Free some space and run the same command again, or choose another --out."
    )
