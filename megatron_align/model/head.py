"""The output heads: scored rows of hidden states to log-probs or to the loss; last tokens to rewards.

Shapes: Q tokens of this context-parallel rank (Q / TP on each rank under sequence parallel), N scored rows of the pack,
n of them on this context-parallel rank, H hidden, M rows that each tensor-parallel rank sends; K likeliest tokens of a
row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_align.kernels import (
    RECOMPUTED,
    column_logits,
    slab_loss,
    slab_rows,
    token_logprobs,
    token_scores,
    top_logits,
)
from megatron_align.model import cpu
from megatron_align.model.context_parallel import ContextSlabs, gather_rows
from megatron_align.model.families import ModelShape, padded_vocab
from megatron_align.model.lora_ends import HeadAdapter
from megatron_align.model.trained_copy import TrainedCopy
from megatron_align.model.transfer import to_device
from megatron_align.records import LossRows, PackedBatch

RowScore = Literal["likeliest", "entropy"]  # what is known of a row besides its log-prob


class PackLoss(NamedTuple):
    """A pack's share of the step's loss and its metric sums; the gradients of a loss on log-probs exist already."""

    loss: Tensor
    sums: dict[str, Tensor]


class RowObjective(Protocol):
    """The part of an objective that the head uses (``objectives/base.py`` has the complete interface)."""

    whole_samples: bool
    row_statistics: bool
    entropy_gradient: bool
    top_k: int

    def row_values(self, logits_NK: Tensor, reference_NK: Tensor) -> Tensor:
        """Return a value of each row from logits of the reference's likeliest tokens, where ``top_k`` is above 0."""
        ...

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return these rows' share of the loss and their metric sums."""
        ...


