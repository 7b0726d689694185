"""When a run's checkpoints are written, what is said about them, and what happens when they cannot be."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from megatron_align.checkpoint import folder as sharded
from megatron_align.checkpoint.saver import Saved, SaveFailed, Saver
from megatron_align.config import CheckpointConfig
from megatron_align.model import parallel
from megatron_align.monitoring.logger import NoSinks, Sinks
from megatron_align.training.watchdog import Watchdog

RETRY_SECONDS = 60.0  # after a save that failed, besides the next one that is due


class Saves:
    """The checkpoints of a run, on this rank; every rank calls it alike, between steps and before each update.

    A save that fails costs no step and no older checkpoint: the run says so, goes on, and tries again. Only the
    last one must succeed.

    Args:
        run: folder of the run.
        config: what is kept.
        begin: hands the model of a step to the saver.
        sinks: where it is told.
        watchdog: that must know of waits.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        begin: Callable[[Saver, int], None],
        sinks: Sinks | NoSinks,
        watchdog: Watchdog,
    ) -> None:
        self.run, self.config = run, config
        self._begin, self._sinks, self._watchdog = begin, sinks, watchdog
        self._saver = Saver(background=config.async_save, before=sinks.sync)
        self._saved: int | None = None
        self._failed: float | None = None
        self._prune()  # a kill may have come between a save and this

    def between_steps(self, step: int, *, due: bool, stop: bool) -> bool:
        """Finish what is written, save what is due after ``step``; return whether any rank was asked to stop."""
        retry = self._failed is not None and time.monotonic() - self._failed > RETRY_SECONDS
        writing = self._saver.pending and not self._saver.written()
        stops, retries, writers = parallel.all_reduce_sum([float(stop), float(retry), float(writing)])
        if self._saver.pending and (due or stops or not writers):
            self._try(self._finish)
        if (due or retries) and not stops:
            self._try(lambda: self._start(step))
        return stops > 0

    def before_update(self) -> float:
        """Wait until the pending save has copied what an update changes; return for how many seconds."""
        if self._saver.pending:
            self._watchdog.detail("copying what the last checkpoint holds")
        return self._saver.wait_until_copied()

    def last(self, step: int) -> None:
        """Save after the last step that this process makes, and wait until it is done.

        Raises:
            SaveFailed: it could not be written.
        """
        self.settle()
        if self._saved != step:
            self._start(step)
            if self._saver.pending:
                self._finish()

    def settle(self) -> None:
        """Wait for what is being written."""
        if self._saver.pending:
            self._try(self._finish)

    def _try(self, save: Callable[[], None]) -> None:
        try:
            save()
        except SaveFailed as error:
            self._failed = time.monotonic()
            self._sinks.say(f"warning: {error}; training goes on, the next save is due or in a minute")

    def _start(self, step: int) -> None:
        with self._watchdog.patient(f"saving step {step}"):
            self._begin(self._saver, step)
        if not self._saver.background:
            self._finish()

    def _finish(self) -> None:
        with self._watchdog.patient("finishing a checkpoint"):
            saved = self._saver.finish()
            self._prune()
        self._saved, self._failed = saved.step, None
        self._tell(saved)

    def _prune(self) -> None:
        if dist.get_rank() == 0:
            sharded.prune(self.run, self.config.keep, self.config.keep_every)

    def _tell(self, saved: Saved) -> None:
        facts = {
            "save_pause_seconds": saved.pause_seconds,
            "save_seconds": saved.seconds,
            "save_bytes": saved.bytes,
        }
        self._sinks.write({"step": saved.step, "split": "save", **facts})
