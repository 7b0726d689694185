"""What of a step must be known before its loss: log-probs under the reference, statistics of the whole step.

Shapes: C completions of one pack, S completions of a whole step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_align.data.batching.step_batches import Packs, Step
from megatron_align.model import cpu
from megatron_align.model.parallel import is_metric_rank
from megatron_align.objectives.base import Objective, StepSums
from megatron_align.objectives.preference import completion_sums
from megatron_align.records import Columns, LossRows, PackedBatch
from megatron_align.training.pipeline import run_schedule


class Scorer:
    """Sums log-probs over completions under a model, forward only."""

    def __init__(self, chunks: Sequence[nn.Module], objective: Objective):
        self.chunks, self.objective = list(chunks), objective

    def sums(self, batches: Sequence[PackedBatch]) -> list[Tensor]:
        """Return ``[C]`` of each batch on the last pipeline stage, nothing on the others."""
        return self.collect(
            batches, lambda logprobs_N, rows: completion_sums(self.objective.weighted(logprobs_N, rows), rows)
        )

    @torch.no_grad()
    def collect(
        self, batches: Sequence[PackedBatch], of_pack: Callable[[Tensor, LossRows], Tensor]
    ) -> list[Tensor]:
        """Return ``of_pack(log-probs or rewards, rows)`` of each batch on the last stage, nothing on the others."""
        for chunk in self.chunks:
            chunk.eval()
        return run_schedule(
            self.chunks,
            batches,
            partial(self._forward, of_pack),
            tokens=batches[0].tokens_T.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _forward(
        self,
        of_pack: Callable[[Tensor, LossRows], Tensor],
        batches: Iterator[PackedBatch],
        model: nn.Module,
        *_: Any,
    ) -> tuple[Tensor, Any]:
        batch = next(batches).to(cpu.device())
        return model(batch), lambda values, non_loss_data: of_pack(values, batch.rows)


class Reference(Protocol):
    """The model that completions are compared with."""

    def own(self, step: Step) -> list[Tensor] | None:
        """Return ``[C]`` of each of the step's packs, as :meth:`Scorer.sums`; None: the packs have them already."""
        ...

    def mismatched(self, step: Step) -> Tensor:
        """Return ``[S]`` fp64 of the step's mismatched completions, on every rank."""
        ...


class PrePass:
    """Completes the packs of a step with what its loss needs.

    Args:
        policy: scores under the model that is trained.
        objective: says what it must see ahead.
        groups: of this rank.
        reference: None: the objective compares with none.
    """

    def __init__(
        self,
        policy: Scorer,
        objective: Objective,
        groups: ProcessGroupCollection,
        reference: Reference | None,
    ):
        self.policy, self.objective, self.groups, self.reference = policy, objective, groups, reference

    def batches(self, step: Step, *, training: bool) -> list[PackedBatch]:
        """Return the step's micro-batches, ready for their loss."""
        batches = step.batches
        if self.reference is not None and (found := self.reference.own(step)):
            batches = [
                _with_column(b, "reference_logprobs", sums) for b, sums in zip(batches, found, strict=True)
            ]
        if self.objective.looks_ahead == "mismatched":
            policy_S = whole_step(
                self.policy.sums(step.mismatched.batches), step.mismatched, step, self.groups
            )
            reference_S = self.reference.mismatched(step)
            self.objective.look(StepSums(policy_S, reference_S, torch.ones_like(policy_S)), training=training)
        elif self.objective.looks_ahead == "own":
            batches = self._look_at_own(batches, step, training)
        return batches

    def _look_at_own(self, batches: list[PackedBatch], step: Step, training: bool) -> list[PackedBatch]:
        sums = self.policy.sums(batches)
        known = [batch.rows.completions for batch in batches] if sums else []
        columns = (sums, [of.columns["reference_logprobs"] for of in known], [of.length_C for of in known])
        seen = StepSums(*(whole_step(column, step.packs, step, self.groups) for column in columns))
        coefficient_S = self.objective.look(seen, training=training)
        if coefficient_S is None:
            return batches
        return [
            _with_column(batch, "loss_coefficients", coefficient_S[torch.from_numpy(places)].float())
            for batch, places in zip(batches, step.packs.places, strict=True)
        ]


def whole_step(found: Sequence[Tensor], packs: Packs, step: Step, groups: ProcessGroupCollection) -> Tensor:
    """Put the packs' values ``[C]`` of all ranks in their places; return ``[S]`` fp64 on the host of every rank."""
    values_S = torch.zeros(len(step.stored_C), dtype=torch.float64, device=cpu.device())
    if is_metric_rank(groups):
        for values_C, places in zip(found, packs.places, strict=bool(found)):
            values_S[torch.from_numpy(places).to(values_S.device)] = values_C.to(
                values_S.device, torch.float64
            )
    dist.all_reduce(values_S)
    return values_S.cpu()


def _with_column(batch: PackedBatch, name: str, column_C: Tensor) -> PackedBatch:
    completions = batch.rows.completions
    completions = replace(completions, columns=Columns({**completions.columns, name: column_C}))
    return replace(batch, rows=replace(batch.rows, completions=completions))


class ZeroReference:
    """A reference whose log-probs are all 0: ``reference.mode: none``."""

    def own(self, step: Step) -> list[Tensor]:
        """See :class:`Reference`."""
        return [torch.zeros(len(places)) for places in step.packs.places]

    def mismatched(self, step: Step) -> Tensor:
        """See :class:`Reference`."""
        return torch.zeros(len(step.stored_C), dtype=torch.float64)


class Live:
    """A reference that stays in memory; with ``sync_steps`` it follows the policy (TR-DPO, arXiv:2404.09656)."""

    def __init__(self, scorer: Scorer, groups: ProcessGroupCollection):
        self.scorer, self.groups = scorer, groups

    def own(self, step: Step) -> list[Tensor]:
        """See :class:`Reference`."""
        return self.scorer.sums(step.batches)

    def mismatched(self, step: Step) -> Tensor:
        """See :class:`Reference`."""
        return whole_step(self.scorer.sums(step.mismatched.batches), step.mismatched, step, self.groups)

    @torch.no_grad()
    def move(self, policy: Sequence[nn.Module], alpha: float) -> None:
        """Set every parameter to ``alpha x policy + (1 - alpha) x its own``."""
        for chunk, other in zip(self.scorer.chunks, policy, strict=True):
            for own, new in zip(chunk.parameters(), other.parameters(), strict=True):
                own.lerp_(new.to(own.dtype), alpha)


class Cached:
    """A reference that was run once: its log-probs are columns of numbers.

    Args:
        mismatched: mean over the completions of each step, of prompts with other samples' completions.
    """

    def __init__(self, mismatched: np.ndarray | None = None):
        self._mismatched = mismatched

    def own(self, step: Step) -> None:
        """See :class:`Reference`: the packs were made with them."""

    def mismatched(self, step: Step) -> Tensor:
        """See :class:`Reference`. Only the mean is known, and only it counts: each is given the mean."""
        return torch.full((len(step.stored_C),), float(self._mismatched[step.number]), dtype=torch.float64)
