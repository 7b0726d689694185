"""No-grad pre-pass of a step: reference log-probs and batch statistics (KTO baseline, AOT sort, BCO mean), entropies.

Shapes: C completions and N tokens of one pack, S completions of a step, over all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.data.batching.step_batches import Step
from megatron_align.objectives.base import Need, Objective, StepSums
from megatron_align.records import Columns, PackedBatch
from megatron_align.training.reference.logprobs import Reference, ZeroReference
from megatron_align.training.scoring import Scorer, gather_columns, gather_tokens, mismatched_sums


class PrePass:
    """Adds what a step's loss needs to its packs.

    Args:
        policy: scores under the model that is trained.
        objective: its ``needs`` are computed.
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
        """Return the step's micro-batches, ready for their loss. Collective."""
        batches = step.batches
        sums = (
            "reference_logprobs" in self.objective.needs
        )  # of completions; rollouts come with those of tokens
        if sums and self.reference is not None and (logprobs := self.reference.step_logprobs(step)):
            batches = [
                _with_columns(batch, {"reference_logprobs": sums_C})
                for batch, sums_C in zip(batches, logprobs, strict=True)
            ]
        if "token_entropies" in self.objective.needs:
            batches = self._with_entropies(batches, training)
        seen: dict[Need, StepSums] = {}
        if "mismatched_logprobs" in self.objective.needs:
            seen["mismatched_logprobs"] = self._mismatched_sums(step)
        if "batch_statistics" in self.objective.needs:
            seen["batch_statistics"] = self._step_sums(batches, step, training)
        return self._with_statistics(batches, step, seen, training) if seen else batches

    def _with_entropies(self, batches: list[PackedBatch], training: bool) -> list[PackedBatch]:
        """Add the tokens' column ``entropy_shares``, and the number that the objective derives it from.

        The objective's ``entropy_bound`` says which of the step's tokens count; each of these has the same share, the
        others 0.
        """
        drops = training and batches[0].dropout_T is not None
        scorer = Scorer(self.policy.chunks, self.objective, row_score="entropy")
        of_packs = scorer.collect(
            batches,
            lambda values_2N, rows: values_2N[1].where(rows.columns["shares"] > 0, -1.0),
            training=drops,
        )
        every_S = gather_tokens(of_packs, self.groups)
        bound = self.objective.entropy_bound(every_S[~(every_S < 0)])
        count = int((every_S >= bound).sum())
        columns = [(pack_N.cpu().double() >= bound).double() / max(count, 1) for pack_N in of_packs]
        completed = []
        for i, batch in enumerate(batches):
            statistics = {**batch.rows.step_statistics, "entropy_threshold": bound}
            rows = replace(batch.rows, step_statistics=statistics)
            if columns:
                rows = replace(rows, columns=Columns({**rows.columns, "entropy_shares": columns[i].float()}))
            completed.append(replace(batch, rows=rows))
        return completed

    def _mismatched_sums(self, step: Step) -> StepSums:
        policy_S = mismatched_sums(self.policy, step, self.groups)
        reference_S = (self.reference or ZeroReference()).mismatched_logprobs(step)
        return StepSums(policy_S, reference_S, torch.ones_like(policy_S))

    def _step_sums(self, batches: list[PackedBatch], step: Step, training: bool) -> StepSums:
        drops = training and batches[0].dropout_T is not None  # the loss is then that of what training drops
        scores = self.policy.sums(batches, training=drops)
        completions = [batch.rows.completions for batch in batches] if scores else []
        references = [c.columns["reference_logprobs"] for c in completions] if self.objective.compares else []
        columns = (scores, references, [c.length_C for c in completions])
        return StepSums(*gather_columns(columns, step.packs, step, self.groups))

    def _with_statistics(
        self, batches: list[PackedBatch], step: Step, seen: Mapping[Need, StepSums], training: bool
    ) -> list[PackedBatch]:
        statistics = self.objective.observe_batch(seen, training=training)
        completed = []
        for batch, places in zip(batches, step.packs.completions, strict=True):
            index_C = torch.from_numpy(places)
            columns = {name: column_S[index_C].float() for name, column_S in statistics.columns.items()}
            rows = replace(batch.rows, step_statistics=statistics.values)
            completed.append(_with_columns(replace(batch, rows=rows), columns))
        return completed


def _with_columns(batch: PackedBatch, columns: Mapping[str, Tensor]) -> PackedBatch:
    """Return a pack with further columns ``[C]`` of its completions."""
    completions = batch.rows.completions
    completions = replace(completions, columns=Columns({**completions.columns, **columns}))
    return replace(batch, rows=replace(batch.rows, completions=completions))
