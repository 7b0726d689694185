"""Training steps on rollouts: generate, score, compute advantages, train; the next set with the new weights.

A set of rollouts serves ``objective.iterations x minibatches`` steps. It is written before it is trained on, and a run
that resumes reads it: completions, rewards and log-probs of the policy that sampled are then the same, bit for bit.

Every method is collective: all ranks call it, in the same order, and get the same rollouts.

Shapes: G prompts, C completions, N tokens of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from megatron_align.data.batching.rollout_order import Place, RolloutOrder, rollout_order
from megatron_align.data.batching.step_batches import Step, StepBatches
from megatron_align.data.store import TokenStore
from megatron_align.errors import TrainingFault
from megatron_align.losses.segments import per_token, segment_sums
from megatron_align.objectives.policy_gradient import PolicyGradientObjective
from megatron_align.objectives.scored_rollouts import ScoredRollouts, rollout_metrics
from megatron_align.rollout.prompt_table import PromptTable
from megatron_align.rollout.rewards.scoring import mean_rewards
from megatron_align.rollout.rollouts import Rollouts
from megatron_align.rollout.types import Completion
from megatron_align.training.batches import data_rank, pack_options
from megatron_align.training.dynamic_sampling import REPLACED
from megatron_align.training.generation import EngineRollouts, Generation, LivePolicy, PromptDraw
from megatron_align.training.prompt_cursor import PromptCursor
from megatron_align.training.rollout_files import RolloutFiles
from megatron_align.training.scoring import Scorer, step_logprobs

# Of log-probs, trainer against engine, in nats per token: engines in bf16 differ by 0.01 to 0.04.
MISMATCH_STOP = 0.05
OFF_POLICY_MISMATCH_STOP = 0.5  # and updates of the weights since then by some hundredths, as a rule


def given_rollouts(store: TokenStore, prompts_G: np.ndarray) -> Rollouts:
    """Return the completions of ranked data, with their scores as rewards (``rollout.engine: data``).

    They count as sampled by the policy, and as complete.
    """
    samples = [store.sample(int(i)) for i in prompts_G]
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
        self._engines = EngineRollouts(trainer, setup.train) if isinstance(setup.train, PromptTable) else None
        # Given completions stay in the data, but not the log-probs of the policy that later steps compare with, nor
        # the critic's values.
        kept = not objective.needs.isdisjoint({"old_logprobs", "values"})
        self._on_disk = self._engines is not None or kept
        self._files = RolloutFiles(trainer, order, has_critic=objective.has_critic)
        self._cursor = PromptCursor(setup.config.rollout.prompts or 0)
        self._current: _OpenRollouts | None = None
        self._ahead: tuple[int, Generation] | None = None  # the next set, which the engines are answering

    def steps(self, first: int, last: int) -> Iterator[Step]:
        """Yield the 0-based steps from ``first`` up to ``last``; each is made when it is taken."""
        for number in range(first, last):
            yield self.step(number)

    def step(self, number: int) -> Step:
        """Return a 0-based step, making its rollouts if no earlier step has."""
        place = self.order.place(number)
        if self._files.first_step is None:
            self._files.first_step = number
        current, seconds = self._current, {}
        if current is None or current.number != place.rollout:
            current = self._current = self._open(place.rollout)
            if self.trainer.config.rollout.off_policy_steps:
                self._begin(place.rollout + 1)
            seconds = {} if self._engines is None else self._engines.take_seconds()
        step = current.batches.step(number)
        statistics = {"rollout": place.rollout + 1, **current.metrics, **seconds}
        if current.version is not None:
            statistics["staleness"] = number - current.version
        packs = replace(
            step.packs,
            batches=[
                replace(batch, rows=replace(batch.rows, step_statistics=statistics)) for batch in step.batches
            ],
        )
        return replace(step, packs=packs, stored_C=self._stored(current.prompts_G, place))

    def require_match(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Check that the engine's log-probs are the trainer's, within ``rollout.mismatch_stop``.

        Raises:
            TrainingFault: on every rank, as metrics are global.
        """
        config = self.trainer.config.rollout
        usual = OFF_POLICY_MISMATCH_STOP if config.off_policy_steps else MISMATCH_STOP
        found, bound = metrics["mismatch_mean"], config.mismatch_stop or usual
        if self._engines is not None and not found <= bound:
            raise TrainingFault(
                f"step {step}: log-probs of the engine must be the trainer's within {bound:g} nats per token on "
                f"average (rollout.mismatch_stop), they differ by {found:.3g}: the engine has other weights, another "
                "temperature, or computes in another precision"
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold: where the prompts of the present set and of the next one begin."""
        return {} if self._current is None else {"rollouts": self._cursor.state(self._current.number)}

    def load_state(self, metadata: Mapping[str, Any]) -> None:
        """Continue with the prompts that come after those of a checkpoint; older ones do not name them."""
        self._cursor.load_state(metadata.get("rollouts"))

    def close(self) -> None:
        """Free the engines."""
        if self._engines is not None:
            self._engines.close()

    def settle(self) -> None:
        """Wait for the set of rollouts that is being generated, and write it, before a checkpoint is saved.

        A run that resumes there reads it: the weights that generated it are not in the checkpoint.
        """
        if self._ahead is None:
            return
        assert self._engines is not None, "it generates"
        (rollout, generation), self._ahead = self._ahead, None
        self._files.write(rollout, self._engines.finish(generation), generation.draw, generated=True)

    def _begin(self, rollout: int) -> None:
        """Let the engines answer the prompts of the next set with the present weights, unless it is on the disk."""
        if rollout * self.order.steps_of_rollouts >= self.order.steps:
            return
        draw = self._draw(rollout)
        assert self._engines is not None, "rollouts that are given are never off-policy"
        if self._files.read(rollout, draw) is None:
            self._ahead = rollout, self._engines.begin(draw, in_background=True)

    def _made(self, rollout: int, draw: PromptDraw) -> Rollouts:
        """Return a set that is not on the disk, or whose completions come with the data."""
        if self._engines is None:
            return given_rollouts(cast("TokenStore", self.trainer.setup.train), draw.prompts_G)
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != rollout:
            return self._engines.rollouts(draw)
        return self._engines.finish(ahead[1])

    def _open(self, rollout: int) -> _OpenRollouts:
        """Read or make a set of rollouts, and complete it by log-probs and advantages."""
        objective, trainer = self.objective, self.trainer
        first = rollout * self.order.steps_of_rollouts + 1
        draw = self._draw(rollout)
        found = self._files.read(rollout, draw) if self._on_disk else None
        rollouts = found if found is not None and self._engines is not None else self._made(rollout, draw)
        self._cursor.made(rollout, len(rollouts.completions) + int(rollouts.sampled.get(REPLACED, 0)))
        is_complete = found is not None and found.advantage_C is not None
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
        if not is_complete:
            with trainer.watchdog.patient(f"log-probs of the rollouts of step {first}"):
                rollouts.columns = self._scored_tokens(rollout, rollouts)
        given = (rollouts.columns.get(name) for name in ("old_logprobs", "reference_logprobs", "values"))
        columns = objective.columns(scored, *given)
        if not is_complete and self._on_disk:
            sums_C = segment_sums(columns["advantages"], rollouts.length_C)
            rollouts.advantage_C = sums_C / rollouts.length_C.clamp(min=1)
            if "returns" in columns:
                rollouts.columns["returns"] = columns["returns"]
            self._files.write(rollout, rollouts, draw)
        columns |= rollouts.columns
        if self._engines is not None:
            columns["engine_logprobs"] = rollouts.engine_logprobs()
        return _OpenRollouts(
            number=rollout,
            prompts_G=rollouts.prompt_G,
            batches=self._batches(rollouts, columns, _OfRollouts(self.order, rollout)),
            metrics={**rollout_metrics(scored), **mean_rewards(rollouts.rewards), **rollouts.sampled},
            version=None if self._engines is None else rollouts.flat[0].weight_version,
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

    def _stored(self, prompts_G: np.ndarray, place: Place) -> np.ndarray:
        """Return the index of each completion of a step in the training data."""
        prompts_B = prompts_G[self.order.minibatch_of(place.rollout) == place.minibatch]
        table = self.trainer.setup.train
        starts, counts = table.completion_offsets[prompts_B], table.completion_counts[prompts_B]
        return np.concatenate([start + np.arange(count) for start, count in zip(starts, counts, strict=True)])

    def _draw(self, rollout: int) -> PromptDraw:
        """Return the prompts of a set."""
        first = self._cursor.first(rollout)
        prompts_G = self.order.stream(first, first + self.order.rollouts.size(rollout))
        return PromptDraw(prompts_G, first, self.order.stream)


@dataclass(frozen=True, slots=True, kw_only=True)
class _OpenRollouts:
    """A set of rollouts that is trained on.

    Args:
        number: 0-based.
        prompts_G: index of each prompt in the training data.
        batches: of its steps.
        metrics: of the set, for the rows of its steps.
        version: of the weights that generated it; None: it was given.
    """

    number: int
    prompts_G: np.ndarray
    batches: StepBatches
    metrics: dict[str, float]
    version: int | None


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
