"""A rank that is killed or stopped ends the launched run in time: one line says which and where; no process stays.

The slow tests go through torchrun, as users launch it. Only processes of a test's own launch are signalled.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_align.model.parallel import RankInfo
from megatron_align.monitoring import flight_recorder
from tests.harness import crash
from tests.harness.pool import free_port
from tests.harness.tiny import metrics_of, run_arguments

ROOT = Path(__file__).parents[2]
TIMEOUT = 20  # seconds without progress; a loaded machine takes some for its imports


def workers_of(launcher: int) -> dict[int, int]:
    """Return ``{rank: process id}`` of a launcher's children."""
    found = {}
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in map(int, children):
        facts = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        ranks = [fact.removeprefix("RANK=") for fact in facts if fact.startswith("RANK=")]
        if ranks:
            found[int(ranks[0])] = child
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def launched(tiny_models, chat_file, tmp_path):
    """Return a run under torchrun that is past its second step, and its ranks' process ids."""
    options = {"train__steps": 100000, "parallel__pipeline": 2, "parallel__timeout_seconds": TIMEOUT}
    arguments = run_arguments(tiny_models(), chat_file, tmp_path / "run", **options)
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", str(free_port()), "-m", "megatron_align.train", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    workers = {}
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 2):
            assert launcher.poll() is None, launcher.stderr.read()
            assert time.monotonic() < deadline, "the run did not start in time"
            time.sleep(0.2)
        workers = workers_of(launcher.pid)
        assert sorted(workers) == [0, 1]
        yield launcher, workers
    finally:
        for process in workers.values():
            if alive(process):
                os.kill(process, signal.SIGKILL)
        launcher.kill()
        launcher.wait()


def end_of(launched, seconds):
    """Return what the run said, once it has ended; no process of it may stay."""
    launcher, workers = launched
    _, said = launcher.communicate(timeout=seconds)
    assert launcher.returncode != 0
    assert not [process for process in workers.values() if alive(process)]
    return said, [line for line in said.splitlines() if line.startswith("error:")]


def test_a_killed_rank(tiny_models, chat_file, tmp_path):
    """No launcher ends rank 0 here: it must notice by itself."""
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"train__steps": 100000, "parallel__pipeline": 2, "parallel__timeout_seconds": TIMEOUT}
    ranks = crash.start(2, run_arguments(tiny_models(), chat_file, run, **options), log)
    crash.wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics_of(run)) >= 2, ranks)
    ranks[1].kill()
    ranks[0].join(TIMEOUT + 60)
    ranks[0].kill()
    assert ranks[0].exitcode not in (0, -signal.SIGKILL)
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error:")]
    assert "another rank died while rank 0 was in 'step " in line


@pytest.mark.slow
def test_a_killed_rank_under_torchrun(launched):
    os.kill(launched[1][1], signal.SIGKILL)
    said, errors = end_of(launched, TIMEOUT + 60)
    # The launcher may end rank 0 before it has noticed; either way the launcher names the rank.
    assert len(errors) <= 1
    assert all("another rank died while rank 0 was in 'step " in line for line in errors)
    assert "rank      : 1" in said
    assert "Signal 9 (SIGKILL)" in said


@pytest.mark.slow
def test_a_stopped_rank(launched):
    """torchrun gives a stopped process 30 s to end before it kills it."""
    os.kill(launched[1][1], signal.SIGSTOP)
    _, errors = end_of(launched, 3 * TIMEOUT + 60)
    [line] = errors
    assert f"no progress for {TIMEOUT} s: rank 1 does not answer (stopped, killed, " in line
    assert "last in 'step " in line
    assert "while others wait in 'step " in line
    assert "pipeline stage 0" in line or "sums over ranks" in line or "update" in line


def test_the_flight_recorder_is_told_where_to_write(tmp_path, monkeypatch):
    for name in (*flight_recorder.SIZE, *flight_recorder.FILE, flight_recorder.ON_TIMEOUT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "7")
    flight_recorder.enable(tmp_path)
    assert os.environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "7"  # the user's own
    assert os.environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == str(tmp_path / "flight_recorder" / "rank_")
    monkeypatch.setattr(
        flight_recorder.torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"trace", raising=False
    )
    flight_recorder.dump(tmp_path, RankInfo(3, 3, 4))
    assert (tmp_path / "flight_recorder" / "rank_3").read_bytes() == b"trace"
