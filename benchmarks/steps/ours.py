"""This project's Trainer, on one process: packs, shared prompts, a cached reference."""

from __future__ import annotations

from pathlib import Path

from benchmarks.steps.contestant import counted, of_base
from benchmarks.steps.task import CAPACITY, LR, Task


def train(task: Task) -> dict[str, object]:
    """Train and return losses, gradient norms, seconds of all steps but the last, and counts of the last."""
    from megatron_align import Trainer
    from megatron_align.objectives.configuration import parse
    from tests.harness.tiny import run_arguments

    own: dict[str, object] = {}
    if task.objective == "grpo":
        own = {"rollout__engine": "data", "rollout__max_tokens": CAPACITY}
    arguments = run_arguments(
        task.model_folder,
        task.records,
        Path(task.folder) / "run",
        data__sequence_length=max(CAPACITY, _group(task)),
        data__shuffle=False,
        train__steps=task.steps,
        train__global_batch_size=task.batch,
        optimizer__lr=LR,
        objective__name=task.objective,
        **({"model__adapter": f"{{path: {task.adapter_folder}}}"} if task.adapter_folder else {}),
        **own,
    )
    reports, operations = [], 0
    with Trainer.open(parse(arguments)) as trainer, trainer.prefetched() as data:
        for step in range(1, trainer.steps + 1):
            trainer.begin_step()
            with counted(step == trainer.steps) as counter:
                reports.append(trainer.train_step(next(data)))
            operations = counter.get_total_flops() if counter else operations
        base = [p for chunk in trainer.chunks for p in chunk.base_parameters().values()] if task.rank else []
        state = of_base(base, trainer.optimizer)
    losses = [report.result.sums["loss"] for report in reports]
    return {
        "losses": losses,
        "grad_norms": [report.result.grad_norm for report in reports],
        "seconds": [report.seconds for report in reports[:-1]],
        "operations": operations,
        **state,
    }


def _group(task: Task) -> int:
    """Return the tokens of the longest sample: all completions of a prompt are in one pack."""
    from benchmarks.steps.counts import answers_of

    return max(
        len(record["prompt"].encode()) + sum(len(answer.encode()) + 1 for answer in answers_of(record))
        for record in task.read_records()
    )
