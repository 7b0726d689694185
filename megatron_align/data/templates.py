"""Records to tokens, and who is trained: the chat template decides both, in the words of the tokenizer.

The boundaries are those of TRL's SFTTrainer for prompt + completion (text or messages). In a whole
conversation every assistant turn is trained on: what the template marks with ``{% generation %}`` if it has
such marks, else what each assistant turn adds to the rendering of the turns before it (plus the generation
prompt). The second way needs renderings that nest; a template that rewrites earlier turns is refused.

Shapes: L tokens of one sample.
"""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megatron_align.errors import InputError
from megatron_align.records import Completion, Conversation, Message, Sample

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tokenization_*.py",
)

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_log = logging.getLogger(__name__)


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a Hugging Face folder; nothing is ever downloaded.

    Raises:
        InputError: if the folder or its tokenizer is missing or malformed.
    """
    path = Path(folder)
    if not path.is_dir():
        raise InputError(f"{folder}: must be a Hugging Face folder with a tokenizer, found none")
    if not any(next(path.glob(name), None) for name in TOKENIZER_FILES):
        raise InputError(f"{folder}: must hold a tokenizer (one of {', '.join(TOKENIZER_FILES)}), found none")
    try:
        # trust_remote_code: unless it is said, transformers asks on the terminal and a job would hang
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ImportError) as error:
        raise InputError(f"{folder}: tokenizer could not be loaded: {_one_line(error)}") from error
    except Exception as error:
        if type(error) is not Exception:  # the tokenizers library raises bare Exception; all else is a fault
            raise
        raise InputError(f"{folder}: tokenizer could not be loaded: {_one_line(error)}") from error


class Template:
    """Turns records into samples with one tokenizer.

    Args:
        tokenizer: with a chat template if conversations come, with an EOS token if plain text comes.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._warned = False
        self._written: set[str] = set()

    def sample(self, record: Conversation | Completion) -> Sample:
        """Tokenise one record.

        Raises:
            InputError: if the template is missing, fails, does not nest, or leaves nothing to train on;
                names the record's place.
        """
        if isinstance(record, Completion):
            tokens, scored_L = self._text(record)
        else:
            self._need_chat_template(record)
            self._need_tools_written(record)
            if record.prompt_messages is not None:
                tokens, scored_L = self._completion_turns(record)
            elif _MARK.search(self.tokenizer.get_chat_template(tools=_list(record.tools))):
                tokens, scored_L = self._marked_turns(record)
            else:
                tokens, scored_L = self._assistant_turns(record)
        scored_L[:1] = False  # nothing predicts the first token
        if not scored_L.any():
            raise InputError(f"{record.where}: must have a token to train on, got none after tokenisation")
        return Sample(np.asarray(tokens, dtype=np.int32), scored_L)

    # Who is trained: four ways, each returning token ids and a boolean per token.
    def _text(self, record: Completion) -> tuple[list[int], np.ndarray]:
        """Plain text: EOS ends the completion, which starts where it diverges from the prompt alone."""
        eos = self.tokenizer.eos_token
        if eos is None:
            raise InputError(
                f"{record.where}: prompt + completion text needs a tokenizer with an EOS token, got none"
            )
        completion = record.completion if record.completion.endswith(eos) else record.completion + eos
        prompt_ids = self.tokenizer(text=record.prompt)["input_ids"]
        all_ids = self.tokenizer(text=record.prompt + completion)["input_ids"]
        return self._after_prompt(prompt_ids, all_ids, record.where)

    def _completion_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        prompt_ids = self._ids(self._render(record, record.prompt_messages, prompt=True))
        all_ids = self._ids(self._render(record, len(record.messages)))
        return self._after_prompt(prompt_ids, all_ids, record.where)

    def _marked_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        if not self.tokenizer.is_fast:
            raise InputError(
                f"{record.where}: a chat template with generation marks needs a fast tokenizer, "
                f"got {type(self.tokenizer).__name__}"
            )
        encoded = self._apply(
            record, len(record.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        return encoded["input_ids"], np.asarray(encoded["assistant_masks"], dtype=bool)

    def _assistant_turns(self, record: Conversation) -> tuple[list[int], np.ndarray]:
        whole = self._render(record, len(record.messages))
        whole_ids = self._ids(whole)
        scored_L = np.zeros(len(whole_ids), dtype=bool)
        for i, message in enumerate(record.messages):
            if message.role != "assistant":
                continue
            if i == 0:
                raise InputError(
                    f"{record.where}: messages[0] must not be an assistant turn unless the chat template "
                    "marks {% generation %}: nothing stands before it to tell where it starts"
                )
            start = self._nested(
                self._render(record, i, prompt=True), whole, whole_ids, f"{record.where}: messages[{i}]"
            )
            end = len(whole_ids)
            if i + 1 < len(record.messages):
                end = self._nested(
                    self._render(record, i + 1), whole, whole_ids, f"{record.where}: messages[{i}]"
                )
            if start >= end:
                raise InputError(
                    f"{record.where}: messages[{i}] must add tokens to the conversation, got none"
                )
            scored_L[start:end] = True
        return whole_ids, scored_L

    def _nested(self, prefix: str, whole: str, whole_ids: list[int], turn: str) -> int:
        """Return how many tokens of the whole rendering the prefix covers.

        Where a token straddles the end of the prefix (an answer that starts with a newline), it belongs to
        what follows, as in TRL.
        """
        if not whole.startswith(prefix):
            at = _common(prefix, whole)
            alone, within = prefix[at : at + 40], whole[at : at + 40]
            raise InputError(
                f"{turn}: the chat template must render earlier turns the same whatever follows, or mark "
                f"{{% generation %}}; got {alone!r} up to this turn, {within!r} in the whole"
            )
        return _common(self._ids(prefix), whole_ids)

    def _after_prompt(
        self, prompt_ids: list[int], all_ids: list[int], where: str
    ) -> tuple[list[int], np.ndarray]:
        """Score what follows the common start of both, as TRL does where the prompt is no token prefix."""
        start = _common(prompt_ids, all_ids)
        if start < len(prompt_ids) and not self._warned:
            self._warned = True
            _log.warning(
                "%s: the tokens of the prompt are not the first tokens of prompt + completion; training "
                "starts where they diverge, before %r (said once, other samples may be alike)",
                where,
                self.tokenizer.decode(prompt_ids[start:]),
            )
        return all_ids, np.arange(len(all_ids)) >= start

    # The tokenizer's own functions, with their errors put into one line.
    def _need_chat_template(self, record: Conversation) -> None:
        if not self.tokenizer.chat_template:
            raise InputError(
                f"{record.where}: a conversation needs a tokenizer with a chat template, "
                f"got none in '{self.tokenizer.name_or_path}'"
            )

    def _need_tools_written(self, record: Conversation) -> None:
        """Refuse a template without tools for data with tools: calls would become empty turns, and be trained."""
        without = {
            "tools": replace(record, tools=None),
            "tool_calls": replace(record, messages=tuple(map(_without_calls, record.messages))),
        }
        for part, other in without.items():
            if part in self._written or other == record:
                continue
            if self._render(record, len(record.messages)) == self._render_or_none(other):
                raise InputError(
                    f"{record.where}: the chat template must write the record's {part}, got the same text "
                    "without them; give the tokenizer a chat template that knows tools"
                )
            self._written.add(part)  # seen once: asked once per tokenizer

    def _render_or_none(self, record: Conversation) -> str | None:
        try:
            return self._render(record, len(record.messages))
        except InputError:
            return None

    def _render(self, record: Conversation, turns: int, *, prompt: bool = False) -> str:
        """Render the first ``turns`` messages as text, followed by the generation prompt if asked."""
        return self._apply(record, turns, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, record: Conversation, turns: int, **options: Any) -> Any:
        messages = [message.for_template() for message in record.messages[:turns]]
        try:
            return self.tokenizer.apply_chat_template(messages, tools=_list(record.tools), **options)
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{record.where}: the chat template failed: {_one_line(error)}") from error

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def _without_calls(message: Message) -> Message:
    return replace(message, extra={k: v for k, v in message.extra.items() if k != "tool_calls"})


def _list(tools: tuple[Any, ...] | None) -> list[Any] | None:
    return None if tools is None else list(tools)


def _common(one: list[int] | str, other: list[int] | str) -> int:
    """Return the length of the common start of two sequences."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
