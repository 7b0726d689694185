"""A rank that keeps the others waiting, or dies, is named once, and every rank ends."""

import os
import signal

import pytest
import torch.distributed as dist

from megatron_align.config import ParallelConfig
from megatron_align.model.parallel import PATIENCE, RankInfo, all_reduce_sum
from megatron_align.training import watchdog as module
from megatron_align.training.watchdog import AlreadyReported, RankLost, Watchdog, join_watched
from tests.harness.processes import run_ranks
from tests.harness.training_ranks import stall


def stall_on_rank_1(rank_info):
    stall(rank_info, late=1, timeout=4)


def die_on_rank_1(rank_info):
    try:
        with join_watched(rank_info, ParallelConfig()).watching() as watchdog:
            watchdog.report("step 1")
            all_reduce_sum([1.0])
            watchdog.report("step 2")
            if rank_info.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            all_reduce_sum([1.0])
    except (RankLost, AlreadyReported) as error:
        print(type(error).__name__, error, flush=True)
        os._exit(1)


def test_a_stalled_rank_is_named_once_and_everyone_ends(tmp_path):
    outputs = run_ranks(stall_on_rank_1, range(3), 3, tmp_path)
    said = "".join(err for _, err, _ in outputs)
    assert said.count("error:") == 1, said
    assert "no progress for 4 s: rank 1 is still in 'step 1' while others wait in 'step 2'" in said
    assert all(code != 0 for *_, code in outputs)


def test_a_killed_rank_is_reported_once(tmp_path):
    outputs = run_ranks(die_on_rank_1, range(3), 3, tmp_path)
    said = sorted(out.split(" ", 1)[0] for rank, (out, _, _) in enumerate(outputs) if rank != 1)
    assert said == ["AlreadyReported", "RankLost"], outputs
    [line] = [out for out, _, _ in outputs if out.startswith("RankLost")]
    assert "another rank died while rank" in line
    assert "was in 'step 2'" in line


LIMIT = 4.0  # seconds of a clock that only the test moves


class _Clock:
    """Time, and the watching thread's pauses: each makes the next move of a list, ``(seconds, call)``."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.moves: list = []
        self.ended: float | None = None
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        rank_info = RankInfo(rank=0, local_rank=0, world_size=1)
        self.watchdog = Watchdog(dist.HashStore(), rank_info, LIMIT)
        monkeypatch.setattr(self.watchdog, "_stop", self)
        monkeypatch.setattr(self.watchdog, "_end", self._end)

    def wait(self, pause):
        if self.ended is not None or not self.moves:
            return True
        seconds, call = self.moves.pop(0)
        self.now += seconds
        call(self.watchdog)
        return False

    def _end(self):
        self.ended = self.now

    def ended_after(self, *moves):
        """Return when the run is ended while these moves are made; None: it goes on."""
        self.moves = list(moves)
        self.watchdog._watch()
        return self.ended


def nothing(_):
    """A rank that gives no sign of life."""


SIGNS = {
    "report": lambda watchdog: watchdog.report("step 2"),
    "detail": lambda watchdog: watchdog.detail("micro-batch 2 of 8"),
}


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS)
def test_a_slow_rank_that_gives_signs_of_life_goes_on(monkeypatch, sign):
    """Each sign begins the time anew, and only its end ends the run."""
    clock = _Clock(monkeypatch)
    assert clock.ended_after(*[(0.75 * LIMIT, sign)] * 3, (0.75 * LIMIT, nothing)) is None
    assert clock.ended_after((0.5 * LIMIT, nothing)) == 3.5 * LIMIT


def test_long_work_is_allowed_its_own_time_and_no_more(monkeypatch):
    clock = _Clock(monkeypatch)
    with clock.watchdog.patient("loading weights"):
        assert clock.ended_after((0.9 * PATIENCE * LIMIT, nothing)) is None
    assert clock.ended_after((0.9 * LIMIT, nothing)) is None  # the next work has its time from here on
    assert clock.ended_after((0.2 * LIMIT, nothing)) == pytest.approx((0.9 * PATIENCE + 1.1) * LIMIT)
    clock = _Clock(monkeypatch)
    with clock.watchdog.patient("loading weights"):
        assert clock.ended_after((1.1 * PATIENCE * LIMIT, nothing)) is not None
