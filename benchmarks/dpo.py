"""DPO on CPU, ours against TRL's DPOTrainer: seconds per step and peak memory, same model, pairs and threads, one run.

``python -m benchmarks.dpo`` trains a narrow Qwen2 with a vocabulary of 151,936 on pairs whose prompts are four times as
long as their answers, each contestant in a separate process, prints a table and appends it to
``benchmarks/results/dpo.csv``. Ours: shared prompts and a cached reference. TRL: with its defaults, and with
``precompute_ref_log_probs``. Seconds are the median over the steps after the first; the time before the first step
(loading, precomputed references) is a separate column. Nothing is printed unless the losses agree to 1e-4.

``--adapter RANK`` trains a LoRA adapter instead of all weights, TRL with PEFT, both from the same A and B, with the
base as reference. ``--fair`` removes, for both, what would not carry over to a GPU: the head is 18% of the model's
operations, TRL projects completion rows only, as it does with Triton, and the allocator keeps large blocks. Their rows
go to ``dpo_adapter.csv``, ``dpo_fair.csv`` and ``dpo_adapter_fair.csv``.

Without ``--fair`` the ratio is not that on a GPU: without Triton TRL's head also computes the prompt's rows, which is
most of this narrow model's work, and glibc returns every large block to the kernel, which costs TRL more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from benchmarks.rows import append, stamp

WAYS = ("ours", "trl", "trl precomputed")
MODEL = {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
FAIR = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
KEEPS_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
LR = 1e-4


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write the model, and pairs of about ``--prompt`` bytes of prompt and a quarter of it in each answer."""
    from tests.harness.tiny import make_adapter, make_model

    size, prompt = (FAIR if options.fair else MODEL), options.prompt
    make_model(folder / "model", "qwen2_tied", num_attention_heads=4, num_key_value_heads=2, **size)
    if options.adapter:
        rank = options.adapter
        make_adapter(folder / "adapter", folder / "model", rank=rank, alpha=2.0 * rank, b=0.0)
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choice("abcdefghij klmnop") for _ in range(length)) + "."

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(options.steps * options.batch):
            sizes = [int(prompt * share * draw.uniform(0.8, 1.2)) for share in (1, 0.25, 0.25)]
            record = dict(zip(("prompt", "chosen", "rejected"), map(text, sizes), strict=True))
            file.write(json.dumps(record) + "\n")


def ours(folder: Path, steps: int, batch: int) -> dict[str, object]:
    """Train with this project, on one process."""
    from megatron_align.model.parallel import RankInfo
    from megatron_align.objectives.configuration import parse
    from megatron_align.training.loop import run
    from tests.harness.tiny import metrics_of, run_arguments

    arguments = run_arguments(
        folder / "model",
        folder / "pairs.jsonl",
        folder / "run",
        data__sequence_length=2048,
        data__shuffle=False,
        train__steps=steps,
        train__global_batch_size=batch,
        optimizer__lr=LR,
        objective__name="dpo",
        **({"model__adapter": f"{{path: {folder / 'adapter'}}}"} if (folder / "adapter").exists() else {}),
    )
    run(parse(arguments), RankInfo(rank=0, local_rank=0, world_size=1))
    rows = metrics_of(folder / "run")
    return {"losses": [row["loss"] for row in rows], "seconds": [row["step_seconds"] for row in rows]}


def trl(folder: Path, steps: int, batch: int, precompute: bool) -> dict[str, object]:
    """Train with TRL, on one process."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tests.harness.trl import TRL_SETTINGS, load_adapter, peft_config

    if os.environ.get("TRL_SCORES_COMPLETIONS"):  # without Triton it would also project the prompts' rows
        from trl.trainer import utils

        utils._use_triton = lambda _: True
    adapter = folder / "adapter" if (folder / "adapter").exists() else None

    class Timed(DPOTrainer):
        losses: list[float] = []
        ends: list[float] = []

        def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: object, **__: object) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            Timed.ends.append(time.perf_counter() - self.started)

    arguments = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=LR,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_length=2048,
        precompute_ref_log_probs=precompute,
        **TRL_SETTINGS,
    )
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    trainer = Timed(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, trust_remote_code=False),
        args=arguments,
        train_dataset=Dataset.from_list(records),
        processing_class=AutoTokenizer.from_pretrained(folder / "model", trust_remote_code=False),
        callbacks=[Clock()],
        **({"peft_config": peft_config(adapter)} if adapter else {}),
    )
    if adapter:
        load_adapter(trainer.model, adapter)
    trainer.train()
    return {"losses": Timed.losses, "seconds": Timed.ends}


def contestant(way: str, folder: Path, steps: int, batch: int) -> None:
    """Run one contestant in this process; print its figures as the last line."""
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    started = time.perf_counter()
    measured = (
        ours(folder, steps, batch) if way == "ours" else trl(folder, steps, batch, "precomputed" in way)
    )
    measured["before"] = time.perf_counter() - started - sum(measured["seconds"])
    measured["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(measured), flush=True)


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8, help="pairs of one step")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt, about")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--adapter", type=int, metavar="RANK", help="train an adapter of this rank")
    parser.add_argument("--fair", action="store_true", help="as near to a GPU's proportions as a CPU comes")
    parser.add_argument("--contestant", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contestant:
        contestant(options.contestant, options.folder, options.steps, options.batch)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make(Path(name), options)
        for way in WAYS:
            command = [sys.executable, "-m", "benchmarks.dpo", "--contestant", way, "--folder", name]
            command += ["--steps", str(options.steps), "--batch", str(options.batch)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
            if options.fair:
                environment |= {**KEEPS_BLOCKS, "TRL_SCORES_COMPLETIONS": "1"}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            rows.append((way, json.loads(done.stdout.splitlines()[-1])))
    report(rows, options)


def report(rows: list[tuple[str, dict]], options: argparse.Namespace) -> None:
    """Print the table and append it to the results, if the losses agree."""
    own = rows[0][1]
    for way, measured in rows:
        difference = max(abs(a - b) / abs(a) for a, b in zip(own["losses"], measured["losses"], strict=True))
        if difference > 1e-4:
            raise SystemExit(
                f"losses of {way} differ from ours by {difference:.1e}: {measured['losses']}, {own['losses']}"
            )
    environment = {
        **stamp(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": version("torch"),
        "trl": version("trl"),
        "pairs": options.batch,
        "prompt": options.prompt,
        "threads": options.threads,
        **({"rank": options.adapter} if options.adapter else {}),
    }
    first = statistics.median(own["seconds"][1:])
    print(f"{'':16} {'s/step':>8} {'ratio':>7} {'peak MB':>8} {'ours / its':>10} {'before, s':>10}")
    for way, measured in rows:
        seconds = statistics.median(measured["seconds"][1:])
        figures = {
            "seconds_per_step": round(seconds, 3),
            "times_ours": round(seconds / first, 2),
            "peak_mb": round(measured["peak_mb"]),
            "ours_over_its_peak": round(own["peak_mb"] / measured["peak_mb"], 3),
            "seconds_before": round(measured["before"], 1),
        }
        append(
            "dpo" + "_adapter" * bool(options.adapter) + "_fair" * options.fair,
            [{**environment, "way": way, **figures}],
        )
        print("{:16} {:8.2f} {:6.1f}x {:8,} {:10.2f} {:10.1f}".format(way, *figures.values()))


if __name__ == "__main__":
    main()
