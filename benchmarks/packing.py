"""Share of useful tokens and balance over data-parallel ranks: our packs against padded rows, in one run.

``python -m benchmarks.packing`` draws steps of a chat mix (lognormal lengths), plans each for every data-parallel
size, prints a table and appends it to ``benchmarks/results/packing.csv``.

- share: tokens of samples / computed tokens. Ours: all packs of a step padded to one length. ``padded to the
  step's longest`` and ``padded in batches of 8``: one sample per row, as a padding collator builds them.
- tokens, cost: max / mean over the ranks of tokens and of attention cost (sum of length^2).
- bound: a limit that no step plan can beat. A pack is at least as long as the longest sample. However the k longest
  samples are placed on j <= k ranks, these cost at least as much as those samples and the shortest others that fill
  them up, where the other ranks stay within 1.02 of the mean tokens; the worst k counts. ``reached``: steps that
  reach 0.98, 1.02 and 1.05, of those whose bound allows it.
"""

from __future__ import annotations

import argparse
import os
import platform
import time

import numpy as np

from benchmarks.rows import append, stamp
from megatron_align.data.batching.packing import PackOptions, plan_step

RANKS = (1, 2, 4, 8, 16, 32, 64)
SHARE, TOKENS, COST = 0.98, 1.02, 1.05
ROWS = 8  # of a padded batch


