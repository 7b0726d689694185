"""A program passes if it runs to its end; whatever else it does is stopped and leaves nothing outside its folder."""

import os
import platform
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_align.rollout.prompts import PromptRecord
from megatron_align.rollout.verifiers import confined
from megatron_align.rollout.verifiers.checks import CHECKS
from megatron_align.rollout.verifiers.sandbox import passes

FAST = {"seconds": 20.0}


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 2",
        "print('x' * 1000000)",
        "open('here', 'w').write('x'); assert open('here').read() == 'x'",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import sys\nsys.stderr.write('é' * 100000)",
        "assert 'CapPrm:\\t0000000000000000' in open('/proc/self/status').read()",
        "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))",
        "import os, fcntl\nfcntl.fcntl(os.open('.', os.O_RDONLY), fcntl.F_SETFD, 1)",
        "import os\nos.set_blocking(0, True); os.set_inheritable(0, True); os.set_inheritable(0, False); os.isatty(0)",
        "import array, fcntl, os, termios\nr, w = os.pipe(); os.write(w, b'xy'); n = array.array('i', [0])\n"
        "fcntl.ioctl(r, termios.FIONREAD, n); assert n[0] == 2",
        "import asyncio\nasyncio.run(asyncio.sleep(0))",
        "import os\nos.makedirs('a/b'); os.rename('a/b', 'c'); open('/dev/null', 'w').write('x')",
    ],
)
def test_harmless_programs_pass(program):
    assert passes(program, **FAST)


# Raw calls, which are refused before their arguments are read: without the filter their error is another one.
REFUSED = """import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number):
    return ctypes.get_errno() if libc.syscall(number, -1, -1, -1, -1, -1, -1) == -1 else 0
"""
# By name in the kernel's tables; the two architectures lack some of the other's.
_COMMON = {
    "pidfd_send_signal": 424,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "pidfd_open": 434,
    "pidfd_getfd": 438,
    "process_madvise": 440,
    "process_mrelease": 448,
    "fchmodat2": 452,
    "setxattrat": 463,
    "removexattrat": 466,
    "file_setattr": 469,
    "x32 read": 0x40000000,
}
_X86_64 = {
    "chmod": 90,
    "fchmod": 91,
    "fchmodat": 268,
    "chown": 92,
    "fchown": 93,
    "lchown": 94,
    "fchownat": 260,
    "utime": 132,
    "utimes": 235,
    "futimesat": 261,
    "utimensat": 280,
    "setxattr": 188,
    "lsetxattr": 189,
    "fsetxattr": 190,
    "removexattr": 197,
    "lremovexattr": 198,
    "fremovexattr": 199,
    "setpriority": 141,
    "sched_setparam": 142,
    "sched_setscheduler": 144,
    "sched_setaffinity": 203,
    "sched_setattr": 314,
    "ioprio_set": 251,
    "process_vm_writev": 311,
    "prlimit64": 302,
    "shmget": 29,
    "semget": 64,
    "msgget": 68,
    "mq_open": 240,
    "connect": 42,
    "ioctl": 16,
    "socketpair": 53,
    "process_vm_readv": 310,
    "kcmp": 312,
    "unshare": 272,
    "setns": 308,
    "bpf": 321,
    "perf_event_open": 298,
    "userfaultfd": 323,
    "shmat": 30,
    "shmctl": 31,
    "semop": 65,
    "semctl": 66,
    "semtimedop": 220,
    "msgsnd": 69,
    "msgrcv": 70,
    "msgctl": 71,
    "mq_unlink": 241,
    "add_key": 248,
    "request_key": 249,
    "keyctl": 250,
}
_AARCH64 = {
    "fchmod": 52,
    "fchmodat": 53,
    "fchownat": 54,
    "fchown": 55,
    "utimensat": 88,
    "setxattr": 5,
    "lsetxattr": 6,
    "fsetxattr": 7,
    "removexattr": 14,
    "lremovexattr": 15,
    "fremovexattr": 16,
    "setpriority": 140,
    "sched_setparam": 118,
    "sched_setscheduler": 119,
    "sched_setaffinity": 122,
    "sched_setattr": 274,
    "ioprio_set": 30,
    "process_vm_writev": 271,
    "prlimit64": 261,
    "shmget": 194,
    "semget": 190,
    "msgget": 186,
    "mq_open": 180,
    "connect": 203,
    "ioctl": 29,
    "socketpair": 199,
    "process_vm_readv": 270,
    "kcmp": 272,
    "unshare": 97,
    "setns": 268,
    "bpf": 280,
    "perf_event_open": 241,
    "userfaultfd": 282,
    "shmat": 196,
    "shmctl": 195,
    "semop": 193,
    "semctl": 191,
    "semtimedop": 192,
    "msgsnd": 189,
    "msgrcv": 188,
    "msgctl": 187,
    "mq_unlink": 181,
    "add_key": 217,
    "request_key": 218,
    "keyctl": 219,
}
CALLS = {
    machine: tuple((_COMMON | own).values()) for machine, own in (("x86_64", _X86_64), ("aarch64", _AARCH64))
}
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
        "import os\nos._exit(97)",
        "import os\nos.truncate('/tmp/OUTSIDE', 0)",
        "import os\nos.chmod('.', 0o700)",
        "import os\nos.chown('.', -1, -1)",
        "import os\nos.utime('.')",
        "import os\nos.setpriority(os.PRIO_PROCESS, 0, 10)",
        "import os\nos.sched_setaffinity(0, os.sched_getaffinity(0))",
        "import resource\nresource.prlimit(PARENT, resource.RLIMIT_CORE)",
        "import os, fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETOWN, os.getpid())",
        "import os, fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, fcntl.F_SETSIG, 10)",
        "import os, fcntl\nr, w = os.pipe()\nfcntl.fcntl(r, 15, __import__('struct').pack('ii', 1, os.getpid()))",
        "import sys\nsys.stderr.write('x' * (17 << 20))",
        "import os, fcntl\nf = os.open('.', os.O_RDONLY)\n"  # FS_IOC_GETFLAGS, FS_IOC_SETFLAGS
        "fcntl.ioctl(f, 0x40086602, fcntl.ioctl(f, 0x80086601, bytes(8)))",
        "import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)",
    ],
)
def test_what_a_program_must_not_do_fails(program):
    program = program.replace("OUTSIDE", OUTSIDE.name).replace("PARENT", str(os.getpid()))
    assert not passes(program, **FAST)
    assert not OUTSIDE.exists()


