"""Score completions under a model, forward only, and gather a step's scores over all ranks.

Shapes: C completions of one pack, S completions of a step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_align.data.batching.step_batches import Packs, Step
from megatron_align.model import cpu
from megatron_align.model.head import RowScore
from megatron_align.model.lora import adapters_off
from megatron_align.model.parallel import is_metric_rank
from megatron_align.model.transfer import to_device
from megatron_align.objectives.base import Objective, completion_sums
from megatron_align.records import LossRows, PackedBatch
from megatron_align.training.pipeline import run_schedule

Result = TypeVar("Result")


class Scorer:
    """Sums log-probs over completions under a model, forward only.

    Args:
        chunks: this rank's.
        objective: which log-probs are summed, and how they are weighted.
        base: score with the base of a model that has an adapter, as its reference.
        row_score: of a language model collect ``[2, N]``: log-probs, and likeliest: 1 where no token is likelier, or
            entropy: that of each row.
        top_k: of a language model collect ``[2, N, K]``: the K likeliest tokens of each row, and their logits.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        objective: Objective,
        *,
        base: bool = False,
        row_score: RowScore | None = None,
        top_k: int = 0,
    ):
        self.chunks, self.objective, self.base = list(chunks), objective, base
        self.row_score, self.top_k = row_score, top_k

    def sums(self, batches: Sequence[PackedBatch], *, training: bool = False) -> list[Tensor]:
        """Return ``[C]`` of each batch on the last pipeline stage, nothing on the others."""
        return self.collect(
            batches,
            lambda logprobs_N, rows: completion_sums(self.objective.weighted(logprobs_N, rows), rows),
            training=training,
        )

    @torch.no_grad()
    def collect(
        self,
        batches: Sequence[PackedBatch],
        of_pack: Callable[[Tensor, LossRows], Result],
        *,
        training: bool = False,
    ) -> list[Result]:
        """Return ``of_pack(log-probs or rewards, rows)`` of each batch on the last stage, nothing on the others.

        Args:
            batches: packs.
            of_pack: called with the values of a pack.
            training: drop what the training on these packs drops.
        """
        for chunk in self.chunks:
            chunk.train(training)
        with adapters_off(self.chunks) if self.base else nullcontext():
            return run_schedule(
                self.chunks,
                batches,
                partial(self._forward, of_pack),
                forward_only=True,
                collect_non_loss_data=True,
            )

    def _forward(
        self,
        of_pack: Callable[[Tensor, LossRows], Any],
        batches: Iterator[tuple[int, PackedBatch]],
        model: nn.Module,
        *_: Any,
    ) -> tuple[Tensor, Any]:
        batch = next(batches)[1]
        output = model(batch, row_score=self.row_score, top_k=self.top_k)
        return output, lambda values, non_loss_data: of_pack(values, batch.rows)


def mismatched_sums(scorer: Scorer, step: Step, groups: ProcessGroupCollection) -> Tensor:
    """Score the step's prompts with other samples' completions, ``[S]`` as :func:`gather_step`. Collective."""
    assert step.mismatched is not None, "the objective needs mismatched_logprobs"
    return gather_step(scorer.sums(step.mismatched.batches), step.mismatched, step, groups)


def gather_step(
    of_packs: Sequence[Tensor], packs: Packs, step: Step, groups: ProcessGroupCollection
) -> Tensor:
    """Gather the packs' values ``[C]`` of all ranks in the step's order: ``[S]`` fp64 on the host of every rank.

    Collective. ``of_packs`` is empty on pipeline stages that have no values.
    """
    [values_S] = gather_columns([of_packs], packs, step, groups)
    return values_S


def gather_columns(
    columns: Sequence[Sequence[Tensor]], packs: Packs, step: Step, groups: ProcessGroupCollection
) -> tuple[Tensor, ...]:
    """Gather several columns of the packs as :func:`gather_step`, with one wait for the device. Collective."""
    return _gather(columns, packs.completions, len(step.stored_C), groups)


def step_logprobs(scorer: Scorer, step: Step, length_S: np.ndarray, groups: ProcessGroupCollection) -> Tensor:
    """Score every token of a step's completions: ``[N]`` fp64 on the host of every rank, in the step's order.

    Collective.

    Args:
        scorer: of the model.
        step: whose prompts are not scored.
        length_S: scored tokens of each of the step's completions.
        groups: of this rank.
    """
    starts_S = np.cumsum(length_S) - length_S
    places = [
        np.concatenate([np.empty(0, np.int64), *(starts_S[s] + np.arange(length_S[s]) for s in completions)])
        for completions in step.packs.completions
    ]
    of_packs = scorer.collect(step.batches, lambda logprobs_N, rows: logprobs_N)
    return _gather([of_packs], places, int(length_S.sum()), groups)[0]


def gather_tokens(of_packs: Sequence[Tensor], groups: ProcessGroupCollection) -> Tensor:
    """Gather the packs' values ``[N]`` of all ranks, rank after rank: fp64 on the host of every rank. Collective.

    ``of_packs`` is empty on pipeline stages that have no values.
    """
    own = torch.cat([torch.zeros(0, dtype=torch.float64), *(pack.cpu().double() for pack in of_packs)])
    if not is_metric_rank(groups):
        own = own[:0]  # another rank has the same
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=cpu.device())
    counts[dist.get_rank()] = len(own)
    dist.all_reduce(counts)
    before, total = int(counts[: dist.get_rank()].sum()), int(counts.sum())
    return _gather([[own]], [before + np.arange(len(own))], total, groups)[0]


def _gather(
    columns: Sequence[Sequence[Tensor]],
    places: Sequence[np.ndarray],
    count: int,
    groups: ProcessGroupCollection,
) -> tuple[Tensor, ...]:
    """Return for each column the packs' values of all ranks in one tensor of ``count``, each at its place."""
    values = torch.zeros(len(columns), count, dtype=torch.float64, device=cpu.device())
    if is_metric_rank(groups):
        for of_column, of_packs in zip(values, columns, strict=True):
            for of_pack, at in zip(of_packs, places, strict=bool(of_packs)):
                place = to_device(torch.from_numpy(at), values.device)
                of_column[place] = to_device(of_pack, values.device).to(torch.float64)
    dist.all_reduce(values)
    return values.cpu().unbind()