def draw(steps: int, samples: int, mean: float, sigma: float, capacity: int) -> np.ndarray:
    """Return lognormal lengths (int64 [steps, samples]), cut off at 8 and at ``capacity``."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - sigma**2 / 2, sigma, (steps, samples))
    return np.clip(drawn, 8, capacity).astype(np.int64)


def measure(lengths_B: np.ndarray, ranks: int, capacity: int) -> dict[str, float]:
    """Return the figures of one step."""
    started = time.perf_counter()
    plan = plan_step(lengths_B, ranks, PackOptions(capacity=capacity))
    seconds = time.perf_counter() - started
    tokens = np.array([[lengths_B[pack].sum() for pack in rank] for rank in plan.packs])
    cost = np.array([sum((lengths_B[pack] ** 2).sum() for pack in rank) for rank in plan.packs])
    return {
        "micro_batches": tokens.shape[1],
        "share": tokens.sum() / (tokens.size * plan.tokens),
        "share_bound": min(1.0, tokens.mean() / lengths_B.max()),
        "tokens": tokens.sum(1).max() / tokens.sum(1).mean(),
        "tokens_bound": max(1.0, lengths_B.max() / tokens.sum(1).mean()),
        "cost": cost.max() / cost.mean(),
        "cost_bound": max(1.0, least_cost(lengths_B, ranks) / cost.mean()),
        "fill": tokens.sum() / (tokens.size * capacity),
        "ms": seconds * 1e3,
    }


def least_cost(lengths_B: np.ndarray, ranks: int) -> float:
    """Return a lower bound of the costliest rank's cost if no rank has over 1.02 of the mean tokens.

    The sample that fills a rank up may be cut here, so the bound can be a little below what complete samples reach.
    """
    shortest_first = np.sort(lengths_B).astype(float)
    tokens, cost = (np.concatenate([[0.0], np.cumsum(x)]) for x in (shortest_first, shortest_first**2))
    least = cost[-1] / ranks
    for k in range(1, min(ranks, len(lengths_B)) + 1):
        others = len(lengths_B) - k
        longest, spent = tokens[-1] - tokens[others], cost[-1] - cost[others]
        on = np.arange(1, k + 1)  # number of ranks
        room = TOKENS * tokens[-1] / ranks * on
        missing = np.clip(
            tokens[-1] - TOKENS * tokens[-1] / ranks * (ranks - on) - longest, 0, tokens[others]
        )
        filled = np.interp(missing, tokens[: others + 1], cost[: others + 1])
        each = (spent + filled) / on
        least = max(least, each[room >= longest].min(initial=np.inf if (room >= longest).any() else each[-1]))
    return least


def padded_share(lengths_B: np.ndarray, rows: int) -> float:
    """Return the share of useful tokens in batches of ``rows`` samples, each padded to its longest."""
    batches = np.split(lengths_B, np.arange(rows, len(lengths_B), rows))
    return lengths_B.sum() / sum(len(batch) * batch.max() for batch in batches)


def summarise(measured: list[dict[str, float]]) -> dict[str, object]:
    """Return the figures over all steps of one mix and size."""
    column = {name: np.array([step[name] for step in measured]) for name in measured[0]}
    reached = {}
    for name, good in (
        ("share", lambda x: x >= SHARE),
        ("tokens", lambda x: x <= TOKENS),
        ("cost", lambda x: x <= COST),
    ):
        possible = good(column[f"{name}_bound"])
        reached[f"{name}_reached"] = f"{(good(column[name]) & possible).sum()}/{possible.sum()}"
    ms = np.percentile(column["ms"], [20, 50, 80])
    return {
        "micro_batches": f"{np.median(column['micro_batches']):g}",
        **{
            name: f"{np.median(column[name]):.4f}"
            for name in ("share", "share_bound", "fill", "tokens", "tokens_bound")
        },
        **{name: f"{np.median(column[name]):.4f}" for name in ("cost", "cost_bound")},
        "cost_over_bound": f"{np.median(column['cost'] / column['cost_bound']):.4f}",
        **reached,
        **{f"plan_ms_p{p}": f"{value:.3f}" for p, value in zip((20, 50, 80), ms, strict=True)},
    }


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--samples", type=int, default=512, help="global batch")
    parser.add_argument("--mean", type=float, default=815.0, help="mean tokens of a sample")
    parser.add_argument(
        "--sigma", type=float, nargs="+", default=[0.8, 1.0], help="standard deviation of the log length"
    )
    parser.add_argument("--capacity", type=int, default=16384)
    args = parser.parse_args()
    rows = []
    for sigma in args.sigma:
        steps = draw(args.steps, args.samples, args.mean, sigma, args.capacity)
        longest, by_8 = (
            float(np.median([padded_share(lengths_B, n) for lengths_B in steps]))
            for n in (args.samples, ROWS)
        )
        plan_step(steps[0], 1, PackOptions(capacity=args.capacity))  # warm
        for ranks in RANKS:
            figures = summarise([measure(lengths_B, ranks, args.capacity) for lengths_B in steps])
            rows.append(
                {
                    **environment(),
                    "mean": f"{steps.mean():.0f}",
                    "sigma": sigma,
                    "capacity": args.capacity,
                    "samples": args.samples,
                    "steps": args.steps,
                    "data_parallel": ranks,
                    "padded_to_longest_share": f"{longest:.4f}",
                    "padded_by_8_share": f"{by_8:.4f}",
                    **figures,
                }
            )
    show(rows)
    for sigma in args.sigma:
        sizes = [row["data_parallel"] for row in rows if row["sigma"] == sigma and _allowed(row) == 0]
        print(f"sigma {sigma}: no step allows a cost of {COST} at data-parallel {sizes or 'none'}")
    append("packing", rows)


def _allowed(row: dict[str, object]) -> int:
    return int(str(row["cost_reached"]).partition("/")[2])


def environment() -> dict[str, str]:
    """Return the columns that say when and on what a row was measured."""
    return {
        **stamp(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def show(rows: list[dict[str, object]]) -> None:
    """Print the figures that change from row to row."""
    names = ["sigma", "data_parallel", *list(rows[0])[list(rows[0]).index("padded_to_longest_share") :]]
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in names}
    print("  ".join(name.rjust(widths[name]) for name in names))
    for row in rows:
        print("  ".join(str(row[name]).rjust(widths[name]) for name in names))


if __name__ == "__main__":
    main()
