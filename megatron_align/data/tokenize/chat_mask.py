"""Which tokens of a conversation are trained: what the chat template marks, or what assistant turns add.

In a conversation every assistant turn is trained: what the template marks with ``{% generation %}`` if it has such
marks, else what each assistant turn adds to the rendering of the turns before it (plus the generation prompt). The
second way needs renderings that nest; a template that rewrites earlier turns is refused. A turn with
``train: false`` is left out either way.

Shapes: L tokens of one sample.
"""

from __future__ import annotations

import numpy as np

from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.encoder import Encoder, Rendering, common_prefix_length
from megatron_align.errors import InputError
from megatron_align.records import Conversation


class ChatMask:
    """Finds the trained tokens of conversations.

    Args:
        template: renders them.
        encoder: of the template's tokenizer.
    """

    def __init__(self, template: ChatTemplate, encoder: Encoder) -> None:
        self._template, self._encoder = template, encoder

    def trained(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        """Return the token ids of a conversation, and which of them are trained (bool[L])."""
        return (
            self._marked_turns(record) if self._template.has_marks(record) else self._assistant_turns(record)
        )

    def rendering(self, record: Conversation) -> Rendering:
        """Return the conversation as text and token ids."""
        text = self._template.render(record, len(record.messages))
        return Rendering(text, self._encoder.ids(text), self._encoder)

    def untrained(self, record: Conversation, full: Rendering) -> np.ndarray | None:
        """Return the tokens of untrained turns after the prompt (bool[L]); None: there are none."""
        turns = [
            i
            for i in range(record.prompt_messages or 0, len(record.messages))
            if not record.messages[i].train
        ]
        if not turns:
            return None
        untrained_L = np.zeros(len(full.ids), dtype=bool)
        for i in turns:
            untrained_L[self._turn(record, i, full)] = True
        return untrained_L

    def _marked_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        if not self._template.tokenizer.is_fast:
            raise InputError(
                f"{record.where}: a chat template with generation marks needs a fast tokenizer, "
                f"got {type(self._template.tokenizer).__name__}"
            )
        ids, scored_L = self._template.marked(record, len(record.messages))
        for i, message in enumerate(record.messages):
            if message.role == "assistant" and not message.train:
                self._unmark(record, i, ids, scored_L)
        return ids, scored_L

    def _unmark(self, record: Conversation, i: int, ids: list[int], scored_L: np.ndarray) -> None:
        """Leave out turn ``i``: the marked runs that the rendering up to it adds to the one before it."""
        before = len(_runs(self._template.marked(record, i)[1])) if i else 0
        ids_here, scored_here = self._template.marked(record, i + 1)
        full = _runs(self._template.marked(record, len(record.messages))[1])
        mine = list(enumerate(_runs(scored_here)))[before:]
        for k, (start, end) in mine:
            here = full[k] if k < len(full) else (0, 0)
            if ids_here[start:end] != ids[slice(*here)]:
                mine = []
                break
            scored_L[slice(*here)] = False
        if not mine:
            raise InputError(
                f"{record.where}: messages[{i}] with 'train': false must be marked the same whatever follows it "
                "to be left out; the chat template marks it differently"
            )

    def _assistant_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        full = self.rendering(record)
        scored_L = np.zeros(len(full.ids), dtype=bool)
        for i, message in enumerate(record.messages):
            if message.role == "assistant" and message.train:
                scored_L[self._turn(record, i, full)] = True
        return full.ids, scored_L

    def _turn(self, record: Conversation, i: int, full: Rendering) -> slice:
        """Return the tokens that turn ``i`` adds to the rendering before it; of a trained one, without its header."""
        name = f"{record.where}: messages[{i}]"
        if i == 0:
            raise InputError(
                f"{name} must not be an assistant turn unless the chat template marks {{% generation %}}: "
                "there is nothing before it to find its start by"
            )
        before = self._template.render(record, i, prompt=record.messages[i].train)
        start = self._nested(before, full, name)
        end = len(full.ids)
        if i + 1 < len(record.messages):
            end = self._nested(self._template.render(record, i + 1), full, name)
        if start >= end:
            raise InputError(f"{name} must add tokens to the conversation, got none")
        return slice(start, end)

    def _nested(self, prefix: str, full: Rendering, turn: str) -> int:
        """Return how many tokens of the full rendering the prefix covers.

        A token that straddles the end of the prefix (an answer that starts with a newline) belongs to what
        follows, as in TRL.
        """
        if not full.text.startswith(prefix):
            at = common_prefix_length(prefix, full.text)
            alone, within = prefix[at : at + 40], full.text[at : at + 40]
            raise InputError(
                f"{turn}: the chat template must render earlier turns the same whatever follows, or mark "
                f"{{% generation %}}; got {alone!r} up to this turn, {within!r} in full"
            )
        return full.covered(prefix)


def _runs(marked_L: np.ndarray) -> list[tuple[int, int]]:
    """Return ``(start, end)`` of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marked_L, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
