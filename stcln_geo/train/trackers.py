"""Where the figures of a run also go: TensorBoard, Weights & Biases, MLflow, by Lightning."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from ..errors import InputError
from .config import TrainConfig
from .run_directory import RunDirectory

__all__ = ["TrackerName", "Trackers", "check_trackers", "open_trackers"]

TrackerName = Literal["tensorboard", "wandb", "mlflow"]


class Trackers:
    """Loggers of Lightning that are told the same numbers as the run directory.

    Parameters
    ----------
    loggers
        Any number of ``lightning.pytorch.loggers.Logger``.
    """

    def __init__(self, loggers: Sequence[Any] = ()) -> None:
        self._loggers = tuple(loggers)

    def begin(self, config: TrainConfig) -> None:
        """Tell the options."""
        for logger in self._loggers:
            logger.log_hyperparams(config.model_dump(mode="json"))

    def log_steps(self, trace: Sequence[Mapping[str, float]]) -> None:
        """Tell the losses of steps."""
        for record in trace:
            for logger in self._loggers:
                logger.log_metrics({"loss": record["loss"]}, step=int(record["step"]))

    def log(self, record: Mapping[str, Any]) -> None:
        """Tell the figures of a round."""
        told = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and value is not None
        }
        for logger in self._loggers:
            logger.log_metrics(told, step=int(record["step"]))
            logger.save()

    def end(self, *, failed: bool) -> None:
        """Close what is open."""
        for logger in self._loggers:
            logger.finalize("failed" if failed else "success")
            if type(logger).__name__ == "WandbLogger":
                # Else the next run of this process would be written into this one.
                logger.experiment.finish(exit_code=int(failed))


def check_trackers(names: Sequence[str]) -> tuple[TrackerName, ...]:
    """Return the names, after a look whether their packages are there.

    Raises
    ------
    InputError
        If a name is unknown, its package is not installed, or it has no address to write to.
    """
    for name in names:
        if name not in get_args(TrackerName):
            raise InputError(
                f"Cannot track the run with {name!r}: trackers are "
                f"{', '.join(get_args(TrackerName))}. Use for example --track tensorboard, or "
                "--track none."
            )
        # The packages are called as the trackers are.
        if importlib.util.find_spec(name) is None:
            raise InputError(
                f"Cannot track the run with {name}: its package is not installed. Run "
                f"`pip install 'stcln-geo[{name}]'`, or leave it out of --track."
            )
    if "mlflow" in names and "MLFLOW_TRACKING_URI" not in os.environ:
        raise InputError(
            "Cannot track the run with mlflow: MLFLOW_TRACKING_URI is not set, and MLflow no "
            "longer writes into plain folders. Set it to the address of your server, such as "
            "http://localhost:5000."
        )
    return tuple(names)  # type: ignore[arg-type]  # each was looked up above


def open_trackers(
    names: Sequence[TrackerName], run: RunDirectory, *, step: int, config: TrainConfig
) -> Trackers:
    """Open the trackers of a run; events after ``step`` of an earlier process are withdrawn.

    Where W&B and MLflow send them is up to their own environment variables (``WANDB_MODE``,
    ``MLFLOW_TRACKING_URI``).
    """
    loggers: list[Any] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            if name == "tensorboard":
                from lightning.pytorch.loggers import TensorBoardLogger

                loggers.append(
                    TensorBoardLogger(
                        run.path,
                        name="",
                        version="tensorboard",
                        default_hp_metric=False,
                        purge_step=step + 1 if step else None,
                    )
                )
            elif name == "wandb":
                from lightning.pytorch.loggers import WandbLogger

                loggers.append(
                    WandbLogger(
                        name=run.path.name,
                        save_dir=run.path,
                        project="stcln-geo",
                        id=run.identifier,
                        resume="allow",
                    )
                )
            else:
                from lightning.pytorch.loggers import MLFlowLogger

                loggers.append(
                    MLFlowLogger(
                        experiment_name="stcln-geo",
                        run_name=run.path.name,
                        tracking_uri=os.environ["MLFLOW_TRACKING_URI"],
                        run_id=run.summary().get("mlflow_run"),
                    )
                )
                run.update(mlflow_run=loggers[-1].run_id)
    trackers = Trackers(loggers)
    trackers.begin(config)
    return trackers
