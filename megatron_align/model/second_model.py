"""A model besides the policy on the layout of a run, in whose packs it computes: a teacher, or a critic."""

from __future__ import annotations

from dataclasses import replace

from megatron_align.config import RunConfig
from megatron_align.errors import InputError
from megatron_align.model.context_kind import context_kind_of
from megatron_align.model.families import ModelShape
from megatron_align.model.kernel_choice import PolicyConfig
from megatron_align.model.policy import transformer_config


def second_model_config(
    name: str,
    shape: ModelShape,
    policy: ModelShape,
    megatron: PolicyConfig,
    config: RunConfig,
    *,
    trained: bool = False,
) -> PolicyConfig:
    """Return megatron-core's configuration of a second model.

    Args:
        name: of the option that holds the model, for errors.
        shape: of the model.
        policy: shape of the policy, which decides how context-parallel ranks share a pack.
        megatron: megatron-core's configuration of the policy.
        config: of the run.
        trained: the model is trained, with the recomputation of the run.

    Raises:
        InputError: the layout does not divide the model's heads, layers or sizes.
    """
    train, parallel = config.train, config.parallel
    kind = context_kind_of(policy, parallel)
    try:
        return transformer_config(
            shape,
            parallel if kind is None else replace(parallel, context_kind=kind),
            megatron.params_dtype,
            train.recompute_layers if trained else 0,
            train.recompute_modules if trained else (),
            megatron.kernels,
        )
    except InputError as error:
        raise InputError(f"{name}, a model of {shape.num_layers} layers: {error}") from error
