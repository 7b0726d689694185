"""Samples to packs: one step's share of one data-parallel rank, with the global normaliser already in it.

Shapes: B samples of one step and C their completions, S samples of the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from megatron_align.config import DataConfig, DataSource, TrainConfig
from megatron_align.data.batching.collate import CompletionValues, pack
from megatron_align.data.batching.context_parts import ContextShare, deal
from megatron_align.data.batching.packing import StepPlan, attention_cost, plan_step
from megatron_align.data.batching.sampler import EpochOrder, SampleSteps, TokenSteps, passes_per_epoch
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.records import PackedBatch, Sample

Normalization = Literal["token", "sample", "pair", "example"]
Sources = str | Sequence[str | DataSource]


def row_weights(
    scored_counts_B: np.ndarray, normalization: Normalization, weights_B: np.ndarray | None = None
) -> np.ndarray:
    """Return the weight (float64) of one scored token of each sample; over the step they sum to 1.

    Args:
        scored_counts_B: scored tokens of each sample of the whole step, each at least 1.
        normalization: token: all scored tokens weigh the same; else all samples do (pairs, examples).
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


def require_room(store: TokenStore, data: DataConfig) -> None:
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


def scored_rows(store: TokenStore, samples_B: np.ndarray, score_prompt: bool) -> int:
    """Return the rows of some samples that are scored; ``score_prompt``: a prompt's too, once."""
    prompts_B = np.maximum(store.prompt_lengths[samples_B] - 1, 0) if score_prompt else 0
    return int((store.scored_counts[samples_B] + prompts_B).sum())


def seen_in_samples(store: TokenStore, shared: bool) -> np.ndarray:
    """Return the pairs of a token and a token it sees within each sample, int64[S], as :func:`visible_keys` has it."""
    own_C, prompt_S = store.all_completion_lengths, store.prompt_lengths
    prompt_C = np.repeat(prompt_S, store.completion_counts)
    seen_C = own_C * prompt_C + _triangle(own_C) if shared else _triangle(prompt_C + own_C)
    before = np.concatenate([[0], np.cumsum(seen_C)])
    return np.diff(before[store.completion_offsets]) + (_triangle(prompt_S) if shared else 0)


def _triangle(tokens: np.ndarray) -> np.ndarray:
    return tokens * (tokens + 1) // 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Whose packs are wanted.

    Args:
        ranks: data-parallel ranks
        rank: this data-parallel rank
        multiple: a pack's padded length is a multiple of this
        micro_batch_multiple: micro-batches per rank and step are a multiple of this
        context: whose part of each pack; None: no other rank shares it
    """

    ranks: int = 1
    rank: int = 0
    multiple: int = 1
    micro_batch_multiple: int = 1
    context: ContextShare | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCounts:
    """What a step holds, over all ranks."""

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
    places: list[np.ndarray]  # of each batch: where its completions stand among all completions of the step


@dataclass(frozen=True, slots=True)
class Step:
    """One step of one data-parallel rank."""

    number: int  # 0-based
    packs: Packs
    counts: StepCounts
    stored_C: np.ndarray  # int64: where each completion of the step stands in the store
    mismatched: Packs | None  # prompts with other samples' completions, if asked for

    @property
    def batches(self) -> list[PackedBatch]:
        """The micro-batches to train on."""
        return self.packs.batches


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
        mismatched: also pack each prompt with the completion of the sample before it in the step (the first
            one with the last's), as KTO's baseline wants it; data of single completions only.
        score_prompt: prompts are scored too, with the first completion, see :func:`.collate.pack`.
    """

    def __init__(  # noqa: PLR0913 - what a run knows before its first step; made once
        self,
        store: TokenStore,
        data: DataConfig,
        train: TrainConfig,
        sources: Sources,
        normalization: Normalization,
        share: Share,
        *,
        reference_C: np.ndarray | None = None,
        mismatched: bool = False,
        score_prompt: bool = False,
    ) -> None:
        self.store, self.data, self.share, self.normalization = store, data, share, normalization
        self._order = step_order(store, data, train, sources)
        self.steps: int = train.steps or self._order.steps
        self._laid_S = _laid_lengths(store, data)
        self._seen_S = seen_in_samples(store, data.share_prefix)
        self._reference_C, self._mismatched = reference_C, mismatched
        self._score_prompt = score_prompt

    def step(self, step: int) -> Step:
        """Return a 0-based step."""
        samples_B = self._order.samples(step)
        store, laid_B = self.store, self._laid_S[samples_B]
        plan = self._plan_of(samples_B)
        scored_B, weights_B = store.scored_counts[samples_B], store.weights[samples_B]
        row_weights_B = row_weights(scored_B, self.normalization, weights_B)
        completions = _StepCompletions(store, samples_B, self._reference_C, self._score_prompt)
        mine = plan.packs[self.share.rank]
        places = [completions.places(positions) for positions in mine]
        batches = [
            pack(
                [store.sample(int(i)) for i in samples_B[positions]],
                row_weights_B[positions],
                plan.tokens,
                values=completions.values(place),
                share_prefix=self.data.share_prefix,
                score_prompt=self._score_prompt,
            )
            for positions, place in zip(mine, places, strict=True)
        ]
        batches = [deal(batch, self.share.context) for batch in batches]
        counts = StepCounts(
            samples=len(samples_B),
            tokens=int(store.lengths[samples_B].sum()),
            laid_tokens=int(laid_B.sum()),
            padded_tokens=len(plan.packs) * len(batches) * plan.tokens,
            duplicated_tokens=int(store.duplicated_lengths[samples_B].sum()),
            scored_tokens=int(scored_B.sum()),
            scored_rows=scored_rows(store, samples_B, self._score_prompt),
            completions=len(completions.stored_C),
            visible_keys=int(self._seen_S[samples_B].sum()),
            weight=step_weight(scored_B, self.normalization, weights_B),
            micro_batches=len(batches),
        )
        mismatched = self._mismatches(samples_B) if self._mismatched else None
        return Step(step, Packs(batches, places), counts, completions.stored_C, mismatched)

    def stored(self, step: int) -> np.ndarray:
        """Return where each completion of a 0-based step stands in the store (int64)."""
        return _stored(self.store, self._order.samples(step))[0]

    def fingerprint(self, step: int) -> str:
        """Return what tells a 0-based step's samples and packs, of all ranks: the same on every rank."""
        samples_B = self._order.samples(step)
        plan = self._plan_of(samples_B)
        digest = hashlib.sha256(repr(plan.tokens).encode() + samples_B.tobytes())
        for positions in (positions for packs in plan.packs for positions in packs):
            digest.update(len(positions).to_bytes(8, "little") + positions.tobytes())
        return digest.hexdigest()

    def shortest(self, step: int, count: int) -> list[Sample]:
        """Return the shortest samples of a 0-based step, the same on every rank; fewer if the step has fewer."""
        samples_B = self._order.samples(step)
        order = np.argsort(self.store.lengths[samples_B], kind="stable")[:count]
        return [self.store.sample(int(i)) for i in samples_B[order]]

    def _plan_of(self, samples_B: np.ndarray) -> StepPlan:
        store = self.store
        costs_B = attention_cost(
            store.lengths[samples_B],
            store.prompt_lengths[samples_B],
            store.completion_counts[samples_B],
            self.data.share_prefix,
        )
        return self._plan(self._laid_S[samples_B], costs_B)

    def _plan(self, lengths_B: np.ndarray, costs_B: np.ndarray) -> StepPlan:
        return plan_step(
            lengths_B,
            self.share.ranks,
            self.data.sequence_length,
            self.share.multiple,
            self.data.packing,
            self.share.micro_batch_multiple,
            costs_B=costs_B,
        )

    def _mismatches(self, samples_B: np.ndarray) -> Packs:
        """Return this rank's packs of every prompt with its neighbour's completion, cut off at the capacity."""
        store, capacity = self.store, self.data.sequence_length
        others_B = np.roll(samples_B, 1)
        own_B = store.lengths[others_B] - store.prompt_lengths[others_B]
        lengths_B = np.minimum(store.prompt_lengths[samples_B] + own_B, capacity)
        plan = self._plan(lengths_B, lengths_B**2)
        places = plan.packs[self.share.rank]  # one completion per sample: its position is its place
        batches = [
            pack(
                [_mismatch(store, *pair, capacity) for pair in zip(samples_B[at], others_B[at], strict=True)],
                [0.0] * len(at),  # its log-probs are wanted, it has no loss
                plan.tokens,
            )
            for at in places
        ]
        return Packs([deal(batch, self.share.context) for batch in batches], places)


