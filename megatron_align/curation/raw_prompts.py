"""Raw prompts of users, read from data of any shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_align.data.formats.files import expand, read_fields
from megatron_align.errors import InputError, require
from megatron_align.rollout.prompts import TEXT_FIELDS, prompt_record


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPrompt:
    """A prompt of a user.

    Args:
        text: of the prompt.
        raw: all fields of its record.
        where: ``file:line``.
    """

    text: str
    raw: Mapping[str, Any]
    where: str


@dataclass(frozen=True, slots=True)
class Unusable:
    """A record without a usable prompt: ``empty`` or ``malformed``, and the line that says why."""

    reason: str
    where: str
    line: str


def read_raw_prompts(path: str) -> Iterator[RawPrompt | Unusable]:
    """Yield the prompts of a file, folder or glob pattern; of a conversation the first turn of the user.

    Later turns of a conversation lean on the answers before them, so that they are no prompts by themselves.

    Raises:
        InputError: there is no such file, or the rest of one is unreadable.
    """
    for file in expand(path):
        for where, raw in read_fields(file):
            if isinstance(raw, InputError):
                yield Unusable("malformed", where, str(raw))
                continue
            try:
                yield RawPrompt(text=prompt_text(raw, where), raw=raw, where=where)
            except InputError as error:
                yield Unusable("empty" if _is_empty(_opening(raw)) else "malformed", where, str(error))


def prompt_text(raw: dict[str, Any], where: str) -> str:
    """Return the prompt of a record; of a conversation the first turn of the user.

    Raises:
        InputError: it has none, or an empty one.
    """
    record = prompt_record(_opening(raw), where)
    if isinstance(record.prompt, str):
        return record.prompt
    for message in record.prompt:
        if message.role == "user":
            require(bool(message.content.strip()), f"{where}: the first turn of the user must not be empty")
            return message.content
    raise InputError(f"{where}: a conversation must have a turn of the user, got none")


def _opening(raw: dict[str, Any]) -> dict[str, Any]:
    """Return a record whose conversation ends with the first turn of the user, where it is a list of turns."""
    for name, role, users in (("messages", "role", ("user",)), ("conversations", "from", ("human", "user"))):
        turns = raw.get(name)
        if isinstance(turns, list) and "prompt" not in raw:
            for i, turn in enumerate(turns):
                if isinstance(turn, Mapping) and turn.get(role) in users:
                    return {**raw, name: turns[: i + 1]}
    return raw


def _is_empty(raw: Mapping[str, Any]) -> bool:
    """Return whether a record has the field of a prompt, or a last turn, with nothing in it."""
    for name in (*TEXT_FIELDS, "messages", "conversations", "instruction"):
        value = raw.get(name)
        if isinstance(value, list) and value and isinstance(value[-1], Mapping):
            value = value[-1].get("content", value[-1].get("value"))
        if name in raw and (value is None or value == [] or (isinstance(value, str) and not value.strip())):
            return True
    return False
