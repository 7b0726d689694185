"""The heads: scored rows of hidden states to log-probs, or straight to the loss; last tokens to rewards.

Shapes: T tokens of the pack (T / TP on each rank under sequence parallel), N scored rows, H hidden, M rows that each
tensor-parallel rank sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.kernels import slab_loss, slab_rows, token_logprobs
from megatron_align.model import cpu
from megatron_align.records import LossRows


class PackLoss(NamedTuple):
    """A pack's share of the step's loss, its gradients already made, and its metric sums."""

    loss: Tensor
    sums: dict[str, Tensor]


class RowObjective(Protocol):
    """What the head needs of an objective (``training.objective`` has the whole of it)."""

    whole_samples: bool
    statistics: bool

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return these rows' share of the loss and their metric sums."""
        ...


class VocabularyHead(ColumnParallelLinear):
    """megatron-core's output layer, whose forward is the log-prob engine.

    As a module of its own it is where megatron-core's hooks wait for a weight that is still being gathered. With
    ``main_grad`` the weight's gradient is added there in forward, before the backward that follows.
    """

    def forward(
        self,
        hidden: Tensor,
        rows: LossRows,
        objective: RowObjective | None,
        *,
        weight: Tensor,
        vocab_size: int,
        unit_rows: bool = False,
    ) -> Tensor | PackLoss:
        """Return ``logprobs_N`` fp32 of the scored rows, or with an objective the pack's loss.

        Args:
            hidden: ``[T or T / TP, 1, H]``.
            rows: what is scored.
            objective: what is made of the log-probs, slab by slab.
            weight: this module's own, or the embedding's where they are tied on this rank.
            vocab_size: without padding.
            unit_rows: the weight's rows count at unit length. Done here, where the weight is known to be gathered.
        """
        if unit_rows:
            weight = F.normalize(weight)
        hidden_NH = self._scored(hidden, rows)
        # Under sequence parallel the gradient is summed over ranks while it is scattered.
        options = {
            "group": self.tp_group,
            "vocab_size": vocab_size,
            "sum_hidden_grad": not self.sequence_parallel,
        }
        whole_samples = objective is None or objective.whole_samples
        slabs = rows.slabs(slab_rows(weight), whole_samples=whole_samples) or [rows]
        stops = np.cumsum([slab.row_N.shape[0] for slab in slabs]).tolist()
        ranges = list(zip([0, *stops[:-1]], stops, strict=True))
        if objective is None:
            # Cut as a loss of whole samples is: the same products, so the same numbers bit by bit.
            parts = [token_logprobs(hidden_NH[a:b], weight, rows.target_N[a:b], **options) for a, b in ranges]
            return torch.cat(parts)

        def loss(
            i: int, logprobs_n: Tensor, statistics: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return objective.loss(logprobs_n, slabs[i], statistics)

        value, sums = slab_loss(
            hidden_NH, weight, rows.target_N, ranges, loss, statistics=objective.statistics, **options
        )
        return PackLoss(value, sums)

    def _scored(self, hidden: Tensor, rows: LossRows) -> Tensor:
        """Return ``[N, H]``: under sequence parallel gathered, the scored rows alone where that moves less."""
        hidden = hidden.squeeze(1)
        row_N = rows.row_N
        if self.sequence_parallel:
            picked = pick_rows(rows.rows_on_host(), hidden.shape[0], self.tp_group.size())
            if picked is not None:
                own_M, row_N = (
                    torch.from_numpy(places).to(hidden.device, non_blocking=True)
                    for places in (picked.own_RM[self.tp_group.rank()], picked.place_N)
                )
                hidden = hidden[own_M]
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden[row_N]


class RewardHead(nn.Module):
    """A scalar on the last token of each completion; every tensor-parallel rank holds the whole weight ``[1, H]``."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        self.weight = nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype, device=cpu.device())
        )

    def forward(
        self,
        hidden: Tensor,
        rows: LossRows,
        objective: RowObjective | None,
        group: dist.ProcessGroup,
    ) -> Tensor | PackLoss:
        """Return ``rewards_C`` fp32 of the pack's completions, or with an objective the pack's loss.

        Args:
            hidden: ``[T or T / TP, 1, H]``.
            rows: whose completions.
            objective: what is made of the rewards.
            group: tensor-parallel ranks.
        """
        if self.sequence_parallel:
            # Every rank then computes the whole loss: its gradient is complete, and only to be split again.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=group
            )
        last_CH = hidden.squeeze(1)[rows.completions.last_C]
        rewards_C = (last_CH.float() @ self.weight.float().T)[:, 0]
        return rewards_C if objective is None else PackLoss(*objective.loss(rewards_C, rows, {}))

    def initialise(self, deviation: float, seed: int) -> None:
        """Draw the weight from a normal distribution, the same on every layout."""
        draw = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=draw) * deviation)


class Picked(NamedTuple):
    """Which of its rows each rank sends, and where the scored rows stand in what all receive. int64."""

    own_RM: np.ndarray
    place_N: np.ndarray


def pick_rows(row_N: np.ndarray, tokens: int, ranks: int) -> Picked | None:
    """Choose the scored rows of each rank, as many from all; None: whole shards are no more.

    Args:
        row_N: the scored rows of the pack, some perhaps more than once (the last token of a shared prompt).
        tokens: rows that each rank holds, one rank after the other.
        ranks: R.
    """
    rows, place_N = np.unique(row_N, return_inverse=True)
    owner = rows // tokens
    counts = np.bincount(owner, minlength=ranks)
    most = max(1, int(counts.max()))
    if most >= tokens:
        return None
    within = np.arange(len(rows)) - (counts.cumsum() - counts)[owner]
    own_RM = np.zeros(
        (ranks, most), np.int64
    )  # a rank with fewer sends its first row again, and nobody looks
    own_RM[owner, within] = rows % tokens
    return Picked(own_RM, (owner * most + within)[place_N.reshape(-1)])
