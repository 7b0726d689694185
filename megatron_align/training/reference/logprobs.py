"""Reference log-probs of a step, in the three modes of the reference model: cached, live, none.

The forward pass itself is ``training.scoring``; cached columns are computed and kept by :mod:`.cache`.

Shapes: C completions of one pack, S completions of a step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_align.data.batching.step_batches import Step
from megatron_align.training.scoring import Scorer, mismatched_sums


class Reference(Protocol):
    """Log-probs of completions under the reference model."""

    def step_logprobs(self, step: Step) -> list[Tensor] | None:
        """Return ``[C]`` of each of the step's packs, as :meth:`Scorer.sums`; None: the packs have them already."""
        ...

    def mismatched_logprobs(self, step: Step) -> Tensor:
        """Return ``[S]`` fp64 of the step's mismatched completions, on every rank."""
        ...


class ZeroReference:
    """A reference whose log-probs are all 0: ``reference.mode: none``."""

    def step_logprobs(self, step: Step) -> list[Tensor]:
        """See :class:`Reference`."""
        return [torch.zeros(len(places)) for places in step.packs.completions]

    def mismatched_logprobs(self, step: Step) -> Tensor:
        """See :class:`Reference`."""
        return torch.zeros(len(step.stored_C), dtype=torch.float64)


class LiveReference:
    """A reference that stays in memory; with ``sync_steps`` it follows the policy (TR-DPO, arXiv:2404.09656)."""

    def __init__(self, scorer: Scorer, groups: ProcessGroupCollection):
        self.scorer, self.groups = scorer, groups

    def step_logprobs(self, step: Step) -> list[Tensor]:
        """See :class:`Reference`."""
        return self.scorer.sums(step.batches)

    def mismatched_logprobs(self, step: Step) -> Tensor:
        """See :class:`Reference`."""
        return mismatched_sums(self.scorer, step, self.groups)

    @torch.no_grad()
    def move(self, policy: Sequence[nn.Module], alpha: float) -> None:
        """Set every parameter to ``alpha x policy + (1 - alpha) x reference``."""
        for chunk, other in zip(self.scorer.chunks, policy, strict=True):
            for parameter, new in zip(chunk.parameters(), other.parameters(), strict=True):
                parameter.lerp_(new.to(parameter.dtype), alpha)


class CachedReference:
    """A reference whose log-probs were computed once: those of the step's completions come with its packs.

    Args:
        mismatched: mean over the completions of each step, of prompts with other samples' completions.
    """

    def __init__(self, mismatched: np.ndarray | None = None):
        self._mismatched = mismatched

    def step_logprobs(self, step: Step) -> None:
        """See :class:`Reference`: the packs were built with them."""

    def mismatched_logprobs(self, step: Step) -> Tensor:
        """See :class:`Reference`. Only their mean is cached, as only it is used: every completion gets the mean."""
        assert self._mismatched is not None, "the objective needs mismatched_logprobs"
        return torch.full((len(step.stored_C),), float(self._mismatched[step.number]), dtype=torch.float64)
