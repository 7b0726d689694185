"""Record what the report's last stages did in the recipe and in its comparisons, from their files alone.

``python -m benchmarks.alignment --recipe runs/baichuan_alignment --compared runs/compare`` reads a finished recipe
(``examples.baichuan_alignment.run``) and comparison (``examples.baichuan_alignment.compare``) and appends rows to
``benchmarks/results/``:

- ``recipe.csv``: the share of right answers of every model and field;
- ``alignment_policies.csv``: that of each policy and seed, with the rewards, KL, seconds and memory of its training;
- ``alignment_rewards.csv``: accuracy and calibration of each reward model and seed, on pairs that it was trained on and
  on others. ``ece``: expected calibration error of the probability ``sigmoid(margin)`` that the chosen answer is the
  better one, 10 bins of equal width from 0.5 to 1; ``brier``: mean of ``(1 - sigmoid(margin))^2``; ``nll``: the loss of
  Bradley-Terry;
- ``alignment_passes.csv``: accuracy over the passes of their training.

The date of a row is that of the file it is from.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.rows import append, stamp
from examples.baichuan_alignment import compare
from examples.baichuan_alignment.compare_data import PAIRS, TRAINED
from examples.baichuan_alignment.questions import FIELDS
from examples.baichuan_alignment.results import read_models, read_scores

LAST = 10  # steps at the end of a training whose metrics are averaged
BINS = 10
Row = dict[str, object]


def calibration(margins: Sequence[float]) -> dict[str, float]:
    """Return accuracy and calibration of a reward model from the margins of pairs, chosen over rejected."""
    sure = [1 / (1 + math.exp(-abs(margin))) for margin in margins]  # of the answer that scores higher
    right = [margin > 0 for margin in margins]
    bins: list[list[int]] = [[] for _ in range(BINS)]
    for i, one in enumerate(sure):
        bins[min(BINS - 1, int((one - 0.5) * 2 * BINS))].append(i)
    gaps = [abs(sum(right[i] - sure[i] for i in members)) for members in bins]
    chosen = [one if good else 1 - one for one, good in zip(sure, right, strict=True)]
    return {
        "accuracy": statistics.fmean(right),
        "ece": sum(gaps) / len(margins),
        "brier": statistics.fmean((1 - one) ** 2 for one in chosen),
        "nll": statistics.fmean(math.log1p(math.exp(-abs(m))) + max(0.0, -m) for m in margins),
        "margin": statistics.fmean(margins),
    }


def recipe_rows(recipe: Path) -> Iterator[Row]:
    """Yield a row of each model of the recipe's table."""
    file = recipe / "evaluations" / "grpo" / "results.json"
    for model in read_models(recipe):
        shares = {field: f"{score.share:.4f}" for field, score in model.scores.items()}
        n = {score.n for score in model.scores.values()}
        yield {**_stamp(file), "what": model.what, "model": model.name, "n": max(n), **shares}


