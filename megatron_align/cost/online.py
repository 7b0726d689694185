"""The costs of a run on rollouts besides training on them: the engine, reward models, supervised samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_align.config import RunConfig
from megatron_align.config.rollout import BATCH_TOKENS
from megatron_align.cost.chips import Chip
from megatron_align.cost.flops import forward_flops
from megatron_align.cost.placement import Placement
from megatron_align.cost.state import parameter_bytes, parameter_count
from megatron_align.cost.work import StepFlops, Work, WorkOf, mean, step_flops
from megatron_align.model.families import ModelShape


@dataclass(frozen=True, slots=True)
class RewardModelCost:
    """A reward model of ``rewards``, which lies on the run's layout and is only run forward.

    Args:
        name: of the reward.
        shape: of the model.
        precision: of its weights.
    """

    name: str
    shape: ModelShape
    precision: Literal["bf16", "fp32"]

    def placed(self, placement: Placement) -> Placement:
        """Return its placement on the layout of the policy."""
        return replace(
            placement,
            shape=self.shape,
            precision=self.precision,
            recompute_layers=0,
            recompute_modules=(),
            adapter=None,
            frozen=frozenset(),
        )


@dataclass(frozen=True, slots=True)
class OnlineCosts:
    """The costs that a run on rollouts adds to training steps.

    Args:
        reward_models: of ``rewards``.
        ptx: the work of the supervised samples of a step; None: there are none.
    """

    reward_models: tuple[RewardModelCost, ...] = ()
    ptx: WorkOf | None = None

    def reward_bytes(self, placement: Placement, stage: int) -> int:
        """Return the bytes of all reward models' weights on each rank of a pipeline stage.

        Raises:
            InputError: the layout does not divide the layers of one.
        """
        return sum(parameter_bytes(model.placed(placement), stage) for model in self.reward_models)

    def flops(self, config: RunConfig, placement: Placement, work: Work) -> dict[str, StepFlops]:
        """Return the operations of a step besides training and scoring by policy and reference, by their cause.

        Reward models are given the tokens of the rollouts as the policy counts them: their tokenizers may differ.
        """
        found = {}
        for model in self.reward_models:
            completions = work.samples * (config.rollout.completions or 1)
            run = forward_flops(model.shape, work.tokens, work.visible_keys, completions).total
            share = run / config.objective.iterations  # a set is scored once
            found[f"reward {model.name}"] = StepFlops(share, share)
        if self.ptx is not None:
            found["ptx"] = step_flops(placement, mean(self.ptx(placement)), 0)
        return found

    def seconds(
        self, config: RunConfig, placement: Placement, work: Work, chip: Chip, efficiency: float
    ) -> float:
        """Estimate the time that :meth:`flops` take of a step."""
        executed = sum(flops.executed for flops in self.flops(config, placement, work).values())
        return executed / (chip.bf16 * efficiency * placement.world_size)


def engine_bytes(config: RunConfig, placement: Placement) -> int:
    """Return the bytes of a rank's generation engine: its copy of the model, and its key/value cache at most.

    0 if the run has no engine of its own.
    """
    generates = getattr(config.objective, "minibatches", None) is not None
    if not generates or config.rollout.engine != "transformers":
        return 0
    shape = placement.shape
    per_token = 2 * shape.num_layers * shape.num_query_groups * shape.head_dim * placement.itemsize
    longest = config.data.sequence_length  # of a prompt with all its completions, prompts shared
    tokens = max(BATCH_TOKENS, longest)
    return parameter_count(shape) * placement.itemsize + tokens * per_token
