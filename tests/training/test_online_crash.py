"""Laws 4 and 9: kill -9 anywhere in an online run, start it again: the same rows and rollouts, bit for bit.

An engine or a reward that fails ends the run on every rank with one line, and nothing is half written.
"""

import json
import re
import shutil
import time

import pytest

from megatron_align.rollout.rollouts import ROLLOUTS
from tests.harness import crash
from tests.harness.http_server import VLLMScript, serving
from tests.harness.marks import mark_slow
from tests.harness.tiny import make_model, metrics_of, run_arguments

CLOCK = ("tokens_per_second", "step_seconds", "rollout_seconds", "sync_seconds")
KILLED = -9
REWARDS = '[{kind: regex, pattern: "[a-e]"}, {kind: length, min: 4}]'
# Three sets of rollouts, two steps each, saved after each: where the run is killed one start after the other.
KILLS = {
    "few": ("rollouts.generated:1", "rollouts.written:3", "step.trained:4", "save.file:5"),
    "all": (
        "rollouts.synced:1",
        "rollouts.scored:1",
        "rollouts.write:1",
        "step.logged:1",
        "step.trained:2",
        "rollouts.synced:3",
        "rollouts.generated:3",
        "rollouts.scored:3",
        "rollouts.write:3",
        "rollouts.written:3",
        "save.begun:3",
        "save.written:3",
        "save.named:4",  # in the background: rollouts of step 5 may be written by then
        "step.trained:5",
        "save.done:6",
    ),
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """``arguments(folder, ...)`` -> those of a run in that folder."""
    folder = tmp_path_factory.mktemp("online")
    model = make_model(folder / "small", num_hidden_layers=2)
    lines = [json.dumps({"prompt": f"What is {i} + {3 * i}?"}) for i in range(10)]
    (folder / "prompts.jsonl").write_text("\n".join(lines))

    def get(run, **options):
        settings = {
            "objective__name": "grpo",
            "objective__beta": 0.02,
            "objective__minibatches": 2,
            "rollout__max_tokens": 8,
            "rewards": REWARDS,
            "train__global_batch_size": 3,
            "train__steps": 6,
            "checkpoint__save_every": 1,
            "checkpoint__keep": 1,
            **options,
        }
        return run_arguments(model, folder / "prompts.jsonl", run, **settings)

    return get


def state_of(run):
    """Return the rows without times, and the bytes of all rollouts."""
    rows = [{name: v for name, v in row.items() if name not in CLOCK} for row in metrics_of(run)]
    files = sorted((run / ROLLOUTS).glob("*/*"))
    return rows, {str(file.relative_to(run)): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory):
    """The state of the uninterrupted run."""
    run, log = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("log") / "log"
    assert crash.train(1, arguments(run), log) == [0], log.read_text()
    return state_of(run)


@pytest.mark.parametrize("kills", mark_slow(KILLS, ["all"]))
def test_killed_at_every_point(kills, arguments, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    for kill in KILLS[kills]:
        codes = crash.train(1, arguments(run), log, fault=f"kill@{kill}")
        assert codes == [KILLED], (kill, codes, log.read_text())
    assert crash.train(1, arguments(run), log) == [0], log.read_text()
    assert state_of(run) == whole
    assert [len(of_run) for of_run in whole] == [6, 3]
    assert list(run.glob(".*")) == list((run / ROLLOUTS).glob(".*")) == []


@pytest.mark.slow
def test_a_run_with_a_critic_killed_at_every_point(arguments, tmp_path):
    """Both models are in each checkpoint or neither; values are read with the rollouts, or computed again."""
    options = {"objective__name": "ppo", "critic__optimizer": "{lr: 1e-3}"}
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert crash.train(1, arguments(whole, **options), log) == [0], log.read_text()
    for kill in KILLS["all"]:
        codes = crash.train(1, arguments(run, **options), log, fault=f"kill@{kill}")
        assert codes == [KILLED], (kill, codes, log.read_text())
    assert crash.train(1, arguments(run, **options), log) == [0], log.read_text()
    assert state_of(run) == state_of(whole)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"parallel__pipeline": 2}, {"parallel__tensor": 2}], ids=str)
def test_a_rank_of_two_killed(layout, arguments, tmp_path):
    whole, run, log = tmp_path / "whole", tmp_path / "run", tmp_path / "log"
    assert crash.train(2, arguments(whole, **layout), log) == [0, 0], log.read_text()
    for kill in ("rollouts.generated:1:1", "rollouts.written:3", "rollouts.scored:5:1"):
        codes = crash.train(2, arguments(run, **layout), log, fault=f"kill@{kill}")
        assert KILLED in codes, (kill, codes, log.read_text())
    assert crash.train(2, arguments(run, **layout), log) == [0, 0], log.read_text()
    assert state_of(run) == state_of(whole)


