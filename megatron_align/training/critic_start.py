"""The model that the critic of a run starts from: which, and whether it fits the policy. Before the ranks meet."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_align.checkpoint.card import describe_differences
from megatron_align.config import RunConfig
from megatron_align.config.rewards import ModelReward
from megatron_align.data.sample_table import TrainingData
from megatron_align.errors import InputError
from megatron_align.hf.assets import AssetChanges
from megatron_align.hf.tokenizer import require_same_tokenizer
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.objectives.registry import has_critic
from megatron_align.training.asset_changes import plan_asset_changes

Folders = Mapping[str, tuple[Path, Path]]  # by path: the folder of the weights, and of config and tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticStart:
    """The checked model that a critic starts from.

    Args:
        path: of the model.
        start_shape: of the stored model.
        shape: of the critic: the policy's, with a head of one row.
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
        """Return what checkpoints say of the critic: where it started, its shape, and the padding of its export."""
        padding = self.changes.padding
        return {
            "start": self.path,
            "shape": dataclasses.asdict(self.shape),
            "padding": None if padding is None else dataclasses.asdict(padding),
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
    try:
        wanted = policy.as_reward()
    except InputError as error:
        raise InputError(
            f"objective {config.objective.name} needs a critic of the policy's family: {error}"
        ) from error
    for path in paths:
        found = read_shape(folders[path][1])
        problem = _problem(wanted, found, folders[path][1], folders[config.model.path][1])
        if problem is None:
            what = "a reward model" if found.is_reward else "a language model, with a new value head"
            skipped = "".join(f"; not from {line}" for line in unfit)
            note = f"starts from {path}, {what}{skipped}"
            return CriticStart(path=path, start_shape=found, shape=wanted, note=note)
        if path == config.critic.path:
            raise InputError(
                f"critic.path must hold a model of model.path's shape and tokenizer, got {problem} in {path}"
            )
        unfit.append(f"{path}: {problem}")
    return None


def with_changes(
    start: CriticStart | None, config: RunConfig, assets: Path, stores: Iterable[TrainingData]
) -> CriticStart | None:
    """Return the start with the changes in the files of its export, see :func:`.plan_asset_changes`."""
    if start is None:
        return None
    changes, _ = plan_asset_changes(config, start.shape, assets, stores)
    return dataclasses.replace(start, changes=changes)


def _problem(wanted: ModelShape, found: ModelShape, assets: Path, policy_assets: Path) -> str | None:
    """Return why a model cannot be the critic of a policy; None: it can."""
    try:
        # A tied head is none of a model with a scalar head.
        theirs = dataclasses.replace(found.as_reward(), tied_embeddings=wanted.tied_embeddings)
        if differences := describe_differences(wanted, theirs):
            return differences
        require_same_tokenizer([policy_assets, assets])
    except InputError as error:
        return str(error)
    return None
