"""Stop requests: SIGTERM or SIGUSR1 make the run save a checkpoint after the current step and exit.

Slurm and torchrun send SIGTERM before they kill; ``#SBATCH --signal`` usually names SIGUSR1.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# ERESTART: "interrupted, should be restarted"; HTCondor's manual has the same number for self-checkpointing jobs.
EXIT_REQUEUE = 85
REQUEUE = "requeue"  # file in the run's folder: torchrun turns every exit code into 1


class StopRequests:
    """Catches stop signals inside a with-block; ``signal_name`` is that of the first one, None before."""

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequests:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name


def write_requeue_marker(run: Path, step: int) -> None:
    """Mark the run's folder: it stopped early, and the same command resumes it."""
    (run / REQUEUE).write_text(f"{step}\n", encoding="utf-8")


def remove_requeue_marker(run: Path) -> None:
    """Remove the marker of :func:`write_requeue_marker`: the run has been started again."""
    (run / REQUEUE).unlink(missing_ok=True)
