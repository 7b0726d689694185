"""A program passes if it runs to its end; whatever else it does is stopped and leaves nothing outside its folder."""

import os
import time
from pathlib import Path

import pytest

from megatron_align.evaluation.checks import CHECKS
from megatron_align.evaluation.sandbox import passes
from megatron_align.rollout.prompts import PromptRecord

FAST = {"seconds": 20.0}


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "print('x' * 1000000)",
        "open('here', 'w').write('x'); assert open('here').read() == 'x'",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import sys\nsys.stderr.write('é' * 100000)",
        "import os\nos.makedirs('a/b'); os.rename('a/b', 'c'); open('/dev/null', 'w').write('x')",
    ],
)
def test_harmless_programs_pass(program):
    assert passes(program, **FAST)


OUTSIDE = Path("/tmp") / f"megatron_align_outside_{os.getpid()}"


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def f(:",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "open('/tmp/OUTSIDE', 'w')",
        "import os\nos.symlink('/tmp', 'out')\nopen('out/OUTSIDE', 'w')",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'], check=True)",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import socket\nsocket.socket()",
        "import os\nos.kill(PARENT, 0)",
        "x = bytearray(4 << 30)",
        "open('big', 'wb').write(bytes(64 << 20))",
        "open('/proc/self/oom_score_adj', 'w').write('0')",
    ],
)
def test_what_a_program_must_not_do_fails(program):
    program = program.replace("OUTSIDE", OUTSIDE.name).replace("PARENT", str(os.getpid()))
    assert not passes(program, **FAST)
    assert not OUTSIDE.exists()


def test_a_program_without_end_is_stopped():
    began = time.monotonic()
    assert not passes("while True: pass", seconds=1.0)
    assert not passes("import time\ntime.sleep(60)", seconds=1.0)
    assert time.monotonic() - began < 20


def record(**raw):
    return PromptRecord(raw=raw, where="x.jsonl:1", prompt=raw["prompt"])


def test_answers_are_run_with_their_tests():
    check = CHECKS["code"]
    humaneval = record(
        prompt="def add(a, b):\n", test="def check(f):\n    assert f(2, 3) == 5\n", entry_point="add"
    )
    expected = check.expected(humaneval)
    assert check.judge("    return a + b\n", expected) == {"pass_rate": 1.0}
    assert check.judge("    return a - b\n", expected) == {"pass_rate": 0.0}
    mbpp = record(
        prompt=(), test_list=["assert add(2, 3) == 5", "assert add(0, 0) == 0"], test_setup_code="x = 1"
    )
    answer = "Sure:\n```python\ndef add(a, b):\n    return a + b\n```\nThis adds."
    assert check.judge(answer, check.expected(mbpp)) == {"pass_rate": 1.0}
