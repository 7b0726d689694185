"""The tokens that end an assistant turn under a chat template: what a trained model has to stop at."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase

from megatron_align.data.tokenize.chat_template import ChatTemplate
from megatron_align.errors import InputError
from megatron_align.records import Conversation, Message

_ANSWER = "answer0"
_QUESTION = Message("user", "question0")
_CALL = {"type": "function", "id": "call00000", "function": {"name": "f", "arguments": {"x": _ANSWER}}}
_TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": "",
        "parameters": {"type": "object", "properties": {"x": {"type": "string"}}},
    },
}


def turn_end_token_ids(tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> list[int]:
    """Return the ids of the tokens that end an assistant turn, the one that ends an answer first.

    An answer and a tool call are rendered, and the special tokens that follow them are read. Llama-3 may end a call
    with another token than an answer. Only single tokens count: a template written for another tokenizer, whose
    ``<|eot_id|>`` is ordinary text here, ends turns with none.

    Args:
        tokenizer: of the model.
        template: text of the chat template that is trained with; None: the tokenizer's own.

    Returns:
        Token ids; empty: the template writes no such token, or cannot render an answer, or there is no template.
    """
    chat = ChatTemplate(tokenizer, template)
    if not chat.exists():
        return []
    ends: list[int] = []
    special = special_tokens(tokenizer)
    longest_first = sorted(map(re.escape, special), key=len, reverse=True)
    marks = re.compile("|".join(longest_first) or r"(?!)")
    answer = _after_answer(
        chat, Conversation((_QUESTION, Message("assistant", _ANSWER)), "the chat template")
    )
    if answer and (found := marks.search(answer)):
        ends.append(special[found.group()])
    message = Message("assistant", "", {"tool_calls": [_CALL]})
    call = _after_answer(chat, Conversation((_QUESTION, message), "the chat template", (_TOOL,)))
    # Tags such as </tool_call> may be special too: the last one ends the turn.
    called = [special[token] for token in marks.findall(call or "")]
    if called and not set(called) & set(ends):
        ends.append(called[-1])
    return ends


def _after_answer(chat: ChatTemplate, record: Conversation) -> str | None:
    """Return what the template writes after the answer; None: it does not write it."""
    try:
        text = chat.render(record, len(record.messages))
    except InputError:  # the template may refuse calls, or a conversation without a system turn
        return None
    _, answer, after = text.rpartition(_ANSWER)
    return after if answer else None


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Return the ids of added and special tokens by their text."""
    tokens = {token.content: index for index, token in tokenizer.added_tokens_decoder.items()}
    for token in tokenizer.all_special_tokens:
        tokens.setdefault(token, tokenizer.convert_tokens_to_ids(token))
    return {token: index for token, index in tokens.items() if token}
