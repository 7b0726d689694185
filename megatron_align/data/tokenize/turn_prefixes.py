"""How much of a rendered conversation its first messages take up, with as few renderings as the template allows."""

from __future__ import annotations

from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.template_environment import Rendered
from megatron_align.errors import InputError
from megatron_align.records import Conversation

FEW = 12  # messages: rendering each start of a conversation costs less than proving that it need not be rendered


class TurnPrefixes:
    """The starts of one rendered conversation.

    A short conversation is rendered up to each of its turns. For a long one :mod:`.turn_reads` proves from one
    rendering how its starts are rendered, where the template allows.

    Args:
        template: that rendered it.
        record: the conversation.
        text: its rendering.
    """

    def __init__(self, template: ChatTemplate, record: Conversation, text: str) -> None:
        self._template, self._record, self.text = template, record, text
        self._starts: dict[
            int, int
        ] = {}  # number of messages -> characters before the next, where that is proven
        self._tails: dict[
            bool, str
        ] = {}  # with the generation prompt or without: what follows these characters
        if len(record.messages) > FEW:
            self._prove()

    def length(self, turns: int, prompt: bool) -> int | None:
        """Return how many characters the first ``turns`` messages take up; None: the text does not start with them."""
        if turns in self._starts:
            start, tail = self._starts[turns], self._tails[prompt]
            return start + len(tail) if self.text.startswith(tail, start) else None
        prefix = self.rendered(turns, prompt).text
        return len(prefix) if self.text.startswith(prefix) else None

    def rendered(self, turns: int, prompt: bool) -> Rendered:
        """Render the first ``turns`` messages."""
        return self._template.rendered(self._record, turns, prompt=prompt)

    def marked(self, turns: int, full: Rendered) -> list[str]:
        """Return the marked stretches in the rendering of the first ``turns`` messages; none of no messages."""
        if turns in self._starts:
            start = self._starts[turns]
            return [full.text[a:b] for a, b in full.marked if b <= start]
        here = (
            full
            if turns == len(self._record.messages)
            else self.rendered(turns, False)
            if turns
            else Rendered("")
        )
        return [here.text[a:b] for a, b in here.marked]

    def _prove(self) -> None:
        try:
            found = self._template.turn_starts(self._record)
        except InputError:  # it does with the messages what only a list can do
            return
        if found is None or found[0] != self.text:
            return
        starts = {turns: start for turns, start in found[1].starts.items() if turns > 0}
        if not starts:
            return
        first = min(starts)
        for prompt in (False, True):
            short = self.rendered(first, prompt).text
            if not short.startswith(self.text[: starts[first]]):
                return
            self._tails[prompt] = short[starts[first] :]
        self._starts = starts
