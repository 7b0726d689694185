"""Rollouts of the live policy: its engines answer prompts, and rewards score the answers.

Every method is collective. A rank answers its share of the prompts; the random numbers of a completion depend on the
seed and on the number of its prompt among all that the run answers, not on the rank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align import faults
from megatron_align.config import RunConfig
from megatron_align.config.rollout import RolloutConfig
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, TrainingFault, one_line
from megatron_align.model.parallel import first_fault
from megatron_align.rollout.endpoint import Endpoint
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.live_weights import require_version
from megatron_align.rollout.prompt_table import PromptTable
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import background
from megatron_align.rollout.rollouts import Rollouts
from megatron_align.rollout.types import Completion, Prompt, Sampling
from megatron_align.rollout.vllm_engine import VLLMEngine
from megatron_align.rollout.vllm_server import VLLM_DTYPES, shared_server
from megatron_align.training.critic import Critic
from megatron_align.training.dynamic_sampling import replaced_without_signal
from megatron_align.training.known_tokens import require_known_tokens, require_scorable_tokens
from megatron_align.training.reference.builder import References
from megatron_align.training.rewards import RunRewards
from megatron_align.training.rollout_servers import endpoint_of
from megatron_align.training.setup import RunSetup
from megatron_align.training.watchdog import Watchdog

T = TypeVar("T")
_LOOK = 1.0  # seconds between two signs of life while servers are waited for


class LivePolicy(Protocol):
    """The part of the trainer that rollouts need.

    Attributes:
        setup: the checked run.
        config: of the run.
        watchdog: of this rank.
        groups: process groups of this rank.
        model: this rank's chunks.
        references: what the objective compares the policy with.
        critic: trained in the same steps; None: the objective has none.
        step: training steps made so far.
    """

    setup: RunSetup
    config: RunConfig
    watchdog: Watchdog
    groups: ProcessGroupCollection
    model: list[DistributedDataParallel]
    references: References
    critic: Critic | None
    step: int

    def live_engine(self) -> Engine: ...

    def update_engine(self, engine: Engine | None) -> None: ...


@dataclass(frozen=True, slots=True)
class PromptDraw:
    """The prompts of a set of rollouts, from the endless stream of the run's prompts.

    Args:
        prompts_G: their indices in the training data.
        first: place of the first of them in the stream; the keys of random numbers count from there.
        stream: prompts of the stream from one place up to another, to replace some of them.
    """

    prompts_G: np.ndarray
    first: int
    stream: Callable[[int, int], np.ndarray]


@dataclass(slots=True)
class Generation:
    """The first batch of a set of rollouts, which the engine is answering or has answered.

    Args:
        draw: its prompts.
        version: of the weights that the engine has.
        completions: of each prompt, the same on every rank; None: servers are answering this rank's share.
        answers: of this rank's share; None: they were answered at once.
    """

    draw: PromptDraw
    version: int
    completions: list[list[Completion]] | None = None
    answers: Future[list[list[Completion]]] | None = None


class EngineRollouts:
    """Generates the rollouts of a run with its engines.

    Args:
        trainer: of the run.
        prompts: its training data.
    """

    def __init__(self, trainer: LivePolicy, prompts: PromptTable):
        self._trainer, self._prompts = trainer, prompts
        self._engine: Engine | None = None
        self._opened = ExitStack()
        self._seconds: dict[str, float] = {}
        self._synced: int | None = None  # the step whose weights the engine was given
        self._rewards = RunRewards(trainer.config, trainer.groups, trainer.watchdog)
        self._rewards.check(prompts.records)

    def rollouts(self, draw: PromptDraw) -> Rollouts:
        """See :class:`.RolloutSource`.

        Raises:
            TrainingFault: on every rank: an engine or a reward failed.
        """
        return self.finish(self.begin(draw))

    def begin(self, draw: PromptDraw, *, in_background: bool = False) -> Generation:
        """Give the engine the present weights and let it answer a set's prompts.

        Args:
            draw: the prompts.
            in_background: servers answer while the ranks do something else; an engine of this process answers at once.

        Raises:
            TrainingFault: on every rank: an engine failed.
        """
        trainer = self._trainer
        with self._timed("sync_seconds"):
            with trainer.watchdog.patient(f"giving the engine the weights of step {trainer.step}"):
                self._sync()
            faults.at("rollouts.synced", trainer.step + 1)
        engine, generation = self._engine, Generation(draw, trainer.step)
        assert engine is not None, "it was given the weights"
        if in_background and engine.shared:
            generation.answers = background(partial(self._answers, draw.prompts_G, draw.first, trainer.step))
        else:
            with self._timed("rollout_seconds"):
                generation.completions = self._generate(draw.prompts_G, draw.first, trainer.step)
        return generation

    def finish(self, generation: Generation) -> Rollouts:
        """Return a set of rollouts, scored, once the engine has answered.

        Raises:
            TrainingFault: on every rank: an engine or a reward failed.
        """
        draw, version = generation.draw, generation.version
        with self._timed("rollout_seconds"):
            completions = generation.completions or self._awaited(generation)
            rollouts = self._scored(draw.prompts_G, completions)
            if (sampling := self._trainer.config.rollout.dynamic_sampling) is not None:

                def more(place: int, count: int) -> Rollouts:
                    first = draw.first + place
                    prompts_G = draw.stream(first, first + count)
                    return self._scored(prompts_G, self._generate(prompts_G, first, version))

                rollouts = replaced_without_signal(rollouts, sampling, more)
                self._combine(rollouts)  # a reward that is normalised over the batch is so over these prompts
        return rollouts

    def take_seconds(self) -> dict[str, float]:
        """Return the seconds by phase that were spent since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - began

    def _awaited(self, generation: Generation) -> list[list[Completion]]:
        """Wait for the servers; their own time limit ends this, so it counts as progress meanwhile."""
        trainer, answers = self._trainer, generation.answers
        assert answers is not None, "it was begun in the background"
        with trainer.watchdog.patient(f"waiting for the rollouts of step {trainer.step + 1}"):
            while not wait([answers], timeout=_LOOK).done:
                trainer.watchdog.detail("the servers answer")
            return self._gathered(answers.result, len(generation.draw.prompts_G))

    def _scored(self, prompts_G: np.ndarray, completions: list[list[Completion]]) -> Rollouts:
        """Return prompts and their completions with rewards."""
        trainer, table = self._trainer, self._prompts
        rollouts = Rollouts(
            prompt_G=prompts_G,
            prompt_ids=[table.token_ids[i] for i in prompts_G],
            texts=[table.records[i].prompt_field() for i in prompts_G],
            completions=completions,
            rewards={},
            reward_C=torch.zeros(0),
            scored_C=torch.zeros(0, dtype=torch.bool),
            weight_G=torch.ones(len(prompts_G), dtype=torch.float64),
        )
        self._score(rollouts)
        faults.at("rollouts.scored", trainer.step + 1)
        return rollouts

    def close(self) -> None:
        """Free the engine, stop its server, and free what the rewards hold."""
        if self._engine is not None:
            self._engine.close()
        self._opened.close()
        self._rewards.close()

    def _sync(self) -> None:
        """Give the engine the present weights, unless it has them; the first time it is built."""
        if self._engine is not None and self._synced == self._trainer.step:
            return
        if self._engine is None:
            servers = self._servers()
            self._engine = _together(
                lambda: build_engine(self._trainer, servers), "the engine could not be built"
            )
        self._trainer.update_engine(self._engine)
        self._synced = self._trainer.step

    def _servers(self) -> list[str | Endpoint]:
        """Return the vllm servers, one started if need be; it runs until :meth:`close`."""
        config, setup = self._trainer.config.rollout, self._trainer.setup
        if config.vllm_python is None:
            return [config.url] if isinstance(config.url, str) else list(config.url or ())
        dtype = VLLM_DTYPES[self._trainer.config.train.precision]
        log = setup.folder / "vllm.log"
        server = shared_server(config.vllm_python, setup.weights, log, config.vllm_options, dtype)
        return [self._opened.enter_context(server)]

    def _generate(self, prompts_G: np.ndarray, first: int, version: int) -> list[list[Completion]]:
        """Return the completions of each prompt, the same on every rank."""
        trainer = self._trainer
        with trainer.watchdog.patient(f"generating the rollouts of step {trainer.step + 1}"):
            return self._gathered(partial(self._answers, prompts_G, first, version), len(prompts_G))

    def _gathered(
        self, answers: Callable[[], list[list[Completion]]], prompts: int
    ) -> list[list[Completion]]:
        """Return the completions of each prompt on every rank, given the answers to each rank's share."""
        step = self._trainer.step + 1
        completions = gathered(_together(answers, f"generation failed in step {step}"), prompts)
        faults.at("rollouts.generated", step)
        return completions

    def _answers(self, prompts_G: np.ndarray, first: int, version: int) -> list[list[Completion]]:
        """Return the completions of this rank's share of the prompts; not collective."""
        trainer, table, engine = self._trainer, self._prompts, self._engine
        assert engine is not None, "it was given the weights"
        own = range(dist.get_rank(), len(prompts_G), dist.get_world_size())
        prompts = [
            Prompt(table.token_ids[prompts_G[g]].tolist(), first + g, table.records[prompts_G[g]].where)
            for g in own
        ]
        sampling = sampling_of(trainer.config.rollout, table.completions, trainer.config.train.seed)
        answers = engine.generate(prompts, sampling) if prompts else []
        require_version(answers, version)
        require_complete(answers, prompts, sampling)
        require_known_tokens(answers, prompts, trainer.setup.shape.vocab_size)
        require_scorable_tokens(answers, prompts, trainer.setup.scoring_vocabularies())
        return answers

    def _score(self, rollouts: Rollouts) -> None:
        """Fill in the rewards, the same on every rank."""
        values = self._rewards.score(list(zip(self._records(rollouts), rollouts.completions, strict=True)))
        rollouts.rewards = {
            name: [value for of_prompt in of_prompts for value in of_prompt]
            for name, of_prompts in values.items()
        }
        self._combine(rollouts)

    def _combine(self, rollouts: Rollouts) -> None:
        """Fill in the weighted sum of the rewards."""
        ends = np.cumsum([len(some) for some in rollouts.completions])[:-1]
        values = {
            name: [list(part) for part in np.split(np.array(of_completions, object), ends)]
            for name, of_completions in rollouts.rewards.items()
        }
        rollouts.reward_C, rollouts.scored_C = self._rewards.combine(values, self._records(rollouts))

    def _records(self, rollouts: Rollouts) -> list[PromptRecord]:
        return [self._prompts.records[i] for i in rollouts.prompt_G]


