"""Training runs with bad numbers or too little memory: functions of ``(rank_info, ...)`` for the pool."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding

from megatron_align.errors import TrainingFault
from megatron_align.model import parallel
from megatron_align.monitoring.memory import OutOfMemory
from megatron_align.objectives.sft import SFT
from megatron_align.training.step import Stepper
from tests.harness import training_ranks
from tests.harness.tiny import byte_tokenizer, write_chat

MARK = "z"  # occurs in no sum: only bad samples contain it


@contextmanager
def nan_after_mark() -> Iterator[None]:
    """Make all hidden states NaN after MARK, with finite weights."""
    [token] = byte_tokenizer().encode(MARK)
    embed = VocabParallelEmbedding.forward

    def poisoned(self: VocabParallelEmbedding, tokens: torch.Tensor) -> torch.Tensor:
        rows, row = self.weight.data, token - self.vocab_start_index
        if not 0 <= row < len(rows):
            return embed(self, tokens)
        before = rows[row].clone()
        rows[row] = torch.nan
        hidden = embed(self, tokens)
        rows[row] = before
        return hidden

    with mock.patch.object(VocabParallelEmbedding, "forward", poisoned):
        yield


def train(rank_info: parallel.RankInfo, arguments: list[str]) -> None:
    """Train with hidden states that are NaN after MARK."""
    with nan_after_mark():
        training_ranks.train(rank_info, arguments)


def write_sick_chat(file: Path, *sick: int, in_answer: bool = False) -> Path:
    """Write the usual sums, with MARK in the question (or the answer) of the given samples."""
    write_chat(file)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for sample in sick:
        records[sample]["messages"][int(in_answer)]["content"] += MARK
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def train_watched(rank_info: parallel.RankInfo, arguments: list[str]) -> list[tuple[bool, bool]]:
    """Train; return for each step whether it updated the weights, and whether any bit of the state changed."""
    seen, step = [], Stepper.train

    def watched(self, batches, *hooks):
        before = _digest(self)
        result = step(self, batches, *hooks)
        seen.append((result.updated, _digest(self) != before))
        return result

    with mock.patch.object(Stepper, "train", watched):
        train(rank_info, arguments)
    return seen


def _digest(stepper: Stepper) -> bytes:
    """Hash weights, fp32 masters, both moments and the step counts."""
    optimizer = stepper.optimizer
    tensors = [parameter for chunk in stepper.model for parameter in chunk.parameters()]
    for group in optimizer.param_groups:
        for master in group["params"]:
            tensors += [master, *optimizer.optimizer.state[master].values()]
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def train_with_sick_loss(rank_info: parallel.RankInfo, arguments: list[str], what: str) -> None:
    """Train with a bad loss where MARK is a target: its ``gradient`` is NaN, or its ``value`` ten times as large."""
    [token] = byte_tokenizer().encode(MARK)
    whole = SFT.loss

    def loss(self, logprobs_N, rows, statistics):
        value, sums = whole(self, logprobs_N, rows, statistics)
        if (rows.target_N == token).any():
            value = value * 10 if what == "value" else value + (0 * logprobs_N.sum()).abs().sqrt()
        return value, sums

    with mock.patch.object(SFT, "loss", loss):
        training_ranks.train(rank_info, arguments)


def train_to_the_fault(rank_info: parallel.RankInfo, arguments: list[str]) -> str:
    """Train; return the reason why training stopped."""
    try:
        train(rank_info, arguments)
    except TrainingFault as fault:
        parallel.leave()
        return str(fault)
    return "none"


def train_with_bad_weights(rank_info: parallel.RankInfo, arguments: list[str], name: str, step: int) -> str:
    """Train; after the update of ``step`` a parameter holds one NaN. Return the reason why training stopped."""
    update = Stepper.train

    def spoiling(self, batches, *hooks):
        result = update(self, batches, *hooks)
        for chunk in self.model:
            for own, parameter in chunk.module.global_parameters().items():
                if own == name and next(steps) == step:
                    parameter.data.view(-1)[3] = torch.nan
        return result

    steps = iter(range(1, 9))
    with mock.patch.object(Stepper, "train", spoiling):
        return train_to_the_fault(rank_info, arguments)


def train_out_of_memory(rank_info: parallel.RankInfo, arguments: list[str]) -> str:
    """Train until the second step runs out of memory; return the error message."""
    train, steps = Stepper.train, iter(range(9))

    def greedy(self, batches, *hooks):
        if next(steps) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 is full.")
        return train(self, batches, *hooks)

    try:
        with mock.patch.object(Stepper, "train", greedy):
            training_ranks.train(rank_info, arguments)
    except OutOfMemory as error:
        parallel.leave()
        return str(error)
    return "none"
