"""Samples to packs: one step's share of one data-parallel rank, with the global normaliser already in it.

Shapes: T tokens of one pack, N scored rows of one pack, L tokens of one sample, B samples of one step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_align.config import DataConfig, TrainConfig
from megatron_align.data.plan import StepPlan, count_steps, plan_step, samples_of_step
from megatron_align.data.store import TokenStore
from megatron_align.kernels.packed_attention import PackedLayout
from megatron_align.records import LossRows, PackedBatch, Sample

Normalization = Literal["token", "sample"]
PAD_ID = 0  # any id will do: padding is seen by nobody and never scored


def row_weights(scored_counts_B: np.ndarray, normalization: Normalization) -> np.ndarray:
    """Return the weight (float64) of one scored token of each sample; over the step they sum to 1.

    Args:
        scored_counts_B: scored tokens of each sample of the whole step, each at least 1.
        normalization: token: all scored tokens weigh the same; sample: all samples do.
    """
    counts_B = np.asarray(scored_counts_B, dtype=np.float64)
    if normalization == "token":
        return np.full(len(counts_B), 1.0 / counts_B.sum())
    return 1.0 / (len(counts_B) * counts_B)


def pack(
    samples: Sequence[Sample], weights: Sequence[float], tokens: int, pad_id: int = PAD_ID
) -> PackedBatch:
    """Lay samples one after the other and name what is scored.

    Args:
        samples: perhaps none (a pack of padding).
        weights: weight of one scored token of each sample.
        tokens: T, at least the samples' tokens; the rest is padding.
        pad_id: token id of the padding.

    Raises:
        ValueError: if the samples are longer than ``tokens``.
    """
    lengths = [len(sample.tokens_L) for sample in samples]
    starts = np.cumsum([0, *lengths])
    layout = PackedLayout.from_lengths(lengths, total=tokens)
    tokens_T = np.full(tokens, pad_id, dtype=np.int64)
    positions_T = np.zeros(tokens, dtype=np.int64)
    row, sequence = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for i, (sample, start) in enumerate(zip(samples, starts[:-1], strict=True)):
        tokens_T[start : starts[i + 1]] = sample.tokens_L
        positions_T[start : starts[i + 1]] = np.arange(lengths[i])
        scored = np.flatnonzero(sample.scored_L)
        row.append(start + scored - 1)
        sequence.append(np.full(len(scored), i, dtype=np.int64))
    row_N, sequence_N = np.concatenate(row), np.concatenate(sequence)
    weight_N = np.asarray(weights, dtype=np.float32)[sequence_N]
    rows = LossRows(*map(torch.from_numpy, (row_N, tokens_T[row_N + 1], sequence_N, weight_N)))
    return PackedBatch(torch.from_numpy(tokens_T), torch.from_numpy(positions_T), layout, rows)


def steps_of_run(train: TrainConfig, samples: int) -> int:
    """Return the optimiser steps of a run over so many samples."""
    return train.steps or count_steps(samples, train.global_batch_size, train.epochs or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Whose packs are wanted.

    Args:
        ranks: data-parallel ranks
        rank: this data-parallel rank
        multiple: a pack's padded length is a multiple of this
        micro_batch_multiple: micro-batches per rank and step are a multiple of this
    """

    ranks: int = 1
    rank: int = 0
    multiple: int = 1
    micro_batch_multiple: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What a step holds, over all ranks."""

    samples: int
    tokens: int  # of samples
    padded_tokens: int  # computed, padding included
    scored_tokens: int
    micro_batches: int  # per rank


class StepBatches:
    """The steps of a run over one store, as packs of one data-parallel rank.

    Args:
        store: tokenised samples.
        data: sequence_length, packing and shuffle are read.
        train: global_batch_size, seed, steps and epochs are read.
        normalization: what weighs the same, see :func:`row_weights`.
        share: whose packs.
    """

    def __init__(
        self,
        store: TokenStore,
        data: DataConfig,
        train: TrainConfig,
        normalization: Normalization,
        share: Share,
    ) -> None:
        self.store, self.data, self.train = store, data, train
        self.normalization, self.share = normalization, share
        self.steps = steps_of_run(train, len(store))
        self._planned: tuple[int, np.ndarray, StepPlan] | None = None

    def batches(self, step: int) -> list[PackedBatch]:
        """Return this rank's micro-batches of a 0-based step, all of one padded length."""
        samples_B, plan = self._plan(step)
        weights_B = row_weights(self.store.scored_counts[samples_B], self.normalization)
        return [
            pack([self.store.sample(int(i)) for i in samples_B[positions]], weights_B[positions], plan.tokens)
            for positions in plan.packs[self.share.rank]
        ]

    def counts(self, step: int) -> StepCounts:
        """Return the counts of a step, known without reading a token."""
        samples_B, plan = self._plan(step)
        micro_batches = len(plan.packs[0])
        return StepCounts(
            samples=len(samples_B),
            tokens=int(self.store.lengths[samples_B].sum()),
            padded_tokens=len(plan.packs) * micro_batches * plan.tokens,
            scored_tokens=int(self.store.scored_counts[samples_B].sum()),
            micro_batches=micro_batches,
        )

    def _plan(self, step: int) -> tuple[np.ndarray, StepPlan]:
        if self._planned is None or self._planned[0] != step:
            samples_B = samples_of_step(
                step,
                total=len(self.store),
                batch=self.train.global_batch_size,
                seed=self.train.seed,
                shuffle=self.data.shuffle,
                epochs=self.train.epochs,
            )
            plan = plan_step(
                self.store.lengths[samples_B],
                self.share.ranks,
                self.data.sequence_length,
                self.share.multiple,
                self.data.packing,
                self.share.micro_batch_multiple,
            )
            self._planned = (step, samples_B, plan)
        return self._planned[1:]
