"""Ranks as plain processes that run a piece of code, for tests in which a rank dies or never joins."""

import os
import subprocess
import sys
import time


def start(code, rank, world, port):
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code], env=environment, **pipes)


def release(processes):
    """Start them together once all have finished their imports: their time limits are short."""
    for process in processes:
        assert process.stdout.readline() == "imported\n", process.communicate()
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    return processes


def finish(processes, timeout):
    outputs = []
    deadline = time.monotonic() + timeout
    try:
        for process in processes:
            outputs.append((*process.communicate(timeout=deadline - time.monotonic()), process.returncode))
    finally:
        for process in processes:
            process.kill()
    return outputs
