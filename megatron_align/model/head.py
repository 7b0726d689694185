"""The heads: scored rows of hidden states to log-probs, or straight to the loss; last tokens to rewards.

Shapes: Q tokens of this context-parallel rank (Q / TP on each rank under sequence parallel), N scored rows of the pack,
n of them on this context-parallel rank, H hidden, M rows that each tensor-parallel rank sends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.kernels import RECOMPUTED, slab_loss, slab_rows, token_logprobs
from megatron_align.model import cpu
from megatron_align.model.context import SpreadSlabs, from_all_ranks
from megatron_align.model.families import ModelShape, padded_vocab
from megatron_align.records import LossRows, PackedBatch


class PackLoss(NamedTuple):
    """A pack's share of the step's loss, its gradients already made, and its metric sums."""

    loss: Tensor
    sums: dict[str, Tensor]


class RowObjective(Protocol):
    """What the head needs of an objective (``objectives.base.Objective`` is the full class)."""

    whole_samples: bool
    row_statistics: bool

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return these rows' share of the loss and their metric sums."""
        ...


class VocabularyHead(ColumnParallelLinear):
    """megatron-core's output layer, whose forward is the log-prob engine.

    As a module of its own it is where megatron-core's hooks wait for a weight that is still being gathered. With
    ``main_grad`` the weight's gradient is added there in forward, before the backward that follows.

    Args:
        config: megatron-core's.
        shape: of the model.
        groups: the ranks; every context-parallel one gets the whole answer.
        tied: the weight is the embedding's, which this rank holds too: none is made here.
    """

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, groups: ProcessGroupCollection, *, tied: bool
    ):
        super().__init__(
            config.hidden_size,
            padded_vocab(shape.vocab_size, config.tensor_model_parallel_size),
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=tied,
            tp_group=groups.tp,
        )
        self.vocab_size, self.unit_rows, self.context = shape.vocab_size, shape.norm_head, groups.cp

    def forward(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        objective: RowObjective | None,
        *,
        weight: Tensor,
    ) -> Tensor | PackLoss:
        """Return ``logprobs_N`` fp32 of the scored rows, or with an objective the pack's loss.

        Args:
            hidden: ``[Q or Q / TP, 1, H]``.
            batch: the pack, with what is scored.
            objective: what is made of the log-probs, slab by slab.
            weight: this module's own, or the embedding's where they are tied on this rank.
        """
        if self.unit_rows:  # done here, where the weight is known to be gathered
            weight = F.normalize(weight)
        rows, part = batch.rows, batch.part
        if part is None:
            hidden_nH, target_n = self._scored(hidden, rows.row_N, rows.rows_on_host()), rows.target_N
        else:
            hidden_nH = self._scored(hidden, part.rows.row_n, part.rows.host_row_n)
            target_n = rows.target_N[part.rows.number_n]
        # Under sequence parallel the gradient is summed over ranks while it is scattered.
        options = {
            "group": self.tp_group,
            "vocab_size": self.vocab_size,
            "sum_hidden_grad": not self.sequence_parallel,
        }
        whole_samples = objective is None or objective.whole_samples
        owner_N = part and part.owner_N
        slabs = rows.slabs(slab_rows(weight), whole_samples=whole_samples, owner_N=owner_N) or [rows]
        spread = SpreadSlabs([slab.row_N.shape[0] for slab in slabs], part and part.rows, self.context)
        if objective is None:
            # Cut as a loss of whole samples is: the same products, so the same numbers bit by bit.
            parts = [
                token_logprobs(hidden_nH[a:b], weight, target_n[a:b], **options) for a, b in spread.ranges
            ]
            return torch.cat([spread.whole(i, logprobs_n) for i, logprobs_n in enumerate(parts)])

        def loss(
            i: int, logprobs_n: Tensor, statistics: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            known = {name: spread.whole(i, values_n) for name, values_n in statistics.items()}
            return objective.loss(spread.whole(i, logprobs_n), slabs[i], known)

        value, sums = slab_loss(
            hidden_nH, weight, target_n, spread.ranges, loss, statistics=objective.row_statistics, **options
        )
        if part is not None:
            # Ranks differ by what they hold of a sample: the one that recomputed most is told.
            dist.all_reduce(sums[RECOMPUTED], dist.ReduceOp.MAX, group=self.context)
        return PackLoss(value, sums)

    def _scored(self, hidden: Tensor, row_n: Tensor, host_row_n: np.ndarray) -> Tensor:
        """Return ``[n, H]``: under sequence parallel gathered, the scored rows alone where that moves less."""
        hidden = hidden.squeeze(1)
        if self.sequence_parallel:
            picked = pick_rows(host_row_n, hidden.shape[0], self.tp_group.size())
            if picked is not None:
                own_M, row_n = (
                    torch.from_numpy(places).to(hidden.device, non_blocking=True)
                    for places in (picked.own_RM[self.tp_group.rank()], picked.place_N)
                )
                hidden = hidden[own_M]
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden[row_n]


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
        batch: PackedBatch,
        objective: RowObjective | None,
        groups: ProcessGroupCollection,
    ) -> Tensor | PackLoss:
        """Return ``rewards_C`` fp32 of the pack's completions, or with an objective the pack's loss.

        Args:
            hidden: ``[Q or Q / TP, 1, H]``.
            batch: the pack, with its completions.
            objective: what is made of the rewards.
            groups: tensor- and context-parallel ranks.
        """
        if self.sequence_parallel:
            # Every rank then computes the whole loss: its gradient is complete, and only to be split again.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=groups.tp
            )
        known, part = batch.rows.completions, batch.part
        last_c = known.last_C if part is None else part.last.row_n
        rewards_C = (hidden.squeeze(1)[last_c].float() @ self.weight.float().T)[:, 0]
        if part is not None:
            rewards_C = from_all_ranks(rewards_C, part.last.number_n, known.last_C.shape[0], groups.cp)
        return rewards_C if objective is None else PackLoss(*objective.loss(rewards_C, batch.rows, {}))

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