class VocabularyHead(ColumnParallelLinear):
    """megatron-core's output layer, whose forward is the log-prob engine.

    It is a separate module because megatron-core's forward hooks wait there for a weight that is still being gathered.
    With ``main_grad`` the weight's gradient is added to it in forward, before the backward that follows.

    Args:
        config: megatron-core's.
        shape: of the model.
        groups: process groups; every context-parallel rank returns the complete result.
        tied: use the embedding's weight, which this rank holds too; none is created here.

    Attributes:
        temperature: the logits are divided by it, in training and scoring: that at which rollouts are sampled.
        top_tokens: the likeliest tokens are those of the first so many, which a policy of a smaller vocabulary has too.
    """

    def __init__(
        self, config: TransformerConfig, shape: ModelShape, groups: ProcessGroupCollection, *, tied: bool
    ):
        if (
            config.gradient_accumulation_fusion
        ):  # its gradient is the engine's: Apex need not be installed for it
            config = copy(config)
            config.gradient_accumulation_fusion = False
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
        self.temperature, self.top_tokens = 1.0, shape.vocab_size
        self.adapter: HeadAdapter | TrainedCopy | None
        self.register_module("adapter", None)

    def forward(
        self,
        hidden: Tensor,
        batch: PackedBatch,
        objective: RowObjective | None,
        *,
        weight: Tensor,
        row_score: RowScore | None = None,
        top_k: int = 0,
    ) -> Tensor | PackLoss:
        """Return ``logprobs_N`` fp32 of the scored rows, or with an objective the pack's loss.

        Args:
            hidden: ``[Q or Q / TP, 1, H]``.
            batch: the pack and its scored rows.
            objective: evaluated on the log-probs, slab by slab, or on logits of ``objective.top_k`` tokens of each
                row; None: return log-probs.
            weight: this module's, or the embedding's if tied on this rank, or the trained copy of either.
            row_score: return ``[2, N]``: log-probs, and likeliest: 1 where no token is likelier than the target, or
                entropy: that of the row's distribution.
            top_k: return ``[2, N, K]``: the K likeliest tokens, whose ids below 2^24 are exact in fp32, and their
                logits at temperature 1.
        """
        if self.unit_rows:  # here, as the weight is certainly gathered inside this module's forward
            weight = F.normalize(weight)
        rows, part = batch.rows, batch.part
        hidden_nH, weight, target_n = self._held_rows(hidden, weight, batch)
        # Under sequence parallelism the gradient is summed over ranks by the reduce-scatter.
        options = {
            "group": self.tp_group,
            "vocab_size": self.vocab_size,
            "sum_hidden_grad": not self.sequence_parallel,
            "temperature": self.temperature,
        }
        if top_k or (objective is not None and objective.top_k):
            del options["temperature"]  # that of rollouts; such an objective divides by one of its own
            if objective is None:
                logits_nK, tokens_nK = top_logits(
                    hidden_nH, weight, top_k, group=self.tp_group, vocab_size=self.top_tokens
                )
                pairs_n2K = torch.stack([tokens_nK.to(logits_nK.dtype), logits_nK], dim=1)
                return self._all_rows(pairs_n2K, batch).transpose(0, 1)
            return self._column_loss(hidden_nH, weight, batch, objective, options)
        whole_samples = objective is None or objective.whole_samples
        owner_N = None if part is None else part.owner_N
        slabs = rows.slabs(slab_rows(weight), whole_samples=whole_samples, owner_N=owner_N) or [rows]
        context_slabs = ContextSlabs(
            [slab.row_N.shape[0] for slab in slabs], None if part is None else part.rows, self.context
        )
        if row_score:
            columns_2n = [
                _two_scores(hidden_nH[a:b], weight, target_n[a:b], row_score, options)
                for a, b in context_slabs.ranges
            ]
            return torch.stack([_gathered(context_slabs, column) for column in zip(*columns_2n, strict=True)])
        if objective is None:
            # Cut as for a loss of complete samples: the same GEMMs, so bit-identical log-probs.
            parts = [
                token_logprobs(hidden_nH[a:b], weight, target_n[a:b], **options)
                for a, b in context_slabs.ranges
            ]
            return _gathered(context_slabs, parts)

        def loss(
            i: int, logprobs_n: Tensor, statistics: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            gathered = {name: context_slabs.gather(i, values_n) for name, values_n in statistics.items()}
            return objective.loss(context_slabs.gather(i, logprobs_n), slabs[i], gathered)

        value, sums = slab_loss(
            hidden_nH,
            weight,
            target_n,
            context_slabs.ranges,
            loss,
            statistics=objective.row_statistics,
            entropy_gradient=objective.entropy_gradient,
            **options,
        )
        if part is not None:
            # Ranks hold different rows of a sample: report the maximum over context ranks.
            dist.all_reduce(sums[RECOMPUTED], dist.ReduceOp.MAX, group=self.context)
        return PackLoss(value, sums)

    def _column_loss(
        self,
        hidden_nH: Tensor,
        weight: Tensor,
        batch: PackedBatch,
        objective: RowObjective,
        options: dict[str, Any],
    ) -> PackLoss:
        """Return the loss of an objective on logits of the reference's likeliest tokens.

        All rows are given to one call, which computes logits slab by slab. A loss needs one number of each row, so
        ranks that hold different rows gather these alone.
        """
        number_n = slice(None) if batch.part is None else batch.part.rows.number_n
        tokens_nK, reference_nK = (
            batch.rows.columns[name][number_n] for name in ("reference_tokens", "reference_logits")
        )
        logits_nK = column_logits(hidden_nH, weight, tokens_nK.long(), **options)
        value_n = objective.row_values(logits_nK, reference_nK.to(logits_nK.dtype))
        return PackLoss(*objective.loss(self._all_rows(value_n, batch), batch.rows, {}))

    def _all_rows(self, values_n: Tensor, batch: PackedBatch) -> Tensor:
        """Return the values of all rows of the pack, of those that this context-parallel rank holds."""
        if batch.part is None:
            return values_n
        return gather_rows(values_n, batch.part.rows.number_n, batch.rows.row_N.shape[0], self.context)

    def _held_rows(self, hidden: Tensor, weight: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states and weight, both with the adapter, and targets of the scored rows on this rank."""
        rows, part = batch.rows, batch.part
        if part is None:
            hidden_nH, target_n = self._scored(hidden, rows.row_N, rows.rows_on_host()), rows.target_N
        else:
            hidden_nH = self._scored(hidden, part.rows.row_n, part.rows.host_row_n)
            target_n = rows.target_N[part.rows.number_n]
        if isinstance(self.adapter, HeadAdapter):
            number_n = slice(None) if part is None else part.rows.number_n
            keys_n = None if batch.dropout_T is None else batch.dropout_T[rows.row_N[number_n]]
            hidden_nH, weight = self.adapted(hidden_nH, weight, keys_n)
        return hidden_nH, weight, target_n

    def adapted(
        self, hidden_nH: Tensor, weight_VH: Tensor, keys_n: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return hidden states and weight whose product are the logits, with the columns of an adapter if there is one.

        Args:
            hidden_nH: rows that are scored.
            weight_VH: of the base.
            keys_n: of the rows' tokens, for dropout; None: nothing is dropped.
        """
        if not isinstance(self.adapter, HeadAdapter) or not self.adapter.enabled:
            return hidden_nH, weight_VH  # ``weight_VH`` may be a trained copy
        return self.adapter(hidden_nH, weight_VH, keys_n)

    def _scored(self, hidden: Tensor, row_n: Tensor, host_row_n: np.ndarray) -> Tensor:
        """Return the scored rows ``[n, H]``; gathered under sequence parallelism, alone if that moves less."""
        hidden = hidden.squeeze(1)
        if self.sequence_parallel:
            picked = pick_rows(host_row_n, hidden.shape[0], self.tp_group.size())
            if picked is not None:
                own_M, row_n = (
                    to_device(torch.from_numpy(indices), hidden.device)
                    for indices in (picked.own_RM[self.tp_group.rank()], picked.index_N)
                )
                hidden = hidden[own_M]
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden[row_n]


def set_temperature(chunks: Sequence[nn.Module], temperature: float) -> None:
    """Divide the logits of some model chunks by a temperature, in training and scoring."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, VocabularyHead):
                module.temperature = temperature


def limit_top_tokens(chunks: Sequence[nn.Module], tokens: int) -> None:
    """Take the likeliest tokens of some model chunks among the first ``tokens`` ones only."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, VocabularyHead):
                module.top_tokens = tokens


def score_rows(chunks: Sequence[nn.Module]) -> None:
    """Make the reward head of some model chunks a value head: it scores every row, as a critic does."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, RewardHead):
                module.of_rows = True


def _gathered(slabs: ContextSlabs, values_n: Sequence[Tensor]) -> Tensor:
    """Return the values of all rows, of those that this context-parallel rank computed slab by slab."""
    return torch.cat([slabs.gather(i, of_slab_n) for i, of_slab_n in enumerate(values_n)])


def _two_scores(
    hidden_nH: Tensor, weight_VH: Tensor, target_n: Tensor, row_score: RowScore, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return log-probs, and 1.0 where the target is the likeliest token, or the entropy of its row.

    ``options``: of the log-prob engine.
    """
    if not len(target_n):  # a context-parallel rank may have no row of a slab
        return hidden_nH.new_zeros(0, dtype=torch.float32), hidden_nH.new_zeros(0, dtype=torch.float32)
    options = {name: value for name, value in options.items() if name != "sum_hidden_grad"}
    if row_score == "entropy":
        scores = token_scores(hidden_nH, weight_VH, target_n, **options)
        return scores.logprobs_N, scores.entropy_N
    scores = token_scores(hidden_nH, weight_VH, target_n, top_k=1, **options)
    assert scores.top_tokens_NK is not None, "one was requested"
    return scores.logprobs_N, (scores.top_tokens_NK[:, 0] == target_n).to(scores.logprobs_N.dtype)


class RewardHead(nn.Module):
    """A scalar reward on the last token of each completion; tensor-parallel ranks hold the full weight ``[1, H]``.

    Attributes:
        of_rows: of a critic: a value of each scored row instead, of the token that predicts its target.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.sequence_parallel, self.of_rows = config.sequence_parallel, False
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
        """Return ``rewards_C`` fp32 of the pack's completions (a critic: ``values_N``), or with an objective its loss.

        Args:
            hidden: ``[Q or Q / TP, 1, H]``.
            batch: the pack and its completions.
            objective: evaluated on the rewards; None: return rewards.
            groups: tensor- and context-parallel ranks.
        """
        if self.sequence_parallel:
            # Every rank then computes the complete loss: its gradient is complete, and only needs to be split.
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=groups.tp
            )
        part = batch.part
        row_C = batch.rows.row_N if self.of_rows else batch.rows.completions.last_C
        if part is None:
            scalar_C = self._scalars(hidden, row_C)
        else:
            held = part.rows if self.of_rows else part.last
            scalar_C = gather_rows(
                self._scalars(hidden, held.row_n), held.number_n, row_C.shape[0], groups.cp
            )
        return scalar_C if objective is None else PackLoss(*objective.loss(scalar_C, batch.rows, {}))

    def _scalars(self, hidden: Tensor, row_c: Tensor) -> Tensor:
        """Return the head's output at some tokens that this rank holds, fp32."""
        return (hidden.squeeze(1)[row_c].float() @ self.weight.float().T)[:, 0]

    def initialise(self, deviation: float, seed: int) -> None:
        """Draw the weight from a normal distribution, identical on every layout."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * deviation)


class Picked(NamedTuple):
    """The rows that each rank sends, and the index of each scored row among the gathered rows. int64."""

    own_RM: np.ndarray
    index_N: np.ndarray


def pick_rows(row_N: np.ndarray, tokens: int, ranks: int) -> Picked | None:
    """Choose the rows that each rank sends, the same number from all; None if complete shards are no larger.

    Args:
        row_N: the scored rows of the pack, possibly repeated (the last token of a shared prompt).
        tokens: rows per rank, in order of rank.
        ranks: R.
    """
    rows, inverse_N = np.unique(row_N, return_inverse=True)
    owner = rows // tokens
    counts = np.bincount(owner, minlength=ranks)
    most = max(1, int(counts.max()))
    if most >= tokens:
        return None
    within = np.arange(len(rows)) - (counts.cumsum() - counts)[owner]
    # A rank with fewer rows sends its first row again; nothing reads it.
    own_RM = np.zeros((ranks, most), np.int64)
    own_RM[owner, within] = rows % tokens
    return Picked(own_RM, (owner * most + within)[inverse_N.reshape(-1)])
