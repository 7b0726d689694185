"""Report on a token store in numbers (contents, lengths, packing), and show one sample with its trained tokens.

Shapes: B samples of one step, L tokens of one sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_align.data.batching.attention_cost import attention_cost
from megatron_align.data.batching.packing import PackOptions, packed_lengths, plan_step
from megatron_align.data.batching.sampler import EpochOrder
from megatron_align.data.store import TokenStore
from megatron_align.errors import InputError
from megatron_align.records import Sample

BINS = 60
STEPS = 50  # steps that are planned, spread over the epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingSetup:
    """The settings under which packing is measured.

    Args:
        ranks: data-parallel ranks
        pack_length: capacity of one pack, in tokens
        global_batch_size: samples of one step
        share_prefix: completions share the tokens of their prompt
        packing: several samples per pack
        seed: of the order of the samples
        passes: weight of each source; empty: 1 each
    """

    ranks: int = 1
    pack_length: int
    global_batch_size: int = 16
    share_prefix: bool = True
    packing: bool = True
    seed: int = 1234
    passes: tuple[float, ...] = ()


def report(store: TokenStore, setup: PackingSetup) -> dict[str, Any]:
    """Return every number of the report, ready for JSON.

    Raises:
        InputError: if the longest sample does not fit into ``setup.pack_length``.
    """
    manifest = store.manifest
    copied = ("samples", "tokens", "scored_tokens", "dropped", "truncated", "skipped", "examples", "sources")
    return {
        "store": str(store.path),
        "kind": store.kind,
        "shapes": manifest["shapes"],
        "sequence_length": manifest["sequence_length"],
        **{name: manifest[name] for name in copied},
        "dropped_lengths": manifest.get("dropped_lengths", {}),
        "trained_share": manifest["scored_tokens"] / manifest["tokens"],
        "duplicated_tokens": int(store.duplicated_lengths.sum()),
        "lengths": _distribution(store.lengths),
        "trained_per_sample": _distribution(store.scored_counts),
        "packing": _packing(store, setup),
    }


def _distribution(values: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(values, bins=min(BINS, int(np.ptp(values)) + 1))
    return {
        "mean": float(values.mean()),
        **{name: float(np.quantile(values, q)) for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))},
        "min": int(values.min()),
        "max": int(values.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _packing(store: TokenStore, setup: PackingSetup) -> dict[str, Any]:
    """Plan steps of one epoch and measure them."""
    lengths = packed_lengths(store, setup.share_prefix)
    longest = int(lengths.argmax())
    if lengths[longest] > setup.pack_length:
        raise InputError(
            f"{store.path}: a pack must hold the longest sample, of {lengths[longest]} tokens (sample {longest}), "
            f"got a length of {setup.pack_length}"
        )
    costs = attention_cost(store.lengths, store.prompt_lengths, store.completion_counts, setup.share_prefix)
    steps = [
        _step_figures(lengths[samples_B], costs[samples_B], setup)
        for samples_B in _sampled_steps(store, setup)
    ]
    tokens, padded, alone = (sum(step[name] for step in steps) for name in ("tokens", "padded", "alone"))
    return {
        "ranks": setup.ranks,
        "pack_length": setup.pack_length,
        "global_batch_size": setup.global_batch_size,
        "share_prefix": setup.share_prefix,
        "packing": setup.packing,
        "steps_planned": len(steps),
        "packs_per_step": float(np.mean([step["packs"] for step in steps])),
        "padded_length": float(np.mean([step["length"] for step in steps])),
        "fill": tokens / padded,
        "padding": 1 - tokens / padded,
        "fill_of_pack_length": tokens / sum(step["packs"] * setup.pack_length for step in steps),
        "fill_without_packing": tokens / alone,
        **{
            f"{what}_imbalance": {"mean": float(np.mean(values)), "max": float(np.max(values))}
            for what in ("tokens", "attention")
            for values in [[step[f"{what}_imbalance"] for step in steps]]
        },
    }


def _sampled_steps(store: TokenStore, setup: PackingSetup) -> Iterator[np.ndarray]:
    """Yield the samples of full steps, evenly spread over the first epoch; one step if the epoch is shorter."""
    passes = setup.passes or (1.0,) * len(store.manifest["sources"])
    order = EpochOrder(store.sources, passes, setup.seed)
    batch = setup.global_batch_size
    full = max(1, order.start(1) // batch)
    for step in np.unique(np.linspace(0, full - 1, min(STEPS, full)).astype(int)).tolist():
        yield order.between(step * batch, min((step + 1) * batch, max(order.start(1), 1)))


def _step_figures(lengths_B: np.ndarray, costs_B: np.ndarray, setup: PackingSetup) -> dict[str, float]:
    options = PackOptions(capacity=setup.pack_length, packing=setup.packing)
    plan = plan_step(lengths_B, setup.ranks, options, costs_B)
    packs = sum(len(rank) for rank in plan.packs)

    def imbalance(values_B: np.ndarray) -> float:
        of_rank = [sum(int(values_B[pack].sum()) for pack in rank) for rank in plan.packs]
        return max(of_rank) * len(of_rank) / sum(of_rank)

    return {
        "tokens": int(lengths_B.sum()),
        "packs": packs,
        "length": plan.tokens,
        "padded": packs * plan.tokens,
        "alone": len(lengths_B) * int(lengths_B.max()),  # a batch padded to its longest sample
        "tokens_imbalance": imbalance(lengths_B),
        "attention_imbalance": imbalance(costs_B),
    }


@dataclass(frozen=True, slots=True)
class SampleSection:
    """The prompt or one completion of a sample: runs of ``(text, trained)``."""

    title: str
    runs: list[tuple[str, bool]]


def rendered(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> list[SampleSection]:
    """Return the text of a sample as the model sees it, split where training starts and ends."""
    return [
        SampleSection(title, list(_runs(sample, begin, end, tokenizer)))
        for title, begin, end in _spans(sample)
        if end > begin
    ]


def _spans(sample: Sample) -> Iterator[tuple[str, int, int]]:
    if not sample.completion_lengths:
        yield "sample", 0, len(sample.tokens_L)
        return
    yield "prompt", 0, sample.prompt_length
    ends = np.cumsum([sample.prompt_length, *sample.completion_lengths]).tolist()
    for title, (begin, end) in zip(_titles(sample), pairwise(ends), strict=True):
        yield title, begin, end


def _titles(sample: Sample) -> Sequence[str]:
    count = len(sample.completion_lengths)
    if count == 2 and sample.label is None:  # a ranked list of two is a pair, best first
        titles = ["chosen", "rejected"]
    elif sample.label is not None:
        titles = ["completion, desirable" if sample.label else "completion, not desirable"]
    else:
        titles = [f"completion {i + 1}" for i in range(count)]
    scores = sample.scores or (math.nan,) * count
    return [
        title if math.isnan(score) else f"{title}, score {score:g}"
        for title, score in zip(titles, scores, strict=True)
    ]


def _runs(
    sample: Sample, begin: int, end: int, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, bool]]:
    scored = sample.scored_L[begin:end]
    edges = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), end - begin]
    for start, stop in pairwise(edges):
        ids = sample.tokens_L[begin + start : begin + stop].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield text, bool(scored[start])