def sampling_of(config: RolloutConfig, completions: int, seed: int) -> Sampling:
    """Return how completions are drawn."""
    return Sampling(
        completions=completions,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        stop=tuple(config.stop),
        seed=seed,
    )


def build_engine(trainer: LivePolicy, servers: Sequence[str | Endpoint]) -> Engine:
    """Build this rank's engine; ``servers``: of vllm.

    Raises:
        InputError: it cannot be built, or its servers do not answer.
    """
    config = trainer.config.rollout
    if config.engine == "transformers":
        return trainer.live_engine()
    tokenizer = load_tokenizer(str(trainer.setup.assets))
    return VLLMEngine(
        [endpoint_of(config, server) for server in servers], tokenizer, weights_folder=config.weights_folder
    )


def require_complete(
    answers: Sequence[Sequence[Completion]], prompts: Sequence[Prompt], sampling: Sampling
) -> None:
    """Check that an engine answered every prompt with the number of completions of the sampling options.

    Raises:
        TrainingFault: naming the first prompt with another number.
    """
    if len(answers) != len(prompts):
        raise TrainingFault(
            f"an engine must answer all of {len(prompts)} prompts, got {len(answers)} answers"
        )
    for prompt, completions in zip(prompts, answers, strict=True):
        found = sum(bool(completion.token_ids) for completion in completions)
        if found != sampling.completions:
            raise TrainingFault(
                f"an engine must give {sampling.completions} completions of at least one token, got {found} for "
                f"{prompt.where}"
            )


def gathered(own: Sequence[T], count: int) -> list[T]:
    """Return the results of all ranks in the order of the prompts, of which rank r had r, r + ranks, ..."""
    ranks = dist.get_world_size()
    of_ranks: list[list[T]] = [[] for _ in range(ranks)]
    dist.all_gather_object(of_ranks, list(own))
    return [of_ranks[g % ranks][g // ranks] for g in range(count)]


def _together(compute: Callable[[], T], what: str) -> T:
    """Return what each rank computes; a fault of one is a fault of all. Collective.

    Raises:
        TrainingFault: on every rank, with the first fault.
    """
    fault, result = None, None
    try:
        result = compute()
    except (InputError, TrainingFault, OSError, RuntimeError) as error:  # out of memory is a RuntimeError
        fault = one_line(error)
    if first := first_fault(fault):
        raise TrainingFault(f"{what}: {first}")
    return cast("T", result)
