"""Which turns of a conversation are trained, and which of their fields the chat template sees."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from megatron_align.errors import InputError
from megatron_align.records import REASONING_FIELDS, Completion, Conversation, Message, Preference, Record


@dataclass(frozen=True, slots=True)
class TurnOptions:
    """The options of conversations.

    Args:
        now: what the chat template reads from the clock; None: the time of each rendering
        last_only: of a conversation only the assistant turns after the last question are trained
        drop_fields: fields of turns that are left out, and ``tools`` of the record
    """

    now: datetime | None = None
    last_only: bool = False
    drop_fields: tuple[str, ...] = ()

    def applied(self, record: Record) -> Record:
        """Return the record as it is rendered and trained.

        Raises:
            InputError: if a turn is empty without its dropped fields.
        """
        if isinstance(record, Completion):
            return record
        if self.drop_fields:
            record = self._without_fields(record)
        return _last_only(record) if self.last_only and isinstance(record, Conversation) else record

    def _without_fields(self, record: Conversation | Preference) -> Conversation | Preference:
        tools = None if "tools" in self.drop_fields else record.tools
        if isinstance(record, Conversation):
            return replace(record, tools=tools, messages=self._turns(record.messages, record.where))
        prompt, *completions = [
            part if isinstance(part, str) else self._turns(part, record.where)
            for part in (record.prompt, *record.completions)
        ]
        return replace(record, tools=tools, prompt=prompt, completions=tuple(completions))

    def _turns(self, messages: tuple[Message, ...], where: str) -> tuple[Message, ...]:
        turns = []
        for message in messages:
            extra = {name: value for name, value in message.extra.items() if name not in self.drop_fields}
            if not message.content.strip() and extra != message.extra and not _has_content(extra):
                dropped = sorted(set(message.extra) - set(extra))
                raise InputError(
                    f"{where}: a turn of the {message.role} must have more than what data.drop_fields leaves out, "
                    f"got only {', '.join(dropped)}"
                )
            turns.append(replace(message, extra=extra) if extra != message.extra else message)
        return tuple(turns)


def _has_content(extra: dict[str, object]) -> bool:
    return any(extra.get(name) for name in ("tool_calls", *REASONING_FIELDS))


def _last_only(record: Conversation) -> Conversation:
    """Leave out the assistant turns before the last question that has an answer to train on."""
    roles = [message.role for message in record.messages]
    trained = [
        i for i, message in enumerate(record.messages) if message.role == "assistant" and message.train
    ]
    if not trained:
        return record
    question = max((i for i, role in enumerate(roles[: trained[-1]]) if role == "user"), default=-1)
    turns = tuple(
        replace(message, train=False) if message.role == "assistant" and i < question else message
        for i, message in enumerate(record.messages)
    )
    return replace(record, messages=turns)
