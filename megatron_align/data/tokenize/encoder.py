"""Count the tokens of a rendering that a prefix of it covers, without tokenising that prefix again.

Special tokens cut a text into pieces that are tokenised by themselves. A prefix therefore has the rendering's
tokens up to the last special token inside it, and only what comes after that token has to be tokenised: in a chat
the role's name and a newline, the same in every turn.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from functools import lru_cache
from itertools import chain, takewhile

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def common_prefix_length(one: list[int] | str, other: list[int] | str) -> int:
    """Return the length of the common prefix of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class Rendering:
    """A text and its tokens, and where special tokens end in both.

    Args:
        text: rendered by a chat template.
        ids: its tokens, no special tokens added.
        encoder: of the tokenizer.
    """

    def __init__(self, text: str, ids: list[int], encoder: Encoder) -> None:
        self.text, self.ids, self._encoder = text, ids, encoder
        self._matches = list(encoder.special.finditer(text)) if encoder.special else []
        self._ends = [match.end() for match in self._matches]
        self._indices = np.flatnonzero(np.isin(ids, encoder.special_ids)).tolist()

    def covered(self, prefix: str) -> int:
        """Return how many tokens the text has in common with ``prefix``, which it starts with."""
        return self.covered_to(len(prefix))

    def covered_to(self, length: int) -> int:
        """Return how many tokens the text has in common with its first ``length`` characters."""
        inside = bisect_right(self._ends, length)
        cut_through = inside < len(self._matches) and self._matches[inside].start() < length
        if not inside or cut_through or len(self._indices) != len(self._ends):
            return common_prefix_length(self._encoder.ids(self.text[:length]), self.ids)
        last, at = self._matches[inside - 1], self._indices[inside - 1]
        # The special token is included, so that the rest is tokenised as its continuation, not as the start of a text.
        rest = self._encoder.short(last.group() + self.text[last.end() : length])
        return at + common_prefix_length(rest, self.ids[at : at + len(rest)])


class Encoder:
    """Encodes texts with a tokenizer, and knows its special tokens, which cut a text into pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = None
        self._spans_are_complete = False
        if _calls_backend(tokenizer):
            tokenizer(text="")  # sets the backend up as calls without options need it
            self._backend = tokenizer.backend_tokenizer
        self.short = lru_cache(maxsize=4096)(self.ids)
        added = tokenizer.added_tokens_decoder
        # A token that swallows neighbouring space, or that is matched in normalised text, cuts elsewhere.
        clean = all(not (t.lstrip or t.rstrip or t.single_word or t.normalized) for t in added.values())
        self.special_ids = list(added) if clean else []
        longest_first = sorted((re.escape(token.content) for token in added.values()), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first)) if clean and added else None

    def ids(self, text: str, *, added: bool = False) -> list[int]:
        """Return the token ids of a text; ``added``: with the special tokens that the tokenizer puts around it."""
        if self._backend is None:
            return self._tokenizer(text=text, add_special_tokens=added)["input_ids"]
        # the same without the offsets and masks of a call, which cost a fifth of the time
        return self._backend.encode_batch_fast([text], add_special_tokens=added)[0].ids

    def ids_and_spans(self, text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Return the token ids of a text, and where each token starts and ends in it, in characters (int64[L]).

        A token that is a part of a character, as of a rare emoji, spans that character; white space belongs to its
        token. Only fast tokenizers know.
        """
        if self._backend is None:
            call = self._tokenizer(text=text, add_special_tokens=False, return_offsets_mapping=True)
            ids, spans = call["input_ids"], call["offset_mapping"]
        else:
            if not self._spans_are_complete:
                _keep_space_in_offsets(self._backend)
                self._spans_are_complete = True
            encoding = self._backend.encode_batch([text], add_special_tokens=False)[0]
            ids, spans = encoding.ids, encoding.offsets
        spans_L2 = np.fromiter(chain.from_iterable(spans), np.int64, 2 * len(ids)).reshape(-1, 2)
        return ids, spans_L2[:, 0], spans_L2[:, 1]


def _keep_space_in_offsets(backend: Tokenizer) -> None:
    """Turn off ``trim_offsets`` of byte-level tokenizers, which leaves white space to no token; ids stay the same."""
    processor = backend.post_processor
    if processor is None:
        return
    state = json.loads(processor.__getstate__())
    parts = state.get("processors", []) if state.get("type") == "Sequence" else [state]
    trimming = [part for part in parts if part.get("trim_offsets")]
    for part in trimming:
        part["trim_offsets"] = False
    if trimming:
        processor.__setstate__(json.dumps(state).encode())
        backend.post_processor = processor


def _calls_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a call does nothing to a text but what the tokenizers library does."""
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and type(tokenizer).__call__ is PreTrainedTokenizerBase.__call__
        and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
