"""Training never depends on a tracker: it fails at any call, with any error, or hangs; rows arrive later, in order, and
one warning says so.
"""

import errno
import json
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from megatron_align.config import LoggingConfig
from megatron_align.monitoring import tracker_thread
from megatron_align.monitoring.logger import RunLog
from megatron_align.monitoring.tracker_thread import TrackerThread
from megatron_align.monitoring.trackers import TensorBoard
from tests.harness import refusals

QUIET = LoggingConfig(tensorboard=False)


class CommError(Exception):
    """An error of a foreign package."""


class Tracker:
    """Raises while ``fault`` is set; notes what arrives."""

    def __init__(self, fault=None):
        self.fault, self.calls = fault, []

    def log(self, numbers, step):
        if self.fault:
            raise self.fault
        self.calls.append(step)

    def close(self, failed):
        if self.fault:
            raise self.fault
        self.calls.append("failed" if failed else "closed")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(tracker_thread, "RETRY_SECONDS", 0.05)


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


FAULTS = [
    CommError("network down\nno route"),
    OSError(errno.ENOSPC, "No space left"),
    SystemExit(1),
    KeyError("x"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_rows_of_an_outage_arrive_in_order_when_it_ends(fault):
    tracker, lines = Tracker(), []
    thread = TrackerThread("Tracker", lambda: tracker, lines.append)
    thread.log({}, 1)
    wait_until(lambda: tracker.calls == [1])
    tracker.fault = fault
    for step in (2, 3):
        thread.log({}, step)
    wait_until(lambda: lines)
    time.sleep(0.2)  # several retries
    tracker.fault = None
    wait_until(lambda: tracker.calls == [1, 2, 3])
    thread.log({}, 4)
    thread.close(failed=False)
    assert tracker.calls == [1, 2, 3, 4, "closed"]
    assert lines[0].startswith(f"warning: Tracker failed ({type(fault).__name__}: ")
    assert "\n" not in lines[0]
    assert lines[1:] == ["Tracker works again"]


def test_a_tracker_that_cannot_be_opened_is_opened_later():
    tracker, lines, attempts = Tracker(), [], []

    def open_tracker():
        attempts.append(1)
        if len(attempts) < 3:
            raise CommError("no key")
        return tracker

    thread = TrackerThread("Tracker", open_tracker, lines.append)
    thread.log({}, 1)
    wait_until(lambda: tracker.calls == [1])
    thread.close(failed=True)
    assert tracker.calls == [1, "failed"]
    assert [line.partition(" (")[0] for line in lines] == ["warning: Tracker failed", "Tracker works again"]


def test_what_never_arrives_is_counted_at_the_end():
    tracker, lines = Tracker(CommError("down")), []
    thread = TrackerThread("Tracker", lambda: tracker, lines.append)
    for step in range(3):
        thread.log({}, step)
    thread.close(failed=False)
    assert lines[-1] == "warning: Tracker lacks 3 rows; metrics.jsonl has them"
    assert len(lines) == 2


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(tracker_thread, "MAX_ROWS", 2)
    tracker, lines = Tracker(CommError("down")), []
    thread = TrackerThread("Tracker", lambda: tracker, lines.append)
    wait_until(lambda: thread._opened.is_set())
    for step in range(5):
        thread.log({}, step)
    tracker.fault = None
    thread.close(failed=False)
    assert tracker.calls == [3, 4, "closed"]
    assert lines[-1] == "warning: Tracker lacks 3 rows; metrics.jsonl has them"


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_hangs_costs_a_limited_wait(monkeypatch, where):
    monkeypatch.setattr(tracker_thread, "OPEN_SECONDS", 0.2)
    monkeypatch.setattr(tracker_thread, "CLOSE_SECONDS", 0.2)
    released, lines = threading.Event(), []

    def hang(*arguments, **options):
        released.wait(60)
        return Tracker()

    tracker = Tracker()
    if where != "open":
        setattr(tracker, where, hang)
    started = time.monotonic()
    thread = TrackerThread("Tracker", hang if where == "open" else lambda: tracker, lines.append)
    thread.log({}, 1)
    thread.close(failed=False)
    assert time.monotonic() - started < 10
    assert lines[-1] == "warning: Tracker has not finished in 0.2 s; the run ends without it"
    assert ("has not answered in 0.2 s" in lines[0]) == (where == "open")
    released.set()


@pytest.mark.parametrize("where", ["init", "log", "finish"])
def test_wandb_may_fail_at_any_call(tmp_path, monkeypatch, capsys, where):
    def call(name):
        def fail(*arguments, **options):
            if name == where:
                raise CommError("network down")
            return SimpleNamespace(log=call("log"), finish=call("finish"))

        return fail

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=call("init")))
    config = LoggingConfig(tensorboard=False, wandb="p")
    with RunLog.open(tmp_path, config, {}, done=0, steps=2) as log:
        for step in (1, 2):
            log.write({"step": step, "loss": 1.0})
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    warning = "warning: Weights & Biases failed (CommError: network down)"
    assert capsys.readouterr().out.count(warning) == 1


