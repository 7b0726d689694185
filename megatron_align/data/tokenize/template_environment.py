"""Compile and render chat templates as transformers does, within limits, and note what ``{% generation %}`` marks.

The Jinja environment has what chat templates rely on in transformers: the immutable sandbox, trimmed blocks,
``break`` and ``continue``, ``tojson`` that keeps Unicode, ``raise_exception``, ``strftime_now``, ``namespace``. On top
of that every rendering has a budget (:mod:`.template_limits`), the clock is the caller's, and nothing is random: the
same record always gives the same text.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, partial
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from megatron_align.data.tokenize import template_limits as limits
from megatron_align.data.tokenize.template_limits import Budget, Counted, LimitError
from megatron_align.data.tokenize.turn_reads import TurnLoop, TurnReads, Turns, last_turn_loop

MAX_TEMPLATE = 1_000_000  # characters of a chat template
_COUNTED, _TURN_LOOP = "counted loop", "turn loop"  # filters' names that no template can write
# Slow on long texts, or random; no chat template needs them.
_REMOVED = ("random", "urlize", "striptags", "xmlattr")
_SEPARATORS = ("\ufdd0", "\ufdd1")  # noncharacters: valid in a text, and never exchanged between programs


@dataclass(frozen=True, slots=True)
class Rendered:
    """A rendered conversation and the stretches of it that the template marks: ``(start, end)`` in characters."""

    text: str
    marked: tuple[tuple[int, int], ...] = ()


class CompiledTemplate:
    """A compiled chat template; it may be rendered by several threads at once.

    Args:
        text: a Jinja template.
        now: what ``strftime_now`` reads; None: the clock.

    Raises:
        Exception: whatever Jinja raises for a template that it cannot compile.
    """

    def __init__(self, text: str, now: datetime | None = None) -> None:
        if len(text) > MAX_TEMPLATE:
            raise LimitError(f"it has more than {MAX_TEMPLATE:,} characters")
        self._environment = _Environment(now)
        with self._environment.budgeted(Budget()):  # constant expressions are computed here
            self._template = self._environment.from_string(text)
        self._template.root_render_func.__globals__["LoopContext"] = TurnLoop

    @property
    def has_marks(self) -> bool:
        """Whether the template has ``{% generation %}`` marks."""
        return self._environment.has_marks

    def turn_starts(
        self, characters: int, messages: list[Any], **variables: Any
    ) -> tuple[str, TurnReads] | None:
        """Render and note how far the text was when the template's loop came to each message.

        Args:
            characters: of the record.
            messages: to render.
            variables: of the template.

        Returns:
            The text, and the reads of messages; None: the template has no loop over messages after which it writes
            the same whatever the messages were.
        """
        if not self._environment.has_turn_loop:
            return None
        budget = Budget(characters)
        reads = TurnReads(messages, budget)
        return self._run(budget, {**variables, "messages": Turns(reads)}), reads

    def render(self, characters: int, **variables: Any) -> Rendered:
        """Render with these variables.

        Args:
            characters: of the record, which the limit grows with.
            variables: messages, tools, special tokens, ...

        Raises:
            Exception: whatever the template raises; :class:`.template_limits.LimitError` if it exceeds a limit.
        """
        budget = Budget(characters)
        text = self._run(budget, variables)
        if not budget.marked:
            return Rendered(text)
        spans = [(start, start + len(marked)) for start, marked in budget.marked]
        found = all(
            text[start:end] == marked for (start, end), (_, marked) in zip(spans, budget.marked, strict=True)
        )
        apart = all(one[1] <= other[0] for one, other in zip(spans, spans[1:], strict=False))
        if found and apart:
            return Rendered(text, tuple(spans))
        return self._separated(text, characters, variables)

    def _separated(self, text: str, characters: int, variables: dict[str, Any]) -> Rendered:
        """Find the marked stretches of a template that marks inside a macro or a set block, by separators."""
        if any(separator in text for separator in _SEPARATORS):
            raise TemplateError(f"the text must not contain {' or '.join(map(ascii, _SEPARATORS))}")
        pieces = self._run(Budget(characters, separated=True), variables)
        spans: list[tuple[int, int]] = []
        plain: list[str] = []
        starts: list[int] = []
        length = 0
        for piece in _split(pieces):
            if piece == _SEPARATORS[0]:
                starts.append(length)
            elif piece == _SEPARATORS[1]:
                if not starts:
                    raise TemplateError("it changes what it marks with {% generation %}")
                spans.append((starts.pop(), length))
            else:
                plain.append(piece)
                length += len(piece)
        if starts or "".join(plain) != text:
            raise TemplateError("it changes what it marks with {% generation %}")
        return Rendered(text, tuple(sorted(spans)))

    def _run(self, budget: Budget, variables: dict[str, Any]) -> str:
        template, written = self._template, []
        with self._environment.budgeted(budget):
            for piece in template.root_render_func(template.new_context(variables)):
                budget.charge(len(piece))
                budget.length += len(piece)
                written.append(piece)
        return "".join(written)


@lru_cache(maxsize=64)
def compiled_template(text: str, now: datetime | None = None) -> CompiledTemplate:
    """Return a compiled chat template; see :class:`CompiledTemplate`."""
    return CompiledTemplate(text, now)


def _split(text: str) -> Iterator[str]:
    """Yield separators and what is between them."""
    start = 0
    for i, character in enumerate(text):
        if character in _SEPARATORS:
            yield text[start:i]
            yield character
            start = i + 1
    yield text[start:]


class _Generation(Extension):
    """The tag ``{% generation %}``: what is between it and ``{% endgeneration %}`` is what the assistant generates."""

    tags = {"generation"}
    environment: _Environment

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        self.environment.has_marks = True
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Macro) -> str:
        """Note where the marked text stands, or surround it by separators."""
        text, budget = caller(), self.environment.budget()
        if budget.separated:
            return f"{_SEPARATORS[0]}{text}{_SEPARATORS[1]}"
        budget.marked.append((budget.length, text))
        return text


class _Code(CodeGenerator):
    """Generates code whose ``~`` is charged for."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (jinja2's name)
        self.write("environment.join_values((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class _Formatter(SandboxedFormatter):
    """``str.format`` without huge widths."""

    def format_field(self, value: Any, format_spec: str) -> str:
        limits.require_modest_format(format_spec)
        self._env.require_modest_value(value)  # type: ignore[attr-defined]  # our environment
        text = super().format_field(value, format_spec)
        self._env.budget().charge(len(text))  # type: ignore[attr-defined]
        return text


class _Dictionary:
    """The global ``dict``: it makes dictionaries, and hands out no methods that change them."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of one chat template."""

    code_generator_class = _Code
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, now: datetime | None) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.has_marks = self.has_turn_loop = False
        self._local = threading.local()
        self._grows = False  # it can build values that contain each other over and over
        for name in _REMOVED:
            del self.filters[name]
        del self.globals["lipsum"]
        self.filters["tojson"] = self._to_json
        self.filters = {
            name: limits.limited_filter(name, function, self.budget)
            for name, function in self.filters.items()
        }
        for name in ("join", "string", "pprint"):
            self.filters[name] = self._measured(name, self.filters[name])
        self.filters[_COUNTED] = lambda values: Counted(values, self.budget())
        self.filters[_TURN_LOOP] = lambda values: (
            values.loop() if isinstance(values, Turns) else Counted(values, self.budget())
        )
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = partial(_strftime, now)
        self.globals["dict"] = _Dictionary()

    def concat(self, parts: Iterable[str]) -> str:
        """Join what a macro or a block has written."""
        parts = list(parts)
        limits.charge_parts(self.budget(), parts)
        return "".join(parts)

    def budget(self) -> Budget:
        """Return the budget of the rendering in this thread."""
        return self._local.budget

    @contextmanager
    def budgeted(self, budget: Budget) -> Iterator[None]:
        """Let the body use up ``budget``."""
        before = getattr(self._local, "budget", None)
        self._local.budget = budget
        try:
            yield
        finally:
            self._local.budget = before

    def join_values(self, values: tuple[Any, ...]) -> str:
        """Return the concatenation of values as ``~`` means it."""
        parts = []
        for value in values:
            self.require_modest_value(value)
            parts.append(str(value))
        return self.concat(parts)

    def require_modest_value(self, value: Any) -> None:
        """Refuse to write a value that the template has blown up; a record's own values are never large."""
        if self._grows and not isinstance(value, (str, int, float)):
            limits.require_modest_value(value.__dict__ if isinstance(value, Namespace) else value)

    def call(
        __self,
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,  # noqa: N805
    ) -> Any:
        budget = __self.budget()
        budget.tick()
        args = limits.method_arguments(budget, __obj, args)
        result = super().call(__context, __obj, *args, **kwargs)
        limits.charge_result(budget, getattr(__obj, "__name__", ""), result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = self.budget()
        limits.binary(budget, operator, left, right)
        if operator == "%" and self._grows:
            self.require_modest_value(right)
        result = self.binop_table[operator](left, right)
        if operator == "%":
            limits.charge_result(budget, operator, result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        original = super().wrap_str_format(value)
        if original is None:
            return None
        pattern, formatter = value.__self__, _Formatter(self)
        if value.__name__ == "format_map":
            return lambda mapping: formatter.vformat(pattern, (), mapping)
        return lambda *args, **kwargs: formatter.vformat(pattern, args, kwargs)

    def _generate(
        self, source: nodes.Template, name: str | None, filename: str | None, defer_init: bool = False
    ) -> str:
        turn_loop = last_turn_loop(source)
        self.has_turn_loop = turn_loop is not None
        for loop in list(source.find_all(nodes.For)):
            counter = _TURN_LOOP if loop is turn_loop else _COUNTED
            counted = nodes.Filter(loop.iter, counter, [], [], None, None, lineno=loop.lineno)
            counted.set_environment(self)
            loop.iter = counted
        self._grows = _can_grow(source)
        if self._grows:
            self.finalize = self._finalized
        return super()._generate(source, name, filename, defer_init)

    def _finalized(self, value: Any) -> Any:
        self.require_modest_value(value)
        return value

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """Write JSON with transformers' options: unlike Jinja's own filter, Unicode and HTML are left alone."""
        self.require_modest_value(value)
        value = list(value) if isinstance(value, Turns) else value
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def _measured(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the filter with its values measured before they are written."""
        if name != "join":

            def written(value: Any, *args: Any, **kwargs: Any) -> Any:
                self.require_modest_value(value)
                return function(value, *args, **kwargs)

            return written

        def join(value: Any, d: Any = "", attribute: Any = None) -> str:
            values = limits.joined_values(self, value, attribute)
            for item in values:
                self.require_modest_value(item)
            parts = list(map(str, values))
            self.budget().charge(len(str(d)) * len(parts))
            limits.charge_parts(self.budget(), parts)
            return str(d).join(parts)

        return join


def _can_grow(source: nodes.Template) -> bool:
    """Return whether a template builds containers of several computed values: such can contain one value twice."""
    for literal in source.find_all((nodes.List, nodes.Tuple, nodes.Dict)):
        assert isinstance(literal, (nodes.List, nodes.Tuple, nodes.Dict))
        items = [item.value if isinstance(item, nodes.Pair) else item for item in literal.items]
        stored = isinstance(literal, nodes.Tuple) and literal.ctx == "store"
        if not stored and sum(not isinstance(item, nodes.Const) for item in items) > 1:
            return True
    return any(
        isinstance(call.node, nodes.Name) and call.node.name in ("dict", "namespace") and len(call.kwargs) > 1
        for call in source.find_all(nodes.Call)
    )


def _raise(message: Any) -> None:
    raise TemplateError(str(message))


def _strftime(now: datetime | None, pattern: str) -> str:
    return (now or datetime.now()).strftime(pattern)
