"""Measuring moves no number: timings say who is waited for, a trace opens, and a full GPU is told in one line."""

import gzip
import json
import time
from unittest import mock

import pytest

from megatron_align.data.batching.prefetch import Prefetcher
from megatron_align.monitoring.memory import needs_less
from megatron_align.monitoring.timing import PHASES, StepClock
from megatron_align.objectives.configuration import parse
from tests.harness import sick, training_ranks
from tests.harness.tiny import metrics_of, run_arguments

LATE = 1.5  # seconds, several times what a step of the tiny model takes, also on a busy machine


def train_with_a_late_rank(rank_info, arguments, late):
    """Train while a rank's data come late at every step."""
    make = Prefetcher.__next__

    def slow(self):
        if rank_info.rank == late:
            time.sleep(LATE)
        return make(self)

    with mock.patch.object(Prefetcher, "__next__", slow):
        training_ranks.train(rank_info, arguments)


def test_the_straggler_is_named_and_no_number_moves(pool, tiny_models, chat_file, tmp_path):
    plain, timed = tmp_path / "plain", tmp_path / "timed"
    options = {"train__steps": 4, "logging__profile_steps": "[2, 3]", "logging__timing_every": 2}
    pool.run(2, training_ranks.train, run_arguments(tiny_models(), chat_file, plain, train__steps=4))
    pool.run(2, train_with_a_late_rank, run_arguments(tiny_models(), chat_file, timed, **options), 1)
    untimed = [
        [{k: v for k, v in row.items() if "second" not in k} for row in metrics_of(folder)]
        for folder in (plain, timed)
    ]
    assert untimed[0] == untimed[1]
    timings = metrics_of(timed, "timing")
    assert [row["step"] for row in timings] == [2, 4]
    for row in timings:
        assert row["straggler_rank"] == 1
        assert row["straggler_seconds"] > LATE / 2  # rank 0 has waited for it
        assert row["data_seconds_max"] >= LATE > 2 * row["data_seconds"] - row["data_seconds_max"]
        assert all(0 <= row[f"{phase}_seconds"] <= row[f"{phase}_seconds_max"] for phase in PHASES)
    assert metrics_of(plain, "timing") == []

    for rank in range(2):
        with gzip.open(timed / "profile" / f"rank_{rank:05d}.json.gz") as file:
            names = {event.get("name") for event in json.load(file)["traceEvents"]}
        assert {"aten::mm", "aten::embedding"} & names  # the model's own work is in it


def test_a_clock_that_is_not_asked_measures_nothing():
    clock = StepClock()
    clock.start(measuring=False)
    clock.mark("data")
    assert (clock.running, clock.seconds) == (False, dict.fromkeys(PHASES, 0.0))


def test_out_of_memory_says_where_and_what_needs_less(pool, tiny_models, chat_file, tmp_path):
    [said] = pool.run(1, sick.train_out_of_memory, run_arguments(tiny_models(), chat_file, tmp_path / "run"))
    assert said == (
        "rank 0 is out of memory in 'step 2': Tried to allocate 7.00 GiB. GPU 0 is full. To use less memory: "
        "train.recompute_layers: 1 (activations are recomputed, about a third more time); or "
        "data.sequence_length below 256 (the length of a pack); or parallel.tensor above 1 or parallel.pipeline "
        "above 1; or train.precision: bf16"
    )


def test_advice_is_what_the_run_does_not_do_yet():
    run = ["--model.path", "m", "--data.train", "d", "--checkpoint.dir", "c", "--train.steps", "1"]
    saving = parse([*run, "--train.recompute_layers", "1"])
    assert [advice.split()[0] for advice in needs_less(saving)] == ["data.sequence_length", "parallel.tensor"]
    wasteful = parse(
        [
            *run,
            "--objective.name=dpo",
            "--reference.mode=live",
            "--parallel.tensor=2",
            "--parallel.sequence=false",
        ]
    )
    assert [advice.split()[0] for advice in needs_less(wasteful)[:2]] == [
        "reference.mode:",
        "parallel.sequence:",
    ]


@pytest.mark.parametrize("steps", ["[0, 2]", "[3, 2]"])
def test_steps_to_profile_are_steps(steps):
    from megatron_align.errors import InputError

    run = ["--model.path", "m", "--data.train", "d", "--checkpoint.dir", "c", "--train.steps", "5"]
    with pytest.raises(InputError, match="logging.profile_steps must be a first and a last step"):
        parse([*run, "--logging.profile_steps", steps])
