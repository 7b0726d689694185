"""Check single fields of a record. ``name`` is the path of a field inside its record, as in ``messages[0].role``."""

from __future__ import annotations

import json
import math
from typing import Any

from megatron_align.errors import InputError

RawRecord = dict[str, Any]


def text(record: RawRecord, name: str, where: str, *, optional: bool = False) -> str:
    """Return a string field; a missing optional one is ``""``."""
    value = record.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise bad_field(where, name, "a string", value)
    return require_encodable(value, where, name)


def nonempty_text(record: RawRecord, name: str, where: str) -> str:
    """Return a string field that is not blank."""
    value = text(record, name, where)
    if not value.strip():
        raise InputError(f"{where}: field '{name}' must not be empty, got {shortened(value)}")
    return value


def require_encodable(value: Any, where: str, name: str) -> Any:
    """Return the value unless a string in it holds an unpaired surrogate or a NUL: no tokenizer accepts them."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: field '{name}' must be valid Unicode, got {error.reason} at {error.start}"
            ) from error
        if "\0" in value:
            raise InputError(
                f"{where}: field '{name}' must not contain NUL, got one at {value.index(chr(0))}"
            )
    elif isinstance(value, dict):
        for key, item in value.items():
            require_encodable(key, where, name)
            require_encodable(item, where, f"{name}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            require_encodable(item, where, f"{name}[{i}]")
    return value


def nonempty_list(value: Any, where: str, name: str) -> list[Any]:
    """Return a list that is not empty."""
    if not isinstance(value, list) or not value:
        raise bad_field(where, name, "a non-empty list", value)
    return value


def number(value: Any, where: str, name: str) -> float:
    """Return a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer beyond the range of float
            pass
    raise bad_field(where, name, "a finite number", value)


def weight(record: RawRecord, where: str) -> float:
    """Return the sample's weight in the loss."""
    if record.get("weight") is None:
        return 1.0
    value = number(record["weight"], where, "weight")
    if value <= 0:
        raise bad_field(where, "weight", "positive", record["weight"])
    return value


def decoded_json(value: str, where: str, name: str) -> Any:
    """Return the value of a JSON text."""
    try:
        return json.loads(value)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(
            f"{where}: field '{name}' must be JSON, got {reason} in {shortened(value)}"
        ) from error
    except RecursionError as error:
        raise InputError(f"{where}: field '{name}' must be JSON, got one nested too deeply") from error


def bad_field(where: str, name: str, required: str, value: Any) -> InputError:
    """Return the error for a field that is not as ``required``."""
    return InputError(
        f"{where}: field '{name}' must be {required}, got {'nothing' if value is None else shortened(value)}"
    )


def shortened(value: Any) -> str:
    """Return the repr of a value, at most 60 characters."""
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
