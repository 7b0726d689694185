"""Training steps on rollouts: generate, score, compute advantages, train; the next set with the new weights.

A set of rollouts serves ``objective.iterations x minibatches`` steps. It is written before it is trained on, and a run
that resumes reads it: completions, rewards and log-probs of the policy that sampled are then the same, bit for bit.

Every method is collective: all ranks call it, in the same order, and get the same rollouts.

Shapes: G prompts, C completions, N tokens of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_align import faults
from megatron_align.config import to_dict
from megatron_align.config.rewards import FunctionReward
from megatron_align.data.batching.rollout_order import RolloutOrder, rollout_order
from megatron_align.data.batching.step_batches import Step, StepBatches
from megatron_align.data.store import TokenStore, sha256
from megatron_align.errors import TrainingFault
from megatron_align.losses.segments import per_token, segment_sums
from megatron_align.model.parallel import all_reduce_sum
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.scored_rollouts import ScoredRollouts, rollout_metrics
from megatron_align.rollout.prompt_table import PromptTable
from megatron_align.rollout.rewards.scoring import mean_rewards
from megatron_align.rollout.rollouts import Rollouts, read_rollouts, rollouts_folder, write_rollouts
from megatron_align.rollout.types import Completion
from megatron_align.training.batches import data_rank, pack_options
from megatron_align.training.generation import EngineRollouts, LivePolicy
from megatron_align.training.scoring import Scorer, step_logprobs

# Of log-probs, trainer against engine, in nats per token: engines in bf16 differ by 0.01 to 0.04.
MISMATCH_STOP = 0.05
UPDATES = ("optimizer", "train")  # sections that determine the weights after a step


class RolloutSource(Protocol):
    """A source of rollouts."""

    def rollouts(self, prompts_G: np.ndarray, first: int) -> Rollouts:
        """Return the rollouts of some prompts of the training data; ``first``: index of the first among all made."""
        ...


class GivenRollouts:
    """``rollout.engine: data``: the completions of ranked data, with their scores as rewards.

    They count as sampled by the policy, and as complete.
    """

    def __init__(self, store: TokenStore):
        self._store = store

    def rollouts(self, prompts_G: np.ndarray, first: int) -> Rollouts:
        """See :class:`RolloutSource`."""
        samples = [self._store.sample(int(i)) for i in prompts_G]
        completions = []
        for sample in samples:
            ends = sample.prompt_length + np.cumsum(sample.completion_lengths)
            parts = np.split(sample.tokens_L, [sample.prompt_length, *ends[:-1]])[1:]
            completions.append([_given(tuple(part.tolist())) for part in parts])
        scores = [score for sample in samples for score in sample.scores]
        return Rollouts(
            prompt_G=prompts_G,
            prompt_ids=[sample.tokens_L[: sample.prompt_length] for sample in samples],
            texts=["" for _ in samples],
            completions=completions,
            rewards={},
            reward_C=torch.tensor(scores, dtype=torch.float64),
            scored_C=torch.ones(len(scores), dtype=torch.bool),
            weight_G=torch.tensor([sample.weight for sample in samples], dtype=torch.float64),
        )


def _given(token_ids: tuple[int, ...]) -> Completion:
    return Completion(token_ids=token_ids, logprobs=(), text="", finish_reason="stop", weight_version=0)


class RolloutSteps:
    """The training steps of a run on rollouts.

    Args:
        trainer: of the run; its policy samples and is trained.
        objective: of the run.
    """

    def __init__(self, trainer: LivePolicy, objective: PolicyGradientObjective):
        self.trainer, self.objective = trainer, objective
        setup = trainer.setup
        order = rollout_order(setup.train, setup.config)
        assert order is not None, "the objective trains on rollouts"
        self.order: RolloutOrder = order
        self._generates = isinstance(setup.train, PromptTable)
        # Given completions stay in the data, but not the log-probs of the policy that later steps compare with, nor
        # the critic's values.
        self._on_disk = self._generates or not objective.needs.isdisjoint({"old_logprobs", "values"})
        self._source: RolloutSource = (
            EngineRollouts(trainer, setup.train)
            if isinstance(setup.train, PromptTable)
            else GivenRollouts(cast("TokenStore", setup.train))
        )
        # A function's file may change between two starts: completions are then scored again.
        self._functions = {
            reward.path: sha256(reward.path.rpartition(":")[0])
            for reward in setup.config.rewards
            if isinstance(reward, FunctionReward)
        }
        self._updates = (*UPDATES, *(("critic",) if objective.has_critic else ()))
        self._current: _OpenRollouts | None = None
        self._first_step: int | None = None  # of this process, 0-based

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the 0-based steps from ``first`` up to ``last``; each is made when it is taken."""
        for number in range(first, last):
            yield self.step(number)

    def step(self, number: int) -> Step:
        """Return a 0-based step, making its rollouts if no earlier step has."""
        place = self.order.place(number)
        if self._first_step is None:
            self._first_step = number
        current, seconds = self._current, {}
        if current is None or current.number != place.rollout:
            current = self._current = self._open(place.rollout)
            seconds = current.seconds
        step = current.batches.step(number)
        statistics = {"rollout": place.rollout + 1, **current.metrics, **seconds}
        packs = replace(
            step.packs,
            batches=[
                replace(batch, rows=replace(batch.rows, step_statistics=statistics)) for batch in step.batches
            ],
        )
        return replace(step, packs=packs, stored_C=self._stored(number))

    def require_match(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Check that the engine's log-probs are the trainer's, within ``rollout.mismatch_stop``.

        Raises:
            TrainingFault: on every rank, as metrics are global.
        """
        found, bound = metrics["mismatch_mean"], self.trainer.config.rollout.mismatch_stop or MISMATCH_STOP
        if self._generates and not found <= bound:
            raise TrainingFault(
                f"step {step}: log-probs of the engine must be the trainer's within {bound:g} nats per token on "
                f"average (rollout.mismatch_stop), they differ by {found:.3g}: the engine has other weights, another "
                "temperature, or computes in another precision"
            )

    def close(self) -> None:
        """Free the engines."""
        if isinstance(self._source, EngineRollouts):
            self._source.close()

    def _open(self, rollout: int) -> _OpenRollouts:
        """Read or make a set of rollouts."""
        objective, trainer = self.objective, self.trainer
        first = rollout * self.order.steps_of_rollouts + 1
        folder = rollouts_folder(trainer.setup.folder, first)
        found = read_rollouts(folder, self._key(rollout), self._unread(first)) if self._on_disk else None
        if found is not None and self._generates:
            rollouts = found
        else:
            rollouts = self._source.rollouts(self.order.prompts(rollout), self._first_prompt(rollout))
        if found is not None:
            rollouts.columns = found.columns
        scored = ScoredRollouts(
            reward_C=rollouts.reward_C,
            scored_C=rollouts.scored_C,
            size_G=rollouts.size_G,
            weight_G=rollouts.weight_G,
            minibatch_G=torch.from_numpy(self.order.minibatch_of(rollout)),
            length_C=rollouts.length_C,
            truncated_C=rollouts.truncated_C,
        )
        if found is None:
            with trainer.watchdog.patient(f"log-probs of the rollouts of step {first}"):
                rollouts.columns = self._scored_tokens(rollout, rollouts)
        given = (rollouts.columns.get(name) for name in ("old_logprobs", "reference_logprobs", "values"))
        columns = objective.columns(scored, *given)
        if found is None and self._on_disk:
            sums_C = segment_sums(columns["advantages"], rollouts.length_C)
            rollouts.advantage_C = sums_C / rollouts.length_C.clamp(min=1)
            if "returns" in columns:
                rollouts.columns["returns"] = columns["returns"]
            self._write(rollout, rollouts)
        columns |= rollouts.columns
        if self._generates:
            columns["engine_logprobs"] = rollouts.engine_logprobs()
        return _OpenRollouts(
            number=rollout,
            batches=self._batches(rollouts, columns, _OfRollouts(self.order, rollout)),
            metrics={**rollout_metrics(scored), **mean_rewards(rollouts.rewards)},
            seconds=rollouts.seconds,
        )

    def _batches(self, rollouts: Rollouts, columns: dict[str, Tensor], order: _OfRollouts) -> StepBatches:
        trainer, setup = self.trainer, self.trainer.setup
        rank = data_rank(setup.shape, setup.config.parallel, trainer.groups)
        options = pack_options(setup, self.objective)
        batches = StepBatches(rollouts.table(columns), order, options, rank, self.objective.normalization)
        if setup.adapter is not None and setup.adapter.dropout > 0:
            batches.dropout_seed = setup.config.train.seed
        return batches

    def _scored_tokens(self, rollout: int, rollouts: Rollouts) -> dict[str, Tensor]:
        """Return the log-probs and values of all tokens that the objective needs before its loss, by name."""
        trainer, needs = self.trainer, self.objective.needs
        scorers: dict[str, Scorer] = {}
        if "old_logprobs" in needs:
            scorers["old_logprobs"] = Scorer(trainer.model, self.objective)
        if "values" in needs and trainer.critic is not None:
            scorers["values"] = trainer.critic.scorer
        found: dict[str, Tensor] = {}
        if "reference_token_logprobs" in needs:
            if trainer.references.live is not None:
                scorers["reference_logprobs"] = trainer.references.live.scorer
            else:
                found["reference_logprobs"] = torch.zeros(int(rollouts.length_C.sum()), dtype=torch.float64)
        if scorers:
            # In the packs in which they are trained, so that the first step's ratios are exactly 1.
            batches = self._batches(rollouts, {}, _OfRollouts(self.order, rollout))
            first = rollout * self.order.steps_of_rollouts
            steps = [batches.step(first + part) for part in range(self.order.minibatches)]
            for name, scorer in scorers.items():
                found[name] = torch.cat([self._of_step(scorer, step, rollouts) for step in steps])
        return found

    def _of_step(self, scorer: Scorer, step: Step, rollouts: Rollouts) -> Tensor:
        """Return the log-probs of a step's completions, which follow those of the step before."""
        minibatch_C = per_token(
            torch.from_numpy(self.order.minibatch_of(self.order.place(step.number).rollout)), rollouts.size_G
        )
        length_S = rollouts.length_C[minibatch_C == self.order.place(step.number).minibatch]
        return step_logprobs(scorer, step, length_S.numpy(), self.trainer.groups)

    def _stored(self, number: int) -> np.ndarray:
        """Return the index of each completion of a step in the training data."""
        table, prompts_B = self.trainer.setup.train, self.order.samples(number)
        starts, counts = table.completion_offsets[prompts_B], table.completion_counts[prompts_B]
        return np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])

    def _first_prompt(self, rollout: int) -> int:
        """Return how many prompts earlier sets had: the keys of random numbers count from there."""
        return rollout * (self.trainer.config.rollout.prompts or 0)

    def _key(self, rollout: int) -> dict[str, Any]:
        """Return everything that determines a set of rollouts."""
        setup, config = self.trainer.setup, to_dict(self.trainer.config)
        return {
            "version": 1,
            "data": setup.train.path.name,
            "prompts": self.order.prompts(rollout).tolist(),
            "first_step": rollout * self.order.steps_of_rollouts + 1,
            "rollout": config["rollout"],
            "rewards": config.get("rewards"),
            "functions": self._functions,
            "objective": config["objective"],
            "reference": config["reference"],
            "seed": self.trainer.config.train.seed,
            "model": config["model"],
            **{name: config[name] for name in self._updates},
        }

    def _unread(self, first: int) -> tuple[str, ...]:
        """Return the parts of the key that need not match for rollouts whose first step is ``first``, 1-based.

        Those of an update do where the weights that sampled are not among those that the run resumes from: a run with
        another learning rate would never have had them.
        """
        assert self._first_step is not None, "a step was taken"
        return self._updates if first <= self._first_step + 1 else ()

    def _write(self, rollout: int, rollouts: Rollouts) -> None:
        """Write the rollouts on rank 0.

        Raises:
            OSError: on every rank: the disk refuses it.
        """
        trainer = self.trainer
        trainer.setup.require_folder()
        fault: OSError | None = None
        if dist.get_rank() == 0:
            folder = rollouts_folder(trainer.setup.folder, rollout * self.order.steps_of_rollouts + 1)
            try:
                folder.parent.mkdir(exist_ok=True)
                faults.at("rollouts.write", trainer.step + 1)
                write_rollouts(folder, rollouts, self._key(rollout))
                faults.at("rollouts.written", trainer.step + 1)
            except OSError as error:
                fault = error
        if all_reduce_sum([float(fault is not None)])[0]:
            raise fault or OSError("rank 0 could not write the rollouts")


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenRollouts:
    """A set of rollouts that is trained on.

    Args:
        number: 0-based.
        batches: of its steps.
        metrics: of the set, for the rows of its steps.
        seconds: by phase, for the row of the first of them.
    """

    number: int
    batches: StepBatches
    metrics: dict[str, float]
    seconds: dict[str, float]


class _OfRollouts:
    """The steps of one set of rollouts, whose samples count from 0."""

    def __init__(self, order: RolloutOrder, rollout: int):
        self._order, self.steps = order, order.steps
        self._minibatch_G = order.minibatch_of(rollout)

    def samples(self, step: int) -> np.ndarray:
        """See :class:`.StepOrder`."""
        return np.flatnonzero(self._minibatch_G == self._order.place(step).minibatch)

    def size(self, step: int) -> int:
        """See :class:`.StepOrder`."""
        return len(self.samples(step))