@pytest.mark.slow
def test_rollouts_that_a_full_disk_refuses_end_the_run_with_one_line(arguments, whole, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    assert crash.train(1, arguments(run), log, fault="full@rollouts.write:3") == [1]
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert "No space left on device" in line
    assert "Traceback" not in log.read_text()
    assert [row["step"] for row in metrics_of(run)] == [1, 2]
    assert [folder.name for folder in (run / ROLLOUTS).iterdir()] == ["step_000001"]
    assert crash.train(1, arguments(run), log) == [0], log.read_text()
    assert state_of(run) == whole


@pytest.mark.slow
def test_rollouts_of_a_lost_branch_are_not_read(arguments, whole, tmp_path):
    """Set back to step 2 and continued with another learning rate: rollouts of step 5 are of other weights."""
    run, log = tmp_path / "run", tmp_path / "log"
    assert crash.train(1, arguments(run, checkpoint__keep=9), log) == [0]
    for step in (3, 4, 5, 6):
        shutil.rmtree(run / f"step_{step:06d}")
    changed = arguments(run, optimizer__lr=5e-3, checkpoint__resume_allow="[schedule]")
    assert crash.train(1, changed, log) == [0], log.read_text()
    rows, files = state_of(run)
    assert rows[:2] == whole[0][:2]
    assert rows[2]["reward"] == whole[0][2]["reward"]  # made with the weights of step 2
    same = [files[name] == content for name, content in whole[1].items()]
    assert same == [True, True, False]


BAD = """
def nan(completions):
    return [float("nan")] * len(completions)


def few(completions):
    return [0.0] * (len(completions) - 1)


def fail(completions):
    raise ValueError("no")


def none(completions):
    return [None] * len(completions)
"""


@pytest.mark.parametrize("name", mark_slow(["nan", "few", "fail"], ["few", "fail"]))
def test_a_reward_that_fails_ends_the_run_on_every_rank(name, arguments, tmp_path):
    run, log, file = tmp_path / "run", tmp_path / "log", tmp_path / "bad.py"
    file.write_text(BAD)
    rewards = f"[{{kind: function, path: '{file}:{name}', retries: 0}}]"
    codes = crash.train(2, arguments(run, rewards=rewards), log)
    assert set(codes) - {KILLED} in ({1}, {2}), (codes, log.read_text())
    text = log.read_text()
    assert "Traceback" not in text
    [line] = {line for line in text.splitlines() if line.startswith("error")}
    assert name in line
    assert not [*run.glob(f"{ROLLOUTS}/*"), *run.glob("step_*")]
    assert not (run / "metrics.jsonl").exists() or not metrics_of(run)


class BadServer(VLLMScript):
    """A vLLM server that fails as ``fault`` says."""

    def __init__(self, fault):
        super().__init__(context=256)
        self.fault = fault

    def __call__(self, path, body):
        status, answer = super().__call__(path, body)
        if path == "/v1/completions":
            [choice] = answer["choices"]
            if self.fault == "gone" and len(self.requests) > 4:
                return 400, {"error": {"message": "the engine is dead"}}
            if self.fault == "few":
                choice |= {"token_ids": [], "logprobs": {"token_logprobs": []}}
            if self.fault == "vocabulary":
                choice["token_ids"][0] = 259
            if self.fault == "hangs" and len(self.requests) > 4:
                time.sleep(5)
        if path == "/weight_info" and self.fault == "restarted" and self.requests:
            return 200, {"weight_version": "default"}
        return status, answer


ENGINE = {
    "gone": "generation failed in step 1: .*the engine is dead",
    "few": "an engine must give 3 completions of at least one token, got 0 for .*prompts.jsonl:",
    "vocabulary": "tokens of the model's vocabulary of 259, got token 259 for .*prompts.jsonl:",
    "hangs": r"/v1/completions failed 1 times, .*: no answer within 2 s \(rollout.request_timeout\)",
    "restarted": "must have the weights of version",
    "other model": "log-probs of the engine must be the trainer's",
}


@pytest.mark.parametrize("fault", mark_slow(ENGINE, ["gone", "few", "hangs", "restarted", "other model"]))
def test_an_engine_that_fails_ends_the_run_with_one_line(fault, arguments, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    with serving(BadServer(fault)) as url:
        options = {"rollout__engine": "vllm", "rollout__url": url}
        if fault == "hangs":
            options |= {"rollout__request_timeout": 2, "rollout__request_retries": 0}
        codes = crash.train(1, arguments(run, **options), log)
    assert codes == [1], log.read_text()
    [line] = [line for line in log.read_text().splitlines() if line.startswith("error")]
    assert re.search(ENGINE[fault], line), line
    assert "Traceback" not in log.read_text()
    assert not list(run.glob("step_*"))


@pytest.mark.slow
def test_completions_that_nothing_scores_teach_nothing(arguments, tmp_path):
    run, log, file = tmp_path / "run", tmp_path / "log", tmp_path / "bad.py"
    file.write_text(BAD)
    rewards = f"[{{kind: function, path: '{file}:none'}}]"
    assert crash.train(1, arguments(run, rewards=rewards, objective__beta=0.0), log) == [0], log.read_text()
    assert {(row["loss"], row["grad_norm"]) for row in metrics_of(run)} == {(0.0, 0.0)}
