"""A rank that does not join is named; ranks that disagree are named on every rank."""

from tests.harness import model_ranks
from tests.harness.pool import free_port
from tests.harness.processes import finish, release, start

JOIN = """
from megatron_align.config import ParallelConfig
from megatron_align.model.parallel import RankInfo, join
print("imported", flush=True)
input()
try:
    join(RankInfo.from_environment(), ParallelConfig(timeout_seconds=3))
except TimeoutError as error:
    print(error)
"""


def test_absent_ranks_are_named():
    port = free_port()
    [(out, err, _), _] = finish(release([start(JOIN, rank, 4, port) for rank in (0, 2)]), timeout=90)
    assert out.strip() == "4 ranks must join within 3 s, missing: rank 1, 3", err


def test_ranks_that_disagree_are_named_on_every_rank(pool):
    line = "one folder: step is 2 on rank 0 and 5 on rank 1"
    assert pool.run(3, model_ranks.disagree) == [line] * 3
