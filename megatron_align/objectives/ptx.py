"""PTX: a term on supervised data that is added to each step of a run on rollouts, so that it forgets less.

The Baichuan report (arXiv:2410.14940) takes KL(policy || reference) over the reference's 500 likeliest tokens, as
cross-entropy would pull a merged model towards the supervised one. Its eq. 2 adds the term to an objective that is
maximised, which would reward drift; in the loss, which is minimised, it is added.

Shapes: N scored rows, K of the reference's likeliest tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from megatron_align.config.paths import expand_fields
from megatron_align.data.store import TokenStore
from megatron_align.errors import require
from megatron_align.losses.sft import sft_loss
from megatron_align.losses.top_k_divergence import reverse_kl
from megatron_align.objectives.base import DataKind, Objective, Sums
from megatron_align.objectives.metrics import Metric
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.records import LossRows

PTX_LOSS = Metric(
    name="ptx_loss",
    unit="nats per token",
    meaning="the term on supervised data (objective.ptx), before its coefficient: KL to the reference over its "
    "likeliest tokens, or cross-entropy; absent without ptx",
    section="Learning",
    lower_is_better=True,
)


@dataclass(frozen=True, kw_only=True)
class PTXOptions:
    """A term on supervised data in each step.

    Args:
        data: chat data: file, folder or glob pattern; its shape is recognised
        coefficient: factor of the term in the loss
        kind: topk_kl: KL(policy || reference) over the reference's likeliest tokens; nll: cross-entropy
        top_k: kind topk_kl: number of these tokens, at most the vocabulary; null: 500
        samples: samples of a step
    """

    data: str
    coefficient: float = 0.1
    kind: Literal["topk_kl", "nll"] = "topk_kl"
    top_k: int | None = None
    samples: int = 64

    def __post_init__(self) -> None:
        expand_fields(self, "data")
        require(self.coefficient > 0, f"objective.ptx.coefficient must be positive, got {self.coefficient}")
        require(self.samples >= 1, f"objective.ptx.samples must be at least 1, got {self.samples}")
        require(
            self.top_k is None or self.kind == "topk_kl",
            f"objective.ptx.top_k belongs to kind topk_kl; got {self.top_k} with kind {self.kind}",
        )
        require(
            self.top_k is None or self.top_k >= 1, f"objective.ptx.top_k must be at least 1, got {self.top_k}"
        )

    @property
    def columns(self) -> int:
        """The number of the reference's likeliest tokens that are read; 0: none."""
        return 0 if self.kind == "nll" else 500 if self.top_k is None else self.top_k


class PTX(Objective):
    """The term; every scored token of the step's supervised samples weighs the same."""

    data: ClassVar[tuple[DataKind, ...]] = ("chat",)
    normalization = "token"
    whole_samples = False

    def __init__(self, options: PTXOptions):
        super().__init__(ObjectiveOptions(name="ptx"))
        self.top_k, self._coefficient, self.sum_names = options.columns, options.coefficient, (PTX_LOSS.name,)
        self._samples = options.samples

    def require_data(self, store: TokenStore, name: str) -> None:
        """See :class:`Objective`."""
        require(
            self._samples <= len(store),
            f"objective.ptx.samples must be at most the {len(store)} samples of {name}, got {self._samples}",
        )

    def row_values(self, logits_NK: Tensor, reference_NK: Tensor) -> Tensor:
        """See :class:`Objective`: KL(policy || reference) of each row, in nats."""
        return reverse_kl(logits_NK, reference_NK)

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`; given are the rows' divergences, or log-probs."""
        losses_N = logprobs_N * rows.weight_N if self.top_k else sft_loss(logprobs_N, rows.weight_N)
        value = losses_N.sum()
        return self._coefficient * value, {PTX_LOSS.name: value.detach()}
