"""The base class of objectives: options, data, needs, loss and metrics in one place, which everything else reads.

Shapes: N scored rows and C completions of some complete samples of a pack; S completions of a step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from megatron_align.data.batching.normalization import Normalization
from megatron_align.data.store import TokenStore
from megatron_align.errors import require
from megatron_align.objectives.metrics import Metric
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.records import LossRows

Sums = dict[str, Tensor]
DataKind = Literal["chat", "triple", "pair", "ranked", "unpaired", "prompt"]
DATA_KINDS: dict[DataKind, str] = {
    "chat": "chat data (messages, prompt + completion, ...)",
    "triple": "triples (prompt, chosen, rejected, reference)",
    "pair": "pairs (prompt, chosen, rejected)",
    "ranked": "ranked data (prompt, completions with scores)",
    "unpaired": "labelled completions (prompt, completion, label)",
    "prompt": "prompts (prompt, or messages up to the answer)",
}
Need = Literal[
    "reference_logprobs",
    "batch_statistics",
    "mismatched_logprobs",
    "reference_token_logprobs",
    "old_logprobs",
    "token_entropies",
    "reference_top_k",
    "values",
]

# The models that score a step without gradients, once for each need, before its loss can be computed: the pre-pass
# runs them, and FLOPs are counted from this table. A reference is run only in mode live; otherwise it is cached or 0.
SCORED_BY: dict[Need, tuple[Literal["policy", "reference", "critic"], ...]] = {
    "reference_logprobs": ("reference",),  # for the completions' column of this name
    "batch_statistics": ("policy",),  # observe_batch gets the sums of the step's completions
    "mismatched_logprobs": ("policy", "reference"),  # ... of each prompt with its neighbour's completion
    "reference_token_logprobs": ("reference",),  # of rollouts, for the tokens' column reference_logprobs
    "old_logprobs": ("policy",),  # of rollouts, for the tokens' column of this name
    "token_entropies": ("policy",),  # of the step's tokens, for the tokens' column entropy_shares
    "reference_top_k": ("reference",),  # its likeliest tokens and their logits, for two columns of the tokens
    "values": ("critic",),  # of rollouts, for the tokens' column of this name
}


@dataclass(frozen=True, slots=True)
class StepSums:
    """Summed log-probs of all completions of a step. All ``[S]`` fp64, without gradient, the same on every rank."""

    policy_S: Tensor
    reference_S: Tensor
    length_S: Tensor  # scored tokens


@dataclass(frozen=True, slots=True)
class StepStatistics:
    """Results of a step's pre-pass; the loss reads them from the rows, so no objective keeps them between calls.

    Args:
        values: numbers of the step, for ``LossRows.step_statistics`` and the step's metrics.
        columns: values of each completion of the step, ``[S]``, for ``Completions.columns`` as fp32.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    columns: Mapping[str, Tensor] = field(default_factory=dict)


