"""Distillation: the divergence between the policy and a teacher over the teacher's likeliest tokens, on given data.

Shapes: N scored rows, K of the teacher's likeliest tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.errors import require, shown
from megatron_align.losses.top_k_divergence import TOP_K_DIVERGENCES
from megatron_align.objectives.base import Need, Objective, Sums
from megatron_align.objectives.options import ObjectiveOptions, require_positive
from megatron_align.records import LossRows

Divergence = Literal["reverse", "forward", "js"]
LOSS_OF: dict[Divergence, str] = {"reverse": "reverse_kl", "forward": "forward_kl", "js": "js_divergence"}


@dataclass(frozen=True, kw_only=True)
class DistillOptions(ObjectiveOptions):
    """Distillation: divergence from a teacher, reference.path, over its likeliest tokens, on given data.

    Args:
        name: distill
        divergence: reverse: KL(policy || teacher), mode-seeking; forward: KL(teacher || policy), mass-covering;
            js: GKD's generalised Jensen-Shannon divergence
        top_k: the teacher's likeliest tokens of each row, at most the vocabulary; both models are renormalised over
            them
        js_beta: divergence js: weight of the teacher in the mixture, in (0, 1); null: 0.5
        temperature: the logits of both models are divided by it
    """

    name: Literal["distill"] = "distill"
    divergence: Divergence = "reverse"
    top_k: int = 500
    js_beta: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(self.top_k >= 1, f"objective.top_k must be at least 1, got {self.top_k}")
        require_positive(temperature=self.temperature)
        require(
            self.js_beta is None or self.divergence == "js",
            f"objective.js_beta belongs to divergence js; got {self.js_beta} with divergence {self.divergence}",
        )
        require(
            self.js_beta is None or 0 < self.js_beta < 1,
            f"objective.js_beta must be in (0, 1), as divergence forward is its limit 0 and reverse its limit 1; got "
            f"{shown(self.js_beta)}",
        )


class Distill(Objective):
    """Distillation from cached logits of the teacher; every scored token of the step's global batch weighs the same."""

    Options = DistillOptions
    data = ("chat",)
    needs: frozenset[Need] = frozenset({"reference_top_k"})
    normalization = "token"
    whole_samples = False

    def __init__(self, options: DistillOptions, store: TokenStore | None = None):
        super().__init__(options, store)
        self.top_k, self._temperature = options.top_k, options.temperature
        divergence = TOP_K_DIVERGENCES[LOSS_OF[options.divergence]]
        of_js = {"beta": 0.5 if options.js_beta is None else options.js_beta}
        self._divergence = partial(divergence, **of_js) if options.divergence == "js" else divergence

    def row_values(self, logits_NK: Tensor, reference_NK: Tensor) -> Tensor:
        """See :class:`Objective`: the divergence of each row, in nats."""
        return self._divergence(logits_NK / self._temperature, reference_NK / self._temperature)

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`; given are the rows' divergences."""
        return (logprobs_N * rows.weight_N).sum(), {}
