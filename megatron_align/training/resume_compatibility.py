"""Compatibility of a checkpoint with the run that resumes from it; differences must be allowed by name."""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any

from megatron_align.checkpoint.folder import ASSETS
from megatron_align.config import AdapterConfig, OptimizerConfig, RunConfig, to_dict
from megatron_align.config.rollout import OF_SERVERS, RolloutConfig
from megatron_align.data.batching.sampler import passes_per_epoch
from megatron_align.errors import InputError
from megatron_align.hf.tokenizer import require_same_tokenizer
from megatron_align.training.learning_rate import learning_rate

_CURVE = ("lr", "warmup_steps", "schedule")
_OPTIMIZER = ("weight_decay", "betas", "eps", "clip_grad")
_CRITIC = "critic.optimizer"
_SAMPLE_ORDER = ("seed", "global_batch_size", "global_batch_tokens")
_NEVER_ALLOWED = "precision"  # a group that resume_allow cannot name: precision, and what is trained


def require_same_run(
    config: RunConfig,
    data_key: str,
    metadata: dict[str, Any],
    folder: Path,
    assets: Path,
    steps: int | None = None,
) -> None:
    """Refuse to resume with other data, sample order, tokenizer, objective, reference, learning rates or precision.

    Args:
        config: of the run that resumes.
        data_key: of its tokenised training data.
        metadata: of the checkpoint.
        folder: of the checkpoint.
        assets: HF folder with the tokenizer of the run.
        steps: of the complete run; None: ``train.steps``.

    Raises:
        InputError: naming every difference that ``checkpoint.resume_allow`` does not name.
    """
    if not isinstance(metadata.get("config"), dict):
        raise InputError(f"resuming needs a checkpoint of a training run, found weights only in {folder}")
    found = differences(config, data_key, metadata, steps or config.train.steps)
    try:
        require_same_tokenizer([folder / ASSETS, assets])
    except InputError as error:
        found["tokenizer"] = [str(error)]
    refused = {group: lines for group, lines in found.items() if group not in config.checkpoint.resume_allow}
    if not refused:
        return
    groups = [group for group in refused if group != _NEVER_ALLOWED]
    lines = [line for group in refused for line in refused[group]]
    remedy = f"to accept this, set checkpoint.resume_allow [{', '.join(groups)}]; " if groups else ""
    raise InputError(
        f"the checkpoint is of another run: {', '.join(lines)} (checkpoint {folder}); {remedy}for another run give "
        "another checkpoint.dir, and this one as model.path to start from its weights"
    )


def require_same_reference(weights: str, config: RunConfig, metadata: dict[str, Any], folder: Path) -> None:
    """Refuse to resume with a reference whose weight files were changed in place.

    Args:
        weights: hash of the reference's weights.
        config: of the run that resumes.
        metadata: of the checkpoint; older ones have no hash.
        folder: of the checkpoint.

    Raises:
        InputError: unless ``checkpoint.resume_allow`` names the reference.
    """
    before, path = metadata.get("reference_weights") or weights, config.reference.path or config.model.path
    if before != weights and "reference" not in config.checkpoint.resume_allow:
        raise InputError(
            f"the reference has changed: the weights in {path} were sha256 {before[:16]} and are {weights[:16]} "
            f"(checkpoint {folder}); to accept this, set checkpoint.resume_allow [reference]"
        )


def differences(
    config: RunConfig, data_key: str, metadata: dict[str, Any], steps: int | None
) -> dict[str, list[str]]:
    """Return the differences between a run's configuration and data and a checkpoint's, one line each, by group."""
    before, now = _with_new_options(metadata["config"], config), to_dict(config)
    pairs: dict[str, dict[str, tuple[Any, Any]]] = {
        "data": {
            "the tokenised data": (metadata["data"]["key"], data_key),
            "passes per epoch": (
                metadata["data"]["passes_per_epoch"],
                list(passes_per_epoch(config.data.train)),
            ),
        },
        "order": _changes(before, now, "data", ["shuffle"]) | _changes(before, now, "train", _SAMPLE_ORDER),
        "schedule": _schedule_changes(config, metadata, steps)
        | _critic_schedule_changes(config, metadata, steps),
        _NEVER_ALLOWED: _changes(before, now, "train", ["precision"])
        | {
            "model.adapter": (_adapter_options(before["model"]), _adapter_options(now["model"])),
            "model.freeze": (before["model"].get("freeze") or None, now["model"]["freeze"] or None),
        },
    }
    old, new = _rewards(before), _rewards(now)
    pairs["rewards"] = {
        f"rewards.{name}": (_without_weight(old.get(name)), _without_weight(new.get(name)))
        for name in {**old, **new}
    }
    for group in ("objective", "reference"):
        pairs[group] = _changes(before, now, group, [*{**before.get(group, {}), **now[group]}])
    of_rollouts = [name for name in {**before.get("rollout", {}), **now["rollout"]} if name not in OF_SERVERS]
    pairs["objective"] |= _changes(before, now, "rollout", of_rollouts)
    found = {
        group: [f"{key} was {old} and is {new}" for key, (old, new) in of_group.items() if old != new]
        for group, of_group in pairs.items()
    }
    return {group: lines for group, lines in found.items() if lines}


