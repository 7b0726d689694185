"""Being asked to stop: SIGTERM or SIGUSR1 ask for a checkpoint at the end of the step, then for an end.

Slurm and torchrun send SIGTERM before they kill; SIGUSR1 is what ``#SBATCH --signal`` usually asks for.
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
    """Notes signals for the length of a with-block; ``asked`` is the name of the first one."""

    def __init__(self) -> None:
        self.asked: str | None = None
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
        self.asked = self.asked or signal.Signals(number).name


def leave_marker(run: Path, step: int) -> None:
    """Say in the run's folder that it wants to go on: the same command does it."""
    (run / REQUEUE).write_text(f"{step}\n", encoding="utf-8")


def clear_marker(run: Path) -> None:
    """Take back :func:`leave_marker`: the run goes on."""
    (run / REQUEUE).unlink(missing_ok=True)
