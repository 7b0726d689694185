"""The chat template of a tokenizer: it renders conversations, with its errors put into one line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from megatron_align.data.tokenize.tokenizer import one_line
from megatron_align.errors import InputError
from megatron_align.records import Conversation, Message

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ANY_MARK = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")


def load_chat_template(path: str) -> str:
    """Return the text of a Jinja chat template.

    Raises:
        InputError: if the file is missing, empty, not text, or not Jinja; names the line.
    """
    file = Path(path)
    if not file.is_file():
        found = "a folder" if file.is_dir() else "nothing"
        raise InputError(
            f"{path}: data.chat_template must be a file with a Jinja chat template, found {found}"
        )
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: data.chat_template could not be read: {one_line(error)}") from error
    if not text.strip():
        raise InputError(f"{path}: data.chat_template must hold a Jinja chat template, got an empty file")
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_ANY_MARK.sub("", text))
    except TemplateSyntaxError as error:
        raise InputError(
            f"{path}:{error.lineno}: data.chat_template must be Jinja, got: {one_line(error)}"
        ) from error
    return text


class ChatTemplate:
    """Renders conversations with a tokenizer's chat template.

    Args:
        tokenizer: whose template is used.
        text: a Jinja template to use instead of the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> None:
        self.tokenizer, self.text = tokenizer, text
        self._written: set[str] = set()  # parts of records that the template was seen to write

    def render(self, record: Conversation, turns: int, *, prompt: bool = False) -> str:
        """Render the first ``turns`` messages as text, with ``prompt`` followed by the generation prompt."""
        return self._apply(record, turns, tokenize=False, add_generation_prompt=prompt)

    def _apply(self, record: Conversation, turns: int, **options: Any) -> Any:
        messages = [message.for_template() for message in record.messages[:turns]]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=_list(record.tools), chat_template=self.text, **options
            )
        except (TemplateError, ValueError, TypeError, LookupError) as error:
            raise InputError(f"{record.where}: the chat template failed: {one_line(error)}") from error

    def has_marks(self, record: Conversation) -> bool:
        """Return whether the template marks what is trained with ``{% generation %}``."""
        return bool(_MARK.search(self._template_text(record)))

    def marked(self, record: Conversation, turns: int) -> tuple[list[int], np.ndarray]:
        """Return the token ids of the first ``turns`` messages, and which of them the template marks (bool)."""
        encoded = self._apply(record, turns, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], np.array(encoded["assistant_masks"], dtype=bool)

    def exists(self) -> bool:
        """Return whether there is a chat template: the tokenizer's own or another."""
        return bool(self.text or self.tokenizer.chat_template)

    def require_template(self, record: Conversation) -> None:
        """Raise InputError if there is no chat template."""
        if not self.exists():
            raise InputError(
                f"{record.where}: a conversation needs a tokenizer with a chat template, "
                f"got none in '{self.tokenizer.name_or_path}'; data.chat_template can give one"
            )

    def require_tools_written(self, record: Conversation) -> None:
        """Refuse a template that ignores tools for data with tools: calls would become empty turns, and be trained."""
        without = {
            "tools": replace(record, tools=None),
            "tool_calls": replace(record, messages=tuple(map(_without_calls, record.messages))),
        }
        for part, other in without.items():
            if part in self._written or other == record:
                continue
            if self.render(record, len(record.messages)) == self._render_or_none(other):
                raise InputError(
                    f"{record.where}: the chat template must write the record's {part}, got the same text "
                    "without them; use a chat template that supports tools"
                )
            self._written.add(part)  # checked once per tokenizer

    def _template_text(self, record: Conversation) -> str:
        try:
            return self.tokenizer.get_chat_template(self.text, tools=_list(record.tools))
        except ValueError as error:  # several templates, none of them the default
            raise InputError(f"{record.where}: the chat template failed: {one_line(error)}") from error

    def _render_or_none(self, record: Conversation) -> str | None:
        try:
            return self.render(record, len(record.messages))
        except InputError:
            return None


def _without_calls(message: Message) -> Message:
    return replace(message, extra={k: v for k, v in message.extra.items() if k != "tool_calls"})


def _list(tools: tuple[Any, ...] | None) -> list[Any] | None:
    return None if tools is None else list(tools)
