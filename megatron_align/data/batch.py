"""Samples to packs: one step's share of one data-parallel rank, with the global normaliser already in it.

Shapes: B samples of one step and C their completions, S samples of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_align.config import DataConfig, DataSource, TrainConfig
from megatron_align.data.order import EpochOrder, SampleSteps, TokenSteps, passes_per_epoch
from megatron_align.data.pack import Columns, pack
from megatron_align.data.plan import attention_cost, plan_step
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.records import PackedBatch

Normalization = Literal["token", "sample"]
Sources = str | Sequence[str | DataSource]


def row_weights(
    scored_counts_B: np.ndarray, normalization: Normalization, weights_B: np.ndarray | None = None
) -> np.ndarray:
    """Return the weight (float64) of one scored token of each sample; over the step they sum to 1.

    Args:
        scored_counts_B: scored tokens of each sample of the whole step, each at least 1.
        normalization: token: all scored tokens weigh the same; sample: all samples do.
        weights_B: of each sample, which multiplies its part: a sample of weight 2 counts as if it were in the
            step twice. Default: 1.

    Raises:
        ValueError: if the weights are negative or all 0.
    """
    counts_B = np.asarray(scored_counts_B, dtype=np.float64)
    weights_B = np.ones(len(counts_B)) if weights_B is None else np.asarray(weights_B, dtype=np.float64)
    if weights_B.min() < 0 or weights_B.max() == 0:
        raise ValueError(
            f"row_weights needs weights of at least 0, not all 0; got {weights_B.min()} to {weights_B.max()}"
        )
    total = step_weight(counts_B, normalization, weights_B)
    return weights_B / (total if normalization == "token" else total * counts_B)


def step_weight(scored_counts_B: np.ndarray, normalization: Normalization, weights_B: np.ndarray) -> float:
    """Return what a step's loss is divided by: the total weight of its scored tokens, or of its samples."""
    return float((scored_counts_B * weights_B if normalization == "token" else weights_B).sum())


def step_order(
    store: TokenStore, data: DataConfig, train: TrainConfig, sources: Sources
) -> SampleSteps | TokenSteps:
    """Return which samples of a store make each step of a run; the same on any layout.

    Args:
        store: tokenised samples.
        data: shuffle is read.
        train: global_batch_size or global_batch_tokens, seed and epochs are read.
        sources: what the store was made of, with the weights of the mixture: ``data.train`` or
            ``data.validation``.
    """
    order = EpochOrder(store.sources, passes_per_epoch(sources), train.seed, data.shuffle)
    if train.global_batch_tokens is not None:
        return TokenSteps(order, store.lengths, train.global_batch_tokens, train.epochs)
    return SampleSteps(order, train.global_batch_size, train.epochs)


def need_room(store: TokenStore, data: DataConfig) -> None:
    """Check that every sample fits into a pack.

    Raises:
        InputError: if repeated prompts (``data.share_prefix: false``) make one too long.
    """
    longest = int(_laid_lengths(store, data).max())
    if longest > data.sequence_length:
        raise InputError(
            f"data.share_prefix: false needs every sample within data.sequence_length = {data.sequence_length} "
            f"tokens with its prompt repeated for each completion, got {longest}"
        )


def _laid_lengths(store: TokenStore, data: DataConfig) -> np.ndarray:
    """Return the tokens (int64[S]) that each sample takes in a pack."""
    return store.lengths if data.share_prefix else store.duplicated_lengths


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
    tokens: int  # of samples, a prompt counted once
    laid_tokens: int  # in packs: prompts that are not shared count each time
    padded_tokens: int  # computed, padding included
    scored_tokens: int
    weight: float  # what the loss was divided by, see step_weight
    micro_batches: int  # per rank


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one data-parallel rank."""

    batches: list[PackedBatch]  # its micro-batches, all of one padded length
    counts: StepCounts


class StepBatches:
    """The steps of a run over one store, as packs of one data-parallel rank.

    Args:
        store: tokenised samples.
        data: sequence_length, packing, shuffle and share_prefix are read.
        train: global_batch_size or global_batch_tokens, seed, steps and epochs are read.
        sources: what the store was made of, see :func:`step_order`.
        normalization: what weighs the same, see :func:`row_weights`.
        share: whose packs.
        reference_C: summed log-prob of each completion of the store under the reference.
    """

    def __init__(  # noqa: PLR0913 - what a run knows before its first step; made once
        self,
        store: TokenStore,
        data: DataConfig,
        train: TrainConfig,
        sources: Sources,
        normalization: Normalization,
        share: Share,
        reference_C: np.ndarray | None = None,
    ) -> None:
        self.store, self.data, self.share, self.normalization = store, data, share, normalization
        self._order = step_order(store, data, train, sources)
        self.steps: int = train.steps or self._order.steps
        self._laid_S = _laid_lengths(store, data)
        self._reference_C = reference_C

    def step(self, step: int) -> Step:
        """Return a 0-based step."""
        samples_B = self._order.samples(step)
        store, laid_B = self.store, self._laid_S[samples_B]
        plan = plan_step(
            laid_B,
            self.share.ranks,
            self.data.sequence_length,
            self.share.multiple,
            self.data.packing,
            self.share.micro_batch_multiple,
            costs_B=attention_cost(
                store.lengths[samples_B],
                store.prompt_lengths[samples_B],
                store.completion_counts[samples_B],
                self.data.share_prefix,
            ),
        )
        scored_B, weights_B = store.scored_counts[samples_B], store.weights[samples_B]
        row_weights_B = row_weights(scored_B, self.normalization, weights_B)
        columns = _StepColumns(store, samples_B, self._reference_C)
        batches = [
            pack(
                [store.sample(int(i)) for i in samples_B[positions]],
                row_weights_B[positions],
                plan.tokens,
                columns=columns.of(positions),
                share_prefix=self.data.share_prefix,
            )
            for positions in plan.packs[self.share.rank]
        ]
        counts = StepCounts(
            samples=len(samples_B),
            tokens=int(store.lengths[samples_B].sum()),
            laid_tokens=int(laid_B.sum()),
            padded_tokens=len(plan.packs) * len(batches) * plan.tokens,
            scored_tokens=int(scored_B.sum()),
            weight=step_weight(scored_B, self.normalization, weights_B),
            micro_batches=len(batches),
        )
        return Step(batches, counts)


class _StepColumns:
    """Weights and reference of every completion of a step: known from the store's index alone."""

    def __init__(self, store: TokenStore, samples_B: np.ndarray, reference_C: np.ndarray | None):
        counts_B = store.completion_counts[samples_B]
        self._starts = np.concatenate([[0], np.cumsum(counts_B)])
        place_C = np.arange(self._starts[-1]) - np.repeat(self._starts[:-1], counts_B)
        stored_C = np.repeat(store.completion_offsets[samples_B], counts_B) + place_C
        weights_B = store.weights[samples_B]
        own_C = np.repeat(weights_B, counts_B)
        tokens = np.bincount(place_C, own_C * store.completion_scored[stored_C])
        self._columns = (
            own_C / weights_B.sum(),
            own_C / tokens[place_C],
            np.full(len(stored_C), np.nan) if reference_C is None else reference_C[stored_C],
        )

    def of(self, positions: np.ndarray) -> Columns:
        """Return the columns of the samples at these positions of the step."""
        mine = [np.arange(self._starts[i], self._starts[i + 1]) for i in positions]
        at = np.concatenate([np.empty(0, np.int64), *mine])
        return Columns(*(column[at] for column in self._columns))
