"""Experiment trackers: TensorBoard, Weights & Biases, MLflow. Each is switched on by its own option."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_align.config import LoggingConfig
from megatron_align.errors import InputError
from megatron_align.monitoring.tracker_thread import Tracker, TrackerThread

MLFLOW_RUN = "mlflow_run.txt"  # in the run's folder: the id that a resumed run continues
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}  # option -> package


def check_logging(config: LoggingConfig) -> None:
    """Check that the packages of the chosen trackers are installed.

    Raises:
        InputError: naming the package that is missing.
    """
    for option, package in _PACKAGES.items():
        if getattr(config, option) and importlib.util.find_spec(package) is None:
            raise InputError(
                f"logging.{option} needs the package {package}, which is not installed: pip install {package}"
            )


def open_trackers(
    folder: Path,
    config: LoggingConfig,
    settings: Mapping[str, Any],
    done: int,
    message: Callable[[str], None],
) -> list[TrackerThread]:
    """Open the chosen trackers, each on a thread of its own.

    Args:
        folder: of the run.
        config: which trackers are wanted, and the names of their projects.
        settings: the run's resolved configuration.
        done: steps already made; a resumed run sends the rows after them again.
        message: prints a line.
    """
    openers: dict[str, Callable[[], Tracker]] = {}
    if config.tensorboard:
        openers["TensorBoard"] = lambda: TensorBoard(folder, done)
    if project := _project(config.wandb, folder):
        openers["Weights & Biases"] = lambda: WeightsAndBiases(project, folder, settings)
    if experiment := _project(config.mlflow, folder):
        openers["MLflow"] = lambda: MLflow(experiment, folder, settings)
    return [TrackerThread(name, opener, message) for name, opener in openers.items()]


def _project(option: bool | str | None, folder: Path) -> str | None:
    """Return the project of a tracker: the run's own name where the option is true; None: off."""
    return folder.resolve().name if option is True else option or None


class TensorBoard:
    """An event file in ``checkpoint.dir/tensorboard``; rows are written at once, each completely or not at all."""

    def __init__(self, folder: Path, done: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        events = folder / "tensorboard"
        events.mkdir(exist_ok=True)
        # Names that end with a process number and a counter, as TensorBoard's own.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = (events / name).open("ab", buffering=0)
        self._size = self._file.tell()
        try:
            self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
            # Hides the steps that are made again.
            self._write(Event(step=done + 1, session_log=SessionLog(status=SessionLog.START)))
        except OSError:
            self._file.close()
            (events / name).unlink()  # the next attempt has another name
            raise

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._file.close()

    def _write(self, event: Any) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        rest = record.getvalue()
        size = self._size + len(rest)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            self._file.truncate(self._size)
            raise
        self._size = size


class WeightsAndBiases:
    """One W&B run per folder, so that a resumed run continues its own."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]):
        import wandb

        page = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project,
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(settings),
            id=page,
            resume="allow",
        )
        self._newest = 0

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        # It wants steps in order; a checkpoint is done some steps after its own.
        self._newest = max(self._newest, step)
        self._run.log(dict(numbers), step=self._newest)

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._run.finish(exit_code=int(failed))


class MLflow:
    """A run of an experiment, on the server that ``MLFLOW_TRACKING_URI`` names or MLflow's own default."""

    def __init__(self, experiment: str, folder: Path, settings: Mapping[str, Any]):
        import mlflow

        self._mlflow, mark = mlflow, folder / MLFLOW_RUN
        mlflow.set_experiment(experiment)
        known = mark.read_text(encoding="utf-8").strip() if mark.is_file() else None
        run = mlflow.start_run(run_id=known, run_name=None if known else folder.name)
        if not known:
            mark.write_text(run.info.run_id + "\n", encoding="utf-8")
            mlflow.log_params(_flat(settings))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        self._mlflow.log_metrics(dict(numbers), step=step)

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._mlflow.end_run("FAILED" if failed else "FINISHED")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``{"section.key": value}``."""
    return {f"{section}.{key}": value for section, of in settings.items() for key, value in of.items()}
