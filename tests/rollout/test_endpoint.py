"""A request survives a slow, busy or broken endpoint within its tries; what fails for ever is one line and counted."""

import time

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
