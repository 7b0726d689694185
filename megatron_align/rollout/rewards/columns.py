"""Arguments of reward functions and endpoints, as TRL gives them: prompts, completions, the other fields of records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_align.errors import InputError
from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.types import Completion

RESERVED = ("prompts", "completions", "completion_ids")
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")


def column_names(records: Sequence[PromptRecord], name: str) -> tuple[str, ...]:
    """Return the fields that any record has besides its prompt, sorted.

    Args:
        records: all prompts.
        name: of the reward, for errors.

    Raises:
        InputError: a field has the name of another argument.
    """
    names = {field for record in records for field in record.raw} - set(_NOT_COLUMNS)
    for reserved in RESERVED[:2]:
        if reserved in names:
            where = next(record.where for record in records if reserved in record.raw)
            raise InputError(
                f"{where}: the field '{reserved}' has the name of an argument of reward {name}: rename it"
            )
    return tuple(sorted(names))


def arguments(
    scored: Sequence[tuple[PromptRecord, Completion]], columns: Sequence[str]
) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Return prompts, completions and token ids, and the columns: lists with an element for each completion.

    Completions of a prompt that is text are text; of messages they are ``[{"role": "assistant", "content": ...}]``.
    A record without a field has None in its column.
    """
    given: dict[str, list[Any]] = {
        "prompts": [record.prompt_field() for record, _ in scored],
        "completions": [
            completion.text
            if isinstance(record.prompt, str)
            else [{"role": "assistant", "content": completion.text}]
            for record, completion in scored
        ],
        "completion_ids": [list(completion.token_ids) for _, completion in scored],
    }
    return given, {name: [record.raw.get(name) for record, _ in scored] for name in columns}
