"""Checkpoints while training goes on: what is told of them, and a save that failed is tried again before the next is
due.
"""

import os

from megatron_align.checkpoint.sharded import list_steps
from megatron_align.config import parse
from megatron_align.faults import VARIABLE
from megatron_align.training import saves
from megatron_align.training.loop import run
from tests.harness import ranks
from tests.harness.tiny import metrics_of, run_arguments


def train_impatiently(place, arguments, fault):
    """In a process of the pool: run into a fault, and try again after the next step."""
    before, saves.RETRY_SECONDS = saves.RETRY_SECONDS, 0.0
    os.environ[VARIABLE] = fault
    try:
        return run(parse(arguments), place)
    finally:
        saves.RETRY_SECONDS = before
        del os.environ[VARIABLE]


def test_a_save_that_failed_is_tried_again_soon(pool, tiny_models, chat_file, tmp_path):
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9, "checkpoint__async_save": False}
    arguments = run_arguments(tiny_models(), chat_file, tmp_path, **options)
    assert pool.run(2, train_impatiently, arguments, "full@save.written:2") == [True, True]
    assert [step for step, _ in list_steps(tmp_path)] == [3, 4, 5]


def test_every_save_is_told_once(pool, tiny_models, chat_file, tmp_path):
    options = {"checkpoint__save_every": 2, "checkpoint__keep": 9}
    pool.run(2, ranks.train, run_arguments(tiny_models(), chat_file, tmp_path, **options))
    rows = metrics_of(tmp_path, "save")
    assert [row["step"] for row in rows] == [2, 4, 5]
    for row in rows:
        assert 0 < row["save_pause_seconds"] <= row["save_seconds"]
        folder = tmp_path / f"step_{row['step']:06d}"
        assert row["save_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
