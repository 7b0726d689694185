"""Convert turns of a conversation, in OpenAI's form (role, content) or ShareGPT's (from, value); tools and calls."""

from __future__ import annotations

from typing import Any

from megatron_align.data.formats.fields import (
    RawRecord,
    bad_field,
    decoded_json,
    nonempty_list,
    require_encodable,
    shortened,
    text,
)
from megatron_align.errors import InputError, nearest
from megatron_align.records import ROLES, Message

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# Fields of a message that are read here; the others go to the chat template.
_OWN_FIELDS = ("role", "content", "train", "weight")


def messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    """Convert a list of ``{role, content}``."""
    return tuple(
        message(item, where, f"{name}[{i}]") for i, item in enumerate(nonempty_list(value, where, name))
    )


def message(item: Any, where: str, name: str) -> Message:
    """Convert ``{role, content}``, with ``tool_calls``, ``train`` and further fields for the chat template."""
    if not isinstance(item, dict):
        raise bad_field(where, name, "an object with role and content", item)
    refuse_unsupported(item, where, f"{name}.")
    role = item.get("role")
    if not isinstance(role, str):
        raise bad_field(where, f"{name}.role", "a string", role)
    if role not in ROLES:
        raise InputError(
            f"{where}: field '{name}.role' must be one of {', '.join(ROLES)}, "
            f"got {shortened(role)}{nearest(role, list(ROLES))}"
        )
    extra = {key: value for key, value in item.items() if key not in _OWN_FIELDS and value is not None}
    calls = _tool_calls(extra.pop("tool_calls", []), role, where, f"{name}.tool_calls")
    if calls:
        extra["tool_calls"] = calls
    content = item.get("content")
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise bad_field(where, f"{name}.content", "a string", content)
    require_encodable(content, where, f"{name}.content")
    require_encodable(extra, where, name)
    return require_content(
        Message(role, content, extra, _trained(item, role, where, name)), where, f"{name}.content"
    )


def require_content(turn: Message, where: str, name: str) -> Message:
    """Return the turn unless it is an empty one of the user or the assistant."""
    is_empty = not turn.content.strip() and not turn.extra.get("tool_calls")
    if turn.role in ("user", "assistant") and is_empty:
        raise InputError(
            f"{where}: field '{name}' must not be empty in a turn of the {turn.role}, "
            f"got {shortened(turn.content)}"
        )
    return turn


def sharegpt(record: RawRecord, where: str) -> tuple[tuple[Message, ...], tuple[Any, ...] | None]:
    """Return the turns of ``conversations`` and the tools, as chat templates expect them."""
    listed = nonempty_list(record["conversations"], where, "conversations")
    system = text(record, "system", where, optional=True)
    turns = tuple(sharegpt_turn(turn, where, f"conversations[{i}]") for i, turn in enumerate(listed))
    if system and turns[0].role == "system":
        raise InputError(f"{where}: field 'system' must not be given with a system turn, got both")
    return system_turn(system) + turns, wrapped_tools(record, where)


def sharegpt_turn(item: Any, where: str, name: str) -> Message:
    """Convert ``{from, value}``."""
    if not isinstance(item, dict):
        raise bad_field(where, name, "an object with from and value", item)
    refuse_unsupported(item, where, f"{name}.")
    speaker, value = item.get("from"), item.get("value")
    if not isinstance(speaker, str):
        raise bad_field(where, f"{name}.from", "a string", speaker)
    if speaker not in SPEAKERS:
        raise InputError(
            f"{where}: field '{name}.from' must be one of {', '.join(SPEAKERS)}, "
            f"got {shortened(speaker)}{nearest(speaker, list(SPEAKERS))}"
        )
    if not isinstance(value, str):
        raise bad_field(where, f"{name}.value", "a string", value)
    require_encodable(value, where, f"{name}.value")
    train = _trained(item, SPEAKERS[speaker], where, name)
    if speaker == "function_call":
        calls = _function_calls(value, where, f"{name}.value")
        return Message("assistant", "", {"tool_calls": calls}, train)
    return require_content(Message(SPEAKERS[speaker], value, train=train), where, f"{name}.value")


def system_turn(system: str) -> tuple[Message, ...]:
    """Return the system turn, if there is one."""
    return (Message("system", system),) if system else ()


def tools_of(record: RawRecord, where: str) -> tuple[Any, ...] | None:
    """Return the available tools, given as a list or as its JSON text; None if there are none."""
    value = record.get("tools")
    if isinstance(value, str):
        value = decoded_json(value, where, "tools") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise bad_field(where, "tools", "a list of objects", value)
    return tuple(require_encodable(value, where, "tools")) or None


def wrapped_tools(record: RawRecord, where: str) -> tuple[Any, ...] | None:
    """Return the available tools, bare functions wrapped as chat templates expect."""
    tools = tools_of(record, where)
    return tools and tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def refuse_unsupported(item: RawRecord, where: str, prefix: str = "") -> None:
    """Refuse fields that would change what is trained and are not supported yet, rather than ignore them."""
    if item.get("chat_template_kwargs") is not None:
        raise InputError(
            f"{where}: field '{prefix}chat_template_kwargs' is not supported yet, "
            f"got {shortened(item['chat_template_kwargs'])}"
        )


def _trained(item: RawRecord, role: str, where: str, name: str) -> bool:
    """Return whether the turn may be trained on: ``train``, or OpenAI's ``weight`` of 0 or 1."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise bad_field(where, f"{name}.train", "true or false", train)
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise bad_field(where, f"{name}.weight", "0 or 1", weight)
        if train is not None and train != bool(weight):
            raise InputError(f"{where}: field '{name}.weight' must agree with 'train', got {weight}, {train}")
        train = bool(weight)
    if train and role != "assistant":
        field = "weight" if item.get("train") is None else "train"
        raise InputError(f"{where}: field '{name}.{field}' must belong to an assistant turn, got '{role}'")
    return train is not False


def _tool_calls(calls: Any, role: str, where: str, name: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise bad_field(where, name, "a list of objects", calls)
    if calls and role != "assistant":
        raise InputError(f"{where}: field '{name}' must belong to an assistant turn, got role '{role}'")
    return require_encodable(calls, where, name)


def _function_calls(value: str, where: str, name: str) -> list[RawRecord]:
    """Decode ``{"name", "arguments"}``, or a list of them, into the tool calls that chat templates expect."""
    calls = decoded_json(value, where, name)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise bad_field(where, name, "JSON with name and arguments", call)
    called = [
        {"name": call["name"], "arguments": _arguments(call["arguments"], where, name)} for call in calls
    ]
    return [{"type": "function", "function": require_encodable(function, where, name)} for function in called]


def _arguments(value: Any, where: str, name: str) -> Any:
    return decoded_json(value, where, f"{name}.arguments") if isinstance(value, str) else value
