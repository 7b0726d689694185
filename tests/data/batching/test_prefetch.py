"""Steps come in order, prefetched up to the depth; an error is raised by the next() of its step; no thread
outlives the Prefetcher."""

import threading
import time
import traceback

import pytest

from megatron_align.data.batching.prefetch import Prefetcher


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.001)
    return condition()


def test_steps_come_in_order_from_another_thread():
    with Prefetcher(range(5), lambda step: (step, threading.get_ident())) as ahead:
        got = list(ahead)
    assert [step for step, _ in got] == [0, 1, 2, 3, 4]
    assert len({thread for _, thread in got} | {threading.get_ident()}) == 2


@pytest.mark.parametrize("depth", [1, 3])
def test_so_many_are_made_ahead_and_no_more(depth):
    made = []
    with Prefetcher(range(100), made.append, depth) as ahead:
        for asked in range(1, 6):
            next(ahead)
            assert until(lambda: len(made) == asked + depth)  # noqa: B023 - called at once
            time.sleep(0.01)
            assert len(made) == asked + depth


def test_what_fails_is_raised_where_its_step_is_asked_for():
    def fails_at_2(step):
        if step == 2:
            raise OSError("the disk is gone")
        return step

    ahead = Prefetcher(range(5), fails_at_2)
    assert [next(ahead), next(ahead)] == [0, 1]
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(ahead)
    assert "fails_at_2" in {frame.name for frame in traceback.extract_tb(caught.value.__traceback__)}
    with pytest.raises(StopIteration):
        next(ahead)


def test_leaving_early_ends_the_thread():
    made = []

    def leave_early():
        with Prefetcher(range(1000), made.append) as ahead:
            next(ahead)
            raise KeyError

    with pytest.raises(KeyError):
        leave_early()
    assert len(made) <= 3


def test_no_steps():
    with Prefetcher([], lambda step: step) as ahead:
        assert list(ahead) == []
    with pytest.raises(ValueError, match="depth"):
        Prefetcher([1], lambda step: step, depth=0)
