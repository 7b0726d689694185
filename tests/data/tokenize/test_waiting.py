"""Local ranks wait for the store that local rank 0 prepares: as long as it is alive, and no longer."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import pytest

from megatron_align.data.tokenize import heartbeat as heartbeat_module
from megatron_align.data.tokenize import prepare as prepare_module
from megatron_align.data.tokenize.local_ranks import prepare_or_wait
from megatron_align.errors import InputError
from tests.harness.processes import run_code

RECORDS = [{"prompt": f"hello {i} " * (1 + i % 7), "completion": "world"} for i in range(40)]


def test_other_ranks_wait_for_local_rank_0(make):
    spec, found = make(RECORDS), []
    waiting = threading.Thread(target=lambda: found.append(prepare_or_wait(spec, 1)), daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert not found
    path = prepare_or_wait(spec, 0)
    waiting.join(timeout=30)
    assert found == [path]


@pytest.fixture
def quick(monkeypatch):
    """Take a process for dead soon, but not so soon that a busy machine looks dead."""
    monkeypatch.setattr(heartbeat_module, "TIMEOUT_SECONDS", 3.0)
    monkeypatch.setattr(heartbeat_module, "BEAT_SECONDS", 0.1)


def test_waiting_is_not_ended_by_time_alone(make, quick, monkeypatch):
    spec, found, publish = make(RECORDS), [], prepare_module._publish

    def late(*paths):
        time.sleep(4)
        publish(*paths)

    monkeypatch.setattr(prepare_module, "_publish", late)
    waiting = threading.Thread(target=lambda: found.append(prepare_or_wait(spec, 1)), daemon=True)
    waiting.start()
    path = prepare_or_wait(spec, 0)
    waiting.join(timeout=30)
    assert found == [path]
    assert list(Path(spec.cache).glob("*.alive*")) == list(Path(spec.cache).glob(".*.alive*")) == []


def test_waiting_ends_when_local_rank_0_is_killed(make, quick):
    spec = make(RECORDS)
    code = (
        "import time; from megatron_align.data.tokenize import cache_key, heartbeat, local_ranks, prepare\n"
        "heartbeat.BEAT_SECONDS = 0.1\n"
        "prepare._publish = lambda *_: time.sleep(60)\n"
        f"local_ranks.prepare_or_wait(cache_key.StoreSpec(**{dataclasses.asdict(spec)!r}), 0)\n"
    )
    leader = run_code(code)
    try:
        deadline = time.monotonic() + 60
        while not list(Path(spec.cache).glob(".*.alive")) and time.monotonic() < deadline:
            time.sleep(0.05)
        threading.Timer(4, leader.kill).start()
        started = time.monotonic()
        with pytest.raises(InputError, match="local rank 1 needs .*; it has sent no heartbeat for 3 seconds"):
            prepare_or_wait(spec, 1)
        assert time.monotonic() - started > 4  # it lived for longer than it may be silent
    finally:
        leader.kill()
        leader.join()


def test_waiting_ends_with_the_reason_of_local_rank_0(make, quick, monkeypatch):
    spec = make([*map(json.dumps, RECORDS), "{"])
    told = []

    def wait_for_it():
        with pytest.raises(InputError) as error:
            prepare_or_wait(spec, 1)
        told.append(str(error.value))

    with pytest.raises(InputError):  # a note of an earlier run, which says nothing of this one
        prepare_or_wait(spec, 0)
    waiting = threading.Thread(target=wait_for_it)
    waiting.start()
    time.sleep(0.5)
    assert not told
    with pytest.raises(InputError, match="data.jsonl:41: "):
        prepare_or_wait(spec, 0)
    waiting.join(timeout=30)
    assert "it failed: " in told[0]
    assert "data.jsonl:41: must be a line of JSON" in told[0]
    assert "\n" not in told[0]
