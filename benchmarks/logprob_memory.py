"""Peak memory of a loss over a real vocabulary: ours against full logits, and a training step against TRL's. On CPU.

``python -m benchmarks.logprob_memory`` runs every case in a separate process, prints a table and appends it to
``benchmarks/results/logprob_memory.csv``. Megabytes are resident memory (Linux: the high-water mark is reset before
each measurement).

- loss: loss and both gradients of N rows, above inputs and gradients. ``slab_loss`` (supervised, and pairs) against
  PyTorch on full logits, for N rows and twice as many: one slab, whatever N.
- step: the second training step of a two-layer model whose vocabulary has 151,936 tokens, supervised, on the same
  samples. ``total`` is the peak of the process, ``step`` the peak above the memory just before the step. Ours keeps
  its gradient buffer between steps, TRL frees its gradients: compare totals. TRL's loss is its default.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.rows import append, stamp

VOCAB, HIDDEN = 151936, 256
SAMPLES, LENGTH = 8, 512
MEGA = 2**20


def _resident(field: str) -> float:
    """Return VmRSS or VmHWM in megabytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _reset_peak() -> float:
    """Reset the high-water mark to the resident memory and return it."""
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def loss(how: str, rows: int) -> dict[str, float]:
    """Measure one loss and its gradients."""
    import torch
    import torch.nn.functional as F

    from megatron_align.kernels import slab_loss, slab_rows

    torch.manual_seed(0)
    hidden_NH = torch.randn(rows, HIDDEN).requires_grad_()
    weight_VH = (torch.randn(VOCAB, HIDDEN) / HIDDEN**0.5).requires_grad_()
    targets_N = torch.randint(VOCAB, (rows,))
    hidden_NH.grad, weight_VH.grad = torch.ones_like(hidden_NH), torch.ones_like(weight_VH)
    weight_VH.main_grad = weight_VH.grad

    def pairs(i: int, logprobs_n: torch.Tensor, _: dict) -> tuple[torch.Tensor, dict]:
        chosen, rejected = logprobs_n.view(2, -1).sum(1)
        return -F.logsigmoid(0.1 * (chosen - rejected)), {}

    def tokens(i: int, logprobs_n: torch.Tensor, _: dict) -> tuple[torch.Tensor, dict]:
        return -logprobs_n.sum() / rows, {}

    most = slab_rows(weight_VH) // 2 * 2
    slabs = [(at, min(at + most, rows)) for at in range(0, rows, most)]
    before, started = _reset_peak(), time.perf_counter()
    if how == "full_logits":
        value = F.cross_entropy((hidden_NH @ weight_VH.T).float(), targets_N)
        value.backward()
    else:
        value, _ = slab_loss(hidden_NH, weight_VH, targets_N, slabs, {"sft": tokens, "pairs": pairs}[how])
        gradients = torch.autograd.grad(value, hidden_NH)
        assert gradients[0].isfinite().all()
    return {
        "loss": value.item(),
        "peak_mb": _resident("VmHWM") - before,
        "seconds": time.perf_counter() - started,
    }


def _model_and_data(folder: Path) -> tuple[Path, Path]:
    from tests.harness.tiny import make_model

    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 2}
    model = make_model(folder / "model", "qwen2_tied", **sizes)
    data = folder / "data.jsonl"
    turns = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": "a" * (LENGTH - 60)}]
    lines = [json.dumps({"prompt": turns[:1], "completion": turns[1:]}) for _ in range(2 * SAMPLES)]
    data.write_text("\n".join(lines) + "\n")
    return model, data


class _Second:
    """Measures the second step."""

    def __init__(self) -> None:
        self.steps, self.figures = 0, {}

    def around(self, step, *arguments):
        """Run the step, and measure it if it is the second."""
        self.steps += 1
        before, started = _reset_peak(), time.perf_counter()
        answer = step(*arguments)
        if self.steps == 2:
            peak = _resident("VmHWM")
            self.figures = {
                "total_mb": peak,
                "peak_mb": peak - before,
                "seconds": time.perf_counter() - started,
            }
        return answer


def step_ours(folder: Path) -> dict[str, float]:
    """Measure our training step."""
    from megatron_align.objectives.configuration import parse
    from megatron_align.training.trainer import Trainer
    from tests.harness.tiny import run_arguments

    model, data = _model_and_data(folder)
    second = _Second()

    options = {
        "data__sequence_length": 2048,
        "train__steps": 2,
        "train__global_batch_size": SAMPLES,
        "data__shuffle": False,
    }
    arguments = run_arguments(model, data, folder / "run", **options)
    with Trainer.open(parse(arguments)) as trainer, trainer.prefetched() as steps:
        for data in steps:
            report = second.around(trainer.train_step, data)
    return {**second.figures, "loss": report.metrics["loss"]}


def step_trl(folder: Path) -> dict[str, float]:
    """Measure TRL's training step."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from tests.harness.trl import TRL_SETTINGS

    model, data = _model_and_data(folder)
    second, losses = _Second(), []

    class Trainer(SFTTrainer):
        def training_step(self, *arguments):
            losses.append(second.around(super().training_step, *arguments).item())
            return torch.tensor(losses[-1])

    settings = SFTConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=SAMPLES,
        max_steps=2,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_length=2048,
        **TRL_SETTINGS,
    )
    Trainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, trust_remote_code=False),
        args=settings,
        train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder)),
        processing_class=AutoTokenizer.from_pretrained(model, trust_remote_code=False),
    ).train()
    return {**second.figures, "loss": losses[-1]}


CASES = [
    *(("loss", how, rows) for rows in (2048, 4096) for how in ("sft", "pairs", "full_logits")),
    ("step", "ours", SAMPLES * LENGTH),
    ("step", "trl", SAMPLES * LENGTH),
]


def child(what: str, how: str, rows: int) -> dict[str, float]:
    """Measure one case in this process."""
    if what == "loss":
        return loss(how, rows)
    with tempfile.TemporaryDirectory() as folder:
        return {"ours": step_ours, "trl": step_trl}[how](Path(folder))


def in_child(what: str, how: str, rows: int) -> dict[str, float]:
    """Measure one case in a separate process."""
    command = [sys.executable, "-m", "benchmarks.logprob_memory", "--child", what, how, str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{what} {how} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure, print and append to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, how, rows = options.child
        print(json.dumps(child(what, how, int(rows))))
        return
    import torch
    import trl

    environment = {
        **stamp(),
        "cores": str(os.cpu_count()),
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "trl": trl.__version__,
    }
    rows = []
    for what, how, count in CASES:
        measured = in_child(what, how, count)
        figures = {
            name: f"{measured[name]:.6g}"
            for name in ("peak_mb", "total_mb", "seconds", "loss")
            if name in measured
        }
        rows.append(
            {
                **environment,
                "what": what,
                "how": how,
                "rows": count,
                "vocab": VOCAB,
                "hidden": HIDDEN,
                **figures,
            }
        )
        print({key: value for key, value in rows[-1].items() if key not in environment}, flush=True)
    _append(rows)


def _append(rows: list[dict[str, object]]) -> None:
    names = ["peak_mb", "total_mb", "seconds", "loss"]
    columns = [*(key for key in rows[0] if key not in names), *names]
    append("logprob_memory", [{name: row.get(name, "") for name in columns} for row in rows])


if __name__ == "__main__":
    main()
