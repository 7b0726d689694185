"""Training on this device: peak memory against the plan, seconds and MFU of a step, the kernels that take longest."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_check.step import Context, context, model_folder, write_long

if TYPE_CHECKING:
    from megatron_align import Trainer

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training run.

    Args:
        model: its size, a key of ``step.QWEN2``.
        objective: sft or dpo.
        pack: tokens of a pack; a step has two.
    """

    model: str
    objective: str = "sft"
    pack: int = 8192


TINY = {"model": "tiny", "pack": 512}
CASES = {
    "memory": (Case(model="0.5B"), Case(model="0.5B", objective="dpo")),
    "mfu": (Case(model="1.5B"), Case(model="1.5B", objective="dpo"), Case(model="7B cut")),
    "profile": (Case(model="1.5B"),),
}
STEPS = {"memory": 3, "mfu": 8, "profile": 4}


def config_of(ours: Context, case: Case, steps: int) -> Any:
    """Return the configuration of a case: four samples fill a pack, two packs are a step."""
    from megatron_align import load_config

    length = case.pack // 4 - 64  # of a sample, without the tokens of its chat template
    data = ours.scratch / f"{case.objective}_{case.pack}.jsonl"
    if not data.exists():
        write_long(data, 8 * 12, length, pairs=case.objective == "dpo")
    return load_config(
        {
            "model": {"path": str(model_folder(ours.scratch, case.model))},
            "data": {"train": str(data), "sequence_length": case.pack},
            "objective": {"name": case.objective},
            "optimizer": {"lr": 1e-6, "schedule": "constant"},
            "train": {"steps": steps, "global_batch_size": 8, "self_check": False},
            "checkpoint": {
                "dir": str(
                    ours.scratch / f"speed_{ours.what}_{case.model}_{case.objective}".replace(" ", "_")
                ),
                "resume": "never",
                "export_hf": False,
            },
            "logging": {"tensorboard": False},
        }
    )


def planned(trainer: Trainer) -> int:
    """Return the bytes of tensors that the plan has for this run."""
    from megatron_align.cost.placement import Placement
    from megatron_align.cost.search import memory_of
    from megatron_align.cost.work import mean, of_store

    setup = trainer.setup
    placement = Placement.of_run(setup.config, setup.shape, 1)
    work = mean(of_store(setup.train, setup.config)(placement))
    [stage] = memory_of(setup.config, placement, work.micro_batches)
    return stage.tensors


def run_case(ours: Context, case: Case, watch: Callable[[Callable[[], None]], None] | None = None) -> None:
    """Train a case and write its row; ``watch`` runs the last two steps."""
    import torch

    from megatron_align import Trainer
    from megatron_align.monitoring.mfu import Utilisation

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    steps = 4 if ours.tiny else STEPS[ours.what]
    config = config_of(ours, case, steps)
    with Trainer.open(config) as trainer, trainer.prefetched() as data_of_steps:
        seconds, counts = [], None
        remaining = iter(data_of_steps)

        def one_step() -> None:
            nonlocal counts
            began = time.perf_counter()
            report = trainer.train_step(next(remaining))
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            counts = report.data.counts

        for _ in range(steps - 2):
            one_step()
        if watch is None:
            one_step()
            one_step()
        else:
            watch(lambda: (one_step(), one_step()))
        timed = sorted(seconds[1:])  # the first one compiles
        median = timed[len(timed) // 2]
        row: dict[str, Any] = {"model": case.model, "objective": case.objective, "pack": case.pack}
        row |= {"step_ms": 1e3 * median, "fastest_ms": 1e3 * timed[0]}
        row["tokens_per_second"] = round(2 * case.pack / median)
        row["mfu"] = Utilisation(config, trainer.setup.shape, 1).of_step(counts, median)
        row["planned_gib"] = planned(trainer) / GIB
    if gpu:
        peak = torch.cuda.max_memory_allocated()
        row |= {"peak_gib": peak / GIB, "peak_of_planned": peak / GIB / row["planned_gib"]}
        row["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    if ours.what == "memory":
        row = {"passed": not gpu or row["peak_of_planned"] <= 1.02, **row}
        row |= {} if gpu else {"note": "a CPU does not count the bytes of tensors: nothing to compare"}
    ours.results.row(ours.what, "training", **row)


def profiled(ours: Context) -> Callable[[Callable[[], None]], None]:
    """Return a function that runs steps under PyTorch's profiler and writes rows of the five longest kernels."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    gpu = torch.cuda.is_available()

    def watch(steps: Callable[[], None]) -> None:
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
        with profile(activities=kinds) as found:
            steps()
        clock = "self_device_time_total" if gpu else "self_cpu_time_total"
        events = [e for e in found.key_averages() if getattr(e, clock) > 0]
        if gpu:  # kernels, not the operators that launch them
            events = [e for e in events if str(e.device_type).endswith("CUDA")]
        total = sum(getattr(e, clock) for e in events)
        for event in sorted(events, key=lambda e: -getattr(e, clock))[:5]:
            spent = getattr(event, clock)
            ours.results.row(
                "profile",
                "kernel",
                share=spent / total,
                ms=spent / 1e3,
                calls=event.count,
                name=event.key[:120],
            )

    return watch


def main() -> None:
    """Run all cases of one step of the check."""
    ours = context(*CASES)
    cases = CASES[ours.what]
    if ours.tiny:
        cases = tuple(replace(case, **TINY) for case in cases[:2])
    for case in cases:
        run_case(ours, case, profiled(ours) if ours.what == "profile" else None)


if __name__ == "__main__":
    sys.exit(main())
