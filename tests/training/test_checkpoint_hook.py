"""Checkpoints while training goes on: an update waits for the copy, what is told of them, and a save that failed is
tried again before the next is due.
"""

import os
import threading
import time
from unittest import mock

import pytest

from megatron_align.checkpoint.folder import list_steps
from megatron_align.checkpoint.host_optimizer_state import HostOptimizerState
from megatron_align.checkpoint.saver import Saver
from megatron_align.faults import VARIABLE
from megatron_align.objectives.configuration import parse
from megatron_align.storage.checksums import read_checksums
from megatron_align.training import checkpoint_hook
from megatron_align.training.loop import run
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments


def train_impatiently(rank_info, arguments, fault):
    """In a process of the pool: run into a fault, and try again after the next step."""
    before, checkpoint_hook.RETRY_SECONDS = checkpoint_hook.RETRY_SECONDS, 0.0
    os.environ[VARIABLE] = fault
    try:
        return run(parse(arguments), rank_info)
    finally:
        checkpoint_hook.RETRY_SECONDS = before
        del os.environ[VARIABLE]


def test_a_save_that_failed_is_tried_again_soon(pool, tiny_models, chat_file, tmp_path):
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9, "checkpoint__async_save": False}
    arguments = run_arguments(tiny_models(), chat_file, tmp_path, **options)
    assert pool.run(2, train_impatiently, arguments, "full@save.written:2") == [True, True]
    assert [step for step, _ in list_steps(tmp_path)] == [3, 4, 5]


def test_every_save_is_told_once(pool, tiny_models, chat_file, tmp_path):
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9}
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, tmp_path, **options))
    rows = metrics_of(tmp_path, "save")
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert 0 < row["save_pause_seconds"] <= row["save_seconds"]
        folder = tmp_path / f"step_{row['step']:06d}"
        assert row["save_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


LATE = 0.5  # seconds


class _Asked:
    """A future that notes in an event when its result is waited for."""

    def __init__(self, future, asked):
        self.future, self.asked, self.done = future, asked, future.done

    def result(self):
        self.asked.set()
        return self.future.result()


def train_with_late_copies(rank_info, arguments):
    """In a process of the pool: what a save holds is copied LATE seconds after somebody began to wait for it."""
    asked = threading.Event()
    copy_state, begin = HostOptimizerState.copy, Saver.begin

    def copy_late(self):
        assert asked.wait(60), "nobody waits for the copy"
        time.sleep(LATE)
        copy_state(self)

    def begin_asked(self, *arguments):
        asked.clear()
        begin(self, *arguments)
        pending = self._pending
        pending.copied, pending.written = _Asked(pending.copied, asked), _Asked(pending.written, asked)

    with (
        mock.patch.object(HostOptimizerState, "copy", copy_late),
        mock.patch.object(Saver, "begin", begin_asked),
    ):
        return run(parse(arguments), rank_info)


def state_files(run_folder):
    """Return the hash of every file with tensors, by step and name."""
    return {
        (step, name): digest
        for step, folder in list_steps(run_folder)
        for name, digest in read_checksums(folder).items()
        if name.endswith(".distcp")
    }


@pytest.mark.parametrize("world", mark_slow([1, 2], [1]))
def test_an_update_waits_for_the_copy(pool, tiny_models, chat_file, tmp_path, world):
    options = {"checkpoint__save_every": 1, "checkpoint__keep": 9, "train__steps": 3}
    for name, train, background in (
        ("late", train_with_late_copies, True),
        ("at_once", training_ranks.train, False),
    ):
        settings = {**options, "checkpoint__async_save": background}
        pool.run(world, train, run_arguments(tiny_models(), chat_file, tmp_path / name, **settings))
    files = state_files(tmp_path / "late")
    assert {step for step, _ in files} == {1, 2, 3}
    assert files == state_files(tmp_path / "at_once")
    rows = metrics_of(tmp_path / "late", "save")
    assert all(row["save_pause_seconds"] >= LATE for row in rows)  # waiting is the save's time


WAIT = 1e6  # seconds of a clock that the wait moves on


def train_waiting_for_long(rank_info, arguments):
    """In a process of the pool: every update waits WAIT seconds for a save."""
    waits, real = [], time.perf_counter

    def clock():
        return real() + WAIT * len(waits)

    def wait(hook):
        waits.append(hook)

    with (
        mock.patch.object(time, "perf_counter", clock),
        mock.patch.object(checkpoint_hook.Checkpointing, "before_update", wait),
    ):
        return run(parse(arguments), rank_info)


def test_waiting_for_a_save_is_no_part_of_the_step(pool, tiny_models, chat_file, tmp_path):
    pool.run(1, train_waiting_for_long, run_arguments(tiny_models(), chat_file, tmp_path, train__steps=1))
    [row] = metrics_of(tmp_path)
    assert 0 < row["step_seconds"] < WAIT
