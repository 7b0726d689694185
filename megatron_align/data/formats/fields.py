"""Check single fields of a record. ``name`` is the path of a field inside its record, as in ``messages[0].role``."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_align.data.formats.json_text import JsonDecoder
from megatron_align.errors import InputError, shown

RawRecord = dict[str, Any]
MAX_DEPTH = 100  # levels of a tool's schema or a call's arguments; chat templates recurse over them
LARGEST = 3.4028234663852886e38  # of float32, in which a step's margins, scores and weights are
SMALLEST = 1.1754943508222875e-38  # positive and normal in float32


def text(record: RawRecord, name: str, where: str, *, optional: bool = False) -> str:
    """Return a string field; a missing optional one is ``""``."""
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise bad_field(where, name, "a string", value)
    return _require_encodable(value, where, name)


def nonempty_text(record: RawRecord, name: str, where: str) -> str:
    """Return a string field that is not blank."""
    value = text(record, name, where)
    if not value.strip():
        raise InputError(f"{where}: field '{name}' must not be empty, got {shown(value)}")
    return value


def require_renderable(value: Any, where: str, name: str, depth: int = 0) -> Any:
    """Return the value if a chat template and a tokenizer can write it as it is.

    Raises:
        InputError: for an unpaired surrogate or a NUL in a string, a number that is not finite, a value that JSON
            does not have, or nesting of more than ``MAX_DEPTH`` levels.
    """
    if isinstance(value, str):
        return _require_encodable(value, where, name)
    if depth > MAX_DEPTH:
        raise InputError(
            f"{where}: field '{name[:57]}...' must be nested at most {MAX_DEPTH} levels deep, got more"
        )
    if isinstance(value, dict):
        for key, item in value.items():
            require_renderable(key, where, name, depth)
            require_renderable(item, where, f"{name}.{key}", depth + 1)
    elif isinstance(value, list):
        for i, item in enumerate(value):
            require_renderable(item, where, f"{name}[{i}]", depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        raise bad_field(where, name, "a finite number", value)
    elif value is not None and not isinstance(value, (bool, int, float)):
        raise bad_field(where, name, "text, a number, true, false, null, a list or an object", value)
    return value


def _require_encodable(value: str, where: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field '{name}' must be valid Unicode, got {error.reason} at {error.start}"
        ) from error
    if "\0" in value:
        raise InputError(f"{where}: field '{name}' must not contain NUL, got one at {value.index(chr(0))}")
    return value


def nonempty_list(value: Any, where: str, name: str) -> list[Any]:
    """Return a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise bad_field(where, name, "a non-empty list", value)
    return value


def number(value: Any, where: str, name: str) -> float:
    """Return a finite number that float32 holds."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and -LARGEST <= value <= LARGEST:
        return float(value)
    beyond = is_number and LARGEST < abs(value) < 1.7e308
    raise bad_field(where, name, "a finite number" + " in float32 (at most 3.4e38)" * beyond, value)


def weight(record: RawRecord, where: str) -> float:
    """Return the sample's weight in the loss."""
    if record.get("weight") is None:
        return 1.0
    value = number(record["weight"], where, "weight")
    if value <= 0:
        raise bad_field(where, "weight", "positive", record["weight"])
    if value < SMALLEST:
        raise bad_field(where, "weight", "at least 1.2e-38, as float32 has none below", record["weight"])
    return value


def decoded_json(value: str, where: str, name: str) -> Any:
    """Return the value of a JSON text."""
    decoder = JsonDecoder()
    try:
        decoded = decoder.decode(value)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where}: field '{name}' must be JSON, got {reason} in {shown(value)}") from error
    except RecursionError as error:
        raise InputError(f"{where}: field '{name}' must be JSON, got one nested too deeply") from error
    if (key := decoder.repeated_key()) is not None:
        raise InputError(
            f"{where}: field '{name}' must not repeat a key of an object, got {shown(key)} twice"
        )
    return decoded


def bad_field(where: str, name: str, required: str, value: Any) -> InputError:
    """Return the error for a field that is not as ``required``."""
    return InputError(
        f"{where}: field '{name}' must be {required}, got {'nothing' if value is None else shown(value)}"
    )
