"""Rewards by a reward model on the layout of a run: forward only, packed, each prompt computed once.

Shapes: L tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_align.config import ParallelConfig
from megatron_align.config.rewards import ModelReward
from megatron_align.data.sample_table import MemoryTable
from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.record_tokenizer import RecordTokenizer
from megatron_align.data.tokenize.template_clock import parse_date, reads_of_clock, tokenizer_templates
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.data.tokenize.turn_options import TurnOptions
from megatron_align.errors import InputError, require
from megatron_align.model.families import ModelShape, read_shape
from megatron_align.model.policy import build_policy, transformer_config
from megatron_align.records import Message, Preference, Sample
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.rewards.base import Group, Values, checked
from megatron_align.training.likelihood import CompletionScorer
from megatron_align.training.setup import DTYPES, locate, require_weights
from megatron_align.training.watchdog import Watchdog
from megatron_align.training.weights import read_model_weights, require_finite_weights

_ANY_TIME = datetime(2000, 1, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelSetup:
    """A checked reward model, before the ranks meet. Made by :meth:`of`.

    Args:
        config: of the reward.
        shape: of the model.
        tokenizer: with the model's own chat template, or the configured one.
        capacity: tokens of a pack.
        dtype: of weights and computation.
    """

    config: ModelReward
    shape: ModelShape
    tokenizer: RecordTokenizer
    capacity: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls, config: ModelReward, *, capacity: int, precision: str = "fp32", template_date: str | None = None
    ) -> RewardModelSetup:
        """Check a reward model's folder and read its tokenizer.

        Args:
            config: of the reward.
            capacity: of a pack in tokens, where the reward has none of its own.
            precision: where the reward has none of its own.
            template_date: where the reward has none of its own.

        Raises:
            InputError: there is no model, it is no reward model, or its template reads a date that is not given.
        """
        name = config.label
        weights, assets = locate(config.path)
        shape = read_shape(assets)
        require(
            shape.is_reward,
            f"reward {name}: path must hold a reward model, got {shape.architecture} at {config.path}",
        )
        require_weights(weights, assets, shape)
        template = load_chat_template(config.chat_template) if config.chat_template else None
        date = config.template_date or template_date
        read = [template] if template else tokenizer_templates(str(assets))
        require(
            date is not None or not reads_of_clock(read, _ANY_TIME),
            f"reward {name}: its chat template reads the date: set template_date, such as 2024-07-26, so that every "
            "start of the run gives the same rewards",
        )
        turns = TurnOptions(parse_date(date, f"reward {name}: template_date") if date else None)
        tokenizer = RecordTokenizer(load_tokenizer(str(assets)), template, turns)
        return cls(
            config=config,
            shape=shape,
            tokenizer=tokenizer,
            capacity=config.sequence_length or capacity,
            dtype=DTYPES[config.precision or precision],
        )


class RewardModel:
    """A second model in the ranks of a run. :meth:`score` is collective: all ranks give it the same groups.

    Args:
        setup: checked.
        layout: of the run.
        groups: of this rank.
        watchdog: of this rank.

    Raises:
        InputError: the layout does not fit the model, or its weights are incomplete, corrupt or not finite.
    """

    def __init__(
        self,
        setup: RewardModelSetup,
        layout: ParallelConfig,
        groups: ProcessGroupCollection,
        watchdog: Watchdog,
    ):
        self.setup, self.name = setup, setup.config.label
        path, shape = setup.config.path, setup.shape
        try:
            megatron = transformer_config(shape, layout, setup.dtype)
        except InputError as error:
            raise InputError(f"reward {self.name}, a model of {shape.num_layers} layers: {error}") from error
        chunks = build_policy(megatron, shape, groups)
        for chunk in chunks:
            chunk.requires_grad_(False)
        with watchdog.patient(f"loading the reward model {path}"):
            read_model_weights(chunks, path, shape, groups)
            require_finite_weights(chunks, path)
        self._score = CompletionScorer(
            chunks=chunks,
            parallel=layout,
            groups=groups,
            watchdog=watchdog,
            sequence_length=setup.capacity,
        )

    def check(self, records: Sequence[PromptRecord]) -> None:
        """Check that the reward model's tokenizer and template take every prompt.

        Raises:
            InputError: a prompt leaves no room for a completion, or its template fails.
        """
        check_prompts(self.setup, records)

    def score(self, groups: Sequence[Group]) -> Values:
        """Return the reward of each completion. Collective.

        Prompts and completions are rendered with the reward model's own template, not with that of the policy.

        Raises:
            InputError: on every rank: a prompt with a completion does not fit; or a reward is not finite.
        """
        return self.score_texts([(record, [c.text for c in completions]) for record, completions in groups])

    def score_texts(self, groups: Sequence[tuple[PromptRecord, Sequence[str]]]) -> Values:
        """Return the reward of each text, see :meth:`score`. Collective."""
        packed = [_samples(self.setup, record, texts) for record, texts in groups]
        samples = [sample for of_prompt, _ in packed for sample in of_prompt]
        doing = f"scoring by the reward model {self.name}"
        values = iter(self._score(MemoryTable(samples), doing, lambda *_: None).tolist() if samples else ())
        given: list[float | None] = []
        for of_prompt, places in packed:
            of_completions = [next(values) for sample in of_prompt for _ in sample.completion_lengths]
            given += [None if place is None else of_completions[place] for place in places]
        return checked(self.name, given, groups)

    def close(self) -> None:
        """The model stays for the run's life."""


