"""A run's configuration with the options of its objective: what commands and programs call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron_align.config import run
from megatron_align.config.inputs import ReferenceConfig
from megatron_align.config.rollout import changed
from megatron_align.config.run import ObjectiveNames, RunConfig
from megatron_align.errors import listed, require, shown
from megatron_align.losses.advantage_estimator import COMPARING
from megatron_align.objectives.options import ObjectiveOptions
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.registry import OBJECTIVES, build_objective, has_critic, objective_class


def parse(arguments: Sequence[str]) -> RunConfig:
    """Build a RunConfig from ``--config FILE`` and ``--section.key value`` arguments (later ones win).

    ``--dry_run`` is ignored here: the training command reads it.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
        SystemExit: after ``--help`` or ``--print_config`` has printed.
    """
    return _checked(run.parse(arguments, _OBJECTIVES))


def load_config(
    config: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | Sequence[str] = ()
) -> RunConfig:
    """Build a RunConfig from a YAML file or a mapping of sections, checked as the command line is.

    Args:
        config: path of a YAML file, or ``{"model": {"path": ...}, "data": {...}, ...}``.
        overrides: ``{"optimizer.lr": 2e-5}`` or ``["optimizer.lr=2e-5"]``; they win over ``config``.

    Raises:
        InputError: naming the key and, for a misspelt one, the nearest key that exists.
    """
    return _checked(run.load(config, overrides, _OBJECTIVES))


def _options_class(name: str) -> type[ObjectiveOptions]:
    return objective_class(name).Options


def _owners(option: str) -> list[str]:
    return [
        name for name, kind in OBJECTIVES.items() if option in (field.name for field in fields(kind.Options))
    ]


_OBJECTIVES = ObjectiveNames(_options_class, _owners)


def _checked(config: RunConfig) -> RunConfig:
    """Check what needs the objective itself."""
    objective = build_objective(config.objective)
    name = config.objective.name
    ptx = getattr(config.objective, "ptx", None)
    compares = objective.compares or (ptx is not None and ptx.kind == "topk_kl")
    require(
        compares or config.reference in (ReferenceConfig(), ReferenceConfig(mode="none")),
        f"objective {name} compares with no reference: the options reference.* do not apply",
    )
    if "reference_top_k" in objective.needs:
        require(
            config.reference.path is not None and config.reference.mode in (None, "cached"),
            f"objective {name} needs reference.path, the teacher, and reference.mode cached; got path "
            f"{shown(config.reference.path)}, mode {shown(config.reference.mode)}",
        )
    of_critic = changed(config.critic, "critic")
    require(
        has_critic(config) or not of_critic,
        f"objective {name} has no critic: the options critic.* belong to objective ppo, got {listed(of_critic)}",
    )
    if isinstance(objective, PolicyGradientObjective):
        _check_rollouts(config)
    else:
        options = changed(config.rollout, "rollout")
        require(
            not options,
            f"objective {name} trains on given data: the options rollout.* do not apply, got {listed(options)}",
        )
    return config


def _check_rollouts(config: RunConfig) -> None:
    """Check what the sections of a run on rollouts must have in common."""
    options, rollout, data, ptx = config.objective, config.rollout, config.data, config.objective.ptx
    require(
        ptx is None or ptx.kind != "nll" or rollout.temperature == 1,
        f"objective.ptx.kind nll needs rollout.temperature 1, which divides its logits too; got {rollout.temperature}",
    )
    require(
        ptx is None or config.reference.sync_steps is None,
        "objective.ptx compares with the reference of the start: reference.sync_steps does not apply, got "
        f"{config.reference.sync_steps}",
    )
    require(
        config.reference.mode != "cached",
        f"reference.mode cached does not apply to objective {options.name}, whose completions change; set live, or "
        "none",
    )
    require(
        data.validation is None,
        f"data.validation does not apply to objective {options.name}: see validation.generate and validation.tasks; "
        f"got {shown(data.validation)}",
    )
    if rollout.engine == "data":
        require(
            not config.rewards,
            "rewards do not apply to rollout.engine data, whose completions come with their scores; got "
            f"{', '.join(reward.label for reward in config.rewards)}",
        )
        return
    require(
        bool(config.rewards),
        f"objective {options.name} needs rewards, a list that scores the completions, or rollout.engine data; got none",
    )
    _check_dynamic_sampling(config)
    compares = options.advantage in COMPARING
    require(
        not compares or rollout.completions is None or rollout.completions > 1,
        f"objective.advantage {options.advantage} compares the completions of a prompt: rollout.completions must be at "
        f"least 2, got {rollout.completions}",
    )
    require(
        data.too_long != "truncate",
        "data.too_long truncate does not apply to prompts, which end with the question; set error or drop",
    )
    require(
        data.train_turns == "all",
        f"data.train_turns does not apply to prompts, got {data.train_turns}",
    )
    require(
        rollout.max_tokens < data.sequence_length,
        f"rollout.max_tokens must be below data.sequence_length = {data.sequence_length}, which holds a prompt and all "
        f"its completions; got {rollout.max_tokens}",
    )


def _check_dynamic_sampling(config: RunConfig) -> None:
    """Check what ``rollout.dynamic_sampling`` needs of the other sections."""
    sampling = config.rollout.dynamic_sampling
    if sampling is None:
        return
    require(
        config.train.steps is not None,
        "rollout.dynamic_sampling needs train.steps: how many prompts a step takes is not known before; got "
        f"train.epochs {config.train.epochs}",
    )
    names = [reward.label for reward in config.rewards]
    require(
        sampling.reward is None or sampling.reward in names,
        f"rollout.dynamic_sampling.reward must name one of the rewards ({listed(names)}), got '{sampling.reward}'",
    )
