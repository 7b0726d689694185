"""Convert turns of a conversation, in OpenAI's form (role, content) or ShareGPT's (from, value); tools and calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_align.data.formats.fields import (
    RawRecord,
    bad_field,
    decoded_json,
    nonempty_list,
    require_renderable,
    text,
)
from megatron_align.data.formats.foreign_fields import refuse_unsupported
from megatron_align.errors import InputError, nearest, shown
from megatron_align.records import REASONING_FIELDS, ROLES, Message

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
# OpenAI's newer name of the system role: the chat templates of the families trained here know the older one.
_OTHER_ROLES = {"developer": "system"}
# Fields of a message that are read here; the others go to the chat template.
_OWN_FIELDS = ("role", "content", "train", "weight", "loss")
# Fields of a ShareGPT turn that are read here, and those that go to the chat template; the others are left alone.
_SHAREGPT_EXTRA = ("tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking")
_TEXT_PARTS = ("text", "input_text", "output_text")


def messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    """Convert a list of ``{role, content}``, or its JSON text."""
    return tuple(
        _turn(item, where, f"{name}[{i}]", message) for i, item in enumerate(_turns(value, where, name))
    )


def _turn(item: Any, where: str, name: str, usual: Callable[[Any, str, str], Message]) -> Message:
    """Convert one turn in the form that its fields show, which may be the other one than is usual there."""
    if isinstance(item, dict) and ("role" in item) != ("from" in item):
        return message(item, where, name) if "role" in item else sharegpt_turn(item, where, name)
    return usual(item, where, name)


def message(item: Any, where: str, name: str) -> Message:
    """Convert ``{role, content}``, with ``tool_calls``, ``train`` and further fields for the chat template."""
    if not isinstance(item, dict):
        raise bad_field(where, name, "an object with role and content", item)
    refuse_unsupported(item, where, f"{name}.")
    role = item.get("role")
    if not isinstance(role, str):
        raise bad_field(where, f"{name}.role", "a string", role)
    role = _OTHER_ROLES.get(role, role)
    if role not in ROLES:
        known = [*ROLES, *_OTHER_ROLES]
        raise InputError(
            f"{where}: field '{name}.role' must be one of {', '.join(known)}, "
            f"got {shown(role)}{nearest(role, known)}"
        )
    extra = {key: value for key, value in item.items() if key not in _OWN_FIELDS and value is not None}
    extra = _with_tool_calls(extra, role, where, name)
    content = _content(item.get("content"), _speaks_without_content(role, extra), where, f"{name}.content")
    require_renderable(extra, where, name)
    return require_content(
        Message(role, content, extra, _trained(item, role, where, name)), where, f"{name}.content"
    )


def _turns(value: Any, where: str, name: str) -> list[Any]:
    """Return a list of turns that is not empty; tables without nested columns (CSV) have its JSON text."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = decoded_json(value, where, name)
    return nonempty_list(value, where, name)


def _speaks_without_content(role: str, extra: RawRecord) -> bool:
    """Return whether a turn has calls or reasoning, so that its content may be null."""
    reasons = role == "assistant" and any(extra.get(field) for field in REASONING_FIELDS)
    return reasons or bool(extra.get("tool_calls"))


def _content(value: Any, may_be_null: bool, where: str, name: str) -> str:
    """Return a turn's text; a list of text parts is joined, as chat templates that know parts join them."""
    if isinstance(value, list):
        value = "".join(_part(part, where, f"{name}[{i}]") for i, part in enumerate(value))
    value = "" if value is None and may_be_null else value
    if not isinstance(value, str):
        raise bad_field(where, name, "a string", value)
    return require_renderable(value, where, name)


