"""The data of tasks as tables of samples: stores of chat data and pairs, and multiple choice in memory.

Shapes: L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_align.data.formats.fields import RawRecord, bad_field, nonempty_list, text
from megatron_align.data.sample_table import MemoryTable
from megatron_align.data.store import TokenStore
from megatron_align.data.tokenize.cache_key import StoreSpec
from megatron_align.data.tokenize.chat_template import load_chat_template
from megatron_align.data.tokenize.encoder import common_prefix_length
from megatron_align.data.tokenize.record_blocks import read_shapes
from megatron_align.data.tokenize.template_clock import parse_date, reads_of_clock, tokenizer_templates
from megatron_align.errors import InputError
from megatron_align.evaluation.config import ChoiceTask, StoredTask, Task
from megatron_align.model.parallel import RankInfo
from megatron_align.objectives.base import DATA_KINDS, DataKind
from megatron_align.records import Sample
from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer, read_prompts
from megatron_align.training.setup import tokenised

# Names that data sets have for the choices and the right one; the first that a record has is read.
CHOICES, RIGHT = ("choices", "options", "endings"), ("answer", "answerKey", "label", "gold")
LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Multiple-choice questions, each a prompt with its choices as completions.

    Args:
        table: the questions.
        correct: index of the right choice of each.
        characters: length of each choice's text, without the delimiter.
        rendered: whether a prompt was messages, which the chat template has rendered.
    """

    table: MemoryTable
    correct: np.ndarray
    characters: np.ndarray
    rendered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskContext:
    """The model, folders and date with which tasks are read, and how they are run.

    Args:
        assets: folder of the model's config and tokenizer.
        out: folder of the results.
        cache: folder of tokenised data.
        rank_info: this process.
        sequence_length: longest sample, in tokens.
        template_date: ISO date that chat templates read from the clock.
        chat_template: file of the template of tasks that name none; None: the tokenizer's own.
        scratch: of a dry run: folder for data that are not in the cache, which then is not written; None: no dry run.
        shown: whether progress is shown, on rank 0.
    """

    assets: Path
    out: Path
    cache: Path
    rank_info: RankInfo
    sequence_length: int
    template_date: str
    chat_template: str | None = None
    scratch: Path | None = None
    shown: bool = True

    @property
    def now(self) -> datetime:
        """The time that chat templates read."""
        return parse_date(self.template_date)

    @property
    def shows(self) -> bool:
        """Whether this process shows progress."""
        return self.shown and self.rank_info.rank == 0

    def template_of(self, task: Task) -> str | None:
        """Return the file of a task's chat template; None: the tokenizer's own."""
        return getattr(task, "chat_template", None) or self.chat_template

    def clock(self, task: Task) -> dict[str, str]:
        """Return what the chat template of a task reads from the clock; empty: nothing."""
        given = self.template_of(task)
        texts = [load_chat_template(given)] if given else tokenizer_templates(str(self.assets))
        return reads_of_clock(texts, self.now)


def open_store(task: StoredTask, kinds: Sequence[DataKind], context: TaskContext) -> TokenStore:
    """Return the tokenised data of a task, tokenising them if need be, before the ranks meet.

    Args:
        task: of the evaluation.
        kinds: accepted kinds of data.
        context: of the evaluation.

    Raises:
        InputError: bad data, or data of another kind.
    """
    spec = StoreSpec(
        sources=task.sources,
        tokenizer=str(context.assets),
        sequence_length=context.sequence_length,
        too_long=task.too_long,
        cache=str(context.cache),
        shape=task.shape,
        chat_template=context.template_of(task),
        template_date=context.template_date,
    )
    kind = read_shapes(spec)[0]
    if kind not in kinds:
        accepted = " or ".join(DATA_KINDS[each] for each in kinds)
        raise InputError(
            f"task {task.name}: must have {accepted}, got {kind} data in {', '.join(task.sources)}"
        )
    return TokenStore(tokenised(spec, context.rank_info, context.scratch))


