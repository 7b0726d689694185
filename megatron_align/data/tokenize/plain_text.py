"""Token ids of plain text: a prompt and its completion, with the special tokens around them once."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_align.data.tokenize.encoder import Encoder
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError


class AddedTokens(NamedTuple):
    """The special tokens that a tokenizer puts around every text.

    Args:
        start: those before it.
        ends: whether there are some after it.
    """

    start: list[int]
    ends: bool


class PlainText:
    """Tokenises prompts and completions without a chat template.

    The tokenizer's own beginning (a BOS token) comes first, unless the prompt already has it; one EOS token comes last.

    Args:
        tokenizer: with an EOS token.
        encoder: of the tokenizer.
        warn: is given a kind of warning and its text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, encoder: Encoder, warn: Callable[[str, str], None]
    ) -> None:
        self._tokenizer, self._encoder, self._warn = tokenizer, encoder, warn
        self._start: list[int] | None = None  # the tokens that the tokenizer puts before a text

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids of a prompt, without the tokens that the tokenizer may put after a text."""
        ids = self._encoder.ids(prompt)
        start = self._start_ids()
        return ids if start and ids[: len(start)] == start else start + ids

    def ids(self, prompt: str, completion: str, where: str) -> list[int]:
        """Return the ids of both, ended by EOS.

        Raises:
            InputError: the tokenizer has no EOS token.
        """
        eos = self._tokenizer.eos_token
        if eos is None:
            raise InputError(f"{where}: plain text needs a tokenizer with an EOS token, got none")
        if eos in completion.removesuffix(eos):
            self._warn(
                "inner EOS",
                f"{where}: the completion has {eos} before its end; what follows it is trained too, and ends with "
                "another one",
            )
        completion = completion if completion.endswith(eos) else completion + eos
        ids, start = self._encoder.ids(prompt + completion), self._start_ids()
        if not start or ids[: len(start)] != start:
            return start + ids
        token = self._tokenizer.convert_ids_to_tokens(start[0])
        self._warn(
            "doubled BOS",
            f"{where}: the text begins with {token}, which the tokenizer puts before every text: it is not put twice",
        )
        return ids

    def _start_ids(self) -> list[int]:
        if self._start is None:
            self._start = _added_tokens(self._encoder).start
        return self._start


@lru_cache(maxsize=4)
def changed_since_first_version(folder: str, content: str) -> tuple[str | None, bool]:
    """Return which plain text the first version tokenised otherwise: it put all of the tokenizer's tokens around it.

    Args:
        folder: of the tokenizer.
        content: identifies what the folder holds; only for the memory of this function.

    Returns:
        the token that the tokenizer puts before every text: texts that begin with it had it twice; None: there is no
        such token. And whether all texts changed, as they had tokens after their EOS.
    """
    tokenizer = load_tokenizer(folder)
    start, ends = _added_tokens(Encoder(tokenizer))
    return tokenizer.convert_ids_to_tokens(start[0]) if start else None, ends


def _added_tokens(encoder: Encoder) -> AddedTokens:
    alone, around = encoder.ids("a"), encoder.ids("a", added=True)
    found = (i for i in range(len(around)) if around[i : i + len(alone)] == alone)
    before = next(found, 0)
    return AddedTokens(around[:before], len(around) > before + len(alone))
