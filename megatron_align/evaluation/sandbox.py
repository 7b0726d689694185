"""Run programs that a model wrote in confined child processes (``confined.py``), to see whether they pass."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from megatron_align.errors import InputError
from megatron_align.evaluation import confined

SECONDS = 10.0
MEMORY = 1 << 30  # bytes


def passes(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> bool:
    """Return whether a Python program runs to its end without an error.

    It can write only into a folder that is removed afterwards, start no process, open no socket, and signal no other
    process. Leaving early (``sys.exit``) does not count as its end.

    Args:
        program: source text.
        seconds: limit of wall and processor time.
        memory: limit of the address space, in bytes.

    Raises:
        InputError: the kernel cannot confine a process (Linux with Landlock and seccomp does).
    """
    token = secrets.token_hex(16)
    reading, writing = os.pipe()
    with tempfile.TemporaryDirectory(prefix="megatron_align_code_", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-I", str(Path(confined.__file__).resolve()), folder]
        try:
            process = subprocess.Popen(
                [*command, str(seconds), str(memory), str(writing), token],
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env={"PATH": os.defpath, "HOME": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"},
                pass_fds=(writing,),
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            reason = _wait(process, program, seconds)
            if process.returncode == confined.UNCONFINED:
                raise InputError(
                    f"code can be run only where the kernel can confine it (Landlock, seccomp): {reason}"
                )
            return _read_all(reading, len(token)) == token
        finally:
            os.close(reading)


def _wait(process: subprocess.Popen[bytes], program: str, seconds: float) -> str:
    """Wait for the process, kill it when the time is over; return the end of what it wrote to stderr."""
    try:
        _, errors = process.communicate(program.encode("utf-8", "replace"), timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    return " ".join(errors[-500:].decode("utf-8", "replace").split())


def _read_all(descriptor: int, size: int) -> str:
    data = b""
    while len(data) <= size and (piece := os.read(descriptor, size + 1)):
        data += piece
    return data.decode("utf-8", "replace")
