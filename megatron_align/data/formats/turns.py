"""The turns of a conversation, as OpenAI (role, content) and as ShareGPT (from, value) write them; tools and calls."""

from __future__ import annotations

from typing import Any

from megatron_align.data.formats.fields import RawRecord, clean, decoded, items, short, text, wrong
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
_OWN_FIELDS = ("role", "content", "train", "weight")  # of a message; the rest goes to the chat template


def messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    """Convert a list of ``{role, content}``."""
    return tuple(message(item, where, f"{name}[{i}]") for i, item in enumerate(items(value, where, name)))


def message(item: Any, where: str, name: str) -> Message:
    """Convert ``{role, content}``, with ``tool_calls``, ``train`` and whatever the chat template may use."""
    if not isinstance(item, dict):
        raise wrong(where, name, "an object with role and content", item)
    refuse_unsupported(item, where, f"{name}.")
    role = item.get("role")
    if not isinstance(role, str):
        raise wrong(where, f"{name}.role", "a string", role)
    if role not in ROLES:
        raise InputError(
            f"{where}: field '{name}.role' must be one of {', '.join(ROLES)}, "
            f"got {short(role)}{nearest(role, list(ROLES))}"
        )
    extra = {key: value for key, value in item.items() if key not in _OWN_FIELDS and value is not None}
    calls = _tool_calls(extra.pop("tool_calls", []), role, where, f"{name}.tool_calls")
    if calls:
        extra["tool_calls"] = calls
    content = item.get("content")
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise wrong(where, f"{name}.content", "a string", content)
    clean(content, where, f"{name}.content")
    clean(extra, where, name)
    return saying(Message(role, content, extra, _trained(item, role, where, name)), where, f"{name}.content")


def saying(turn: Message, where: str, name: str) -> Message:
    """Return the turn unless it is an empty one of somebody who must say something."""
    says_nothing = not turn.content.strip() and not turn.extra.get("tool_calls")
    if turn.role in ("user", "assistant") and says_nothing:
        raise InputError(
            f"{where}: field '{name}' must not be empty in a turn of the {turn.role}, "
            f"got {short(turn.content)}"
        )
    return turn


def sharegpt(record: RawRecord, where: str) -> tuple[tuple[Message, ...], tuple[Any, ...] | None]:
    """Return the turns of ``conversations`` and the tools, as chat templates expect them."""
    listed = items(record["conversations"], where, "conversations")
    system = text(record, "system", where, optional=True)
    turns = tuple(sharegpt_turn(turn, where, f"conversations[{i}]") for i, turn in enumerate(listed))
    if system and turns[0].role == "system":
        raise InputError(f"{where}: field 'system' must not stand beside a system turn, got both")
    return opening(system) + turns, functions(record, where)


def sharegpt_turn(item: Any, where: str, name: str) -> Message:
    """Convert ``{from, value}``."""
    if not isinstance(item, dict):
        raise wrong(where, name, "an object with from and value", item)
    refuse_unsupported(item, where, f"{name}.")
    speaker, value = item.get("from"), item.get("value")
    if not isinstance(speaker, str):
        raise wrong(where, f"{name}.from", "a string", speaker)
    if speaker not in SPEAKERS:
        raise InputError(
            f"{where}: field '{name}.from' must be one of {', '.join(SPEAKERS)}, "
            f"got {short(speaker)}{nearest(speaker, list(SPEAKERS))}"
        )
    if not isinstance(value, str):
        raise wrong(where, f"{name}.value", "a string", value)
    clean(value, where, f"{name}.value")
    train = _trained(item, SPEAKERS[speaker], where, name)
    if speaker == "function_call":
        calls = _function_calls(value, where, f"{name}.value")
        return Message("assistant", "", {"tool_calls": calls}, train)
    return saying(Message(SPEAKERS[speaker], value, train=train), where, f"{name}.value")


def opening(system: str) -> tuple[Message, ...]:
    """Return the system turn, if there is one."""
    return (Message("system", system),) if system else ()


def offered(record: RawRecord, where: str) -> tuple[Any, ...] | None:
    """Return the tools on offer, given as a list or as its JSON text; none is None."""
    value = record.get("tools")
    if isinstance(value, str):
        value = decoded(value, where, "tools") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise wrong(where, "tools", "a list of objects", value)
    return tuple(clean(value, where, "tools")) or None


def functions(record: RawRecord, where: str) -> tuple[Any, ...] | None:
    """Return the tools on offer where they may be listed bare, in the envelope that chat templates expect."""
    tools = offered(record, where)
    return tools and tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def refuse_unsupported(item: RawRecord, where: str, prefix: str = "") -> None:
    """Refuse fields that would change what is trained and are not built yet, rather than ignore them."""
    if item.get("chat_template_kwargs") is not None:
        raise InputError(
            f"{where}: field '{prefix}chat_template_kwargs' is not supported yet, "
            f"got {short(item['chat_template_kwargs'])}"
        )


def _trained(item: RawRecord, role: str, where: str, name: str) -> bool:
    """Return whether the turn may be trained on: ``train``, or OpenAI's ``weight`` of 0 or 1."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise wrong(where, f"{name}.train", "true or false", train)
    if weight is not None:
        if isinstance(weight, bool) or weight not in (0, 1):
            raise wrong(where, f"{name}.weight", "0 or 1", weight)
        if train is not None and train != bool(weight):
            raise InputError(f"{where}: field '{name}.weight' must agree with 'train', got {weight}, {train}")
        train = bool(weight)
    if train and role != "assistant":
        field = "weight" if item.get("train") is None else "train"
        raise InputError(f"{where}: field '{name}.{field}' must belong to an assistant turn, got '{role}'")
    return train is not False


def _tool_calls(calls: Any, role: str, where: str, name: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise wrong(where, name, "a list of objects", calls)
    if calls and role != "assistant":
        raise InputError(f"{where}: field '{name}' must belong to an assistant turn, got role '{role}'")
    return clean(calls, where, name)


def _function_calls(value: str, where: str, name: str) -> list[RawRecord]:
    """Decode ``{"name", "arguments"}``, or a list of them, into the tool calls that chat templates expect."""
    calls = decoded(value, where, name)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise wrong(where, name, "JSON with name and arguments", call)
    called = [
        {"name": call["name"], "arguments": _arguments(call["arguments"], where, name)} for call in calls
    ]
    return [{"type": "function", "function": clean(function, where, name)} for function in called]


def _arguments(value: Any, where: str, name: str) -> Any:
    return decoded(value, where, f"{name}.arguments") if isinstance(value, str) else value
