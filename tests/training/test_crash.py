"""Law 4: kill -9 anywhere, start the same command again: the rows that follow are those of the uninterrupted run, bit
by bit, each step once; no checkpoint that was whole is lost, and nobody is left behind. A full disk costs no step.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from megatron_align.checkpoint.folder import list_steps
from megatron_align.faults import VARIABLE
from megatron_align.training.run_lock import LOCK
from megatron_align.training.stop import EXIT_INTERRUPTED, EXIT_REQUEUE
from tests.harness import crash
from tests.harness.corruption import flip
from tests.harness.tiny import make_model, metrics_of, numbers, run_arguments

KILLED = -9
# A run of 6 steps, saved after 2, 4 and 6, keep 1: where it is killed one start after the other.
KILLS = (
    "step.trained:1",
    "step.logged:2",
    "save.begun:2",
    "save.copying:2",
    "save.file:2",
    "save.written:2",
    "save.named:2",
    "save.done:2",
    "step.trained:3",
    "save.file:4",
    "save.named:4",
    "prune.hidden:2",
    "step.logged:5",
    "save.done:6",
)
SOME_KILLS = ("step.logged:2", "save.file:2", "save.named:4", "prune.hidden:2")


@pytest.fixture(scope="module")
def small_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "small", num_hidden_layers=2)


@pytest.fixture(scope="module")
def arguments(small_model, chat_file, tmp_path_factory):
    """``arguments(folder, ...)`` -> those of a run in that folder."""
    cache = tmp_path_factory.mktemp("cache")  # tokenised once for all runs

    def get(folder, **options):
        settings = {
            "data__cache": cache,
            "train__steps": 6,
            "optimizer__schedule": "cosine",
            "checkpoint__save_every": 2,
            "checkpoint__keep": 1,
            **options,
        }
        return run_arguments(small_model, chat_file, folder, **settings)

    return get


@pytest.fixture
def command(arguments, tmp_path):
    """``command(...)`` -> arguments of the run that is killed, in ``tmp_path/run``."""
    return lambda **options: arguments(tmp_path / "run", **options)


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """``whole(world, ...)`` -> rows of the uninterrupted run, made once."""
    made = {}

    def get(world=1, **options):
        key = (world, *sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            assert crash.train(world, arguments(folder, **options), folder / "log") == [0] * world
            made[key] = numbers(folder)
        return made[key]

    return get


def steps_of(run):
    return [step for step, _ in list_steps(run)]


def hidden(run):
    return [path.name for path in run.glob(".*")]


def survive(world, command, tmp_path, kills, **options):
    """Kill a run again and again and let it end; return its rows."""
    run, log = tmp_path / "run", tmp_path / "log"
    for kill in kills:
        before = steps_of(run)
        codes = crash.train(world, command(**options), log, fault=f"kill@{kill}")
        assert KILLED in codes, (kill, codes, log.read_text())
        assert steps_of(run)[-1:] >= before[-1:], kill
    assert crash.train(world, command(**options), log) == [0] * world, log.read_text()
    assert [row["step"] for row in metrics_of(run)] == [1, 2, 3, 4, 5, 6]
    assert steps_of(run) == [6]
    assert hidden(run) == []
    return numbers(run)


@pytest.mark.parametrize(
    "kills, precision, background",  # each kill starts a process
    [
        (SOME_KILLS, "fp32", True),
        pytest.param(KILLS, "fp32", True, marks=pytest.mark.slow),
        pytest.param(KILLS, "bf16", False, marks=pytest.mark.slow),
    ],
    ids=["some", "all", "all_bf16"],
)
def test_killed_at_every_point(command, whole, tmp_path, kills, precision, background):
    options = {"train__precision": precision}
    rows = survive(1, command, tmp_path, kills, checkpoint__async_save=background, **options)
    assert rows == whole(**options)


@pytest.mark.slow
@pytest.mark.parametrize("precision, background", [("fp32", False), ("bf16", True)])
@pytest.mark.parametrize("layout", [{"parallel__tensor": 2}, {"parallel__pipeline": 2}, {}], ids=str)
def test_any_of_two_ranks_killed_at_every_point(command, whole, tmp_path, precision, background, layout):
    """What rank 0 does alone is struck on it, the rest on rank 1. A data-parallel replica writes no file."""
    alone = ["save.begun", "save.named", "save.done", "prune.hidden", *([] if layout else ["save.file"])]
    kills = [kill if kill.startswith(tuple(alone)) else f"{kill}:1" for kill in KILLS]
    options = {"train__precision": precision, **layout}
    rows = survive(2, command, tmp_path, kills, checkpoint__async_save=background, **options)
    assert rows == whole(2, **options)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(command, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    options = {"checkpoint__keep": 2, "checkpoint__async_save": False}
    assert KILLED in crash.train(1, command(**options), log, fault="kill@step.logged:5")
    assert steps_of(run) == [2, 4]
    flip(run / "step_000004" / "state" / "__0_1.distcp")
    assert KILLED in crash.train(1, command(), log, fault="kill@resume.aside")
    flip(run / "step_000002" / "card.json")  # damaged as well: refused, and nothing is overwritten
    assert crash.train(1, command(), log) == [2]
    assert "card.json: SHA-256 mismatch" in log.read_text()
    flip(run / "step_000002" / "card.json")
    assert crash.train(1, command(), log) == [0]
    assert numbers(run) == whole()
    assert sorted(path.name for path in run.glob("step_*")) == ["step_000004.damaged", "step_000006"]


def test_a_full_disk_costs_no_step(command, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    codes = crash.train(1, command(checkpoint__keep=3), log, fault="full@save.file:4")
    assert codes == [0], log.read_text()
    assert steps_of(run) == [2, 6]
    assert "warning: writing the checkpoint failed at" in log.read_text()
    assert "No space left on device" in log.read_text()
    assert numbers(run) == whole()


def test_rows_that_a_full_disk_refuses_are_written_later(command, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert crash.train(1, command(), log, fault="full@row.write:3") == [0], log.read_text()
    assert "metrics.jsonl: No space left on device; its rows wait in memory" in log.read_text()
    assert numbers(run) == whole()


@pytest.mark.parametrize(
    "point",
    [
        "save.file",
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("save.begun", "save.written", "save.named")),
    ],
)
def test_a_last_save_that_fails_is_an_error_and_spoils_nothing(command, tmp_path, point):
    run, log = tmp_path / "run", tmp_path / "log"
    longer = {"train__steps": 3, "checkpoint__resume_allow": "[schedule]"}
    assert crash.train(1, command(train__steps=2), log) == [0]
    assert crash.train(1, command(**longer), log, fault=f"full@{point}") == [1]
    assert log.read_text().count("error: writing the checkpoint failed at") == 1
    assert steps_of(run) == [2]
    assert hidden(run) == []
    assert crash.train(1, command(**longer), log) == [0]


def test_a_signal_saves_and_asks_to_be_started_again(command, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert crash.train(1, command(), log, fault="term@step.trained:3") == [EXIT_REQUEUE]
    assert steps_of(run) == [3]
    assert (run / "requeue").read_text() == "3\n"
    assert "stop requested (SIGTERM): saved after step 3" in log.read_text()
    assert crash.train(1, command(), log) == [0]
    assert not (run / "requeue").exists()
    assert numbers(run) == whole()


@pytest.mark.slow
def test_one_rank_that_is_asked_stops_all(command, tmp_path):
    log = tmp_path / "log"
    codes = crash.train(2, command(), log, fault="term@step.trained:3:1")
    assert codes == [EXIT_REQUEUE] * 2, log.read_text()
    assert steps_of(tmp_path / "run") == [3]


@pytest.mark.slow
def test_a_signal_to_torchrun_reaches_the_ranks(command, tmp_path):
    """torchrun passes SIGTERM on and ends with 1 whatever they answer: the file says what happened."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    launch += ["--nproc-per-node", "2", "--shutdown-timeout", "120", "-m", "megatron_align.train"]
    agent = subprocess.Popen([*launch, *command(train__steps=2000)], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").exists() or not metrics_of(run):
            assert agent.poll() is None, agent.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=240) != 0
    finally:
        agent.kill()
        agent.stderr.close()
    [*_, last] = metrics_of(run)
    assert (run / "requeue").read_text() == f"{last['step']}\n"
    assert steps_of(run)[-1] == last["step"]


