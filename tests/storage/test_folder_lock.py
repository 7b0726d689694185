"""One process holds a folder, on one node or many, with or without flock; a dead one's lock is taken over by one other.

Another node is a lock file of another machine, which this process changes or leaves: only its content is looked at.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest

from megatron_align.errors import InputError
from megatron_align.storage import folder_lock, lock_holder
from megatron_align.storage.folder_lock import FolderLock
from megatron_align.storage.lock_holder import Holder

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, names in (
        (folder_lock, ("BEAT_SECONDS", "STALE_SECONDS")),
        (lock_holder, ("STALE_SECONDS",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 0.1 if name == "BEAT_SECONDS" else 1.0)
    monkeypatch.setattr(folder_lock, "_POLL_SECONDS", 0.02)


def lock_of(path, group=""):
    return FolderLock(path, "the folder is in use", "stop it", group)


def holder_in(path):
    return Holder.from_text(path.read_text())


def elsewhere(path, **fields):
    """Write the lock of a process on another machine; return its holder."""
    holder = replace(Holder.this_process(path, ""), host="node7", machine="another boot", pid=1, **fields)
    path.write_text(holder.to_text())
    return holder


def announce_stop(lock):
    lock.mark_stopping()
    deadline = time.monotonic() + 20
    while not holder_in(lock.path).stopping:
        assert time.monotonic() < deadline


def hold(path, ready):
    lock = lock_of(path)
    lock.acquire()
    ready.set()
    time.sleep(60)


@pytest.fixture
def other_process(tmp_path):
    """A process of this machine that holds ``tmp_path/lock``."""
    ready = FORK.Event()
    process = FORK.Process(target=hold, args=(tmp_path / "lock", ready), daemon=True)
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_second_one_is_refused_in_one_line_and_changes_nothing(tmp_path, other_process):
    path = tmp_path / "lock"
    with pytest.raises(InputError) as refused:
        lock_of(path).acquire()
    assert f"the folder is in use: process {other_process.pid} on " in str(refused.value)
    assert str(path) in str(refused.value)
    assert "stop it" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert os.listdir(tmp_path) == ["lock"]
    assert holder_in(path).pid == other_process.pid


def test_a_stopped_process_still_holds_its_lock(tmp_path, other_process):
    os.kill(other_process.pid, signal.SIGSTOP)
    time.sleep(1.5)  # longer than STALE_SECONDS: on one machine the process table counts, not the heartbeat
    with pytest.raises(InputError, match="in use"):
        lock_of(tmp_path / "lock").acquire()


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_loses_its_lock_at_once(tmp_path, other_process, reaped):
    """Not reaped: a zombie still has a process number."""
    os.kill(other_process.pid, signal.SIGKILL)
    if reaped:
        other_process.join()
    else:
        os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)
    with mock.patch.object(lock_holder, "STALE_SECONDS", 1e9), lock_of(tmp_path / "lock") as lock:
        lock.acquire()
        assert holder_in(tmp_path / "lock").pid == os.getpid()
    assert os.listdir(tmp_path) == []


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    path = tmp_path / "lock"
    path.write_text(replace(Holder.this_process(path, ""), process_start="12345").to_text())
    with mock.patch.object(lock_holder, "STALE_SECONDS", 1e9), lock_of(path) as lock:
        lock.acquire()


def test_a_heartbeat_from_another_machine_refuses(tmp_path):
    path, ended = tmp_path / "lock", threading.Event()
    holder = elsewhere(path)

    def beat():
        for number in range(1000):
            path.write_text(replace(holder, beat=number).to_text())
            if ended.wait(0.05):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="process 1 on node7"):
            lock_of(path).acquire()
    finally:
        ended.set()
        thread.join()
    assert holder_in(path).token == holder.token


def test_without_a_heartbeat_another_machines_lock_is_taken_over_later(tmp_path, capsys):
    path = tmp_path / "lock"
    elsewhere(path)
    started = time.monotonic()
    with mock.patch.object(lock_holder, "_SILENT_SECONDS", 0.2), lock_of(path) as lock:
        lock.acquire()
        assert time.monotonic() - started >= 1.0
    assert "waiting: no heartbeat of process 1 on node7" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', "\x00\xff"])
def test_a_lock_file_without_content_counts_after_a_while(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with lock_of(tmp_path / "lock") as lock:
        lock.acquire()
        assert holder_in(tmp_path / "lock").pid == os.getpid()


def test_a_holder_that_is_stopping_is_waited_for(tmp_path, capsys):
    """Slurm requeues a job while the old one still saves."""
    path = tmp_path / "lock"
    old, new = lock_of(path), lock_of(path)
    old.acquire()
    announce_stop(old)
    timer = threading.Timer(0.5, old.release)
    timer.start()
    started = time.monotonic()
    new.acquire()
    assert time.monotonic() - started >= 0.4
    new.release()
    assert capsys.readouterr().err.count("which is saving before it stops") == 1


def test_a_holder_that_never_stops_is_not_waited_for_forever(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_lock, "STOP_SECONDS", 0.3)
    with lock_of(tmp_path / "lock") as old:
        old.acquire()
        announce_stop(old)
        with pytest.raises(InputError, match="in use"):
            lock_of(tmp_path / "lock").acquire()


def take(path, start, answers):
    start.wait()
    lock = lock_of(path)
    try:
        lock.acquire()
    except InputError:
        answers.put("refused")
        return
    answers.put("taken")
    time.sleep(3)


@pytest.mark.parametrize("dead", [True, False])
def test_of_many_that_start_together_one_gets_it(tmp_path, dead):
    path = tmp_path / "lock"
    if dead:
        path.write_text(replace(Holder.this_process(path, ""), process_start="12345").to_text())
    start, answers = FORK.Event(), FORK.Queue()
    processes = [FORK.Process(target=take, args=(path, start, answers), daemon=True) for _ in range(8)]
    for process in processes:
        process.start()
    start.set()
    got = sorted(answers.get(timeout=30) for _ in processes)
    for process in processes:
        process.kill()
        process.join()
    assert got == ["refused"] * 7 + ["taken"]
    assert os.listdir(tmp_path) == ["lock"]


def test_a_takeover_that_was_killed_does_not_block_the_next(tmp_path):
    path = tmp_path / "lock"
    path.write_text(replace(Holder.this_process(path, ""), process_start="12345").to_text())
    (tmp_path / "lock.takeover").touch()
    with lock_of(path) as lock:
        lock.acquire()
    assert os.listdir(tmp_path) == []


def test_a_paused_holder_sees_that_it_lost_its_lock_and_leaves_the_new_one(tmp_path):
    path = tmp_path / "lock"
    lock = lock_of(path)
    lock.acquire()
    lock.require_held()
    new = elsewhere(path)
    with pytest.raises(InputError, match="process 1 on node7.* took the lock"):
        lock.require_held()
    assert lock.lost
    lock.release()
    assert holder_in(path).token == new.token


def test_a_deleted_lock_file_comes_back(tmp_path):
    path = tmp_path / "lock"
    with lock_of(path) as lock:
        lock.acquire()
        path.unlink()
        lock.require_held()
        assert holder_in(path).pid == os.getpid()


def test_a_lock_file_that_is_gone_after_a_long_pause_is_lost(tmp_path):
    """Another process may have taken the lock, done its work and released it: nothing is left to see."""
    path = tmp_path / "lock"
    with lock_of(path) as lock:
        with mock.patch.object(folder_lock, "BEAT_SECONDS", 1e9):  # paused
            lock.acquire()
            time.sleep(0.1)  # its thread waits by now
        path.unlink()
        time.sleep(1.2)
        with pytest.raises(InputError, match="another process took the lock .* while this one was paused"):
            lock.require_held()
        assert not path.exists()
        lock_of(path).acquire()


def test_heartbeats_keep_the_files_length(tmp_path):
    """So that a full disk need not refuse them."""
    path = tmp_path / "lock"
    with lock_of(path) as lock:
        lock.acquire()
        first = path.read_text()
        deadline = time.monotonic() + 20
        while (now := path.read_text()) in (first, ""):
            assert time.monotonic() < deadline
        announce_stop(lock)
        last = path.read_text()
    assert len({len(first), len(now), len(last)}) == 1
    assert json.loads(last)["stopping"] == "yes"


def test_ranks_of_one_launch_share_it_and_those_of_another_do_not(tmp_path):
    path = tmp_path / "lock"
    lock_of(path, "a").wait_for_group()  # free
    with lock_of(path, "a") as lock:
        lock.acquire()
        lock_of(path, "a").wait_for_group()
        with pytest.raises(InputError, match="in use"):
            lock_of(path, "b").wait_for_group()


def test_an_object_that_is_gone_holds_nothing(tmp_path):
    lock = lock_of(tmp_path / "lock")
    lock.acquire()
    del lock
    assert os.listdir(tmp_path) == []


def test_a_forked_process_does_not_release_its_parents_lock(tmp_path):
    with lock_of(tmp_path / "lock") as lock:
        lock.acquire()
        process = FORK.Process(target=lock.release)
        process.start()
        process.join()
        assert process.exitcode == 0
        assert os.listdir(tmp_path) == ["lock"]


def test_a_copy_of_a_folder_in_use_is_free(tmp_path):
    folders = [tmp_path / name for name in ("run", "copy")]
    for folder in folders:
        folder.mkdir()
    path, copy = (folder / "lock" for folder in folders)
    with lock_of(path) as lock, lock_of(copy) as second:
        lock.acquire()
        copy.write_text(path.read_text())
        second.acquire()
        assert holder_in(copy).token != holder_in(path).token
        with pytest.raises(InputError, match="in use"):
            lock_of(path).acquire()


def test_a_lock_that_is_released_while_it_is_looked_at_is_no_error(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    path.write_text(Holder.this_process(path, "").to_text())
    real = lock_holder.read_text
    calls = []

    def and_release(asked):
        text = real(asked)
        calls.append(asked)
        if len(calls) == 2:  # the first call is of the lock, the second of the holder's own
            path.unlink()
        return text

    monkeypatch.setattr(lock_holder, "read_text", and_release)
    watch = lock_holder.HolderWatch(path)
    watch.look()
    assert len(calls) == 2
    assert watch.look() is lock_holder.State.FREE


def test_a_folder_that_was_moved_while_in_use_is_not_free(tmp_path):
    (tmp_path / "run").mkdir()
    lock = lock_of(tmp_path / "run" / "lock")
    lock.acquire()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(InputError, match="in use"):
        lock_of(tmp_path / "moved" / "lock").acquire()
