"""Objectives: from the log-probs of scored rows, or from rewards, to their share of the step's loss.

Shapes: N scored rows of some whole samples of a pack; S completions of a whole step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from megatron_align.config.objectives import SFTConfig
from megatron_align.data.batching.step_batches import Normalization
from megatron_align.losses.sft import sft_loss
from megatron_align.records import LossRows

Sums = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class StepSums:
    """What a whole step's completions came to, before its loss is taken. All ``[S]`` fp64, without gradient."""

    policy_S: Tensor
    reference_S: Tensor
    length_S: Tensor


class Objective:
    """What a training step needs of an objective; the simplest answers are given here."""

    normalization: Normalization  # how the global batch is weighted; the data side turns it into weights
    metrics: tuple[str, ...] = ()  # names of the sums that ``loss`` returns besides the loss
    whole_samples = True  # the loss needs whole samples; False: it is a sum over rows
    statistics = False  # the loss wants the rows' entropy and log sum p^2 too
    score_prompt = False  # prompts are scored, see ``data.pack``
    ld_alpha: float | None = None  # how :meth:`weighted` weighs, for the key of a cached reference
    looks_ahead: Literal["own", "mismatched"] | None = (
        None  # what must be scored before a step's loss is known
    )

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """Return these samples' share of the global loss (a scalar to sum) and their metric sums, detached."""
        raise NotImplementedError

    def weighted(self, logprobs_N: Tensor, rows: LossRows) -> Tensor:
        """Return the log-probs as they enter a completion's sum, of the policy and of the reference."""
        return logprobs_N

    def look(self, sums: StepSums, *, training: bool) -> Tensor | None:
        """Take in what was scored ahead; return d loss / d summed log-prob where the loss mixes samples."""
        return None

    def finish(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return a step's metrics from ``loss`` and the metric sums over all ranks."""
        return dict(totals)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to go on."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`state` returned."""


class SFT(Objective):
    """Supervised fine-tuning."""

    whole_samples = False

    def __init__(self, config: SFTConfig):
        self.normalization = config.normalization

    def loss(
        self, logprobs_N: Tensor, rows: LossRows, statistics: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """See :class:`Objective`."""
        return sft_loss(logprobs_N, rows.weight_N).sum(), {}
