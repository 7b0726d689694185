"""Prove from one rendering how a chat template renders the start of a conversation.

Every assistant turn starts where the rendering of the messages before it ends, so each needs a rendering of its own,
and a long conversation costs the square of its length. One rendering is enough where the template reads its messages in
order: up to the moment when it first looks at message ``i`` it cannot know that there is one, so it has written what it
writes for the first ``i`` messages alone. If it looked at the head of its main loop, the loop would have ended there,
and what follows is what the template writes after that loop, which must not depend on the messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jinja2 import nodes
from jinja2.runtime import LoopContext

from megatron_align.data.tokenize.template_limits import Budget


def last_turn_loop(template: nodes.Template) -> nodes.For | None:
    """Return the loop after which a template writes the same whatever its messages are; None: there is none.

    It is the last loop of the template's top level. What follows it must read no name that the template assigns
    anywhere, nor the messages.
    """
    loops = [i for i, node in enumerate(template.body) if isinstance(node, nodes.For)]
    if not loops:
        return None
    loop = template.body[loops[-1]]
    assert isinstance(loop, nodes.For)
    if loop.test or loop.else_ or loop.recursive:
        return None
    assigned = {name.name for name in template.find_all(nodes.Name) if name.ctx != "load"}
    assigned |= {reference.name for reference in template.find_all(nodes.NSRef)}
    assigned |= {macro.name for macro in template.find_all(nodes.Macro)}
    read = {
        name.name
        for node in template.body[loops[-1] + 1 :]
        for name in (node, *node.find_all(nodes.Node))
        if isinstance(name, (nodes.Name, nodes.NSRef))
    }
    return None if read & (assigned | {"messages", "loop", "self", "caller"}) else loop


class TurnReads:
    """The length of the text when the template first looked for each message.

    Args:
        messages: of the conversation.
        budget: of the rendering, which knows how much has been written.
    """

    def __init__(self, messages: list[Any], budget: Budget) -> None:
        self.messages, self._budget = messages, budget
        self._furthest = -1
        # Index of a message, or the number of messages -> characters written when the loop's head came to it.
        self.starts: dict[int, int] = {}

    def read(self, index: int, at_head: bool = False) -> None:
        """Note that the template looks for message ``index``, with ``at_head`` for the next step of its loop."""
        if index <= self._furthest:
            return
        if at_head and index == self._furthest + 1:
            self.starts[index] = self._budget.length
        self._furthest = index

    def tick(self) -> None:
        """Count an iteration."""
        self._budget.tick()


class Turns(Sequence[Any]):
    """Messages as a template sees them, from one of them on: each look at them is noted."""

    def __init__(self, reads: TurnReads, first: int = 0) -> None:
        self._reads, self._first = reads, first

    def loop(self) -> _TurnIterator:
        """Return what the template's main loop iterates over."""
        return _TurnIterator(self._reads, self._first)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start = index.start or 0
            if start >= 0 and index.stop is None and index.step in (None, 1):
                return Turns(self._reads, self._first + start)
        elif index >= 0:
            self._reads.read(self._first + index)
            return self._reads.messages[self._first + index]
        return self._all()[index]

    def __len__(self) -> int:
        return len(self._all())

    def __bool__(self) -> bool:
        self._reads.read(self._first)
        return self._first < len(self._reads.messages)

    def __iter__(self) -> Iterator[Any]:
        for index in range(self._first, len(self._reads.messages) + 1):
            self._reads.read(index)
            yield from self._reads.messages[index : index + 1]

    def __eq__(self, other: object) -> bool:
        return self._all() == (other._all() if isinstance(other, Turns) else other)

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __add__(self, other: Any) -> list[Any]:
        return self._all() + list(other)

    def __radd__(self, other: Any) -> list[Any]:
        return list(other) + self._all()

    def __str__(self) -> str:
        return str(self._all())

    def copy(self) -> list[Any]:
        """Return the messages as a list."""
        return self._all()

    def _all(self) -> list[Any]:
        self._reads.read(len(self._reads.messages))
        return self._reads.messages[self._first :]


class _TurnIterator:
    """Iterates over the messages for the main loop. ``at_head``: the next step is the loop's own, no look ahead."""

    def __init__(self, reads: TurnReads, first: int) -> None:
        self._reads, self._next, self._first = reads, first, first
        self.at_head = True

    def __iter__(self) -> _TurnIterator:
        return self

    def __next__(self) -> Any:
        index = self._next
        self._reads.read(index, self.at_head)
        self._reads.tick()
        if index >= len(self._reads.messages):
            raise StopIteration
        self._next += 1
        return self._reads.messages[index]

    def __len__(self) -> int:
        self._reads.read(len(self._reads.messages))
        return len(self._reads.messages) - self._first


class TurnLoop(LoopContext):
    """Jinja's ``loop``, whose own steps differ from looks at the next value (``loop.last``)."""

    def __init__(self, iterable: Any, *args: Any, **kwargs: Any) -> None:
        if isinstance(iterable, _TurnIterator):
            iterable.at_head = False
        super().__init__(iterable, *args, **kwargs)

    def __next__(self) -> tuple[Any, LoopContext]:
        turns = self._iterable
        if not isinstance(turns, _TurnIterator):
            return super().__next__()
        turns.at_head = True
        try:
            return super().__next__()
        finally:
            turns.at_head = False
