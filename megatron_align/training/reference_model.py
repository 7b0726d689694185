"""The model that a run compares its policy with, checked before the ranks meet: which, its shape, and its layout.

Where the reference is a teacher, it may have another shape: another family, depth, width or number of heads, and more
or fewer rows of the embedding. It must read token ids as the policy does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_align.checkpoint.card import describe_differences, require_all_weights
from megatron_align.config import RunConfig
from megatron_align.data.sample_table import TrainingData
from megatron_align.errors import require
from megatron_align.hf.load import open_hf, require_tied_head
from megatron_align.hf.tokenizer import require_tokenizer_of_reference
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.kernel_choice import PolicyConfig
from megatron_align.model.second_model import second_model_config
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.registry import build_objective


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceModel:
    """The reference of a run, whether its objective compares with one or not.

    Args:
        path: ``reference.path``, or the model that training starts from.
        shape: of the model.
        megatron: megatron-core's configuration of the model on the run's layout.
        tokens: that policy and reference share: those below the smaller of their vocabularies.
    """

    path: str
    shape: ModelShape
    megatron: PolicyConfig
    tokens: int

    @classmethod
    def of_policy(cls, config: RunConfig, shape: ModelShape, megatron: PolicyConfig) -> ReferenceModel:
        """Return the reference of a run without ``reference.path``."""
        return cls(path=config.model.path, shape=shape, megatron=megatron, tokens=shape.vocab_size)

    @classmethod
    def of_shape(
        cls, config: RunConfig, shape: ModelShape, policy: ModelShape, megatron: PolicyConfig
    ) -> ReferenceModel:
        """Return the reference in ``reference.path``.

        Args:
            config: of the run.
            shape: of the reference.
            policy: shape of the policy.
            megatron: megatron-core's configuration of the policy.

        Raises:
            InputError: the layout does not divide the reference.
        """
        assert config.reference.path is not None, "the policy is the reference without it"
        if shape != policy:
            megatron = second_model_config("reference.path", shape, policy, megatron, config)
        tokens = min(shape.vocab_size, policy.vocab_size)
        return cls(path=config.reference.path, shape=shape, megatron=megatron, tokens=tokens)

    @property
    def shared_tokens(self) -> int | None:
        """The tokens that are compared, where the reference has others too; None: all of its vocabulary."""
        return self.tokens if self.tokens < self.shape.vocab_size else None


def takes_teacher(config: RunConfig) -> bool:
    """Return whether the run's reference may have another shape: of distillation, and of runs on rollouts."""
    objective = build_objective(config.objective)
    return "reference_top_k" in objective.needs or isinstance(objective, PolicyGradientObjective)


def reference_shape(config: RunConfig, policy: ModelShape, assets: Path) -> ModelShape:
    """Return the shape of the model in ``reference.path``, of which only config.json is read.

    Args:
        config: of the run.
        policy: shape of the policy.
        assets: folder of the reference's config.

    Raises:
        InputError: naming what differs from the policy, where the objective takes no reference of another shape.
    """
    found = read_shape(assets)
    apart = describe_differences(policy, found)
    if not apart:
        return found
    require(
        takes_teacher(config),
        f"reference.path must hold a model of model.path's shape, got {apart} in {assets}; a teacher of another shape "
        "is for objective distill and for runs on rollouts",
    )
    require(
        not found.is_reward,
        f"reference.path must hold a language model, got {found.architecture} in {assets}, a reward model",
    )
    require(
        config.reference.sync_steps is None,
        f"reference.sync_steps needs a reference of model.path's shape, got {apart} in {assets}",
    )
    return found


def find_reference(
    config: RunConfig,
    policy: ModelShape,
    megatron: PolicyConfig,
    weights: Path,
    assets: Path,
    model_assets: Path,
) -> ReferenceModel:
    """Return the model in ``reference.path``.

    Args:
        config: of the run.
        policy: shape of the policy.
        megatron: megatron-core's configuration of the policy.
        weights: of the reference.
        assets: of the reference.
        model_assets: of the policy.

    Raises:
        InputError: it has another shape or tokenizer, is not complete, or the layout does not divide it.
    """
    shape = reference_shape(config, policy, assets)
    require_tokenizer_of_reference(assets, model_assets)
    if weights == assets:
        require_tied_head(open_hf(assets)[0], shape)
    else:
        require_all_weights(weights)
    return ReferenceModel.of_shape(config, shape, policy, megatron)


def longest_sequence(store: TrainingData) -> int:
    """Return the largest number of positions that a sample takes: those of its prompt and its longest completion."""
    longest_S = np.maximum.reduceat(store.completion_lengths, store.completion_offsets[:-1])
    return int((store.prompt_lengths + longest_S).max(initial=0))


def require_readable(
    name: str, shape: ModelShape, policy: ModelShape, stores: Mapping[str, TrainingData]
) -> None:
    """Check that a second model can read the data where the policy can: every token and every position.

    Args:
        name: of the option that holds the model, for errors.
        shape: of the model.
        policy: shape of the policy, whose own limits are checked elsewhere.
        stores: by the name of their data.

    Raises:
        InputError: it has no row for a token, or no position.
    """
    for data, store in stores.items():
        if shape.vocab_size < policy.vocab_size:
            highest = store.manifest["largest_token"]
            require(
                highest < shape.vocab_size,
                f"{name} must have a row for every token of the data, got {shape.vocab_size} rows for token {highest} "
                f"of {data}",
            )
        if shape.max_positions < policy.max_positions:
            longest = longest_sequence(store)
            require(
                longest <= shape.max_positions,
                f"{name} must have a position for every token of a sample, got {shape.max_positions} positions for "
                f"{longest} tokens in {data}",
            )
