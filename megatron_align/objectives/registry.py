"""The objectives by name, and a run's objective and reference from its configuration.

To add one: its loss in ``losses/``, a file with its class in this folder, its class in ``OBJECTIVES``, its tests.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Literal, get_args, get_type_hints

from megatron_align.config.familiar_names import OBJECTIVES as KNOWN_AS
from megatron_align.config.familiar_names import plain
from megatron_align.config.run import RunConfig
from megatron_align.data.store import TokenStore
from megatron_align.errors import nearest, require, shown
from megatron_align.losses.policy_gradient import POLICY_LOSSES
from megatron_align.objectives import user_file
from megatron_align.objectives.base import SCORED_BY, Objective
from megatron_align.objectives.distill import Distill
from megatron_align.objectives.dpo import DPO, DPO_OPTIONS
from megatron_align.objectives.kto_bco import BCO, KTO
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.objectives.policy_gradient import GRPO, RLOO, PolicyGradientObjective
from megatron_align.objectives.ppo import PPO
from megatron_align.objectives.reference_free import CPO, ORPO, TPO, SimPO
from megatron_align.objectives.reward import RewardModel
from megatron_align.objectives.sft import SFT

ReferenceMode = Literal["cached", "live", "none"]
OBJECTIVES: dict[str, type[Objective]] = {
    kind.Options.name: kind
    for kind in (SFT, DPO, KTO, BCO, CPO, SimPO, TPO, ORPO, RewardModel, Distill, GRPO, RLOO, PPO)
}


def objective_class(name: str) -> type[Objective]:
    """Return the objective of ``objective.name``: a built-in one, or ``FILE.py:CLASS`` of the user's own.

    Raises:
        InputError: there is none of this name.
    """
    if ":" in name:
        return user_file.load(name)
    require(
        name in OBJECTIVES,
        f"objective.name must be one of {', '.join(sorted(OBJECTIVES))}, or FILE.py:CLASS, "
        f"got {shown(name)}{_meant(name)}",
    )
    return OBJECTIVES[name]


def _meant(name: str) -> str:
    """Return the objective that a name stands for elsewhere or is a misspelling of, if there is one."""
    word = plain(name)
    if word in OBJECTIVES:
        return f"; did you mean '{word}'?"
    if word in KNOWN_AS:
        ours = KNOWN_AS[word]
        return f"; did you mean '{ours}'?" if ours in OBJECTIVES else ": it is not available"
    for objective, kind in OBJECTIVES.items():
        if "loss_type" in (field.name for field in fields(kind.Options)) and word in _loss_types(kind):
            return f": it is objective.loss_type {word} of objective.name {objective}"
    return nearest(word, list(OBJECTIVES))


def _loss_types(kind: type[Objective]) -> tuple[str, ...]:
    """Return the loss types of an objective."""
    if kind is DPO:
        return tuple(DPO_OPTIONS)
    if issubclass(kind, PolicyGradientObjective):
        return tuple(POLICY_LOSSES)
    return get_args(get_type_hints(kind.Options)["loss_type"])


def build_objective(options: ObjectiveOptions, store: TokenStore | None = None) -> Objective:
    """Return the objective of a run's options; ``store``: its training data, None if nothing is trained."""
    objective = objective_class(options.name)(options, store)
    unknown = sorted(objective.needs - SCORED_BY.keys())
    require(
        not unknown,
        f"objective {options.name} must need only {', '.join(SCORED_BY)}; got {', '.join(unknown)}",
    )
    require(
        "mismatched_logprobs" not in objective.needs or objective.data == ("unpaired",),
        f"objective {options.name} needs mismatched_logprobs, which only unpaired data have; "
        f"its data are {', '.join(objective.data)}",
    )
    return objective


def has_critic(config: RunConfig) -> bool:
    """Return whether a run trains a critic."""
    kind = objective_class(config.objective.name)
    return issubclass(kind, PolicyGradientObjective) and kind.has_critic


def reference_mode(config: RunConfig) -> ReferenceMode | None:
    """Return how a run's reference is computed; None: its objective compares with none."""
    objective = build_objective(config.objective)
    return (config.reference.mode or objective.usual_reference) if objective.compares else None
