"""Run the stages: several at once where none waits for another, each once, and the same command continues.

A stage that succeeded has a record ``stages/NAME.json`` in the recipe's folder. All processes of a start share its
lock, so that a start after a kill waits until the last of them has ended: the kernel sends each SIGTERM, and it saves.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from examples.baichuan_alignment.plan import Stage, keys
from megatron_align.errors import InputError, require

ROOT = Path(__file__).resolve().parents[2]
MARK = ".baichuan_alignment"  # a folder with this file is the recipe's
PATIENCE = 120.0  # seconds that a start waits for the processes of a killed one
_POLL_SECONDS = 0.2
_LIBC, _DEATH_SIGNAL = ctypes.CDLL(None), 1  # of prctl: sent to a process when its parent dies


class StageFailed(Exception):
    """A stage's command failed; the message is one line."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A stage that is complete, and the seconds that its command took; None: an earlier start finished it."""

    stage: Stage
    seconds: float | None


class Runner:
    """The stages of one folder.

    Args:
        out: the recipe's folder, new, empty, or of an earlier start.
        planned: all stages, each after those it needs.
        jobs: stages that run at once.
    """

    def __init__(self, out: Path, planned: Sequence[Stage], jobs: int):
        self._out, self._planned, self._jobs = out, planned, jobs
        self._keys = keys(planned)
        self._running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}

    def run(self, watch: Callable[[Sequence[str]], None]) -> Iterator[Finished]:
        """Run what is missing; yield each stage when it is complete. ``watch`` is called with those that run.

        Raises:
            StageFailed: a command failed; the others were stopped.
            InputError: the folder is another's, or its stages were made by other commands.
        """
        with self._lock() as lock:
            complete = [stage for stage in self._planned if self._is_complete(stage)]
            for stage in complete:
                yield Finished(stage=stage, seconds=None)
            done = {stage.name for stage in complete}
            try:
                while len(done) < len(self._planned):
                    self._start(done, lock)
                    watch(tuple(self._running))
                    time.sleep(_POLL_SECONDS)
                    for finished in self._ended():
                        done.add(finished.stage.name)
                        yield finished
            finally:
                self._stop()

    def _is_complete(self, stage: Stage) -> bool:
        record = self._record(stage)
        if not record.is_file():
            return False
        found = json.loads(record.read_text(encoding="utf-8"))
        require(
            found["key"] == self._keys[stage.name],
            f"stage {stage.name} in {self._out} was made with other options or files, or after another stage: "
            f"give a new --out; it was made by: {found['command']}",
        )
        return stage.output.exists()

    def _record(self, stage: Stage) -> Path:
        return self._out / "stages" / f"{stage.name}.json"

    def log(self, stage: Stage) -> Path:
        """Return the file with all that the newest start of the stage printed."""
        return self._out / "logs" / f"{stage.name}.log"

    def _start(self, done: set[str], lock: IO[str]) -> None:
        """Start stages that are ready, while there is room."""
        for stage in self._planned:
            if len(self._running) == self._jobs:
                return
            if stage.name in done or stage.name in self._running or not done.issuperset(stage.after):
                continue
            if stage.starts_anew and stage.output.parent.exists():
                shutil.rmtree(stage.output.parent)
            stage.output.parent.mkdir(parents=True, exist_ok=True)
            with self.log(stage).open("wb") as log:
                process = subprocess.Popen(
                    ["bash", "-c", f"exec {executable(stage.command)}"],
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches this process, which stops them
                    pass_fds=(lock.fileno(),),
                    preexec_fn=_end_with_parent,
                )
            self._running[stage.name] = (process, time.monotonic())

    def _ended(self) -> Iterator[Finished]:
        """Yield the running stages that have succeeded since the last call."""
        for stage in self._planned:
            if stage.name not in self._running:
                continue
            process, started = self._running[stage.name]
            if (code := process.poll()) is None:
                continue
            del self._running[stage.name]
            if code != 0 or not stage.output.exists():
                raise StageFailed(f"stage {stage.name} failed with exit code {code}: {self._reason(stage)}")
            seconds = time.monotonic() - started
            content = {"key": self._keys[stage.name], "command": stage.command, "seconds": round(seconds, 1)}
            partial = self._record(stage).with_suffix(".partial")
            partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
            os.replace(partial, self._record(stage))
            yield Finished(stage=stage, seconds=seconds)

    def _reason(self, stage: Stage) -> str:
        log = self.log(stage)
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        errors = [line for line in lines if line.startswith("error:")] or [line for line in lines if line]
        return f"{errors[-1].removeprefix('error: ') if errors else 'it printed nothing'}; see {log}"

    def _stop(self) -> None:
        """Let running stages save and end."""
        for process, _ in self._running.values():
            if process.poll() is None:
                process.terminate()
        for process, _ in self._running.values():
            process.wait()
        self._running.clear()

    @contextmanager
    def _lock(self) -> Iterator[IO[str]]:
        """Claim the folder; wait for processes of a start that was killed."""
        ours = (self._out / MARK).exists()
        if not ours and self._out.exists() and (not self._out.is_dir() or any(self._out.iterdir())):
            raise InputError(f"--out must be a new or empty folder, or this recipe's; found '{self._out}'")
        for folder in ("stages", "logs", "evaluations"):
            (self._out / folder).mkdir(parents=True, exist_ok=True)
        with (self._out / MARK).open("a") as lock:
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    require(
                        time.monotonic() < deadline,
                        f"--out {self._out} is in use by another start of the recipe",
                    )
                    time.sleep(_POLL_SECONDS)
            yield lock


def executable(command: str) -> str:
    """Return a command of the plan with this interpreter in place of ``python`` and ``megatron-align``."""
    program, rest = command.split(" ", 1)
    module = "-m megatron_align.tools.main " if program == "megatron-align" else ""
    return f"{shlex.quote(sys.executable)} {module}{rest}"


def _environment() -> dict[str, str]:
    # On the CPU even where there is a GPU, with one thread for each stage: two stages run at once.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return {**os.environ, **settings}


def _end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when the one that started it dies."""
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)
