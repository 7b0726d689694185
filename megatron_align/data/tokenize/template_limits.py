"""Limits on what a chat template may compute for one rendering: CPU time, and characters that it builds.

A template is a program, often somebody else's. Loops, calls and filters are counted, and every so often the thread's
CPU time is read; operations that can build much from little (``'a' * 10**12``, ``'%1000000000d' % 1``, ``replace``) are
refused before they run. So the limits need no signals and hold in threads and worker processes alike.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from typing import Any

from jinja2 import TemplateError
from jinja2.filters import make_attrgetter

CPU_SECONDS = 10.0
MAX_CHARACTERS = 100_000_000  # built in one rendering, intermediate texts included
PER_CHARACTER = 500  # more of them for each character of the record
MAX_NUMBER = 1_000_000  # a width, an indentation, a count
MAX_BITS = 100_000  # of an integer
MAX_NODES = 1_000_000  # of a nested value that is written as text
_TICKS = 256  # between two looks at the clock
_WIDTH = re.compile(r"\d{7,}")
_STAR = re.compile(r"%[^a-zA-Z%]*\*")
_WIDE_FILTERS = ("batch", "center", "indent", "round", "slice", "tojson", "truncate", "wordwrap")
_WIDE_METHODS = ("ljust", "rjust", "center", "zfill", "expandtabs", "to_bytes")
_LISTS = ("split", "rsplit", "splitlines")


class LimitError(TemplateError):
    """A chat template computes more than a rendering may."""


class Budget:
    """The rest of the limits of one rendering, and its place in the output.

    Args:
        characters: of the record.
        separated: surround marked stretches with separators instead of noting where they are.
    """

    __slots__ = ("_characters", "_end", "_limit", "_ticks", "length", "marked", "separated")

    def __init__(self, characters: int = 0, separated: bool = False) -> None:
        self._limit = MAX_CHARACTERS + PER_CHARACTER * characters
        self._ticks, self._characters = 0, self._limit
        self._end = time.thread_time() + CPU_SECONDS
        self.length = 0  # characters written so far
        self.marked: list[tuple[int, str]] = []  # start and text of each stretch of {% generation %}
        self.separated = separated

    def tick(self) -> None:
        """Count one iteration or call."""
        self._ticks += 1
        if not self._ticks % _TICKS and time.thread_time() > self._end:
            raise LimitError(f"it needs more than {CPU_SECONDS:g} s of CPU time for one conversation")

    def charge(self, characters: int) -> None:
        """Count characters, or list items, that are about to be built."""
        self._characters -= characters
        if self._characters < 0:
            raise LimitError(f"it builds more than {self._limit:,} characters for one conversation")


class Counted:
    """The values of a loop, each iteration counted."""

    __slots__ = ("_budget", "_values")

    def __init__(self, values: Any, budget: Budget) -> None:
        self._values, self._budget = values, budget

    def __iter__(self) -> Iterator[Any]:
        tick = self._budget.tick
        for value in self._values:
            tick()
            yield value

    def __len__(self) -> int:
        return len(self._values)


def require_modest(*numbers: Any) -> None:
    """Refuse a width or a count that alone would fill the memory."""
    for number in numbers:
        if isinstance(number, int) and abs(number) > MAX_NUMBER:
            raise LimitError(f"it uses a width or count of more than {MAX_NUMBER:,}")


def require_modest_format(pattern: str) -> None:
    """Refuse a %-format with a huge width, or one that takes its width from an argument."""
    if _WIDTH.search(pattern) or _STAR.search(pattern):
        raise LimitError(f"it uses a width or count of more than {MAX_NUMBER:,}")


def require_modest_value(value: Any) -> None:
    """Refuse to write a nested value that repeats its parts so often that its text would have no end."""
    left, values = MAX_NODES, [value]
    while values:
        value = values.pop()
        left -= 1
        if left < 0:
            raise LimitError(f"it writes a value of more than {MAX_NODES:,} parts")
        if isinstance(value, dict):
            values += value.values()
        elif isinstance(value, (list, tuple)):
            values += value


def binary(budget: Budget, operator: str, left: Any, right: Any) -> None:
    """Charge for ``left operator right``, one of + * ** %, before it is computed."""
    if operator == "+":
        if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
            budget.charge(len(left) + len(right))
    elif operator == "%":
        if isinstance(left, (str, bytes)):
            require_modest_format(left if isinstance(left, str) else left.decode("latin-1"))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > MAX_BITS:
            raise LimitError(f"it computes a number of more than {MAX_BITS:,} bits")
    elif operator == "*":
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
                budget.charge(len(sequence) * max(times, 0))


def method_arguments(budget: Budget, method: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Charge for a call of a method of a text or number before it runs; return its arguments."""
    receiver, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
    if isinstance(receiver, (str, bytes)):
        if name in _WIDE_METHODS:
            require_modest(*args)
            if name == "expandtabs":
                budget.charge(
                    len(receiver) + receiver.count(receiver[:0] + _like(receiver, "\t")) * _first(args, 8)
                )
        elif name == "replace" and len(args) >= 2:
            _charge_replacement(budget, receiver, args[0], args[1])
        elif name == "join" and args:
            return (_charge_joined(budget, receiver, args[0]), *args[1:])
        elif name == "translate" and args and isinstance(args[0], dict):
            longest = max((len(v) for v in args[0].values() if isinstance(v, str)), default=1)
            budget.charge(len(receiver) * max(longest, 1))
    elif isinstance(receiver, int) and name in _WIDE_METHODS:
        require_modest(*args)
    return args


