"""Train from Python instead of the command line: a loop of one's own around the Trainer.

python -m examples.library runs/library    # one process; it also writes the tiny model and its data
torchrun --nproc-per-node 2 -m examples.library runs/library parallel.tensor=2 checkpoint.dir=runs/library/two
"""

import sys
from pathlib import Path

from examples.quickstart import task, tiny_model
from megatron_align import Trainer, load_config


def main(folder: Path, overrides: list[str]) -> None:
    """Teach a tiny Qwen2 to add, and export it to ``folder/hf``."""
    if not (folder / "model").exists():
        tiny_model.save(folder / "model", seed=0)
        task.write_chats(folder / "train.jsonl", task.make_splits(seed=0).train[:512])
    config = load_config(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": str(folder / "train.jsonl"), "sequence_length": 1024},
            "objective": {"name": "sft"},
            "optimizer": {"lr": 2e-3},
            "train": {"steps": 8, "global_batch_size": 64, "precision": "fp32"},
            "checkpoint": {"dir": str(folder / "run")},
        },
        overrides,
    )
    with Trainer.open(config) as trainer, trainer.prefetched() as steps:
        for data in steps:
            report = trainer.train_step(data)
            print(
                f"step {report.step}  loss {report.metrics['loss']:.4f}  gradient norm {report.result.grad_norm:.3f}"
            )
        trainer.save()
        trainer.export(folder / "hf")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
