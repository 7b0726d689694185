"""Samples to packs: one step's share of one data-parallel rank, with the global normaliser already in it.

Shapes: T tokens of one pack, N scored rows of one pack, L tokens of one sample, B samples of one step,
S samples of the store.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from megatron_align.config import DataConfig, DataSource, TrainConfig
from megatron_align.data.order import EpochOrder, SampleSteps, TokenSteps, passes_per_epoch
from megatron_align.data.plan import attention_cost, plan_step
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.kernels.packed_attention import PackedLayout
from megatron_align.records import LossRows, PackedBatch, Sample

Normalization = Literal["token", "sample"]
Sources = str | Sequence[str | DataSource]
PAD_ID = 0  # any id will do: padding is seen by nobody and never scored


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


def pack(
    samples: Sequence[Sample],
    weights: Sequence[float],
    tokens: int,
    *,
    share_prefix: bool = True,
    pad_id: int = PAD_ID,
) -> PackedBatch:
    """Lay samples one after the other and name what is scored.

    A sample with several completions is one group, ``prompt | completion | completion ...``: positions of each
    completion go on after the prompt, and the row of the last prompt token appears once per completion, as it
    predicts the first token of each. Without ``share_prefix`` the same completions lie there as documents,
    ``prompt completion | prompt completion ...``: the same targets in the same order, from other rows.

    ``sequence_N`` counts the completions of the pack: 0, 1, ... in order of the samples and, within a sample, of
    its completions. A chat sample is one completion.

    Args:
        samples: perhaps none (a pack of padding).
        weights: weight of one scored token of each sample.
        tokens: T, at least the samples' tokens; the rest is padding.
        share_prefix: several completions share one prompt; False: each has its own copy.
        pad_id: token id of the padding.

    Raises:
        ValueError: if the samples are longer than ``tokens``, or a token is scored that nothing predicts.
    """
    groups: list[tuple[int, tuple[int, ...]]] = []
    token, position, weight = [np.empty(0, np.int64)], [np.empty(0, np.int64)], [np.empty(0)]
    row, target, sequence = ([np.empty(0, np.int64)] for _ in range(3))
    start, completions = 0, 0
    for sample, one in zip(samples, weights, strict=True):
        for piece in _pieces(sample, share_prefix):
            groups.append(piece.group)
            token.append(piece.tokens)
            position.append(piece.positions)
            row.append(start + piece.rows)
            target.append(piece.targets)
            sequence.append(completions + piece.completions)
            weight.append(np.full(len(piece.rows), one))
            start += len(piece.tokens)
            completions += len(piece.group[1])
    layout = PackedLayout.from_groups(groups, total=tokens)
    tokens_T = np.full(tokens, pad_id, dtype=np.int64)
    positions_T = np.zeros(tokens, dtype=np.int64)
    tokens_T[:start], positions_T[:start] = np.concatenate(token), np.concatenate(position)
    weight_N = np.concatenate(weight).astype(np.float32)
    rows = LossRows(*map(torch.from_numpy, (*map(np.concatenate, (row, target, sequence)), weight_N)))
    return PackedBatch(torch.from_numpy(tokens_T), torch.from_numpy(positions_T), layout, rows)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A prompt with its completions as it will lie in a pack; rows count from its first token."""

    group: tuple[int, tuple[int, ...]]
    tokens: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    targets: np.ndarray
    completions: np.ndarray  # of each row, within the piece


def _pieces(sample: Sample, share_prefix: bool) -> list[_Piece]:
    """Return the sample as one piece, or as one document per completion."""
    tokens, prompt = sample.tokens_L.astype(np.int64), sample.prompt_length
    scored = np.flatnonzero(sample.scored_L)
    if len(sample.completion_lengths) < 2:
        if sample.scored_L[:1].any():
            raise ValueError(
                "pack needs scored tokens with a token before them, got a sample's first one scored"
            )
        places = np.arange(len(tokens))
        return [
            _Piece((0, (len(tokens),)), tokens, places, scored - 1, tokens[scored], np.zeros_like(scored))
        ]
    lengths = np.array(sample.completion_lengths)
    starts = prompt + np.cumsum(lengths) - lengths
    if prompt + lengths.sum() != len(tokens) or (len(scored) and scored[0] < prompt):
        raise ValueError(
            f"pack needs a prompt, never scored, and completions that fill the sample; got {prompt} + "
            f"{list(sample.completion_lengths)} of {len(tokens)} tokens, scored from {scored[:1]}"
        )
    if prompt == 0 and sample.scored_L[starts[lengths > 0]].any():
        raise ValueError("pack needs a prompt before a completion's first token, if it is scored; got none")
    if share_prefix:
        which = np.searchsorted(starts + lengths, scored, side="right")
        rows = np.where(scored == starts[which], prompt - 1, scored - 1)
        inside = [prompt + np.arange(length) for length in lengths]
        positions = np.concatenate([np.arange(prompt), *inside])
        return [_Piece((prompt, sample.completion_lengths), tokens, positions, rows, tokens[scored], which)]
    alone = []
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        document = np.concatenate([tokens[:prompt], tokens[start : start + length]])
        own = prompt + np.flatnonzero(sample.scored_L[start : start + length])
        group, places = (0, (len(document),)), np.arange(len(document))
        alone.append(_Piece(group, document, places, own - 1, document[own], np.zeros_like(own)))
    return alone


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
    """

    def __init__(
        self,
        store: TokenStore,
        data: DataConfig,
        train: TrainConfig,
        sources: Sources,
        normalization: Normalization,
        share: Share,
    ) -> None:
        self.store, self.data, self.share, self.normalization = store, data, share, normalization
        self._order = step_order(store, data, train, sources)
        self.steps: int = train.steps or self._order.steps
        self._laid_S = _laid_lengths(store, data)

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
        batches = [
            pack(
                [store.sample(int(i)) for i in samples_B[positions]],
                row_weights_B[positions],
                plan.tokens,
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
