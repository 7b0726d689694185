"""Convert a value of a configuration file or a command line to the type of its option, or say what it must be.

A text means what YAML makes of it where the option takes that (``true``, ``null``, ``1e-5``, ``[a, b]``), and itself
otherwise. ``1e6`` and ``3.0`` are whole numbers. Types that only an objective of a user's file has (paths, enums, ...)
are converted by jsonargparse.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, get_args, get_origin

from jsonargparse import ArgumentError, ArgumentParser

from megatron_align.config.familiar_names import answer
from megatron_align.config.yaml_text import parse_yaml
from megatron_align.errors import InputError, key_text, listed, nearest, shown

LARGEST_WHOLE = 2**63 - 1
LARGEST = 3.4028234e38  # of fp32: what an option is multiplied with
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


class UnsuitableValue(Exception):
    """A value is none of an option's type; the message, if any, is what is wrong with it."""


@lru_cache
def option_types(section: type) -> dict[str, Any]:
    """Return the type of each option of a dataclass."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}


def convert(value: Any, wanted: Any, key: str) -> Any:
    """Return a value as an option's type.

    Args:
        value: from YAML, a program or, as text, from a command line.
        wanted: type of the option.
        key: of the option, for errors.

    Raises:
        InputError: with the key, what it must be, and the value.
    """
    try:
        return _convert(value, wanted, key)
    except UnsuitableValue as problem:
        reason = str(problem)
    hint = reason or _hint(value, wanted)
    raise InputError(f"{key} must be {description(wanted)}, got {shown(value)}{hint}")


def description(wanted: Any) -> str:
    """Return in words what a type takes."""
    if wanted in _WORDS:
        return _WORDS[wanted]
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(description(member) for member in sorted(arguments, key=_is_null))
    if origin is list:
        return f"a list of {_plural(arguments[0])}"
    if origin is tuple and Ellipsis not in arguments:
        return f"a list of {len(arguments)} {_plural(arguments[0])}"
    if origin is dict or wanted is dict:
        return "a mapping"
    if dataclasses.is_dataclass(wanted):
        return f"a mapping {{{', '.join(field.name for field in dataclasses.fields(wanted))}}}"
    return f"a {getattr(wanted, '__name__', 'value')}"


def _plural(wanted: Any) -> str:
    plurals = {str: "texts", int: "whole numbers", float: "numbers"}
    if wanted in plurals:
        return plurals[wanted]
    if get_origin(wanted) is Literal:
        return listed(get_args(wanted))
    if get_origin(wanted) in (typing.Union, types.UnionType):
        return " or ".join(_plural(member) for member in get_args(wanted))
    if dataclasses.is_dataclass(wanted):
        return description(wanted).removeprefix("a ").replace("mapping", "mappings")
    return description(wanted).removeprefix("a ") + "s"


def _is_null(wanted: Any) -> bool:
    return wanted is type(None)


def _hint(value: Any, wanted: Any) -> str:
    """Return what probably was meant."""
    members = get_args(wanted) if get_origin(wanted) in (typing.Union, types.UnionType) else (wanted,)
    names = [str(name) for member in members if get_origin(member) is Literal for name in get_args(member)]
    if isinstance(value, str) and names:
        return nearest(value.lower(), names)
    single_value = isinstance(value, (str, int, float, Mapping)) and not isinstance(value, bool)
    for member in (member for member in members if get_origin(member) in (list, tuple) and single_value):
        single = [value] if isinstance(value, Mapping) else re.sub(r"[][(),]", " ", str(value)).split()
        try:
            _convert(single, member, "")
        except (UnsuitableValue, InputError):
            continue
        return f": write {f'[{listed(single)}]' if not isinstance(value, Mapping) else 'a list, [{...}]'}"
    if str in members and isinstance(value, (bool, int, float)):
        return ": put it into quotes"
    if bool in members and isinstance(value, (int, float)):
        return ": write true or false"
    return ""


def _convert(value: Any, wanted: Any, key: str) -> Any:
    if wanted is Any or wanted is object:
        return value
    origin = get_origin(wanted)
    members = get_args(wanted) if origin in (typing.Union, types.UnionType) else (wanted,)
    if isinstance(value, str) and members != (str,):
        return _of_text(value, members, key)
    return _of_members(value, members, key)


def _of_text(text: str, members: tuple[Any, ...], key: str) -> Any:
    """Return what YAML makes of a text if the option takes that, else the text."""
    try:
        value = parse_yaml(text, key)
    except InputError:
        value = text
    if value is None and text not in ("null", "Null", "NULL", "~"):  # an empty text, a comment
        value = text
    if not isinstance(value, str):
        try:
            return _of_members(value, members, key)
        except UnsuitableValue:
            if str not in members:
                raise
    return _of_members(text, members, key)


def _of_members(value: Any, members: tuple[Any, ...], key: str) -> Any:
    """Return the value as the first type that takes it; exact types come before those that it is converted to."""
    exact = [member for member in members if isinstance(member, type) and type(value) is member]
    problem = UnsuitableValue()
    for member in (*exact, *members):
        try:
            return _of_member(value, member, key)
        except UnsuitableValue as unsuitable:
            problem = unsuitable if str(unsuitable) or not str(problem) else problem
    raise problem


def _of_member(value: Any, wanted: Any, key: str) -> Any:
    origin = get_origin(wanted)
    if wanted is str or wanted is bool or wanted is type(None):
        return _exactly(value, wanted)
    if wanted is int:
        return _whole(value)
    if wanted is float:
        return _number(value)
    if origin is Literal:
        if value in get_args(wanted) and type(value) in {type(name) for name in get_args(wanted)}:
            return value
        raise UnsuitableValue
    if origin is list:
        return _items(value, get_args(wanted) * len(value) if isinstance(value, (list, tuple)) else (), key)
    if origin is tuple and Ellipsis not in get_args(wanted):
        return tuple(_items(value, get_args(wanted), key))
    if origin is dict:
        return _mapping(value, get_args(wanted), key)
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return build(value, wanted, key)
    return _of_other(value, wanted)


def _exactly(value: Any, wanted: type) -> Any:
    if type(value) is not wanted:
        raise UnsuitableValue
    return value


def _whole(value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise UnsuitableValue
    if abs(value) > LARGEST_WHOLE:
        raise UnsuitableValue(f": at most {LARGEST_WHOLE:,}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UnsuitableValue
    if not abs(value) <= LARGEST:  # NaN too
        raise UnsuitableValue(f": it must be finite, at most {LARGEST:.1e}")
    return float(value)


def _items(value: Any, wanted: tuple[Any, ...], key: str) -> list[Any]:
    if not isinstance(value, (list, tuple)) or len(value) != len(wanted):
        raise UnsuitableValue
    return [
        convert(item, kind, f"{key}[{i}]") for i, (item, kind) in enumerate(zip(value, wanted, strict=True))
    ]


def _mapping(value: Any, wanted: tuple[Any, ...], key: str) -> dict[Any, Any]:
    if not isinstance(value, Mapping):
        raise UnsuitableValue
    key_type, value_type = wanted
    return {
        convert(name, key_type, f"a key of {key}"): convert(item, value_type, f"{key}.{name}")
        for name, item in value.items()
    }


def build(value: Any, wanted: type, key: str) -> Any:
    """Build a dataclass from a mapping of its options.

    Raises:
        InputError: for an option that does not exist, is missing or unsuitable.
    """
    if type(value) is wanted:
        return value
    if not isinstance(value, Mapping):
        raise UnsuitableValue
    kinds = option_types(wanted)
    if unknown := [key_text(name) for name in value if name not in kinds]:
        known = [f": {text}" if (text := answer(name)) else nearest(name, kinds) for name in unknown]
        several = [f"'{key}.{name}'{text}" for name, text in zip(unknown, known, strict=True)]
        raise InputError(f"unknown configuration key{'s' * (len(several) > 1)} {listed(several)}")
    for field in dataclasses.fields(wanted):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.init and field.name not in value:
            raise InputError(f"{key}.{field.name} is missing")
    return wanted(**{name: convert(given, kinds[name], f"{key}.{name}") for name, given in value.items()})


def _of_other(value: Any, wanted: Any) -> Any:
    """Convert to a type that only jsonargparse knows."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_argument("--value", type=wanted)
        return parser.parse_object({"value": value}).value
    except (ArgumentError, TypeError, ValueError) as error:
        raise UnsuitableValue from error