class Objective:
    """An objective on log-probs of scored rows, or on rewards of completions. Subclasses override what differs.

    Args:
        options: an instance of ``Options``.
        store: the training data; None: nothing is trained, only the attributes are read.

    Attributes:
        Options: dataclass of its options.
        data: the kinds of data that it trains on.
        metrics: metrics that it reports besides those of every run.
        trains_reward_model: its loss is given the rewards ``[C]`` of a scalar head, not log-probs.
        needs: what the pre-pass must compute before its loss.
        normalization: what weighs the same in the global batch; the weights in the rows follow from it.
        whole_samples: its loss needs complete samples; False: it is a sum over rows.
        row_statistics: its loss needs each row's entropy and log sum p^2.
        entropy_gradient: its loss is differentiated by these entropies too.
        top_k: its loss is given a value of each row that :meth:`row_values` computes from the logits of as many tokens,
            the reference's likeliest; 0: it is given log-probs.
        score_prompt: prompts are scored too, see ``data.batching.collate.pack``.
        beta: factor from log-ratios to its metrics chosen_reward and rejected_reward; None: it does not report them.
        loss_at_reference: loss of a policy that equals its reference; None: not a constant.
        sum_names: names of the metric sums that ``loss`` returns; by default those of ``metrics``.
        usual_reference: the mode of its reference where ``reference.mode`` is null.
        scoring_options: options that :meth:`weighted` reads; part of a cached reference's key.
    """

    Options: ClassVar[type[ObjectiveOptions]]
    data: ClassVar[tuple[DataKind, ...]]
    metrics: ClassVar[tuple[Metric, ...]] = ()
    trains_reward_model: ClassVar[bool] = False
    needs: frozenset[Need] = frozenset()
    normalization: Normalization
    whole_samples: bool = True
    row_statistics: bool = False
    entropy_gradient: bool = False
    top_k: int = 0
    score_prompt: bool = False
    beta: float | None = None
    loss_at_reference: float | None = None
    usual_reference: Literal["cached", "live"] = "cached"

    def __init__(self, options: ObjectiveOptions, store: TokenStore | None = None):
        self.options = options
        self.sum_names = tuple(metric.name for metric in self.metrics)
        self.scoring_options: dict[str, Any] = {"ld_alpha": None}

    @property
    def compares(self) -> bool:
        """Whether the policy is compared with a reference model."""
        return not self.needs.isdisjoint(
            {"reference_logprobs", "reference_token_logprobs", "reference_top_k"}
        )

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """Return these samples' share of the step's loss (a scalar to sum) and their metric sums, detached."""
        raise NotImplementedError

    def row_values(self, logits_NK: Tensor, reference_NK: Tensor) -> Tensor:
        """Return ``[N]`` for :meth:`loss` in place of log-probs; for an objective with :attr:`top_k` = K > 0.

        Args:
            logits_NK: the policy's, of the reference's K likeliest tokens.
            reference_NK: the reference's, of the same tokens, in the same dtype.
        """
        raise NotImplementedError

    def weighted(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """Return the log-probs as they enter a completion's sum, of the policy and of the reference."""
        return logprobs_N

    def observe_batch(self, seen: Mapping[Need, StepSums], *, training: bool) -> StepStatistics:
        """Return the step's statistics from what was scored before its loss.

        Args:
            seen: of ``batch_statistics`` and ``mismatched_logprobs`` those that the objective needs.
            training: False in validation, which must not move :meth:`state`.
        """
        raise NotImplementedError

    def entropy_bound(self, entropy_S: Tensor) -> float:
        """Return the entropy from which on a token of the step has a share in the column ``entropy_shares``.

        For an objective that needs ``token_entropies``; ``entropy_S``: of all tokens that count in the step, fp64.
        """
        raise NotImplementedError

    def finish(self, totals: Mapping[str, float]) -> dict[str, Any]:
        """Return a step's metrics from the loss and the metric sums over all ranks, and the step's statistics."""
        return dict(totals)

    def require_data_kind(self, kind: str, name: str, sources: Sequence[str]) -> None:
        """Check the kind of the records in ``sources``, of split ``name``.

        Raises:
            InputError: it is none of :attr:`data`.
        """
        accepted = " or ".join(DATA_KINDS[each] for each in self.data)
        require(
            kind in self.data,
            f"{name}: objective {self.options.name} needs {accepted}, got {kind} data in {', '.join(sources)}",
        )

    def require_data(self, store: TokenStore, name: str) -> None:
        """Check that the data hold what the options need.

        Raises:
            InputError: naming ``name`` (the split) and what is missing.
        """

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold for the objective to resume."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned."""


def completion_sums(values_N: Tensor, rows: LossRows, *, with_prompt: bool = False) -> Tensor:
    """Sum ``[N]`` over each completion, ``[C]``; rows of a scored prompt count only ``with_prompt``.

    Adds row after row, so the result does not depend on what else is in the pack.
    """
    if not with_prompt:
        values_N = values_N.masked_fill(rows.prompt_N, 0.0)
    return torch.segment_reduce(values_N, "sum", lengths=rows.completions.rows_C, unsafe=True, initial=0)
