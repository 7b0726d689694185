"""The objectives by name, and a run's objective and reference from its configuration.

To add one: its loss in ``losses/``, a file with its class in this folder, its class in ``OBJECTIVES``, its tests.
"""

from __future__ import annotations

from typing import Literal

from megatron_align.config.run import RunConfig
from megatron_align.data.store import TokenStore
from megatron_align.errors import nearest, require
from megatron_align.objectives import user_file
from megatron_align.objectives.base import SCORED_BY, Objective
from megatron_align.objectives.dpo import DPO
from megatron_align.objectives.kto_bco import BCO, KTO
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.objectives.reference_free import CPO, ORPO, TPO, SimPO
from megatron_align.objectives.reward import RewardModel
from megatron_align.objectives.sft import SFT

ReferenceMode = Literal["cached", "live", "none"]
OBJECTIVES: dict[str, type[Objective]] = {
    kind.Options.name: kind for kind in (SFT, DPO, KTO, BCO, CPO, SimPO, TPO, ORPO, RewardModel)
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
        f"objective.name must be one of {sorted(OBJECTIVES)}, or FILE.py:CLASS, "
        f"got '{name}'{nearest(name, list(OBJECTIVES))}",
    )
    return OBJECTIVES[name]


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


def reference_mode(config: RunConfig) -> ReferenceMode | None:
    """Return how a run's reference is computed; None: its objective compares with none."""
    return (config.reference.mode or "cached") if build_objective(config.objective).compares else None
