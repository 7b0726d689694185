"""Match texts with a regular expression in a child process, as a match that never ends cannot be interrupted here."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from megatron_align.rollout.verifiers import pattern_worker

SECONDS = 10.0  # of processor time, for one text


class PatternProcess:
    """A regular expression with a process of its own, which starts with the first text.

    Args:
        pattern: Python's syntax, checked.
        fullmatch: it must match all of a text, not a part of it.
    """

    def __init__(self, pattern: str, fullmatch: bool = False):
        self._first = [pattern, fullmatch, SECONDS]
        self._process: subprocess.Popen[str] | None = None

    def matches(self, text: str) -> bool | None:
        """Return whether a text matches; None: it takes too long, or the process was killed."""
        try:
            process = self._started()
            assert process.stdin is not None, "a pipe"
            assert process.stdout is not None, "a pipe"
            process.stdin.write(json.dumps(text) + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:  # killed before the text reached it
            answer = ""
        if not answer:
            self.close()
            return None
        return answer == "1\n"

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(Path(pattern_worker.__file__).resolve())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            assert self._process.stdin is not None, "a pipe"
            self._process.stdin.write(json.dumps(self._first) + "\n")
        return self._process

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            with suppress(BrokenPipeError):  # what was not read any more
                self._process.communicate()
            self._process = None
