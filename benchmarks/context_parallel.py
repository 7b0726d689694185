"""Balance of attention work over context-parallel ranks, and the bytes they exchange; simulated, nothing is computed.

``python -m benchmarks.context_parallel`` prints the figures and appends rows to two files of ``benchmarks/results/``.

- ``context_parallel_balance.csv``: packs of a chat mix (lognormal lengths, packed as a step is), as documents and as
  preference pairs (half of each sample its prompt), split over the ranks in three ways: ``plain``, consecutive parts;
  ``zigzag``, parts r and 2 R - 1 - r of 2 R, as for one causal document; ``ours``, ``balanced_shards``. Work is
  max / mean over the ranks of visible (query, key) pairs: quantiles over packs and the worst pack.
- ``context_parallel_bytes.csv``: bytes that one rank moves per layer, forward and backward, by ``ulysses`` and by
  ``allgather``, and what ``auto`` picks. ``none``: its heads do not divide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.packing import draw, environment
from benchmarks.rows import record, stamp
from megatron_align.data.batching.context_split import attention_work, balanced_shards, contiguous_shards
from megatron_align.data.batching.packing import PackOptions, plan_step
from megatron_align.model.context_kind import (
    AttentionSplit,
    allgather_bytes,
    auto_context_kind,
    ulysses_bytes,
    ulysses_fits,
)

Groups = list[tuple[int, list[int]]]

CONTEXT = (2, 4, 8, 16)
TENSOR = (1, 2, 4, 8)
MODELS = {  # query heads, KV heads, head dim, of the models' config.json
    "Qwen2-7B": (28, 4, 128),
    "Qwen2-72B": (64, 8, 128),
    "Llama-3-8B": (32, 8, 128),
    "Llama-3-70B": (64, 8, 128),
}
BF16 = 2


def zigzag(tokens: int, ranks: int) -> np.ndarray:
    """Return the positions ``[R, Q]`` of each rank in the usual zigzag split of one causal document."""
    parts = np.arange(tokens).reshape(2, ranks, -1)
    return np.concatenate([parts[0], parts[1, ::-1]], axis=1)


def packs(steps: np.ndarray, capacity: int, multiple: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield the samples' lengths and T of every pack of all steps."""
    for lengths_B in steps:
        plan = plan_step(lengths_B, 1, PackOptions(capacity=capacity, multiple=multiple))
        for pack in plan.packs[0]:
            yield lengths_B[pack], plan.tokens


def documents(lengths: np.ndarray) -> Groups:
    """Return samples as plain documents."""
    return [(0, [length]) for length in lengths.tolist()]


def pairs(lengths: np.ndarray) -> Groups:
    """Return samples as preference pairs: half a prompt, two completions of a quarter."""
    return [(length - 2 * (length // 4), [length // 4] * 2) for length in lengths.tolist()]


def balance(
    steps: np.ndarray, capacity: int, ranks: int, as_groups: Callable[[np.ndarray], Groups]
) -> dict[str, object]:
    """Return the figures of one type of samples on ``ranks`` ranks."""
    imbalance: dict[str, list[float]] = {"plain": [], "zigzag": [], "ours": []}
    milliseconds, pieces = [], []
    for lengths, tokens in packs(steps, capacity, 2 * ranks):
        groups = as_groups(lengths)
        started = time.perf_counter()
        ours = balanced_shards(groups, tokens, ranks)
        milliseconds.append((time.perf_counter() - started) * 1e3)
        pieces.append((np.diff(ours) != 1).sum() / ranks + 1)
        cuts = {"plain": contiguous_shards(tokens, ranks), "zigzag": zigzag(tokens, ranks), "ours": ours}
        for name, positions_RQ in cuts.items():
            work_R = attention_work(groups, tokens)[positions_RQ].sum(1)
            imbalance[name].append(work_R.max() / work_R.mean())
    row: dict[str, object] = {"samples": as_groups.__name__, "context": ranks, "packs": len(pieces)}
    for name, values in imbalance.items():
        row |= {f"{name}_p{p}": f"{np.percentile(values, p):.3f}" for p in (20, 50, 80)}
        row[f"{name}_max"] = f"{max(values):.3f}"
    row |= {f"ours_ms_p{p}": f"{np.percentile(milliseconds, p):.2f}" for p in (20, 50, 80)}
    return row | {"ours_stretches_per_rank": f"{np.mean(pieces):.1f}"}


def moved(model: str, tensor: int, context: int, tokens: int) -> dict[str, object]:
    """Return the MiB that one rank moves per layer."""
    split = AttentionSplit(*MODELS[model], tensor, context)
    by_heads = f"{ulysses_bytes(split, tokens, BF16) / 2**20:.1f}" if ulysses_fits(split) else "none"
    return {
        "model": model,
        "tokens": tokens,
        "dtype": "bfloat16",
        "tensor": tensor,
        "context": context,
        "ulysses_mib": by_heads,
        "allgather_mib": f"{allgather_bytes(split, tokens, BF16) / 2**20:.1f}",
        "auto": auto_context_kind(*split),
    }


def main() -> None:
    """Simulate, print and append to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=512, help="global batch")
    parser.add_argument("--mean", type=float, default=815.0, help="mean tokens of a sample")
    parser.add_argument("--sigma", type=float, default=1.0, help="standard deviation of the log length")
    parser.add_argument("--capacity", type=int, default=16384)
    args = parser.parse_args()
    steps = draw(args.steps, args.samples, args.mean, args.sigma, args.capacity)
    where = {**environment(), "mean": f"{steps.mean():.0f}", "sigma": args.sigma, "capacity": args.capacity}
    rows = [
        {**where, **balance(steps, args.capacity, ranks, kind)}
        for kind in (documents, pairs)
        for ranks in CONTEXT
    ]
    record("context_parallel_balance", rows)
    bytes_moved = [
        {**stamp(), **moved(model, tensor, context, args.capacity)}
        for model in MODELS
        for tensor in TENSOR
        for context in CONTEXT
    ]
    record("context_parallel_bytes", bytes_moved)


if __name__ == "__main__":
    main()
