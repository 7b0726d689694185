"""Supervised fine-tuning: cross-entropy on the assistant's tokens.

Shapes: N scored rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from megatron_align.data.store import TokenStore
from megatron_align.losses.sft import sft_loss
from megatron_align.objectives.base import Objective, Sums
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.records import LossRows


@dataclass(frozen=True, kw_only=True)
class SFTOptions(ObjectiveOptions):
    """Supervised fine-tuning: cross-entropy on the assistant's tokens.

    Args:
        name: sft
        normalization: token: every trained token of the step's global batch weighs the same;
            sample: every sample weighs the same, its tokens sharing that weight
    """

    name: Literal["sft"] = "sft"
    normalization: Literal["token", "sample"] = "token"


class SFT(Objective):
    """Supervised fine-tuning."""

    Options = SFTOptions
    data = ("chat",)
    whole_samples = False

    def __init__(self, options: SFTOptions, store: TokenStore | None = None):
        super().__init__(options, store)
        self.normalization = options.normalization

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, row_statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        return sft_loss(logprobs_N, rows.weight_N).sum(), {}
