"""Records to samples: token ids, where the prompt ends, and which tokens are trained.

The boundaries between a prompt and its completion or completions (text or messages) are those of TRL's trainers (SFT,
DPO, KTO, reward); :mod:`.chat_mask` says which tokens of a conversation are trained.

Shapes: L tokens of one sample.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from megatron_align.data.tokenize.chat_mask import ChatMask
from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.encoder import Encoder, common_prefix_length
from megatron_align.data.tokenize.plain_text import PlainText
from megatron_align.data.tokenize.turn_ends import special_tokens, turn_end_token_ids
from megatron_align.data.tokenize.turn_options import TurnOptions
from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Preference, Record, Sample

_log = logging.getLogger(__name__)
_DEFAULTS = TurnOptions()
# What chat templates of released models end or start turns with.
_CONTROL_TOKEN = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|<｜[^｜<>]{1,40}｜>|<(?:start|end)_of_turn>|\[/?INST\]|</?s>"
)


class RecordTokenizer:
    """Turns records into samples with one tokenizer.

    Args:
        tokenizer: with a chat template if there are conversations, with an EOS token if there is plain text.
        chat_template: text of a Jinja template to use instead of the tokenizer's own.
        options: of conversations.
        warn: is given each kind of warning once; default: it is logged.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        options: TurnOptions = _DEFAULTS,
        warn: Callable[[str, str], None] | None = None,
    ) -> None:
        self.tokenizer, self._options = tokenizer, options
        self._template = ChatTemplate(tokenizer, chat_template, options.now)
        self._encoder = Encoder(tokenizer)
        self._mask = ChatMask(self._template, self._encoder, self._warn, options.last_only)
        self._plain_text = PlainText(tokenizer, self._encoder, self._warn)
        self._warned: set[str] = set()
        self._checked = False  # the template's tokens are among the tokenizer's
        self._report = warn or _log_once

    def sample(self, record: Record) -> Sample:
        """Tokenise one record.

        Raises:
            InputError: if the template is missing, fails, does not nest, or leaves nothing to train on;
                names the record's file and line.
        """
        record = self._options.applied(record)
        if isinstance(record, Preference):
            return self._judged(record)
        if isinstance(record, Completion):
            tokens, scored_L = self._text(record)
        else:
            self._template.require_template(record)
            self._template.require_fields_written(record)
            self._check_turn_ends(record)
            if record.prompt_messages is None:
                tokens, scored_L = self._mask.trained(record)
            else:
                tokens, scored_L = self._completion_turns(record)
        scored_L[:1] = False  # nothing predicts the first token
        if not scored_L.any():
            raise InputError(f"{record.where}: must have a token to train on, got none after tokenisation")
        return Sample(np.asarray(tokens, dtype=np.int32), scored_L, weight=record.weight)

    def _text(self, record: Completion) -> tuple[list[int], np.ndarray]:
        """Plain text: the completion starts where it diverges from the prompt alone."""
        all_ids = self._plain_text.ids(record.prompt, record.completion, record.where)
        prompt_ids = self._plain_text.prompt_ids(record.prompt)
        return all_ids, self._after_prompt(prompt_ids, all_ids, record.where)

    def _completion_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        turns = record.prompt_messages
        assert turns is not None, "the record has a completion"
        prompt_ids = self._encoder.ids(self._template.render(record, turns, prompt=True))
        full = self._mask.rendering(record)
        scored_L = self._after_prompt(prompt_ids, full.ids, record.where)
        untrained_L = self._mask.untrained(record, full)
        return full.ids, scored_L if untrained_L is None else scored_L & ~untrained_L

    def _after_prompt(self, prompt_ids: list[int], all_ids: list[int], where: str) -> np.ndarray:
        """Score what follows the common start of both, as TRL does where the prompt is not a token prefix."""
        start = common_prefix_length(prompt_ids, all_ids)
        self._warn_of_divergence(prompt_ids, start, where)
        return np.arange(len(all_ids)) >= start

    def _warn_of_divergence(self, prompt_ids: list[int], start: int, where: str) -> None:
        if start < len(prompt_ids) and "divergence" not in self._warned:
            self._warn(
                "divergence",
                f"{where}: the tokens of the prompt are not the first tokens of prompt + completion; training starts "
                f"where they diverge, before {self.tokenizer.decode(prompt_ids[start:])!r}",
            )

    def _warn(self, kind: str, line: str) -> None:
        """Log a kind of warning once."""
        if kind not in self._warned:
            self._warned.add(kind)
            self._report(kind, line)

    def _check_turn_ends(self, record: Conversation) -> None:
        """Warn once if the template ends turns with what is no token of the tokenizer."""
        if self._checked:
            return
        self._checked = True
        text = self._template.render(record, len(record.messages))
        known, said = special_tokens(self.tokenizer), [message.content for message in record.messages]
        unknown = [
            token
            for token in dict.fromkeys(_CONTROL_TOKEN.findall(text))
            if token not in known and not any(token in content for content in said)
        ]
        if unknown:
            self._warn(
                "control tokens",
                f"{record.where}: the chat template writes {', '.join(unknown[:5])}, which the tokenizer does not have "
                "as tokens: they are trained as ordinary text; use the template of this tokenizer, or add the tokens",
            )
        elif not turn_end_token_ids(self.tokenizer, self._template.text):
            self._warn(
                "no turn end",
                f"{record.where}: the chat template ends an answer with no special token, so a model that is trained "
                "with it has none to stop at",
            )

    def _judged(self, record: Preference) -> Sample:
        """Lay out ``prompt | completion | ...``; the prompt ends where the first completion diverges from it."""
        if isinstance(record.prompt, str):
            prompt_ids = self._plain_text.prompt_ids(record.prompt)
            texts = cast("tuple[str, ...]", record.completions)  # as their prompt is
            sequences = [self._plain_text.ids(record.prompt, text, record.where) for text in texts]
            untrained: list[np.ndarray | None] = [None] * len(sequences)
        else:
            prompt_ids, sequences, untrained = self._judged_turns(record)
        start = min(common_prefix_length(prompt_ids, ids) for ids in sequences)
        self._warn_of_divergence(prompt_ids, start, record.where)
        self._require_difference(record, start, sequences)
        scored = [
            np.ones(len(ids), dtype=bool) if out is None else ~out
            for ids, out in zip(sequences, untrained, strict=True)
        ]
        for j, scored_L in enumerate(scored):
            if not scored_L[start:].any():
                raise InputError(
                    f"{record.where}: completion {j + 1} must have a token to train on, got none after tokenisation"
                )
        tokens = np.concatenate(
            [np.asarray(ids, dtype=np.int32) for ids in _split_at_prompt(prompt_ids[:start], sequences)]
        )
        return Sample(
            tokens,
            np.concatenate([np.zeros(start, dtype=bool), *(scored_L[start:] for scored_L in scored)]),
            prompt_length=start,
            completion_lengths=tuple(len(ids) - start for ids in sequences),
            scores=tuple(math.nan if score is None else score for score in record.scores),
            margin=math.nan if record.margin is None else record.margin,
            label=record.label,
            weight=record.weight,
        )

    def _judged_turns(self, record: Preference) -> tuple[list[int], list[list[int]], list[np.ndarray | None]]:
        """Return the ids of the prompt and of every prompt + completion, and which of their tokens are untrained."""
        prompt_ids: list[int] = []
        sequences, untrained = [], []
        for j, turns in enumerate(record.completions):
            full = Conversation((*record.prompt, *turns), record.where, record.tools, len(record.prompt))
            if j == 0:
                self._template.require_template(full)
                prompt_ids = self._encoder.ids(self._template.render(full, len(record.prompt), prompt=True))
            self._template.require_fields_written(full)
            self._check_turn_ends(full)
            rendering = self._mask.rendering(full)
            sequences.append(rendering.ids)
            untrained.append(self._mask.untrained(full, rendering))
        return prompt_ids, sequences, untrained

    def _require_difference(self, record: Preference, start: int, sequences: list[list[int]]) -> None:
        if start == 0:
            raise InputError(
                f"{record.where}: must have a token of the prompt before its completions, got none"
            )
        # The gold answer of a triple may be the chosen one.
        for j, ids in enumerate(sequences[:2] if record.kind == "triple" else sequences):
            if ids in sequences[:j]:
                raise InputError(
                    f"{record.where}: completion {j + 1} must differ from completion {sequences.index(ids) + 1}, "
                    "got the same tokens"
                )


def _split_at_prompt(prompt_ids: list[int], sequences: list[list[int]]) -> list[list[int]]:
    """Return the prompt, then what each sequence adds to it."""
    return [prompt_ids, *(ids[len(prompt_ids) :] for ids in sequences)]


def _log_once(kind: str, line: str) -> None:
    _log.warning("%s (logged once; other samples may be affected too)", line)