def check_prompts(setup: RewardModelSetup, records: Sequence[PromptRecord]) -> None:
    """Check that a reward model can score every prompt with a short completion; see :meth:`RewardModel.check`."""
    for record in records:
        _samples(setup, record, ["."])


def _samples(
    setup: RewardModelSetup, record: PromptRecord, texts: Sequence[str]
) -> tuple[list[Sample], list[int | None]]:
    """Return samples that share the prompt, and the place of each text among all their completions; None: too long.

    Completions with the same tokens are scored once. A prompt whose completions fit no pack together is repeated.
    """
    alone = {text: setup.tokenizer.sample(_preference(record, text)) for text in dict.fromkeys(texts)}
    start = min((sample.prompt_length for sample in alone.values()), default=0)
    place_of: dict[bytes, int] = {}
    places: dict[str, int | None] = {}
    kept: list[np.ndarray] = []
    for text, sample in alone.items():
        if not _fits(setup, record, len(sample.tokens_L), texts.index(text)):
            places[text] = None
            continue
        completion_L = sample.tokens_L[start:]
        place = places[text] = place_of.setdefault(completion_L.tobytes(), len(kept))
        if place == len(kept):
            kept.append(completion_L)
    parts: list[list[np.ndarray]] = []
    room = 0
    for completion_L in kept:
        if not parts or len(completion_L) > room:
            parts.append([])
            room = setup.capacity - start
        parts[-1].append(completion_L)
        room -= len(completion_L)
    prompt_L = next(iter(alone.values())).tokens_L[:start] if alone else np.empty(0, np.int32)
    return [_sample(prompt_L, part) for part in parts], [places[text] for text in texts]


def _fits(setup: RewardModelSetup, record: PromptRecord, length: int, index: int) -> bool:
    """Return whether prompt and completion fit; ``index``: of the completion, for the error."""
    most = min(setup.shape.max_positions, setup.capacity)
    require(
        length <= most or setup.config.too_long == "skip",
        f"reward {setup.config.label}: prompt and completion must fit into the reward model's "
        f"{setup.shape.max_positions} positions and a pack of {setup.capacity} tokens, got {length} for completion "
        f"{index} of {record.where}; with too_long: skip it is not scored",
    )
    return length <= most


def _sample(prompt_L: np.ndarray, completions: Sequence[np.ndarray]) -> Sample:
    tokens_L = np.concatenate([prompt_L, *completions])
    return Sample(
        tokens_L,
        np.arange(len(tokens_L)) >= len(prompt_L),
        prompt_length=len(prompt_L),
        completion_lengths=tuple(map(len, completions)),
    )


def _preference(record: PromptRecord, text: str) -> Preference:
    completion = text if isinstance(record.prompt, str) else (Message("assistant", text),)
    return Preference(
        kind="ranked", prompt=record.prompt, completions=(completion,), where=record.where, tools=record.tools
    )
