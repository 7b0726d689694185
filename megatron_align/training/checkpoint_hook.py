"""Periodic checkpoints of a run, in the background; failed saves are retried, and stop signals save before leaving."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch.distributed as dist

from megatron_align.checkpoint.folder import prune
from megatron_align.checkpoint.saver import SaveFailed, Saver
from megatron_align.config import CheckpointConfig
from megatron_align.model import parallel
from megatron_align.monitoring.logger import RunLog
from megatron_align.training.hooks import Hook
from megatron_align.training.stop import StopRequests, write_requeue_marker
from megatron_align.training.trainer import Trainer

RETRY_SECONDS = 60.0  # after a failed save, unless the next regular one is due earlier


class Checkpointing(Hook):
    """Saves checkpoints when they are due, when the run ends, and when a signal asks the run to stop.

    A failed save costs neither steps nor older checkpoints: the run warns, continues, and tries again. Only the last
    save must succeed.

    Args:
        config: intervals and retention.
        log: of the run.
    """

    def __init__(self, config: CheckpointConfig, log: RunLog):
        self._config, self._log = config, log
        self._saver = Saver(background=config.async_save, before=log.sync)
        self._stop = StopRequests()
        self._saved_step: int | None = None
        self._failed_at: float | None = None

    def start(self, trainer: Trainer) -> None:
        """Delete checkpoints beyond the retention limit (a kill may have come before that) and catch stop signals."""
        super().start(trainer)
        self._watchdog = trainer.watchdog
        self._prune()
        self._stop.__enter__()

    def close(self, error: BaseException | None) -> None:
        """Restore the signal handlers."""
        self._stop.__exit__(None, None, None)

    def before_update(self) -> None:
        """Wait until the pending save has copied what the update changes."""
        if self._saver.pending:
            self._watchdog.detail("copying the state of the last checkpoint")
            self._saver.wait_until_copied()

    def end_step(self, step: int) -> bool:
        """Finish a pending save, begin one that is due; return True if any rank received a stop signal."""
        if step == self.trainer.steps:
            self._save_last(step)
            return False
        if not self._save_between_steps(step):
            return False
        self._save_last(step)
        if dist.get_rank() == 0:
            write_requeue_marker(self.trainer.setup.folder, step)
        self._log.message(
            f"stop requested ({self._stop.signal_name or 'on another rank'}): saved after step {step}"
        )
        return True

    def on_fault(self) -> None:
        """Wait for a pending save."""
        self._settle()

    def _save_between_steps(self, step: int) -> bool:
        """Finish what is written, save what is due; return whether any rank was asked to stop."""
        every = self._config.save_every
        due = every is not None and step % every == 0
        retry = self._failed_at is not None and time.monotonic() - self._failed_at > RETRY_SECONDS
        writing = self._saver.pending and not self._saver.written()
        flags = [float(bool(self._stop.signal_name)), float(retry), float(writing)]
        stops, retries, writers = parallel.all_reduce_sum(flags)
        if self._saver.pending and (due or stops or not writers):
            self._warn_if_failed(self._finish)
        if (due or retries) and not stops:
            self._warn_if_failed(self._begin)
        return stops > 0

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
            prune(self.trainer.setup.folder, self._config.keep, self._config.keep_every)
