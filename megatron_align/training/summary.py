"""The summary that a run shows at its start: model, layout, data, objective, steps."""

from __future__ import annotations

import torch

from megatron_align.cost.text import shape_text, trained_text
from megatron_align.data.formats.columns import fields_text
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape
from megatron_align.objectives.base import Objective
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.training.reference_model import ReferenceModel
from megatron_align.training.trainer import Trainer


def run_summary(trainer: Trainer) -> list[tuple[str, str]]:
    """Return ``(name, text)`` of a run's model, layout, data, objective and steps."""
    setup, config, objective, resume = trainer.setup, trainer.config, trainer.objective, trainer.resumed
    shape = setup.shape
    layout, train, data = config.parallel, config.train, setup.train.manifest
    device = "on GPUs" if torch.cuda.is_available() else "on the CPU, as no GPU is visible"
    kind = context_kind_of(shape, layout)
    size = (
        f"up to {train.global_batch_tokens:,} tokens a step"
        if train.global_batch_tokens
        else f"{train.global_batch_size} samples a step"
    )
    done, resumed = (resume.step, f", resumed from {resume.folder}") if resume else (0, "")
    trained = trained_text(shape, setup.adapter, setup.frozen)
    return [
        (
            "model",
            f"{shape.architecture}, {shape.num_layers} layers, hidden {shape.hidden_size}, "
            f"vocabulary {shape.vocab_size}, {train.arithmetic}",
        ),
        *([("trained", trained)] if trained else []),
        (
            "layout",
            f"{setup.rank_info.world_size} ranks = tensor {layout.tensor} x pipeline {layout.pipeline} x "
            f"context {layout.context}{f' ({kind})' if kind else ''} x data {trainer.groups.dp.size()}, {device}",
        ),
        (
            "data",
            f"{', '.join(data['shapes'])}: {data['samples']:,} samples, {data['tokens']:,} tokens, "
            f"{data['scored_tokens']:,} trained; {data['dropped']} dropped, {data['truncated']} truncated, "
            f"{data['skipped']} skipped",
        ),
        ("fields", fields_text(data)),
        ("objective", f"{config.objective.name}, {_weighing(objective)}; {size}"),
        *_reference(setup.reference, shape),
        *([("critic", setup.critic.note)] if setup.critic else []),
        ("steps", f"{done} done of {trainer.steps}{resumed}"),
        *setup.notes,
    ]


def _weighing(objective: Objective) -> str:
    """Describe what weighs the same in a step."""
    if isinstance(objective, PolicyGradientObjective):
        return f"loss type {objective.options.loss_type}, advantage {objective.options.advantage}"
    return f"every {objective.normalization} weighs the same"


def _reference(reference: ReferenceModel, policy: ModelShape) -> list[tuple[str, str]]:
    """Describe a reference of another shape than the policy's; empty: it has the policy's, or there is none."""
    if reference.shape == policy:
        return []
    return [("reference", f"{shape_text(reference.shape)}, at {reference.path}")]