def _mismatch(store: TokenStore, one: int, other: int, capacity: int) -> Sample:
    """Return the prompt of one sample with the completion of another."""
    asked, answer = store.sample(int(one)), store.sample(int(other))
    prompt = asked.prompt_length
    tokens_L = np.concatenate([asked.tokens_L[:prompt], answer.tokens_L[answer.prompt_length :]])[:capacity]
    scored_L = np.concatenate([np.zeros(prompt, bool), answer.scored_L[answer.prompt_length :]])[:capacity]
    return Sample(tokens_L, scored_L, prompt_length=prompt, completion_lengths=(len(tokens_L) - prompt,))


def _stored(store: TokenStore, samples_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the completions of some samples stand in the store, and in their sample (0, 1, ...)."""
    counts_B = store.completion_counts[samples_B]
    starts_B = np.cumsum(counts_B) - counts_B
    nth_C = np.arange(counts_B.sum()) - np.repeat(starts_B, counts_B)
    return np.repeat(store.completion_offsets[samples_B], counts_B) + nth_C, nth_C


class _StepCompletions:
    """Index, weights and reference of every completion of a step: known from the store's index alone."""

    def __init__(
        self, store: TokenStore, samples_B: np.ndarray, reference_C: np.ndarray | None, score_prompt: bool
    ):
        counts_B = store.completion_counts[samples_B]
        self._starts = np.concatenate([[0], np.cumsum(counts_B)])
        self.stored_C, nth_C = _stored(store, samples_B)
        weights_B = store.weights[samples_B]
        own_C = np.repeat(weights_B, counts_B)
        rows_C = store.completion_scored[self.stored_C].copy()
        if score_prompt:
            rows_C[nth_C == 0] += np.maximum(store.prompt_lengths[samples_B] - 1, 0)
        tokens = np.bincount(nth_C, own_C * rows_C)
        self._weight_C, self._token_weight_C = own_C / weights_B.sum(), own_C / tokens[nth_C]
        self._columns: dict[str, np.ndarray] = {}
        if reference_C is not None:
            self._columns["reference_logprobs"] = reference_C[self.stored_C].astype(np.float32)

    def places(self, positions: np.ndarray) -> np.ndarray:
        """Return where the completions of these samples of the step stand among all of its completions."""
        mine = [np.arange(self._starts[i], self._starts[i + 1]) for i in positions]
        return np.concatenate([np.empty(0, np.int64), *mine])

    def values(self, places: np.ndarray) -> CompletionValues:
        """Return the values of the completions at these places."""
        columns = {name: column[places] for name, column in self._columns.items()}
        return CompletionValues(self._weight_C[places], self._token_weight_C[places], columns)
