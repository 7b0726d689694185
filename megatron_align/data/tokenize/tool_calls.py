"""Tool calls as any chat template reads them: arguments as an object or as JSON text, with or without ``function``."""

from __future__ import annotations

import json
from typing import Any


class Arguments(dict[str, Any]):
    """The arguments of a call: an object that is written as JSON where a template writes it as text.

    Templates differ: ``arguments | tojson`` and ``arguments.items()`` need an object, ``'...' + arguments`` and
    ``{{ arguments }}`` the JSON text that OpenAI's interface returns.
    """

    def __str__(self) -> str:
        return json.dumps(self, ensure_ascii=False)

    def __add__(self, text: object) -> str:
        return str(self) + text if isinstance(text, str) else NotImplemented

    def __radd__(self, text: object) -> str:
        return text + str(self) if isinstance(text, str) else NotImplemented


class BareCall(dict[str, Any]):
    """A call without OpenAI's ``function`` around it; ``call.function`` is the call itself, and not among its keys."""

    @property
    def function(self) -> BareCall:
        return self

    def __missing__(self, key: str) -> BareCall:
        if key == "function":
            return self
        raise KeyError(key)


def template_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return one entry of ``tool_calls`` as chat templates of every kind can read it."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"])}
    return BareCall(_with_arguments(call))


def _with_arguments(function: dict[str, Any]) -> dict[str, Any]:
    arguments = function.get("arguments")
    return {**function, "arguments": Arguments(arguments)} if isinstance(arguments, dict) else function