def interrupt_during_step(ranks, run, times=1):
    """Send Ctrl-C to rank 0 once it makes steps."""
    crash.wait_until(lambda: (run / "metrics.jsonl").exists() and metrics_of(run), ranks)
    for _ in range(times):
        os.kill(ranks[0].pid, signal.SIGINT)
        time.sleep(0.2)


def test_ctrl_c_saves_and_the_same_command_resumes(command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    ranks = crash.start(1, command(train__steps=2000, checkpoint__save_every=1000), log)
    interrupt_during_step(ranks, run)
    assert crash.end(ranks) == [EXIT_INTERRUPTED], log.read_text()
    [step] = steps_of(run)
    assert metrics_of(run)[-1]["step"] == step
    assert f"stop requested (SIGINT): saved after step {step}; the same command resumes" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (run / "requeue").exists()  # a person stopped it, no scheduler
    assert not (run / LOCK).exists()


def test_a_second_ctrl_c_leaves_at_once(command, tmp_path):
    """Also while a save is being written: the step before the first one stays."""
    run, log = tmp_path / "run", tmp_path / "log"
    often = {"train__steps": 2000, "checkpoint__save_every": 1}
    ranks = crash.start(1, command(**often), log, {crash.HELD: "/absent"})
    crash.wait_until(lambda: log.exists() and "save held" in log.read_text(), ranks)
    interrupt_during_step(ranks, run, times=2)
    assert crash.end(ranks, timeout=20) == [EXIT_INTERRUPTED], log.read_text()
    assert log.read_text().count("interrupted again: left at once, without saving") == 1
    assert "Traceback" not in log.read_text()
    # Its lock and its partial checkpoint are in nobody's way.
    assert crash.train(1, command(train__steps=2), log) == [0]


def test_ctrl_c_before_the_first_step_is_one_line(command, tmp_path):
    log = tmp_path / "log"
    ranks = crash.start(1, command(), log, {crash.SIGNALLED_AT_LOADING: "2"})
    assert crash.end(ranks) == [EXIT_INTERRUPTED], log.read_text()
    line = (
        "interrupted: nothing that was saved is lost, the same command starts again, as no step was saved\n"
    )
    assert log.read_text().endswith(line)
    assert "Traceback" not in log.read_text()


def test_a_second_run_in_the_folder_is_refused_and_touches_nothing(command, whole, tmp_path):
    run, log, log2 = tmp_path / "run", tmp_path / "log", tmp_path / "log2"
    ranks = crash.start(1, command(), log, {crash.HELD: str(tmp_path / "go")})
    crash.wait_until(lambda: log.exists() and "save held" in log.read_text(), ranks)
    before = sorted(path.name for path in run.iterdir())
    assert crash.train(1, command(train__seed=7), log2) == [2]
    assert sorted(path.name for path in run.iterdir()) == before
    [line] = log2.read_text().splitlines()
    assert line.startswith(
        f"error: checkpoint.dir '{run}' is in use by another run: process {ranks[0].pid} on "
    )
    (tmp_path / "go").touch()
    assert crash.end(ranks) == [0], log.read_text()
    assert numbers(run) == whole()


def test_every_rank_of_a_second_run_is_refused(command, tmp_path):
    """No rank of it may prepare data there either, as rank 0 only holds the lock."""
    run, log, log2 = tmp_path / "run", tmp_path / "log", tmp_path / "log2"
    ranks = crash.start(1, command(), log, {crash.HELD: str(tmp_path / "go")})
    crash.wait_until(lambda: log.exists() and "save held" in log.read_text(), ranks)
    (tmp_path / "attempt_0").mkdir()
    second = crash.start(
        2, command(), log2, {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "attempt_0" / "0" / "error.json")}
    )
    for rank in second:
        rank.join(60)
    assert [rank.exitcode for rank in second] == [2, 2], log2.read_text()
    [line] = log2.read_text().splitlines()  # the second rank has found that the first one said it
    assert "is in use by another run" in line
    (tmp_path / "go").touch()
    assert crash.end(ranks) == [0], log.read_text()
    assert steps_of(run) == [6]