def test_true_names_the_project_like_the_run(tmp_path, monkeypatch):
    calls = []

    def init(**options):
        calls.append(options)
        return SimpleNamespace(log=lambda *a, **o: None, finish=lambda **o: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folder = tmp_path / "sft_7b"
    folder.mkdir()
    for option in (True, "team", False, None):
        config = LoggingConfig(tensorboard=False, wandb=option)
        with RunLog.open(folder, config, {}, done=0, steps=2):
            pass
    assert [(call["project"], call["name"]) for call in calls] == [("sft_7b", "sft_7b"), ("team", "sft_7b")]


class SmallDisk:
    """A disk that another program fills, and frees again."""

    def __init__(self, folder):
        self.folder = folder

    def fill(self):
        with (self.folder / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(b"x" * 1000):
                    pass
            except OSError:
                pass

    def free(self):
        (self.folder / "filler").unlink()


class SimulatedDisk:
    """The same for TensorBoard's file alone: it is full in the middle of a row."""

    def __init__(self, folder, monkeypatch):
        self.folder, self._size, init = folder, 1 << 30, TensorBoard.__init__

        def on_this_disk(tracker, *arguments):
            init(tracker, *arguments)
            tracker._file = refusals.FullFile(tracker._file, lambda: self._size)

        monkeypatch.setattr(TensorBoard, "__init__", on_this_disk)

    def fill(self):
        self._size = 1000

    def free(self):
        self._size = 1 << 30


@pytest.fixture(params=["mounted", "simulated"])
def small_disk(request, tmp_path, monkeypatch):
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "simulated":
        yield SimulatedDisk(folder, monkeypatch)
        return
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield SmallDisk(folder)
    subprocess.run(["umount", folder], check=True)


def test_tensorboard_survives_a_full_disk(small_disk):
    """Each row is complete or absent, and those of the time when the disk was full come after it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = []
    thread = TrackerThread("TensorBoard", lambda: TensorBoard(small_disk.folder, 0), lines.append)
    small_disk.fill()
    steps = range(1, 201)
    for step in steps:
        thread.log({"train/loss": float(step), "train/lr": 1e-5}, step)
    wait_until(lambda: lines)
    small_disk.free()
    wait_until(lambda: len(lines) == 2)
    thread.close(failed=False)
    assert lines[0].startswith("warning: TensorBoard failed (OSError: [Errno 28] No space left on device)")
    assert lines[1] == "TensorBoard works again"
    events = EventAccumulator(str(small_disk.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(steps)


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        tracker = TensorBoard(tmp_path, done)
        for step in steps:
            tracker.log({"loss": 10.0 * done + step}, step)
        tracker.close(failed=False)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        (4, 24.0),
    ]


def test_the_progress_line_has_accuracy_and_margin(tmp_path, capsys):
    with RunLog.open(tmp_path, QUIET, {}, done=0, steps=1) as log:
        row = {"step": 1, "loss": 0.5, "accuracy": 0.875, "reward_margin": 1.25, "grad_norm": 0.5}
        log.write(row)
        log.write({**row, "split": "validation"})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 1/1  loss 0.5000  accuracy 87.5%  margin 1.250  grad_norm 0.500  ETA 0:00:00",
        "step 1/1  validation  loss 0.5000  accuracy 87.5%  margin 1.250  grad_norm 0.500",
    ]
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["accuracy"] == 0.875
