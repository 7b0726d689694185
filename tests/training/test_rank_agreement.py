"""Ranks on machines that see other data, or another checkpoint.dir, are refused before anything is trained."""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from megatron_align.config import ParallelConfig
from megatron_align.errors import InputError
from megatron_align.model import parallel
from megatron_align.training import resume
from megatron_align.training.resume import ResumePoint, verified_resume_point
from megatron_align.training.watchdog import join_watched
from tests.harness import training_ranks
from tests.harness.tiny import run_arguments, write_chat


def refused(rank_info, arguments):
    """In a process of the pool: each rank is the first of its machine, and has arguments of its own."""
    return training_ranks.train_to_the_refusal(replace(rank_info, local_rank=0), arguments[rank_info.rank])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_machines_with_other_data_are_refused(pool, tiny_models, chat_file, tmp_path, split):
    other = write_chat(tmp_path / "other.jsonl", samples=16, seed=5)
    arguments = []
    for rank in range(2):
        data = {"train": chat_file, "validation": chat_file, **({split: other} if rank else {})}
        options = {"data__validation": data["validation"], "data__cache": tmp_path / "cache"}
        arguments.append(run_arguments(tiny_models(), data["train"], tmp_path / "run", **options))
    [line] = set(pool.run(2, refused, arguments, timeout=60))
    assert line.startswith(f"the data must be the same for all ranks: data.{split} is ")


def refused_resume(rank_info, steps):
    """In a process of the pool: each rank finds the checkpoint of a step of its own; None: it finds none."""
    step = steps[rank_info.rank]
    point = None if step is None else ResumePoint(step, Path("absent"))
    with (
        join_watched(rank_info, ParallelConfig()).watching(),
        mock.patch.object(resume, "find_resume_point", return_value=point),
    ):
        try:
            verified_resume_point(None, Path("run"), None, "key", Path("assets"), 5)
            line = "none"
        except InputError as error:
            line = str(error)
    parallel.leave()
    return line


@pytest.mark.parametrize("steps", [(4, None), (None, 4), (4, 2)])
def test_machines_that_see_other_checkpoints_are_refused(pool, steps):
    [line] = set(pool.run(2, refused_resume, steps, timeout=60))
    facts = f"the newest step is {steps[0]} on rank 0 and {steps[1]} on rank 1"
    assert line == f"checkpoint.dir must be the same for all ranks: {facts}"
