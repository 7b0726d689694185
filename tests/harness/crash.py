"""Ranks as separate processes that a test may kill, started for each run as a launcher does.

Each is forked from a server that has done nothing but import, so a start costs no imports. Only processes that were
started here are ever stopped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from megatron_align import faults
from tests.harness.pool import forking, free_port

HELD = (
    "TEST_HELD_SAVES"  # a file that must exist before a save is completed; until then "save held" is printed
)
SIGNALLED_AT_LOADING = "TEST_SIGNALLED_AT_LOADING"  # the signal that the process sends to itself


def start(
    world_size: int, arguments: list[str], log: Path, environment: dict[str, str] | None = None
) -> list[BaseProcess]:
    """Start ``megatron_align.train`` with these arguments on ``world_size`` ranks; return their processes.

    Their output is appended to ``log``.
    """
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in range(world_size):
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), **(environment or {})}
        ranks.append(forking().Process(target=_train, args=(own, arguments, log), daemon=True))
        ranks[-1].start()
    return ranks


def _train(environment: dict[str, str], arguments: list[str], log: Path) -> None:
    import torch

    from megatron_align.train import main

    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if HELD in environment:
        _hold_saves(Path(environment[HELD]))
    if SIGNALLED_AT_LOADING in environment:
        _signal_at_loading(int(environment[SIGNALLED_AT_LOADING]))
    sys.exit(main(arguments))


def _hold_saves(until: Path) -> None:
    from megatron_align.checkpoint import saver

    complete = saver._complete

    def late(*arguments: Any) -> int:
        if not until.exists():
            print("save held", flush=True)
        while not until.exists():
            time.sleep(0.05)
        return complete(*arguments)

    saver._complete = late


def _signal_at_loading(number: int) -> None:
    from megatron_align.training import trainer

    load = trainer.load_start_weights

    def signalled(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        load(*arguments, **options)

    trainer.load_start_weights = signalled


def end(ranks: list[BaseProcess], timeout: float = 240.0) -> list[int]:
    """Wait for the ranks, killing the rest once one has failed, as a launcher does; return the exit codes."""
    deadline = time.monotonic() + timeout
    while running := [rank for rank in ranks if rank.exitcode is None]:
        wait([rank.sentinel for rank in running], timeout=max(0.0, deadline - time.monotonic()))
        if time.monotonic() > deadline or any(rank.exitcode not in (None, 0, 85) for rank in ranks):
            for rank in running:
                rank.kill()
        for rank in ranks:
            rank.join(0)
    return [rank.exitcode for rank in ranks]


def train(world_size: int, arguments: list[str], log: Path, fault: str | None = None) -> list[int]:
    """Run to the end or to an injected fault (see ``megatron_align.faults``); return the exit codes."""
    return end(start(world_size, arguments, log, {faults.VARIABLE: fault} if fault else None))


def writers_of(log: Path) -> list[int]:
    """Return the processes that have a log open: the ranks that write it, and any orphan of theirs."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            opened = [os.readlink(handle) for handle in (process / "fd").iterdir()]
        except OSError:  # it has ended, or is not ours
            continue
        if str(log) in opened:
            found.append(int(process.name))
    return found


def wait_until(condition: Callable[[], Any], ranks: list[BaseProcess], timeout: float = 120.0) -> None:
    """Wait until the condition holds; fail if a rank ends first or the time is over."""
    deadline = time.monotonic() + timeout
    while not condition():
        codes = [rank.exitcode for rank in ranks]
        assert set(codes) == {None}, f"ranks ended early: {codes}"
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.01)
