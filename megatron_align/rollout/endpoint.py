"""Requests to an HTTP endpoint that speaks JSON: retries with backoff, several at once, and a budget of failures."""

from __future__ import annotations

import http.client
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from megatron_align.errors import InputError, one_line, require

VLLM_KEY_VARIABLE = "VLLM_API_KEY"  # the one that `vllm serve` reads
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_NO_ACCESS = (401, 403)
_LONGEST_WAIT = 60.0
_SHOWN = 200  # characters of an endpoint's answer in an error line
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class RequestFailed(RuntimeError):
    """A request that failed after all its tries; the message is one line with the endpoint and the reason.

    Attributes:
        status: with which the endpoint refused it; None: it failed otherwise.
    """

    def __init__(self, line: str, status: int | None = None) -> None:
        super().__init__(line)
        self.status = status


@dataclass(slots=True)
class Endpoint:
    """An HTTP server that answers JSON.

    Args:
        url: its base, ``http://host:port`` or ``https://host/path``.
        key_variable: environment variable with a key, sent as a bearer token if it is set.
        timeout_seconds: of one try, from its start to the end of the answer.
        tries: of one request; waits between them double from ``first_wait``, or are what the server says.
        first_wait: seconds before the second try.
        timeout_option: that sets this time, for messages.
        gone: returns why the server will never answer again, None if it may: no further try is made then.
    """

    url: str
    key_variable: str = "OPENAI_API_KEY"
    timeout_seconds: float = 300.0
    tries: int = 6
    first_wait: float = 1.0
    timeout_option: str = ""
    gone: Callable[[], str | None] = field(default=lambda: None, repr=False)
    _random: random.Random = field(default_factory=random.Random, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        require(
            parts.scheme in ("http", "https") and bool(parts.hostname),
            f"an endpoint's url must be like http://host:port, got '{self.url}'",
        )
        require(self.tries >= 1, f"an endpoint needs at least one try for each request, got {self.tries}")
        require(
            self.timeout_seconds > 0, f"an endpoint's timeout must be positive, got {self.timeout_seconds}"
        )

    def post(self, path: str, body: dict[str, Any], *, text: bool = False) -> dict[str, Any]:
        """Send a JSON object and return the one that is answered.

        Args:
            path: of the endpoint.
            body: JSON object.
            text: the answer is a text, and is not returned.

        Raises:
            RequestFailed: no try succeeded, or the endpoint refuses the request.
        """
        return self._request("POST", path, body, text)

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path; raises as :meth:`post`."""
        return self._request("GET", path, None)

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None, is_text: bool = False
    ) -> dict[str, Any]:
        reason, wait = "", 0.0
        for attempt in range(self.tries):
            if attempt:
                time.sleep(wait)
            wait = backoff(attempt, self.first_wait, self._random)
            try:
                status, after, text = self._send(method, path, body)
            except (OSError, http.client.HTTPException) as error:
                reason = one_line(error)
                if isinstance(error, TimeoutError):
                    option = f" ({self.timeout_option})" if self.timeout_option else ""
                    reason = f"timed out: no answer within {self.timeout_seconds:g} s{option}"
                if (end := self.gone()) is not None:
                    raise RequestFailed(end) from error
                continue
            if status == 200:
                if is_text:
                    return {}
                try:
                    answer = json.loads(text) if text else {}
                except ValueError:
                    reason = f"it answered no JSON: {one_line(text, _SHOWN)}"
                    continue
                if isinstance(answer, dict):
                    return answer
                reason = f"it answered no JSON object: {one_line(text, _SHOWN)}"
                continue
            reason = f"status {status}: {one_line(text, _SHOWN)}"
            if status not in _RETRIED:
                refusal = f"{self.url}{path} refused a request: {reason}{self._about_key(status)}"
                raise RequestFailed(refusal, status)
            wait = max(wait, after)
        raise RequestFailed(f"{self.url}{path} failed {self.tries} times, the last time: {reason}")

    def _about_key(self, status: int) -> str:
        """Return where the key is read, if it is the key that the endpoint refuses."""
        if status not in _NO_ACCESS:
            return ""
        found = "set" if os.environ.get(self.key_variable) else "not set"
        return f"; its key is read from the environment variable {self.key_variable}, which is {found}"

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, float, str]:
        """Return status, seconds to wait as the server says, and text."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        assert parts.hostname is not None, "checked at the start"
        end = time.monotonic() + self.timeout_seconds
        connection = kind(parts.hostname, parts.port, timeout=self.timeout_seconds)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        try:
            data = None if body is None else json.dumps(body).encode()
            connection.request(method, parts.path.rstrip("/") + path, data, headers)
            response = connection.getresponse()
            text = _read_all(response, end).decode("utf-8", "replace")
            after = response.headers.get("Retry-After", "")
            return response.status, min(float(after), _LONGEST_WAIT) if after.isdecimal() else 0.0, text
        finally:
            connection.close()


def chat_reply(endpoint: Endpoint, body: dict[str, Any]) -> tuple[str, str]:
    """Return the text of a chat completion (OpenAI's API), and why it ended: ``stop``, ``length``, ...

    Raises:
        RequestFailed: no try succeeded, the endpoint refuses the request, or answers no message.
    """
    answer = endpoint.post("/v1/chat/completions", body)
    try:
        choice = answer["choices"][0]
        text, reason = choice["message"]["content"] or "", choice.get("finish_reason") or "stop"
    except (LookupError, TypeError, AttributeError) as error:
        raise RequestFailed(
            f"{endpoint.url} answered no message: {one_line(answer, _SHOWN)} ({error})"
        ) from error
    if not isinstance(text, str):
        raise RequestFailed(f"{endpoint.url} answered no message: {one_line(answer, _SHOWN)} (no text)")
    return text, str(reason)


def _read_all(response: http.client.HTTPResponse, end: float) -> bytes:
    """Return a response's body; the connection's own limit is of each piece, and a server may send byte by byte.

    Args:
        response: whose head was read.
        end: on the monotonic clock.

    Raises:
        TimeoutError: the body is not complete by then.
        http.client.IncompleteRead: the connection ends before it is.
    """
    pieces = []
    while piece := response.read1(1 << 16):
        pieces.append(piece)
        if time.monotonic() > end:
            raise TimeoutError
    if response.length:  # of a stated length; read1 ends without a word
        raise http.client.IncompleteRead(b"".join(pieces), response.length)
    return b"".join(pieces)


def backoff(attempt: int, first: float, source: random.Random) -> float:
    """Return the seconds to wait after a failed try, the first of number 0: doubled after each, a minute at most."""
    return min(_LONGEST_WAIT, first * 2**attempt) * source.uniform(0.75, 1.25)


class FailureBudget:
    """Counts failed requests; too many end the run with one line that has the last reason.

    Args:
        most: failures that are allowed.
    """

    def __init__(self, most: int) -> None:
        self.most, self.failures = most, 0
        self._lock = threading.Lock()

    def spend(self, error: RequestFailed) -> None:
        """Count a failure.

        Raises:
            InputError: the budget is spent.
        """
        with self._lock:
            self.failures += 1
            if self.failures > self.most:
                raise InputError(
                    f"{self.failures} requests failed, {self.most} are allowed; the last: {error}"
                ) from error


def concurrently(
    call: Callable[[_Item], _Result], items: Sequence[_Item], workers: int, *, wait: bool = False
) -> Iterator[_Result]:
    """Yield ``call(item)`` of each item in order, several at a time; an error drops the calls not yet begun.

    The end of the program does not wait for calls that are under way, to a server that hangs for instance.

    Args:
        call: of an item.
        items: in order.
        workers: calls at a time.
        wait: after an error, for the calls that have begun.
    """
    results: list[Future[_Result]] = [Future() for _ in items]
    waiting, lock, stopped = iter(zip(items, results, strict=True)), threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with lock:
                item_and_result = next(waiting, None)
            if item_and_result is None:
                return
            item, result = item_and_result
            try:
                value = call(item)
            except BaseException as error:  # it is raised where the result is read
                result.set_exception(error)
            else:
                result.set_result(value)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(results)))]
    for thread in threads:
        thread.start()
    try:
        for result in results:
            yield result.result()
    finally:
        stopped.set()
        for thread in threads if wait else ():
            thread.join()