def charge_result(budget: Budget, name: str, result: Any) -> None:
    """Charge for what a call or filter returned."""
    if isinstance(result, (str, list)):
        budget.charge(len(result) * (16 if name in _LISTS else 1))


def limited_filter(
    name: str, function: Callable[..., Any], current: Callable[[], Budget]
) -> Callable[..., Any]:
    """Return a Jinja filter that counts its calls, refuses huge widths and charges for its result.

    Args:
        name: of the filter.
        function: the filter.
        current: returns the budget of the rendering.
    """
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # index of the filtered value

    @wraps(function)
    def limited(*args: Any, **kwargs: Any) -> Any:
        budget = current()
        budget.tick()
        before, value, rest = args[:first], args[first], args[first + 1 :]
        if name in _WIDE_FILTERS:
            require_modest(*rest, *kwargs.values())
        if name == "replace" and len(rest) >= 2:
            _charge_replacement(budget, str(value), str(rest[0]), str(rest[1]))
        elif name == "indent":
            width = _first(rest, kwargs.get("width", 4))
            budget.charge(
                (str(value).count("\n") + 1) * (len(width) if isinstance(width, str) else int(width))
            )
        elif name == "wordwrap":
            wrap = kwargs.get("wrapstring", rest[2] if len(rest) > 2 else None) or "\n"
            budget.charge(len(str(value)) * len(str(wrap)))
        elif name == "format":
            require_modest_format(str(value))
        elif name == "sum" and not isinstance(
            kwargs.get("start", rest[1] if len(rest) > 1 else 0), (int, float)
        ):
            raise LimitError("it sums what are not numbers")
        result = function(*before, value, *rest, **kwargs)
        charge_result(budget, name, result)
        return result

    return limited


def joined_values(environment: Any, values: Any, attribute: Any) -> list[Any]:
    """Return what the ``join`` filter joins as a list."""
    items = list(values)
    return items if attribute is None else list(map(make_attrgetter(environment, attribute), items))


def charge_parts(budget: Budget, parts: Sequence[str]) -> None:
    """Charge for the concatenation of texts."""
    budget.charge(sum(map(len, parts)))


def _charge_joined(budget: Budget, separator: Any, values: Iterable[Any]) -> list[Any]:
    items = []
    for value in values:
        budget.tick()
        items.append(value)
        if isinstance(value, (str, bytes)):
            budget.charge(len(value) + len(separator))
    return items


def _charge_replacement(budget: Budget, text: Any, old: Any, new: Any) -> None:
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        budget.charge(len(text) + text.count(old) * len(new))


def _first(args: tuple[Any, ...], default: Any) -> Any:
    return args[0] if args else default


def _like(text: str | bytes, character: str) -> Any:
    return character if isinstance(text, str) else character.encode()
