"""Shared fixtures: the pool of ranks, tiny models, chat data. Heavy imports wait for the first use."""

from __future__ import annotations

import os
import signal
from collections import Counter

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as shells start background jobs; tests send it to processes
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.harness.interpreter import (  # noqa: F401  # pytest finds hooks by their names
    pytest_pyfunc_call,
    pytest_runtest_logreport,
    pytest_sessionfinish,
)


@pytest.hookimpl(trylast=True)  # of the tests that are left
def pytest_collection_modifyitems(items):
    """Put files of few tests first: the longest tests are there, and no process begins one when the others are done."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (tests[item.path], item.path))


@pytest.fixture(autouse=True)
def _no_warnings_yet():
    """A warning is printed once in a process; each test sees it, whichever ran before."""
    from megatron_align import errors

    errors._warned.clear()


@pytest.fixture(scope="session")
def pool():
    from tests.harness.pool import Pool

    pool = Pool()
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """``tiny_models(variant)`` -> HF folder, made once."""
    from tests.harness.tiny import make_model

    made = {}

    def get(variant="qwen2_tied"):
        if variant not in made:
            made[variant] = make_model(tmp_path_factory.mktemp("models") / variant, variant)
        return made[variant]

    return get


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory):
    from tests.harness.tiny import write_chat

    return write_chat(tmp_path_factory.mktemp("chat") / "chat.jsonl")
