"""A rank that does not come, or keeps the others waiting, is named, and the run ends."""

import os
import subprocess
import sys
import time

from tests.harness import ranks
from tests.harness.pool import free_port

JOIN = """
from megatron_align.config import ParallelConfig
from megatron_align.model.parallel import Place, join
print("imported", flush=True)
input()
try:
    join(Place.from_environment(), ParallelConfig(timeout_seconds=3))
except TimeoutError as error:
    print(error)
"""
STALL = """
from megatron_align.model.parallel import Place
from tests.harness.ranks import stall
print("imported", flush=True)
input()
stall(Place.from_environment(), late=1, timeout=4)
"""


DIE = """
import os, signal
from megatron_align.config import ParallelConfig
from megatron_align.model.parallel import AlreadyReported, Place, RankLost, all_reduce_sum, join
place = Place.from_environment()
try:
    with join(place, ParallelConfig()).watching() as watchdog:
        watchdog.report("step 1")
        all_reduce_sum([1.0])
        watchdog.report("step 2")
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce_sum([1.0])
except (RankLost, AlreadyReported) as error:
    print(type(error).__name__, error)
    os._exit(1)
"""


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
    """Let them go on together, once all have imported what they need: their time limits are short."""
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


def test_absent_ranks_are_named():
    port = free_port()
    [(out, err, _), _] = finish(release([start(JOIN, rank, 4, port) for rank in (0, 2)]), timeout=90)
    assert out.strip() == "4 ranks must join within 3 s, missing: rank 1, 3", err


def test_a_stalled_rank_is_named_once_and_everyone_ends():
    port = free_port()
    outputs = finish(release([start(STALL, rank, 3, port) for rank in range(3)]), timeout=90)
    said = "".join(err for _, err, _ in outputs)
    assert said.count("error:") == 1, said
    assert "no progress for 4 s: rank 1 is still in 'step 1' while others wait in 'step 2'" in said
    assert all(code != 0 for *_, code in outputs)


def test_a_killed_rank_is_told_of_once():
    port = free_port()
    outputs = finish([start(DIE, rank, 3, port) for rank in range(3)], timeout=90)
    said = sorted(out.split(" ", 1)[0] for rank, (out, _, _) in enumerate(outputs) if rank != 1)
    assert said == ["AlreadyReported", "RankLost"], outputs
    [line] = [out for out, _, _ in outputs if out.startswith("RankLost")]
    assert "another rank died while rank" in line
    assert "was in 'step 2'" in line


def test_ranks_that_disagree_are_named_on_every_rank(pool):
    line = "one folder: step is 2 on rank 0 and 5 on rank 1"
    assert pool.run(3, ranks.disagree) == [line] * 3
