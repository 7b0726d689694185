"""Run programs that a model wrote in confined child processes (``confined.py``), to see whether they pass."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import IO

from megatron_align.errors import InputError
from megatron_align.rollout.verifiers import confined

SECONDS = 10.0
MEMORY = 1 << 30  # bytes
FOLDER_BYTES = 256 << 20  # of all files of a program
_LOOK_SECONDS = 0.5  # between two looks at them


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether a Python program runs to its end without an error.

    It can write only into a folder that is removed afterwards and may hold 256 MiB (checked every half second), start
    no process, open no socket, and signal no other one. Leaving early (``sys.exit``) does not count as its end. A
    program that sets out to fake its end may succeed: it shares the process with what reports the end.

    Args:
        program: source text.
        seconds: limit of wall and processor time.
        memory: limit of the address space, in bytes.

    Raises:
        InputError: the kernel cannot confine a process (Linux 6.2 or newer with Landlock and seccomp does).
    """
    token = secrets.token_hex(16).encode()
    reading, writing = os.pipe()
    with (
        _temporary_folder() as folder,
        tempfile.TemporaryFile(dir=folder) as errors,  # without a name; as large as the program's other files
    ):
        command = [sys.executable, "-I", str(Path(confined.__file__).resolve()), folder]
        try:
            process = subprocess.Popen(
                [*command, str(seconds), str(memory), str(writing)],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            _wait(process, token + b"\n" + program.encode("utf-8", "replace"), seconds, folder)
            written = _read_all(reading, len(confined.READY + token))
        finally:
            os.close(reading)
        if process.returncode == confined.UNCONFINED and not written:
            raise InputError(
                f"code can be run only where the kernel can confine it (Landlock, seccomp): {_end(errors)}"
            )
        return written == confined.READY + token


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Yield a new folder and remove it, whatever a program left there; what cannot be removed stays."""
    folder = tempfile.mkdtemp(prefix="megatron_align_code_")
    try:
        yield folder
    finally:
        with suppress(OSError):
            _remove(folder)


def _remove(folder: str) -> None:
    """Remove a folder tree of any depth, where ``shutil.rmtree`` ends at the limits of recursion and of paths.

    Each folder found is moved to the top before it is read, so no path grows.
    """
    token, serial, waiting = secrets.token_hex(8), count(), [folder]
    while waiting:
        current = waiting.pop()
        with os.scandir(current) as entries:
            found = list(entries)
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, stat.S_IRWXU)
                waiting.append(os.path.join(folder, f"{token}.{next(serial)}"))
                os.rename(entry.path, waiting[-1])
            else:
                os.unlink(entry.path)
        if current != folder:
            os.rmdir(current)
    os.rmdir(folder)


def _wait(process: subprocess.Popen[bytes], given: bytes | None, seconds: float, folder: str) -> None:
    """Send the process its input and wait for it; kill it when the time is over, or its folder too large."""
    end, wait = time.monotonic() + seconds, min(seconds, _LOOK_SECONDS)
    while True:
        try:
            process.communicate(given, timeout=wait)
            return
        except subprocess.TimeoutExpired:
            given = None  # further calls go on with it
            wait = min(end - time.monotonic(), _LOOK_SECONDS)
            if wait <= 0 or _holds_more(folder, FOLDER_BYTES):
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return


def _holds_more(folder: str, most: int) -> bool:
    """Return whether the files in a folder tree take more than so many bytes."""
    held, waiting = 0, [folder]
    while waiting and held <= most:
        with suppress(OSError), os.scandir(waiting.pop()) as entries:  # a program may remove what was listed
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    held += entry.stat(follow_symlinks=False).st_blocks * 512
    return held > most


def _end(file: IO[bytes]) -> str:
    """Return the last 500 bytes of a file as one line."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 500))
    return " ".join(file.read().decode("utf-8", "replace").split())


def _read_all(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) <= size and (piece := os.read(descriptor, size + 1)):
        data += piece
    return data
