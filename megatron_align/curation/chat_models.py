"""Models that reply to messages: an endpoint, a model in this process, or a function of a user's file."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Protocol

from megatron_align.config.paths import expand_home
from megatron_align.config.user_files import parameters_of, raised_at, user_function
from megatron_align.data.store import sha256
from megatron_align.data.tokenize.chat_template import ChatTemplate, load_chat_template
from megatron_align.data.tokenize.tokenizer import load_tokenizer
from megatron_align.errors import InputError, one_line, require, shown
from megatron_align.evaluation.engines import Precision, assets_of, open_engine, weights_state
from megatron_align.records import Message
from megatron_align.rollout.endpoint import Endpoint, RequestFailed, chat_reply, concurrently
from megatron_align.rollout.engine import Engine
from megatron_align.rollout.kept_replies import content_key
from megatron_align.rollout.prompts import PromptRecord, PromptTokenizer
from megatron_align.rollout.types import Prompt, Sampling

# An endpoint's words for a prompt that its model has no room for.
_TOO_LONG = re.compile(
    r"context.{0,12}(length|window|size)|too (long|many tokens)|max\w*.{0,20}tokens", re.IGNORECASE
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Messages that a model replies to.

    Args:
        task: generate, critique, quality, label or augment.
        content: of the one message, a user's.
        fields: from which the content was made, for functions.
        attempt: number of the request among those with the same content.
        temperature: 0 is greedy.
        max_tokens: of the reply.
        where: the prompt comes from, for messages.
    """

    task: str
    content: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 0
    temperature: float = 0.0
    max_tokens: int = 512
    where: str = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """A model's reply; ``finish_reason`` is ``length`` where it was cut."""

    text: str
    finish_reason: str = "stop"


@dataclass(frozen=True, slots=True)
class NoReply:
    """Why there is no reply: the request ``failed`` after all its tries, or is ``too_long`` for the model."""

    reason: Literal["failed", "too_long"]
    line: str


OnReply = Callable[[int, "Reply | NoReply"], None]