def _with_new_options(before: dict[str, Any], config: RunConfig) -> dict[str, Any]:
    """Return a checkpoint's configuration with the defaults of options that its version did not have yet."""
    found = {**before, "rollout": {**asdict(RolloutConfig()), **before.get("rollout", {})}}
    if before.get("objective", {}).get("name") == config.objective.name:
        options = {f.name: f.default for f in fields(config.objective) if f.default is not MISSING}
        found["objective"] = {**options, **before["objective"]}
    return found


def _rewards(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the rewards of a configuration by name; older ones have none."""
    return {reward["name"]: reward for reward in config.get("rewards", ())}


def _without_weight(reward: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a reward's options but its weight, which may change when a run resumes; None: there is no such reward."""
    return reward and {option: value for option, value in reward.items() if option != "weight"}


def _adapter_options(model: dict[str, Any]) -> dict[str, Any] | None:
    """Return ``model.adapter``, with the defaults of options that older checkpoints lack."""
    options = model.get("adapter")
    return {**asdict(AdapterConfig()), **options} if options else None


def harmless_differences(config: RunConfig, metadata: dict[str, Any]) -> list[str]:
    """Return one line for each difference that needs no permission and yet changes what the remaining steps do."""
    before, now = metadata["config"], to_dict(config)
    changes = _changes(before, now, "optimizer", _OPTIMIZER) | _changes(before, now, "train", ["fp8"])
    if metadata.get("critic"):
        changes |= _changes(_of_critic(before), _of_critic(now), _CRITIC, _OPTIMIZER)
    old_rewards = _rewards(before)
    for name, reward in _rewards(now).items():
        if name in old_rewards:
            changes[f"rewards.{name}.weight"] = (old_rewards[name]["weight"], reward["weight"])
    return [f"{key} was {old} and is {new}" for key, (old, new) in changes.items() if old != new]


def _schedule_changes(
    config: RunConfig, metadata: dict[str, Any], steps: int | None
) -> dict[str, tuple[Any, Any]]:
    """Return the options that change the learning rate of a remaining step; none if every step keeps its own.

    Args:
        config: of the run that resumes.
        metadata: of the checkpoint; older ones lack the number of steps.
        steps: of the complete run; None: not known.
    """
    before, now = metadata["config"], to_dict(config)
    epochs = (before["train"].get("epochs"), now["train"].get("epochs"))
    steps_before = metadata.get("steps") or before["train"].get("steps")
    if steps_before is None and epochs[0] == epochs[1]:
        steps_before = steps
    changes = _changes(before, now, "optimizer", _CURVE)
    if None not in epochs and epochs[0] != epochs[1]:
        changes["train.epochs"] = epochs
    else:
        changes["train.steps"] = (steps_before, steps)
    if steps_before is None or steps is None:
        return changes
    same = _same_curve(before["optimizer"], config.optimizer, metadata, (steps_before, steps))
    return {} if same else changes


def _critic_schedule_changes(
    config: RunConfig, metadata: dict[str, Any], steps: int | None
) -> dict[str, tuple[Any, Any]]:
    """Return the options of the critic's optimizer that change its learning rate of a remaining step."""
    before, now = _of_critic(metadata["config"]), _of_critic(to_dict(config))
    steps_before = metadata.get("steps") or steps
    if not metadata.get("critic") or steps_before is None or steps is None:
        return {}
    same = _same_curve(before[_CRITIC], config.critic.optimizer, metadata, (steps_before, steps))
    return {} if same else {**_changes(before, now, _CRITIC, _CURVE), "train.steps": (steps_before, steps)}


def _of_critic(config: dict[str, Any]) -> dict[str, Any]:
    """Return the critic's optimizer as a section by itself; older configurations have none."""
    return {_CRITIC: config.get("critic", {}).get("optimizer", {})}


def _same_curve(
    before: dict[str, Any], now: OptimizerConfig, metadata: dict[str, Any], steps: tuple[int, int]
) -> bool:
    """Return whether every remaining step keeps its learning rate; ``steps``: of the run, before and now."""
    old = OptimizerConfig(**{name: before[name] for name in _CURVE})
    remaining = range(metadata.get("step", 0) + 1, steps[1] + 1)
    return all(learning_rate(old, step, steps[0]) == learning_rate(now, step, steps[1]) for step in remaining)


def _changes(
    before: dict[str, Any], now: dict[str, Any], section: str, keys: Any
) -> dict[str, tuple[Any, Any]]:
    return {f"{section}.{key}": (before.get(section, {}).get(key), now[section].get(key)) for key in keys}
