"""DPO on CPU, ours against TRL's DPOTrainer: seconds per step and peak memory, same model, pairs and threads, one run.

``python -m benchmarks.dpo`` trains a narrow Qwen2 with a vocabulary of 151,936 on pairs whose prompts are four times
as long as their answers, each contestant in a separate process, prints a table and appends it to
``benchmarks/results/dpo.csv``. Ours: shared prompts and a cached reference. TRL: with its defaults, and with
``precompute_ref_log_probs``. Seconds are the median over the steps after the first and before the last; the time
before the first step (loading, precomputed references) is a separate column. Nothing is printed unless the losses
agree to 1e-4.

``--adapter RANK`` trains a LoRA adapter instead of all weights, TRL with PEFT, both from the same A and B, with the
base as reference. ``--pairs FILE`` takes real pairs (``prompt``, ``chosen`` and ``rejected``, or Anthropic's
transcripts) of at most ``--longest`` bytes instead of drawn ones, in random order. ``--fair`` removes, for both, what
would not carry over to a GPU: the head is 18% of the model's operations, TRL projects completion rows only, as it
does with Triton, and the allocator keeps large blocks. Rows go to ``dpo.csv`` or, for example,
``dpo_adapter_fair_pairs.csv``.

A second table has the last step's operations, counted as they run by torch's counter of matrix products (it has none
of attention on a CPU), and the bytes of gradients and optimizer state that belong to an adapter's base.

Without ``--fair`` the ratio is not that on a GPU: without Triton TRL's head also computes the prompt's rows, which is
most of this narrow model's work, and glibc returns every large block to the kernel, which costs TRL more.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rows import append, stamp

if TYPE_CHECKING:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

WAYS = ("ours", "trl", "trl precomputed")
MODEL = {"vocab_size": 151936, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4}
FAIR = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
KEEPS_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(8 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
LR = 1e-4
COUNTED = ("operations", "base_gradient_bytes", "base_optimizer_bytes")
ASSISTANT = "\n\nAssistant:"


def make(folder: Path, options: argparse.Namespace) -> None:
    """Write the model, and pairs of about ``--prompt`` bytes of prompt and a quarter of it in each answer."""
    from tests.harness.tiny import make_adapter, make_model

    size, prompt = (FAIR if options.fair else MODEL), options.prompt
    make_model(folder / "model", "qwen2_tied", num_attention_heads=4, num_key_value_heads=2, **size)
    if options.adapter:
        rank = options.adapter
        make_adapter(folder / "adapter", folder / "model", rank=rank, alpha=2.0 * rank, b=0.0)
    draw = random.Random(0)
    count = options.steps * options.batch
    if options.pairs:
        records = draw.sample(real_pairs(options.pairs, options.longest), count)
        (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        return

    def text(length: int) -> str:
        return "".join(draw.choice("abcdefghij klmnop") for _ in range(length)) + "."

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(count):
            sizes = [int(prompt * share * draw.uniform(0.8, 1.2)) for share in (1, 0.25, 0.25)]
            record = dict(zip(("prompt", "chosen", "rejected"), map(text, sizes), strict=True))
            file.write(json.dumps(record) + "\n")


def real_pairs(file: Path, longest: int) -> list[dict[str, str]]:
    """Return the pairs of a JSON or JSON Lines file whose prompt and either answer take at most ``longest`` bytes."""
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    lines = data.decode().splitlines()
    records = json.loads(data) if data.lstrip().startswith(b"[") else [json.loads(line) for line in lines]
    pairs = [record if "prompt" in record else split_transcripts(record) for record in records]
    return [
        pair
        for pair in pairs
        if max(len((pair["prompt"] + pair[name]).encode()) for name in ("chosen", "rejected")) <= longest
        and pair["chosen"] != pair["rejected"]
    ]


def split_transcripts(record: dict[str, str]) -> dict[str, str]:
    """Return prompt and answers of two transcripts that part in the assistant's last turn."""
    start = record["chosen"].rindex(ASSISTANT) + len(ASSISTANT)
    prompt, chosen = record["chosen"][:start], record["chosen"][start:]
    rejected = record["rejected"][record["rejected"].rindex(ASSISTANT) + len(ASSISTANT) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def ours(folder: Path, steps: int, batch: int) -> dict[str, object]:
    """Train with this project, on one process."""
    from megatron_align import Trainer
    from megatron_align.objectives.configuration import parse
    from tests.harness.tiny import run_arguments

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
    reports, operations = [], 0
    with Trainer.open(parse(arguments)) as trainer, trainer.prefetched() as data:
        for step in range(1, trainer.steps + 1):
            trainer.begin_step()
            with counted(step == trainer.steps) as counter:
                reports.append(trainer.train_step(next(data)))
            operations = counter.get_total_flops() if counter else operations
        base = [p for chunk in trainer.chunks for p in chunk.base_parameters().values()]
        state = of_base(base, trainer.optimizer)
    # The last step is counted, which takes time: it is not timed.
    seconds = [report.seconds for report in reports[:-1]]
    losses = [report.result.sums["loss"] for report in reports]
    return {"losses": losses, "seconds": seconds, "operations": operations, **state}


@contextmanager
def counted(enabled: bool) -> Iterator[FlopCounterMode | None]:
    """Count the operations of a with-block, if enabled."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) if enabled else nullcontext() as counter:
        yield counter


def of_base(base: Iterable[torch.nn.Parameter], optimizer: object) -> dict[str, int]:
    """Return the bytes of gradients and of optimizer state that belong to the parameters of an adapter's base.

    Args:
        base: these parameters.
        optimizer: megatron-core's distributed optimizer, or torch's.
    """
    held = {id(p): p for p in base}
    gradients = [getattr(p, name, None) for p in held.values() for name in ("grad", "main_grad")]
    if hasattr(optimizer, "model_param_gbuf_map"):  # megatron-core's: the parameters that have a buffer
        states = [
            optimizer._get_main_param_and_optimizer_states(p)
            for p in optimizer.model_param_gbuf_map
            if id(p) in held
        ]
    else:
        states = [state for p, state in optimizer.state.items() if id(p) in held]
    tensors = [tensor for state in states for tensor in state.values() if hasattr(tensor, "nbytes")]
    return {
        "base_gradient_bytes": sum(tensor.nbytes for tensor in gradients if tensor is not None),
        "base_optimizer_bytes": sum(tensor.nbytes for tensor in tensors),
    }


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
        operations = 0

        def training_step(self, *args: object, **kwargs: object) -> torch.Tensor:
            with counted(self.state.global_step == steps - 1) as counter:
                loss = super().training_step(*args, **kwargs)
            if counter:
                Timed.operations = counter.get_total_flops()
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
    base = [p for name, p in trainer.model.named_parameters() if "lora_" not in name]
    state = of_base(base, trainer.optimizer.optimizer)
    return {"losses": Timed.losses, "seconds": Timed.ends[:-1], "operations": Timed.operations, **state}


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
    parser.add_argument("--pairs", type=Path, metavar="FILE", help="real pairs instead of drawn ones")
    parser.add_argument("--longest", type=int, default=1200, help="bytes of a real prompt with its answer")
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
        **({"data": options.pairs.name, "longest": options.longest} if options.pairs else {}),
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
        counts = {name: measured[name] for name in COUNTED}
        append(
            "dpo"
            + "_adapter" * bool(options.adapter)
            + "_fair" * options.fair
            + "_pairs" * bool(options.pairs),
            [{**environment, "way": way, **figures, **(counts if options.adapter else {})}],
        )
        print("{:16} {:8.2f} {:6.1f}x {:8,} {:10.2f} {:10.1f}".format(way, *figures.values()))
    print(
        f"\n{'matrix products':16} {'TFLOP/step':>10} {'ratio':>7} {'base: gradients':>16} {'optimizer':>10} bytes"
    )
    for way, measured in rows:
        operations, gradients, states = (measured[name] for name in COUNTED)
        shown = [f"{count:,}" if options.adapter else "" for count in (gradients, states)]
        ratio = operations / own["operations"]
        print(f"{way:16} {operations / 1e12:10.4f} {ratio:6.1f}x {shown[0]:>16} {shown[1]:>10}")


if __name__ == "__main__":
    main()
