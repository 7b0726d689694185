"""The card that a run shows at its start: model, layout, data, objective, steps."""

from __future__ import annotations

import torch

from megatron_align.model.context_kind import kind_of
from megatron_align.objectives.base import Objective
from megatron_align.training.resume import ResumePoint
from megatron_align.training.setup import Plan


def facts_of_run(
    plan: Plan, objective: Objective, data_parallel: int, steps: int, resume: ResumePoint | None
) -> list[tuple[str, str]]:
    """Return ``(name, fact)`` of what a run will do, for people.

    Args:
        plan: of the run.
        objective: that it trains with.
        data_parallel: ranks.
        steps: of the whole run.
        resume: where it goes on.
    """
    shape, config = plan.shape, plan.config
    layout, train, data = config.parallel, config.train, plan.train.manifest
    place = "on GPUs" if torch.cuda.is_available() else "on the CPU, as no GPU is visible"
    kind = kind_of(shape, layout)
    size = (
        f"up to {train.global_batch_tokens:,} tokens a step"
        if train.global_batch_tokens
        else f"{train.global_batch_size} samples a step"
    )
    done, resumed = (resume.step, f", resumed from {resume.folder}") if resume else (0, "")
    return [
        (
            "model",
            f"{shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
            f"vocabulary {shape.vocab_size}, {train.precision}",
        ),
        (
            "layout",
            f"{plan.rank_info.world_size} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} x "
            f"context {layout.context}{f' ({kind})' if kind else ''} x data {data_parallel}, {place}",
        ),
        (
            "data",
            f"{', '.join(data['shapes'])}: {data['samples']:,} samples, {data['tokens']:,} tokens, "
            f"{data['scored_tokens']:,} trained; {data['dropped']} dropped, {data['truncated']} truncated, "
            f"{data['skipped']} skipped",
        ),
        ("objective", f"{config.objective.name}, every {objective.normalization} weighs the same; {size}"),
        ("steps", f"{done} done of {steps}{resumed}"),
    ]