def read_choices(
    task: ChoiceTask,
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    now: datetime | None = None,
    chat_template: str | None = None,
) -> Choices:
    """Tokenise multiple-choice records: ``prompt`` (or ``question``), ``choices``, ``answer``.

    A prompt that is text is followed by the delimiter and a choice, and a choice's tokens are those that this adds to
    the prompt's, as in lm-eval; messages are followed by the generation prompt and the choice.

    Raises:
        InputError: a record is malformed or too long; names file, line and field.
    """
    file = task.chat_template or chat_template
    template = load_chat_template(file) if file else None
    prompts = PromptTokenizer(tokenizer, template, now)
    samples: list[Sample] = []
    sources: list[int] = []
    correct: list[int] = []
    characters: list[int] = []
    for source, path in enumerate(task.sources):
        for record in read_prompts(path, limit=task.limit):
            choices = _choices(record.raw, record.where)
            samples.append(_sample(record, choices, task.delimiter, prompts))
            length = len(samples[-1].tokens_L)
            if length > sequence_length:
                raise InputError(
                    f"{record.where}: a question with its choices must fit into {sequence_length} tokens, got {length}"
                )
            sources.append(source)
            correct.append(_answer(record.raw, choices, record.where))
            characters += map(len, choices)
    return Choices(
        table=MemoryTable(samples, np.array(sources, np.int32)),
        correct=np.array(correct),
        characters=np.array(characters),
        rendered=prompts.rendered,
    )


def _first(raw: RawRecord, names: Sequence[str]) -> str:
    return next((name for name in names if name in raw), names[0])


def _choices(raw: RawRecord, where: str) -> list[str]:
    name = _first(raw, CHOICES)
    value: Any = raw.get(name)
    if isinstance(value, dict) and "text" in value:  # ARC's: {text: [...], label: [...]}
        value = value["text"]
    listed = nonempty_list(value, where, name)
    choices = [text({f"{name}[{i}]": choice}, f"{name}[{i}]", where) for i, choice in enumerate(listed)]
    if len(choices) < 2 or not all(choices):
        raise bad_field(where, name, "at least two texts, none of them empty", value)
    if len(set(choices)) < len(choices):
        raise bad_field(where, name, "different texts", value)
    return choices


def _answer(raw: RawRecord, choices: Sequence[str], where: str) -> int:
    """Return the index of the right choice: ``answer`` is its index, its letter, its label or its text."""
    name = _first(raw, RIGHT)
    value, listed = raw.get(name), raw[_first(raw, CHOICES)]
    labels = listed.get("label") if isinstance(listed, dict) else None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    if isinstance(value, str):
        for names in (labels, choices, LABELS[: len(choices)]):
            if names is not None and value in list(names):
                return list(names).index(value)
        if value.isdecimal() and int(value) < len(choices):
            return int(value)
    raise bad_field(where, name, f"one of the {len(choices)} choices (index, letter or text)", value)


def _sample(record: PromptRecord, choices: Sequence[str], delimiter: str, prompts: PromptTokenizer) -> Sample:
    prompt = prompts.prompt(record, 0).token_ids
    texts = [f"{delimiter}{choice}" if isinstance(record.prompt, str) else choice for choice in choices]
    sequences = [prompts.continued(record, each) for each in texts]
    start = min(common_prefix_length(list(prompt), ids) for ids in sequences)
    if start == 0 or any(len(ids) <= start for ids in sequences):
        raise InputError(
            f"{record.where}: prompt and each choice must have a token, got none after tokenisation"
        )
    tokens = np.concatenate(
        [np.asarray(sequences[0][:start]), *(np.asarray(ids[start:]) for ids in sequences)]
    )
    return Sample(
        tokens.astype(np.int32),
        np.arange(len(tokens)) >= start,
        prompt_length=start,
        completion_lengths=tuple(len(ids) - start for ids in sequences),
    )