def test_a_requeued_job_waits_while_the_old_one_saves(command, whole, tmp_path):
    run, log, log2 = tmp_path / "run", tmp_path / "log", tmp_path / "log2"
    hold = {crash.HELD: str(tmp_path / "go"), VARIABLE: "term@step.trained:3"}
    ranks = crash.start(1, command(checkpoint__save_every=6), log, hold)
    crash.wait_until(lambda: log.exists() and "save held" in log.read_text(), ranks)
    requeued = crash.start(1, command(), log2)
    crash.wait_until(lambda: log2.exists() and "saving before it stops" in log2.read_text(), requeued)
    (tmp_path / "go").touch()
    assert crash.end(ranks) == [EXIT_REQUEUE], log.read_text()
    assert steps_of(run)[-1] == 3
    assert crash.end(requeued) == [0], log2.read_text()
    assert numbers(run) == whole()


def test_a_finished_run_says_so(command, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    export = {"train__steps": 2, "checkpoint__export_hf": True}
    assert crash.train(1, command(**export), log) == [0]
    (run / "requeue").touch()  # a scheduler's loop must end
    before = (run / "hf" / "config.json").stat().st_mtime_ns
    log.write_text("")
    assert crash.train(1, command(**export), log) == [0]
    [line] = log.read_text().splitlines()
    assert line.startswith(f"already finished: all 2 steps are done, the model is in {run / 'hf'}")
    assert (run / "hf" / "config.json").stat().st_mtime_ns == before
    assert not (run / "requeue").exists()
    shutil.rmtree(run / "hf")
    assert crash.train(1, command(**export), log) == [0]
    assert (run / "hf" / "config.json").exists()  # what is missing is made again


def test_nobody_outlives_a_kill_in_the_middle_of_a_save(command, tmp_path):
    log = tmp_path / "log"
    assert crash.train(1, command(), log, fault="kill@save.file:2") == [KILLED]
    assert crash.writers_of(log) == []
