"""A step's samples as packs: the micro-batches of one data-parallel rank, with the global normaliser in their weights.

Shapes: B samples of one step and C their completions, S samples of the table.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_align.data.batching.attention_cost import visible_keys
from megatron_align.data.batching.collate import PackValues, pack
from megatron_align.data.batching.context_parts import ContextRank, take_part
from megatron_align.data.batching.normalization import (
    Normalization,
    completion_weights,
    row_weights,
    step_weight,
)
from megatron_align.data.batching.packing import PackOptions, packed_lengths, plan_samples, plan_step
from megatron_align.data.batching.sampler import StepOrder
from megatron_align.data.batching.token_keys import token_keys
from megatron_align.data.sample_table import SampleTable
from megatron_align.records import PackedBatch, Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class DataRank:
    """The rank whose packs are made.

    Args:
        ranks: data-parallel ranks
        rank: this data-parallel rank
        context: this context-parallel rank, which computes a part of each pack; None: packs are not split
    """

    ranks: int = 1
    rank: int = 0
    context: ContextRank | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """Sizes of a step, over all ranks."""

    samples: int
    tokens: int  # of samples, a prompt counted once
    laid_tokens: int  # in packs: prompts that are not shared count each time
    padded_tokens: int  # computed, padding included
    duplicated_tokens: int  # of samples, a prompt counted once per completion
    scored_tokens: int
    scored_rows: int  # scored tokens, and prompts where they are scored too
    completions: int
    visible_keys: int  # pairs of a token and a token it sees, without padding
    weight: float  # what the loss was divided by, see step_weight
    micro_batches: int  # per rank


@dataclass(frozen=True, slots=True)
class Packs:
    """Micro-batches of one data-parallel rank, all of one padded length."""

    batches: list[PackedBatch]
    completions: list[np.ndarray]  # of each batch: indices of its completions among all of the step


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one data-parallel rank."""

    number: int  # 0-based
    packs: Packs
    counts: StepCounts
    stored_C: np.ndarray  # int64: index of each completion of the step in the table
    mismatched: Packs | None  # prompts with other samples' completions, if requested

    @property
    def batches(self) -> list[PackedBatch]:
        """The micro-batches to train on."""
        return self.packs.batches


def scored_rows(table: SampleTable, samples_B: np.ndarray, score_prompt: bool) -> int:
    """Return the rows of some samples that are scored; ``score_prompt``: a prompt's too, once."""
    prompts_B = np.maximum(table.prompt_lengths[samples_B] - 1, 0) if score_prompt else 0
    return int((table.scored_counts[samples_B] + prompts_B).sum())


