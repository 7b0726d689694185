"""The model that the critic of a run starts from: which, and whether it fits the policy. Before the ranks meet.

One that is named may have another shape: another depth, width or number of heads. It must read token ids as the policy
does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_align.checkpoint.card import describe_differences, shape_differences
from megatron_align.config import RunConfig
from megatron_align.config.rewards import ModelReward
from megatron_align.cost.text import shape_text
from megatron_align.data.sample_table import TrainingData
from megatron_align.errors import InputError, require
from megatron_align.hf.assets import AssetChanges
from megatron_align.hf.tokenizer import require_same_tokenizer
from megatron_align.model.families import ModelShape, read_json, read_shape
from megatron_align.objectives.registry import has_critic
from megatron_align.training.asset_changes import plan_asset_changes

Folders = Mapping[str, tuple[Path, Path]]  # by path: the folder of the weights, and of config and tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticStart:
    """The checked model that a critic starts from.

    Args:
        path: of the model.
        start_shape: of the stored model.
        shape: of the critic: that of the stored model, with a head of one row.
        note: what it is, for the run's summary.
        changes: of training in the copied files of the policy's folder, for the critic's export.
    """

    path: str
    start_shape: ModelShape
    shape: ModelShape
    note: str
    changes: AssetChanges = AssetChanges()

    @property
    def has_head(self) -> bool:
        """Whether the stored model has a value head: it is a reward model."""
        return self.start_shape.is_reward

    def metadata(self) -> dict[str, Any]:
        """Return what checkpoints say of the critic: where it started, its shape, and what its export needs."""
        padding, config = self.changes.padding, self.changes.config
        return {
            "start": self.path,
            "shape": dataclasses.asdict(self.shape),
            "padding": None if padding is None else dataclasses.asdict(padding),
            **({"config": config} if config is not None else {}),
        }


def critic_paths(config: RunConfig) -> list[str]:
    """Return the models that the critic of a run may start from, in order of preference; none: it has no critic."""
    if not has_critic(config):
        return []
    if config.critic.path is not None:
        return [config.critic.path]
    rewards = [reward.path for reward in config.rewards if isinstance(reward, ModelReward)]
    return [*dict.fromkeys(rewards), config.model.path]


def find_critic(config: RunConfig, policy: ModelShape, folders: Folders) -> CriticStart | None:
    """Return the model that the critic of a run starts from: the first that fits; None: the run has no critic.

    Args:
        config: of the run.
        policy: shape of the policy.
        folders: of ``model.path`` and of all :func:`critic_paths`.

    Raises:
        InputError: ``critic.path`` does not fit, or the policy's family has no models with a scalar head.
    """
    paths = critic_paths(config)
    unfit: list[str] = []
    if not paths:
        return None
    model_assets = folders[config.model.path][1]
    for path in paths:
        found, assets = read_shape(folders[path][1]), folders[path][1]
        named = path == config.critic.path
        problem = _problem(policy, found, assets, model_assets, any_shape=named)
        if problem is None:
            what = "a reward model" if found.is_reward else "a language model, with a new value head"
            skipped = "".join(f"; not from {line}" for line in unfit)
            shape = found.as_reward()
            own = "" if has_shape_of(policy, shape) else f" of its own shape: {shape_text(shape)}"
            note = f"starts from {path}, {what}{own}{skipped}"
            return CriticStart(path=path, start_shape=found, shape=shape, note=note)
        if named:
            raise InputError(
                "critic.path must hold a reward model or a language model, of model.path's tokenizer and of a family "
                f"with reward models, got {problem} in {path}"
            )
        if path == config.model.path:  # the last one, which only its family keeps from being a critic
            raise InputError(
                f"objective {config.objective.name} needs a critic of the policy's family: {problem}"
            )
        unfit.append(f"{path}: {problem}")
    return None


def has_shape_of(policy: ModelShape, critic: ModelShape) -> bool:
    """Return whether a critic has the policy's shape, but for its head."""
    return not _differences(policy, critic)


def require_same_critic(start: CriticStart | None, metadata: Mapping[str, Any], folder: Path) -> None:
    """Check that the critic of the checkpoint that a run resumes from has the shape of the run's.

    Raises:
        InputError: naming each size that differs.
    """
    stored = metadata.get("critic")
    if start is None or not stored:
        return
    differing = shape_differences(dataclasses.asdict(start.shape), stored["shape"])
    listed = ", ".join(f"{key} {theirs!r} instead of {ours!r}" for key, (ours, theirs) in differing.items())
    require(
        not differing,
        f"checkpoint does not match critic.path: {listed} in {folder}; the critic started from {stored['start']}",
    )


def with_changes(
    start: CriticStart | None,
    config: RunConfig,
    policy: ModelShape,
    folders: Folders,
    stores: Iterable[TrainingData],
) -> CriticStart | None:
    """Return the start with the changes in the files of its export, which are the policy's.

    A critic of another shape brings its config.json. See :func:`.plan_asset_changes`.
    """
    if start is None:
        return None
    changes, _ = plan_asset_changes(config, start.shape, folders[config.model.path][1], stores)
    if not has_shape_of(policy, start.shape):
        changes = dataclasses.replace(changes, config=read_json(folders[start.path][1] / "config.json"))
    return dataclasses.replace(start, changes=changes)


def _problem(
    policy: ModelShape, found: ModelShape, assets: Path, policy_assets: Path, *, any_shape: bool
) -> str | None:
    """Return why a model cannot be the critic of a policy; None: it can."""
    try:
        shape = found.as_reward()
        if not any_shape and not has_shape_of(policy, shape):
            return _differences(policy, shape)
        require_same_tokenizer([policy_assets, assets])
    except InputError as error:
        return str(error)
    return None


def _differences(policy: ModelShape, critic: ModelShape) -> str:
    """Describe the differences of a policy and a critic but for their heads; empty: there are none."""
    family = policy.architecture.removesuffix("ForCausalLM")
    # A model with a scalar head has no tied one.
    wanted = dataclasses.replace(
        policy, architecture=f"{family}ForSequenceClassification", tied_embeddings=False
    )
    return describe_differences(wanted, critic)
