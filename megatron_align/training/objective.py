"""Objectives: from the log-probs of one pack's scored rows to its share of the step's loss."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from megatron_align.config import SFTConfig
from megatron_align.losses.sft import sft_loss
from megatron_align.records import LossRows


class Objective(Protocol):
    """What a training step needs of an objective."""

    normalization: str  # how the global batch is weighted; the data side turns it into row weights
    metrics: tuple[str, ...]  # names of the sums that ``loss`` returns besides the loss

    def loss(self, logprobs_N: Tensor, rows: LossRows) -> tuple[Tensor, dict[str, Tensor]]:
        """Return this pack's share of the global loss (a scalar to sum) and its metric sums."""
        ...


class SFT:
    """Supervised fine-tuning."""

    metrics: tuple[str, ...] = ()

    def __init__(self, config: SFTConfig):
        self.normalization = config.normalization

    def loss(self, logprobs_N: Tensor, rows: LossRows) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`Objective`."""
        return sft_loss(logprobs_N, rows.weight_N).sum(), {}


def build_objective(config: Any) -> Objective:
    """Return the objective of a configuration section (one of ``config.OBJECTIVES``)."""
    return {SFTConfig: SFT}[type(config)](config)
