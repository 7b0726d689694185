"""Checks of a configuration against the shapes of its models, before the ranks meet."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_align.config import RunConfig
from megatron_align.data.sample_table import SampleTable, TrainingData
from megatron_align.errors import InputError, require
from megatron_align.kernels.dispatch import is_interpreted
from megatron_align.model.families import ModelShape
from megatron_align.model.flash import find_flash
from megatron_align.model.fp8 import require_fp8
from megatron_align.model.gradient_fusion import require_gradient_fusion
from megatron_align.model.kernel_choice import KernelChoice
from megatron_align.model.optional_packages import require_gpu
from megatron_align.model.te_attention import require_te_attention
from megatron_align.model.te_linear import require_te
from megatron_align.objectives.policy_gradient_options import PolicyGradientOptions
from megatron_align.objectives.registry import build_objective
from megatron_align.training.apex_adamw import require_apex


def require_top_k(config: RunConfig, tokens: int) -> None:
    """Check that the objective reads no more tokens of each row than policy and reference share.

    Raises:
        InputError: they share fewer.
    """
    ptx = getattr(config.objective, "ptx", None)
    asked = {"top_k": build_objective(config.objective).top_k, "ptx.top_k": ptx.columns if ptx else 0}
    for name, count in asked.items():
        require(
            count <= tokens,
            f"objective.{name} must be at most the vocabulary of {tokens}, got {count}",
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
    if config.model.attention == "te":
        require_te_attention(shape.head_dim)
    if config.model.linear == "te":
        te = require_te()
        if config.train.fp8 is not None:
            require_fp8(te, config.train.fp8.recipe)
    if config.train.gradient_accumulation_fusion:
        require_gradient_fusion(config.model.linear)
    if "apex" in (config.optimizer.implementation, config.critic.optimizer.implementation):
        require_apex()
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


def require_vocabulary(stores: Mapping[str, TrainingData], shape: ModelShape) -> None:
    """Check that every token of the stores, given by the name of their data, has a row in the model's vocabulary."""
    for name, store in stores.items():
        highest = store.manifest["largest_token"]
        if highest >= shape.vocab_size:
            raise InputError(
                f"the tokenizer must fit the model's vocabulary of {shape.vocab_size}, {name} has token {highest}"
            )
