"""Measure the samples that prompt augmentation trains on, in tokens of the model that is going to be trained."""

from __future__ import annotations

from pathlib import Path

from megatron_align.data.tokenize.chat_template import ChatTemplate, load_chat_template
from megatron_align.data.tokenize.encoder import Encoder
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import require
from megatron_align.evaluation.engines import assets_of
from megatron_align.records import Conversation, Message


class SampleLength:
    """Counts tokens of chats.

    Args:
        model: Hugging Face folder, checkpoint or run folder with the tokenizer.
        chat_template: file of a Jinja chat template; None: the tokenizer's own.

    Raises:
        InputError: there is no tokenizer, or it has no chat template.
    """

    def __init__(self, model: str, chat_template: str | None) -> None:
        require(Path(model).is_dir(), f"tokenizer must be the folder of a model, found nothing at {model}")
        tokenizer = load_tokenizer(str(assets_of(model)))
        self._template = ChatTemplate(tokenizer, load_chat_template(chat_template) if chat_template else None)
        require(
            self._template.exists(),
            f"tokenizer: {model} has no chat template, which training on chats needs: give one by --chat-template",
        )
        self._encoder = Encoder(tokenizer)

    def __call__(self, prompt: str, complement: str, where: str) -> int:
        """Return the tokens of a chat of two turns."""
        turns = (Message("user", prompt), Message("assistant", complement))
        return len(self._encoder.ids(self._template.render(Conversation(turns, where, None), 2)))
