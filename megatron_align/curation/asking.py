"""Send requests to a model once: replies are kept by content, equal requests share one, failures have a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from megatron_align.curation.chat_models import ChatModel, NoReply, Reply, Request
from megatron_align.errors import InputError
from megatron_align.rollout.endpoint import FailureBudget, RequestFailed
from megatron_align.rollout.kept_replies import KeptReplies, content_key

RETRY_TEMPERATURE = 0.7  # greedy again would give the same reply
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """None of a model's replies to a request holds what it was to hold; ``text`` is the last."""

    text: str


class Asker:
    """A model with its kept replies.

    Args:
        model: that replies.
        kept: its replies.
        budget: of requests that fail after all their tries.

    Attributes:
        made: requests sent by this process.
        reused: replies of earlier processes or equal requests.
    """

    def __init__(self, model: ChatModel, kept: KeptReplies, budget: FailureBudget) -> None:
        self._model, self._kept, self._budget = model, kept, budget
        self.made = self.reused = 0

    def replies(self, requests: Sequence[Request]) -> list[Reply | NoReply]:
        """Return the reply to each request; one that failed is sent again by the next process.

        Raises:
            InputError: more requests fail than the budget allows.
        """
        keys = [self._key(request) for request in requests]
        missing = {
            key: request for key, request in zip(keys, requests, strict=True) if not self._kept.of(key)
        }
        without: dict[str, NoReply] = {}
        names = list(missing)

        def on_reply(index: int, reply: Reply | NoReply) -> None:
            if isinstance(reply, Reply):
                self._kept.add(names[index], [reply.text, reply.finish_reason])
                return
            without[names[index]] = reply
            if reply.reason == "failed":
                self._spend(reply.line)

        if missing:
            self._model.reply(list(missing.values()), on_reply)
        self.made += len(missing)
        self.reused += len(requests) - len(missing)
        return [without[key] if key in without else Reply(*self._kept.of(key)[0]) for key in keys]

    def parsed(
        self, requests: Sequence[Request], parse: Callable[[str], _Parsed | None], tries: int
    ) -> list[_Parsed | NoReply | Unreadable]:
        """Return what is read from the replies; a reply that cannot be read is requested again, then drawn.

        Args:
            requests: greedy.
            parse: returns None for a reply that cannot be read.
            tries: replies of each request.
        """
        results: list[_Parsed | NoReply | Unreadable] = [Unreadable("") for _ in requests]
        waiting = list(range(len(requests)))
        for attempt in range(tries):
            temperature = RETRY_TEMPERATURE if attempt else 0.0
            sent = [replace(requests[i], attempt=attempt, temperature=temperature) for i in waiting]
            for i, reply in zip(waiting, self.replies(sent), strict=True):
                read = reply if isinstance(reply, NoReply) else parse(reply.text)
                results[i] = Unreadable(reply.text) if read is None and isinstance(reply, Reply) else read  # type: ignore[assignment]  # None is replaced
            waiting = [i for i in waiting if isinstance(results[i], Unreadable)]
        return results

    def close(self) -> None:
        """Close the model and the file of its replies."""
        self._model.close()
        self._kept.close()

    def _spend(self, line: str) -> None:
        try:
            self._budget.spend(RequestFailed(line))
        except InputError as error:
            then = "; replies are kept: the same command continues" if self._kept.is_stored else ""
            raise InputError(f"{error}{then}") from error

    def _key(self, request: Request) -> str:
        sampling = [request.temperature, request.max_tokens]
        return content_key(self._model.identity, request.task, request.content, request.attempt, sampling)
