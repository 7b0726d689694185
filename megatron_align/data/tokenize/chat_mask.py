"""Which tokens of a conversation are trained: what the chat template marks, or what assistant turns add.

In a conversation every assistant turn is trained: what the template marks with ``{% generation %}`` if it has such
marks, else what each assistant turn adds to the rendering of the turns before it (plus the generation prompt). The
second way needs renderings that nest; a template that rewrites earlier turns is refused. A turn with
``train: false`` is left out either way.

Shapes: L tokens of one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.encoder import Encoder, Rendering, common_prefix_length
from megatron_align.data.tokenize.template_environment import Rendered
from megatron_align.data.tokenize.turn_ends import turn_end_token_ids
from megatron_align.data.tokenize.turn_prefixes import TurnPrefixes
from megatron_align.errors import InputError
from megatron_align.records import Conversation, Message

Span = tuple[int, int]
_WAYS_OUT = (
    "set data.train_turns to last, use a chat template that marks {% generation %}, "
    "or write a record for each answer"
)


class ChatMask:
    """Finds the trained tokens of conversations.

    Args:
        template: renders them.
        encoder: of the template's tokenizer.
        warn: is given a kind of warning and its text.
        last_only: ``data.train_turns: last``: how earlier turns are marked does not matter.
    """

    def __init__(
        self,
        template: ChatTemplate,
        encoder: Encoder,
        warn: Callable[[str, str], None],
        last_only: bool = False,
    ) -> None:
        self._template, self._encoder, self._warn = template, encoder, warn
        self._last_only = last_only
        self._turn_ends: set[int] | None = None

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
        prefixes = TurnPrefixes(self._template, record, full.text)
        for i in turns:
            untrained_L[self._turn(record, i, full, prefixes)] = True
        return untrained_L

    def _marked_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        if not self._template.tokenizer.is_fast:
            raise InputError(
                f"{record.where}: a chat template with generation marks needs a fast tokenizer, "
                f"got {type(self._template.tokenizer).__name__}"
            )
        rendered = self._template.rendered(record, len(record.messages))
        ids, start_L, end_L = self._encoder.ids_and_spans(rendered.text)
        full = Rendering(rendered.text, ids, self._encoder)
        spans = self._spans_of_trained_turns(record, rendered)
        scored_L = np.zeros(len(ids), dtype=bool)
        for span in spans:
            scored_L[self._tokens_of(span, full, start_L, end_L, record.where)] = True
        self._warn_of_untrained_ends(record, full, end_L, scored_L, spans)
        return ids, scored_L

    def _tokens_of(
        self, span: Span, full: Rendering, start_L: np.ndarray, end_L: np.ndarray, where: str
    ) -> slice:
        """Return the tokens that overlap a stretch of the text, checked against the tokens of what comes before it."""
        start, end = span
        overlap = np.flatnonzero((start_L < end) & (end_L > start))
        if not len(overlap):
            return slice(0, 0)
        first, after = int(overlap[0]), int(overlap[-1]) + 1
        before, within = full.covered_to(start), full.covered_to(end)
        if not (before <= first and within <= after and len(overlap) == after - first):
            raise InputError(
                f"{where}: the tokenizer must say where its tokens are in the text for {{% generation %}} to be used, "
                f"got tokens {first} to {after} for {full.text[start:end][:40]!r}, which are {before} to {within}"
            )
        return slice(first, after)

    def _spans_of_trained_turns(self, record: Conversation, full: Rendered) -> list[Span]:
        """Return the marked stretches that belong to trained turns: those that each adds to the turns before it."""
        answers = [i for i, message in enumerate(record.messages) if message.role == "assistant"]
        if all(record.messages[i].train for i in answers):
            return list(full.marked)
        prefixes = TurnPrefixes(self._template, record, full.text)
        spans: list[Span] = []
        for i in answers:
            trained = record.messages[i].train
            if not trained and self._last_only:
                continue
            before, upto = prefixes.marked(i, full), prefixes.marked(i + 1, full)
            mine = full.marked[len(before) : len(upto)]
            if not mine or [full.text[slice(*span)] for span in mine] != upto[len(before) :]:
                raise InputError(
                    f"{record.where}: messages[{i}] with 'train': {str(trained).lower()} must be marked the same "
                    "whatever follows it, as not all turns are trained; the chat template marks it differently"
                )
            spans += mine if trained else ()
        return spans

    def _warn_of_untrained_ends(
        self,
        record: Conversation,
        full: Rendering,
        end_L: np.ndarray,
        scored_L: np.ndarray,
        spans: list[Span],
    ) -> None:
        """Warn if an answer is marked without the token that ends it: the model would not learn to stop."""
        if self._turn_ends is None:
            self._turn_ends = set(turn_end_token_ids(self._template.tokenizer, self._template.text))
        for start, end in spans:
            if end <= start:
                continue
            last = int(np.searchsorted(end_L, end, "left"))
            after = last + 1 if last < len(full.ids) and scored_L[last] else last
            if after < len(full.ids) and full.ids[after] in self._turn_ends and not scored_L[after]:
                token = self._template.tokenizer.convert_ids_to_tokens(full.ids[after])
                self._warn(
                    "turn end",
                    f"{record.where}: the token that ends an answer, {token}, is not trained, so the model does not "
                    "learn to stop; {% generation %} of the chat template should enclose it",
                )
                return

    def _assistant_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        full = self.rendering(record)
        scored_L = np.zeros(len(full.ids), dtype=bool)
        prefixes = TurnPrefixes(self._template, record, full.text)
        for i, message in enumerate(record.messages):
            if message.role == "assistant" and message.train:
                scored_L[self._turn(record, i, full, prefixes)] = True
        return full.ids, scored_L

    def _turn(self, record: Conversation, i: int, full: Rendering, prefixes: TurnPrefixes) -> slice:
        """Return the tokens that turn ``i`` adds to the rendering before it; of a trained one, without its header."""
        name = f"{record.where}: messages[{i}]"
        # A token that straddles the end of the prefix (an answer that starts with a newline) belongs to what follows,
        # as in TRL.
        trained = record.messages[i].train
        if i:
            start = full.covered_to(self._nested(prefixes, i, trained, name))
        else:
            start = full.covered_to(self._end_of_first_header(record, full.text, name)) if trained else 0
        end = len(full.ids)
        if i + 1 < len(record.messages):
            end = full.covered_to(self._nested(prefixes, i + 1, False, name))
        if start >= end:
            raise InputError(f"{name} must add tokens to the conversation, got none")
        return slice(start, end)

    def _end_of_first_header(self, record: Conversation, text: str, name: str) -> int:
        """Return where the content of a first turn starts that is the assistant's: after the generation prompt.

        No turn is before it, so the generation prompt is taken from the rendering of a question.
        """
        question = replace(record, messages=(Message("user", "?"),))
        before, prompted = (self._template.render(question, 1, prompt=prompt) for prompt in (False, True))
        header = prompted[len(before) :] if prompted.startswith(before) else ""
        start = text.find(header)
        if not header or start < 0:
            raise InputError(
                f"{name} must not be an assistant turn unless the chat template marks {{% generation %}} or has a "
                "generation prompt: there is nothing before it to find its start by"
            )
        return start + len(header)

    def _nested(self, prefixes: TurnPrefixes, turns: int, prompt: bool, name: str) -> int:
        """Return the length of the rendering of the first ``turns`` messages, which the full one must start with."""
        length = prefixes.length(turns, prompt)
        if length is not None:
            return length
        prefix, full = prefixes.rendered(turns, prompt).text, prefixes.text
        at = common_prefix_length(prefix, full)
        alone, within = prefix[at : at + 40], full[at : at + 40]
        raise InputError(
            f"{name}: the chat template must render earlier turns the same whatever follows, or mark "
            f"{{% generation %}}; got {alone!r} up to this turn, {within!r} in full; {_WAYS_OUT}"
        )
