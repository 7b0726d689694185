"""The shapes of a chat record: how each is recognised, and how it becomes a Conversation or a Completion.

| shape                  | fields                                                                   |
|------------------------|--------------------------------------------------------------------------|
| messages               | ``messages: [{role, content}]``, optional ``tools``, ``tool_calls``      |
| sharegpt               | ``conversations: [{from, value}]``, optional ``system``, ``tools``       |
| alpaca                 | ``instruction, output``, optional ``input``, ``system``, ``history``     |
| prompt_completion      | ``prompt``, ``completion``: plain text, no chat template                 |
| prompt_completion_chat | the same as message lists: only the completion is trained on             |
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_align.errors import InputError, nearest
from megatron_align.records import ROLES, Completion, Conversation, Message

Record = dict[str, Any]

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


@dataclass(frozen=True, slots=True)
class Shape:
    """One way to write a record. ``matches`` looks at which fields there are, ``convert`` checks them."""

    name: str
    fields: str
    matches: Callable[[Record], bool]
    convert: Callable[[Record, str], Conversation | Completion]

    def read(self, record: Record, where: str) -> Conversation | Completion:
        """Convert a record of this shape.

        Raises:
            InputError: if the record is of another shape, or malformed; names the place and the field.
        """
        found = recognise(record, where)
        if found is not self:
            raise InputError(
                f"{where}: must be of shape '{self.name}' like the file's first record, got '{found.name}'"
            )
        return self.convert(record, where)


def recognise(record: Record, where: str) -> Shape:
    """Return the one shape that the record's fields fit, or raise InputError naming the fields found."""
    _refuse_unsupported(record, where, "")
    fitting = [shape for shape in SHAPES if shape.matches(record)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(f"'{shape.name}'" for shape in fitting)
        raise InputError(f"{where}: must have the fields of one shape, got those of {names}")
    known = " | ".join(shape.fields for shape in SHAPES)
    raise InputError(f"{where}: must have the fields of a known shape ({known}), got {sorted(record)!r}")


def _refuse_unsupported(item: Record, where: str, prefix: str) -> None:
    """Refuse fields that would change what is trained and are not built yet, rather than ignore them."""
    for name in ("weight", "train", "chat_template_kwargs"):
        if item.get(name) is not None:
            raise InputError(
                f"{where}: field '{prefix}{name}' is not supported yet, got {_short(item[name])}"
            )


def _from_messages(record: Record, where: str) -> Conversation:
    return _conversation(_messages(record["messages"], where, "messages"), where, _tools(record, where))


def _from_sharegpt(record: Record, where: str) -> Conversation:
    turns = _list(record["conversations"], where, "conversations")
    system = _text(record, "system", where, optional=True)
    messages = tuple(_turn(turn, where, f"conversations[{i}]") for i, turn in enumerate(turns))
    if system and messages[0].role == "system":
        raise InputError(f"{where}: field 'system' must not stand beside a system turn, got both")
    tools = tuple(_in_envelope(tool) for tool in _tools(record, where) or ())
    return _conversation(_opening(system) + messages, where, tools or None)


def _from_alpaca(record: Record, where: str) -> Conversation:
    instruction, given = _text(record, "instruction", where), _text(record, "input", where, optional=True)
    asked = "\n".join(part for part in (instruction, given) if part)
    turns = _opening(_text(record, "system", where, optional=True)) + _history(record, where)
    if not asked.strip():
        raise InputError(f"{where}: field 'instruction' must not be empty, got {instruction!r}")
    answer = _text(record, "output", where)
    if not answer.strip():
        raise InputError(f"{where}: field 'output' must not be empty, got {answer!r}")
    return _conversation((*turns, Message("user", asked), Message("assistant", answer)), where)


def _from_text(record: Record, where: str) -> Completion:
    _refuse_label(record, where)
    prompt, completion = _text(record, "prompt", where), _text(record, "completion", where)
    if not completion:
        raise InputError(f"{where}: field 'completion' must not be empty, got ''")
    return Completion(prompt, completion, where)


def _from_prompt_and_completion(record: Record, where: str) -> Conversation:
    _refuse_label(record, where)
    prompt = _messages(record["prompt"], where, "prompt")
    completion = _messages(record["completion"], where, "completion")
    return _conversation(prompt + completion, where, _tools(record, where), prompt_messages=len(prompt))


def _has(*names: str) -> Callable[[Record], bool]:
    return lambda record: all(name in record for name in names)


def _is_chat_completion(record: Record) -> bool:
    return isinstance(record.get("prompt"), list) and "completion" in record


def _is_text_completion(record: Record) -> bool:
    return "prompt" in record and "completion" in record and not _is_chat_completion(record)


SHAPES = (
    Shape("messages", "messages", _has("messages"), _from_messages),
    Shape("sharegpt", "conversations", _has("conversations"), _from_sharegpt),
    Shape("alpaca", "instruction + output", _has("instruction", "output"), _from_alpaca),
    Shape("prompt_completion", "prompt + completion", _is_text_completion, _from_text),
    Shape(
        "prompt_completion_chat",
        "the same as message lists",
        _is_chat_completion,
        _from_prompt_and_completion,
    ),
)


# Parts of a record. ``name`` is the path of a field inside its record, as people would write it.
def _conversation(
    messages: tuple[Message, ...],
    where: str,
    tools: tuple[Any, ...] | None = None,
    prompt_messages: int | None = None,
) -> Conversation:
    trained = messages[prompt_messages or 0 :]
    if not any(message.role == "assistant" for message in trained):
        part = "completion" if prompt_messages else "conversation"
        raise InputError(
            f"{where}: the {part} must have an assistant turn, got {[m.role for m in trained][:8]!r}"
        )
    return Conversation(messages, where, tools, prompt_messages)


def _messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    return tuple(_message(item, where, f"{name}[{i}]") for i, item in enumerate(_list(value, where, name)))


def _message(item: Any, where: str, name: str) -> Message:
    if not isinstance(item, dict):
        raise _wrong(where, name, "an object with role and content", item)
    _refuse_unsupported(item, where, f"{name}.")
    role = item.get("role")
    if not isinstance(role, str):
        raise _wrong(where, f"{name}.role", "a string", role)
    if role not in ROLES:
        raise InputError(
            f"{where}: field '{name}.role' must be one of {', '.join(ROLES)}, "
            f"got {_short(role)}{nearest(role, list(ROLES))}"
        )
    extra = {
        key: value for key, value in item.items() if key not in ("role", "content") and value is not None
    }
    calls = _tool_calls(extra.pop("tool_calls", []), role, where, f"{name}.tool_calls")
    if calls:
        extra["tool_calls"] = calls
    content = item.get("content")
    content = "" if content is None and calls else content
    if not isinstance(content, str):
        raise _wrong(where, f"{name}.content", "a string", content)
    return _checked(
        Message(role, _unicode(content, where, f"{name}.content"), extra), where, f"{name}.content"
    )


def _checked(message: Message, where: str, name: str) -> Message:
    """Return the message unless it is an empty turn of somebody who must say something."""
    says_nothing = not message.content.strip() and not message.extra.get("tool_calls")
    if message.role in ("user", "assistant") and says_nothing:
        raise InputError(
            f"{where}: field '{name}' must not be empty in a turn of the {message.role}, "
            f"got {_short(message.content)}"
        )
    return message


def _tool_calls(calls: Any, role: str, where: str, name: str) -> list[Any]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _wrong(where, name, "a list of objects", calls)
    if calls and role != "assistant":
        raise InputError(f"{where}: field '{name}' must belong to an assistant turn, got role '{role}'")
    return calls


def _turn(item: Any, where: str, name: str) -> Message:
    """Convert a ShareGPT turn."""
    if not isinstance(item, dict):
        raise _wrong(where, name, "an object with from and value", item)
    speaker, value = item.get("from"), item.get("value")
    if not isinstance(speaker, str):
        raise _wrong(where, f"{name}.from", "a string", speaker)
    if speaker not in SPEAKERS:
        raise InputError(
            f"{where}: field '{name}.from' must be one of {', '.join(SPEAKERS)}, "
            f"got {_short(speaker)}{nearest(speaker, list(SPEAKERS))}"
        )
    if not isinstance(value, str):
        raise _wrong(where, f"{name}.value", "a string", value)
    value = _unicode(value, where, f"{name}.value")
    if speaker == "function_call":
        return Message("assistant", "", {"tool_calls": _function_calls(value, where, f"{name}.value")})
    return _checked(Message(SPEAKERS[speaker], value), where, f"{name}.value")


def _function_calls(value: str, where: str, name: str) -> list[Record]:
    """Decode ``{"name", "arguments"}``, or a list of them, into the tool calls that chat templates expect."""
    calls = _json(value, where, name)
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("name"), str) or "arguments" not in call:
            raise _wrong(where, name, "JSON with name and arguments", call)
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": _arguments(call["arguments"], where, name)},
        }
        for call in calls
    ]


