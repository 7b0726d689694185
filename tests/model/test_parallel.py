"""A rank that does not join is named; ranks that disagree are named on every rank."""

import torch

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model import parallel
from megatron_align.training.watchdog import join_watched
from tests.harness import model_ranks
from tests.harness.processes import run_ranks


def join_within_3_seconds(rank_info):
    try:
        parallel.join(rank_info, ParallelConfig(timeout_seconds=3))
    except TimeoutError as error:
        print(error)


def test_absent_ranks_are_named(tmp_path):
    [(out, err, _), _] = run_ranks(join_within_3_seconds, (0, 2), 4, tmp_path)
    assert out.strip() == "4 ranks must join within 3 s, missing: rank 1, 3", err


def test_ranks_that_disagree_are_named_on_every_rank(pool):
    line = "one folder: step is 2 on rank 0 and 5 on rank 1"
    assert pool.run(3, model_ranks.disagree) == [line] * 3


def fail_on_two_ranks(rank_info):
    """Return the errors of three with-blocks, of which ranks 1 and 2 fail in the second."""
    watchdog = join_watched(rank_info, ParallelConfig())
    found = []
    with watchdog.watching():
        for block in range(3):
            try:
                with parallel.failing_together():
                    if block == 1 and rank_info.rank:
                        raise torch.OutOfMemoryError(f"rank {rank_info.rank}:\n no memory is left")
                found.append("")
            except InputError as error:
                found.append(str(error))
    parallel.leave()
    return found


def test_an_error_of_one_rank_is_raised_on_every_rank(pool):
    """On one line, in place of leaving the other ranks waiting; and what follows is in step again."""
    assert pool.run(3, fail_on_two_ranks) == [["", "rank 1: no memory is left", ""]] * 3
