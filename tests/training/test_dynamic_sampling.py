"""Dynamic sampling: a set is the first prompts of the stream whose completions have different rewards.

However often the run is killed and on any number of ranks; what is left over at the bound is named, and no prompt is
used twice.
"""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_align.config.rollout import DynamicSamplingConfig
from megatron_align.errors import InputError, TrainingFault
from megatron_align.objectives.configuration import load_config
from megatron_align.rollout.rollouts import FILE, ROLLOUTS, Rollouts
from megatron_align.training.dynamic_sampling import replaced_without_signal
from tests.harness import training_ranks
from tests.harness.marks import mark_slow
from tests.harness.tiny import metrics_of, run_arguments
from tests.training.test_resume import cut_after

CLOCK = ("tokens_per_second", "step_seconds", "rollout_seconds", "sync_seconds")
# Of each prompt of a stream, the rewards of its two completions; None: not scored.
STREAM = [(0, 0), (1, 0), (1, 1), (0, 0), (0, 1), (None, 1), (1, 1), (1, 0), (0, 0), (0, 1), (1, 1), (0, 0)]


def answered(begin, end):
    """Return the scored rollouts of a part of the stream."""
    flat = [reward for pair in STREAM[begin:end] for reward in pair]
    return Rollouts(
        prompt_G=np.arange(begin, end),
        prompt_ids=[np.array([g]) for g in range(begin, end)],
        texts=[str(g) for g in range(begin, end)],
        completions=[[SimpleNamespace(token_ids=(g, k)) for k in range(2)] for g in range(begin, end)],
        rewards={"right": flat, "other": [float(i % 2) for i in range(len(flat))]},
        reward_C=torch.tensor([float(reward or 0) for reward in flat], dtype=torch.float64),
        scored_C=torch.tensor([reward is not None for reward in flat]),
        weight_G=torch.ones(end - begin, dtype=torch.float64),
    )


def sampled(count, **options):
    made = []

    def more(place, missing):
        made.append(missing)
        return answered(place, place + missing)

    return replaced_without_signal(answered(0, count), DynamicSamplingConfig(**options), more), made


def test_prompts_without_signal_are_replaced_by_the_next_in_the_stream():
    rollouts, made = sampled(3)
    assert made == [2, 1, 1, 1]  # 0 and 2 are replaced by 3 and 4, then 3 by 5, 5 by 6, 6 by 7
    assert rollouts.prompt_G.tolist() == [1, 4, 7] == [int(text) for text in rollouts.texts]
    assert [completion.token_ids for completion in rollouts.flat] == [
        (g, k) for g in (1, 4, 7) for k in (0, 1)
    ]
    assert rollouts.reward_C.tolist() == [1, 0, 0, 1, 1, 0]
    assert rollouts.rewards["right"] == [1, 0, 0, 1, 1, 0]
    assert rollouts.sampled["groups_replaced"] == 5
    assert rollouts.sampled["generation_batches"] == 5
    scored = [reward for pair in STREAM[:8] for reward in pair if reward is not None]
    assert rollouts.sampled["reward_sampled"] == pytest.approx(sum(scored) / len(scored))


def test_nothing_is_replaced_where_all_have_signal():
    rollouts, made = sampled(1, reward="other")  # the rewards differ, only their sum does not
    assert (made, rollouts.prompt_G.tolist(), rollouts.sampled["groups_replaced"]) == ([], [0], 0)


def test_at_the_bound_the_first_without_signal_fill_the_set_or_the_run_stops():
    rollouts, made = sampled(3, max_batches=2)
    assert made == [2]
    assert rollouts.prompt_G.tolist() == [0, 1, 4]  # 0 is the first without signal
    assert rollouts.sampled == {"groups_replaced": 2, "generation_batches": 2, "reward_sampled": 0.4}
    with pytest.raises(TrainingFault, match="2 of 3 prompts .*max_batches = 2 batches of 5 prompts"):
        sampled(3, max_batches=2, exhausted="stop")


