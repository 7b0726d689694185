"""Score completions under a policy on any layout: a number for each completion of a table of samples.

Shapes: C completions of a table, N scored rows of a pack, K numbers of each completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.config import ParallelConfig
from megatron_align.data.batching.packing import PackOptions, packed_lengths
from megatron_align.data.batching.prefetch import Prefetcher
from megatron_align.data.batching.sampler import EpochOrder, SampleSteps
from megatron_align.data.batching.step_batches import StepBatches
from megatron_align.data.sample_table import SampleTable
from megatron_align.model.policy import Policy
from megatron_align.objectives.base import completion_sums
from megatron_align.objectives.sft import SFT, SFTOptions
from megatron_align.records import LossRows
from megatron_align.training.batches import data_rank, pack_multiples, pin_step
from megatron_align.training.scoring import Scorer, gather_step
from megatron_align.training.watchdog import Watchdog

Advance = Callable[[int, int], None]  # samples done since the last call, and 0
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

    def __call__(self, table: SampleTable, doing: str, advance: Advance) -> np.ndarray:
        """Return the summed log-prob of each completion, of a reward model its reward: ``[C]`` fp64. Collective.

        Args:
            table: samples that fit into a pack; their order does not change the numbers.
            doing: name of the phase.
            advance: called with the number of samples of each pass.
        """
        of_pack = _rewards if self.chunks[0].shape.is_reward else _sums
        scorer = Scorer(self.chunks, SFT(SFTOptions()))
        return self._columns(scorer, of_pack, 1, table, (doing, advance))[0]

    def with_greedy(self, table: SampleTable, doing: str, advance: Advance) -> tuple[np.ndarray, np.ndarray]:
        """Return the summed log-prob of each completion, and whether greedy decoding would write it: ``[C]`` each.

        Arguments as of a call. Collective.
        """
        scorer = Scorer(self.chunks, SFT(SFTOptions()), row_score="likeliest")
        sums_C, others_C = self._columns(scorer, _sums_and_others, 2, table, (doing, advance))
        return sums_C, others_C == 0

    def _columns(
        self,
        scorer: Scorer,
        of_pack: Callable[[Tensor, LossRows], Tensor],
        count: int,
        table: SampleTable,
        shown: tuple[str, Advance],
    ) -> np.ndarray:
        """Return ``[count, C]``: what ``of_pack`` makes of each pack, in the table's order."""
        doing, advance = shown
        shape = self.chunks[0].shape
        order = EpochOrder(table.sources, [1.0] * (int(table.sources.max()) + 1), shuffle=False)
        steps = SampleSteps(order, SAMPLES * self.groups.dp.size(), epochs=1)
        kernels = self.chunks[0].config.kernels
        multiple, micro_batches = pack_multiples(self.parallel, kernels.fp8)
        share = not kernels.attends_by_document
        options = PackOptions(
            # Copies of a prompt may need more than the samples that were checked to fit.
            capacity=max(self.sequence_length, int(packed_lengths(table, share).max(initial=0))),
            share_prefix=share,
            multiple=multiple,
            micro_batch_multiple=micro_batches,
        )
        batches = StepBatches(table, steps, options, data_rank(shape, self.parallel, self.groups), "sample")
        values = np.full((count, int(table.completion_offsets[-1])), np.nan)
        with Prefetcher(range(batches.steps), lambda step: pin_step(batches.step(step))) as made:
            for step in made:
                self.watchdog.report(f"{doing}, batch {step.number + 1} of {batches.steps}")
                of_packs = scorer.collect(step.batches, of_pack)
                for k in range(count):
                    of_column = [of_pack_KC[k] for of_pack_KC in of_packs]
                    gathered_S = gather_step(of_column, step.packs, step, self.groups)
                    values[k, step.stored_C] = gathered_S.numpy()
                advance(step.counts.samples, 0)
        return values


def _sums(logprobs_N: Tensor, rows: LossRows) -> Tensor:
    """Sum in fp64: the sum of a thousand fp32 log-probs would lose two digits."""
    return completion_sums(logprobs_N.double(), rows)[None]


def _sums_and_others(values_2N: Tensor, rows: LossRows) -> Tensor:
    """Return summed log-probs, and how many targets are not the likeliest token."""
    logprobs_N, likeliest_N = values_2N.double()
    return torch.stack([completion_sums(column_N, rows) for column_N in (logprobs_N, 1 - likeliest_N)])


def _rewards(rewards_C: Tensor, rows: LossRows) -> Tensor:
    return rewards_C[None]
