"""Score completions under a policy on any layout: a number for each completion of a table of samples.

Shapes: C completions of a table, N scored rows of a pack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.packing import PackOptions
from megatron_align.data.batching.prefetch import Prefetcher
from megatron_align.data.batching.sampler import EpochOrder, SampleSteps
from megatron_align.data.batching.step_batches import StepBatches
from megatron_align.data.sample_table import SampleTable
from megatron_align.model.policy import Policy
from megatron_align.objectives.base import completion_sums
from megatron_align.objectives.sft import SFT, SFTOptions
from megatron_align.records import LossRows
from megatron_align.training.batches import data_rank, pack_multiples
from megatron_align.training.scoring import Scorer, gather_step
from megatron_align.training.watchdog import Watchdog

SAMPLES = 64  # of each data-parallel rank in one pass through the pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionScorer:
    """Scores completions under the weights that ``chunks`` hold when it is called.

    Args:
        chunks: this rank's.
        parallel: the layout.
        groups: of this rank.
        watchdog: of this rank.
        sequence_length: capacity of a pack.
    """

    chunks: Sequence[Policy]
    parallel: ParallelConfig
    groups: ProcessGroupCollection
    watchdog: Watchdog
    sequence_length: int

    def __call__(self, table: SampleTable, doing: str, advance: Callable[[int, int], None]) -> np.ndarray:
        """Return the summed log-prob of each completion, of a reward model its reward: ``[C]`` fp64. Collective.

        Args:
            table: samples that fit into a pack; their order does not change the numbers.
            doing: name of the phase.
            advance: called with the number of samples of each pass.
        """
        shape = self.chunks[0].shape
        order = EpochOrder(table.sources, [1.0] * (int(table.sources.max()) + 1), shuffle=False)
        steps = SampleSteps(order, SAMPLES * self.groups.dp.size(), epochs=1)
        multiple, micro_batches = pack_multiples(self.parallel)
        options = PackOptions(
            capacity=self.sequence_length, multiple=multiple, micro_batch_multiple=micro_batches
        )
        batches = StepBatches(table, steps, options, data_rank(shape, self.parallel, self.groups), "sample")
        scorer = Scorer(self.chunks, SFT(SFTOptions()))
        of_pack = _rewards if shape.is_reward else _sums
        values_C = np.full(int(table.completion_offsets[-1]), np.nan)
        with Prefetcher(range(batches.steps), batches.step) as made:
            for step in made:
                self.watchdog.report(f"{doing}, batch {step.number + 1} of {batches.steps}")
                of_packs = scorer.collect(step.batches, of_pack)
                values_C[step.stored_C] = gather_step(of_packs, step.packs, step, self.groups).numpy()
                advance(step.counts.samples, 0)
        return values_C


def _sums(logprobs_N: Tensor, rows: LossRows) -> Tensor:
    """Sum in fp64: the sum of a thousand fp32 log-probs would lose two digits."""
    return completion_sums(logprobs_N.double(), rows)


def _rewards(rewards_C: Tensor, rows: LossRows) -> Tensor:
    return rewards_C
