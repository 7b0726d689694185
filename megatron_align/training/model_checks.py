"""Checks of a configuration against the shapes of its models, before the ranks meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from megatron_align.checkpoint.card import shape_differences
from megatron_align.config import RunConfig
from megatron_align.data.sample_table import SampleTable, TrainingData
from megatron_align.errors import InputError, require
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.tokenizer import require_tokenizer_of_reference
from megatron_align.kernels.dispatch import is_interpreted
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.flash import find_flash
from megatron_align.model.fp8 import require_fp8
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.optional_packages import require_gpu
from megatron_align.model.te_linear import require_te
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions
from megatron_align.objectives.registry import build_objective


def require_reference(weights: Path, assets: Path, shape: ModelShape, model_assets: Path) -> None:
    """Check that ``reference.path`` holds a model of the policy's shape and tokenizer.

    Args:
        weights: of the reference.
        assets: of the reference.
        shape: of the policy.
        model_assets: of the policy.

    Raises:
        InputError: naming what differs.
    """
    theirs = read_shape(assets)
    apart = shape_differences(dataclasses.asdict(shape), dataclasses.asdict(theirs))
    if apart:
        facts = ", ".join(f"{key} {found!r} for {ours!r}" for key, (ours, found) in apart.items())
        raise InputError(f"reference.path must hold a model of model.path's shape, got {facts} in {weights}")
    require_tokenizer_of_reference(assets, model_assets)
    if weights == assets:
        require_tied_head(open_hf(assets)[0], shape)


def require_top_k(config: RunConfig, shape: ModelShape) -> None:
    """Check that the reference's vocabulary has as many tokens as the objective reads of each row.

    Raises:
        InputError: it has fewer.
    """
    ptx = getattr(config.objective, "ptx", None)
    asked = {"top_k": build_objective(config.objective).top_k, "ptx.top_k": ptx.columns if ptx else 0}
    for name, count in asked.items():
        require(
            count <= shape.vocab_size,
            f"objective.{name} must be at most the vocabulary of {shape.vocab_size}, got {count}",
        )


def require_positions(ptx: SampleTable | None, shape: ModelShape) -> None:
    """Check that supervised samples of a run on rollouts, whose packs may be longer, have a position for each token.

    Raises:
        InputError: one has not.
    """
    longest = 0 if ptx is None else int(ptx.lengths.max())
    require(
        longest <= shape.max_positions,
        f"samples of objective.ptx.data must have at most the model's {shape.max_positions} positions, got {longest} "
        "tokens",
    )


def require_rollouts(config: RunConfig, shape: ModelShape) -> None:
    """Check the section ``rollout`` with the objective and the model.

    Raises:
        InputError: they do not fit.
    """
    if isinstance(config.objective, PolicyGradientOptions):
        config.objective.require_rollouts(config.rollout)
        require(
            config.rollout.top_k <= shape.vocab_size,
            f"rollout.top_k must be at most the model's {shape.vocab_size} tokens (0: all), got {config.rollout.top_k}",
        )


def require_kernels(config: RunConfig, shape: ModelShape, *, dry_run: bool) -> None:
    """Check that this machine has the packages and the chip of the kernels that the run chooses.

    Args:
        config: of the run.
        shape: of the model.
        dry_run: for another machine, which cannot be checked here.

    Raises:
        InputError: something is missing, too old, or does not support the model.
    """
    if dry_run:
        return
    if config.model.attention == "flash":
        find_flash(shape.head_dim)
    if config.model.linear == "te":
        te = require_te()
        if config.train.fp8 is not None:
            require_fp8(te, config.train.fp8.recipe)
    if config.model.attention == "triton" and not is_interpreted():
        require_gpu("model.attention: triton")


def require_unshared_prompts(config: RunConfig, stores: Mapping[str, TrainingData]) -> None:
    """Check that no pack shares a prompt between completions where attention goes by documents.

    Raises:
        InputError: data, by the name of their split, or tasks would share prompts.
    """
    if not KernelChoice.of_run(config).attends_by_document:
        return
    option = f"model.attention: {config.model.attention}"
    for split, store in stores.items():
        most = int(store.completion_counts.max()) if len(store) else 1
        require(
            most <= 1 or not config.data.share_prefix,
            f"{option} cannot share a prompt between completions, and data.{split} has up to {most} of them for one "
            "prompt: set data.share_prefix: false, which computes each prompt once for every completion, or use "
            "model.attention: auto",
        )
