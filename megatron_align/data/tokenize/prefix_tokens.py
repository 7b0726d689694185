"""How many tokens of a rendering a prefix of it covers, without tokenising that prefix again.

Special tokens cut a text into pieces that are tokenised by themselves. A prefix therefore has the rendering's own
tokens up to the last special token inside it, and only what comes after that token has to be tokenised: in a chat
the role's name and a newline, the same in every turn.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from itertools import takewhile

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def common(one: list[int] | str, other: list[int] | str) -> int:
    """Return the length of the common start of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


class Rendering:
    """A text and its tokens, and where special tokens end in both.

    Args:
        text: rendered by a chat template.
        ids: its tokens, no special tokens added.
        pieces: of the tokenizer.
    """

    def __init__(self, text: str, ids: list[int], pieces: Pieces) -> None:
        self.text, self.ids, self._pieces = text, ids, pieces
        self._matches = list(pieces.special.finditer(text)) if pieces.special else []
        self._ends = [match.end() for match in self._matches]
        self._places = np.flatnonzero(np.isin(ids, pieces.special_ids)).tolist()

    def covered(self, prefix: str) -> int:
        """Return how many tokens the tokens of ``prefix``, which the text starts with, have in common with it."""
        known = bisect_right(self._ends, len(prefix))
        cut_through = known < len(self._matches) and self._matches[known].start() < len(prefix)
        if not known or cut_through or len(self._places) != len(self._ends):
            return common(self._pieces.ids(prefix), self.ids)
        last, at = self._matches[known - 1], self._places[known - 1]
        # The special token comes along, so that the rest is tokenised as what follows it, not as a beginning.
        rest = self._pieces.short(last.group() + prefix[last.end() :])
        return at + common(rest, self.ids[at : at + len(rest)])


class Pieces:
    """What a tokenizer makes of texts, and its special tokens, where they cut texts into pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._backend = None
        if _calls_backend(tokenizer):
            tokenizer(text="")  # leaves the backend as calls without options need it
            self._backend = tokenizer.backend_tokenizer
        self.short = lru_cache(maxsize=4096)(self.ids)
        added = tokenizer.added_tokens_decoder
        # A token that takes in neighbouring space, or that is looked for in normalised text, cuts elsewhere.
        clean = all(not (t.lstrip or t.rstrip or t.single_word or t.normalized) for t in added.values())
        self.special_ids = list(added) if clean else []
        longest_first = sorted((re.escape(token.content) for token in added.values()), key=len, reverse=True)
        self.special = re.compile("|".join(longest_first)) if clean and added else None

    def ids(self, text: str, *, added: bool = False) -> list[int]:
        """Return the tokens of a text; ``added``: with those that the tokenizer puts around it."""
        if self._backend is None:
            return self._tokenizer(text=text, add_special_tokens=added)["input_ids"]
        # the same without the offsets and masks that a call makes, which cost a fifth
        return self._backend.encode_batch_fast([text], add_special_tokens=added)[0].ids


def _calls_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether a call does nothing to a text but what the tokenizers library does."""
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and type(tokenizer).__call__ is PreTrainedTokenizerBase.__call__
        and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus
    )
