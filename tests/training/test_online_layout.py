"""Laws 1 and 9 for rollouts: given the same completions, a policy-gradient run is the same on every layout (1e-5).

A layout here includes shared or repeated prompts, and packing. At the first minibatch of rollouts every ratio is 1.
"""

import json
import random

import pytest

from tests.harness.marks import mark_slow
from tests.harness.runs import remembered_runs
from tests.harness.tiny import run_arguments
from tests.training.test_preference_layout import LAYOUTS

OBJECTIVES = {
    "grpo": {"name": "grpo", "beta": 0.05},
    "report": {"name": "grpo", "beta": 0.05, "kl_in": "token_reward"},
    "reused": {"name": "grpo", "loss_type": "bnpo", "beta": 0.05, "iterations": 2, "minibatches": 2},
    "rloo": {"name": "rloo"},
    "gspo": {"name": "grpo", "loss_type": "grpo", "importance_sampling_level": "sequence", "minibatches": 2},
    "reinforce": {"name": "grpo", "advantage": "reinforce", "beta": 0.05, "kl_in": "token_reward"},
    "dr_grpo": {"name": "grpo", "loss_type": "dr_grpo", "scale_rewards": "none"},
    "vespo": {"name": "grpo", "loss_type": "vespo", "iterations": 2},
    "entropy": {"name": "grpo", "top_entropy_quantile": 0.3, "entropy_coef": 0.05, "iterations": 2},
}
# Entropies of a new model are all the vocabulary's but for rounding; at a low temperature they differ.
ROLLOUT = {"entropy": {"rollout__temperature": 0.1}}
CASES = [
    ("grpo", "tp2_pp2"),
    ("reused", "pp2_dp2"),
    ("rloo", "allgather2_pp2"),
    ("gspo", "repeated_prompts_tp2_dp2"),
    ("reinforce", "allgather2"),  # whitening over all ranks, not in each
    ("vespo", "repeated_prompts"),
    ("entropy", "ulysses2_tp2"),  # a row's entropy is of all tensor-parallel ranks, the threshold of all rows
]
SLOW = [(name, layout) for name in OBJECTIVES for layout in LAYOUTS if (name, layout) not in CASES]
CLOCK = ("padding", "tokens_per_second", "step_seconds", "rollout_seconds", "sync_seconds")


@pytest.fixture(scope="module")
def ranked(tmp_path_factory):
    """Prompts with two to four completions of other lengths, so that packs, ranks and slabs hold uneven parts."""
    draw, file = random.Random(0), tmp_path_factory.mktemp("data") / "ranked.jsonl"
    with open(file, "w") as out:
        for i in range(32):
            completions = [
                {
                    "content": [{"role": "assistant", "content": f"{k}: " + "x" * draw.randrange(1, 30)}],
                    "score": draw.uniform(-1, 1),
                }
                for k in range(2 + i % 3)
            ]
            prompt = [{"role": "user", "content": f"What is {i} + {'1' * draw.randrange(1, 9)}?"}]
            out.write(json.dumps({"prompt": prompt, "completions": completions}) + "\n")
    return file


@pytest.fixture(scope="module")
def train(pool, tiny_models, ranked, tmp_path_factory):
    def arguments(folder, objective, **options):
        options = {
            "train__steps": 5 if objective == "reused" else 3,
            **options,
        }  # of which 4 are on the first set
        given = {f"objective__{name}": value for name, value in OBJECTIVES[objective].items()}
        return run_arguments(
            tiny_models(),
            ranked,
            folder,
            **{"train__global_batch_size": 8, **given, **ROLLOUT.get(objective, {}), **options},
            optimizer__lr=2e-4,
            rollout__engine="data",
        )

    return remembered_runs(pool, tmp_path_factory, arguments)


@pytest.mark.parametrize("objective, layout", mark_slow([*CASES, *SLOW], SLOW))
def test_layouts_agree(objective, layout, train):
    world, options = LAYOUTS[layout]
    rows, wanted = train(objective, world, **options), train(objective)
    assert len(rows) == len(wanted)
    for row, want in zip(rows, wanted, strict=True):
        assert set(row) == set(want)
        for key, value in want.items():
            if isinstance(value, float) and key not in CLOCK:
                # A loss is a difference of terms of about 1, and at the first step 0 but for rounding.
                assert row[key] == pytest.approx(value, rel=1e-5, abs=2e-6), (row["step"], key)
        assert row["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_first_minibatch_is_of_the_policy_itself(objective, train):
    """Law 9: every ratio is 1, nothing is clipped, and the KL to a reference that is the policy is 0."""
    first = train(objective)[0]
    assert first["ratio_max"] == 1.0
    assert first["clip_fraction"] == 0.0
    assert first.get("kl", 0.0) == 0.0


@pytest.mark.parametrize("layout", mark_slow(["dp2", "pp2_dp2"], ["pp2_dp2"]))
def test_a_rank_without_prompts_has_no_part(layout, train):
    """Steps of one prompt: one of two data-parallel ranks has no tokens, and nothing is divided by the ranks."""
    world, options = LAYOUTS[layout]
    small = {"train__global_batch_size": 1, "train__steps": 3, "objective__iterations": 1}
    rows, wanted = train("reused", world, **options, **small), train("reused", **small)
    for row, want in zip(rows, wanted, strict=True):
        for key in ("loss", "grad_norm", "kl", "entropy", "ratio_max", "reward"):
            assert row[key] == pytest.approx(want[key], rel=1e-5, abs=2e-6), (row["step"], key)
    assert min(row["grad_norm"] for row in rows) > 1e-3


def test_later_steps_of_the_same_rollouts_are_off_policy(train):
    rows = train("reused")
    assert [row["rollout"] for row in rows] == [1, 1, 1, 1, 2]
    assert [row["ratio_max"] > 1 for row in rows] == [False, True, True, True, False]
    assert rows[0]["reward"] == rows[3]["reward"] != rows[4]["reward"]
