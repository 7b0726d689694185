"""Train with packs and with padded rows at equal steps and supervised tokens: time of a step, and held-out loss.

``python -m benchmarks.packing_training --data alpaca.json`` trains on real records, without ``--data`` on drawn ones of
lognormal lengths, once with ``data.packing: true`` and once with ``false``: one sample a row, padded to the longest of
its step. Both see the same records in the same order, so their losses must agree to rounding, which is checked. Rows go
to ``benchmarks/results/packing_training.csv``. A byte is a token; the model has under a million weights.

Packs of ours are isolated and share one normaliser. Where samples of a pack see each other (arXiv:2410.08081), or where
packs make steps of more samples, losses differ: neither is measured here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.rows import record, stamp
from benchmarks.steps.data import Record, real_records, text_of
from megatron_align import Trainer
from megatron_align.objectives.configuration import parse
from tests.harness.tiny import make_model, run_arguments

WAYS = {"packed": True, "padded": False}
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_attention_heads": 4,
}  # 4 layers, 0.8 million weights
CAPACITY = 2048  # tokens of a pack
TOLERANCE = 1e-4  # relative, of losses: sums in fp32 are taken in another order


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one training showed.

    Args:
        losses: of each step.
        held_out: loss on records that were not trained on, at the end.
        seconds: of each step but the first, by the clock.
        cpu_seconds: the same, of this process on all cores.
        tokens: of samples, of all steps.
        computed: the same with padding.
        supervised: tokens whose loss is taken.
    """

    losses: list[float]
    held_out: float
    seconds: list[float]
    cpu_seconds: list[float]
    tokens: int
    computed: int
    supervised: int


def drawn(draw: random.Random, count: int, mean: float, sigma: float, longest: int) -> list[Record]:
    """Return chats of drawn text whose lengths are lognormal, a quarter of each its prompt."""
    found = []
    for _ in range(count):
        length = round(draw.lognormvariate(math.log(mean) - sigma**2 / 2, sigma))
        length = min(longest, max(16, length))
        text = text_of(draw, 1.3 * length)[:length]  # at least 0.8 of 1.3 times as long
        found.append({"prompt": text[: length // 4], "completion": text[length // 4 :]})
    return found


def train(folder: Path, seed: int, packing: bool, options: argparse.Namespace) -> Result:
    """Train on the folder's records with the folder's model."""
    arguments = run_arguments(
        folder / "model",
        folder / "train.jsonl",
        folder / f"run_{packing}",
        data__validation=folder / "held_out.jsonl",
        data__sequence_length=CAPACITY,
        data__packing=packing,
        objective__name="sft",
        train__steps=options.steps,
        train__global_batch_size=options.batch,
        train__seed=seed,
    )
    reports, cpu_seconds = [], []
    with Trainer.open(parse(arguments)) as trainer, trainer.prefetched() as data:
        for step in data:
            began = time.process_time()
            trainer.begin_step()
            reports.append(trainer.train_step(step))
            cpu_seconds.append(time.process_time() - began)
        held_out = trainer.evaluate()["loss"]
    counts = [report.data.counts for report in reports]
    return Result(
        losses=[report.metrics["loss"] for report in reports],
        held_out=held_out,
        seconds=[report.seconds for report in reports[1:]],
        cpu_seconds=cpu_seconds[1:],
        tokens=sum(one.tokens for one in counts),
        computed=sum(one.padded_tokens for one in counts),
        supervised=sum(one.scored_tokens for one in counts),
    )


def compare(seed: int, options: argparse.Namespace) -> list[dict[str, object]]:
    """Train both ways with one seed; return a row of each.

    Raises:
        SystemExit: losses differ by more than rounding, or the supervised tokens do.
    """
    draw = random.Random(seed)
    count = options.steps * options.batch + options.held_out
    if options.data:
        records = draw.sample(real_records(options.data, "sft", options.longest), count)
    else:
        records = drawn(draw, count, options.mean, options.sigma, options.longest)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", "qwen2_tied", **MODEL)
        for file, part in (("held_out", records[: options.held_out]), ("train", records[options.held_out :])):
            text = "".join(json.dumps(record) + "\n" for record in part)
            (folder / f"{file}.jsonl").write_text(text, encoding="utf-8")
        results = {way: train(folder, seed, packing, options) for way, packing in WAYS.items()}
    packed, padded = results["packed"], results["padded"]
    if (packed.tokens, packed.supervised) != (padded.tokens, padded.supervised):
        raise SystemExit(f"both must train on the same tokens, got {packed} and {padded}")
    pairs = zip([*packed.losses, packed.held_out], [*padded.losses, padded.held_out], strict=True)
    difference = max(abs(a - b) / abs(a) for a, b in pairs)
    if difference > TOLERANCE:
        raise SystemExit(f"losses differ by {difference:.1e}: {packed.losses} and {padded.losses}")
    return [_row(seed, way, result, packed, difference, options) for way, result in results.items()]


def _row(
    seed: int, way: str, result: Result, packed: Result, difference: float, options: argparse.Namespace
) -> dict[str, object]:
    cpu, own = (statistics.median(one.cpu_seconds) for one in (result, packed))
    return {
        **stamp(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "data": options.data.name
        if options.data
        else f"drawn, mean {options.mean:g}, width {options.sigma:g}",
        "longest": options.longest,
        "steps": options.steps,
        "batch": options.batch,
        "held_out": options.held_out,
        "seed": seed,
        "way": way,
        "tokens": result.tokens,
        "computed_tokens": result.computed,
        "useful": f"{result.tokens / result.computed:.3f}",
        "supervised_tokens": result.supervised,
        "cpu_seconds_per_step": f"{cpu:.3f}",
        "seconds_per_step": f"{statistics.median(result.seconds):.3f}",
        "packed_is_faster_by": f"{cpu / own:.2f}",
        "first_loss": f"{result.losses[0]:.6f}",
        "last_loss": f"{result.losses[-1]:.6f}",
        "held_out_loss": f"{result.held_out:.6f}",
        "difference": f"{difference:.1e}",
    }


def parser() -> argparse.ArgumentParser:
    """Return the options."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = made.add_argument
    add("--data", type=Path, metavar="FILE", help="real records instead of drawn ones")
    add("--mean", type=float, default=256.0, help="mean tokens of a drawn sample (default: 256)")
    add("--sigma", type=float, default=1.0, help="standard deviation of the log length (default: 1)")
    add("--longest", type=int, default=1200, help="tokens of a sample at most (default: 1200)")
    add("--steps", type=int, default=12, help="the first is not timed (default: 12)")
    add("--batch", type=int, default=16, help="samples of a step (default: 16)")
    add("--held-out", type=int, default=64, help="records that are not trained on (default: 64)")
    add("--seeds", type=int, nargs="+", default=[1, 2, 3], metavar="N", help="of records and order")
    add("--threads", type=int, default=1, help="default: 1")
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print and append to the results."""
    options = parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    for seed in options.seeds:
        record("packing_training", compare(seed, options))


if __name__ == "__main__":
    main()
