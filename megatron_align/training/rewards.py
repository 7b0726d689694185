"""The rewards of a run: each rank scores a share of the prompts, reward models score all prompts on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_align.config import RunConfig
from megatron_align.config.rewards import ModelReward, RewardConfig
from megatron_align.errors import InputError, TrainingFault
from megatron_align.hf.hub import fetch_or_wait
from megatron_align.model.parallel import RankInfo
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values
from megatron_align.rollout.rewards.scoring import WeightedReward, build_rewards, check_rewards, combine
from megatron_align.rollout.verifiers.running import share_of_cores
from megatron_align.training.reward_model import RewardModel, RewardModelSetup, check_prompts
from megatron_align.training.watchdog import Watchdog

_LOOK = 1.0  # seconds between two signs of life while a reward is waited for


@dataclass(slots=True)
class _CheckedModel:
    """A reward model that is checked and not loaded: it stands in the list until the ranks have met."""

    name: str
    setup: RewardModelSetup

    def check(self, records: Sequence[PromptRecord]) -> None:
        check_prompts(self.setup, records)

    def score(self, groups: Sequence[Group]) -> Values:
        raise AssertionError("a reward model is loaded before it scores")

    def close(self) -> None:
        pass


def require_rewards(config: RunConfig, records: Sequence[PromptRecord], rank_info: RankInfo) -> None:
    """Check a run's rewards and all of its prompts, before the ranks meet; models on the hub are downloaded.

    Raises:
        InputError: a reward's file, function, package or model is missing, or a prompt lacks what one reads.
    """
    for reward in config.rewards:
        if isinstance(reward, ModelReward):
            fetch_or_wait(reward.path, rank_info.local_rank, waited_for=rank_info.world_size > 1)
    setups = _model_setups(config)
    models = {name: _CheckedModel(name, setup) for name, setup in setups.items()}
    rewards = build_rewards(config.rewards, models=models)
    try:
        check_rewards(rewards, records)
    finally:
        for built in rewards:
            built.reward.close()


def _model_setups(config: RunConfig) -> dict[str, RewardModelSetup]:
    return {
        reward.label: RewardModelSetup.of(
            reward,
            capacity=config.data.sequence_length,
            precision=config.train.precision,
            template_date=config.data.template_date,
        )
        for reward in config.rewards
        if isinstance(reward, ModelReward)
    }


class RunRewards:
    """The rewards of a run. Every method but :meth:`combine` is collective.

    Args:
        config: of the run.
        groups: of this rank.
        watchdog: of this rank.

    Raises:
        InputError: a reward's file, function, package or model is missing or unsuitable.
    """

    def __init__(self, config: RunConfig, groups: ProcessGroupCollection, watchdog: Watchdog):
        self.configs: tuple[RewardConfig, ...] = config.rewards
        self._watchdog = watchdog
        models = {
            name: RewardModel(setup, config.parallel, groups, watchdog)
            for name, setup in _model_setups(config).items()
        }
        self.rewards: list[WeightedReward] = build_rewards(config.rewards, share_of_cores(), models)

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Check all prompts of the run, see :func:`require_rewards`. Needed before the first :meth:`score`."""
        check_rewards(self.rewards, records)

    def score(self, groups: Sequence[Group]) -> dict[str, Values]:
        """Return the values of each reward by its name, for all completions on every rank.

        Rank r of R scores the prompts r, r + R, ...; reward models score meanwhile, with all ranks.

        Args:
            groups: the step's prompts with their completions, the same on every rank.

        Raises:
            InputError: on every rank: a reward cannot be computed, is not finite, or there are too many or too few.
            TrainingFault: on every rank: one failed or took too long in every try.
        """
        rank, ranks = dist.get_rank(), dist.get_world_size()
        with self._watchdog.patient("computing rewards"):
            own = groups[rank::ranks]
            local = [reward for reward in self.rewards if not isinstance(reward.reward, RewardModel)]
            started = {reward.name: reward.start(own) for reward in local}
            values = {
                reward.name: reward.score(groups)
                for reward in self.rewards
                if isinstance(reward.reward, RewardModel)
            }
            gathered: list[dict[str, Values] | Exception] = [{}] * ranks
            dist.all_gather_object(gathered, self._results(started))
        for of_rank in gathered:
            if isinstance(of_rank, Exception):
                raise of_rank
        for reward in local:
            of_ranks = [of_rank[reward.name] for of_rank in gathered if not isinstance(of_rank, Exception)]
            values[reward.name] = [of_ranks[i % ranks][i // ranks] for i in range(len(groups))]
        return {reward.name: values[reward.name] for reward in self.rewards}

    def combine(self, values: Mapping[str, Values], records: Sequence[PromptRecord]) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of all rewards of each completion and which were scored, see :func:`.combine`."""
        return combine(self.rewards, values, records)

    def close(self) -> None:
        """End the processes of rewards."""
        for reward in self.rewards:
            reward.reward.close()

    def _results(self, started: Mapping[str, Future[Values]]) -> dict[str, Values] | Exception:
        """Return this rank's values, or the error of the first reward that failed, without its traceback."""
        waiting = set(started.values())
        while waiting:
            waiting = wait(waiting, timeout=_LOOK).not_done
            late = [name for name, future in started.items() if future in waiting]
            self._watchdog.detail(f"waiting for reward {', '.join(late)}" if late else "rewards are computed")
        try:
            return {name: future.result() for name, future in started.items()}
        except (InputError, TrainingFault) as error:
            return type(error)(str(error))
