"""Ranks as processes of their own that call a function, for tests in which a rank dies or never joins.

Each is forked from a server that has done nothing but import, so a start costs no imports and ranks begin together.
Only processes that were started here are ever stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from megatron_align.model.parallel import RankInfo
from tests.harness.pool import forking, free_port


class Output(NamedTuple):
    out: str
    err: str
    code: int | None


def run_ranks(
    function: Callable[[RankInfo], object],
    ranks: Sequence[int],
    world_size: int,
    folder: Path,
    timeout: float = 90.0,
) -> list[Output]:
    """Call ``function(rank_info)`` on some ranks of a launch; return what they printed, and their exit codes.

    Args:
        function: of a module.
        ranks: those that are started.
        world_size: ranks of the launch.
        folder: for their output.
        timeout: seconds after which what still runs is killed.
    """
    place = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started: list[tuple[BaseProcess, list[Path]]] = []
    for rank in ranks:
        files = [folder / f"{rank}.{name}" for name in ("out", "err")]
        own = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        started.append((forking().Process(target=_call, args=(own, function, files), daemon=True), files))
        started[-1][0].start()
    deadline, outputs = time.monotonic() + timeout, []
    for process, files in started:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
        outputs.append(Output(*(file.read_text() for file in files), process.exitcode))
    return outputs


def run_code(code: str) -> BaseProcess:
    """Start a process that runs some code, as ``python -c`` does, without its imports; return it."""
    process = forking().Process(target=_execute, args=(code,))
    process.start()
    return process


def _execute(code: str) -> None:
    exec(code, {"__name__": "__main__"})


def _call(environment: dict[str, str], function: Callable[[RankInfo], object], files: list[Path]) -> None:
    import torch

    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment, OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    function(RankInfo.from_environment())
