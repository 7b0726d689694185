"""Periodic checkpoints of a run, in the background; failed saves are retried, and stop signals save before leaving."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from megatron_align.checkpoint.folder import folder_taken, prune
from megatron_align.checkpoint.saver import SaveFailed, Saver
from megatron_align.config import CheckpointConfig
from megatron_align.model import parallel
from megatron_align.monitoring.logger import RunLog
from megatron_align.training.best import KeepBest
from megatron_align.training.hooks import Hook
from megatron_align.training.stop import StopRequests, write_requeue_marker
from megatron_align.training.trainer import Trainer

RETRY_SECONDS = 60.0  # after a failed save, unless the next regular one is due earlier


class _Agreement(NamedTuple):
    """Facts that all ranks agree on after a step."""

    due: bool  # a regular save
    stops: bool  # a rank received a stop signal
    retries: bool  # a save that failed
    writing: bool  # a pending save is not yet written by every rank
    interrupted: bool  # the stop signal was Ctrl-C


class Checkpointing(Hook):
    """Saves checkpoints when they are due, when the run ends, and when a signal asks the run to stop.

    A failed save costs neither steps nor older checkpoints: the run warns, continues, and tries again. Only the last
    save must succeed.

    Args:
        config: intervals and retention.
        log: of the run.
        best: has the checkpoint of the best validation saved and kept; None: none is.
    """

    def __init__(self, config: CheckpointConfig, log: RunLog, best: KeepBest | None = None):
        self._config, self._log, self._best = config, log, best
        self._stop = StopRequests(self._announce_stop)
        self._saved_step: int | None = None
        self._failed_at: float | None = None
        self._is_folder_lost = False

    def start(self, trainer: Trainer) -> None:
        """Delete checkpoints beyond the retention limit (a kill may have come before that) and catch stop signals."""
        super().start(trainer)
        self._watchdog, self._lock = trainer.watchdog, trainer.setup.lock
        self._saver = Saver(
            background=self._config.async_save, before=self._log.sync, taken_by=trainer.setup.taken_by
        )
        self._prune()
        self._stop.__enter__()

    def close(self, error: BaseException | None) -> None:
        """Restore the signal handlers."""
        self._stop.__exit__(None, None, None)

    def finish(self) -> None:
        """Restore the signal handlers: everything is saved, so a signal may end the export at once."""
        self._stop.__exit__(None, None, None)

    def before_update(self) -> None:
        """Wait until the pending save has copied what the update changes."""
        if self._saver.pending:
            self._watchdog.detail("copying the state of the last checkpoint")
            self._saver.wait_until_copied()

    def end_step(self, step: int) -> bool:
        """Finish a pending save, begin one that is due; return True if any rank received a stop signal.

        Raises:
            TrainingFault: another run has taken over the folder.
        """
        agreed = self._agree(step)
        if step < self.trainer.steps and not agreed.stops:
            self._save_between_steps(agreed)
            return False
        self._save_last(step)
        if step == self.trainer.steps:
            return False
        self.trainer.interrupted = agreed.interrupted
        if dist.get_rank() == 0 and not agreed.interrupted:
            write_requeue_marker(self.trainer.setup.folder, step)
        self._log.message(
            f"stop requested ({self._stop.signal_name or 'on another rank'}): saved after step {step}; the same "
            "command resumes"
        )
        return True

    def on_fault(self) -> None:
        """Wait for a pending save, unless the folder is another run's."""
        if not self._is_folder_lost:
            self._settle()

    def _announce_stop(self) -> None:
        if self._lock is not None:
            self._lock.mark_stopping()

    def _agree(self, step: int) -> _Agreement:
        """Agree with the other ranks on what to do after a step.

        Raises:
            TrainingFault: on every rank: rank 0 has lost the folder to another run.
        """
        every = self._config.save_every
        due = (every is not None and step % every == 0) or (self._best is not None and self._best.is_due)
        retry = self._failed_at is not None and time.monotonic() - self._failed_at > RETRY_SECONDS
        writing = self._saver.pending and not self._saver.written()
        taken_by = self.trainer.setup.taken_by()
        flags = (bool(self._stop.signal_name), retry, writing, self._stop.interrupted, bool(taken_by))
        stops, retries, writers, interrupts, losses = parallel.all_reduce_sum([float(flag) for flag in flags])
        if losses:
            self._is_folder_lost = True
            raise folder_taken(taken_by)
        if stops:
            self._announce_stop()  # another rank may have received the signal
        return _Agreement(due, stops > 0, retries > 0, writers > 0, interrupts > 0)

    def _save_between_steps(self, agreed: _Agreement) -> None:
        """Finish what is written, save what is due."""
        if self._saver.pending and (agreed.due or not agreed.writing):
            self._warn_if_failed(self._finish)
        if agreed.due or agreed.retries:
            self._warn_if_failed(self._begin)

    def _save_last(self, step: int) -> None:
        """Save after the last step of this process, and wait until it is complete.

        Raises:
            SaveFailed: it could not be written.
        """
        self._settle()
        if self._saved_step != step:
            self._begin()
            if self._saver.pending:
                self._finish()

    def _settle(self) -> None:
        if self._saver.pending:
            self._warn_if_failed(self._finish)

    def _warn_if_failed(self, save: Callable[[], None]) -> None:
        try:
            save()
        except SaveFailed as error:
            self._failed_at = time.monotonic()
            self._log.message(
                f"warning: {error}; training continues, retrying at the next save or in {RETRY_SECONDS:g} s"
            )

    def _begin(self) -> None:
        with self._watchdog.patient(f"saving step {self.trainer.step}"):
            self.trainer.begin_save(self._saver)
        if not self._saver.background:
            self._finish()

    def _finish(self) -> None:
        with self._watchdog.patient("finishing a checkpoint"):
            saved = self._saver.finish()
            self._prune()
        self._saved_step, self._failed_at = saved.step, None
        seconds = {"save_pause_seconds": saved.pause_seconds, "save_seconds": saved.seconds}
        self._log.write({"step": saved.step, "split": "save", **seconds, "save_bytes": saved.bytes})

    def _prune(self) -> None:
        if dist.get_rank() == 0:
            best = self._best.kept() if self._best else None
            prune(self.trainer.setup.folder, self._config.keep, self._config.keep_every, best)
            if self._best:
                self._best.write()
