"""Run tests marked ``triton`` on the GPU if there is one, otherwise in Triton's interpreter.

Triton reads ``TRITON_INTERPRET`` when kernels are imported, so the interpreter needs a separate process. A child pytest
runs all marked tests of a file; each test here then reports the outcome of its twin there.
``TRITON_INTERPRET=1 pytest FILE`` runs them in the process itself, which suits a debugger.

Use: ``pytestmark = pytest.mark.triton`` and tensors on ``DEVICE``, of the dtypes ``DTYPES``. Fixtures of a marked
test are set up in both processes.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Triton 3.6's interpreter multiplies the bit patterns of bf16: bf16 is tested on a GPU only.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if GPU else [])]

_REPORTS = "MEGATRON_ALIGN_TEST_REPORTS"  # in the child: the file descriptor its reports go to
_PATIENCE = 300.0  # seconds without a report


def interpreted() -> bool:
    """Whether this process runs kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class _Child:
    """The child pytest; it reports outcomes in the order of the tests."""

    def __init__(self, file: Path, items: list[pytest.Item]):
        self.file = file
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open until stop()
        reports, writer = os.pipe()
        tests = [item.nodeid for item in items if item.path == file and item.get_closest_marker("triton")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests],
            env={**os.environ, "TRITON_INTERPRET": "1", _REPORTS: str(writer)},
            cwd=items[0].config.rootpath,
            pass_fds=[writer],
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )
        os.close(writer)
        self._pipe = os.fdopen(reports)
        self._seen: dict[str, tuple[str, str]] = {}

    def outcome(self, test: str) -> tuple[str, str]:
        """Return ``(passed | failed | skipped, text)`` once the child has run the test."""
        while test not in self._seen:
            # The child writes complete lines, so a readable pipe holds at least one, or is at its end.
            ready, _, _ = select.select([self._pipe], [], [], _PATIENCE)
            line = self._pipe.readline() if ready else ""
            if not line:
                why = "ended" if ready else f"was silent for {_PATIENCE:.0f} s"
                return "failed", f"the interpreter's process {why} before this test\n{self._tail()}"
            name, outcome, text = json.loads(line)
            self._seen[name] = (outcome, text)
        return self._seen[test]

    def _tail(self) -> str:
        self._log.seek(0)
        return self._log.read()[-4000:]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._log.close()


_CHILD = pytest.StashKey[_Child]()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Take the outcome of a marked test from the child; run all others as usual."""
    if GPU or interpreted() or not pyfuncitem.get_closest_marker("triton"):
        return None
    session = pyfuncitem.session
    child = session.stash.get(_CHILD, None)
    if child is None or child.file != pyfuncitem.path:
        if child is not None:
            child.stop()
        session.stash[_CHILD] = _Child(pyfuncitem.path, session.items)
    outcome, text = session.stash[_CHILD].outcome(pyfuncitem.nodeid)
    if outcome == "failed":
        pytest.fail(f"in Triton's interpreter:\n{text}", pytrace=False)
    if outcome == "skipped":
        pytest.skip(text)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """In the child: send a test's outcome to the parent; a fixture's failure counts as the test's."""
    if _REPORTS not in os.environ or (report.when != "call" and report.passed):
        return
    line = json.dumps([report.nodeid, report.outcome, report.longreprtext])
    os.write(int(os.environ[_REPORTS]), line.encode() + b"\n")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the child, even if this session ended early."""
    if _CHILD in session.stash:
        session.stash[_CHILD].stop()