def _arguments(value: Any, where: str, name: str) -> Any:
    return _json(value, where, f"{name}.arguments") if isinstance(value, str) else value


def _in_envelope(tool: Record) -> Record:
    """ShareGPT lists bare functions; chat templates expect them wrapped as OpenAI does."""
    return tool if "function" in tool else {"type": "function", "function": tool}


def _tools(record: Record, where: str) -> tuple[Any, ...] | None:
    """Return the tools on offer, given as a list or as its JSON text; none is None."""
    value = record.get("tools")
    if isinstance(value, str):
        value = _json(value, where, "tools") if value.strip() else None
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise _wrong(where, "tools", "a list of objects", value)
    return tuple(value) or None


def _history(record: Record, where: str) -> tuple[Message, ...]:
    value = record.get("history")
    if value is None:
        return ()
    turns: list[Message] = []
    for i, pair in enumerate(value if isinstance(value, list) else [None]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise _wrong(
                where,
                f"history[{i}]",
                "a [question, answer] pair of strings",
                pair if isinstance(value, list) else value,
            )
        for j, role in enumerate(("user", "assistant")):
            name = f"history[{i}][{j}]"
            turns.append(_checked(Message(role, _unicode(pair[j], where, name)), where, name))
    return tuple(turns)


def _opening(system: str) -> tuple[Message, ...]:
    return (Message("system", system),) if system else ()


def _refuse_label(record: Record, where: str) -> None:
    """Keep unpaired preference data out: its bad completions (label false) must not be imitated."""
    if isinstance(record.get("label"), bool):
        raise InputError(
            f"{where}: prompt + completion must not have a true/false 'label' (unpaired preference data) here"
        )


def _text(record: Record, name: str, where: str, *, optional: bool = False) -> str:
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise _wrong(where, name, "a string", value)
    return _unicode(value, where, name)


def _unicode(text: str, where: str, name: str) -> str:
    """Return the text unless it holds half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field '{name}' must be valid Unicode, got {error.reason} at {error.start}"
        ) from error
    return text


def _list(value: Any, where: str, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise _wrong(where, name, "a non-empty list", value)
    return value


def _json(text: str, where: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: field '{name}' must be JSON, got {error.msg} in {_short(text)}"
        ) from error


def _wrong(where: str, name: str, need: str, value: Any) -> InputError:
    return InputError(
        f"{where}: field '{name}' must be {need}, got {'nothing' if value is None else _short(value)}"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