def test_calls_that_reach_beyond_the_program_are_refused():
    calls = CALLS.get(platform.machine(), ())
    assert passes(f"{REFUSED}assert not [number for number in {calls} if call(number) != 1]", **FAST)


def test_a_program_without_end_is_stopped():
    began = time.monotonic()
    assert not passes("while True: pass", seconds=1.0)
    assert not passes("import time\ntime.sleep(60)", seconds=1.0)
    assert time.monotonic() - began < 50  # of a minute that the second would take


@pytest.mark.parametrize(
    "program",
    [
        "import os\nfor _ in range(3000):\n  os.mkdir('d')\n  os.chdir('d')\nopen('a', 'w')",
        "import os\nos.mkdir('a', 0)\nos.symlink('/', 'b')\nos.symlink('a', 'c')",
    ],
    ids=["deeper_than_paths", "unreadable"],
)
def test_nothing_that_a_program_leaves_is_kept(program, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert passes(program, seconds=10)
    assert not list(tmp_path.iterdir())


def test_a_program_that_fills_the_disk_is_stopped():
    write = "text = 'x' * (8 << 20)\nfor i in range(40):\n  open(f'd{i % 2}/{i}', 'w').write(text)\n"
    program = f"import os, time\nos.mkdir('d0'); os.mkdir('d1')\n{write}time.sleep(2)"
    assert not passes(program, **FAST)
    assert passes(program.replace("range(40)", "range(20)"), **FAST)


def test_the_token_is_not_on_the_command_line():
    program = (
        "arguments = open('/proc/self/cmdline').read().split(chr(0))\nassert len(arguments) == 8, arguments"
    )
    assert passes(program, **FAST)  # python -I confined.py FOLDER SECONDS BYTES FD, and the end


def test_an_old_landlock_confines_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(confined, "_LIBC", SimpleNamespace(syscall=lambda *_: 2))
    with pytest.raises(OSError, match="version 3 .*got 2"):
        confined.confine_files(str(tmp_path))


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