class StepBatches:
    """The steps of a run over one table of samples, as packs of one data-parallel rank.

    Args:
        table: tokenised samples.
        order: which samples make each step, see :func:`.sampler.step_order`.
        options: how samples are laid into packs.
        rank: whose packs are made.
        normalization: what weighs the same, see :func:`.normalization.row_weights`.
        mismatched: also pack each prompt with the completion of the sample before it in the step (the first
            one with the last's), as KTO's baseline wants it; data of single completions only.

    Attributes:
        steps: number of steps of the run.
        dropout_seed: of an adapter's dropout; None, at first: nothing is dropped.
    """

    def __init__(
        self,
        table: SampleTable,
        order: StepOrder,
        options: PackOptions,
        rank: DataRank,
        normalization: Normalization,
        *,
        mismatched: bool = False,
    ) -> None:
        self.table, self.options, self.rank, self.normalization = table, options, rank, normalization
        self.steps = order.steps
        self._order, self._mismatched = order, mismatched
        self.dropout_seed: int | None = None
        self._packed_S = packed_lengths(table, options.share_prefix)
        self._visible_S = visible_keys(
            table.prompt_lengths, table.completion_counts, table.completion_lengths, options.share_prefix
        )
        self._first_row_S = np.cumsum(table.scored_counts) - table.scored_counts

    def step(self, step: int) -> Step:
        """Return a 0-based step."""
        samples_B = self._order.samples(step)
        table, options = self.table, self.options
        plan = plan_samples(table, samples_B, self.rank.ranks, options)
        scored_B, weights_B = table.scored_counts[samples_B], table.weights[samples_B]
        row_weights_B = row_weights(scored_B, self.normalization, weights_B)
        completions = _StepCompletions(table, samples_B, options.score_prompt)
        own = plan.packs[self.rank.rank]
        indices = [completions.indices(positions) for positions in own]
        batches = [
            pack(
                [table.sample(int(i)) for i in samples_B[positions]],
                row_weights_B[positions],
                plan.tokens,
                values=completions.values(of_pack, self._row_columns(samples_B[positions])),
                share_prefix=options.share_prefix,
                score_prompt=options.score_prompt,
            )
            for positions, of_pack in zip(own, indices, strict=True)
        ]
        if self.dropout_seed is not None:
            batches = [
                replace(batch, dropout_T=self._dropout_keys(step, samples_B, positions, plan.tokens))
                for batch, positions in zip(batches, own, strict=True)
            ]
        counts = StepCounts(
            samples=len(samples_B),
            tokens=int(table.lengths[samples_B].sum()),
            laid_tokens=int(self._packed_S[samples_B].sum()),
            padded_tokens=len(plan.packs) * len(batches) * plan.tokens,
            duplicated_tokens=int(table.duplicated_lengths[samples_B].sum()),
            scored_tokens=int(scored_B.sum()),
            scored_rows=scored_rows(table, samples_B, options.score_prompt),
            completions=len(completions.stored_C),
            visible_keys=int(self._visible_S[samples_B].sum()),
            weight=step_weight(scored_B, self.normalization, weights_B),
            micro_batches=len(batches),
        )
        mismatched = self._mismatches(samples_B) if self._mismatched else None
        return Step(step, self._packs(batches, indices), counts, completions.stored_C, mismatched)

    def _dropout_keys(
        self, step: int, samples_B: np.ndarray, positions: np.ndarray, tokens: int
    ) -> torch.Tensor:
        assert self.dropout_seed is not None, "the caller checks it"
        samples = [self.table.sample(int(i)) for i in samples_B[positions]]
        shared = self.options.share_prefix
        keys_T = token_keys(self.dropout_seed, step, positions.tolist(), samples, tokens, shared)
        return torch.from_numpy(keys_T)

    def stored(self, step: int) -> np.ndarray:
        """Return the index of each completion of a 0-based step in the table (int64)."""
        return _stored(self.table, self._order.samples(step))[0]

    def fingerprint(self, step: int) -> str:
        """Return a hash of a 0-based step's samples and packs, of all ranks: the same on every rank."""
        samples_B = self._order.samples(step)
        plan = plan_samples(self.table, samples_B, self.rank.ranks, self.options)
        digest = hashlib.sha256(repr(plan.tokens).encode() + samples_B.tobytes())
        for positions in (positions for packs in plan.packs for positions in packs):
            digest.update(len(positions).to_bytes(8, "little") + positions.tobytes())
        return digest.hexdigest()

    def shortest(self, step: int, count: int) -> list[Sample]:
        """Return the shortest samples of a 0-based step, the same on every rank; fewer if the step has fewer."""
        samples_B = self._order.samples(step)
        order = np.argsort(self.table.lengths[samples_B], kind="stable")[:count]
        return [self.table.sample(int(i)) for i in samples_B[order]]

    def _packs(self, batches: list[PackedBatch], indices: list[np.ndarray]) -> Packs:
        return Packs([take_part(batch, self.rank.context) for batch in batches], indices)

    def _row_columns(self, samples_B: np.ndarray) -> dict[str, np.ndarray]:
        """Return the table's row columns of these samples' targets."""
        if not self.table.row_columns:
            return {}
        counts_B = self.table.scored_counts[samples_B]
        shift_B = self._first_row_S[samples_B] - (np.cumsum(counts_B) - counts_B)
        rows_N = np.arange(counts_B.sum()) + np.repeat(shift_B, counts_B)
        return {name: column[rows_N] for name, column in self.table.row_columns.items()}

    def _mismatches(self, samples_B: np.ndarray) -> Packs:
        """Return this rank's packs of every prompt with its neighbour's completion, cut off at the capacity."""
        table, capacity = self.table, self.options.capacity
        others_B = np.roll(samples_B, 1)
        own_B = table.lengths[others_B] - table.prompt_lengths[others_B]
        lengths_B = np.minimum(table.prompt_lengths[samples_B] + own_B, capacity)
        plan = plan_step(lengths_B, self.rank.ranks, self.options, lengths_B**2)
        indices = plan.packs[self.rank.rank]  # one completion per sample: its index is the sample's
        batches = [
            pack(
                [_mismatch(table, *pair, capacity) for pair in zip(samples_B[at], others_B[at], strict=True)],
                [0.0] * len(at),  # only its log-probs are needed, it has no loss
                plan.tokens,
            )
            for at in indices
        ]
        return self._packs(batches, indices)


def _mismatch(table: SampleTable, one: int, other: int, capacity: int) -> Sample:
    """Return the prompt of one sample with the completion of another."""
    question, answer = table.sample(int(one)), table.sample(int(other))
    prompt = question.prompt_length
    tokens_L = np.concatenate([question.tokens_L[:prompt], answer.tokens_L[answer.prompt_length :]])[
        :capacity
    ]
    scored_L = np.concatenate([np.zeros(prompt, bool), answer.scored_L[answer.prompt_length :]])[:capacity]
    return Sample(tokens_L, scored_L, prompt_length=prompt, completion_lengths=(len(tokens_L) - prompt,))


def _stored(table: SampleTable, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of some samples' completions in the table, and in their sample (0, 1, ...)."""
    counts_B = table.completion_counts[samples_B]
    starts_B = np.cumsum(counts_B) - counts_B
    nth_C = np.arange(counts_B.sum()) - np.repeat(starts_B, counts_B)
    return np.repeat(table.completion_offsets[samples_B], counts_B) + nth_C, nth_C


class _StepCompletions:
    """Indices, weights and columns of every completion of a step, from the table's index alone."""

    def __init__(self, table: SampleTable, samples_B: np.ndarray, score_prompt: bool):
        counts_B = table.completion_counts[samples_B]
        self._starts = np.concatenate([[0], np.cumsum(counts_B)])
        self.stored_C, nth_C = _stored(table, samples_B)
        rows_C = table.completion_scored[self.stored_C].copy()
        if score_prompt:
            rows_C[nth_C == 0] += np.maximum(table.prompt_lengths[samples_B] - 1, 0)
        weights_B = table.weights[samples_B]
        self._weight_C, self._token_weight_C = completion_weights(weights_B, counts_B, rows_C)
        self._columns = {name: column[self.stored_C] for name, column in table.completion_columns.items()}

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Return the indices of these samples' completions among all of the step."""
        own = [np.arange(self._starts[i], self._starts[i + 1]) for i in positions]
        return np.concatenate([np.empty(0, np.int64), *own])

    def values(self, indices: np.ndarray, row_columns: dict[str, np.ndarray]) -> PackValues:
        """Return the values of a pack with these completions, and with these columns of its targets."""
        columns = {name: column[indices] for name, column in self._columns.items()}
        return PackValues(self._weight_C[indices], self._token_weight_C[indices], columns, row_columns)
