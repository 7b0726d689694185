"""Run programs that a model wrote in confined child processes (``confined.py``), to see whether they pass."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO

from megatron_align.errors import InputError
from megatron_align.rollout.verifiers import confined

SECONDS = 10.0
MEMORY = 1 << 30  # bytes


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether a Python program runs to its end without an error.

    It can write only into a folder that is removed afterwards, start no process, open no socket, and signal no other
    process. Leaving early (``sys.exit``) does not count as its end. A program that sets out to fake its end may
    succeed: it shares the process with what reports the end.

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
        tempfile.TemporaryDirectory(prefix="megatron_align_code_", ignore_cleanup_errors=True) as folder,
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
            _wait(process, token + b"\n" + program.encode("utf-8", "replace"), seconds)
            written = _read_all(reading, len(confined.READY + token))
        finally:
            os.close(reading)
        if process.returncode == confined.UNCONFINED and not written:
            raise InputError(
                f"code can be run only where the kernel can confine it (Landlock, seccomp): {_end(errors)}"
            )
        return written == confined.READY + token


def _wait(process: subprocess.Popen[bytes], given: bytes, seconds: float) -> None:
    """Send the process its input and wait for it; kill it when the time is over."""
    try:
        process.communicate(given, timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _end(file: IO[bytes]) -> str:
    """Return the last 500 bytes of a file as one line."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 500))
    return " ".join(file.read().decode("utf-8", "replace").split())


def _read_all(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) <= size and (piece := os.read(descriptor, size + 1)):
        data += piece
    return data
