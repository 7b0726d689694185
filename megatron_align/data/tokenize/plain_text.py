"""Token ids of plain text: a prompt and its completion, with the special tokens around them once."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from megatron_align.data.tokenize.encoder import Encoder
from megatron_align.errors import InputError


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
            alone, around = self._encoder.ids("a"), self._encoder.ids("a", added=True)
            found = (i for i in range(len(around)) if around[i : i + len(alone)] == alone)
            self._start = around[: next(found, 0)]
        return self._start