class ChatModel(Protocol):
    """Replies to requests.

    Attributes:
        identity: JSON value that differs between models that reply differently.
    """

    identity: Any

    def reply(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """Call ``on_reply`` with the index and the reply of each request, from any thread, as they come."""
        ...

    def close(self) -> None:
        """Free what the model holds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How models are reached.

    Args:
        workers: requests at once to an endpoint
        timeout: seconds of one try of a request to an endpoint
        tries: of a request to an endpoint
        chat_template: file with a Jinja chat template of a model in this process; None: the tokenizer's own
        precision: of the weights of a model in this process; None: as stored
        now: what its chat template reads from the clock; None: the time of each rendering
    """

    workers: int = 16
    timeout: float = 300.0
    tries: int = 6
    chat_template: str | None = None
    precision: Precision | None = None
    now: datetime | None = None


def open_chat(model: str, option: str, options: ChatOptions) -> ChatModel:
    """Return the model that a text names: ``URL#NAME``, ``FILE.py:FUNCTION``, or the path of a model.

    Without ``#NAME`` an endpoint must serve one model only.

    Args:
        model: the text.
        option: that has it, for errors.
        options: how it is reached.

    Raises:
        InputError: there is no such model or function, the endpoint does not answer, or a model has no chat template.
    """
    if is_url(model):
        return EndpointChat(model, option, options)
    return (
        FunctionChat(model, option) if is_function(model) else EngineChat(expand_home(model), option, options)
    )


def is_url(model: str) -> bool:
    """Return whether a text names an endpoint."""
    return model.startswith(("http://", "https://"))


def is_function(model: str) -> bool:
    """Return whether a text names a function of a file, ``FILE.py:FUNCTION``."""
    return re.search(r"\.py:\w*$", model) is not None


class EndpointChat:
    """An OpenAI-compatible endpoint; its key is read from the environment variable OPENAI_API_KEY."""

    def __init__(self, url: str, option: str, options: ChatOptions) -> None:
        require(options.workers >= 1, f"{option}: requests at once must be at least 1, got {options.workers}")
        address, _, name = url.partition("#")
        base = address.rstrip("/").removesuffix("/v1")  # the base url of OpenAI's clients ends with it
        self._endpoint = Endpoint(base, timeout_seconds=options.timeout, tries=options.tries)
        self._workers = options.workers
        self._name = name or self._only_model(option)
        self.identity: Any = ["endpoint", base, self._name]

    def reply(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See :meth:`.ChatModel.reply`."""
        stopped = threading.Event()

        def one(index: int) -> None:
            reply = self._reply(requests[index])
            if stopped.is_set() and isinstance(reply, NoReply):
                return  # it would have been tried again
            try:
                on_reply(index, reply)
            except InputError as error:  # the budget is spent: no other request is tried again
                stopped.set()
                line = str(error)
                self._endpoint.gone = lambda: line
                raise

        # Replies to requests that are on their way are waited for and kept.
        for _ in concurrently(one, range(len(requests)), self._workers, wait=True):
            pass

    def close(self) -> None:
        """Nothing is held."""

    def _reply(self, request: Request) -> Reply | NoReply:
        body = {
            "model": self._name,
            "messages": [{"role": "user", "content": request.content}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
        }
        try:
            return Reply(*chat_reply(self._endpoint, body))
        except RequestFailed as error:
            line = str(error)
            return NoReply("too_long" if "refused" in line and _TOO_LONG.search(line) else "failed", line)

    def _only_model(self, option: str) -> str:
        try:
            served = [card["id"] for card in self._endpoint.get("/v1/models")["data"]]
        except RequestFailed as error:
            raise InputError(f"{option}: {error}") from error
        except (LookupError, TypeError) as error:
            raise InputError(
                f"{option}: {self._endpoint.url}/v1/models lists no models: name one, as in URL#NAME"
            ) from error
        line = f"{self._endpoint.url} must serve one model, or one must be named, as in URL#NAME"
        require(len(served) == 1, f"{option}: {line}, got {', '.join(map(str, served)) or 'none'}")
        return str(served[0])


class EngineChat:
    """A model in this process: Hugging Face folder, checkpoint or run folder. It is loaded with the first request."""

    def __init__(self, model: str, option: str, options: ChatOptions) -> None:
        found = f"{option} must be http://..., FILE.py:FUNCTION or the folder of a model, found nothing at {model}"
        require(Path(model).is_dir(), found)
        self._model, self._options = model, options
        tokenizer, template = load_tokenizer(str(assets_of(model))), None
        if options.chat_template:
            template = load_chat_template(options.chat_template)
        require(
            ChatTemplate(tokenizer, template).exists(),
            f"{option}: {model} has no chat template, which its requests need: give one by --chat-template",
        )
        self._tokenizer = PromptTokenizer(tokenizer, template, options.now)
        self._engine: Engine | None = None
        self.identity: Any = ["model", weights_state(model), template, options.precision]

    def reply(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See :meth:`.ChatModel.reply`."""
        if self._engine is None:
            self._engine = open_engine(self._model, self._options.precision)
        groups: dict[tuple[float, int], list[tuple[int, Prompt]]] = {}
        for index, request in enumerate(requests):
            # Draws depend on the request alone, not on its place among others.
            key = int(content_key(request.content, request.attempt)[:15], 16)
            prompt = self._tokenizer.prompt(_record(request), key)
            if len(prompt.token_ids) >= self._engine.context:
                line = f"{len(prompt.token_ids)} tokens, context {self._engine.context}"
                on_reply(index, NoReply("too_long", f"{request.where}: its request has {line}"))
            else:
                groups.setdefault((request.temperature, request.max_tokens), []).append((index, prompt))
        for (temperature, max_tokens), group in groups.items():
            sampling = Sampling(temperature=temperature, max_tokens=max_tokens)
            made = self._engine.generate([prompt for _, prompt in group], sampling)
            for (index, _), (completion,) in zip(group, made, strict=True):
                on_reply(index, Reply(completion.text, completion.finish_reason))

    def close(self) -> None:
        """Free the model's memory."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class FunctionChat:
    """A function of a user's file, ``f(prompt, **fields) -> str``; it is given the parameters that it names.

    These are ``task``, ``content`` (what a model would read), ``attempt``, ``prompt``, and by task ``category``,
    ``examples``, ``refused``, ``complement``, ``categories``. A list or mapping that it returns is taken as its
    JSON.
    """

    def __init__(self, path: str, option: str) -> None:
        self._option = option
        self._file, self._function = user_function(path, option)
        self._parameters, self._takes_all = parameters_of(self._function, option)
        self.identity: Any = ["function", sha256(self._file), path.rpartition(":")[2]]

    def reply(self, requests: Sequence[Request], on_reply: OnReply) -> None:
        """See :meth:`.ChatModel.reply`."""
        for index, request in enumerate(requests):
            on_reply(index, Reply(self._text(request)))

    def close(self) -> None:
        """Nothing is held."""

    def _text(self, request: Request) -> str:
        given = {
            "task": request.task,
            "content": request.content,
            "attempt": request.attempt,
            **request.fields,
        }
        lacks = [name for name, needed in self._parameters.items() if needed and name not in given]
        require(
            not lacks,
            f"{self._option}: the function needs '{', '.join(lacks)}', which a request of the task {request.task} does "
            f"not have; it has {', '.join(given)}",
        )
        kept = given if self._takes_all else {name: given[name] for name in given if name in self._parameters}
        try:
            made = self._function(**kept)
        except Exception as error:  # a user's function may raise anything
            raise InputError(f"{self._option} {raised_at(error, self._file)}") from error
        if isinstance(made, (dict, list)):
            try:
                return json.dumps(made, ensure_ascii=False)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{self._option}: the function must return JSON, {one_line(error)}"
                ) from error
        require(
            isinstance(made, str),
            f"{self._option}: the function must return a text for {request.where}, got {shown(made)}",
        )
        return str(made)


def _record(request: Request) -> PromptRecord:
    return PromptRecord(raw={}, where=request.where, prompt=(Message("user", request.content),))
