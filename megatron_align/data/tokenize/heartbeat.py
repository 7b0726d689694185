"""A heartbeat file: one process of a node changes it while it works, the others watch it.

Clocks of other machines and of file systems are not read: only whether the file changes counts.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_align.errors import one_line

BEAT_SECONDS = 5.0
TIMEOUT_SECONDS = 300.0  # a shared disk may stall for minutes


@contextmanager
def heartbeat(file: Path) -> Iterator[None]:
    """Change ``file`` every few seconds while the body runs; remove it then, or write the reason if the body fails.

    Write errors are ignored here: the body writes to the same folder and reports them.
    """
    done = threading.Event()

    def beat() -> None:
        while True:
            _write(file, None)
            if done.wait(BEAT_SECONDS):
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        done.set()
        thread.join()
        _write(file, one_line(error))
        raise
    done.set()
    thread.join()
    file.unlink(missing_ok=True)


class HeartbeatMonitor:
    """Watches whether the process that writes ``file`` is alive; its timeout starts now."""

    def __init__(self, file: Path) -> None:
        self._file, self._seen, self._since = file, _read(file), time.monotonic()

    def failure(self) -> str | None:
        """Return why to stop waiting for that process; None: it is alive, or may still start."""
        beat = _read(self._file)
        if beat != self._seen:  # the first content may be of an earlier run
            self._seen, self._since = beat, time.monotonic()
            if beat and beat["failed"]:
                return f"it failed: {beat['failed']}"
        if time.monotonic() - self._since > TIMEOUT_SECONDS:
            return f"it has sent no heartbeat for {TIMEOUT_SECONDS:g} seconds"
        return None


def _write(file: Path, failed: str | None) -> None:
    unfinished = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps({"beat": uuid.uuid4().hex, "failed": failed}), encoding="utf-8")
        os.replace(unfinished, file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()


def _read(file: Path) -> dict[str, str | None] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet
        return None
