"""Single fields of a record, checked. ``name`` is the path of a field inside its record, as people would write it."""

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
        raise wrong(where, name, "a string", value)
    return clean(value, where, name)


def said(record: RawRecord, name: str, where: str) -> str:
    """Return a string field that says something."""
    value = text(record, name, where)
    if not value.strip():
        raise InputError(f"{where}: field '{name}' must not be empty, got {short(value)}")
    return value


def clean(value: Any, where: str, name: str) -> Any:
    """Return the value unless a string in it holds half of a surrogate pair, or a NUL: no tokenizer takes them."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where}: field '{name}' must be valid Unicode, got {error.reason} at {error.start}"
            ) from error
        if "\0" in value:
            raise InputError(f"{where}: field '{name}' must not hold NUL, got one at {value.index(chr(0))}")
    elif isinstance(value, dict):
        for key, item in value.items():
            clean(key, where, name)
            clean(item, where, f"{name}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            clean(item, where, f"{name}[{i}]")
    return value


def items(value: Any, where: str, name: str) -> list[Any]:
    """Return a list that has something in it."""
    if not isinstance(value, list) or not value:
        raise wrong(where, name, "a non-empty list", value)
    return value


def number(value: Any, where: str, name: str) -> float:
    """Return a finite number."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:  # an integer beyond any float
            pass
    raise wrong(where, name, "a finite number", value)


def weight(record: RawRecord, where: str) -> float:
    """Return the sample's weight in the loss."""
    if record.get("weight") is None:
        return 1.0
    value = number(record["weight"], where, "weight")
    if value <= 0:
        raise wrong(where, "weight", "positive", record["weight"])
    return value


def decoded(value: str, where: str, name: str) -> Any:
    """Return what a JSON text holds."""
    try:
        return json.loads(value)
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InputError(f"{where}: field '{name}' must be JSON, got {reason} in {short(value)}") from error
    except RecursionError as error:
        raise InputError(f"{where}: field '{name}' must be JSON, got one nested too deep") from error


def wrong(where: str, name: str, need: str, value: Any) -> InputError:
    """Return the error of a field that is not what it must be."""
    return InputError(
        f"{where}: field '{name}' must be {need}, got {'nothing' if value is None else short(value)}"
    )


def short(value: Any) -> str:
    """Return the value as one short line."""
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}..."
