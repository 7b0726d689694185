"""Twenty steps of SFT and DPO on this device in fp32 and bf16 against the same on the CPU in fp32, side by side.

A gate: every loss in fp32 is within 5e-3 of the CPU's, relative to it or to 1, in bf16 within 3e-2. Twenty updates of
Adam, whose first ones are the gradient's sign, magnify differences of rounding; a wrong kernel is off by far more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.step import context, model_folder

ALLOWED = {"fp32": 5e-3, "bf16": 3e-2}
STEPS = {False: 20, True: 3}


def train(model: Path, data: Path, folder: Path, objective: str, precision: str, steps: int) -> list[float]:
    """Train and return the loss of each step."""
    from megatron_align import Trainer, load_config

    config = load_config(
        {
            "model": {"path": str(model)},
            "data": {"train": str(data), "sequence_length": 512},
            "objective": {"name": objective},
            "optimizer": {"lr": 5e-6, "schedule": "constant"},
            "train": {"steps": steps, "global_batch_size": 8, "precision": precision},
            "checkpoint": {"dir": str(folder), "resume": "never", "export_hf": False},
            "logging": {"tensorboard": False},
        }
    )
    with Trainer.open(config) as trainer, trainer.prefetched() as data_of_steps:
        return [float(trainer.train_step(data).metrics["loss"]) for data in data_of_steps]


def one_device(scratch: Path, name: str, precision: str, steps: int) -> None:
    """Train both objectives on what this process sees and write ``losses_NAME.json``."""
    model = scratch / "losses_model"
    losses = {
        objective: train(
            model.resolve(),
            scratch / f"{objective}.jsonl",
            scratch / f"run_{name}_{objective}",
            objective,
            precision,
            steps,
        )
        for objective in ("sft", "dpo")
    }
    (scratch / f"losses_{name}.json").write_text(json.dumps(losses))


def main() -> int:
    """Start the three runs at once, compare them, write the rows; 1: one of them failed."""
    from examples.quickstart.task import make_splits, write_chats, write_pairs

    ours = context()
    model = model_folder(ours.scratch, "tiny" if ours.tiny else "0.5B")
    (ours.scratch / "losses_model").symlink_to(model)
    sums = make_splits(seed=0).train[: 8 * STEPS[ours.tiny]]
    write_chats(ours.scratch / "sft.jsonl", sums)
    write_pairs(ours.scratch / "dpo.jsonl", sums)
    cores = str(max(1, (os.cpu_count() or 2) - 2))
    cpu = {"CUDA_VISIBLE_DEVICES": "", **({} if ours.tiny else {"OMP_NUM_THREADS": cores})}
    runs = {"cpu": ("fp32", cpu), "fp32": ("fp32", {}), "bf16": ("bf16", {})}
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_check.losses", "one", str(ours.scratch), name, precision]
            + [str(STEPS[ours.tiny])],
            env={**os.environ, **more},
        )
        for name, (precision, more) in runs.items()
    }
    codes = {name: process.wait() for name, process in processes.items()}
    if any(codes.values()):
        print(f"exit codes of the runs: {codes}")
        return 1
    losses = {name: json.loads((ours.scratch / f"losses_{name}.json").read_text()) for name in runs}
    for kind, row in compare(losses):
        ours.results.row("losses", kind, **row)
    return 0


def compare(losses: dict[str, dict[str, list[float]]]) -> list[tuple[str, dict[str, Any]]]:
    """Return a row per step with all losses, and a gate per objective and precision.

    Args:
        losses: of each step, by run (``cpu``, ``fp32``, ``bf16``) and objective.
    """
    rows: list[tuple[str, dict[str, Any]]] = []
    for objective, truth in losses["cpu"].items():
        for i, exact in enumerate(truth):
            found = {name: losses[name][objective][i] for name in ALLOWED}
            rows.append((objective, {"at": i + 1, "cpu": exact, **found}))
        for name, allowed in ALLOWED.items():
            pairs = zip(losses[name][objective], truth, strict=True)
            # not (x <= y) is true of NaN as well
            worst = max(
                (abs(got - exact) / max(1.0, abs(exact)) for got, exact in pairs), key=lambda x: (x != x, x)
            )
            rows.append(
                (
                    "gate",
                    {
                        "passed": worst <= allowed,
                        "objective": objective,
                        "precision": name,
                        "difference": worst,
                    }
                    | {"allowed": allowed},
                )
            )
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["one"]:
        one_device(Path(sys.argv[2]), sys.argv[3], sys.argv[4], int(sys.argv[5]))
    else:
        sys.exit(main())
