"""Training runs with bad numbers or too little memory: functions of ``(rank_info, ...)`` for the pool."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from unittest import mock

import torch

from megatron_align.errors import TrainingFault
from megatron_align.model import parallel
from megatron_align.monitoring.memory import OutOfMemory
from megatron_align.objectives.sft import SFT
from megatron_align.training.step import Stepper
from tests.harness import training_ranks
from tests.harness.tiny import byte_tokenizer, change_tensors, make_model, write_chat

MARK = "z"  # occurs in no sum: only bad samples contain it


def make_sick_model(folder: Path) -> Path:
    """Save a tiny model whose log-probs are NaN after MARK."""
    make_model(folder, "qwen2_untied")
    [token] = byte_tokenizer().encode(MARK)

    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][token] = torch.nan

    change_tensors(folder, poison)
    return folder


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
    seen, train = [], Stepper.train

    def watched(self, batches, *hooks):
        before = _digest(self)
        result = train(self, batches, *hooks)
        seen.append((result.updated, _digest(self) != before))
        return result

    with mock.patch.object(Stepper, "train", watched):
        training_ranks.train(rank_info, arguments)
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
        training_ranks.train(rank_info, arguments)
    except TrainingFault as fault:
        parallel.leave()
        return str(fault)
    return "none"


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