def policy_rows(recipe: Path, out: Path, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield a row of each policy and seed, the merged model first."""
    before = recipe / "evaluations" / compare.MERGED
    yield _policy("merged, before", "", before, [])
    for seed in seeds:
        for name in compare.POLICIES:
            own = compare.folder(out, name, seed)
            steps = _metrics(own)
            yield _policy(name, seed, own / "evaluation", steps)
            if name == compare.AUGMENTED:
                yield _policy(f"{name}, with PAS", seed, own / "augmented", [])


def _policy(name: str, seed: object, evaluation: Path, steps: list[dict[str, Any]]) -> Row:
    scores = read_scores(evaluation)
    trained = [row for row in steps if row.get("split") is None]
    memory = max((row["peak_memory_gb"] for row in steps if "peak_memory_gb" in row), default="")
    return {
        **_stamp(evaluation / "results.json"),
        "policy": name,
        "seed": seed,
        "steps": len(trained),
        "lr": trained[-1]["lr"] if trained else "",
        "n": scores[FIELDS[0]].n,
        **{field: f"{scores[field].share:.4f}" for field in FIELDS},
        "mean": f"{statistics.fmean(scores[field].share for field in FIELDS):.4f}",
        "first_reward": _mean(trained[:LAST], "reward"),
        "last_reward": _mean(trained[-LAST:], "reward"),
        "last_kl": _mean(trained[-LAST:], "kl"),
        "last_entropy": _mean(trained[-LAST:], "entropy"),
        "last_ptx_loss": _mean(trained[-LAST:], "ptx_loss"),
        "seconds_per_step": f"{statistics.median(row['step_seconds'] for row in trained):.2f}"
        if trained
        else "",
        "peak_memory_gb": f"{memory:.2f}" if memory else "",
    }


def reward_rows(out: Path, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield a row of each reward model, seed and set of pairs: of every field, and of all."""
    for seed in seeds:
        for name in compare.REWARDS:
            folder = compare.folder(out, name, seed) / "evaluation"
            for pairs, prefix in (("trained", TRAINED), ("held out", "")):
                of_fields = {f: _margins(folder / "items" / f"{prefix}{f}.jsonl") for f in FIELDS}
                every = [margin for margins in of_fields.values() for margin in margins]
                for field, margins in {**of_fields, "all": every}.items():
                    found = {key: f"{value:.4f}" for key, value in calibration(margins).items()}
                    yield {
                        **_stamp(folder / "results.json"),
                        "alpha": name.split()[-1],
                        "seed": seed,
                        "trained_pairs": PAIRS,
                        "steps": compare.REWARD_STEPS,
                        "batch": compare.REWARD_BATCH,
                        "pairs": pairs,
                        "field": field,
                        "n": len(margins),
                        **found,
                    }


def pass_rows(out: Path, seeds: Sequence[int]) -> Iterator[Row]:
    """Yield a row of each reward model, seed and pass over its pairs."""
    for seed in seeds:
        for name in compare.REWARDS:
            folder = compare.folder(out, name, seed)
            rows = _metrics(folder)
            trained = {row["step"]: row for row in rows if row.get("split") is None}
            for row in (row for row in rows if row.get("split") == "validation"):
                last = [trained[step] for step in range(row["step"] - compare.PASS + 1, row["step"] + 1)]
                yield {
                    **_stamp(folder / "metrics.jsonl"),
                    "alpha": name.split()[-1],
                    "seed": seed,
                    "trained_pairs": PAIRS,
                    "pass": row["step"] // compare.PASS,
                    "trained_accuracy": _mean(last, "accuracy"),
                    "held_out_accuracy": f"{row['accuracy']:.4f}",
                    "trained_loss": _mean(last, "loss"),
                    "held_out_loss": f"{row['loss']:.4f}",
                }


def _stamp(file: Path) -> dict[str, str]:
    made = datetime.date.fromtimestamp(file.stat().st_mtime)
    return {**stamp(), "date": made.isoformat()}


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def _margins(file: Path) -> list[float]:
    return [json.loads(line)["margin"] for line in file.read_text(encoding="utf-8").splitlines()]


def _mean(rows: Sequence[dict[str, Any]], name: str) -> str:
    """Return the mean of a metric; empty: the rows lack it."""
    values = [row[name] for row in rows if name in row]
    return f"{statistics.fmean(values):.4f}" if values else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read, print and append to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--recipe", type=Path, default=Path("runs/baichuan_alignment"), help="folder of a finished recipe")
    add("--compared", type=Path, default=Path("runs/compare"), help="folder of a comparison")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="of the comparison")
    parts = ("recipe", "policies", "rewards")
    add("--parts", nargs="+", choices=parts, default=parts, help="what is recorded (default: all)")
    options = parser.parse_args(arguments)
    recipe, out, seeds = options.recipe, options.compared, options.seeds
    if "recipe" in options.parts:
        append("recipe", list(recipe_rows(recipe)))
    if "policies" in options.parts:
        print("\n".join(compare.lines(compare.scores(recipe, out, seeds))))
        append("alignment_policies", list(policy_rows(recipe, out, seeds)))
    if "rewards" in options.parts:
        append("alignment_rewards", list(reward_rows(out, seeds)))
        append("alignment_passes", list(pass_rows(out, seeds)))


if __name__ == "__main__":
    main()
