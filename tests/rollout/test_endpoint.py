"""A request survives a slow, busy or broken endpoint within its tries; what fails for ever is one line and counted."""

import socketserver
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from megatron_align.errors import InputError
from megatron_align.rollout.endpoint import Endpoint, FailureBudget, RequestFailed, concurrently
from tests.harness.http_server import serving


def answers(*script):
    left = list(script)
    return lambda path, body: left.pop(0) if len(left) > 1 else left[0]


def quick(url, **options):
    return Endpoint(url, **{"first_wait": 0.01, "tries": 3, **options})


@pytest.mark.parametrize(
    "bad", [(500, {}), (429, "slow down"), (503, ""), (200, "<html>rubbish"), (200, "[1]"), (200, '{"cut')]
)
def test_a_passing_fault_is_retried(bad):
    with serving(answers(bad, bad, (200, {"x": 1}))) as url:
        assert quick(url).post("/a", {}) == {"x": 1}
    with (
        serving(answers(bad)) as url,
        pytest.raises(RequestFailed, match=r"/a failed 3 times, the last time: ") as error,
    ):
        quick(url).post("/a", {})
    assert "\n" not in str(error.value)


def test_a_refusal_is_not_retried():
    calls = []
    refused = pytest.raises(RequestFailed, match="refused a request: status 400.*no such model")
    with serving(lambda path, _: calls.append(path) or (400, {"error": "no such model"})) as url, refused:
        quick(url).post("/a", {})
    assert calls == ["/a"]


def test_an_endpoint_that_is_down_or_hangs():
    with serving(answers((200, {}))) as url:
        pass  # closed again: the port is free
    with pytest.raises(RequestFailed, match="failed 2 times"):
        quick(url, tries=2).get("/a")

    def hang(path, body):
        time.sleep(0.5)
        return 200, {}

    with serving(hang) as url, pytest.raises(RequestFailed, match="timed out: no answer within 0.05 s$"):
        quick(url, tries=1, timeout_seconds=0.05).get("/a")


@contextmanager
def raw_answers(*pieces, pause=0.0):
    """Yield the URL of a server that sends these bytes after any request, with pauses, and closes the connection."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.recv(1 << 16)
            with suppress(OSError):  # the client gave up
                for piece in pieces:
                    self.request.sendall(piece)
                    time.sleep(pause)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


HEAD = b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n"


def test_an_answer_that_comes_byte_by_byte_has_the_same_time_limit():
    """Each byte comes well within the connection's limit."""
    with raw_answers(HEAD, *[bytes([b]) for b in b'{"x": 1}'], pause=0.03) as url:
        assert quick(url, tries=1).get("/a") == {"x": 1}
        with pytest.raises(RequestFailed, match="timed out: no answer within 0.1 s"):
            quick(url, tries=1, timeout_seconds=0.1).get("/a")


def test_an_answer_that_is_cut_is_a_failure():
    with (
        raw_answers(HEAD, b'{"x"') as url,
        pytest.raises(RequestFailed, match="IncompleteRead.*4 more expected"),
    ):
        quick(url, tries=1).get("/a")
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    with raw_answers(chunked, b"8\r\n", b'{"x": 1}\r\n', b"0\r\n\r\n") as url:
        assert quick(url, tries=1).get("/a") == {"x": 1}
    with raw_answers(chunked, b'8\r\n{"x"') as url, pytest.raises(RequestFailed, match="failed 1 times"):
        quick(url, tries=1).get("/a")


def test_the_server_may_say_how_long_to_wait():
    began = time.monotonic()
    with serving(answers((429, {}), (200, {"x": 1})), {"Retry-After": "1"}) as url:
        assert quick(url).get("/a") == {"x": 1}
    assert time.monotonic() - began >= 1


def test_a_key_is_sent_and_never_shown(monkeypatch):
    received = []
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("VLLM_API_KEY", "other")
    with serving(answers((200, {})), received=received) as url:
        quick(url).post("/a", {})
        quick(url, key_variable="VLLM_API_KEY").get("/a")
        monkeypatch.delenv("OPENAI_API_KEY")
        quick(url).get("/a")
    assert [headers["Authorization"] for headers in received] == ["Bearer secret", "Bearer other", None]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with serving(answers((401, "no"))) as url, pytest.raises(RequestFailed) as error:
        quick(url).post("/a", {})
    assert "secret" not in str(error.value)
    assert "its key is read from the environment variable OPENAI_API_KEY, which is set" in str(error.value)


def test_a_budget_of_failures_ends_the_run():
    budget = FailureBudget(2)
    budget.spend(RequestFailed("one"))
    budget.spend(RequestFailed("two"))
    with pytest.raises(InputError, match="3 requests failed, 2 are allowed; the last: three"):
        budget.spend(RequestFailed("three"))


def test_calls_keep_their_order():
    assert list(concurrently(lambda x: time.sleep(0.01 * (3 - x)) or x, range(4), 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://x", "http://", ""])
def test_a_url_must_be_one(url):
    with pytest.raises(InputError, match="must be like http://host:port"):
        Endpoint(url)
