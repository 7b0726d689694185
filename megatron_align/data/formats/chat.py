"""Convert chat records: raw fields to a Conversation (chat template) or a Completion (plain text)."""

from __future__ import annotations

from typing import Any

from megatron_align.data.formats.fields import (
    RawRecord,
    bad_field,
    nonempty_text,
    require_renderable,
    text,
    weight,
)
from megatron_align.data.formats.turns import (
    messages,
    require_content,
    sharegpt,
    system_turn,
    tools_of,
    wrapped_tools,
)
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Message


def from_messages(record: RawRecord, where: str) -> Conversation:
    """Convert ``messages``."""
    turns = messages(record["messages"], where, "messages")
    return _conversation(record, where, turns, tools_of(record, where))


def from_sharegpt(record: RawRecord, where: str) -> Conversation:
    """Convert ``conversations``."""
    turns, tools = sharegpt(record, where)
    return _conversation(record, where, turns, tools)


def from_alpaca(record: RawRecord, where: str) -> Conversation:
    """Convert ``instruction`` and ``output``."""
    answer = Message("assistant", nonempty_text(record, "output", where))
    return _conversation(record, where, (*alpaca_prompt(record, where), answer), wrapped_tools(record, where))


def from_text(record: RawRecord, where: str) -> Completion:
    """Convert ``prompt`` and ``completion``, both plain text."""
    prompt, completion = text(record, "prompt", where), text(record, "completion", where)
    if not completion:
        raise InputError(f"{where}: field 'completion' must not be empty, got ''")
    return Completion(prompt, completion, where, weight(record, where))


def from_prompt_and_completion(record: RawRecord, where: str) -> Conversation:
    """Convert ``prompt`` and ``completion``, both message lists."""
    prompt = messages(record["prompt"], where, "prompt")
    completion = messages(record["completion"], where, "completion")
    return _conversation(record, where, prompt + completion, tools_of(record, where), len(prompt))


def alpaca_prompt(record: RawRecord, where: str) -> tuple[Message, ...]:
    """Return the turns of an Alpaca record up to the last question."""
    instruction, context = text(record, "instruction", where), text(record, "input", where, optional=True)
    question = "\n".join(part for part in (instruction, context) if part)
    if not question.strip():
        raise InputError(f"{where}: field 'instruction' must not be empty, got {instruction!r}")
    turns = system_turn(text(record, "system", where, optional=True)) + _history(record, where)
    return (*turns, Message("user", question))


def _conversation(
    record: RawRecord,
    where: str,
    turns: tuple[Message, ...],
    tools: tuple[Any, ...] | None,
    prompt_messages: int | None = None,
) -> Conversation:
    candidates = [turn for turn in turns[prompt_messages or 0 :] if turn.role == "assistant"]
    part = "completion" if prompt_messages else "conversation"
    if not candidates:
        roles = [turn.role for turn in turns[prompt_messages or 0 :]][:8]
        raise InputError(f"{where}: the {part} must have an assistant turn, got {roles!r}")
    if not any(turn.train for turn in candidates):
        raise InputError(
            f"{where}: the {part} must have an assistant turn to train on, "
            f"got 'train': false (or 'weight': 0) in all {len(candidates)}"
        )
    return Conversation(turns, where, tools, prompt_messages, weight(record, where))


def _history(record: RawRecord, where: str) -> tuple[Message, ...]:
    value: Any = record.get("history")
    if value is None:
        return ()
    if not isinstance(value, list):
        raise bad_field(where, "history", "a list of [question, answer] pairs of strings", value)
    turns: list[Message] = []
    for i, pair in enumerate(value):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise bad_field(where, f"history[{i}]", "a [question, answer] pair of strings", pair)
        for j, role in enumerate(("user", "assistant")):
            name = f"history[{i}][{j}]"
            turns.append(
                require_content(Message(role, require_renderable(pair[j], where, name)), where, name)
            )
    return tuple(turns)