BASE = {
    "model": {"path": "m"},
    "data": {"train": "d"},
    "objective": {"name": "grpo"},
    "rollout": {"dynamic_sampling": {}},
    "rewards": [{"kind": "length", "min": 2}],
    "train": {"steps": 2},
    "checkpoint": {"dir": "r"},
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"train": {"epochs": 2}},
            "needs train.steps: how many prompts a step takes is not known before; got",
        ),
        ({"rollout": {"dynamic_sampling": {"max_batches": 1}}}, "max_batches must be at least 2"),
        (
            {"rollout": {"dynamic_sampling": {"reward": "right"}}},
            r"one of the rewards \(length\), got 'right'",
        ),
        ({"rollout": {"dynamic_sampling": {"exhausted": "wait"}}}, "exhausted must be one of"),
        ({"rollout": {"engine": "data", "dynamic_sampling": {}}}, "does not apply to rollout.engine data"),
    ],
)
def test_refused(changes, message):
    with pytest.raises(InputError, match=message):
        load_config({**BASE, **changes})


def test_rewards_that_are_not_compared_are_refused():
    config = load_config({**BASE, "objective": {"name": "grpo", "advantage": "reinforce"}})
    with pytest.raises(InputError, match="dynamic_sampling replaces prompts .* got advantage reinforce"):
        config.objective.require_rollouts(config.rollout)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"What is {i} + {3 * i}?"}) for i in range(30)))
    return file


def arguments(model, prompts, folder, **options):
    settings = {
        "objective__name": "grpo",
        "objective__minibatches": 2,
        "rollout__max_tokens": 3,
        "rollout__dynamic_sampling": "{max_batches: 3}",
        "rewards": '[{kind: regex, pattern: "[a-p]"}]',
        "train__global_batch_size": 3,
        "train__steps": 5,
        "checkpoint__save_every": 1,
        "checkpoint__keep": 9,
        **options,
    }
    return run_arguments(model, prompts, folder, **settings)


@pytest.fixture(scope="module")
def run(pool, tiny_models, prompts, tmp_path_factory):
    """Three sets of rollouts; two steps each, but the last one's."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    pool.run(1, training_ranks.train, arguments(tiny_models(), prompts, folder))
    return folder


def rows_of(folder):
    return [{name: v for name, v in row.items() if name not in CLOCK} for row in metrics_of(folder)]


def prompts_of(folder):
    from pyarrow import parquet

    tables = [parquet.read_table(file).to_pydict() for file in sorted(folder.glob(f"{ROLLOUTS}/*/{FILE}"))]
    return [table["prompt_index"] for table in tables]


def test_a_run_takes_its_prompts_one_after_the_other(run):
    rows, sets = metrics_of(run), prompts_of(run)
    assert all(row["generation_batches"] > 1 for row in rows)
    assert sum(row["groups_replaced"] for row in rows[::2]) > 3
    used = [index for of_set in sets for index in of_set[::3]]
    assert len(used) == 18
    assert len(set(used)) == 18  # of 30 in an epoch, none twice
    for row, of_set in zip(rows[::2], sets, strict=True):
        without = 6 * row["groups_without_signal"]
        assert len(of_set) == 18
        assert without == pytest.approx(0) or row["generation_batches"] == 3


@pytest.mark.parametrize("step", mark_slow([1, 2], [1]))  # test_off_policy.py has both
def test_a_killed_run_goes_on_with_the_same_prompts(step, pool, tiny_models, prompts, run, tmp_path):
    """Killed within a set, and between two: later sets are generated again, of the prompts that came next."""
    cut = cut_after(run, tmp_path / "cut", step)
    for folder in (cut / ROLLOUTS).iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    pool.run(1, training_ranks.train, arguments(tiny_models(), prompts, cut))
    assert rows_of(cut) == rows_of(run)
    for folder in (run / ROLLOUTS).iterdir():
        assert (cut / ROLLOUTS / folder.name / FILE).read_bytes() == (folder / FILE).read_bytes()


@pytest.mark.slow
def test_ranks_take_the_same_prompts(pool, tiny_models, prompts, run, tmp_path):
    pool.run(2, training_ranks.train, arguments(tiny_models(), prompts, tmp_path / "two"))
    assert prompts_of(tmp_path / "two") == prompts_of(run)
    for row, wanted in zip(metrics_of(tmp_path / "two"), metrics_of(run), strict=True):
        for name in ("groups_replaced", "generation_batches", "reward_sampled", "reward"):
            assert row[name] == pytest.approx(wanted[name])
