"""Law 9: an online run that was killed continues with the same rollouts, bit for bit, and writes the same rows.

Killed at any step, also between two steps that train on the same rollouts.
"""

import json
import shutil

import pytest

from megatron_align.rollout.rollouts import FILE, ROLLOUTS
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments
from tests.training.test_resume import cut_after

CLOCK = ("tokens_per_second", "step_seconds", "rollout_seconds", "sync_seconds")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"What is {i} + {3 * i}?", "answer": str(4 * i)}) for i in range(10)]
    file.write_text("\n".join(lines))
    return file


def arguments(model, prompts, folder, **options):
    return run_arguments(
        model,
        prompts,
        folder,
        **{
            "objective__name": "grpo",
            "objective__beta": 0.02,
            "objective__minibatches": 2,
            "rollout__max_tokens": 8,
            "rewards": '[{kind: regex, pattern: "[a-e]"}, {kind: length, min: 4}]',
            "train__global_batch_size": 3,
            "train__steps": 6,
            "checkpoint__save_every": 1,
            "checkpoint__keep": 9,
            **options,
        },
    )


@pytest.fixture(scope="module")
def run(pool, tiny_models, prompts, tmp_path_factory):
    """Run once to the end: three sets of rollouts, two steps each."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pool.run(1, training_ranks.train, arguments(tiny_models(), prompts, folder))
    return folder


def rows_of(folder):
    return [{name: v for name, v in row.items() if name not in CLOCK} for row in metrics_of(folder)]


@pytest.mark.parametrize("step", [2, 3])
def test_a_killed_run_continues_with_the_same_rollouts(pool, tiny_models, prompts, run, tmp_path, step):
    cut = cut_after(run, tmp_path / "cut", step)
    for folder in (cut / ROLLOUTS).iterdir():  # as if it had been killed in the step after the checkpoint's
        if int(folder.name.removeprefix("step_")) > step + 1:
            shutil.rmtree(folder)
    pool.run(1, training_ranks.train, arguments(tiny_models(), prompts, cut))
    assert rows_of(cut) == rows_of(run)
    assert [row.get("rollout_seconds") is None for row in metrics_of(cut)[step:]] == [
        name in (3, 4, 6) for name in range(step + 1, 7)
    ]
    for folder in (run / ROLLOUTS).iterdir():
        assert (cut / ROLLOUTS / folder.name / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_rollouts_hold_what_the_step_was_trained_on(run):
    from pyarrow import parquet

    table = parquet.read_table(run / ROLLOUTS / "step_000001").to_pydict()
    assert len(table["prompt"]) == 6 * 3
    row = metrics_of(run)[0]
    assert sum(table["reward"]) / 18 == pytest.approx(row["reward"])
    assert sum(table["reward/regex"]) / 18 == pytest.approx(row["reward/regex"])
    assert set(table["weight_version"]) == {0}
    for ids, logprobs, old in zip(table["token_ids"], table["logprobs"], table["old_logprobs"], strict=True):
        assert len(ids) == len(logprobs) <= 8
        assert logprobs == pytest.approx(old, abs=1e-4)  # the engine's equal the trainer's


def test_rollouts_of_other_options_are_made_again(pool, tiny_models, prompts, run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run / ROLLOUTS, copy / ROLLOUTS)
    pool.run(
        1,
        training_ranks.train,
        arguments(tiny_models(), prompts, copy, rollout__temperature=0.5, train__steps=1),
    )
    first = (copy / ROLLOUTS / "step_000001" / FILE).read_bytes()
    assert first != (run / ROLLOUTS / "step_000001" / FILE).read_bytes()


@pytest.mark.parametrize("step", mark_slow([1, 2], [2]))
def test_given_completions_are_compared_with_the_policy_before_their_first_step(
    pool, tiny_models, tmp_path, step
):
    """Killed between steps on the same completions: the ratios after it are those of the uninterrupted run."""
    data, folder = tmp_path / "ranked.jsonl", tmp_path / "run"
    completions = [{"content": "abc" * (k + 1), "score": k} for k in range(2)]
    data.write_text("\n".join(json.dumps({"prompt": f"{i}?", "completions": completions}) for i in range(6)))
    options = {"objective__minibatches": 1, "objective__iterations": 3, "train__steps": 3, "rewards": "[]"}
    options |= {"rollout__engine": "data", "train__global_batch_size": 3}
    pool.run(1, training_ranks.train, arguments(tiny_models(), data, folder, **options))
    cut = cut_after(folder, tmp_path / "cut", step)
    pool.run(1, training_ranks.train, arguments(tiny_models(), data, cut, **options))
    assert rows_of(cut) == rows_of(folder)
    assert rows_of(cut)[2]["ratio_max"] > 1.01


def test_rollouts_are_scored_by_the_present_function(pool, tiny_models, prompts, tmp_path):
    """A run that starts again after its reward's file was changed does not train on the old rewards."""
    function = tmp_path / "score.py"
    rewards = f"[{{kind: function, path: '{function}:score'}}]"
    options = {"rewards": rewards, "train__steps": 1, "objective__minibatches": 1}
    made = []
    for i, comment in enumerate(("", "", "# changed")):
        function.write_text(
            f"def score(completions, **columns):\n    return [1.0] * len(completions)  {comment}\n"
        )
        if i:
            shutil.copytree(tmp_path / "0" / ROLLOUTS, tmp_path / str(i) / ROLLOUTS)
        pool.run(1, training_ranks.train, arguments(tiny_models(), prompts, tmp_path / str(i), **options))
        made.append("rollout_seconds" in metrics_of(tmp_path / str(i))[0])
    assert made == [True, False, True]
