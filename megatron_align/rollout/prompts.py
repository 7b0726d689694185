"""Read prompts from data files, and tokenise them: text as it is, messages with the chat template."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from megatron_align.data.formats.chat import alpaca_prompt
from megatron_align.data.formats.fields import RawRecord, bad_field, nonempty_text, require_renderable
from megatron_align.data.formats.files import expand, read_fields
from megatron_align.data.formats.turns import messages, sharegpt, tools_of, wrapped_tools
from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.data.tokenize.encoder import Encoder
from megatron_align.errors import InputError
from megatron_align.records import Conversation, Message
from megatron_align.rollout.types import Prompt

TEXT_FIELDS = ("prompt", "question", "query", "context", "ctx")  # the first that a record has is its prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRecord:
    """A record with a prompt.

    Args:
        raw: all of its fields.
        where: ``file:line``, for messages.
        prompt: text, or the messages before the answer.
        tools: for the chat template.
        answer: content of the record's own last assistant turn, where its shape has one.
    """

    raw: RawRecord
    where: str
    prompt: str | tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    answer: str | None = None

    def prompt_field(self) -> str | list[dict[str, Any]]:
        """Return the prompt as the field ``prompt`` of a data file."""
        if isinstance(self.prompt, str):
            return self.prompt
        return [message.for_template() for message in self.prompt]


def read_prompts(path: str, *, as_chat: bool = False, limit: int | None = None) -> Iterator[PromptRecord]:
    """Yield the prompts of a file, folder or glob pattern, in order.

    A record has ``prompt`` (text or messages), another of ``TEXT_FIELDS`` (text), ``messages``, ``conversations``
    (ShareGPT) or ``instruction`` (Alpaca); a conversation that ends with the assistant's turn is a prompt without it.

    Args:
        path: of the data.
        as_chat: text is the turn of a user, not to be continued as it is.
        limit: stop after this number of prompts; None: all.

    Raises:
        InputError: a record has no prompt, or a malformed one; names file, line and field. There is no prompt.
    """
    count = 0
    for file in expand(path):
        for where, raw in read_fields(file):
            if isinstance(raw, InputError):
                raise raw
            if count == limit:
                return
            yield prompt_record(raw, where, as_chat)
            count += 1
    if not count:
        raise InputError(f"{path}: must hold at least one prompt, got none")


class PromptTokenizer:
    """Turns prompts into token ids.

    Args:
        tokenizer: of the model.
        chat_template: text of a Jinja template to use instead of the tokenizer's own.
        now: what the template reads from the clock; None: the time of each rendering.

    Attributes:
        rendered: whether a prompt was messages so far, which the chat template has rendered.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
        now: datetime | None = None,
    ) -> None:
        self._template, self._encoder = ChatTemplate(tokenizer, chat_template, now), Encoder(tokenizer)
        self.rendered = False

    def prompt(self, record: PromptRecord, key: int) -> Prompt:
        """Return a record's prompt, ended by the generation prompt if it is messages.

        Args:
            record: with the prompt.
            key: of its random numbers: its index among all prompts.

        Raises:
            InputError: messages without a chat template, or the template fails.
        """
        return Prompt(self.continued(record, ""), key, record.where)

    def continued(self, record: PromptRecord, text: str) -> list[int]:
        """Return the token ids of a record's prompt and the beginning of an answer.

        Raises:
            InputError: as :meth:`prompt`.
        """
        if isinstance(record.prompt, str):
            return self._encoder.ids(record.prompt + text, added=True)
        conversation = Conversation(record.prompt, record.where, record.tools)
        self._template.require_template(conversation)
        self.rendered = True
        return self._encoder.ids(self._template.render(conversation, len(record.prompt), prompt=True) + text)


def prompt_record(raw: RawRecord, where: str, as_chat: bool = False) -> PromptRecord:
    """Return the prompt of a raw record, see :func:`read_prompts`.

    Raises:
        InputError: it has none, or a malformed one.
    """
    answer, tools = None, None
    text_field = next((name for name in TEXT_FIELDS if name in raw), "prompt")
    if isinstance(raw.get(text_field), str):
        text = nonempty_text(raw, text_field, where)
        require_renderable(text, where, text_field)
        return PromptRecord(
            raw=raw, where=where, prompt=(Message("user", text),) if as_chat else text, tools=None
        )
    if "prompt" in raw:
        if not isinstance(raw["prompt"], list):
            raise bad_field(where, "prompt", "a string or a list of messages", raw["prompt"])
        turns, tools = messages(raw["prompt"], where, "prompt"), tools_of(raw, where)
    elif "messages" in raw:
        turns, tools = messages(raw["messages"], where, "messages"), tools_of(raw, where)
    elif "conversations" in raw:
        turns, tools = sharegpt(raw, where)
    elif "instruction" in raw:
        turns, tools = alpaca_prompt(raw, where), wrapped_tools(raw, where)
        answer = raw["output"] if isinstance(raw.get("output"), str) else None
    else:
        raise InputError(
            f"{where}: must have a prompt (field prompt, question, messages, conversations or instruction), "
            f"got {', '.join(sorted(raw)) or 'no field'}"
        )
    if turns[-1].role == "assistant" and "prompt" not in raw:
        answer, turns = turns[-1].content, turns[:-1]
    if not turns or turns[-1].role == "assistant":
        raise InputError(f"{where}: the last turn of a prompt must not be the assistant's, got only it")
    return PromptRecord(raw=raw, where=where, prompt=turns, tools=tools, answer=answer)
