"""A rank that keeps the others waiting, or dies, is named once, and every rank ends."""

from tests.harness.pool import free_port
from tests.harness.processes import finish, release, start

STALL = """
from megatron_align.model.parallel import RankInfo
from tests.harness.training_ranks import stall
print("imported", flush=True)
input()
stall(RankInfo.from_environment(), late=1, timeout=4)
"""


DIE = """
import os, signal
from megatron_align.config import ParallelConfig
from megatron_align.model.parallel import RankInfo, all_reduce_sum
from megatron_align.training.watchdog import AlreadyReported, RankLost, join_watched
rank_info = RankInfo.from_environment()
try:
    with join_watched(rank_info, ParallelConfig()).watching() as watchdog:
        watchdog.report("step 1")
        all_reduce_sum([1.0])
        watchdog.report("step 2")
        if rank_info.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        all_reduce_sum([1.0])
except (RankLost, AlreadyReported) as error:
    print(type(error).__name__, error)
    os._exit(1)
"""


def test_a_stalled_rank_is_named_once_and_everyone_ends():
    port = free_port()
    outputs = finish(release([start(STALL, rank, 3, port) for rank in range(3)]), timeout=90)
    said = "".join(err for _, err, _ in outputs)
    assert said.count("error:") == 1, said
    assert "no progress for 4 s: rank 1 is still in 'step 1' while others wait in 'step 2'" in said
    assert all(code != 0 for *_, code in outputs)


def test_a_killed_rank_is_reported_once():
    port = free_port()
    outputs = finish([start(DIE, rank, 3, port) for rank in range(3)], timeout=90)
    said = sorted(out.split(" ", 1)[0] for rank, (out, _, _) in enumerate(outputs) if rank != 1)
    assert said == ["AlreadyReported", "RankLost"], outputs
    [line] = [out for out, _, _ in outputs if out.startswith("RankLost")]
    assert "another rank died while rank" in line
    assert "was in 'step 2'" in line