def _part(part: Any, where: str, name: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise bad_field(where, name, "a text part ({type: text, text: ...})", part)
    kind = part.get("type", "text")
    if kind not in _TEXT_PARTS:
        raise InputError(
            f"{where}: field '{name}.type' must be text, as only text is trained, got {shown(kind)}"
        )
    if not isinstance(part.get("text"), str):
        raise bad_field(where, f"{name}.text", "a string", part.get("text"))
    return part["text"]


def require_content(turn: Message, where: str, name: str) -> Message:
    """Return the turn unless it is an empty one of the user or the assistant; it may have calls or reasoning only."""
    given = ("tool_calls", *REASONING_FIELDS) if turn.role == "assistant" else ()
    is_empty = not turn.content.strip() and not any(turn.extra.get(name) for name in given)
    if turn.role in ("user", "assistant") and is_empty:
        raise InputError(
            f"{where}: field '{name}' must not be empty in a turn of the {turn.role}, "
            f"got {shown(turn.content)}"
        )
    return turn


def sharegpt(record: RawRecord, where: str) -> tuple[tuple[Message, ...], tuple[Any, ...] | None]:
    """Return the turns of ``conversations`` and the tools, as chat templates expect them."""
    listed = _turns(record["conversations"], where, "conversations")
    turns = tuple(_turn(item, where, f"conversations[{i}]", sharegpt_turn) for i, item in enumerate(listed))
    system = text(record, "system", where, optional=True)
    if system and turns[0].role == "system":
        raise InputError(f"{where}: field 'system' must not be given with a system turn, got both")
    return system_turn(system) + turns, wrapped_tools(record, where)


def sharegpt_turn(item: Any, where: str, name: str) -> Message:
    """Convert ``{from, value}``."""
    if not isinstance(item, dict):
        raise bad_field(where, name, "an object with from and value", item)
    refuse_unsupported(item, where, f"{name}.")
    speaker = item.get("from")
    if not isinstance(speaker, str):
        raise bad_field(where, f"{name}.from", "a string", speaker)
    if speaker not in SPEAKERS:
        raise InputError(
            f"{where}: field '{name}.from' must be one of {', '.join(SPEAKERS)}, "
            f"got {shown(speaker)}{nearest(speaker, list(SPEAKERS))}"
        )
    role = SPEAKERS[speaker]
    extra = {key: item[key] for key in _SHAREGPT_EXTRA if item.get(key) is not None}
    extra = _with_tool_calls(extra, role, where, name)
    require_renderable(extra, where, name)
    value = _content(item.get("value"), _speaks_without_content(role, extra), where, f"{name}.value")
    train = _trained(item, role, where, name)
    if speaker == "function_call" and (value.strip() or "tool_calls" not in extra):
        extra = _with_called(extra, _function_calls(value, where, f"{name}.value"), where, name)
        value = ""
    return require_content(Message(role, value, extra, train), where, f"{name}.value")


def system_turn(system: str) -> tuple[Message, ...]:
    """Return the system turn, if there is one."""
    return (Message("system", system),) if system else ()


def tools_of(record: RawRecord, where: str) -> tuple[Any, ...] | None:
    """Return the available tools: a list of objects, its JSON text, or a list of the objects' JSON texts."""
    value = record.get("tools")
    if isinstance(value, str):
        value = decoded_json(value, where, "tools") if value.strip() else None
    if value is None:
        return None
    if isinstance(value, list):
        value = [
            decoded_json(tool, where, f"tools[{i}]") if isinstance(tool, str) else tool
            for i, tool in enumerate(value)
        ]
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise bad_field(where, "tools", "a list of objects", value)
    tools = [_with_decoded_schema(tool, where, f"tools[{i}]") for i, tool in enumerate(value)]
    return tuple(require_renderable(tools, where, "tools")) or None


def _with_decoded_schema(tool: RawRecord, where: str, name: str) -> RawRecord:
    """Return the tool with its parameters' schema as an object, where it is given as JSON text."""
    function = tool.get("function")
    if isinstance(function, dict):
        return {**tool, "function": _decoded_schema(function, where, f"{name}.function")}
    return _decoded_schema(tool, where, name)


def _decoded_schema(function: RawRecord, where: str, name: str) -> RawRecord:
    schema = function.get("parameters")
    if not isinstance(schema, str):
        return function
    return {**function, "parameters": _object(schema, where, f"{name}.parameters")}


def wrapped_tools(record: RawRecord, where: str) -> tuple[Any, ...] | None:
    """Return the available tools, bare functions wrapped as chat templates expect."""
    tools = tools_of(record, where)
    return tools and tuple(t if "function" in t else {"type": "function", "function": t} for t in tools)


def _trained(item: RawRecord, role: str, where: str, name: str) -> bool:
    """Return whether the turn may be trained on: ``train``, SWIFT's ``loss``, or OpenAI's ``weight`` of 0 or 1."""
    given = {key: item[key] for key in ("train", "loss", "weight") if item.get(key) is not None}
    for key, value in given.items():
        if key != "weight" and not isinstance(value, bool):
            raise bad_field(where, f"{name}.{key}", "true or false", value)
        if key == "weight" and (isinstance(value, bool) or value not in (0, 1)):
            raise bad_field(where, f"{name}.weight", "0 or 1", value)
    train = None
    for key, value in given.items():
        if train is not None and train != bool(value):
            first = next(iter(given))
            raise InputError(
                f"{where}: field '{name}.{key}' must agree with '{first}', got {value}, {given[first]}"
            )
        train = bool(value)
    if train and role != "assistant":
        raise InputError(
            f"{where}: field '{name}.{next(iter(given))}' must belong to an assistant turn, got '{role}'"
        )
    return train is not False


def _with_tool_calls(extra: RawRecord, role: str, where: str, name: str) -> RawRecord:
    """Return a turn's further fields with their ``tool_calls`` converted; without them if there are none."""
    calls = extra.get("tool_calls", [])
    name = f"{name}.tool_calls"
    if isinstance(calls, str) and calls.lstrip()[:1] in ("", "["):
        calls = decoded_json(calls, where, name) if calls.strip() else []
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise bad_field(where, name, "a list of objects", calls)
    if calls and role != "assistant":
        raise InputError(f"{where}: field '{name}' must belong to an assistant turn, got role '{role}'")
    calls = [_tool_call(call, where, f"{name}[{i}]") for i, call in enumerate(calls)]
    others = {key: value for key, value in extra.items() if key != "tool_calls"}
    return {**others, "tool_calls": calls} if calls else others


def _tool_call(call: RawRecord, where: str, name: str) -> RawRecord:
    """Return a call, in its ``function`` wrapper or bare, with its arguments as an object."""
    if (function := call.get("function")) is None:
        return _function_call(call, where, name)
    if not isinstance(function, dict):
        raise bad_field(where, f"{name}.function", "an object with name and arguments", function)
    return {**call, "function": _function_call(function, where, f"{name}.function")}


def _function_call(function: RawRecord, where: str, name: str) -> RawRecord:
    """Return the function's name and its arguments as an object.

    OpenAI's API gives them as JSON text, which a template would write as a string within the JSON of the call.
    """
    if not isinstance(function.get("name"), str):
        raise bad_field(where, f"{name}.name", "a string", function.get("name"))
    arguments = function.get("arguments")
    return {
        **function,
        "arguments": _object("" if arguments is None else arguments, where, f"{name}.arguments"),
    }


def _object(value: Any, where: str, name: str) -> RawRecord:
    """Return an object, or that of a JSON text; an empty text is an empty object."""
    if isinstance(value, str):
        decoded = decoded_json(value, where, name) if value.strip() else {}
        if not isinstance(decoded, dict):
            raise bad_field(where, name, "a JSON object", value)
        return decoded
    if not isinstance(value, dict):
        raise bad_field(where, name, "an object, or its JSON text", value)
    return value


def _with_called(extra: RawRecord, called: list[RawRecord], where: str, name: str) -> RawRecord:
    """Return a turn's further fields with the calls of its text, which ``tool_calls`` may give once more."""
    given = extra.get("tool_calls", [])
    functions = [_function_of(call) for call in given]
    if given and functions != [_function_of(call) for call in called]:
        raise InputError(
            f"{where}: field '{name}.tool_calls' must be left out or give the calls of '{name}.value', got "
            f"{shown(functions)} and {shown([_function_of(call) for call in called])}"
        )
    return {**extra, "tool_calls": given or called}


def _function_of(call: RawRecord) -> RawRecord:
    function = call.get("function", call)
    return {"name": function["name"], "arguments": function["arguments"]}


def _function_calls(value: str, where: str, name: str) -> list[RawRecord]:
    """Decode ``{"name", "arguments"}``, or a list of them, into the tool calls that chat templates expect."""
    calls = decoded_json(value, where, name)
    calls = calls if isinstance(calls, list) else [calls]
    called = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or "name" not in function or "arguments" not in function:
            raise bad_field(where, name, "JSON with name and arguments", call)
        converted = _function_call(function, where, name)
        called.append({"name": converted["name"], "arguments": converted["arguments"]})
    return [
        {"type": "function", "function": require_renderable(function, where, name)} for function in called
    ]
