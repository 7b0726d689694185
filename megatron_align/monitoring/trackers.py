"""Experiment trackers: TensorBoard, Weights & Biases, MLflow. Each is switched on by its own option."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from megatron_align.config import LoggingConfig
from megatron_align.errors import InputError

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


class Tracker(Protocol):
    """Records a row's numbers; on rank 0 only."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Record finite numbers, named ``split/metric``."""
        ...

    def close(self, failed: bool) -> None:
        """Close the tracker, whether the run succeeded or failed."""
        ...


def open_trackers(
    folder: Path, config: LoggingConfig, settings: Mapping[str, Any], done: int
) -> list[Tracker]:
    """Open the trackers that the configuration names.

    Args:
        folder: of the run.
        config: which ones.
        settings: the run's resolved configuration.
        done: steps already made; what was recorded after them is written again.
    """
    trackers: list[Tracker] = []
    if config.tensorboard:
        trackers.append(TensorBoard(folder, done))
    if config.wandb is not None:
        trackers.append(WeightsAndBiases(config.wandb, folder, settings))
    if config.mlflow is not None:
        trackers.append(MLflow(config.mlflow, folder, settings))
    return trackers


class TensorBoard:
    """Event files in ``checkpoint.dir/tensorboard``."""

    def __init__(self, folder: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """See :class:`Tracker`."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """See :class:`Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run per folder, so that a resumed run continues its own."""

    def __init__(self, project: str, folder: Path, settings: Mapping[str, Any]):
        import wandb

        page = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(
            project=project, dir=str(folder), config=dict(settings), id=page, resume="allow"
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
