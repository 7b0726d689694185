"""Stop requests: SIGTERM, SIGUSR1 or Ctrl-C make the run save a checkpoint after the current step and exit.

Slurm and torchrun send SIGTERM before they kill; ``#SBATCH --signal`` usually names SIGUSR1. Ctrl-C (SIGINT) is a
person's wish to stop: no requeue is requested. A second Ctrl-C leaves at once.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# ERESTART: "interrupted, should be restarted"; HTCondor's manual has the same number for self-checkpointing jobs.
EXIT_REQUEUE = 85
EXIT_INTERRUPTED = 130  # as shells report a process that Ctrl-C ended
REQUEUE = "requeue"  # file in the run's folder: torchrun turns every exit code into 1
# torchrun gets Ctrl-C as well as its ranks, and sends it to them again.
_SAME_KEYSTROKE_SECONDS = 3.0


class Interrupted(Exception):
    """Ctrl-C stopped the run, after it saved; raised on every rank."""


class StopRequests:
    """Catches stop signals inside a with-block; ``signal_name`` is that of the first one, None before.

    Args:
        noted: called when the first one arrives, inside the signal handler.
    """

    def __init__(self, noted: Callable[[], None] = lambda: None) -> None:
        self.signal_name: str | None = None
        self._noted = noted
        self._before: dict[signal.Signals, Any] = {}

    @property
    def interrupted(self) -> bool:
        """Whether the first signal was Ctrl-C."""
        return self.signal_name == signal.SIGINT.name

    def __enter__(self) -> StopRequests:
        # A script's background process ignores Ctrl-C, which is meant for another. Schedulers' signals always count.
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        caught = [number for number in SIGNALS if not (ignored and number == signal.SIGINT)]
        self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._noted()
            if number == signal.SIGINT and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
                os.write(2, b"\nsaving after this step; press Ctrl-C again to leave at once\n")


class SecondInterrupt:
    """Ends the process at the second Ctrl-C inside a with-block, even while it waits for a collective or a disk.

    The first one is left to the handlers of Python. The signals are read by a thread: the main thread may be in a call
    that does not return.
    """

    def __enter__(self) -> SecondInterrupt:
        self._first: float | None = None
        self._writer: socket.socket | None = None
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._read, name="interrupt", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            signal.set_wakeup_fd(self._before)
            self._writer.close()  # ends the thread

    def _read(self) -> None:
        with self._reader:
            while numbers := self._reader.recv(4096):
                for number in numbers:
                    if number == signal.SIGINT:
                        self._count()

    def _count(self) -> None:
        now = time.monotonic()
        repeats = _SAME_KEYSTROKE_SECONDS if "TORCHELASTIC_RUN_ID" in os.environ else 0.0
        if self._first is None:
            self._first = now
        elif now - self._first >= repeats:
            if os.environ.get("RANK", "0") == "0":
                print("interrupted again: left at once, without saving", file=sys.stderr, flush=True)
            os._exit(EXIT_INTERRUPTED)


def interrupted(line: str, *, ends_process: bool) -> int:
    """Print a line after Ctrl-C and return the exit code; ``ends_process``: end the process with it instead.

    Python would end with SIGINT in place of the code where the interrupt came inside ``exec``, which imports use.
    """
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)
    if ends_process:
        sys.stdout.flush()
        os._exit(EXIT_INTERRUPTED)
    return EXIT_INTERRUPTED


def write_requeue_marker(run: Path, step: int) -> None:
    """Mark the run's folder: it stopped early, and the same command resumes it."""
    (run / REQUEUE).write_text(f"{step}\n", encoding="utf-8")


def remove_requeue_marker(run: Path) -> None:
    """Remove the marker of :func:`write_requeue_marker`: the run has been started again."""
    (run / REQUEUE).unlink(missing_ok=True)
